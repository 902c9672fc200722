"""How the benchmarks measure: forms of one computation in turns, exact counts, a roofline of the same run.

Machines drift, by more than most differences are large. So the forms that are compared run in turns in one
process, and a ratio is that of their medians, with the spread of the ratios of single rounds beside it.
Operations and bytes are counted, not timed, and come out alike everywhere.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry


@dataclass(frozen=True)
class Timing:
    """Seconds of one form, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle of the rounds, in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one form is than another: ratio of medians, and the range of single rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def speedup(plain: Timing, fast: Timing) -> Ratio:
    """Ratio of the medians of `plain` and `fast`; its spread goes from the least to the largest round."""
    rounds = [a / b for a, b in zip(plain.seconds, fast.seconds, strict=True)]
    return Ratio(plain.median / fast.median, min(rounds), max(rounds))


def in_turns(
    forms: dict[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Time every form once a round, in an order that turns round each time, after `warmup` untimed rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(-warmup, rounds):
        names = list(forms) if number % 2 else list(reversed(forms))
        for name in names:
            synchronise(device)
            started = time.perf_counter()
            forms[name]()
            synchronise(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def synchronise(device: torch.device | None) -> None:
    """Wait for what is queued on a GPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


# --- exact counts -------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a piece of code asked of the machine."""

    ops: int = 0
    """Operations that are not views."""
    flops: int = 0
    """Floating-point operations of convolutions and matrix products."""
    traffic: int = 0
    """Bytes that these operations read and write if every one goes through memory."""
    bound: float = 0.0
    """Seconds at the roofline: for each operation the larger of its arithmetic and its traffic time."""


@dataclass(frozen=True)
class Roofline:
    """Best rates seen on this device in this run."""

    flops: float
    """Floating-point operations per second, of a matrix product."""
    bandwidth: float
    """Bytes per second, read and written, of a copy too large for the caches."""

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s matrix product, {self.bandwidth / 1e9:.1f} GB/s copy"


def roofline(device: torch.device) -> Roofline:
    """Measure both rates; takes about a second on a CPU."""
    size = 1536
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    source = torch.randn(2**25, device=device)
    target = torch.empty_like(source)
    times = in_turns(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds=7, device=device
    )
    return Roofline(
        2 * size**3 / min(times["product"].seconds),
        2 * source.numel() * source.element_size() / min(times["copy"].seconds),
    )


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch ships it without types
    def __init__(self, peak: Roofline | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.peak = Counts(), peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name in NOT_COMPUTED:
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        traffic = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        flops = _flops(func._overloadpacket, args, kwargs or {}, out)
        self.counts.ops += 1
        self.counts.flops += flops
        self.counts.traffic += traffic
        if self.peak is not None:
            self.counts.bound += max(flops / self.peak.flops, traffic / self.peak.bandwidth)
        return out


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet is torch.ops.aten.convolution_backward:
        # PyTorch's own count forgets the groups.
        gradient, x, weight, *_, wanted = args
        return int(conv_flop_count(x.shape, weight.shape, gradient.shape) * (wanted[0] + wanted[1]))
    found: int = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    return found


NOT_COMPUTED = (
    "aten::detach",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
)
"""Operations that touch no data, besides views."""


def count(action: Callable[[], object], peak: Roofline | None = None) -> Counts:
    """Count what `action` does, backward passes included; `peak` gives the bound in seconds too."""
    counter = _Counter(peak)
    with counter:
        action()
    return counter.counts


# --- command lines and tables -------------------------------------------------------------------------------


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    found.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default {rounds})")
    found.add_argument("--threads", type=int, default=None, help="PyTorch threads (default: all cores)")
    found.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    return found


def prepare(options: argparse.Namespace) -> torch.device:
    """Set threads and device as asked, and say on what the numbers were taken.

    Raises:
        ValueError: fewer than one round or thread.
    """
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        raise ValueError(f"--rounds {options.rounds} and --threads {options.threads} must be at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    print(f"torch {torch.__version__}, {device.type} ({name}), {torch.get_num_threads()} threads")
    return device


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Rows as a Markdown table with aligned columns."""
    cells = [list(head), *[[str(value) for value in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
