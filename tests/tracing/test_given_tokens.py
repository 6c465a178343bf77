"""Rows of prompt tokens and forced tokens, and candidates for each token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, small_model
from small_traces import small_trace

import minigpt
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.file import to_json_line
from minigpt.tracing.findings import Trace, TraceStep
from minigpt.tracing.recorder import RowRecorder

TOKENIZER = BytesTokenizer()
PROMPT = "to be or not"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"measure": "both", "has_heads": True, "candidates": 3},
    {"reduce": "rollout", "sink": "auto"},
    {"n_verified": 2, "roles": True},
]


def model_of(layout: str) -> GPT:
    return small_model(layout, vocab_size=257)


def traced(model: GPT, prompt: str = PROMPT, **options: Any) -> Trace:
    trace = minigpt.trace(model, prompt, tokenizer=TOKENIZER, seed=4, **options)
    assert isinstance(trace, Trace)
    return trace


def facts(step: TraceStep) -> tuple[Any, ...]:
    """Return the parts of a step that do not depend on the length of the prompt."""
    row = step.row
    return step.token, step.log_probability, row.weights_S.tolist(), row.sources, step.candidates


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_the_prompt_equal_those_of_a_full_forward(layout: str) -> None:
    model = model_of(layout)
    trace = traced(model, max_new_tokens=0)
    tokens = torch.tensor([list(PROMPT.encode())])
    log_p = model(tokens).log_softmax(dim=-1)[0]
    assert [step.token.position for step in trace.steps] == list(range(1, len(PROMPT)))
    for step in trace.steps:
        position = step.token.position
        recorder = RowRecorder(model)
        model(tokens[:, :position], recorder=recorder)
        mean_S = recorder.weights_LHS.mean(dim=(0, 1))
        assert step.row.weights_S == pytest.approx(mean_S.numpy(), abs=1e-5)
        expected = log_p[position - 1, tokens[0, position]].item()
        assert step.log_probability == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_of_the_prompt_equal_those_of_forced_generation(
    options: dict[str, Any],
) -> None:
    model = model_of("llama-grouped")
    options = options | {"sink": 0}  # auto may find another sink in another prompt
    rows = traced(model, max_new_tokens=0, **options).steps
    forced = traced(model, PROMPT[0], force=PROMPT[1:], max_new_tokens=len(PROMPT) - 1, **options)
    assert [facts(step) for step in rows] == [facts(step) for step in forced.steps]
    assert all(step.is_given for step in (*rows, *forced.steps))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_showing_rows_of_the_prompt_changes_nothing_after_it(
    layout: str, options: dict[str, Any]
) -> None:
    model = model_of(layout)
    plain = traced(model, max_new_tokens=6, temperature=1.2, **options)
    more = traced(model, max_new_tokens=6, temperature=1.2, prompt_rows=True, **options)
    assert [facts(step) for step in more.steps[len(PROMPT) - 1 :]] == list(map(facts, plain.steps))
    assert [step.index for step in more.steps] == list(range(len(PROMPT) + 5))
    assert more.tokens == plain.tokens
    assert more.text == plain.text
    assert more.footer.n_tokens == 6


def test_a_prompt_of_one_token_has_no_rows() -> None:
    for options in ({"prompt_rows": True}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match="the prompt has one token"):
            traced(model_of("llama"), "a", **options)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.3, "repetition_penalty": 1.3}], ids=str
)
def test_forcing_the_sampled_tokens_changes_nothing(options: dict[str, Any]) -> None:
    model = model_of("qwen3")
    free = list(Decoder(model, [1, 2]).generate(SamplingConfig(**options), seed=3))
    for n in (1, 4, len(free)):
        forced = [step.token for step in free[:n]]
        steps = list(
            Decoder(model, [1, 2]).generate(SamplingConfig(**options), seed=3, forced=forced)
        )
        assert [(s.token, s.log_probability) for s in steps] == [
            (s.token, s.log_probability) for s in free
        ]
        assert [step.is_forced for step in steps] == [i < n for i in range(len(free))]


def test_forced_text_comes_first_in_every_sample_and_counts_as_generated() -> None:
    model = model_of("llama")
    items = list(
        minigpt.generate(
            model, "to", tokenizer=TOKENIZER, force=" be", max_new_tokens=5, num_samples=2, seed=1
        )
    )
    for sample in range(2):
        steps = [item.step for item in items if item.sample == sample]
        assert bytes(step.token for step in steps[:3]) == b" be"
        assert len(steps) == 5


def test_forced_stop_strings_and_ends_of_text_end_a_text_like_sampled_ones() -> None:
    model = model_of("llama")
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "max_new_tokens": 9}
    stopped = list(minigpt.generate(model, "to", force=" be or", stop=("be",), **options))
    assert "".join(item.text for item in stopped) == " "
    assert stopped[-1].step.finish == "stop"
    ended = list(minigpt.generate(model, "to", force=" <|endoftext|>x", special=True, **options))
    assert [ended[-1].step.finish, len(ended)] == ["end_of_text", 2]


def test_forced_text_that_does_not_fit_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(ConfigError, match=r"has 5 tokens.*Use --max-new-tokens 5"):
        traced(model, "to", force=" be o", max_new_tokens=4)
    with pytest.raises(ConfigError, match="have 26 tokens, but the model sees 24"):
        traced(model, "to", force="x" * 24)
    assert traced(model, "to", force="x" * 23).footer.finish == "context"
    with pytest.raises(ConfigError, match="force must not be the empty string"):
        traced(model, "to", force="")


class Letters(BytesTokenizer):
    """A vocabulary without accents."""

    def unencodable(self, text: str) -> set[str]:
        """Return the characters that are not ASCII."""
        return {character for character in text if not character.isascii()}


@pytest.mark.parametrize("option", ["force", "against"])
def test_texts_missing_in_the_vocabulary_are_refused_with_their_option(option: str) -> None:
    with pytest.raises(ConfigError, match=f"no token for 'ü' in the text of --{option}, 'grün'"):
        minigpt.trace(
            model_of("llama"), "to", tokenizer=Letters(), measure="logit", **{option: "grün"}
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_candidates_are_the_most_probable_tokens_before_sampling_options(layout: str) -> None:
    model = model_of(layout)
    sampling = {"temperature": 3.0, "top_k": 2, "repetition_penalty": 1.5}
    trace = traced(model, candidates=4, prompt_rows=True, max_new_tokens=5, **sampling)
    tokens = torch.tensor([[token.id for token in trace.tokens[:-1]]])
    best = model(tokens).log_softmax(dim=-1)[0].topk(4)
    for step in trace.steps:
        at = step.token.position - 1
        assert [one.id for one in step.candidates] == best.indices[at].tolist()
        found = [one.log_probability for one in step.candidates]
        assert found == pytest.approx(best.values[at].tolist(), abs=1e-4)
        assert [one.data for one in step.candidates] == [
            TOKENIZER.token_bytes(one.id) for one in step.candidates
        ]


def test_asking_for_more_candidates_than_tokens_gives_all_tokens() -> None:
    (step,) = traced(model_of("llama"), candidates=10**6, max_new_tokens=1).steps
    assert len(step.candidates) == 257


def test_given_tokens_and_candidates_survive_the_trace_file(tmp_path: Path) -> None:
    trace = small_trace(candidates=2, prompt_rows=True, n_verified=1, has_heads=True)
    path = tmp_path / "trace.jsonl"
    lines = [to_json_line(event) for event in (trace.header, *trace.steps, trace.footer)]
    path.write_text("\n".join(lines) + "\n")
    [read] = read_traces(path)
    assert [to_json_line(e) for e in (read.header, *read.steps, read.footer)] == lines
    assert read.tokens == trace.tokens


def test_a_trace_file_without_candidates_is_read(tmp_path: Path) -> None:
    trace = small_trace()
    path = tmp_path / "trace.jsonl"
    lines = [json.loads(to_json_line(e)) for e in (trace.header, *trace.steps, trace.footer)]
    for line in lines:
        line.pop("candidates", None)
        line.pop("given", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [read] = read_traces(path)
    assert [step.candidates for step in read.steps] == [()] * len(trace.steps)
