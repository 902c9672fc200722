"""The end of a study: tables, figures and claims of what was recorded."""

from pathlib import Path

from analysis import plots, records, report, summary
from experiments.folder import PausedError, files
from experiments.tracking import DRAWING
from nas.draw import genotype_png, genotype_svg
from nas.genotype import Genotype


def conclude(folder: Path) -> tuple[list[Path], str]:
    """Tables, figures, drawings and claims of what was recorded; returns files and text (Markdown).

    Raises:
        PausedError: they cannot be written.
    """
    if not files(folder):
        print("no trial has been recorded")
        return [], ""
    try:
        return _conclude(folder)
    except OSError as error:
        raise PausedError(error) from error


def _conclude(folder: Path) -> tuple[list[Path], str]:
    tables_written = records.export(folder)
    tables = records.read_tables(folder)
    result = summary.summarise(tables)
    claims = summary.claims(tables)
    figures = folder / "figures"
    written = list(tables_written.values())
    with DRAWING:  # Matplotlib's settings are the process's, and tracking draws as well
        drawn = [
            ("error_by_arm", plots.error_by_arm(tables), plots.error_data(tables)),
            ("curves", plots.curves(tables), plots.curve_data(tables)),
            ("error_by_size", plots.error_by_size(tables), plots.size_data(tables)),
        ]
        for stem, figure, data in drawn:
            written += plots.save(figure, figures / stem, data).values()
        written += _draw_cells(folder, tables)
        written += _report(folder)
    print(f"\n{summary.render(result)}")
    if tables.study.get("joint"):
        print(summary.render_chosen(summary.chosen(tables)))
    print("\n".join(f"- {claim}" for claim in claims))
    print(f"\ntables   {folder / 'tables'}/{{trials,epochs,genotypes}}.parquet")
    print(f"figures  {figures}/{{{','.join(stem for stem, *_ in drawn)}}}.png, {figures / 'cells'}/")
    text = f"{summary.to_markdown(result)}\n\n" + "\n".join(f"- {claim}" for claim in claims)
    (folder / "summary.md").write_text(f"# {tables.study['question']}\n\n{text}\n")
    return [*written, folder / "summary.md", folder / "study.json"], text


def _report(folder: Path) -> list[Path]:
    """The study as a page, unless its trials cannot be taken together, which is said."""
    try:
        written = report.write(folder, folder / "report")
    except ValueError as error:
        print(f"no report: {error}")
        return []
    print(f"\nreport   {folder / 'report' / 'report.html'}")
    return written


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
