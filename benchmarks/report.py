"""How long does the report of 6,561 architectures take, and how much memory?

The file is that of NAS-Bench-Macro where `--path` names it; without it, one of the same form and size with
made-up accuracies, so that the figure can be had anywhere. The limits it is held against are those that the
analysis was built for: 60 s on two cores, 2 GB.

    python -m benchmarks.report
    python -m benchmarks.report --path ../nas-bench-macro_cifar10.json
"""

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis import loaders, report

SECONDS, MEGABYTES = 60.0, 2_000.0


def made_up(path: Path, seed: int = 0) -> Path:
    """A file in the form of NAS-Bench-Macro with all its keys: more blocks help, more parameters do not."""
    draw = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    entries = {}
    for digits in itertools.product("012", repeat=8):
        key = "".join(digits)
        codes = np.array([int(digit) for digit in digits])
        widths = np.repeat([1.0, 2.0, 4.0], (2, 3, 3))
        network = loaders.canonical_macro(key)
        if network not in found:
            mean = 80 + 6 * np.log1p((codes > 0).sum()) - 0.2 * (codes * widths).sum() / 4
            found[network] = np.clip(mean + draw.normal(0, 1.0) + draw.normal(0, 0.15, 3), 0, 100).tolist()
        entries[key] = {
            "test_acc": found[network],
            "params": int(4e5 + 1e5 * (codes * widths).sum()),
            "flops": int(8e6 + 6e6 * codes.sum()),
        }
    path.write_text(json.dumps(entries))
    return path


def measure(path: Path, out: Path) -> tuple[float, float, float]:
    """Seconds by the clock and of processors, and the peak memory of this process in MB, of one report."""
    clock, work = time.perf_counter(), time.process_time()
    report.write(path, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.perf_counter() - clock, time.process_time() - work, peak


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of one report; exit code 1 if they are over the limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--path", type=Path, metavar="JSON", help="file of NAS-Bench-Macro (default: made up)"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.path or made_up(Path(scratch) / "made_up.json")
        seconds, work, peak = measure(path, Path(scratch) / "out")
        counts = json.loads((Path(scratch) / "out" / "results.json").read_text())["counts"]
    print(f"{counts['n_rows']:,} rows, {counts['n_unique']:,} different networks, {os.cpu_count()} cores")
    print(f"{seconds:.1f} s by the clock (limit {SECONDS:.0f}), {work:.1f} s of processors")
    print(f"{peak:,.0f} MB at its peak (limit {MEGABYTES:,.0f})")
    return int(seconds > SECONDS or peak > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
