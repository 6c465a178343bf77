"""minigpt.load, train, evaluate, generate and trace equal the commands."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_calls import MODEL, OPTIONS, TINY

import minigpt
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.commands.evaluate import EvaluationConfig
from minigpt.commands.evaluate.measuring import measure
from minigpt.commands.options import ModelSource
from minigpt.errors import DISTRIBUTION, ConfigError
from minigpt.settings import read_toml
from minigpt.training.events import EvalEvent, StepEvent


@pytest.mark.integration
def test_train_returns_a_run_that_evaluate_generate_and_trace_accept(
    text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Any] = []
    run = minigpt.train(text, name="book", on_event=events.append, **TINY)
    assert run == Path("checkpoints/book")
    assert [e.step for e in events if isinstance(e, StepEvent)] == [1, 2, 3, 4]
    assert RunFolder(run).steps() == [4]
    assert len(list(minigpt.generate(run, "The", max_new_tokens=3))) == 3
    assert len(minigpt.trace(run, "The", max_new_tokens=3).steps) == 3
    facts = minigpt.evaluate(run)
    (evaluated,) = (e for e in events if isinstance(e, EvalEvent))
    assert facts["nats_per_token"] == pytest.approx(evaluated.val_loss, abs=2e-4)
    assert minigpt.train(str(text), name="book", resume=True, max_steps=6) == run
    assert RunFolder(run).steps()[-1] == 6
    tuned = minigpt.train([text], name="tuned", from_=str(run), max_steps=1)
    assert RunFolder(tuned).steps() == [1]
    assert capfd.readouterr() == ("", ""), "library functions must not print"


def test_evaluate_returns_the_numbers_of_the_command(text: Path) -> None:
    run = minigpt.train(text, name="book", **TINY)
    config = EvaluationConfig(data=("book.txt",), stride=32)
    expected = measure(config, ModelSource(model="book"), is_quiet=True)
    found = minigpt.evaluate(run, text.name, stride=32)
    for name in ("nats_per_token", "bits_per_byte", "n_tokens", "n_bytes"):
        assert found[name] == expected[name]
    assert minigpt.evaluate(data=[text], threads=1)["n_tokens"] == found["n_tokens"]


@pytest.mark.parametrize("prompts", [["The king", "a"], [list(b"The king"), list(b"a")]])
def test_a_list_of_prompts_equals_one_call_per_prompt(prompts: list[Any]) -> None:
    items = list(minigpt.generate(MODEL, prompts, num_samples=2, seed=5, **OPTIONS))
    for number, prompt in enumerate(prompts):
        for sample in range(2):
            index = 2 * number + sample
            alone = list(minigpt.generate(MODEL, prompt, seed=5 + index, **OPTIONS))
            together = [item for item in items if item.sample == index]
            assert [i.step.token for i in together] == [i.step.token for i in alone]
    traces = minigpt.trace(MODEL, prompts, seed=5, **OPTIONS)
    assert isinstance(traces, list)
    for number, prompt in enumerate(prompts):
        alone_trace = minigpt.trace(MODEL, prompt, seed=5 + number, **OPTIONS)
        assert traces[number].tokens == alone_trace.tokens


def test_the_repr_of_a_trace_is_a_short_line() -> None:
    trace = minigpt.trace(MODEL, "The king " * 6, **OPTIONS, ignore_eos=True)
    assert len(repr(trace)) < 300
    assert "prompt of 54 tokens, 6 generated, finish='length'" in repr(trace)
    assert len(repr(trace.steps[0])) < 2000
    assert "\n" not in repr(trace)


def test_the_version_is_that_of_the_installed_distribution() -> None:
    try:
        assert minigpt.__version__ == version(DISTRIBUTION)
    except PackageNotFoundError:
        assert minigpt.__version__ == "0+source"


@pytest.mark.integration
def test_the_code_of_the_page_about_python_runs(text: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs/python.md"
    text.rename("my-book.txt")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(block.replace("max_steps=300", "max_steps=2"), names)
    assert names["again"].text == names["trace"].text
    weights = names["trace"].weights_LHTS
    np.testing.assert_allclose(weights.sum(axis=-1), np.ones(weights.shape[:-1]), atol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("for_decoding", [False, True])
def test_a_loaded_model_gives_the_same_text_and_trace(for_decoding: bool) -> None:
    loaded = minigpt.load("storyteller", for_decoding=for_decoding)
    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 6}
    ours, expected = (
        "".join(step.text for step in minigpt.generate(model, "The", **options))
        for model in (loaded, "storyteller")
    )
    assert ours == expected
    trace = minigpt.trace(loaded, "The", **options)
    assert trace.text == expected
    assert trace.header.model == "storyteller"
    assert loaded.tokenizer is not None
    tokens = torch.tensor([loaded.tokenizer.encode("The king")])
    seen: list[torch.Tensor] = []
    with loaded.model.blocks[0].register_forward_hook(lambda *args: seen.append(args[2])):
        logits = loaded.model(tokens)
    plain = read_model(loaded.folder, dtype=torch.float32).model(tokens)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1
    with pytest.raises(ConfigError, match="device is chosen when a model is loaded"):
        minigpt.generate(loaded, "The", device="cpu")
    with pytest.raises(ConfigError, match="quantize is chosen when a model is loaded"):
        minigpt.trace(loaded.model, "The", tokenizer=loaded.tokenizer, quantize="int8")


@pytest.mark.integration
def test_a_head_whose_output_weights_are_zeroed_equals_an_ablated_head() -> None:
    loaded = minigpt.load("storyteller")
    d_head = loaded.model.config.d_head
    output = loaded.model.attentions[4].output
    assert isinstance(output, torch.nn.Linear)
    prompt = "There was a fox called Zilpo. One day, the fox called Z"

    def text(**options: Any) -> str:
        steps = minigpt.generate(loaded, prompt, temperature=0, max_new_tokens=8, **options)
        return "".join(step.text for step in steps)

    before, ablated = text(), text(ablate="4.1")
    output.weight[:, d_head : 2 * d_head] = 0
    assert text() == ablated != before


def test_train_takes_a_validation_text_threads_and_a_logger_as_the_command_does(text: Path) -> None:
    other = text.with_name("other.txt")
    other.write_text("Once upon a time there was a king.\n" * 9)
    n_threads: list[int] = []

    def count(event: Any) -> None:
        n_threads.append(torch.get_num_threads())

    more: dict[str, Any] = {"report_to": "none", "threads": np.int64(1), "on_event": count}
    run = minigpt.train(text, name="a", val=other, **TINY | more)
    assert read_toml(run / "config.toml")["data"]["val"] == [str(other)]
    assert set(n_threads) == {1}
    for wrong, said in ({"threads": 0}, "threads must be"), ({"report_to": "x"}, "report_to 'x'"):
        with pytest.raises(ConfigError, match=said):
            minigpt.train(text, **TINY, **wrong)
    with pytest.raises(ConfigError, match="threads must be"):
        minigpt.evaluate(run, threads=0)
