"""The end of a study: tables, figures and claims of what was recorded."""

import shlex
import traceback
from pathlib import Path

from analysis import plots, records, report, summary
from experiments.folder import PausedError, files
from experiments.tracking import DRAWING
from nas.draw import genotype_png, genotype_svg
from nas.genotype import Genotype


def conclude(folder: Path, *, page: bool = True) -> tuple[list[Path], str]:
    """Tables, figures, drawings and claims of what was recorded; returns files and text (Markdown).

    Without `page` the report is left out, which takes minutes for a large study.

    Raises:
        PausedError: they cannot be written.
    """
    if not files(folder):
        print("no trial has been recorded")
        return [], ""
    try:
        return _conclude(folder, page)
    except OSError as error:
        raise PausedError(error) from error


def _conclude(folder: Path, page: bool) -> tuple[list[Path], str]:
    written = list(records.export(folder).values())
    tables = records.read_tables(folder)
    result, claims = summary.summarise(tables), summary.claims(tables)
    text = f"{summary.to_markdown(result)}\n\n" + "\n".join(f"- {claim}" for claim in claims)
    # First what costs nothing and says most: whatever happens to the rest, it has been said.
    (folder / "summary.md").write_text(f"# {tables.study['question']}\n\n{text}\n")
    written += [folder / "summary.md", folder / "study.json"]
    print(f"\n{summary.render(result)}")
    if tables.study.get("joint"):
        print(summary.render_chosen(summary.chosen(tables)))
    print("\n".join(f"- {claim}" for claim in claims))
    print(f"\ntables   {folder / 'tables'}/*.parquet")
    with DRAWING:  # Matplotlib's settings are the process's, and tracking draws as well
        written += _draw(folder, tables)
        written += _report(folder) if page else []
    if not page:
        print(f"report   not written yet; to write it: {_command(folder)}")
    return written, text


def _draw(folder: Path, tables: records.Tables) -> list[Path]:
    figures = folder / "figures"
    drawn = [
        ("error_by_arm", plots.error_by_arm(tables), plots.error_data(tables)),
        ("curves", plots.curves(tables), plots.curve_data(tables)),
        ("error_by_size", plots.error_by_size(tables), plots.size_data(tables)),
    ]
    written: list[Path] = []
    for stem, figure, data in drawn:
        written += plots.save(figure, figures / stem, data).values()
    written += _draw_cells(folder, tables)
    print(f"figures  {figures}/{{{','.join(stem for stem, *_ in drawn)}}}.png, {figures / 'cells'}/")
    return written


def _report(folder: Path) -> list[Path]:
    """The study as a page, unless it fails, which is said: no trial is worth less for it.

    Raises:
        OSError: it cannot be written.
    """
    try:
        written = report.write(folder, folder / "report")
    except OSError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        print(f"no report: {type(error).__name__}: {error} ({where}); to try again: {_command(folder)}")
        return []
    print(f"report   {folder / 'report' / 'report.html'}")
    return written


def _command(folder: Path) -> str:
    return shlex.join(["python", "-m", "analysis", "report", str(folder), "--out", str(folder / "report")])


def _draw_cells(folder: Path, tables: records.Tables) -> list[Path]:
    """The cell that each arm's best trial by validation found; the test error has no say in what is shown."""
    written = []
    cells = folder / "figures" / "cells"
    finals = tables.finals()
    for arm in tables.arms:
        mine = finals[finals["arm"] == arm].dropna(subset=["genotype"])
        if mine.empty:
            continue
        chosen = mine.sort_values(["valid_error", "trial_id"]).iloc[0]
        genotype, stem = Genotype.parse(chosen["genotype"]), arm.replace(" ", "_").replace("/", "_")
        cells.mkdir(parents=True, exist_ok=True)
        (cells / f"{stem}.svg").write_text(genotype_svg(genotype, title=chosen["name"]))
        (cells / f"{stem}.png").write_bytes(genotype_png(genotype, title=chosen["name"]))
        written += [cells / f"{stem}.svg", cells / f"{stem}.png"]
    return written
