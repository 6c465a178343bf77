"""Commands on pretend devices: the CPU's tokens, no mixed devices, and few waits."""

import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import TINY, Run, error_line
from pretend_cuda import PretendCuda, PretendMps

from minigpt.checkpoint.families import model_config_from_hf
from minigpt.checkpoint.model_folder import write_model
from minigpt.config import ModelConfig
from minigpt.model.language_model import model_class
from minigpt.studies.claims import learning
from minigpt.text.tokenizer import BytesTokenizer

DEVICES = {"cuda": PretendCuda, "mps": PretendMps}
PLAIN: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "n_head": 4},
    "llama": {"n_head": 4, "n_kv_head": 2, "qk_norm": True},
    "additive": {"attention": "additive", "n_head": 4},
    "lstm": {"arch": "lstm-attention", "n_head": 1},
}
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": SHAPE | {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": GROUPED | {"attn_logit_softcapping": 2.0},
    "gemma3_text": GROUPED,
    "gpt_neox": SHAPE,
    "mistral": GROUPED,
    "olmo2": SHAPE,
    "phi3": SHAPE | {"sliding_window": 5, "partial_rotary_factor": 0.5},
    "smollm3": SHAPE | {"no_rope_layer_interval": 2},
}
TOKENS = ["--max-new-tokens", "4", "--temperature", "0.7", "--seed", "3", "--dtype", "float32"]


def config_of(kind: str) -> ModelConfig:
    if kind in FAMILIES:
        return model_config_from_hf(FAMILIES[kind] | {"model_type": kind})
    shape = {"vocab_size": 257, "context_length": 64, "n_layer": 2, "d_model": 32}
    return ModelConfig(**shape, **PLAIN[kind])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random model of each kind."""
    root = tmp_path_factory.mktemp("models")
    for kind in (*PLAIN, *FAMILIES):
        config = config_of(kind)
        model = model_class(config)(config).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2, generator=generator)
        (root / kind).mkdir()
        write_model(root / kind, model, BytesTokenizer())
    return root


def run_on(device: str, run: Run, *words: str) -> tuple[Any, PretendCuda]:
    """Run a command on a pretend device, or on the CPU; return its result and the counts."""
    with DEVICES.get(device, PretendCuda)() as seen:
        result = run(*words, "--device", device)
    assert result.code == 0, result.err
    return result, seen


def trace_of(device: str, run: Run, *words: str) -> tuple[Any, PretendCuda]:
    """Return the steps of a trace file and the counts."""
    words = ("attention-trace", "Once", *TOKENS, *words)
    _, seen = run_on(device, run, *words, "--no-compile", "--out", f"{device}.jsonl")
    lines = Path(f"{device}.jsonl").read_text().splitlines()
    Path(f"{device}.jsonl").unlink()
    return [step for step in map(json.loads, lines) if "token" in step], seen


def require_close(here: Any, there: Any) -> None:
    """Check that two JSON values are equal up to rounding."""
    assert type(here) is type(there)
    if isinstance(here, dict):
        assert here.keys() == there.keys()
        for key in here:
            if key == "weights" and isinstance(here[key], str):
                numbers = [np.frombuffer(b64decode(one[key]), "<f4") for one in (here, there)]
                np.testing.assert_allclose(*numbers, rtol=1e-3, atol=1e-5)
            else:
                require_close(here[key], there[key])
    elif isinstance(here, list):
        assert len(here) == len(there)
        for one, other in zip(here, there, strict=True):
            require_close(one, other)
    elif isinstance(here, float):
        assert here == pytest.approx(
            there, rel=1e-2, abs=2e-3
        )  # numbers in the file have few digits
    else:
        assert here == there


def require_same_text(run: Run, *words: str, n_waits: int = 4) -> None:
    """Check that pretend devices generate the CPU's text with one wait per token."""
    words = ("generate", *words, "--json", "--no-compile")
    expected, _ = run_on("cpu", run, *words)
    for device in DEVICES:
        found, seen = run_on(device, run, *words)
        for line, expected_line in zip(
            found.out.splitlines(), expected.out.splitlines(), strict=True
        ):
            assert json.loads(line)["text"] == json.loads(expected_line)["text"]
        assert sum(seen.syncs.values()) == n_waits, seen.syncs
        # cuDNN's kernel would create a new plan for each number of keys.
        assert not [call for call in seen.sdpa if re.match(r"q\(\d+, \d+, 1, ", call)]


