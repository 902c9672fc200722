"""Schedulers of Ray Tune that count retraining epochs only, and leave searches alone."""

from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from experiments.study import SchedulerName
from experiments.worker import METRIC, TIME


class RetrainHyperBand(HyperBandScheduler):
    """HyperBand that lets results without a retraining epoch pass, as other schedulers do by themselves."""

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decide on a retraining epoch; a search goes on."""
        if TIME not in result:
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision


class RetrainMedian(MedianStoppingRule):
    """Median stopping that a trial without a last retraining epoch, such as a diverged one, does not trip."""

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Count a last retraining epoch."""
        if TIME in result:
            super().on_trial_complete(tune_controller, trial, result)


def scheduler(name: SchedulerName, epochs: int) -> TrialScheduler:
    """Scheduler that counts retraining epochs only, `epochs` at most."""
    match name:
        case "fifo":
            return FIFOScheduler()  # type: ignore[no-untyped-call]
        case "asha":
            grace = max(1, epochs // 8)
            return ASHAScheduler(
                time_attr=TIME,
                max_t=epochs,
                grace_period=grace,
                reduction_factor=2,
                metric=METRIC,
                mode="min",
            )
        case "hyperband":
            # Otherwise a bracket whose last rung lies before the last epoch finishes no trial.
            return RetrainHyperBand(
                time_attr=TIME, max_t=epochs, metric=METRIC, mode="min", stop_last_trials=False
            )
        case "median":
            grace = max(1, epochs // 4)
            return RetrainMedian(
                time_attr=TIME, grace_period=grace, min_samples_required=3, metric=METRIC, mode="min"
            )
        case "pbt":
            return PopulationBasedTraining(
                time_attr=TIME,
                perturbation_interval=max(1, epochs // 5),
                hyperparam_mutations=PBT_FIELDS,
                require_attrs=False,
                metric=METRIC,
                mode="min",
            )


PBT_FIELDS = {
    "retrain.lr.start": tune.loguniform(0.005, 0.2),
    "retrain.weight_decay": tune.loguniform(1e-5, 3e-3),
}
"""What population-based training changes while it retrains: nothing that the shape of a weight depends on."""
