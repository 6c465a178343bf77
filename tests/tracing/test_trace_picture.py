"""Pictures of a trace show rows as colours and tokens as plain text."""

import runpy
import sys
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pytest
from small_traces import HOSTILE, small_trace, with_tokens

from minigpt.errors import ConfigError, ResourceError
from minigpt.figures import require_matplotlib, write_figure
from minigpt.text.escape import visible
from minigpt.tracing.findings import Alternative, Trace
from minigpt.tracing.views import ViewOptions

pictures = pytest.importorskip(
    "minigpt.tracing.views.pictures", reason="needs pip install 'minigpt-attention[plot]'"
)

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
Picture = Literal["matrix", "strip"]
PICTURES: tuple[Picture, ...] = ("matrix", "strip")
FORMULAS = [b"$x^2$", b"$\\frac{", b"</text><script>alert(1)</script>", b"&lt;", b"]]>", b"_x"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return small_trace(measure="both", max_new_tokens=8)


def texts_of(svg: bytes) -> list[str]:
    """Return the texts of an SVG after checking that it contains no scripts or references."""
    root = ElementTree.fromstring(svg)
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


@pytest.mark.integration
@pytest.mark.parametrize("picture", PICTURES)
def test_an_svg_has_tokens_as_text_and_no_scripts(trace: Trace, picture: Picture) -> None:
    options = ViewOptions(picture=picture)
    hostile = [data for data in HOSTILE + FORMULAS if data]
    for first in range(0, len(hostile), 15):
        other = with_tokens(trace, hostile[first:] + hostile[:first])
        svg = pictures.show(other, options)
        texts = " ".join(texts_of(svg))
        for token in other.tokens[:-1]:
            shown = visible(token.data)
            assert shown[:6] in texts, shown
            assert shown in texts or "…" in texts, "a shortened token must end in an ellipsis"
    assert pictures.show(other, options) == svg, "the same trace must give the same bytes"


@pytest.mark.parametrize("picture", PICTURES)
def test_the_title_names_the_model_and_the_measure_escaped(picture: Picture) -> None:
    trace = small_trace(measure="norm", max_new_tokens=8)
    other = replace(trace, header=replace(trace.header, model="runs/$a$\x1b<b>日\n"))
    texts = texts_of(pictures.show(other, ViewOptions(picture=picture)))
    assert r"runs/$a$\x1b<b>日\n" in texts
    assert "norm, mean of all 8 heads (2 layers x 4); seed 4" in texts
    assert "share of the value-weighted norm" in texts


@pytest.mark.parametrize("picture", PICTURES)
def test_a_narrow_picture_shows_the_complete_seed(picture: Picture) -> None:
    trace = small_trace(max_new_tokens=1)
    other = replace(trace, header=replace(trace.header, seed=4294967295))
    small = replace(other, steps=other.steps[:1])
    assert any(
        text.endswith("; seed 4294967295")
        for text in texts_of(pictures.show(small, ViewOptions(picture=picture)))
    )


@pytest.mark.integration
def test_a_png_has_each_weight_as_its_colour(trace: Trace) -> None:
    from matplotlib import colormaps
    from matplotlib.image import imread

    options = ViewOptions(format="png")
    pixels = imread(BytesIO(pictures.show(trace, options)))
    figure = pictures.matrix_figure(trace, options)
    figure.set_dpi(pixels.shape[1] / figure.get_figwidth())
    axes = figure.axes[0]
    rows = [step.row.weights_S for step in trace.steps]
    scale = max(row[1:].max() for row in rows)
    n_columns = len(rows[-1])
    for i, row in enumerate(rows):
        for j in range(n_columns):
            x, y = axes.transData.transform((j + 0.5, i + 0.5))
            seen = pixels[pixels.shape[0] - 1 - int(y), int(x), :3]
            expected = colormaps["magma_r"](row[j] / scale)[:3] if j < len(row) else (1, 1, 1)
            np.testing.assert_allclose(seen, expected, atol=0.01)


@pytest.mark.parametrize("position", [None, 15])
def test_strip_boxes_show_the_row_as_colours_and_percentages(
    trace: Trace, position: int | None
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    letters = with_tokens(trace, [bytes([97 + i]) for i in range(20)])
    axes = pictures.strip_figure(letters, ViewOptions(position=position)).axes[0]
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


def test_strip_boxes_stay_inside_the_figure_and_do_not_overlap(trace: Trace) -> None:
    figure = pictures.strip_figure(with_tokens(trace, HOSTILE))
    corners = [patch.get_bbox().get_points() for patch in figure.axes[0].patches]
    width, height = figure.get_size_inches()
    for i, ((x0, y0), (x1, y1)) in enumerate(corners):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        for (other_x, other_y), _ in corners[i + 1 : i + 2]:
            assert other_x >= x1 - 1e-6 or other_y >= y1


def test_characters_missing_in_every_font_are_escaped(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures.fontManager, "ttflist", [])
    monkeypatch.setattr(pictures, "findSystemFonts", list)
    pictures.fonts_for.cache_clear()
    other = with_tokens(trace, ["日".encode(), "🙂".encode(), "é".encode()])
    against = Alternative("猫", 0, "猫".encode(), 1)
    other = replace(other, header=replace(other.header, model="犬", against=against))
    assert pictures.missing_characters(other) == "日犬猫🙂"
    figure = pictures.matrix_figure(other, ViewOptions(format="png"))
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names[:3] == ["\\u65e5 0", "\\U0001f642 1", "é 2"]
    model, rows = (text.get_text() for text in figure.texts)
    assert model == "\\u72ac"
    assert "against \\u732b" in rows
    pictures.fonts_for.cache_clear()


@pytest.mark.integration
def test_labels_of_a_long_trace_do_not_overlap() -> None:
    figure = pictures.matrix_figure(small_trace(context_length=200, max_new_tokens=180))
    figure.draw_without_rendering()
    for axis, side in ((figure.axes[0].xaxis, 0), (figure.axes[0].yaxis, 1)):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        intervals = sorted((box.p0[side], box.p1[side]) for box in boxes)
        assert len(intervals) > 20
        for (_, end), (start, _) in pairwise(intervals):
            assert start > end


@pytest.mark.integration
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_every_format_is_drawn_without_a_warning(
    trace: Trace, picture: Picture, format: Literal["png", "pdf"], start: bytes
) -> None:
    options = ViewOptions(picture=picture, format=format)
    assert pictures.show(with_tokens(trace, HOSTILE[9:]), options).startswith(start)


@pytest.mark.integration
def test_matplotlib_settings_of_the_user_do_not_change_pictures(trace: Trace) -> None:
    from matplotlib import rc_context

    options = ViewOptions(picture="strip")
    ours = pictures.show(trace, options)
    with rc_context({"text.usetex": True, "svg.fonttype": "path", "font.size": 30}):
        assert pictures.show(trace, options) == ours


def test_a_position_without_a_row_is_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="Choose a position from 12 to 19"):
        pictures.show(trace, ViewOptions(picture="strip", position=3))


def test_paths_without_a_picture_format_are_refused(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"end in \.svg, \.png or \.pdf: it is '.*gif'"):
        require_matplotlib(tmp_path / "map.gif")
    with pytest.raises(ConfigError, match="no folder"):
        require_matplotlib(tmp_path / "nowhere/map.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        require_matplotlib(tmp_path / "folder.svg")
    with pytest.raises(ResourceError, match="too long"):
        write_figure(tmp_path / f"{'x' * 300}.svg", lambda: pictures.matrix_figure(trace))
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'minigpt-attention\[plot\]'"):
        require_matplotlib(tmp_path / "map.svg")


@pytest.mark.integration
def test_signed_rows_are_drawn_with_diverging_colours_and_signed_numbers() -> None:
    from matplotlib import colormaps
    from matplotlib.collections import QuadMesh
    from matplotlib.patches import Rectangle

    trace = small_trace(measure="logit", against="b", max_new_tokens=8)
    rows = [step.row.weights_S for step in trace.steps]
    scale = max(float(np.abs(row[1:]).max()) for row in rows)
    axes = pictures.matrix_figure(trace).axes[0]
    (mesh,) = [one for one in axes.collections if isinstance(one, QuadMesh)]
    assert mesh.get_clim() == pytest.approx((-scale, scale))
    assert mesh.get_cmap().name == "PuOr"
    drawn = np.ma.getdata(mesh.get_array()).reshape(len(rows), -1)
    for seen, row in zip(drawn, rows, strict=True):
        np.testing.assert_array_equal(seen[: len(row)], row)
    axes = pictures.strip_figure(trace).axes[0]
    row = rows[-1]
    own_scale = float(np.abs(row[1:]).max())
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    numbers = [text for text in axes.texts if text.get_text()[:1] in "+-"]
    for number, box in zip(row, boxes, strict=False):
        expected = colormaps["PuOr"]((float(number) / own_scale + 1) / 2)
        np.testing.assert_allclose(box.get_facecolor(), expected, atol=0.01)
        (x0, y0), (x1, y1) = box.get_bbox().get_points()
        inside = [
            text.get_text()
            for text in numbers
            if x0 < text.get_position()[0] < x1 and y0 < text.get_position()[1] < y1
        ]
        assert inside == ([f"{number:+.2f}"] if abs(number) >= 0.005 else [])
    assert "logit against b in logits" in " ".join(texts_of(pictures.show(trace)))


def test_rows_of_the_prompt_are_not_labelled_as_generated() -> None:
    axes = pictures.matrix_figure(small_trace(max_new_tokens=2, prompt_rows=True)).axes[0]
    assert axes.get_ylabel() == "token"


def test_pictures_in_the_documentation_have_a_row_per_token() -> None:
    streamed = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["streamed"]
    trace = small_trace(max_new_tokens=5)
    lines = ["".join(text for text, _ in line) for line in streamed(trace)]
    assert sum(line.lstrip().startswith(tuple("12345")) for line in lines) >= 5
    assert any("5 tokens; the token limit was reached" in line for line in lines)