@pytest.mark.integration
@pytest.mark.parametrize("kind", [*PLAIN, *FAMILIES])
def test_models_generate_the_text_of_the_cpu(kind: str, models: Path, run: Run) -> None:
    require_same_text(run, "--model", str(models / kind), "Once", *TOKENS)


@pytest.mark.integration
@pytest.mark.parametrize(
    "options",
    [
        "--num-samples 3",
        "--force xy",
        "--ablate 1.1",
        "--ablate 1.1 --ablate-mean",
        "--patch-from Ante --patch 1.1",
        "--logprobs 2",
        "--top-p 0.9 --min-p 0.01 --repetition-penalty 1.2",
        "--overflow slide --max-new-tokens 80 --ignore-eos",
    ],
)
def test_sampling_options_generate_the_text_of_the_cpu(
    options: str, models: Path, run: Run
) -> None:
    words = ["--model", str(models / "llama"), "Once", *TOKENS, *options.split()]
    require_same_text(run, *words, n_waits=80 if "slide" in options else 4)


def test_int8_generates_on_cuda_and_is_refused_on_mps(models: Path, run: Run) -> None:
    words = ["generate", "--model", str(models / "llama"), "Once", *TOKENS, "--no-compile"]
    run_on("cuda", run, *words, "--quantize", "int8")
    with PretendMps():
        refused = run(*words, "--quantize", "int8", "--device", "mps")
    assert refused.code == 2
    assert error_line(refused).startswith("--quantize int8 is not available on mps.")


def test_a_compiled_graph_is_refused_on_mps_by_name(models: Path, run: Run) -> None:
    with PretendMps():
        refused = run("generate", "--model", str(models / "llama"), "--compile", "--device", "mps")
    assert refused.code == 2
    assert "on cpu or cuda" in error_line(refused)
    assert error_line(refused).endswith("scaled_dot on mps. Use --no-compile.")


MEASURES = {
    "": 2,
    "--measure both": 3,
    "--measure norm": 2,
    "--measure gradient": 2,
    "--measure logit": 3,
    "--measure logit --against x": 3,
    "--measure integrated": 3,
    "--reduce max": 2,
    "--reduce rollout": 2,
    "--heads 0.1,1.2": 2,
    "--candidates 3": 2,
    "--lens": 3,
    "--ablate 1.1": 2,
    "--patch-from Ante --patch 1.1": 2,
    "--force xy": 2,
    "--n-verified all": 3,
    "--n-verified 2 --knockout value": 3,
    "--n-verified 2 --verify-heads 1.1": 3,
}
"""Trace options, and waits per token: for its id, its rows and other results."""


@pytest.mark.integration
@pytest.mark.parametrize("options", MEASURES)
def test_traces_have_the_numbers_of_the_cpu_and_few_waits(
    options: str, models: Path, run: Run
) -> None:
    words = ["--model", str(models / "llama"), *options.split()]
    expected, _ = trace_of("cpu", run, *words)
    for device in DEVICES:
        found, seen = trace_of(device, run, *words)
        require_close(found, expected)
        # One at the end, for the maximum error of the products.
        assert sum(seen.syncs.values()) == 4 * MEASURES[options] + 1, seen.syncs


