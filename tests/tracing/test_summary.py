"""The header and footer around the lines of a trace."""

import re
from dataclasses import replace
from typing import Any

import pytest
from small_traces import HOSTILE, WIDTHS, cells, header_of, roles_of, text_of

from minigpt.config import SamplingConfig
from minigpt.tracing.analysis_config import MEASURES, Measure, facts_of
from minigpt.tracing.events import Token
from minigpt.tracing.findings import CauseCheck, TraceFooter
from minigpt.tracing.head_lists import select_heads
from minigpt.tracing.lines import make_layout
from minigpt.tracing.spans import Line
from minigpt.tracing.summary import footer_lines, header_lines, legend


@pytest.mark.parametrize("width", WIDTHS)
def test_header_and_footer_fit_the_terminal(width: int) -> None:
    for heads in (None, "0.1", "0.1,3.2,5.0,7.*,9.3,11.1,11.2,11.3,11.5,11.7"):
        for prompt in (HOSTILE * 2, HOSTILE[11:12], [b"x"] * width, [b"x"]):
            header = header_of(
                model="runs/\x1b[31m\n\u200d日本" + "a-very-long-name-" * 12,
                n_layer=12,
                n_head=12,
                selection=select_heads(12, 12, heads=heads),
                measures=("weight", "norm"),
                reduce="max",
                sink=3,
                sink_rule="detected",
                n_verified=4,
                roles=tuple(tuple(roles_of(tag="induc") for _ in range(12)) for _ in range(12)),
                prompt=tuple(Token(i, 0, data) for i, data in enumerate(prompt)),
            )
            for line in header_lines(header, width):
                assert cells(text_of(line)) <= width
    for finish in ("length", "stop", "end_of_text", "context", None):
        for cause in (None, CauseCheck(8, 7, 1.5, 0.25, 0.5), CauseCheck(1, 0, 1.5, 0, None)):
            footer = TraceFooter(1024, finish, 1.0, 1.2e-7, 1e-4, cause)
            for line in footer_lines(footer, header, width):
                assert cells(text_of(line)) <= width


def words_of(lines: list[Line]) -> str:
    return " ".join(" ".join(map(text_of, lines)).split())


def test_the_header_shows_options_that_are_not_the_default() -> None:
    usual = words_of(header_lines(header_of(), 80))
    assert "measure weight of head 0.0" in usual
    assert not re.search("sink|role|verify", usual)
    roles = roles_of(tag="induc", induction=0.715, previous=0.04)
    said = words_of(
        header_lines(header_of(sink=3, sink_rule="detected", roles=((roles,),), n_verified=2), 80)
    )
    assert "sink position 3, detected" in said
    assert "role induc: previous 4%, duplicate 0%, induction 72%, sink 0%, local 0%" in said
    assert "the 2 strongest sources" in said
    assert "weights grow to sum to 1" in said
    header = header_of(
        n_layer=2, n_head=2, selection=select_heads(2, 2, heads="0.*,1.1"), reduce="rollout",
        roles=((roles_of(tag="sink"), roles_of()), (roles_of(tag="prev"), roles_of(tag="sink"))),
    )  # fmt: skip
    said = words_of(header_lines(header, 80))
    assert "weight, rollout of the mean of 3 heads (0.*,1.1)" in said
    assert "roles sink 0.0 1.1 prompt" in said, "roles must include heads that are not selected"


def test_the_footer_counts_positions_where_every_position_is_knocked_out() -> None:
    footer = TraceFooter(9, "length", 1.0, 1.2e-7, 3e-6, CauseCheck(60, 0, 0.3, 0.0, 0.8))
    text = words_of(footer_lines(footer, header_of(n_verified="all"), 80))
    assert "a position changed ln p by 0.300 on average (60 positions). Rank" in text
    assert not re.search("source|control", text)


def test_the_footer_names_the_measure_that_ranked_the_sources() -> None:
    def said(correlation: float | None) -> str:
        cause = CauseCheck(60, 58, 0.3121, 0.0213, correlation)
        footer = TraceFooter(9, "length", 1.0, None, 3e-6, cause)
        return words_of(footer_lines(footer, header_of(measures=("logit",)), 80))

    assert "It counts what heads add to the logit directly" in said(0.8)
    assert (
        "Rank correlation of measure logit and effect: 0.80, so here measure logit says much"
        in (said(0.8))
    )
    assert "too few to rank measure logit against effects" in said(None)
    assert not re.search("weight", said(0.8) + said(None), re.IGNORECASE)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (None, ["Attention shows where a head looked, not why a token was generated."]),
        (
            CauseCheck(60, 58, 0.3121, 0.0213, 0.12),
            ["Weight is not influence", "60 sources", "0.312", "58 controls", "0.021",
             "mattered more than", "0.12", "say little"],
        ),
        (CauseCheck(60, 58, 0.3, 0.2, 0.8), ["mattered little more than", "0.80", "say much"]),
        (CauseCheck(60, 58, 0.2, 0.3, 0.1), ["mattered no more than", "say little"]),
        (CauseCheck(60, 58, 0.0004, 0.0001, 0.1), ["by 0.000", "mattered no more than"]),
        (CauseCheck(60, 58, 0.0006, 0.0004, 0.1), ["by 0.001", "mattered little more than"]),
        (CauseCheck(2, 2, 0.3, 0.2, 0.76), ["0.76, which may be chance with 4 knockouts."]),
        (CauseCheck(8, 8, 0.3, 0.2, -0.5), ["-0.50, which may be chance with 16 knockouts."]),
        (CauseCheck(8, 8, 0.3, 0.2, 0.53), ["0.53, so here the weights say something"]),
        (CauseCheck(1, 0, 0.3, 0.0, None), ["(1 source); there were no controls", "too few to"]),
    ],
)  # fmt: skip
def test_the_footer_shows_the_results_of_the_checks(
    cause: CauseCheck | None, said: list[str]
) -> None:
    text = words_of(
        footer_lines(TraceFooter(9, "length", 1.0, 1.2e-7, 3e-6, cause), header_of(), 80)
    )
    assert "checks passed: every row sums to 100% and rows times values give the heads'" in text
    assert "e-0" not in text
    for words in said:
        assert words in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 9, 18, 30, 400])
