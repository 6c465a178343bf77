"""The logit lens: predictions after each layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, LAYOUTS, SOFTCAP, any_model, small_model
from small_traces import HOSTILE, cells, small_trace, with_tokens

import minigpt
from minigpt.errors import ConfigError
from minigpt.model.gpt import GPT
from minigpt.text.escape import token_name
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.lines import lens_lines
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.file import to_json_line
from minigpt.tracing.findings import Trace
from minigpt.tracing.lines import make_layout
from minigpt.tracing.spans import cell_len
from minigpt.tracing.views import ViewOptions, lens

TOKENIZER = BytesTokenizer()


def traced(model: GPT, **options: Any) -> Trace:
    trace = minigpt.trace(
        model, "to be or", tokenizer=TOKENIZER, seed=4, max_new_tokens=6, **options
    )
    assert isinstance(trace, Trace)
    return trace


@torch.no_grad()
def plain_lens(model: GPT, tokens: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """Return log-probabilities (L, T, V) after each layer, by hooks on a full forward."""
    states: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, output: states.append(output))
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    weight = model.embedding.weight if model.unembedding is None else model.unembedding.weight
    assert isinstance(weight, torch.Tensor)
    logits_LTV = torch.stack([(model.final_norm(x) @ weight.T)[0] for x in states])
    return (logits_LTV if cap is None else cap * (logits_LTV / cap).tanh()).log_softmax(-1)


@pytest.mark.parametrize("layout", [*LAYOUTS, *FAMILIES, SOFTCAP])
def test_the_logit_lens_equals_a_plain_loop_over_layers(layout: str) -> None:
    n_layer = {"n_layer" if layout in LAYOUTS else "num_hidden_layers": 3}
    model = any_model(layout, vocab_size=257, **n_layer)
    trace = traced(model, lens=True, prompt_rows=True, temperature=1.0)
    tokens = torch.tensor([[token.id for token in trace.tokens[:-1]]])
    expected = plain_lens(model, tokens, cap=3.0 if layout == SOFTCAP else None)
    for step in trace.steps:
        assert step.lens is not None
        at = step.token.position - 1
        assert step.lens.log_probabilities == pytest.approx(
            expected[:, at, step.token.id].tolist(), abs=1e-3
        )
        assert step.lens.log_probabilities[-1] == pytest.approx(step.log_probability, abs=1e-4)
        best = expected[:, at].topk(3)
        for layer, top in enumerate(step.lens.top):
            assert [one.id for one in top] == best.indices[layer].tolist()
        is_first = [top[0].id == step.token.id for top in step.lens.top]
        from_layer = next((i for i in range(3) if all(is_first[i:])), None)
        assert step.lens.layer == from_layer


def test_the_logit_lens_changes_no_token_and_no_probability() -> None:
    model = small_model("qwen3", vocab_size=257)
    plain, watched = traced(model), traced(model, lens=True)
    assert [(s.token, s.log_probability) for s in plain.steps] == [
        (s.token, s.log_probability) for s in watched.steps
    ]


def test_the_logit_lens_survives_the_trace_file(tmp_path: Path) -> None:
    trace = small_trace(lens=True, prompt_rows=True)
    path = tmp_path / "trace.jsonl"
    lines = [to_json_line(event) for event in (trace.header, *trace.steps, trace.footer)]
    path.write_text("\n".join(lines) + "\n")
    [read] = read_traces(path)
    assert [to_json_line(e) for e in (read.header, *read.steps, read.footer)] == lines
    for width in (40, 80, 200):
        shown = lens.show(read, ViewOptions(width=width))
        assert shown == lens.show(trace, ViewOptions(width=width))
        assert all(sum(len(text) for text, _ in line) <= width for line in shown)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_columns_of_the_logit_lens_are_aligned_after_any_token(width: int) -> None:
    trace = with_tokens(small_trace(lens=True, prompt_rows=True), HOSTILE)
    starts = set()
    for line in lens.show(trace, ViewOptions(width=width)):
        if not line:
            break
        starts.add(cells(line[0][0]))
        assert sum(cells(text) for text, _ in line) <= width
    assert len(starts) == 1


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_layer_of_the_first_choice_is_named_at_every_width(width: int) -> None:
    shown = small_trace(lens=True)
    layout = make_layout(width, measures=("weight",), vocab_size=50_000, n_positions=99)
    for step in shown.steps:
        assert step.lens is not None
        lines = lens_lines(step.lens, layout)
        assert all(sum(cell_len(text) for text, _ in line) <= width for line in lines)
        words = " ".join("".join(text for text, _ in line).strip() for line in lines)
        expected = f"first choice from layer {step.lens.layer} on"
        if step.lens.layer is None:
            name = token_name(step.lens.top[-1][0].data)
            expected = f"not the first choice, which is {name} ("
        assert expected in words


def test_showing_a_missing_lens_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"Trace again with --lens"):
        lens.show(small_trace())
