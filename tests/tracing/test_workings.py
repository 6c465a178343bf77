"""Recorded queries, keys and values of explained heads give the model's weights and outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SOFTCAP, any_model, small_model
from small_traces import small_trace

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.analysis.workings import explained_heads
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.file import to_json_line
from minigpt.tracing.findings import TraceFooter
from minigpt.tracing.tracer import trace


@pytest.mark.parametrize("layout", ["gpt2", "llama-grouped"])
def test_weights_recomputed_from_queries_and_keys_are_those_of_the_trace(layout: str) -> None:
    dense: list[torch.Tensor] = []
    events = trace(
        small_model(layout, vocab_size=257, context_length=32),
        BytesTokenizer(),
        list(b"to be or not"),
        SamplingConfig(max_new_tokens=9, seed=2),
        AnalysisConfig(explain="0.1,1.*"),
        seed=2,
        dense=lambda weights_LHS: dense.append(weights_LHS.clone()),
    )
    footer = list(events)[-1]
    assert isinstance(footer, TraceFooter)
    assert [(one.layer, one.head) for one in footer.workings] == [(0, 1)] + [
        (1, head) for head in range(dense[0].shape[1])
    ]
    for working in footer.workings:
        assert len(working.keys_TD) == 12 + 9
        for step, weights_LHS in enumerate(dense):
            query = 11 + step
            expected = weights_LHS[working.layer, working.head]
            scores = [
                float(np.dot(working.queries_TD[query], key)) * working.scale
                for key in working.keys_TD[: query + 1]
            ]
            powers = np.exp(np.array(scores) - max(scores))
            # A fused kernel computed the keys of the prompt with sums in another order.
            np.testing.assert_allclose(powers / powers.sum(), expected, atol=1e-5)


@pytest.mark.parametrize("prompt", ["to be or not", "to be or not to be, ok?!"])
def test_explained_heads_survive_the_trace_file(tmp_path: Path, prompt: str) -> None:
    """Includes a full context, in which the model never reads the last token."""
    made = small_trace(prompt, explain="1.2", has_heads=True, context_length=24)
    n_read = min(24, len(made.tokens))
    assert made.footer.workings[0].keys_TD.shape == (n_read, made.header.d_head)
    path = tmp_path / "t.jsonl"
    events = (made.header, *made.steps, made.footer)
    path.write_text("".join(to_json_line(event) + "\n" for event in events))
    (read,) = read_traces(path)
    (one,), (other,) = made.footer.workings, read.footer.workings
    assert (one.layer, one.head, one.scale, one.window) == (1, 2, other.scale, other.window)
    np.testing.assert_array_equal(one.queries_TD, other.queries_TD)
    np.testing.assert_array_equal(one.values_TD, other.values_TD)
    # Files of older versions have no explained heads.
    lines = path.read_text().splitlines()
    footer = json.loads(lines[-1])
    workings = footer.pop("workings")
    path.write_text("\n".join([*lines[:-1], json.dumps(footer), ""]))
    assert read_traces(path)[0].footer.workings == ()
    for damage in ({"layer": 2}, {"keys": workings[0]["keys"][:-8]}, {"scale": None}):
        bad = footer | {"workings": [workings[0] | damage]}
        path.write_text("\n".join([*lines[:-1], json.dumps(bad), ""]))
        with pytest.raises(DataError, match="is not valid in a trace"):
            read_traces(path)


@pytest.mark.parametrize(
    ("heads", "message"), [("2.0", "--explain 2.0 .* layers 0 to 1"), ("x", "layer.head")]
)
def test_explaining_a_nonexistent_head_is_refused(heads: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_trace(explain=heads)


def test_explaining_a_softcapped_score_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="this model's is SoftcappedScore"):
        explained_heads(any_model(SOFTCAP, attn_logit_softcapping=5.0), "0.0")