@pytest.mark.integration
@pytest.mark.parametrize("kind", [*PLAIN, *FAMILIES])
def test_each_kind_of_model_is_traced_and_verified_as_on_the_cpu(
    kind: str, models: Path, run: Run
) -> None:
    words = ["--model", str(models / kind), "--n-verified", "all", "--prompt-rows"]
    expected, _ = trace_of("cpu", run, *words)
    found, _ = trace_of("cuda", run, *words)
    require_close(found, expected)


@pytest.mark.integration
@pytest.mark.parametrize(
    "options",
    [
        "--dtype float32 --set training.optimizer=adamw",
        "--dtype bfloat16",
        "--dtype float32 --set training.average=0.9 --dropout 0.1",
        "--dtype float32 --set training.context_warmup_length=16",
        "--dtype float32 --recompute --set training.micro_batch_size=1",
        "--dtype float32 --on-nan skip",
    ],
)
def test_training_resuming_and_evaluating_equal_the_cpu(
    options: str, trained: Path, run: Run
) -> None:
    losses = {}
    for where in ("cpu", *DEVICES):
        words = ["train", str(trained / "corpus.txt"), "--name", where, *TINY, *options.split()]
        run_on(where, run, *words)
        run_on(where, run, "train", "--resume", "--name", where, "--max-steps", "6")
        measured, _ = run_on(where, run, "evaluate", "--model", where, "--json")
        lines = Path("checkpoints", where, "metrics.jsonl").read_text().splitlines()
        events = map(json.loads, lines)
        losses[where] = [event["train_loss"] for event in events if "train_loss" in event]
        losses[where].append(json.loads(measured.out)["nats_per_token"])
    assert len(losses["cpu"]) == 7
    # With bfloat16, norms are computed in float32 on CUDA but not on CPUs.
    for device in DEVICES:
        rel = 1e-2 if "bfloat16" in options else 1e-4
        assert losses[device] == pytest.approx(losses["cpu"], rel=rel)


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
def test_a_dry_run_works_on_the_device(device: str, trained: Path, run: Run) -> None:
    run_on(device, run, "train", str(trained / "corpus.txt"), *TINY, "--dry-run")


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize(
    "words", [["train"], ["generate", "Once"], ["attention-trace", "Once"], ["evaluate"]]
)
def test_tf32_is_refused_without_cuda(
    words: list[str], device: str, models: Path, trained: Path, run: Run
) -> None:
    if words[0] == "train":
        words = ["train", str(trained / "corpus.txt"), *TINY]
    else:
        words = [*words, "--model", str(models / "llama")]
    with DEVICES.get(device, PretendCuda)():
        refused = run(*words, "--dtype", "tf32", "--device", device)
    assert refused.code == 2
    expected = f"--dtype tf32 needs a CUDA device: this is {device}. Use float32."
    assert error_line(refused) == expected


@pytest.mark.integration
def test_tf32_is_restored_on_resume_and_changing_it_is_reported(trained: Path, run: Run) -> None:
    words = ["train", str(trained / "corpus.txt"), "--name", "a", *TINY, "--dtype", "tf32"]
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        run_on("cuda", run, *words)
        assert torch.get_float32_matmul_precision() == "high"
        more = ["train", "--resume", "--name", "a", "--max-steps"]
        with PretendCuda():
            assert "rounds differently" not in run(*more, "5").err
            assert "rounds differently" in run(*more, "6", "--dtype", "float32").err
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def facts_of(device: str, run: Run, *words: str, stdin: bytes = b"") -> Any:
    """Return the JSON output of a command, without values that depend on time or device."""
    with DEVICES.get(device, PretendCuda)():
        result = run(*words, "--json", "--device", device, stdin=stdin)
    assert result.code == 0, result.err
    return [without_speed(json.loads(line)) for line in result.out.splitlines()]


def without_speed(value: Any) -> Any:
    if isinstance(value, list):
        return [without_speed(one) for one in value]
    if not isinstance(value, dict):
        return value
    left_out = ("device", "batch_size", "seed", "seconds", "tokens_per_s")
    return {key: without_speed(one) for key, one in value.items() if key not in left_out}


