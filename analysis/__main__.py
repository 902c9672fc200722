"""Commands of the analysis: `python -m analysis report|compare|correlate|plan|diff-runs --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import compare, divergence, findings, loaders, planning, report
from analysis.loaders import Sample
from analysis.resample import Array, Estimate, count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; wrong input ends it with one sentence and exit code 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description="From records to claims.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    one = commands.add_parser(
        "report",
        help="write a study, or ground truth, as a page",
        description="Write report.html, report.md, results.json and figures/ of a study folder, an MLflow "
        "store (.db), NAS-Bench-Macro (.json), or a folder of learning curves (.npy).",
    )
    _source(one)
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    one.set_defaults(run=_report)

    one = commands.add_parser(
        "compare",
        help="compare arms of two studies",
        description="Compare each arm that two studies share by name, or the two that --arms names: test "
        "error in percentage points, first minus second.",
    )
    one.add_argument("a", type=Path, metavar="DIR", help="first study")
    one.add_argument("b", type=Path, metavar="DIR", help="second study")
    one.add_argument("--arms", nargs=2, metavar=("A", "B"), help="arm of the first and of the second study")
    one.add_argument(
        "--margin", type=float, default=compare.MARGIN, help="points that do not matter (default %(default)s)"
    )
    one.add_argument("--pool", action="store_true", help="compare although data or protocols differ")
    one.set_defaults(run=_compare)

    one = commands.add_parser(
        "correlate",
        help="one search metric against the final error",
        description="Association of one recorded search metric with the final error: pooled, within arms, "
        "given size, corrected for stopped runs.",
    )
    _source(one)
    one.add_argument(
        "--metric", required=True, metavar="M", help="its column; a wrong name lists the right ones"
    )
    one.set_defaults(run=_correlate)

    one = commands.add_parser(
        "plan",
        help="how many runs a question needs, and how to divide a budget",
        description="Runs for a difference (--difference with --sd or --pilot), for a rank correlation "
        "(--correlation), or the best split of a budget between search and retraining seeds (--budget).",
    )
    one.add_argument("--difference", type=float, metavar="D", help="percentage points to be found")
    one.add_argument("--sd", type=float, metavar="S", help="standard deviation between runs, points")
    one.add_argument("--pilot", type=Path, metavar="DIR", help="study whose spread within arms is --sd")
    one.add_argument(
        "--paired", action="store_true", help="runs come in pairs; --sd is that of the differences"
    )
    one.add_argument("--correlation", type=float, metavar="RHO", help="rank correlation to be told from 0")
    one.add_argument("--budget", type=float, metavar="B", help="to be divided, in the unit of the costs")
    one.add_argument(
        "--sds", type=float, nargs=2, metavar=("SEARCH", "RETRAIN"), help="spreads between seeds"
    )
    one.add_argument(
        "--costs", type=float, nargs=2, metavar=("SEARCH", "RETRAIN"), help="cost of one of each"
    )
    one.add_argument("--alpha", type=float, default=planning.ALPHA, help="of the test (default %(default)s)")
    one.add_argument("--power", type=float, default=planning.POWER, help="wanted (default %(default)s)")
    one.set_defaults(run=_plan)

    one = commands.add_parser(
        "diff-runs",
        help="the first step at which two runs differ",
        description="Compare two study folders, or the JSONL files of two trials, step by step; measured "
        "metrics (seconds, memory) are set aside. Exit code 1 if anything differs.",
    )
    one.add_argument("a", type=Path, metavar="A", help="study folder, or trials/ID.jsonl")
    one.add_argument("b", type=Path, metavar="B", help="the other")
    one.set_defaults(run=_diff)
    return parser


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="study folder, MLflow store or ground truth")
    parser.add_argument("--study", metavar="ID", help="which study of an MLflow store")
    parser.add_argument("--sha256", metavar="HEX", help="refuse ground truth of another hash")
    parser.add_argument("--pool", action="store_true", help="pool rows measured under different protocols")


# Commands


def _report(options: argparse.Namespace) -> int:
    written = report.write(
        options.path, options.out, pool=options.pool, study=options.study, sha256=options.sha256
    )
    print(f"{written[0]} and {len(written) - 1} more files")
    return 0


def _compare(options: argparse.Namespace) -> int:
    a, b = loaders.load(options.a), loaders.load(options.b)
    _comparable(a, b, options.pool)
    shared = [arm for arm in a.tables.arms if arm in b.tables.arms]
    pairs = [tuple(options.arms)] if options.arms else [(arm, arm) for arm in shared]
    if not pairs:
        raise ValueError(
            f"the studies share no arm; name two with --arms, of {', '.join(a.tables.arms)} "
            f"and of {', '.join(b.tables.arms)}"
        )
    for arm_a, arm_b in pairs:
        for arm, sample in ((arm_a, a), (arm_b, b)):
            if arm not in sample.tables.arms:
                raise ValueError(f"{arm!r} is no arm; use one of {', '.join(sample.tables.arms)}")
        print(f"{arm_a} - {arm_b}")
        print(_compared(findings.percent(a, arm_a), findings.percent(b, arm_b), options.margin))
    return 0


def _comparable(a: Sample, b: Sample, pool: bool) -> None:
    """Refuse two samples whose errors were measured differently, unless asked; print what was pooled."""
    told = []
    hashes = [str((s.tables.study.get("provenance") or {}).get("data_sha256")) for s in (a, b)]
    if hashes[0] != hashes[1]:
        told.append(f"data ({hashes[0][:12]} and {hashes[1][:12]})")
    if differing := loaders.differing(pd.concat([a.trials, b.trials], ignore_index=True)):
        told.append(findings.told_protocols(differing))
    if told and not pool:
        raise ValueError(
            f"errors are not measured alike: {'; '.join(told)}; --pool compares them all the same"
        )
    if told:
        print(f"pooled over differing {'; '.join(told)}")


def _compared(a: Array, b: Array, margin: float) -> str:
    if not len(a) or not len(b):
        return f"  no comparison: n = {len(a)} and {len(b)}"
    found = compare.compare_arms(a, b)
    result, same = found.difference, compare.equivalence(a, b, margin)
    lines = [f"  means {a.mean():.3f} and {b.mean():.3f} %, n = {result.n_a} and {result.n_b}"]
    ends = "no interval" if result.low is None else f"[{result.low:+.3f}, {result.high:+.3f}]"
    lines.append(f"  difference {result.mean_difference:+.3f} points {ends}")
    if result.reason:
        return "\n".join([*lines, f"  {result.reason}: the spread between runs is unknown, so no test"])
    tests = {
        "Welch": result.p,
        "Mann-Whitney": found.p_mann_whitney,
        "Brunner-Munzel": found.p_brunner_munzel,
        "permutation": found.p_permutation,
    }
    named = ", ".join(f"{name} {p:.4f}" for name, p in tests.items() if p is not None)
    lines.append(f"  p: {named}; Hedges g {result.hedges_g:+.3f}, A12 {_text(found.a12)}")
    answer = compare.verdict(result, result.p)
    lines.append(f"  within {margin:g} points: {same.verdict}; the first errs less: {answer}")
    lines.append(f"  minimum detectable difference {result.minimum_detectable:.3f} points (power 80 %)")
    return "\n".join(lines)


def _correlate(options: argparse.Namespace) -> int:
    sample = loaders.load(options.path, study=options.study, sha256=options.sha256)
    name: str = options.metric
    if name not in sample.metrics:
        raise ValueError(
            f"--metric {name} was not recorded; recorded are {', '.join(sample.metrics.columns)}"
        )
    if sample.protocols is not None and not options.pool:
        told = findings.told_protocols(sample.protocols)
        raise ValueError(
            f"rows were measured under different protocols ({told}); --pool pools them all the same"
        )
    draws, note = findings.draws_for(sample)
    one = findings.metric_finding(sample, name, draws)
    overall, grouped = one.overall, one.grouped
    used = int(np.isfinite(sample.metrics[name]).sum())
    print(f"{name} against {sample.endpoint}")
    print(
        f"n = {overall.n_used} of {overall.n_total} rows ({used} with the metric), {overall.n_unique} "
        "independent"
    )
    for label, found in (
        ("tau-b pooled", overall.tau_b),
        ("rho pooled", overall.spearman),
        ("r pooled", overall.pearson),
        ("tau-b within arms", grouped.within),
        ("tau-b of arms' means", grouped.between),
    ):
        print(f"  {label:22} {_text(found)}")
    if one.partial is not None:
        print(f"  {'rho given ' + ', '.join(one.partial.controls):22} {_text(one.partial.partial)}")
    if one.pruned is not None:
        print(f"  {'corrected for stops':22} {_text(one.pruned.headline)}")
    if one.test.p is not None:
        print(f"  p = {one.test.p:.4f}, {one.test.method}")
    print(f"  {overall.words}")
    print("\n".join(filter(None, [grouped.simpson, one.restriction, note])))
    return 0


def _plan(options: argparse.Namespace) -> int:
    asked = [options.difference, options.correlation, options.budget]
    if sum(value is not None for value in asked) != 1:
        raise ValueError("give one of --difference, --correlation and --budget; --help shows what each needs")
    if options.correlation is not None:
        found = planning.runs_for_correlation(options.correlation, options.alpha, options.power)
        print(f"{found.runs} runs tell a rank correlation of {options.correlation:g} from 0: {found.method}")
        return 0
    if options.budget is not None:
        if options.sds is None or options.costs is None:
            raise ValueError("--budget needs --sds SEARCH RETRAIN and --costs SEARCH RETRAIN, of a pilot")
        (sd_search, sd_retrain), (search, retrain) = options.sds, options.costs
        split = planning.best_split(sd_search, sd_retrain, search, retrain, options.budget)
        each = count(split.retrainings, "retraining")
        print(f"{split.searches} searches with {each} each, cost {split.cost:g}")
        print(f"standard error of the mean {split.standard_error:.4g}")
        if split.detectable is not None:
            print(f"two such arms find a difference of {split.detectable:.4g}: {split.method}")
        return 0
    sd = _spread(options)
    plan = planning.runs_for_paired_difference if options.paired else planning.runs_for_difference
    found = plan(options.difference, sd, options.alpha, options.power)
    unit = "pairs" if options.paired else "runs per arm"
    print(
        f"{found.runs} {unit} find a difference of {options.difference:g} with power {found.power:.3f}: "
        f"{found.method}"
    )
    if not options.paired:
        counts = sorted({2, 3, 4, 5, 8, 12, 20, found.runs})
        print("runs per arm   minimum detectable difference")
        for n in counts:
            print(f"{n:12d}   {planning.detectable_difference(n, n, sd, options.alpha, options.power):.4g}")
    return 0


def _spread(options: argparse.Namespace) -> float:
    if (options.sd is None) == (options.pilot is None):
        raise ValueError("--difference needs one of --sd and --pilot")
    if options.sd is not None:
        return float(options.sd)
    spread, df = findings.spread(loaders.load(options.pilot))
    if not spread:
        raise ValueError(f"{options.pilot} has no two different finished runs in an arm; give --sd")
    print(f"standard deviation within arms {spread:.4g} points, {df} degrees of freedom")
    return spread


def _diff(options: argparse.Namespace) -> int:
    found = divergence.compare(options.a, options.b)
    print(divergence.render(found), end="")
    return 0 if found.same else 1


def _text(found: Estimate) -> str:
    return f"{found}" + (f"; {found.restriction}" if found.restriction and found.low is None else "")


if __name__ == "__main__":
    sys.exit(main())
