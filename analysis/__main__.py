"""Commands of the analysis: `python -m analysis report|compare|correlate|plan|diff-runs --help`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis import (
    across,
    associations,
    compare,
    correlate,
    divergence,
    findings,
    limits,
    loaders,
    planning,
    report,
    studies,
    summary,
)
from analysis.associations import MetricFinding
from analysis.loaders import Sample
from analysis.planning import Plan
from analysis.resample import Draws, Estimate, count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; wrong input ends it with one sentence and exit code 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description="From records to claims.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, told: str, *examples: str
    ) -> argparse.ArgumentParser:
        shown = "\n".join(f"  python -m analysis {name} {example}" for example in examples)
        found = commands.add_parser(
            name,
            help=summary,
            description=told,
            epilog=f"examples:\n{shown}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        found.set_defaults(run=run)
        return found

    one = command(
        "report",
        _report,
        "write a study, or ground truth, as a page",
        "Write report.html, report.md, results.json and figures/ of a study folder, an MLflow\n"
        "store (.db), NAS-Bench-Macro (.json), or a folder of learning curves (.npy).",
        "results/sweep_k-20260101-120000 --out report",
        "results/mlflow.db --study sweep_k --out report",
        "nas-bench-macro_cifar10.json --sha256 HEX --out report",
    )
    _source(one)
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")

    one = command(
        "compare",
        _compare,
        "compare arms of two studies, or one with a published figure",
        "Compare each arm that two studies share by name, or the two that --arms names: test error\n"
        "in percentage points, first minus second. Arms whose finished runs were selected, or\n"
        "depend on one another, get no verdict. With --published, hold the arms of one study\n"
        "against a published test error instead; with --across, arms over several data sets, one\n"
        "study each: interquartile means, probabilities of improvement, ranks.",
        "results/a results/b",
        'results/a results/b --arms "K=1" "K=4" --margin 0.2',
        'results/a --arms "K=4" --published 2.57 0.07 10',
        "results/cifar10 results/cifar100 results/fashion ... --across",
    )
    one.add_argument("paths", type=Path, metavar="DIR", nargs="+", help="studies")
    one.add_argument("--across", action="store_true", help="each study is a data set, with the same arms")
    one.add_argument(
        "--arms", nargs="+", metavar="ARM", help="one of each study; of one study, any that it has"
    )
    one.add_argument(
        "--published",
        type=float,
        nargs="+",
        metavar="X",
        help="MEAN, or MEAN SD N: test error in percent, its standard deviation and number of runs",
    )
    one.add_argument(
        "--margin", type=float, metavar="M", help=f"points that do not matter (default {compare.MARGIN})"
    )
    one.add_argument("--pool", action="store_true", help="compare although data or protocols differ")
    one.add_argument(
        "--study",
        action="append",
        metavar="ID",
        help="which study of an MLflow store, by id or name; once for each store, in their order",
    )

    one = command(
        "correlate",
        _correlate,
        "one search metric against the final error",
        "Association of one recorded search metric with the final error: pooled, within arms,\n"
        "given size, corrected for stopped runs. Where runs were stopped without a recorded chance\n"
        "of finishing, there is no estimate: bounds and a model come first, survivors last.",
        "results/sweep_k-... --metric search_valid_error",
        "results/sweep_k-... --metric search_valid_error --against params_m",
    )
    _source(one)
    one.add_argument(
        "--metric", required=True, metavar="M", help="its column; a wrong name lists the right ones"
    )
    one.add_argument("--against", metavar="OTHER", help="a second metric: is the first one better?")

    one = command(
        "plan",
        _plan,
        "how many runs a question needs, what a number of runs finds, how to divide a budget",
        "Runs for a difference (--difference with --sd or --pilot) or for a rank correlation\n"
        "(--correlation); what --n runs find; or the best split of a budget between search and\n"
        "retraining seeds (--budget with --sds and --costs).",
        "--difference 0.2 --pilot results/sweep_k-...",
        "--difference 0.2 --sd 0.15 --test mann-whitney",
        "--correlation 0.4 --test tau",
        "--n 4 --sd 0.15",
        "--budget 20 --sds 0.15 0.10 --costs 0.4 1.5",
    )
    one.add_argument("--difference", type=float, metavar="D", help="percentage points to be found")
    one.add_argument("--sd", type=float, metavar="S", help="standard deviation between runs, points")
    one.add_argument("--pilot", type=Path, metavar="PATH", help="study whose spread within arms is --sd")
    one.add_argument("--study", metavar="ID", help="which study of a pilot in an MLflow store, by id or name")
    one.add_argument(
        "--pool",
        action="store_true",
        default=None,
        help="of a pilot, take arms whose runs were measured under different protocols, too",
    )
    one.add_argument(
        "--paired", action="store_true", default=None, help="runs come in pairs; --sd is of the differences"
    )
    one.add_argument("--correlation", type=float, metavar="RHO", help="rank correlation to be told from 0")
    one.add_argument(
        "--test",
        choices=("t", "mann-whitney", "tau"),
        help="t (default) or mann-whitney of a difference; tau of a correlation; the latter two simulated",
    )
    one.add_argument("--n", type=int, metavar="N", help="runs (per arm) at hand")
    one.add_argument("--budget", type=float, metavar="B", help="to be divided, in the unit of the costs")
    one.add_argument(
        "--sds", type=float, nargs=2, metavar=("SEARCH", "RETRAIN"), help="spreads between seeds"
    )
    one.add_argument(
        "--costs", type=float, nargs=2, metavar=("SEARCH", "RETRAIN"), help="cost of one of each"
    )
    one.add_argument("--alpha", type=float, default=planning.ALPHA, help="of the test (default %(default)s)")
    one.add_argument("--power", type=float, default=planning.POWER, help="wanted (default %(default)s)")

    one = command(
        "diff-runs",
        _diff,
        "the first step at which two runs differ",
        "Compare two study folders, or the JSONL files of two trials, step by step; measured\n"
        "metrics (seconds, memory) are set aside. Exit code 1 if anything differs.",
        "results/a results/b",
        "results/a/trials/0a1b2c.jsonl results/b/trials/0a1b2c.jsonl",
    )
    one.add_argument("a", type=Path, metavar="A", help="study folder, or trials/ID.jsonl")
    one.add_argument("b", type=Path, metavar="B", help="the other")
    return parser


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="study folder, MLflow store or ground truth")
    parser.add_argument("--study", metavar="ID", help="which study of an MLflow store, by id or name")
    parser.add_argument("--sha256", metavar="HEX", help="refuse ground truth of another hash")
    parser.add_argument("--pool", action="store_true", help="pool rows measured under different protocols")


# Commands


def _report(options: argparse.Namespace) -> int:
    written = report.write(
        options.path, options.out, pool=options.pool, study=options.study, sha256=options.sha256
    )
    print(f"{written[0]} and {len(written) - 1} more files")
    return 0


# Compare


def _compare(options: argparse.Namespace) -> int:
    paths, margin = options.paths, compare.MARGIN if options.margin is None else options.margin
    if options.across or options.published is not None:
        return _over_datasets(options) if options.across else _published(options)
    if len(paths) != 2:
        raise ValueError(
            "give a second study, or --published MEAN [SD N] to hold the first one against; several data "
            "sets go with --across"
        )
    studies.check_margin(margin)
    a, b = _loaded(options)
    pairs = studies.pairs(a, b, options.arms)
    for told in studies.alike([a, b], pairs, options.pool):
        print(told)
    found = studies.hold(a, b, pairs, margin)
    tests = sum(held.adjusted_p is not None for held in found)
    for held in found:
        print(studies.render(held, tests))
    return 0


def _over_datasets(options: argparse.Namespace) -> int:
    for option in ("arms", "published", "margin"):
        if getattr(options, option) is not None:
            raise ValueError(f"--{option} does not go with --across; leave it out")
    print(across.render(across.across(_loaded(options), options.pool)))
    return 0


def _published(options: argparse.Namespace) -> int:
    if len(options.paths) != 1:
        raise ValueError("--published holds one study against a figure; give one study, or leave it out")
    if options.margin is not None:
        raise ValueError("--margin does not go with --published; leave it out")
    mean, sd, n = [*options.published, None, None][:3]
    if len(options.published) > 3 or (n is not None and n != int(n)):
        raise ValueError(f"--published {options.published} must be MEAN or MEAN SD N, N a whole number")
    (sample,) = _loaded(options)
    arms = options.arms or sample.tables.arms
    for arm in arms:
        studies.check_arm(sample, arm)
    for told in studies.alike([sample], [[arm] for arm in arms], options.pool):
        print(told)
    for arm in arms:
        print(f"{arm}: {sample.endpoint}; whether the published one is alike, only its authors can say")
        print(f"  {studies.counted(sample, arm)}")
        print(studies.render_reproduction(*studies.reproduced(sample, arm, mean, sd, n and int(n))))
    return 0


def _loaded(options: argparse.Namespace) -> list[Sample]:
    """Samples of all paths, the studies of MLflow stores as --study names them."""
    stores = sum(loaders.is_store(path) for path in options.paths)
    if options.study is not None and len(options.study) != stores:
        raise ValueError(
            f"--study is given {count(len(options.study), 'time')}, and there are {stores} MLflow stores "
            "(.db); give it once for each store, in their order, or never"
        )
    named = iter(options.study or [None] * stores)
    return [
        loaders.load(path, study=next(named) if loaders.is_store(path) else None) for path in options.paths
    ]


# Correlate


def _correlate(options: argparse.Namespace) -> int:
    sample = loaders.load(options.path, study=options.study, sha256=options.sha256)
    for option, name in (("--metric", options.metric), ("--against", options.against)):
        if name is not None and name not in sample.metrics:
            raise ValueError(
                f"{option} {name} was not recorded; recorded are {', '.join(sample.metrics.columns)}"
            )
    if sample.protocols is not None and not options.pool:
        told = summary.told_protocols(sample.protocols)
        raise ValueError(
            f"rows were measured under different protocols ({told}); --pool pools them all the same"
        )
    draws, note = associations.draws_for(sample)
    one = associations.metric_finding(sample, options.metric, draws)
    used = int(np.isfinite(sample.metrics[one.name]).sum())
    print(f"{one.name} against {sample.endpoint}")
    print(f"{studies.counted(sample)}; {used} rows with the metric")
    overall = one.overall
    print(f"n = {overall.n_used} of {overall.n_total} rows with both, {overall.n_unique} independent")
    for sentence in limits.limits(sample, options.pool):
        print(f"restricted: {sentence}")
    stopped = _corrected(one) if one.pruned is not None else []
    print("\n".join([*stopped, *_associations(one)]))
    if options.against is not None:
        print("\n".join(_against(sample, one, options.against, draws)))
    print("\n".join(filter(None, [one.grouped.simpson, one.restriction, note])))
    return 0


def _associations(one: MetricFinding) -> list[str]:
    """Lines on the runs with a final error; those of survivors lead to no p-value and no direction."""
    overall, grouped = one.overall, one.grouped
    survivors = one.pruned is not None
    lines = ["conditional on survival, not the association of all runs:"] if survivors else []
    found = {
        "tau-b within arms": grouped.within,
        "tau-b pooled": grouped.pooled,
        "rho pooled": overall.spearman,
        "r pooled": overall.pearson,
        "tau-b of arms' means": grouped.between,
    }
    if one.partial is not None:
        found[f"rho given {', '.join(one.partial.controls)}"] = one.partial.partial
    lines += [_line(label, estimate) for label, estimate in found.items()]
    if survivors:
        return lines
    if one.test.p is not None:
        lines.append(f"  p = {one.test.p:.4f}, {one.test.method}; of this metric alone, not adjusted")
    return [*lines, f"  {correlate.direction(one.headline)}"]


def _corrected(one: MetricFinding) -> list[str]:
    """Lines on all runs, those that were stopped included."""
    found = one.pruned
    assert found is not None
    if found.weighted:
        assert found.effective_n is not None
        lines = ["corrected for stopped runs, by recorded chances of finishing:"]
        lines += [_line("tau-b, headline", one.headline)]
        lines += [_line(f"{kind} pooled", estimate) for kind, estimate in found.weighted.items()]
        lines += [_line("tau-b, audit subset", found.audit), f"  {'effective n':22} {found.effective_n:.1f}"]
    else:
        lines = [f"tau-b of all runs: none, {found.headline.restriction}"]
    bounds = "none" if found.bounds is None else f"{found.bounds[0]:+.3f} to {found.bounds[1]:+.3f}"
    lines.append(f"  {'bounds of tau-b, pooled':22} {bounds}, whatever the errors of stopped runs had been")
    return [*lines, _line("model-based, pooled", found.model)]


def _against(sample: Sample, one: MetricFinding, other: str, draws: Draws) -> list[str]:
    """Lines on whether a metric goes more with the error than another, which two intervals do not tell."""
    lines = [f"tau-b of {one.name} less that of {other}, on the same rows, resampled together:"]
    for over in ("within arms", "pooled"):
        found = associations.against(sample, one.name, other, draws, over=over)
        lines.append(_line(over, found.restricted("survivors only" if one.pruned is not None else None)))
    return lines


def _line(label: str, found: Estimate) -> str:
    why = f"; {found.restriction}" if found.restriction else ""
    return f"  {label:22} {found}{why}"


# Plan


_TAKES = {
    "difference": {"sd", "pilot", "study", "pool", "paired", "test"},
    "correlation": {"test"},
    "n": {"sd", "pilot", "study", "pool", "paired"},
    "budget": {"sds", "costs"},
}
"""Options that go with each question of `plan`, but for alpha and power, which go with all."""


def _plan(options: argparse.Namespace) -> int:
    given = {name for name, value in vars(options).items() if value is not None}
    asked = [name for name in _TAKES if name in given]
    if len(asked) != 1:
        raise ValueError(
            "give one of --difference, --correlation and --budget, or --n; --help shows what each needs"
        )
    if wrong := (given & set().union(*_TAKES.values())) - _TAKES[asked[0]]:
        raise ValueError(f"--{min(wrong)} does not go with --{asked[0]}; --help shows what each needs")
    plans = {"difference": _difference, "correlation": _correlation, "n": _at_hand, "budget": _budget}
    print("\n".join(plans[asked[0]](options)))
    return 0


def _difference(options: argparse.Namespace) -> list[str]:
    if not options.difference > 0:
        raise ValueError(f"--difference {options.difference:g} must be above 0, in percentage points")
    if options.test == "tau":
        raise ValueError("--test tau is of a correlation; with --difference use t or mann-whitney")
    if options.paired and options.test == "mann-whitney":
        raise ValueError("--test mann-whitney is of runs that do not come in pairs; leave out one of both")
    sd, lines = _spread(options)
    plan: Callable[..., Plan] = planning.runs_for_difference
    if options.paired:
        plan = planning.runs_for_paired_difference
    elif options.test == "mann-whitney":
        plan = planning.runs_for_mann_whitney
    found = plan(options.difference, sd, options.alpha, options.power)
    unit = "pairs" if options.paired else "runs per arm"
    lines.append(
        f"{found.runs} {unit} find a difference of {options.difference:g} with power {found.power:.3f}: "
        f"{found.method}"
    )
    lines.append(f"{unit:12}   minimum detectable difference, t test")
    for n in sorted({2, 3, 4, 5, 8, 12, 20, found.runs}):
        lines.append(f"{n:12d}   {_detectable(options, n, sd):.4g}")
    return lines


def _detectable(options: argparse.Namespace, n: int, sd: float) -> float:
    if options.paired:
        return sd * planning.detectable_shift(n - 1, options.alpha, options.power) / float(np.sqrt(n))
    return planning.detectable_difference(n, n, sd, options.alpha, options.power)


def _correlation(options: argparse.Namespace) -> list[str]:
    if options.test not in (None, "tau"):
        raise ValueError(f"--test {options.test} is of a difference; with --correlation use tau")
    plan = planning.runs_for_tau if options.test else planning.runs_for_correlation
    found = plan(options.correlation, options.alpha, options.power)
    what = "tau" if options.test else "rank correlation"
    told = f"{found.runs} runs tell a {what} of {options.correlation:g} from 0 with power {found.power:.3f}"
    return [f"{told}: {found.method}"]


def _at_hand(options: argparse.Namespace) -> list[str]:
    """What a number of runs finds."""
    if options.n < 2:
        raise ValueError(f"--n {options.n} says nothing about the spread between runs; use at least 2")
    power = f"with power {options.power:g}"
    known = options.sd is not None or options.pilot is not None
    sd, lines = _spread(options) if known else (1.0, list[str]())
    what = f"{options.n} {'pairs' if options.paired else 'runs per arm'}"
    found = f"{_detectable(options, options.n, sd):.4g} {'points' if known else 'standard deviations'}"
    lines.append(f"{what} find a difference of {found} by a t test at p < {options.alpha:g}, {power}")
    if options.n < 4:
        return [*lines, f"{options.n} runs say nothing about a correlation, which needs 4"]
    rho = planning.detectable_correlation(options.n, options.alpha, options.power)
    return [*lines, f"{options.n} runs in all tell a rank correlation of {rho:.3f} from 0 {power}"]


def _budget(options: argparse.Namespace) -> list[str]:
    if options.sds is None or options.costs is None:
        raise ValueError("--budget needs --sds SEARCH RETRAIN and --costs SEARCH RETRAIN, of a pilot")
    (sd_search, sd_retrain), (search, retrain) = options.sds, options.costs
    split = planning.best_split(
        sd_search, sd_retrain, search, retrain, options.budget, options.alpha, options.power
    )
    each = count(split.retrainings, "retraining")
    lines = [
        f"b* = {split.best_retrainings:.3g} retrainings of each search, before rounding",
        f"{split.searches} searches with {each} each, cost {split.cost:g}",
        f"standard error of the mean {split.standard_error:.4g}",
    ]
    if split.detectable is not None:
        lines.append(f"two such arms find a difference of {split.detectable:.4g}: {split.method}")
    return lines


def _spread(options: argparse.Namespace) -> tuple[float, list[str]]:
    """Standard deviation between runs, and what to say of it."""
    if options.pilot is None and (options.study is not None or options.pool):
        raise ValueError(
            f"--{'pool' if options.pool else 'study'} goes with --pilot; give one, or leave it out"
        )
    if (options.sd is None) == (options.pilot is None):
        raise ValueError(f"--{'n' if options.n else 'difference'} needs one of --sd and --pilot")
    if options.sd is not None:
        return float(options.sd), []
    pilot = loaders.load(options.pilot, study=options.study)
    pilot = replace(pilot, tables=summary.pooled(pilot.tables)) if options.pool else pilot
    spread, df = findings.spread(pilot)
    doubts = findings.spread_doubts(pilot)
    left_out = f"left out: {limits.told(doubts)}" if doubts else ""
    if not spread:
        pool = " or --pool" if any("different protocols" in why for why in doubts.values()) else ""
        why = f"; {left_out}" if doubts else ""
        raise ValueError(
            f"{options.pilot} has no two different finished runs in an arm that tell the spread{why}; give "
            f"--sd{pool}"
        )
    return spread, [
        f"standard deviation within arms {spread:.4g} points, {df} degrees of freedom",
        *([left_out] if doubts else []),
    ]


# Runs


def _diff(options: argparse.Namespace) -> int:
    found = divergence.compare(options.a, options.b)
    print(divergence.render(found), end="")
    return 0 if found.same else 1


if __name__ == "__main__":
    sys.exit(main())
