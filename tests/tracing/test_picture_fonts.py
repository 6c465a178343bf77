"""Pictures use installed fonts for scripts that their own font lacks, and say what none has."""

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
    """Write a font in which each character of a text is a square."""
    builder = pytest.importorskip("fontTools.fontBuilder", reason="comes with matplotlib")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen", reason="comes with matplotlib")
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
    """The family of an installed font that has Japanese and an emoji."""
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


def test_fonts_of_a_text_are_installed_ones_that_have_it(squares: str) -> None:
    families, missing = pictures.fonts_for(f"a{JAPANESE}{ARABIC}{EMOJI}")
    assert families[0] == "DejaVu Sans Mono"
    assert missing == ""
    # A font of the machine may have some of them, and come first.
    assert len(families) > 1
    assert pictures.fonts_for("plain") == (("DejaVu Sans Mono",), "")


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
        warnings.simplefilter("error")  # matplotlib's warning of a missing glyph
        figure.savefig(Path("/dev/null"), format=format)
    data = pictures.show(trace, options)
    if format == "svg":
        assert squares.encode() in data
        assert JAPANESE.encode() in data


def test_a_png_escapes_what_no_font_has_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.fonts_for.cache_clear()
    if pictures.fonts_for(RARE)[1] != RARE:
        pytest.skip("a font of this machine has cuneiform")
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


def test_a_font_that_cannot_be_read_is_passed_over(squares: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ttf"
    bad.write_bytes(b"no font")
    assert pictures._characters(str(bad)) == frozenset()
