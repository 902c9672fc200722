"""A study as a page: figures, tables and verdicts as HTML, Markdown and JSON; equal input, equal bytes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import checklist, figures, loaders, page, sections
from analysis.checklist import Item
from analysis.findings import Findings, find, plain
from analysis.loaders import Sample
from analysis.page import Picture

SCHEMA = 1
"""Version of `results.json`; a change that old readers would misread increments it."""

FILES = ("report.html", "report.md", "results.json")


def write(
    path: Path, out: Path, *, pool: bool = False, study: str | None = None, sha256: str | None = None
) -> list[Path]:
    """Write the report of a study folder, an MLflow store or ground truth into a folder; returns its files.

    Args:
        path: as in `analysis.loaders.load`.
        out: folder of the report; `figures/` in it takes the drawings, as SVG with the CSV that drew them.
        pool: correlate over rows measured under different protocols all the same.
        study, sha256: as in `analysis.loaders.load`.

    Raises:
        FileNotFoundError, ValueError: as in `analysis.loaders.load`, or `out` is a file.
    """
    return write_sample(loaders.load(path, study=study, sha256=sha256), out, pool=pool)


def write_sample(sample: Sample, out: Path, *, pool: bool = False) -> list[Path]:
    """Write the report of a sample."""
    if out.is_file():
        raise ValueError(f"--out {out} is a file; name a folder")
    found = find(sample, pool=pool)
    items = checklist.checklist(sample, found)
    out.mkdir(parents=True, exist_ok=True)
    _clear(out)
    drawn, missing = figures.write(sample, found, out / "figures")
    pictures, written = {}, []
    for drawing, paths in drawn:
        pictures[drawing.stem] = Picture(paths["svg"], drawing.title, drawing.caption, paths["csv"])
        written += [paths["svg"], paths["csv"]]
    for source in sample.drawings:
        copy = out / "figures" / f"cell_{source.name}"
        copy.write_bytes(source.read_bytes())
        caption = (
            "The cells of the arm's best run by validation error, n = 1: one find of a search, no summary."
        )
        pictures[copy.stem] = Picture(copy, f"Cells found: {source.stem}.", caption)
        written.append(copy)
    title = str(sample.tables.study["question"] or sample.tables.study["name"])
    subtitle = _subtitle(sample, found)
    blocks = sections.page_blocks(sample, found, items, pictures, missing)
    results = _results(sample, found, items, list(pictures), missing)
    texts = (
        page.to_html(title, subtitle, blocks),
        page.to_markdown(title, subtitle, blocks, out),
        json.dumps(results, indent=1, allow_nan=False) + "\n",
    )
    for name, text in zip(FILES, texts, strict=True):
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in FILES), *written]


def _clear(out: Path) -> None:
    """Remove the figures of an earlier report in the same folder, which may not be drawn again."""
    path = out / "results.json"
    if path.is_file():
        try:
            stems = json.loads(path.read_text(encoding="utf-8"))["figures"]
        except (ValueError, KeyError, TypeError):
            return
        for stem in stems:
            for ending in ("svg", "csv"):
                (out / "figures" / f"{Path(stem).name}.{ending}").unlink(missing_ok=True)


def _subtitle(sample: Sample, found: Findings) -> str:
    study, counts = sample.tables.study, found.counts
    origin = study.get("provenance") or {}
    told = [
        f"{study['name']}" + (f", preset {study['preset']}" if study.get("preset") else ""),
        f"{counts.n_used:,} of {counts.n_total:,} {'trials' if sample.kind == 'study' else 'networks'} "
        "with a final error",
        f"{counts.n_unique:,} different networks",
        f"data {origin['data_name']}" if origin.get("data_name") else "",
    ]
    return "; ".join(filter(None, told)) + f". Endpoint: {sample.endpoint}."


# Machine-readable


def _results(
    sample: Sample,
    found: Findings,
    items: Sequence[Item],
    drawn: Sequence[str],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    study = sample.tables.study
    values: dict[str, Any] = plain(found)
    return {
        "schema": SCHEMA,
        "kind": sample.kind,
        "study": {
            key: plain(study.get(key))
            for key in (
                "study_id",
                "name",
                "question",
                "preset",
                "command",
                "axis",
                "reference",
                "baseline",
                "arms",
                "scheduler",
                "joint",
            )
        },
        "endpoint": sample.endpoint,
        "unit": "network, by genotype key" if found.counts.n_used else None,
        "seeds": sample.seeds,
        **values,
        "protocols": plain(sample.protocols),
        "claims": plain(sections.claims(sample, found)),
        "checklist": plain(list(items)),
        "provenance": plain(study.get("provenance") or {}),
        "sources": dict(sample.sources),
        "figures": list(drawn),
        "figures_not_drawn": dict(missing),
    }
