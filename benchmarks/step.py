"""How fast is one search step: the batched supernet against one module per operation and edge?

Rows are steps: of the weights, and of the architecture by order 1 and 2. "Published" is the plain form as the
public code runs it, which computes the gradients of weights and architecture in every step; "frozen" is the
same plain form driven by our steps, which leave out what a step does not use. Both are driven with the same
weights, gates, images and threads.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Roofline, count, in_turns, parser, prepare, roofline, speedup, table
from benchmarks.plain import PlainSupernet, published_alpha_step, published_weight_step
from nas.arch_updates import Bilevel
from nas.samplers import Progress, Softmax, init_arch
from nas.search import weight_step
from nas.spaces.cell import CellSpace
from nas.state import Batch, SearchState
from nas.streams import generator, seeded
from nas.supernets.cell import CellSupernet, CellSupernetConfig

CLIP = 5.0


@dataclass(frozen=True)
class Net:
    """Size of a supernet and of what it sees."""

    cells: int
    channels: int
    channels_in: int
    image_size: int
    batch: int


NETS = {
    "paper": Net(cells=8, channels=16, channels_in=3, image_size=32, batch=64),
    "digits": Net(cells=4, channels=8, channels_in=1, image_size=8, batch=64),
}
"""The search of the papers on CIFAR-10, and that of the laptop preset on digits."""


def forms(net: Net, K: int, device: torch.device) -> tuple[SearchState, SearchState, Batch]:
    """The plain and the fast supernet with equal weights, as the search holds them, and a random batch."""
    space = CellSpace()
    config = CellSupernetConfig(partial_channels=K, edge_norm=K > 1)
    with seeded(0, "benchmark"):
        fast = config.build(
            space,
            dict(space.choices),
            cells=net.cells,
            channels=net.channels,
            classes=10,
            channels_in=net.channels_in,
        )
        plain = PlainSupernet(fast, net.cells, net.channels, 10, net.channels_in)
    draws = generator(0, "images")
    images = torch.randn(net.batch, net.channels_in, net.image_size, net.image_size, generator=draws)
    labels = torch.randint(0, 10, (net.batch,), generator=draws)
    states = [_state(supernet, config, space, device) for supernet in (plain, fast)]
    return states[0], states[1], (images.to(device), labels.to(device))


def _state(
    supernet: CellSupernet | PlainSupernet, config: CellSupernetConfig, space: CellSpace, device: torch.device
) -> SearchState:
    arch = init_arch(config.gated(dict(space.choices)), generator(0, "alpha"), device)
    weights = torch.optim.SGD(
        supernet.to(device).parameters(),
        lr=0.025,
        momentum=0.9,
        weight_decay=3e-4,
        fused=True,
    )
    return SearchState(
        supernet=supernet,  # type: ignore[arg-type]  # the plain form answers to all that a step asks
        arch=arch,
        sampler=Softmax(),
        weight_optimizer=weights,
        arch_optimizer=Bilevel().optimizer(arch),
        progress=Progress(0, 50),
        draws=generator(0, "gates"),
    )


Forms = dict[str, Callable[[], object]]


def steps(net: Net, K: int, device: torch.device, *, exact: bool) -> dict[str, Forms]:
    """By kind of step, its forms: published, frozen and fast."""
    plain, fast, batch = forms(net, K, device)
    first, second = Bilevel(order=1), Bilevel(order=2)
    found: dict[str, Forms] = {
        "weights": {
            "published": lambda: published_weight_step(plain, batch, CLIP),
            "frozen": lambda: weight_step(plain, batch, CLIP),
            "fast": lambda: weight_step(fast, batch, CLIP),
        },
        "alpha, order 1": {
            "published": lambda: published_alpha_step(plain, batch),
            "frozen": lambda: first.step(plain, batch, batch),
            "fast": lambda: first.step(fast, batch, batch),
        },
        "alpha, order 2": {
            "frozen": lambda: second.step(plain, batch, batch),
            "fast": lambda: second.step(fast, batch, batch),
        },
    }
    if exact:
        curved = Bilevel(order=2, hessian="exact")
        found["alpha, order 2, exact"] = {
            "frozen": lambda: curved.step(plain, batch, batch),
            "fast": lambda: curved.step(fast, batch, batch),
        }
    return found


def measure(
    net: Net, ks: list[int], rounds: int, device: torch.device, *, exact: bool, kinds: list[str] | None = None
) -> str:
    """Table of the steps for each K."""
    peak = roofline(device)
    print(f"roofline: {peak}")
    rows = []
    for K in ks:
        for kind, candidates in steps(net, K, device, exact=exact).items():
            if kinds and not any(kind.startswith(wanted) for wanted in kinds):
                continue
            rows.append([K, kind, *_row(candidates, rounds, device, peak)])
            print(f"K={K} {kind}: {rows[-1][2]} s", flush=True)
    head = [
        "K",
        "step",
        "fast, s",
        "published/fast",
        "frozen/fast",
        "ops, published",
        "ops, frozen",
        "ops, fast",
        "of roofline",
    ]
    return table(head, rows)


def _row(candidates: Forms, rounds: int, device: torch.device, peak: Roofline) -> list[object]:
    times = in_turns(candidates, rounds=rounds, device=device)
    counts = {name: count(step, peak) for name, step in candidates.items()}
    published = "published" in candidates
    share = counts["fast"].ops / counts["published" if published else "frozen"].ops
    return [
        f"{times['fast'].median:.3f}",
        speedup(times["published"], times["fast"]) if published else "",
        speedup(times["frozen"], times["fast"]),
        counts["published"].ops if published else "",
        counts["frozen"].ops,
        f"{counts['fast'].ops} ({share:.0%})",
        f"{counts['fast'].bound / times['fast'].median:.0%}",
    ]


def folds(rounds: int, device: torch.device, batch: int) -> str:
    """Table of a separable convolution as one dense kernel against its two, for widths of an operation.

    What `nas.supernets.stacked.FOLD_MAX_CHANNELS` should be on this device.
    """
    rows = []
    for channels, side in ((4, 32), (8, 16), (16, 32), (16, 8), (32, 16), (64, 8)):
        for kernel in (3, 5):
            draws = generator(0, "fold", channels, kernel)
            x = torch.randn(batch, 2 * channels, side, side, generator=draws).to(device)
            x = x.contiguous(memory_format=torch.channels_last)
            dw = torch.randn(8, channels, kernel, kernel, generator=draws).to(device)
            pw = torch.randn(8, channels, channels, generator=draws).to(device)
            tensors = [tensor.requires_grad_() for tensor in (x, dw, pw)]
            times = in_turns(
                {
                    "two": lambda t=tensors: torch.autograd.grad(_two(*t).sum(), t),  # type: ignore[misc]
                    "dense": lambda t=tensors: torch.autograd.grad(_dense(*t).sum(), t),  # type: ignore[misc]
                },
                rounds=rounds,
                device=device,
            )
            rows.append([channels, f"{side}x{side}", kernel, speedup(times["two"], times["dense"])])
    return table(["channels", "map", "kernel", "two kernels / one dense"], rows)


def _dense(x: Tensor, dw: Tensor, pw: Tensor) -> Tensor:
    kernel = (pw[..., None, None] * dw[:, None]).flatten(0, 1)
    return F.conv2d(x, kernel, padding=dw.shape[2] // 2, groups=2)


def _two(x: Tensor, dw: Tensor, pw: Tensor) -> Tensor:
    channels = dw.shape[1]
    first, second = x.chunk(2, dim=1)
    x = torch.cat([first] * 4 + [second] * 4, dim=1)
    y = F.conv2d(x, dw.reshape(-1, 1, *dw.shape[2:]), padding=dw.shape[2] // 2, groups=8 * channels)
    return F.conv2d(y, pw.reshape(-1, channels, 1, 1), groups=8)


def options() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    found = parser(__doc__, rounds=7)
    found.add_argument("--net", choices=NETS, default="paper", help="size of the supernet (default paper)")
    found.add_argument("--K", type=int, nargs="+", default=[4, 1], help="partial channels (default 4 1)")
    found.add_argument("--batch", type=int, help="images in a batch (default 64)")
    found.add_argument(
        "--steps", nargs="+", help="only steps that start so, e.g. weights 'alpha, order 1' (default all)"
    )
    found.add_argument("--exact", action="store_true", help="exact Hessian-vector products too")
    found.add_argument("--fold", action="store_true", help="instead: dense kernels against separable ones")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    chosen = options().parse_args(arguments)
    device = prepare(chosen)
    net = NETS[chosen.net]
    if chosen.batch is not None:
        net = Net(net.cells, net.channels, net.channels_in, net.image_size, chosen.batch)
    if chosen.fold:
        print(folds(chosen.rounds, device, net.batch))
        return
    print(f"{chosen.net} net: {net}")
    print(measure(net, chosen.K, chosen.rounds, device, exact=chosen.exact, kinds=chosen.steps))


if __name__ == "__main__":
    main()
