"""Pictures of a trace: their colours are the rows, and their tokens are text and nothing else."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from small_traces import HOSTILE, small_trace, with_tokens

from minigpt.errors import ConfigError, ResourceError
from minigpt.text.escape import visible
from minigpt.tracing.events import Trace
from minigpt.tracing.views.pictures import (
    check_picture,
    draw_matrix,
    draw_strip,
    matrix_figure,
    strip_figure,
)

pytest.importorskip("matplotlib", reason="needs pip install 'minigpt[plot]'")

SVG = "{http://www.w3.org/2000/svg}"
FORMULAS = [b"$x^2$", b"$\\frac{", b"</text><script>alert(1)</script>", b"&lt;", b"]]>", b"_x"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return small_trace(measures=("weight", "norm"), max_new_tokens=8)


def texts_of(path: Path) -> list[str]:
    """The texts of an SVG in which nothing can run, and nothing is fetched."""
    root = ElementTree.parse(path).getroot()
    for element in root.iter():
        assert element.tag in {
            f"{SVG}{name}"
            for name in ("svg", "metadata", "defs", "style", "g", "path", "use", "text", "tspan",
                         "rect", "clipPath", "image")
        } or not element.tag.startswith(SVG), element.tag  # fmt: skip
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on")
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,"))
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("draw", [draw_matrix, draw_strip])
def test_an_svg_has_the_tokens_as_text_and_runs_nothing(
    trace: Trace, tmp_path: Path, draw: type
) -> None:
    path = tmp_path / "picture.svg"
    hostile = [data for data in HOSTILE + FORMULAS if data]
    for first in range(0, len(hostile), 15):
        other = with_tokens(trace, hostile[first:] + hostile[:first])
        draw(other, path)
        texts = " ".join(texts_of(path))
        for token in other.tokens[:-1]:
            shown = visible(token.data)
            assert shown[:6] in texts, shown
            # what a shorter token has left out is said
            assert shown in texts or "…" in texts
    draw(other, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == path.read_bytes(), "the same trace, same bytes"


def test_the_title_says_what_it_is_of_and_no_name_steers_it(trace: Trace, tmp_path: Path) -> None:
    header = replace(trace.header, model="runs/$a$\x1b<b>日\n")
    other = replace(trace, header=header)
    for draw in (draw_matrix, draw_strip):
        draw(other, tmp_path / "picture.svg", measure="norm")
        texts = texts_of(tmp_path / "picture.svg")
        assert r"runs/$a$\x1b<b>\u65e5\n" in texts
        assert "norm, mean of all 8 heads (2 layers x 4); seed 4" in texts
        assert "share of the value-weighted norm" in texts


@pytest.mark.parametrize("measure", ["weight", "norm"])
def test_a_png_has_each_weight_as_its_colour(trace: Trace, tmp_path: Path, measure: str) -> None:
    from matplotlib import colormaps
    from matplotlib.image import imread

    path = tmp_path / "map.png"
    draw_matrix(trace, path, measure=measure)  # type: ignore[arg-type]
    pixels = imread(path)
    figure = matrix_figure(trace, measure=measure)  # type: ignore[arg-type]
    figure.set_dpi(pixels.shape[1] / figure.get_figwidth())
    axes = figure.axes[0]
    rows = [step.rows[measure == "norm"].weights_S for step in trace.steps]
    scale = max(row[1:].max() for row in rows)
    n_columns = len(rows[-1])
    for i, row in enumerate(rows):
        for j in range(n_columns):
            x, y = axes.transData.transform((j + 0.5, i + 0.5))
            seen = pixels[pixels.shape[0] - 1 - int(y), int(x), :3]
            expected = colormaps["magma_r"](row[j] / scale)[:3] if j < len(row) else (1, 1, 1)
            np.testing.assert_allclose(seen, expected, atol=0.01)


@pytest.mark.parametrize("position", [None, 15])
def test_boxes_of_the_strip_have_the_row_as_colours_and_percentages(
    trace: Trace, position: int | None
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    letters = with_tokens(trace, [bytes([97 + i]) for i in range(20)])
    axes = strip_figure(letters, position=position).axes[0]
    chosen = position or 19
    weights = letters.steps[chosen - 12].row.weights_S
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(boxes) == 20
    places = {text.get_text(): text.get_position() for text in axes.texts}
    percents = [text for text in axes.texts if text.get_text().endswith("%")]
    for place, box in enumerate(boxes):
        (x0, y0), (x1, y1) = box.get_bbox().get_points()
        x, y = places[chr(97 + place)]
        assert x0 < x < x1
        assert y0 < y < y1
        inside = [
            text.get_text()
            for text in percents
            if x0 < text.get_position()[0] < x1 and y0 < text.get_position()[1] < y1
        ]
        if place >= chosen:
            assert box.get_facecolor() == (1, 1, 1, 1)
            assert inside == []
            continue
        share = float(weights[place])
        expected = colormaps["magma_r"](share / weights[1:].max())
        np.testing.assert_allclose(box.get_facecolor(), expected, atol=0.01)
        assert inside == ([f"{round(share * 100)}%"] if share >= 0.005 else [])
        assert (box.get_linestyle() == "--") == (place == 0)
    widths = [box.get_linewidth() for box in boxes]
    assert widths.index(max(widths)) == chosen


def test_boxes_stay_on_the_page_and_apart(trace: Trace) -> None:
    figure = strip_figure(with_tokens(trace, HOSTILE))
    corners = [patch.get_bbox().get_points() for patch in figure.axes[0].patches]
    width, height = figure.get_size_inches()
    for i, ((x0, y0), (x1, y1)) in enumerate(corners):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        for (other_x, other_y), _ in corners[i + 1 : i + 2]:
            assert other_x >= x1 - 1e-6 or other_y >= y1


def test_what_the_font_lacks_is_written_as_escapes(trace: Trace) -> None:
    other = with_tokens(trace, ["日".encode(), "🙂".encode(), "é".encode()])
    names = [label.get_text() for label in matrix_figure(other).axes[0].get_xticklabels()]
    assert names[:3] == ["\\u65e5 0", "\\U0001f642 1", "é 2"]


def test_labels_of_a_long_trace_do_not_touch() -> None:
    figure = matrix_figure(small_trace(context_length=200, max_new_tokens=180))
    figure.draw_without_rendering()
    for axis, side in ((figure.axes[0].xaxis, 0), (figure.axes[0].yaxis, 1)):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        intervals = sorted((box.p0[side], box.p1[side]) for box in boxes)
        assert len(intervals) > 20
        for (_, end), (start, _) in pairwise(intervals):
            assert start > end


@pytest.mark.parametrize("suffix", [".PNG", ".pdf"])
def test_every_format_is_written_without_a_warning(
    trace: Trace, tmp_path: Path, suffix: str
) -> None:
    starts = {".PNG": b"\x89PNG", ".pdf": b"%PDF"}
    for draw in (draw_matrix, draw_strip):
        path = tmp_path / f"picture{suffix}"
        draw(with_tokens(trace, HOSTILE[9:]), path)
        assert path.read_bytes().startswith(starts[suffix])


def test_a_users_settings_of_matplotlib_change_nothing(trace: Trace, tmp_path: Path) -> None:
    from matplotlib import rc_context

    draw_strip(trace, tmp_path / "ours.svg")
    with rc_context({"text.usetex": True, "svg.fonttype": "path", "font.size": 30}):
        draw_strip(trace, tmp_path / "theirs.svg")
    assert (tmp_path / "ours.svg").read_bytes() == (tmp_path / "theirs.svg").read_bytes()


def test_what_cannot_be_drawn_is_said(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"end in \.svg, \.png or \.pdf: it is '.*gif'"):
        draw_matrix(trace, tmp_path / "map.gif")
    with pytest.raises(ConfigError, match="no folder"):
        draw_matrix(trace, tmp_path / "nowhere/map.svg")
    with pytest.raises(ConfigError, match="Choose one from 12 to 19"):
        draw_strip(trace, tmp_path / "strip.svg", position=3)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        draw_strip(trace, tmp_path / "folder.svg")
    with pytest.raises(ResourceError, match="too long"):
        draw_strip(trace, tmp_path / f"{'x' * 300}.svg")
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'minigpt\[plot\]'"):
        check_picture(tmp_path / "map.svg")
