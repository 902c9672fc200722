"""One script per question, and the platform that runs them: studies, Ray Tune, MLflow."""
