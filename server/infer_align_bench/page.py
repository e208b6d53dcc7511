"""Write a report as one HTML page that needs no other file and no network.

A template engine would not pay here: a page is a list of headings, paragraphs, tables and plots,
and every cell is escaped where it is made.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = """
body {
  font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff
}
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
td.name, th.name { text-align: left }
tr.front td { font-weight: 600; background: #f2f7ff }
div { overflow-x: auto }
.note { color: #777; font-weight: 400 }
figure { margin: 1em 0 }
svg { max-width: 100%; height: auto }
code { font-size: 90% }
"""


def document(title: str, sections: Iterable[str], style: str = "") -> str:
    """Return an HTML page.

    Args:
        title: plain text.
        sections: HTML, in order.
        style: CSS besides that of every report.
    """
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>",
    ]
    return (
        f'<!doctype html><html lang="en"><head>{"".join(head)}</head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: Iterable[str] = (),
    front_rows: set[int] | frozenset[int] = frozenset(),
) -> str:
    """Return an HTML table. Its cells are HTML already.

    Args:
        columns: the header; if all of them are empty, there is none.
        rows: as many cells each as there are columns.
        text_columns: the columns that are aligned to the left.
        front_rows: the rows in bold.
    """
    left_columns = frozenset(text_columns)
    parts = []
    if any(columns):
        parts.append(f"<tr>{_cells(columns, columns, 'th', left_columns)}</tr>")
    for i, row in enumerate(rows):
        style = " class=front" if i in front_rows else ""
        parts.append(f"<tr{style}>{_cells(columns, row, 'td', left_columns)}</tr>")
    return f"<div><table>{''.join(parts)}</table></div>"


def _cells(
    columns: Sequence[str], row: Sequence[str], tag: str, left_columns: frozenset[str]
) -> str:
    parts = []
    for column, cell in zip(columns, row, strict=True):
        style = " class=name" if column in left_columns else ""
        parts.append(f"<{tag}{style}>{cell}</{tag}>")
    return "".join(parts)


def plot_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a new figure of matplotlib, whose sizes are in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: Figure) -> str:
    """Return a figure of matplotlib as SVG, which a page includes directly."""
    import matplotlib as mpl

    file = io.StringIO()
    # Text stays text, equal data give an equal file, and no address of the web is in it.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "infer-align"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    # An HTML page takes no XML declaration.
    return text[text.index("<svg") :]
