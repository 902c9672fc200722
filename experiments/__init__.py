"""One script per question, and the platform that runs them: studies, Ray Tune, MLflow."""

import os

# Read by Ray when it is imported or started; a user's own setting wins.
for _name, _value in {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # of Tune's own state, from which nothing is restored here
}.items():
    os.environ.setdefault(_name, _value)
