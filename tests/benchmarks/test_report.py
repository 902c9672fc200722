import json
from pathlib import Path

import pytest

from analysis import loaders
from benchmarks import report


def test_the_made_up_file_has_the_form_and_the_networks_of_the_benchmark(tmp_path: Path) -> None:
    path = report.made_up(tmp_path / "m.json")
    assert len(json.loads(path.read_text())) == 3**8
    sample = loaders.load(path)
    assert (sample.n_rows, sample.units.nunique()) == (6561, 3969)


def test_the_figures_of_a_report_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(path: Path, out: Path) -> list[Path]:
        out.mkdir()
        (out / "results.json").write_text('{"counts": {"n_rows": 6561, "n_unique": 3969}}')
        return []

    monkeypatch.setattr(report.report, "write", write)
    report.main(["--path", str(tmp_path)])  # what it returns is this process's memory to say
    printed = capsys.readouterr().out
    assert "6,561 rows, 3,969 different networks" in printed
    assert "s by the clock (limit 60)" in printed
    assert "MB at its peak (limit 2,000)" in printed
