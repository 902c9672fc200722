"""Analysis runs where nothing but the records is installed: without PyTorch, Ray or MLflow."""

import subprocess
import sys

import pytest

MODULES = (
    "__main__",
    "aggregate",
    "agreement",
    "anytime",
    "associations",
    "cells",
    "checklist",
    "compare",
    "correlate",
    "divergence",
    "figures",
    "findings",
    "limits",
    "loaders",
    "mixed",
    "page",
    "planning",
    "plots",
    "pruning",
    "records",
    "report",
    "resample",
    "sections",
    "selection",
    "summary",
)


@pytest.mark.parametrize("unwanted", [("torch", "ray", "mlflow"), ("matplotlib.pyplot",)])
def test_importing_analysis_does_not_load(unwanted: tuple[str, ...]) -> None:
    lines = [*(f"import analysis.{module}" for module in MODULES), "import sys", "print(*sys.modules)"]
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    loaded = set(found.stdout.split())
    assert "analysis.records" in loaded
    assert not loaded & set(unwanted)
