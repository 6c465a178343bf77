"""Tests for benchmarks/decoding.py: its report, and contenders that decode the same text."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_config, small_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from contender import Contender, Job, Turn, UnavailableError
from decoders import ENGINES
from decoding import convert, quick_contenders
from decoding_report import Bar, Measured, bandwidth_share, n_same, prefill_table, table
from random_models import weights_read

from minigpt.checkpoint.model_folder import write_model
from minigpt.model.gpt import GPT

OURS, THEIRS = Contender("minigpt", "fp32"), Contender("transformers", "fp32")
N_NEW = 9


def measured(contender: Contender, *rest_s: float) -> Measured:
    return Measured(contender, [Turn(0.5, seconds, [7] * 5, 10**6) for seconds in rest_s])


def test_speed_excludes_the_first_token_and_counts_every_row() -> None:
    sixteen = Contender("minigpt", "fp32", n_rows=16)
    assert measured(OURS, 1.0, 2.0, 9.0).tokens_per_s == 4 / 2
    assert measured(sixteen, 2.0).tokens_per_s == 16 * 4 / 2
    assert measured(sixteen, 2.0).step_ms == 2000 / 4


def test_speed_ratio_compares_runs_of_the_same_round() -> None:
    # Both medians are 4, but ours was faster in two of three rounds.
    assert measured(OURS, 1, 4, 10).times_faster(measured(THEIRS, 3, 4, 11)) == 1.1


def test_verdict_names_the_margin_or_the_missing_contender() -> None:
    bar = Bar(OURS, (THEIRS, Contender("transformers", "fp32", "loop")), 2.0)
    results = {OURS: measured(OURS, 1.0), THEIRS: measured(THEIRS, 2.2)}
    assert bar.verdict(results) == "reached: 2.20 x transformers fp32, 10% above"
    # The fastest mode of the other engine is compared.
    loop = measured(bar.theirs[1], 1.5)
    expected = "not reached: 1.50 x transformers fp32 loop, 25% below"
    assert bar.verdict(results | {loop.contender: loop}) == expected
    assert bar.verdict({OURS: results[OURS]}) == "not measured: transformers fp32"


def test_bandwidth_share_is_weight_bytes_per_second_over_the_bandwidth() -> None:
    # 4 steps in 2 s, each of which reads a million weights.
    for engine, precision, n_bytes in [
        ("minigpt", "fp32", 4e6),
        ("minigpt", "bf16", 2e6),
        ("minigpt", "int8", 1e6),
        ("llama.cpp", "int8", 34 / 32 * 1e6),
    ]:
        share = bandwidth_share(measured(Contender(engine, precision), 2.0), 10**6, 1e8)
        assert share == pytest.approx(n_bytes * 2 / 1e8)


def test_table_counts_the_tokens_that_agree_with_the_reference() -> None:
    assert n_same([1, 2, 3], [1, 2, 4]) == 2
    assert n_same([1, 2], [1, 2]) == 2
    last = table({OURS: measured(OURS, 1.0)}, 10, [7, 7, 1, 7, 7]).splitlines()[-1]
    assert last.split(" | ")[-1] == "2 |"


def test_prefill_table_shows_the_median_of_each_length() -> None:
    ours = replace(measured(OURS, 1.0), prefill_s={32: [0.5, 0.02, 0.01], 128: [0.1]})
    theirs = replace(measured(THEIRS, 1.0), prefill_s={32: [0.03]})
    assert prefill_table({OURS: ours, THEIRS: theirs}).splitlines() == [
        "|  | 32 | 128 |",
        "| --- | ---: | ---: |",
        "| minigpt fp32 | 20 | 100 |",
        "| transformers fp32 | 30 | - |",
    ]


def test_quick_mode_has_every_engine_and_precision_but_nothing_compiled() -> None:
    found = quick_contenders(["fp32", "bf16", "int8"])
    assert not any(contender.is_compiled for contender in found)
    assert {(one.engine, one.precision) for one in found} >= {
        (engine, precision)
        for engine in ("minigpt", "llama.cpp", "CTranslate2", "ONNX")
        for precision in ("fp32", "bf16", "int8")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_read_per_token_exclude_embedding_lookups(layout: str) -> None:
    model = GPT(small_config(layout))
    looked_up = ["positions.weight"]
    if not model.config.tie_embeddings:
        looked_up.append("embedding.weight")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert weights_read(model.config) == sum(sizes[n] for n in sizes if n not in looked_up)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_model(tmp_path, small_model("qwen3"), None)
    prompt = random_tokens(5).tolist()
    return Job(str(tmp_path), prompt, N_NEW, threads=1, device="cpu", gpt_fast="")


@pytest.mark.integration
@pytest.mark.parametrize(
    "contender",
    [
        OURS,
        Contender("minigpt", "fp32", "trace"),
        Contender("minigpt", "fp32", n_rows=3),
        THEIRS,
        Contender("transformers", "fp32", "loop", n_rows=2),
    ],
    ids=lambda contender: contender.name,
)
def test_each_contender_decodes_the_greedy_tokens(contender: Contender, job: Job) -> None:
    model, tokens = small_model("qwen3"), list(job.prompt)
    with torch.inference_mode():
        for _ in range(N_NEW):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    calls: list[Any] = []
    decode = ENGINES[contender.engine](contender, job)
    assert decode(job, lambda: calls.append(None)) == tokens[len(job.prompt) :]
    assert len(calls) == 1, "the first token must be reported once"
    shorter = replace(job, prompt=job.prompt[:2], n_new=1)
    with torch.inference_mode():
        [after_two] = model(torch.tensor([shorter.prompt]))[:, -1].argmax(-1).tolist()
    assert decode(shorter, lambda: None) == [after_two]


@pytest.mark.parametrize(
    ("engine", "module"), [("CTranslate2", "ctranslate2"), ("ONNX", "onnxruntime_genai")]
)
def test_a_converted_model_decodes_the_same_tokens(engine: str, module: str, job: Job) -> None:
    pytest.importorskip(module, reason=f"needs {engine}, a contender of the benchmark")
    contender = Contender(engine, "fp32")
    # A kernel of ONNX Runtime requires head sizes that are multiples of 8.
    write_model(Path(job.folder), small_model("qwen3", d_head=16), None)
    assert convert(contender, job.folder, sys.executable) == ""
    expected = ENGINES["minigpt"](OURS, job)(job, lambda: None)
    assert ENGINES[engine](contender, job)(job, lambda: None) == expected


def test_a_failed_conversion_returns_the_error_of_the_converter(tmp_path: Path) -> None:
    python = tmp_path / "python"
    lines = ["Traceback (most recent call last):", "ValueError: no such layout", "note: more"]
    python.write_text("\n".join(["#!/bin/sh", *[f"echo '{line}' >&2" for line in lines], "exit 1"]))
    python.chmod(0o700)
    why = convert(Contender("ONNX", "fp32"), str(tmp_path), str(python))
    assert why == "ValueError: no such layout"


def test_contender_with_a_missing_dependency_names_it(job: Job) -> None:
    with pytest.raises(UnavailableError, match="--gpt-fast DIR"):
        ENGINES["gpt-fast"](Contender("gpt-fast", "fp32", is_compiled=True), job)
