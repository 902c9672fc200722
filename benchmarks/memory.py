"""What does a search step keep for its backward pass, and what do K and checkpointing save of it?

Exact counts of bytes, alike on any machine: the activations that autograd holds after the forward pass.
"Published" holds what the gradients of weights and architecture need, "frozen" what those of the weights
need; the fast form is that of our weight step, with and without its cells computed again in the backward
pass.
"""

import torch

from benchmarks.measure import parser, prepare, table
from benchmarks.step import NETS, Net, forms
from nas.gates import detached, leaves
from nas.metrics import saved_activation_bytes

MB = 2**20


def saved_mb(net: Net, K: int, device: torch.device) -> dict[str, float]:
    """MB kept by each form for a batch of `net`."""
    plain, fast, (images, _) = forms(net, K, device)
    (gates,) = fast.gates()
    found = {}
    for name, supernet, seen in (
        ("published", plain.supernet, leaves(gates)),
        ("frozen", plain.supernet, detached(gates)),
        ("fast", fast.supernet, detached(gates)),
    ):
        few, more = (saved_activation_bytes(supernet, seen, images[:count]) for count in (2, 4))
        found[name] = (more - few) / 2 * net.batch / MB
    fast.supernet.checkpoint_cells = True
    few, more = (saved_activation_bytes(fast.supernet, detached(gates), images[:n]) for n in (2, 4))
    found["checkpointed"] = (more - few) / 2 * net.batch / MB
    return found


def measure(nets: list[str], ks: list[int], device: torch.device) -> str:
    """Table of MB kept, by net and K."""
    rows = []
    for name in nets:
        for K in ks:
            kept = saved_mb(NETS[name], K, device)
            rows.append(
                [
                    name,
                    K,
                    *[f"{kept[form]:.1f}" for form in ("published", "frozen", "fast", "checkpointed")],
                    f"{kept['fast'] / kept['published']:.1%}",
                    f"{kept['fast'] / kept['frozen']:.1%}",
                ]
            )
    head = ["net", "K", "published", "frozen", "fast", "checkpointed", "fast/published", "fast/frozen"]
    return table(head, rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the counts and print their table."""
    found = parser(__doc__, rounds=1)
    found.add_argument("--net", choices=NETS, nargs="+", default=list(NETS), help="supernets (default all)")
    found.add_argument("--K", type=int, nargs="+", default=[1, 2, 4, 8], help="partial channels")
    chosen = found.parse_args(arguments)
    device = prepare(chosen)
    print("MB kept by one training step for its backward pass, batch 64")
    print(measure(chosen.net, chosen.K, device))


if __name__ == "__main__":
    main()
