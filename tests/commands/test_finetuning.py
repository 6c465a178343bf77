"""minigpt train --from: base models, written folders, and refusals."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import TINY, Run, error_line, evaluations
from safetensors.torch import load_file

from minigpt.checkpoint.model_folder import read_model
from minigpt.checkpoint.tools import hub
from minigpt.commands.train.finetune import read_base
from minigpt.settings import read_toml

TEXT = "The king said: once upon a time there was a book of 12 tales, déjà vu.\n" * 60
SHORT = ["--max-steps", "6", "--context-length", "32", "--batch-size", "2", "--save-every", "3"]
CONTEXT = 48
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "dtype": torch.bfloat16,
    },
}
SPECIALS = {"gpt2": ["<|endoftext|>"], "llama": ["<|begin|>", "<|end|>"], "bare": []}
SEPARATORS = {"gpt2": [0], "llama": [1, 0], "bare": []}


@pytest.fixture(scope="session")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by its imports
        module = pytest.importorskip(
            "transformers", reason="needs transformers to save base models"
        )
    module.logging.set_verbosity_error()
    return module


def trained_tokenizer(kind: str) -> Any:
    """Train a byte-level BPE; the Llama one has tokens that begin and end a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS[kind],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if kind == "llama":
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return tokenizer


@pytest.fixture(scope="session")
def folders(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a read-only folder of models saved by transformers: gpt2, llama and bare.

    They have more embeddings than tokens, and no weight is 0 or 1. bare is a gpt2 without special
    tokens.
    """
    root = tmp_path_factory.mktemp("published")
    for kind, ids in {"gpt2": (0, 0), "llama": (0, 1), "bare": (None, None)}.items():
        config = transformers.AutoConfig.for_model(
            **KINDS.get(kind, KINDS["gpt2"]),
            vocab_size=320,
            bos_token_id=ids[0],
            eos_token_id=ids[1],
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1, generator=generator)
        model.save_pretrained(root / kind)
        tokenizer = trained_tokenizer(kind)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(
            root / kind
        )
    return root


@pytest.fixture
def at_text(folders: Path, workplace: Path) -> Path:
    """Return a working directory with text.txt and copies of the saved models."""
    (workplace / "text.txt").write_text(TEXT)
    shutil.copytree(folders, workplace, dirs_exist_ok=True)
    return workplace


@torch.no_grad()
def loss_by_transformers(transformers: Any, folder: Path, separator: list[int]) -> float:
    """Return the nats per token over the last tenth of the text, in windows of 32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(separator + tokenizer(TEXT, add_special_tokens=False).input_ids)
    ids = ids[int(len(ids) * 0.9) :]
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        logits = model(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return nats / (len(ids) - 1)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bare"])
def test_fine_tuning_reads_and_writes_transformers_folders(
    run: Run, at_text: Path, transformers: Any, kind: str
) -> None:
    words = ["--max-steps", "40", "--lr", "0.01", "--sample-every", "40", "--dtype", "float32"]
    result = run("train", "text.txt", "--from", kind, "--name", "a", *SHORT, *words)
    assert (result.code, result.out) == (0, "")
    assert f"\nfrom   {kind}\n" in f"\n{result.err}"
    (first, before), *_, (last, after) = evaluations("a")
    assert (first, last) == (0, 40)
    assert f"step      0  val loss {before:.4f} nats/token" in result.err
    step = Path("checkpoints/a/step-000040")
    # The same tokens and windows, with sums in another order.
    expected = loss_by_transformers(transformers, at_text / kind, SEPARATORS[kind])
    assert before == pytest.approx(expected, abs=1e-4)
    expected = loss_by_transformers(transformers, step, SEPARATORS[kind])
    # The loss is that of float32 weights, but the Llama model is saved in bfloat16.
    assert after == pytest.approx(expected, abs=1e-2 if kind == "llama" else 1e-4)
    assert after < before - 1

    source, written = (
        transformers.AutoConfig.from_pretrained(folder) for folder in (at_text / kind, step)
    )
    for name in ("model_type", "max_position_embeddings", "vocab_size", "tie_word_embeddings"):
        assert getattr(written, name) == getattr(source, name), name
    loaded = read_model(step, dtype=torch.float32)
    assert loaded.tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(step)
    text = "A tale of déjà vu: 漢字 \n\n 12 kings"
    ids = theirs(text).input_ids
    assert loaded.tokenizer.encode_prompt(text) == ids
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32)
        logits = model.eval()(torch.tensor([ids]))
        torch.testing.assert_close(
            loaded.model(torch.tensor([ids])), logits.logits, rtol=1e-4, atol=1e-4
        )
    for proposed in result.err.splitlines()[-2:]:
        assert "--model a" in proposed
        assert proposed.endswith("'The king said: once'")
    assert run("generate", "--model", "a", "--max-new-tokens", "3", "Once").code == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bare"])
def test_a_learning_rate_near_zero_keeps_every_byte_of_the_weights(
    run: Run, at_text: Path, kind: str
) -> None:
    words = ["--max-steps", "1", "--lr", "1e-38"]
    assert run("train", "text.txt", "--from", kind, "--name", "a", *SHORT, *words).code == 0
    before = load_file(at_text / kind / "model.safetensors")
    after = load_file("checkpoints/a/step-000001/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def make_instruct_folder(folder: Path) -> dict[str, bytes]:
    """Add the files of an instruct model; return all but weights and config.json."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "eos_token": "<|end|>",
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "lstrip": False},
        "pad_token": "<|end|>",
        "model_max_length": 1234,
        "chat_template": "{{ messages }}",
        "padding_side": "left",
        "my_own_field": [1, {"a": None}],
    }
    path.write_text(json.dumps(settings, indent=1))
    texts = {
        "generation_config.json": '{"temperature": 0.6, "top_p": 0.9, "do_sample": true,'
        ' "eos_token_id": [1, 5], "pad_token_id": 1, "transformers_version": "4.41.0"}',
        "special_tokens_map.json": '{"eos_token": "<|end|>", "x": 1}',
        "added_tokens.json": '{"<|end|>": 1}',
        "chat_template.jinja": "{% for m in messages %}é{{ m.content }}{% endfor %}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "vocab.json": "{}",
        "merges.txt": "#version: 0.2\n",
        "tokenizer.model": "\x00sentencepiece",
        "tokenizer.model.v3": "\x00another",
        "modeling_odd.py": "class Odd: ...",
        "LICENSE.txt": "Somebody's licence",
        "NOTICE": "a notice",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Odd"], "pad_token_id": 1, "license": "x", "_mine": [2]}
    (folder / "config.json").write_text(json.dumps(config))
    others = {"config.json", "model.safetensors"}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name not in others
    }


@pytest.mark.integration
def test_fine_tuned_and_averaged_models_keep_all_files_and_fields_of_the_base(
    run: Run, at_text: Path
) -> None:
    files = make_instruct_folder(at_text / "llama")
    config = json.loads((at_text / "llama/config.json").read_text())
    result = run("train", "text.txt", "--from", "llama", "--name", "a", *SHORT)
    assert result.code == 0, result.err
    assert "saved  weights in bfloat16 (as in the base" in result.err
    shutil.rmtree("checkpoints/a/step-000006")
    shutil.rmtree("llama")
    assert run("train", "--resume", "--name", "a", "--max-steps", "9").code == 0
    assert run("checkpoints", "average", "a", "--last", "2").code == 0
    for folder in (Path("checkpoints/a/step-000009"), Path("checkpoints/a-mean")):
        assert json.loads((folder / "config.json").read_text()) == config
        for name, data in files.items():
            assert (folder / name).read_bytes() == data, name
        tensors = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert run("checkpoints", "verify", "a").code == 0
    assert run("checkpoints", "verify", "a-mean").code == 0


@pytest.mark.integration
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_save_dtype_sets_the_dtype_of_weights_and_config_json(
    run: Run, at_text: Path, dtype: str
) -> None:
    words = ["--name", "a", *SHORT, "--save-dtype", dtype]
    result = run("train", "text.txt", "--from", "llama", *words)
    assert result.code == 0, result.err
    assert f"saved  weights in {dtype} (--save-dtype)" in result.err
    folder = Path("checkpoints/a/step-000006")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    for tensor in load_file(folder / "model.safetensors").values():
        assert tensor.dtype == getattr(torch, dtype)
    exact = read_model(folder, is_exact=True).model.state_dict()
    for name, tensor in read_model(folder).model.state_dict().items():
        assert exact[name].dtype == torch.float32
        assert torch.equal(exact[name].to(tensor.dtype), tensor)
    words = ["--last", "2", "--save-dtype", "float32"]
    assert run("checkpoints", "average", "a", *words).code == 0
    mean = load_file("checkpoints/a-mean/model.safetensors")
    parts = [load_file(f"checkpoints/a/step-00000{i}/model.safetensors") for i in (3, 6)]
    exact_parts = [
        read_model(Path(f"checkpoints/a/step-00000{i}"), is_exact=True).model for i in (3, 6)
    ]
    assert mean.keys() == parts[0].keys()
    weights = [part.state_dict()["embedding.weight"] for part in exact_parts]
    torch.testing.assert_close(mean["model.embed_tokens.weight"], (weights[0] + weights[1]) / 2)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_killed_fine_tuning_run_resumes_with_the_same_bytes_without_its_base_model(
    run: Run, at_text: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    assert run("train", "text.txt", "--from", kind, "--name", "a", *SHORT).code == 0
    last = Path("checkpoints/a/step-000006")
    before = {path: path.read_bytes() for path in last.rglob("*.safetensors")}
    assert len(before) == (
        3 if kind == "llama" else 2
    )  # saved in bfloat16, plus the float32 master weights
    shutil.rmtree(last)  # as if killed before saving it
    shutil.rmtree(kind)
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(at_text / "empty"))
    result = run("train", "--resume", "--name", "a")
    assert result.code == 0, result.err
    assert "from step 3 on" in result.err
    assert before == {path: path.read_bytes() for path in last.rglob("*.safetensors")}
    assert [step for step, _ in evaluations("a")] == [0, 3, 6]


@pytest.mark.integration
def test_a_fine_tuning_run_can_be_repeated_from_its_own_config(run: Run, at_text: Path) -> None:
    words = ["--set", "model.dropout=0.2"]
    assert run("train", "text.txt", "--from", "gpt2", "--name", "a", *SHORT, *words).code == 0
    assert run("train", "--config", "checkpoints/a/config.toml", "--name", "b").code == 0
    weights = [Path("checkpoints", name, "step-000006/model.safetensors") for name in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    words = ["--context-length", "16", "--config", "checkpoints/a/config.toml"]
    assert run("train", *words, "--name", "c").code == 0
    assert read_toml(Path("checkpoints/c/config.toml"))["training"]["sequence_length"] == 16


@pytest.mark.integration
def test_user_settings_win_over_the_fine_tuning_defaults(run: Run, at_text: Path) -> None:
    words = ["--lr", "0.25", "--set", "training.schedule=linear", "--set", "model.dropout=0.25"]
    assert run("train", "text.txt", "--from", "llama", "--name", "a", *SHORT, *words).code == 0
    config = read_toml(Path("checkpoints/a/config.toml"))
    training = config["training"]
    assert (training["lr"], training["embedding_lr"]) == (0.25, 0.25)
    assert (training["schedule"], training["sequence_length"]) == ("linear", 32)
    assert (config["model"]["context_length"], config["model"]["dropout"]) == (CONTEXT, 0.25)
    words = ["--lr", "0.125", "--set", "training.embedding_lr=0.5", "--max-steps", "7"]
    assert run("train", "--resume", "--name", "a", *words).code == 0
    training = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (training["lr"], training["embedding_lr"]) == (0.125, 0.5)


def test_a_hub_model_is_recorded_with_its_commit(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(folders / "gpt2", tmp_path / "snapshots/0a1b2c")
    monkeypatch.setattr(hub, "download_model", lambda spec: snapshot)
    for spec in ("org/some-model", "org/some-model@main"):
        base = read_base(spec)
        assert (base.source, base.name) == ("org/some-model@0a1b2c", "some-model")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--from nowhere", 4, ["'nowhere'"]),
        ("--from no-words", 4, ["'no-words'", "tokenizer.json", "trained on text"]),
        ("--from damaged", 4, ["'damaged/model.safetensors'", "not a complete safetensors file"]),
        ("--from gpt2 --context-length 64", 2, ["--context-length", "64", "sees 48 tokens"]),
        ("--from gpt2 --resume", 2, ["--from", "--resume"]),
        ("--from gpt2 --tokenizer bytes", 2, ["--tokenizer", "'gpt2'", "'bytes'"]),
        ("--from gpt2 --n-layer 3", 2, ["--n-layer is 2 there, not 3"]),
        ("--from gpt2 --family llama", 2, ["--family is 'gpt2' there, not 'llama'"]),
        ("--from gpt2 --preset nano", 2, ["preset", "'nano'"]),
        ("--from gpt2 --set model.context_length=32", 2, ["model.context_length is 48 there"]),
        ("--from gpt2 --set model.n_layr=2", 2, ["model.n_layr", "Did you mean n_layer?"]),
        ("--from gpt2 --set model.dropout=2", 2, ["dropout must be in [0, 1): it is 2.0"]),
        ("--from gpt2 --set training=2", 2, ["training must be a table"]),
        ("--set from=3", 2, ["from must name a model: it is of type int"]),
        ("--from gpt2 --name a/b", 2, ["'a/b'"]),
        ("--from gpt2 few.txt", 3, ["too little text", "Give more text"]),
    ],
)
def test_an_unusable_base_model_is_refused_in_one_line(
    run: Run, at_text: Path, words: str, code: int, said: list[str]
) -> None:
    shutil.copytree("gpt2", "no-words", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree("gpt2", "damaged")
    weights = Path("damaged/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    Path("few.txt").write_text("Few words.")
    data = [] if "few.txt" in words else ["text.txt"]
    result = run("train", *data, *words.split())
    line = error_line(result)
    assert result.code == code
    assert all(part in line for part in said), line
    assert not list(Path().glob("checkpoints/*/step-*"))


@pytest.mark.integration
def test_model_settings_equal_to_those_of_the_base_are_accepted(run: Run, at_text: Path) -> None:
    words = ["--n-layer", "2", "--tokenizer", "gpt2", "--family", "gpt2"]
    assert run("train", "text.txt", "--from", "gpt2", *SHORT, *words).code == 0


@pytest.mark.integration
def test_resumed_fine_tuning_keeps_its_model_and_sequence_length(run: Run, at_text: Path) -> None:
    assert run("train", "text.txt", "--from", "gpt2", "--name", "a", *SHORT).code == 0
    for words, said in {
        "--set from=llama": ["from", "'gpt2'", "'llama'"],
        "--set training.sequence_length=16": ["training.sequence_length", "32", "16"],
        "--tokenizer bytes": ["cannot change --tokenizer"],
    }.items():
        result = run("train", "--resume", "--name", "a", *words.split())
        line = error_line(result)
        assert result.code == 2
        assert all(part in line for part in said), line


def test_training_from_scratch_is_not_evaluated_before_its_first_step(
    run: Run, at_text: Path
) -> None:
    assert run("train", "text.txt", "--name", "a", *TINY).code == 0
    assert [step for step, _ in evaluations("a")] == [4]
    assert "from" not in read_toml(Path("checkpoints/a/config.toml"))