TEXT = "--max-new-tokens 0 --prompt-rows --no-compile --lens --candidates 3 --n-verified all"


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "words",
    [
        "heads --ablate",
        f"attention-trace Once {TEXT} --verify-layers 1 --roles --sink auto --measure both",
        f"attention-trace Once {TEXT} --verify-heads 0.1 --measure integrated --n-steps 3",
        "attention-trace Once --max-new-tokens 2 --patch-from Ante --patch 0,1.1 "
        "--patch-position all --no-compile --temperature 0 --measure gradient",
        "generate Once --interactive --no-compile --temperature 0 --max-new-tokens 4",
        "generate Once --interactive --chat --chat-template t.jinja --no-compile --temperature 0 "
        "--max-new-tokens 4",
        "evaluate corpus.txt --stride 5 --context-length 16 --eval-tokens 200",
    ],
)
def test_a_command_prints_the_numbers_of_the_cpu(
    words: str, device: str, models: Path, at_trained: Path, run: Run
) -> None:
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    given = [*words.split(), "--model", str(models / "llama"), "--dtype", "float32"]
    stdin = b"a b\nc\n" if "--interactive" in words else b""
    expected, found = (facts_of(one, run, *given, stdin=stdin) for one in ("cpu", device))
    assert expected
    require_close(found, expected)


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_measures_are_compared_as_on_the_cpu(
    kind: str, device: str, models: Path, run: Run
) -> None:
    words = [
        "measures",
        "Once upon a time",
        "--model",
        str(models / kind),
        *TOKENS,
        "--max-new-tokens",
        "2",
    ]
    expected, found = (facts_of(one, run, *words) for one in ("cpu", device))
    require_close(found, expected)


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_fine_tuned_with_its_tokenizer_as_on_the_cpu(
    device: str, models: Path, at_trained: Path, run: Run
) -> None:
    losses = {}
    for where in ("cpu", device):
        words = ["train", "corpus.txt", "--from", str(models / "gpt2"), "--name", where]
        words += ["--max-steps", "2", "--batch-size", "2", "--context-length", "16"]
        words += ["--set", "training.eval_tokens=64", "--set", "training.log_every=1"]
        run_on(where, run, *words, "--dtype", "float32")
        lines = Path("checkpoints", where, "metrics.jsonl").read_text().splitlines()
        events = map(json.loads, lines)
        losses[where] = [event["train_loss"] for event in events if "train_loss" in event]
    assert len(losses["cpu"]) == 2
    assert losses[device] == pytest.approx(losses["cpu"], rel=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
def test_variants_are_compared_on_the_device(device: str, at_trained: Path, run: Run) -> None:
    words = ["compare", "corpus.txt", "--variants", "additive,lstm-attention", "--seeds", "1"]
    words += ["--tokenizer", "bytes", "--budget", "steps:1", "--dtype", "float32"]
    sizes = {"model.context_length": 32, "model.n_layer": 1, "model.n_head": 2}
    sizes |= {"model.d_model": 32, "model.d_mlp": 48, "training.batch_size": 2}
    sizes |= {"training.eval_tokens": 256}
    words += [word for name, n in sizes.items() for word in ("--set", f"{name}={n}")]
    run_on(device, run, *words)


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
def test_claims_are_measured_on_the_device(
    device: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = learning.Size(
        n_steps=1,
        batch_tokens=64,
        stages=(8,),
        d_model=16,
        distances=(8,),
        n_sequences=2,
        lengths=(8,),
        step_tokens=16,
        n_repeats=1,
        timed_d_model=16,
    )
    monkeypatch.setattr(learning, "QUICK", size)
    result, _ = run_on(device, run, "claims", "--quick", "--json")
    timed = [json.loads(line)["measured"] for line in result.out.splitlines()][-1]
    assert {one["device"] for one in timed} == {"cpu", device}
