"""A model folder without a tokenizer: texts are token ids."""

import json
from pathlib import Path

import pytest
import torch
from calls import Run, error_line
from small_models import small_model

import minigpt
from minigpt.checkpoint.model_folder import write_model
from minigpt.errors import DataError
from minigpt.generation.loading import load, tokenizer_of

MODEL = small_model("llama", vocab_size=61)
PROMPT = [5, 9, 40]


@pytest.fixture
def untokenized(tmp_path: Path) -> Path:
    """Return a model folder without a tokenizer."""
    write_model(tmp_path / "untokenized", MODEL, None)
    return tmp_path / "untokenized"


def greedy(ids: list[int], n_new: int) -> list[int]:
    """Return the greedy continuation, by a loop over full forward passes."""
    for _ in range(n_new):
        ids = [*ids, int(MODEL(torch.tensor([ids]))[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("prompt", ["5 9 40", "[5, 9, 40]", " 5,9\n40 "])
def test_without_a_tokenizer_prompts_and_outputs_are_token_ids(
    run: Run, untokenized: Path, prompt: str
) -> None:
    result = run(
        "generate",
        prompt,
        "--model",
        str(untokenized),
        "--temperature",
        "0",
        "--max-new-tokens",
        "6",
    )
    assert result.code == 0
    assert [*map(int, result.out.split())] == greedy(PROMPT, 6)[3:]
    assert "has no tokenizer: texts are token ids" in result.err


def test_the_python_api_accepts_token_ids(untokenized: Path) -> None:
    options = {"temperature": 0, "max_new_tokens": 6, "compile": False}
    traced = minigpt.trace(untokenized, PROMPT, **options)
    assert [token.id for token in traced.tokens] == greedy(PROMPT, 6)
    assert (
        "".join(step.text for step in minigpt.generate(untokenized, PROMPT, **options))
        == traced.text
    )
    assert [*map(int, traced.text.split())] == greedy(PROMPT, 6)[3:]


@pytest.mark.parametrize("word", ["hello", "61", "-1", "1.5", "²", "٣", "1_0", "9" * 5000])
def test_text_for_a_model_without_tokenizer_is_refused_with_two_remedies(
    run: Run, untokenized: Path, word: str
) -> None:
    result = run("generate", f"5 {word}", "--model", str(untokenized))
    assert result.code == 3
    line = error_line(result)
    assert "token ids from 0 to 60" in line
    assert "Add the tokenizer.json" in line
    assert len(line) < 500


def test_generation_ends_at_the_end_of_text_id_of_the_model(untokenized: Path) -> None:
    end = greedy(PROMPT, 1)[-1]
    path = untokenized / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [end, 10**6]}))
    (step,) = minigpt.generate(untokenized, PROMPT, temperature=0, compile=False)
    assert (step.step.token, step.step.finish) == (end, "end_of_text")
    tokenizer = tokenizer_of(load(untokenized, device="cpu"))
    assert tokenizer.end_of_text_ids == (end,)
    assert tokenizer.token_bytes(61) == b""


def test_without_an_end_of_text_an_empty_prompt_is_refused(untokenized: Path) -> None:
    with pytest.raises(DataError, match="no token that starts a document"):
        minigpt.generate(untokenized, "")


@pytest.mark.parametrize("command", ["generate Once --model", "evaluate corpus.txt --model"])
def test_the_remedy_for_a_sentencepiece_model_is_to_write_tokenizer_json(
    run: Run, untokenized: Path, command: str
) -> None:
    line = error_line(run(*command.split(), str(untokenized)))
    assert "Add the tokenizer.json that the model was trained with." in line
    (untokenized / "tokenizer.model").touch()
    line = error_line(run(*command.split(), str(untokenized)))
    assert "Its tokenizer.model is SentencePiece's. Write tokenizer.json with transformers" in line
