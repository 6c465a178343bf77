"""minigpt evaluate, compared with the loss of a run, a plain loop, and the bytes of the text."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import TINY, Run, error_line
from small_models import small_model
from test_streams import Screen

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.commands.display import progress
from minigpt.commands.train import explanations
from minigpt.model.device import resolve_dtype
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokenizer import BytesTokenizer

pytestmark = pytest.mark.usefixtures("in_trained")

TEXT = "The king said: né, once upon a time.\n" * 12


AS_TRAINED = ["--dtype", str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")]
"""The dtype of validation during training; by default, evaluate uses float32."""


def evaluated(run: Run, *words: str, stdin: bytes = b"") -> dict[str, Any]:
    result = run("evaluate", *words, "--json", stdin=stdin)
    assert result.code == 0
    assert re.match(r"model \S+\n", result.err)
    assert result.out.count("\n") == 1
    facts: dict[str, Any] = json.loads(result.out)
    return facts


def test_evaluate_reproduces_the_validation_loss_of_a_run(run: Run) -> None:
    best = RunFolder(Path("checkpoints/tiny")).best()
    assert best is not None
    words = ["corpus.txt", "--model", "tiny", "--val-fraction", "0.1", *AS_TRAINED]
    facts = evaluated(run, *words, "--eval-tokens", "256")  # the setting in TINY
    assert facts["nats_per_token"] == pytest.approx(best.facts["val_loss"], rel=1e-6)
    assert facts["bits_per_byte"] == pytest.approx(best.facts["bits_per_byte"], rel=1e-6)
    assert facts["model"] == str(best.folder)
    assert (facts["val_fraction"], facts["n_tokens"]) == (0.1, 256)
    assert (
        evaluated(run, *words)["n_tokens"] == 298 - 1
    )  # the last tenth of 2971 tokens, without its first


@pytest.mark.parametrize(
    ("dtype", "is_fast"), [("bfloat16", False), ("bfloat16", True), ("float32", False)]
)
def test_a_dtype_that_the_cpu_computes_slowly_is_noted(
    run: Run, dtype: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "has_fast_bfloat16", lambda _: is_fast)
    result = run("evaluate", "corpus.txt", "--model", "tiny", "--dtype", dtype, "--device", "cpu")
    assert result.code == 0
    assert ("no bfloat16 instructions" in result.err) is (dtype == "bfloat16" and not is_fast)


def test_evaluate_reproduces_the_loss_with_documents_bpe_and_dropout(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"{TEXT} {number}"}) for number in range(40)]
    Path("docs.jsonl").write_text("\n".join(lines))
    words = ["--tokenizer", "bpe:300", "--set", "model.dropout=0.3"]
    words += ["--set", "training.context_warmup_length=0"]
    words += ["--set", "training.eval_tokens=100000", "--set", "training.sequence_length=32"]
    words += ["--set", "data.val_fraction=0.3"]
    assert run("train", "docs.jsonl", "--name", "other", *TINY, *words).code == 0
    best = RunFolder(Path("checkpoints/other")).best()
    assert best is not None
    given = ["--data", "docs.jsonl", "--val-fraction", "0.3", "--context-length", "32"]
    facts = evaluated(run, *given, *AS_TRAINED)
    assert facts["nats_per_token"] == pytest.approx(best.facts["val_loss"], rel=1e-6)
    assert facts["bits_per_byte"] == pytest.approx(best.facts["bits_per_byte"], rel=1e-6)
    # More of its documents: the text is still the one that it was trained on.
    more = evaluated(run, "--model", "other", "--val-fraction", "0.6")
    assert (more["val_split"], more["n_tokens"] > facts["n_tokens"]) == ("documents", True)
    Path("docs.jsonl").write_text("\n".join(lines[1:]))
    changed = run("evaluate", "--model", "other", "--val-fraction", "0.6")
    assert "has changed" in error_line(changed)


@pytest.mark.integration
def test_without_data_a_run_with_val_is_evaluated_on_that_text(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text(TEXT)
    Path("other.txt").write_text(TEXT[::-1])
    words = ["--name", "r", *TINY, "--tokenizer", "bytes"]
    trained = run("train", "train.txt", "--val", "other.txt", *words)
    assert trained.code == 0, trained.err
    n_bytes = len(TEXT.encode())
    assert f"validation on {n_bytes + 1} tokens of the --val text" in trained.err
    facts = evaluated(run, "--model", "r")
    assert (facts["data"], facts["n_bytes"]) == (["other.txt"], n_bytes)
    given = evaluated(run, "other.txt", "--model", "r")
    assert facts["nats_per_token"] == given["nats_per_token"]
    shown = run("evaluate", "--model", "r")
    assert "text   other.txt: the run's own text, because no DATA is given" in shown.err
    assert re.search(r"^text +other.txt, the validation text$", shown.out, re.MULTILINE)


@pytest.mark.integration
@torch.no_grad()
def test_the_loss_equals_a_plain_loop_over_the_text(run: Run, tmp_path: Path) -> None:
    tokenizer = train_bpe([TEXT], 290)
    write_model(tmp_path / "m", small_model("gpt2", vocab_size=tokenizer.vocab_size), tokenizer)
    (tmp_path / "a.txt").write_text(TEXT)
    model = read_model(tmp_path / "m").model
    assert tokenizer.end_of_text is not None
    tokens = [tokenizer.end_of_text, *tokenizer.encode(TEXT)]
    for stride in (24, 10):
        nats = 0.0
        for target in range(1, len(tokens)):
            start = -(-max(target - 24, 0) // stride) * stride
            logits = model(torch.tensor([tokens[start:target]]))[0, -1].double()
            nats -= logits.log_softmax(dim=0)[tokens[target]].item()
        model_at = ["--model", str(tmp_path / "m"), "--stride", str(stride)]
        facts = evaluated(run, str(tmp_path / "a.txt"), *model_at, "--dtype", "float32")
        mean = nats / (len(tokens) - 1)
        # softmax of float32 logits of order ten
        assert facts["nats_per_token"] == pytest.approx(mean, rel=1e-5)
        assert facts["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        n_bytes = len(TEXT.encode())
        assert facts["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
        assert (facts["n_tokens"], facts["n_bytes"]) == (len(tokens) - 1, n_bytes)
        assert (facts["context_length"], facts["stride"]) == (24, stride)
        assert facts["tokens_per_s"] == pytest.approx(facts["n_tokens"] / facts["seconds"])


def test_bits_per_byte_counts_the_bytes_of_the_text_for_any_tokenizer(
    run: Run, shared: Path, tmp_path: Path
) -> None:
    """SentencePiece adds a space before each document, which is not counted."""
    texts = ["Once upon a time, né\n", "there was a  dog"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    model = str(shared / "weights/stories260K")
    facts = evaluated(run, str(tmp_path / "a.jsonl"), "--model", model)
    assert facts["n_bytes"] == sum(len(text.encode()) for text in texts)
    tokenizer = read_model(Path(model)).tokenizer
    assert tokenizer is not None
    tokens = [token for text in texts for token in tokenizer.encode(text)]
    assert len(tokenizer.decode_bytes(tokens)) == facts["n_bytes"] + len(texts)
    # </s><s> separates documents; the first <s> is not predicted.
    assert tokenizer.separator == (2, 1)
    assert facts["n_tokens"] == len(tokens) + 2


@pytest.mark.integration
def test_evaluate_reads_text_from_paths_globs_and_standard_input(run: Run) -> None:
    text = Path("corpus.txt").read_bytes()
    given = [["corpus.txt"], ["--data", "corpus.txt"], ["corp*.txt"], ["-"]]
    all_facts = [evaluated(run, *words, "--model", "tiny", stdin=text) for words in given]
    assert [facts["data"] for facts in all_facts] == [["corpus.txt"], *given[:1], *given[2:]]
    assert len({facts["nats_per_token"] for facts in all_facts}) == 1
    assert all_facts[0]["n_bytes"] == len(text)
    both = evaluated(run, "corpus.txt", "--data", "corpus.txt")
    assert both["data"] == ["corpus.txt"] * 2
    assert both["n_bytes"] == len(text), "a file that is named twice must be read once"


def test_the_loss_does_not_depend_on_the_batch_size(run: Run) -> None:
    losses = [
        evaluated(run, "corpus.txt", "--batch-size", size)["nats_per_token"] for size in ("1", "9")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.integration
def test_windows_are_at_most_1024_tokens_by_default(run: Run, tmp_path: Path) -> None:
    model = small_model(vocab_size=257, context_length=5000, n_layer=1)
    write_model(tmp_path / "m", model, BytesTokenizer())
    words = ["--model", str(tmp_path / "m"), "corpus.txt"]
    assert evaluated(run, *words)["context_length"] == 1024
    assert evaluated(run, *words, "--context-length", "2000")["context_length"] == 2000
    short = evaluated(run, *words, "--context-length", "5000")
    assert (short["context_length"], short["stride"]) == (2970, 2970), (
        "a text must be at most one window"
    )


def test_the_result_is_a_few_lines_with_units(run: Run) -> None:
    words = ["corpus.txt", "--model", "tiny", "--val-fraction", "0.25", "--stride", "32"]
    result, facts = run("evaluate", *words), evaluated(run, *words)
    assert (result.code, result.err) == (0, "model checkpoints/tiny/step-000004\n")
    loss, bits = (f"{facts[name]:.4f}" for name in ("nats_per_token", "bits_per_byte"))
    expected = rf"""model       checkpoints/tiny/step-000004
