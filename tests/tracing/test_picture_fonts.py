"""Pictures use installed fonts for other scripts, and report characters without a font."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_traces import small_trace, with_tokens

from minigpt.commands.attention_trace.files import FileOutput
from minigpt.commands.attention_trace.targets import Targets
from minigpt.tracing.findings import Trace
from minigpt.tracing.lines import TraceLayout
from minigpt.tracing.views import ViewOptions

pictures = pytest.importorskip(
    "minigpt.tracing.views.pictures", reason="needs pip install 'minigpt-attention[plot]'"
)

JAPANESE, ARABIC, EMOJI, RARE = "今日は", "مرحبا", "🧿", "\U00012000"


def make_font(path: Path, text: str) -> None:
    """Write a font that draws each character of a text as a square."""
    builder = pytest.importorskip(
        "fontTools.fontBuilder", reason="needs fontTools, which matplotlib installs"
    )
    pens = pytest.importorskip(
        "fontTools.pens.ttGlyphPen", reason="needs fontTools, which matplotlib installs"
    )
    pen = pens.TTGlyphPen(None)
    for move, x, y in (("moveTo", 0, 0), ("lineTo", 0, 700), ("lineTo", 700, 700)):
        getattr(pen, move)((x, y))
    pen.closePath()
    names = {".notdef": pen.glyph()} | {f"u{ord(c):x}": pen.glyph() for c in text}
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(names))
    font.setupCharacterMap({ord(c): f"u{ord(c):x}" for c in text})
    font.setupGlyf(names)
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Test Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Install a font with Japanese and an emoji; return its family."""
    from matplotlib.font_manager import fontManager

    path = tmp_path_factory.mktemp("fonts") / "squares.ttf"
    make_font(path, JAPANESE + EMOJI)
    before = list(fontManager.ttflist)
    fontManager.addfont(path)
    pictures.fonts_for.cache_clear()
    yield "Test Squares"
    fontManager.ttflist = before
    pictures.fonts_for.cache_clear()


def traced(*texts: str) -> Trace:
    return with_tokens(small_trace("x" * 6, max_new_tokens=4), [t.encode() for t in texts])


@pytest.mark.integration
def test_installed_fonts_are_found_for_the_characters_of_a_text(squares: str) -> None:
    families, missing = pictures.fonts_for(f"a{JAPANESE}{ARABIC}{EMOJI}")
    assert families[0] == "DejaVu Sans Mono"
    assert missing == ""
    # A font of the machine may have some of them and be found first.
    assert len(families) > 1
    assert pictures.fonts_for("plain") == (("DejaVu Sans Mono",), "")


@pytest.mark.integration
@pytest.mark.parametrize("picture", ["matrix", "strip"])
@pytest.mark.parametrize("format", ["svg", "png"])
def test_every_script_is_drawn_and_not_escaped(picture: str, format: str, squares: str) -> None:
    trace = traced(JAPANESE, ARABIC, EMOJI)
    options = ViewOptions(picture=picture, format=format)  # type: ignore[arg-type]
    figure_of = {"matrix": pictures.matrix_figure, "strip": pictures.strip_figure}[picture]
    figure = figure_of(trace, options)
    from matplotlib.text import Text

    shown = " ".join(one.get_text() for one in figure.findobj(Text))
    for text in (JAPANESE, ARABIC, EMOJI):
        assert text in shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        figure.savefig(Path("/dev/null"), format=format)
    data = pictures.show(trace, options)
    if format == "svg":
        assert squares.encode() in data
        assert JAPANESE.encode() in data


@pytest.mark.parametrize("text", ["مر", "שם", "⋯ن", "␣ش"])
def test_row_numbers_stay_next_to_cells_with_right_to_left_names(text: str) -> None:
    from matplotlib.text import Text

    figure = pictures.matrix_figure(traced(text), ViewOptions(picture="matrix", format="png"))
    figure.canvas.draw()
    axes = figure.axes[0]
    shown = [one for one in axes.findobj(Text) if one.get_text()]
    # In a single text, Unicode's bidirectional algorithm would put the number on the other side.
    assert not [one for one in shown if text in one.get_text() and one.get_text() != text]
    names = [one.get_window_extent() for one in shown if one.get_text() == text]
    assert len(names) == 4 + 9  # rows and columns
    for row, label in enumerate(axes.get_yticklabels()):
        number, place = label.get_window_extent(), axes.transData.transform((0, row + 0.5))[1]
        (name,) = [box for box in names if box.x1 < axes.bbox.x0 and box.y0 < place < box.y1]
        assert name.x1 < number.x0 < number.x1 < axes.bbox.x0
        assert number.x0 - name.x1 < number.height
    for column, label in enumerate(axes.get_xticklabels()):
        number, place = label.get_window_extent(), axes.transData.transform((column + 0.5, 0))[0]
        (name,) = [box for box in names if box.y1 < axes.bbox.y0 and box.x0 < place < box.x1]
        assert name.y1 < number.y0 < number.y1 < axes.bbox.y0


@pytest.mark.integration
def test_a_png_escapes_characters_without_a_font_and_reports_them_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.fonts_for.cache_clear()
    if pictures.fonts_for(RARE)[1] != RARE:
        pytest.skip("needs a machine without a cuneiform font")
    trace = traced(RARE, "a")
    assert pictures.missing_characters(trace) == RARE
    targets = Targets(png=tmp_path / "p.png", svg=tmp_path / "p.svg")
    layout = TraceLayout(80, vocab_size=257, n_positions=30)
    with FileOutput(targets, layout, is_quiet=True) as output:
        output.show(iter([trace.header, *trace.steps, trace.footer]))
    lines = [line for line in capsys.readouterr().err.splitlines() if "font" in line]
    assert len(lines) == 1
    assert RARE in lines[0]
    assert "--svg" in lines[0]
    assert RARE.encode() in (tmp_path / "p.svg").read_bytes()


@pytest.mark.integration
def test_a_font_is_found_that_was_installed_after_matplotlib_cached_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.font_manager import fontManager

    made, broken = tmp_path / "made.ttf", tmp_path / "broken.ttf"
    make_font(made, RARE)
    broken.write_bytes(b"no font")
    cached = [entry for entry in fontManager.ttflist if "DejaVu" in entry.name]
    monkeypatch.setattr(fontManager, "ttflist", cached)
    pictures.fonts_for.cache_clear()
    monkeypatch.setattr(pictures, "findSystemFonts", lambda: [str(broken), str(made)])
    assert pictures.fonts_for(RARE) == (("DejaVu Sans Mono", "Test Squares"), "")
    trace = traced(RARE, "a")
    assert pictures.missing_characters(trace) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        pictures.show(trace, ViewOptions(picture="strip", format="png"))
    pictures.fonts_for.cache_clear()


def test_an_unreadable_font_is_skipped(squares: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ttf"
    bad.write_bytes(b"no font")
    assert pictures._characters(str(bad)) == frozenset()