def test_the_header_lists_each_token_of_the_prompt_with_its_position(n: int, width: int) -> None:
    prompt = bytes(97 + i % 26 for i in range(n))
    header = header_of(
        prompt=tuple(Token(i, b, bytes([b])) for i, b in enumerate(prompt)),
    )
    lines = [text_of(line) for line in header_lines(header, width)]
    assert max(map(cells, lines)) <= width
    text = "\n".join(lines).partition("prompt ")[2].partition("from ")[0]
    shown = {int(position): name for position, name in re.findall(r"(\d+) ([a-z])(?=\s)", text)}
    assert all(chr(prompt[position]) == name for position, name in shown.items())
    assert {0, n - 1} <= set(shown)
    hidden = re.findall(r"\.\.\. (\d+) more", text)
    assert len(shown) + sum(map(int, hidden)) == n
    assert len(text.strip().splitlines()) <= 6


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("measure", ["weight", "norm", "logit"])
def test_the_columns_are_explained_once_above_them(width: int, measure: Measure) -> None:
    layout = make_layout(width, vocab_size=4096, n_positions=200, measures=(measure,))
    lines = legend(layout, header_of(measures=(measure,), sink=3))
    assert all(cells(text_of(line)) <= width for line in lines)
    explained = re.findall(r"(\w+): ", words_of(lines).removeprefix("columns "))
    heading = text_of(layout.heading()).split()
    columns = [name for name in ("prob", "sink", "rest", "bits", "other", "sum") if name in heading]
    assert set(columns) <= set(explained)
    assert "bits" in heading or "bits" not in explained
    assert "position 3" in words_of(lines)


@pytest.mark.parametrize(
    ("measure", "heads", "says"),
    [
        ("logit", None, "other: MLPs, embedding, biases; sum"),
        ("logit", "0.1", "other: MLPs, embedding, biases, other heads; sum"),
        ("integrated", None, "other: logit of the baseline, error; sum"),
    ],
)
def test_the_legend_lists_the_parts_of_other(
    measure: Measure, heads: str | None, says: str
) -> None:
    layout = make_layout(80, vocab_size=4096, n_positions=200, measures=(measure,))
    header = header_of(measures=(measure,))
    if heads:
        header = replace(header, selection=select_heads(2, 2, heads=heads))
    assert says in words_of(legend(layout, header))


def test_a_failed_check_is_shown_with_its_value() -> None:
    footer = TraceFooter(9, "length", 1.0, 0.5, 4e-3)
    text = words_of(footer_lines(footer, header_of(), 80))
    assert "check failed: every row sums to 100% only within 5e-01" in text
    assert "within 4e-03" in text
    nan = words_of(footer_lines(replace(footer, worst_product_error=float("nan")), header_of(), 80))
    assert "only within nan" in nan
    none = words_of(footer_lines(TraceFooter(9, "length", 1.0, None), header_of(), 80))
    assert "check" not in none


@pytest.mark.parametrize("measure", MEASURES)
def test_the_footer_states_the_limits_of_the_measure(measure: Measure) -> None:
    caveats = [facts_of(one).caveat for one in MEASURES]
    text = words_of(
        footer_lines(TraceFooter(9, "length", 1.0, 0.0), header_of(measures=(measure,)))
    )
    assert [one in text for one in caveats] == [one == measure for one in MEASURES]
    assert len(set(caveats)) == len(caveats)


@pytest.mark.parametrize(
    ("n_new", "n_rows", "finish", "says"),
    [
        (5, 5, "length", "5 tokens; the token limit was reached"),
        (5, 16, "length", "11 tokens of the prompt; 5 generated tokens; the token limit was"),
        (0, 11, "length", "11 tokens of the prompt."),
        (0, 4, None, "4 tokens of the prompt; interrupted."),
    ],
)
def test_the_footer_counts_tokens_of_a_given_text_separately(
    n_new: int, n_rows: int, finish: Any, says: str
) -> None:
    header = header_of(sampling=SamplingConfig(max_new_tokens=n_new))
    footer = TraceFooter(n_new, finish, 1.0, None)
    assert words_of(footer_lines(footer, header, n_rows=n_rows)).startswith(says)
