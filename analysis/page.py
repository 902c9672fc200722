"""A report as a list of blocks, and its two forms: one self-contained HTML page, and Markdown."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A heading; `level` 2 opens a section, 3 a part of one."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` sets apart what must not be overlooked."""

    text: str
    kind: str = ""
    """Empty, `warning` or `note`."""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of texts; cells that are numbers stand at the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: str = ""
    """What to call it where the page shows it only when asked; empty to show it at once."""


@dataclass(frozen=True)
class Picture:
    """A drawing that lies beside the page as SVG, with the rows that drew it."""

    svg: Path
    title: str
    caption: str
    data: Path | None = None


@dataclass(frozen=True)
class Cards:
    """The verdicts at the top: claim, answer, and what it rests on."""

    items: Sequence[tuple[str, str, str]]


_LONGEST_NUMBER = 34

Block = Heading | Text | Bullets | Table | Picture | Cards

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b6570; --line: #d9dee3; --ground: #ffffff;
  --raised: #f5f7f9; --link: #0b5c9a; --yes: #00694d; --no: #a03d00; --open: #5b6570; --warn: #fff4d6;
  --warn-line: #b98900; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3adb7; --line: #39424b; --ground: #14181c;
  --raised: #1d2329; --link: #7cc0f4; --yes: #56c7a4; --no: #f29a63; --open: #a3adb7; --warn: #3a2f12;
  --warn-line: #d0a537; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 80px; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.2em 0 0.3em; }
h2 { font-size: 1.25rem; margin: 2.4em 0 0.5em; padding-top: 0.7em; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.8em 0 0.4em; }
p, ul { max-width: 46rem; margin: 0.5em 0 0.9em; }
ul { padding-left: 1.2em; } li { margin: 0.25em 0; }
a { color: var(--link); }
nav { font-size: 0.88rem; color: var(--soft); } nav a { margin-right: 1em; display: inline-block; }
.warning, .note { border-left: 4px solid var(--warn-line); background: var(--warn);
  padding: 0.6em 0.9em; border-radius: 3px; }
.note { border-left-color: var(--line); background: var(--raised); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr));
  gap: 12px; margin: 1em 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  background: var(--raised); font-size: 0.9rem; }
.card b { display: block; font-size: 0.98rem; }
.card span { display: block; font-weight: 650; margin: 0.1em 0 0.35em; }
.supported { color: var(--yes); } .not { color: var(--no); } .undecided, .no { color: var(--open); }
.scroll { overflow-x: auto; margin: 0.8em 0 0.4em; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.t { min-width: 9rem; } td.w { min-width: 15rem; }
.caption { font-size: 0.85rem; color: var(--soft); margin: 0.2em 0 1.4em; }
figure { margin: 1.2em 0 1.8em; }
figure .frame { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 6px; }
figure img { display: block; width: 100%; min-width: 680px; height: auto; }
figcaption { font-size: 0.87rem; color: var(--soft); margin-top: 0.5em; max-width: 46rem; }
summary { cursor: pointer; color: var(--link); margin: 0.6em 0; }
@media (max-width: 680px) { main { padding: 14px 14px 60px; } h1 { font-size: 1.3rem; }
  figure .scroll::before { content: "wide figure: swipe sideways"; font-size: 0.75rem; color: #5b6570; }
}
""".strip()


def to_html(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """One page that needs nothing beside it: styles and pictures are inside, and there are no scripts."""
    parts = []
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{html.escape(text)}</a>' for text in sections)
    parts.append(f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(subtitle)}</p>\n<nav>{links}</nav>")
    parts += [_block_html(block) for block in blocks]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def to_markdown(title: str, subtitle: str, blocks: Sequence[Block], folder: Path) -> str:
    """The same as Markdown; pictures are linked relative to `folder`."""
    parts = [f"# {title}", subtitle]
    parts += [_block_markdown(block, folder) for block in blocks]
    return "\n\n".join(parts) + "\n"


def _block_html(block: Block) -> str:
    match block:
        case Heading(text, level):
            anchor = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{html.escape(text)}</h{level}>"
        case Text(text, kind):
            return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Table():
            return _table_html(block)
        case Picture():
            return _picture_html(block)
        case Cards(items):
            cards = [
                f'<div class="card"><b>{html.escape(claim)}</b>'
                f'<span class="{answer.split()[0] if answer else ""}">{html.escape(answer)}</span>'
                f"{html.escape(rest)}</div>"
                for claim, answer, rest in items
            ]
            return f'<div class="cards">{"".join(cards)}</div>'


def _table_html(table: Table) -> str:
    columns = range(len(table.header))
    number = [all(_is_number(row[column]) for row in table.rows) for column in columns]
    longest = [max((len(row[column]) for row in table.rows), default=0) for column in columns]
    classes = [
        "n" if number[column] else "w" if longest[column] > 46 else "t" if longest[column] > 22 else ""
        for column in columns
    ]

    def cells(tag: str, row: Sequence[str]) -> str:
        named = [f' class="{kind}"' if kind else "" for kind in classes]
        return "".join(
            f"<{tag}{name}>{html.escape(cell)}</{tag}>" for name, cell in zip(named, row, strict=True)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    head = f"<thead><tr>{cells('th', table.header)}</tr></thead>"
    found = f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'
    if table.caption:
        found += f'\n<p class="caption">{html.escape(table.caption)}</p>'
    if table.folded:
        return f"<details><summary>{html.escape(table.folded)}</summary>\n{found}\n</details>"
    return found


def _picture_html(picture: Picture) -> str:
    content = base64.b64encode(picture.svg.read_bytes()).decode()
    return (
        f'<figure><div class="scroll"><div class="frame"><img alt="{html.escape(picture.title, quote=True)}" '
        f'src="data:image/svg+xml;base64,{content}"></div></div>'
        f"<figcaption><b>{html.escape(picture.title)}</b> {html.escape(picture.caption)}"
        f"{_data_note(picture)}</figcaption></figure>"
    )


def _data_note(picture: Picture) -> str:
    return f" Data: {html.escape(f'{picture.data.parent.name}/{picture.data.name}')}." if picture.data else ""


def _block_markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text, kind):
            return f"> **{kind.capitalize()}.** {text}" if kind else text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(header, rows, caption):
            lines = [header, ["---"] * len(header), *rows]
            found = "\n".join(
                f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines
            )
            return f"{found}\n\n{caption}" if caption else found
        case Picture(svg, title, caption, data):
            told = f" Data: [{data.name}]({data.relative_to(folder).as_posix()})." if data else ""
            return f"![{title}]({svg.relative_to(folder).as_posix()})\n\n**{title}** {caption}{told}"
        case Cards(items):
            return "\n".join(f"- **{claim}**: {answer}. {rest}" for claim, answer, rest in items)


def _anchor(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())


def _is_number(text: str) -> bool:
    """Whether a cell is a number, perhaps with its interval or unit, or stands for none."""
    bare = text.lstrip("<>+- ")
    return len(text) <= _LONGEST_NUMBER and (not bare or bare[0].isdigit())
