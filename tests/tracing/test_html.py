"""The page contains the data of the trace, and no text of it becomes HTML."""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from page_traces import BOTH, HOSTILE, random_trace
from small_traces import small_trace

from minigpt.text.escape import visible
from minigpt.tracing.analysis.lines import cause_in_words
from minigpt.tracing.findings import Trace, TraceFooter
from minigpt.tracing.views.page import embedded_json, to_html
from minigpt.tracing.views.page.facts import facts_about
from minigpt.tracing.wrapping import one_line_label


class Page(HTMLParser):
    """Parses the elements, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: dict[str, str] = {}
        self.attributes: list[dict[str, str | None]] = []
        self.comments: list[str] = []
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, tuple(values)))
        self.attributes.append(values)
        self._open = values.get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        self.texts[self._open] = self.texts.get(self._open, "") + data

    @property
    def policy(self) -> str:
        policies = [a["content"] for a in self.attributes if "http-equiv" in a]
        assert len(policies) == 1
        return str(policies[0])

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["application/json"])


def unpacked(data: dict[str, Any]) -> dict[str, list[int]]:
    """Return the packed arrays, unpacked by a plain loop."""
    text = zlib.decompress(base64.b64decode(data["packed"]["deflated"]))
    arrays, start = {}, 0
    for name, width, length in data["packed"]["arrays"]:
        planes = [text[start + byte * length :][:length] for byte in range(width)]
        arrays[name] = [
            sum(plane[i] << 8 * byte for byte, plane in enumerate(planes)) for i in range(length)
        ]
        start += width * length
    assert start == len(text)
    return arrays


def shares_of(codes: list[int], largest: int) -> np.ndarray:
    return (np.array(codes) / largest) ** 2


def test_complete_rows_survive_packing() -> None:
    trace = random_trace()
    arrays = unpacked(Page(to_html(trace)).data)
    for i, measure in enumerate(BOTH):
        expected = np.concatenate([step.rows[i].weights_S for step in trace.steps])
        shares = shares_of(arrays[f"{measure}.rows"], 65535)
        # Half a code, where the square has a slope of at most 2 / 65535 per code.
        np.testing.assert_allclose(shares, expected, rtol=0, atol=1.6e-5)


def test_rows_of_heads_survive_packing() -> None:
    trace = random_trace(n_prompt=2, n_generated=9)
    data = Page(to_html(trace)).data
    assert data["nSources"] == 5
    arrays = {
        name: iter(codes) for name, codes in unpacked(data).items() if not name.endswith(".rows")
    }
    for step in trace.steps:
        n_view = step.token.position
        for row in step.rows:
            heads = row.heads
            assert heads is not None
            shape, n_kept = heads.sink.shape, heads.positions.shape[2]

            def taken(name: str, n: int, measure: str = row.measure) -> list[int]:
                return [next(arrays[f"{measure}.{name}"]) for _ in range(n)]

            n_heads = heads.sink.size
            positions = np.array(taken("positions", n_heads * 5)).reshape(*shape, 5)
            weights = shares_of(taken("weights", n_heads * 5), 255).reshape(*shape, 5)
            assert (positions[..., :n_kept] == heads.positions).all()
            # Half a code of 1/255.
            np.testing.assert_allclose(weights[..., :n_kept], heads.weights, atol=0.004)
            assert (weights[..., n_kept:] == 0).all()
            for name, expected in (
                ("sink", heads.sink),
                ("own", heads.own),
                ("prompt", heads.prompt),
                ("entropy", heads.entropy / np.log2(n_view)),
                ("distance", heads.distance / (n_view - 1)),
            ):
                shares = shares_of(taken(name, n_heads), 255).reshape(shape)
                np.testing.assert_allclose(shares, expected, atol=0.004)
    assert all(next(codes, None) is None for codes in arrays.values())


def test_small_shares_have_finer_steps_than_one_255th() -> None:
    trace = random_trace(n_generated=1, n_prompt=40)
    heads = trace.steps[0].row.heads
    assert heads is not None
    heads.sink[0, 0] = 0.0005
    arrays = unpacked(Page(to_html(trace)).data)
    assert shares_of(arrays["weight.sink"], 255)[0] == pytest.approx(0.0005, abs=1e-4)


def test_two_hundred_tokens_of_144_heads_by_both_measures_take_less_than_2_mb() -> None:
    """Random positions compress worse than those of a real model."""
    page = to_html(random_trace(64, 200, n_layer=12, n_head=12, n_sources=8))
    assert len(page.encode()) < 2_000_000


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_trace(),
        lambda: small_trace(has_heads=True),
        lambda: small_trace(has_heads=True, measure="both", reduce="max", heads="0.1,1.*"),
        lambda: small_trace(reduce="rollout"),
        lambda: small_trace("a", max_new_tokens=1),
        lambda: random_trace(1, 1),
        lambda: random_trace(n_sources=0),
        lambda: small_trace(heads="1.2", sink="auto"),
        lambda: random_trace(measures=("norm",), has_roles=False),
        lambda: random_trace(has_heads=False),
        lambda: Trace(random_trace().header, (), TraceFooter(0, None, 0.0, None)),
    ],
)
def test_every_kind_of_trace_has_a_page(make: Callable[[], Trace]) -> None:
    trace = make()
    data = Page(to_html(trace)).data
    assert data["names"] == [visible(token.data) for token in trace.tokens]
    assert data["nPrompt"] == len(trace.header.prompt)
    assert len(data["steps"]) == len(trace.steps)
    for step, shown in zip(trace.steps, data["steps"], strict=True):
        assert shown["logProbability"] == pytest.approx(step.log_probability, abs=1e-5)
        assert shown["rows"][0]["entropy"] == pytest.approx(step.row.entropy, abs=1e-5)
    arrays = unpacked(data)
    has_heads = bool(trace.steps) and trace.steps[0].row.heads is not None
    assert ("positions" in {name.split(".")[1] for name in arrays}) == has_heads
    assert (data["nSources"] is not None) == has_heads


def test_each_effect_is_paired_with_its_control() -> None:
    trace = random_trace()
    for step, shown in zip(trace.steps, Page(to_html(trace)).data["steps"], strict=True):
        sources = [effect for effect in step.effects if effect.control_of is None]
        controls = {effect.control_of: effect for effect in step.effects}
        assert [effect["position"] for effect in shown["effects"]] == [
            effect.source.token.position for effect in sources
        ]
        for i, effect in enumerate(shown["effects"]):
            assert effect["change"] == pytest.approx(sources[i].change, abs=1e-5)
            if i in controls:
                assert effect["control"] == controls[i].source.token.position
                assert effect["controlChange"] == pytest.approx(controls[i].change, abs=1e-5)
            else:
                assert effect["control"] is None


def test_the_page_and_the_terminal_have_the_same_closing_sentences() -> None:
    trace = random_trace()
    assert trace.footer.cause is not None
    text = Page(to_html(trace)).data["closing"]
    assert text[0].startswith("9 tokens; the token limit was reached; checks passed: every row")
    assert text[1:] == [cause_in_words(trace.footer.cause)]


def test_without_knockouts_the_page_makes_no_causal_claim() -> None:
    text = " ".join(Page(to_html(random_trace(has_effects=False))).data["closing"])
    assert "Attention shows where a head looked, not why a token was generated" in text
    assert "says nothing about cause" in text


def test_the_content_security_policy_allows_only_the_pages_script_and_style() -> None:
    page = Page(to_html(small_trace(has_heads=True)))

    def sha256(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    directives = dict(part.split(" ", 1) for part in page.policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == f"'sha256-{sha256(page.texts['script'])}'"
    assert directives["style-src"] == f"'sha256-{sha256(page.texts['style'])}'"
    assert directives["base-uri"] == directives["form-action"] == "'none'"
    # The policy must precede everything that it applies to.
    names = [name for name, _ in page.elements]
    assert names[:4] == ["html", "head", "meta", "meta"]


def test_the_page_has_no_external_references() -> None:
    page = to_html(random_trace())
    page = page.replace('"http://www.w3.org/2000/svg"', "")  # an XML namespace, never fetched
    assert not re.search(r"\w+://|url\(|@import|\bsrc=|\bhref=", page)
    assert not re.search(r"\b(fetch|import|XMLHttpRequest|WebSocket|EventSource|Worker)\b\(", page)


def test_the_script_never_parses_text_as_html_or_code() -> None:
    script = Page(to_html(random_trace())).texts["script"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|DOMParser|srcdoc",
        script,
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_trace_becomes_an_html_element(text: str) -> None:
    plain = Page(to_html(random_trace(3, 3)))
    page = Page(to_html(random_trace(3, 3, texts=[text], model=text, dtype=text, kernel=text)))
    assert page.elements == plain.elements
    assert page.comments == []
    assert page.texts["script"] == plain.texts["script"]
    assert page.texts["title"] == f"Attention trace of {one_line_label(text)}"
    assert page.data["names"] == [visible(text.encode())] * 6
    assert page.data["model"] == one_line_label(text)


def test_embedded_json_cannot_end_its_script_element() -> None:
    for text in (*HOSTILE, "<>&\u2028\u2029", "\ud800"):
        value = {text: [text, 1.5, None]}
        embedded = embedded_json(value)
        assert json.loads(embedded) == value
        assert embedded.isascii()
        assert not set("<>&") & set(embedded)


def test_a_page_of_logits_explains_their_limits_and_does_not_mention_attention() -> None:
    weights = small_trace()
    header = replace(weights.header, measures=("logit",), n_verified=2)
    steps = [
        replace(step, rows=tuple(replace(r, measure="logit", is_signed=True) for r in step.rows))
        for step in weights.steps
    ]
    for trace, word in (
        (weights, "where a head looked"),
        (
            replace(weights, header=header, steps=tuple(steps)),
            "it counts what heads add to the logit directly",
        ),
    ):
        page = to_html(trace)
        how = page[page.index('id="how"') : page.index("</details>")]
        assert word in how.lower()
        is_weight = trace is weights
        assert ("attention" in how.lower()) == is_weight
    assert "has a smaller number" in Page(page).data["knockout"]


@pytest.mark.parametrize(
    ("measure", "name", "words"),
    [
        ("weight", "mean", "the mean of the heads"),
        ("logit", "sum", "the sum of the heads"),
        ("gradient", None, ""),
    ],
)
def test_a_page_states_how_heads_are_reduced_to_one_row(
    measure: str, name: str | None, words: str
) -> None:
    facts = dict(facts_about(random_trace(measures=(measure,))))
    found = {key for key in ("mean", "sum", "max") if key in facts}
    assert found == ({name} if name else set())
    assert name is None or words in facts[name]


def test_a_page_counts_layers_and_heads() -> None:
    one = dict(facts_about(random_trace(n_layer=1, n_head=1)))
    assert one["size"].startswith("1 layer x 1 head, ")
    many = dict(facts_about(random_trace()))
    assert many["size"].startswith("3 layers x 4 heads")


def test_a_page_with_knockouts_does_not_suggest_knockouts() -> None:
    trace = random_trace()
    for n_verified in (0, 2, "all"):
        shown = replace(trace, header=replace(trace.header, n_verified=n_verified))
        page = to_html(shown)
        how = page[page.index('id="how"') : page.index("</details>")]
        assert ("--n-verified" in how) == (n_verified == 0)
        knockouts = dict(facts_about(shown)).get("knockouts", "")
        assert knockouts.partition(":")[0] == {
            0: "", 2: "2 sources per token, and a control for each", "all": "every position",
        }[n_verified]  # fmt: skip
