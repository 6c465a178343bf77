"""Traces through the decode graph equal traces through the eager step.

Here the graph's operations run uncompiled; tests/generation/test_compiled.py compiles them.
"""

from typing import Any

import numpy as np
import pytest
from laid_out import in_int8
from small_models import small_model

from minigpt.config import SamplingConfig
from minigpt.generation import fast
from minigpt.generation.fast import compiled
from minigpt.intervention_config import InterventionConfig
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import Trace, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.interventions import intervene
from minigpt.tracing.tracer import trace

PROMPT, OTHER = list(b"to be or"), "by me no"
ANALYSES: tuple[dict[str, Any], ...] = (
    {"measure": "both", "candidates": 3, "sink": "auto", "n_verified": 2},
    {"measure": "logit", "against": "x", "heads": "0.1,1.*", "n_verified": "all"},
    {"measure": "gradient", "n_verified": "all", "knockout": "value", "verify_heads": "1.*"},
    {"measure": "integrated", "n_steps": 5, "lens": True, "prompt_rows": True},
    {"reduce": "rollout", "explain": "0.1,1.*", "roles": True},
    {"reduce": "max", "layers": "1"},
)


@pytest.fixture(autouse=True)
def _cached_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an uncompiled graph as if a compiled one were in the cache."""
    monkeypatch.setattr(fast, "is_default", lambda model: True)
    monkeypatch.setattr(
        compiled,
        "load_step",
        lambda step, **_: lambda given: list(step(*given[:3], given[3:-2], given[-2:])),
    )


def traced(
    layout: str, kind: str, *, compiles: bool | None, changes: dict[str, Any], **config: Any
) -> Trace:
    model = small_model(layout, vocab_size=257)
    if kind == "int8":
        model = in_int8(model)
    changed: Any = model
    if changes:
        changed, _ = intervene(
            model, InterventionConfig(**changes), PROMPT, lambda t: [*t.encode()]
        )
    header, *steps, footer = trace(
        changed,
        BytesTokenizer(),
        PROMPT,
        SamplingConfig(max_new_tokens=5),
        AnalysisConfig(has_heads=True, **config),
        seed=2,
        compile=compiles,
        forced=[65],
    )
    assert isinstance(header, TraceHeader)
    assert isinstance(footer, TraceFooter)
    return Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer)


def numbers(made: Trace) -> list[np.ndarray[Any, Any]]:
    """Return all numbers of the steps and the footer."""
    found: list[Any] = []
    for step in made.steps:
        found += [[step.log_probability], [one.log_probability for one in step.candidates]]
        found += [
            [effect.change for effect in step.effects],
            [] if step.kept is None else [step.kept.change],
        ]
        found += [[] if step.changes_S is None else step.changes_S]
        found += [[] if step.lens is None else step.lens.log_probabilities]
        for row in step.rows:
            found += [row.weights_S, [row.whole or 0.0], [*row.parts.values()]]
            if row.heads is not None:
                found += [row.heads.sink, row.heads.weights]
    found += [[w.queries_TD, w.keys_TD, w.values_TD] for w in made.footer.workings]
    return [np.asarray(one, np.float64) for one in found]


@pytest.mark.integration
@pytest.mark.parametrize("config", ANALYSES, ids=str)
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("layout", ["gpt2-tied", "llama-grouped", "qwen3"])
def test_every_analysis_of_the_graph_agrees_with_the_eager_step(
    layout: str, kind: str, config: dict[str, Any]
) -> None:
    graph = traced(layout, kind, compiles=None, changes={}, **config)
    eager = traced(layout, kind, compiles=False, changes={}, **config)
    assert (graph.header.kernel == "compiled graph") > (eager.header.kernel == "compiled graph")
    assert [step.token for step in graph.steps] == [step.token for step in eager.steps]
    for one, other in zip(numbers(graph), numbers(eager), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("config", ANALYSES[:3], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"ablate": "0.*"},
        {"ablate": "1.2", "ablate_mean": True},
        {"patch_from": OTHER, "patch": "0,1.3", "patch_position": 7},
    ],
    ids=str,
)
def test_an_ablated_or_patched_model_does_not_use_the_cached_graph(
    changes: dict[str, Any], config: dict[str, Any]
) -> None:
    by_default, eager = (
        traced("llama-grouped", "float32", compiles=compiles, changes=changes, **config)
        for compiles in (None, False)
    )
    assert by_default.header.kernel != "compiled graph"
    for one, other in zip(numbers(by_default), numbers(eager), strict=True):
        np.testing.assert_array_equal(one, other)
    unchanged = traced("llama-grouped", "float32", compiles=None, changes={}, **config)
    assert unchanged.header.kernel == "compiled graph"
    assert unchanged.steps[0].log_probability != eager.steps[0].log_probability