text        corpus\.txt, the last 25%
loss        {loss} nats/token, {bits} bits/byte
perplexity  {facts["perplexity"]:.4g}
predicted   742 tokens, 742 bytes
windows     64 tokens, stride 32
speed       \S+ tok/s, \d+\.\d s on \w+ in \w+
"""
    assert re.fullmatch(expected, result.out), result.out


def test_progress_of_evaluate_is_shown_on_a_terminal_and_erased(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        screen = Screen(patch)
        result = run("evaluate", "corpus.txt", "--batch-size", "1")
    shown = screen.text()
    assert result.code == 0, shown
    drawn, after = shown.split("\x1b[?25h")
    assert re.search(r"evaluating .*━.*  \S+ of 2\.97k tokens  \S+ tok/s", drawn)
    assert "evaluating" not in after
    assert "nats/token" in after


def test_a_pipe_gets_occasional_plain_progress_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    result = run("evaluate", "corpus.txt", "--batch-size", "20")
    lines = result.err.splitlines()
    assert lines[0] == "model checkpoints/tiny/step-000004"  # before any long work
    assert re.fullmatch(r"evaluating  0 of 2.97k tokens  0 tok/s", lines[1])
    assert re.fullmatch(r"evaluating  1.28k of 2.97k tokens  \S+ tok/s", lines[2])
    assert "evaluating" not in result.out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--stride 0", 2, ["stride must be at least 1: it is 0"]),
        ("--stride -3", 2, ["stride must be at least 1: it is -3"]),
        ("--stride 65", 2, ["stride must be between 1 and 64: it is 65"]),
        ("--stride 17 --context-length 16", 2, ["stride must be between 1 and 16: it is 17"]),
        ("--context-length 65", 2, ["--context-length must be between 1 and 64: it is 65"]),
        ("--context-length 0", 2, ["--context-length must be at least 1"]),
        ("--batch-size 0", 2, ["--batch-size must be at least 1"]),
        ("--eval-tokens 0", 2, ["--eval-tokens must be at least 1"]),
        ("--val-fraction 0", 2, ["--val-fraction must be in (0, 1)"]),
        ("--val-fraction 1", 2, ["--val-fraction must be in (0, 1)"]),
        ("--val-fraction 0.0001", 3, ["too little text", "(1 here)", "Give more"]),
        ("--data missing.txt", 3, ["'missing.txt'"]),
        ("--model tinny", 4, ["'tinny'", "Did you mean tiny?"]),
        ("--device cuda:9", 2, ["--device", "'cuda:9'"]),
    ],
)
def test_bad_values_are_refused_in_one_line(
    run: Run, words: str, code: int, said: list[str]
) -> None:
    result = run("evaluate", "corpus.txt", *words.split())
    line = error_line(result)
    assert result.code == code
    assert all(part in line for part in said), line


def test_a_text_too_short_to_predict_is_refused(run: Run, tmp_path: Path) -> None:
    empty = run("evaluate", "-")
    assert (empty.code, "the corpus is empty" in error_line(empty)) == (3, True)
    assert (
        evaluated(run, "-", stdin=b"x")["n_tokens"] == 1
    )  # after the separator that starts a document
    ranks = {bytes([b]): b for b in range(256)}
    no_ends = TiktokenTokenizer("plain", make_encoding("plain", r"(?s:.)", ranks, {}))
    write_model(tmp_path / "m", small_model(vocab_size=256), no_ends)
    words = ["-", "--model", str(tmp_path / "m")]
    letter = run("evaluate", *words, stdin=b"x")
    assert letter.code == 3
    assert "too little text: the first of its tokens (1 here)" in error_line(letter)
    two = evaluated(run, *words, stdin=b"xy")
    assert (two["n_tokens"], two["n_bytes"]) == (1, 1)
    assert "predicted   1 token, 1 byte\n" in run("evaluate", *words, stdin=b"xy").out


def test_a_model_without_tokenizer_or_with_a_nan_loss_is_refused(run: Run, tmp_path: Path) -> None:
    model = small_model(vocab_size=257)
    write_model(tmp_path / "mute", model, None)
    result = run("evaluate", "corpus.txt", "--model", str(tmp_path / "mute"))
    assert result.code == 4
    assert "has no tokenizer.json, so it cannot be evaluated on text" in error_line(result)
    with torch.no_grad():
        model.unembedding.weight[3] = math.nan
    write_model(tmp_path / "nan", model, BytesTokenizer())
    result = run("evaluate", "corpus.txt", "--model", str(tmp_path / "nan"))
    assert result.code == 4
    model_line, error = result.err.splitlines()
    assert model_line == f"model {tmp_path / 'nan'}"
    assert re.match(r"error: .* is nan: its weights are damaged", error)


def test_a_changed_byte_of_the_weights_is_refused(run: Run, tmp_path: Path) -> None:
    best = RunFolder(Path("checkpoints/tiny")).best()
    assert best is not None
    folder = shutil.copytree(best.folder, tmp_path / "copy")
    assert evaluated(run, "corpus.txt", "--model", str(folder))["nats_per_token"] > 0
    with (folder / "model.safetensors").open("rb+") as file:
        file.seek(-3, 2)
        byte = file.read(1)[0]
        file.seek(-3, 2)
        file.write(bytes([byte ^ 1]))
    refused = run("evaluate", "corpus.txt", "--model", str(folder))
    assert refused.code == 4
    assert "'model.safetensors' has changed" in error_line(refused)


def test_a_hostile_name_cannot_control_a_terminal(run: Run, tmp_path: Path) -> None:
    name = str(tmp_path / "a\x1b[2J\nb.txt")
    shutil.copy("corpus.txt", name)
    result = run("evaluate", name)
    assert result.code == 0
    assert r"a\x1b[2J\nb.txt" in result.out
    assert len(result.out.splitlines()) == 7
