"""The frame of a report: one HTML page without a network."""

from __future__ import annotations

import re

import pytest

from infer_align_bench.page import document, svg, table


def test_a_document_escapes_its_title_and_holds_its_sections() -> None:
    text = document("a < b", ["<h1>x</h1>", "<p>y</p>"], ".good { color: green }")
    assert "<title>a &lt; b</title>" in text
    assert "<h1>x</h1><p>y</p></body>" in text
    assert ".good { color: green }" in text
    assert not re.search(r"https?://", text)


def test_a_table_aligns_text_and_marks_rows() -> None:
    text = table(("name", "value"), [("a", "1"), ("b", "2")], {"name"}, {1})
    assert "<th class=name>name</th><th>value</th>" in text
    assert "<tr><td class=name>a</td><td>1</td></tr>" in text
    assert "<tr class=front><td class=name>b</td>" in text
    assert "<th" not in table(("", ""), [("a", "1")])
    with pytest.raises(ValueError, match="zip"):
        table(("one",), [("a", "b")])


def test_equal_figures_give_equal_svg() -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")
    texts = []
    for _ in range(2):
        figure = matplotlib.Figure(figsize=(2, 1))
        figure.subplots().plot([0, 1], [1, 0])
        texts.append(svg(figure))
    assert texts[0] == texts[1]
    assert texts[0].startswith("<svg")
