"""Schedulers of Ray Tune that know of stages: they compare retrainings, or searches of one kind."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from experiments.stopping import Judge, Row, Stopping
from experiments.worker import METRIC
from nas.trial import Trial


class StageAware(FIFOScheduler):
    """Scheduler that stops the trials that a judge stops, and adds its marks to the rows of a result.

    Tune shows a result to its scheduler first and to its callbacks then, so marks are recorded right after
    the epoch that they follow from. It pickles its scheduler when it begins, to restore a run on its own,
    which studies do not do: they go on from their records.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.judge = judge

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decide on the epochs of a result; `result["rows"]` gains the marks."""
        rows: list[dict[str, Any]] = []
        for row in result["rows"]:
            # A mark that a dead driver had not recorded belongs before the row.
            rows += sorted([row, *self.judge.judge(row)], key=lambda each: float(each["time"]))
        # The list itself is what callbacks get: Tune hands the scheduler a copy of the dict around it.
        result["rows"][:] = rows
        stops = any(self.judge.stopped(row["trial"]) for row in rows)
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Count the last epoch of a trial, on which there is nothing to decide."""
        self.judge.replay(result.get("rows", ()))


class _OfRetrainings(TrialScheduler):
    """Lets a search pass: its results say nothing that is compared."""

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decide on a retraining epoch; a search goes on."""
        if METRIC not in result:
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision


class RetrainHyperBand(_OfRetrainings, HyperBandScheduler):
    """HyperBand of retrainings."""


class RetrainPBT(_OfRetrainings, PopulationBasedTraining):
    """Population-based training that copies and mutates retrainings."""


def scheduler(
    stopping: Stopping, epochs: int, seed: int, past: Iterable[Row] = (), fields: Sequence[str] = ()
) -> TrialScheduler:
    """Scheduler of trials of at most `epochs` retraining epochs.

    Args:
        stopping: which one, and how it stops trials.
        epochs: of retraining.
        seed: of the streams that decide who goes on all the same, and who is of the audit subset.
        past: rows of earlier runs of the study, for ASHA and median stopping to go on from.
        fields: names from `pbt_start`, for population-based training to change.
    """
    match stopping.scheduler:
        case "fifo":
            return FIFOScheduler()  # type: ignore[no-untyped-call]
        case "asha" | "median":
            judge = Judge(stopping, epochs, seed)
            judge.replay(past)
            return StageAware(judge)
        case "hyperband":
            # With `stop_last_trials` a bracket whose last rung lies before the last epoch finishes no trial.
            return RetrainHyperBand(
                time_attr=stopping.rungs,
                max_t=stopping.span(epochs)[1],  # type: ignore[arg-type]  # seconds need not be whole
                metric=METRIC,
                mode="min",
                stop_last_trials=False,
            )
        case "pbt":
            return RetrainPBT(
                time_attr=stopping.rungs,
                perturbation_interval=stopping.span(epochs)[0],
                hyperparam_mutations={name: _domain(name) for name in fields},
                custom_explore_fn=_within,
                metric=METRIC,
                mode="min",
            )


# Population-based training


PBT_DOMAINS = {
    "retrain.lr": tune.loguniform(0.005, 0.2),
    "retrain.weight_decay": tune.loguniform(1e-5, 3e-3),
    "retrain.drop_path": tune.uniform(0.0, 0.5),
}
"""What population-based training changes while it retrains: nothing that the shape of a weight depends on.

A schedule is changed by the one number that scales it."""

_SCALES = {"Constant": "value", "Ramp": "end", "Linear": "start", "Cosine": "start"}
_SCALES |= {"LinearTail": "start", "Exponential": "start"}


def pbt_start(trial: Trial) -> dict[str, float]:
    """The fields of a trial that population-based training changes, each with the trial's own value.

    Raises:
        ValueError: a schedule that no single number scales.
    """
    start = {}
    for name in PBT_DOMAINS:
        value = getattr(trial.retrain, name.removeprefix("retrain."))
        if not isinstance(value, float):
            kind = type(value).__name__
            if kind not in _SCALES:
                raise ValueError(f"pbt cannot change {name}={value}; use one of {', '.join(_SCALES)}")
            name, value = f"{name}.{_SCALES[kind]}", getattr(value, _SCALES[kind])
        start[name] = float(value)
    return start


def _domain(name: str) -> Any:
    return next(domain for prefix, domain in PBT_DOMAINS.items() if name.startswith(prefix))


def _within(config: Mapping[str, Any]) -> dict[str, Any]:
    """A mutated configuration with its values put back into their ranges: factors would add up."""
    kept = dict(config)
    for name, value in config.items():
        if name.startswith(tuple(PBT_DOMAINS)):
            domain = _domain(name)
            kept[name] = min(max(value, domain.lower), domain.upper)
    return kept
