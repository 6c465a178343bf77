"""minigpt generate: stdout, stderr, and the end of a text."""

import json
import math
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from calls import Run, error_line
from small_models import small_model

from minigpt.checkpoint.model_folder import write_model
from minigpt.commands.display import compiling
from minigpt.commands.generate import samples
from minigpt.generation import fast
from minigpt.generation.fast import background, compiled
from minigpt.generation.fast.graph import GraphStep
from minigpt.text.tokenizer import BytesTokenizer

pytestmark = pytest.mark.usefixtures("in_trained")


def test_stdout_is_the_text_in_the_json_and_a_line_break(run: Run) -> None:
    words = ["generate", "The king", "--seed", "3", "--max-new-tokens", "30", "--temperature", "0"]
    plain, as_json = run(*words), run(*words, "--json")
    facts = json.loads(as_json.out)
    assert plain.code == as_json.code == 0
    assert plain.out == facts["text"] + "\n"
    assert facts["prompt"] == "The king"
    assert facts["n_prompt_tokens"] == 8
    assert (facts["n_tokens"], facts["finish_reason"], facts["seed"]) == (30, "length", 3)
    assert facts["sampling"]["temperature"] == 0
    assert facts["model"].endswith("step-000004")


def test_streaming_does_not_change_the_text(run: Run) -> None:
    words = ["generate", "The", "--seed", "3", "--max-new-tokens", "40", "--temperature", "5"]
    assert run(*words).out == run(*words, "--no-stream").out


@pytest.mark.integration
def test_the_same_seed_gives_the_same_text_and_a_random_seed_is_printed(run: Run) -> None:
    words = ["generate", "The", "--max-new-tokens", "40", "--temperature", "5"]
    first = run(*words)
    seed = re.search(r"\d+ tokens, [\d.e+]+ tok/s, seed (\d+)", first.err)
    assert seed
    assert run(*words, "--seed", seed[1]).out == first.out
    assert run(*words).out != first.out


def test_temperature_0_gives_the_same_text_for_any_seed(run: Run) -> None:
    words = ["generate", "The", "--max-new-tokens", "20", "--temperature", "0", "--seed"]
    assert run(*words, "1").out == run(*words, "2").out


@pytest.mark.integration
def test_standard_input_is_the_prompt_byte_for_byte(run: Run) -> None:
    words = ["--temperature", "0", "--max-new-tokens", "9", "--json"]
    for prompt in ("The king\n", " \u2003 \n\n", "a\0b\x1b[31m", "é 世界"):
        facts = json.loads(run("generate", "-", *words, stdin=prompt.encode()).out)
        assert facts["prompt"] == prompt
        assert facts["n_prompt_tokens"] == len(prompt.encode())
        if "\0" not in prompt:
            given = json.loads(run("generate", *words, "--", prompt).out)
            assert given["text"] == facts["text"]


def test_without_a_prompt_a_new_document_starts(run: Run) -> None:
    facts = json.loads(run("generate", "--json", "--max-new-tokens", "3").out)
    assert facts["prompt"] == ""
    assert facts["n_prompt_tokens"] == 1  # <|endoftext|>


def test_a_full_context_ends_the_text_and_is_reported(run: Run) -> None:
    result = run("generate", "x" * 60, "--json", "--temperature", "0", "--max-new-tokens", "99")
    facts = json.loads(result.out)
    assert facts["finish_reason"] == "context"
    assert facts["n_tokens"] == 64 - 60 + 1  # the last token needs no position
    assert "context window is full" in result.err


def test_the_text_ends_before_a_stop_string(run: Run) -> None:
    words = ["generate", "The", "--temperature", "0", "--json"]
    whole = json.loads(run(*words).out)["text"]
    stop = whole[10:12]
    facts = json.loads(run(*words, "--stop", stop).out)
    assert facts["text"] == whole[: whole.index(stop)]
    assert facts["finish_reason"] == "stop"


def test_a_stop_string_may_contain_escapes(run: Run) -> None:
    words = ["generate", "x", "--json", "--max-new-tokens", "1", "--stop", r"\n\n", "--stop"]
    facts = json.loads(run(*words, r"a\\n\t").out)
    assert facts["sampling"]["stop"] == ["\n\n", "a\\n\t"]


@pytest.mark.integration
def test_each_of_several_samples_can_be_reproduced_by_its_seed(run: Run) -> None:
    words = ["generate", "The", "--max-new-tokens", "12", "--temperature", "5"]
    both = run(*words, "--seed", "5", "--num-samples", "2").out
    singles = [run(*words, "--seed", seed).out for seed in ("5", "6")]
    assert both == ("-" * 20 + "\n").join(singles)
    lines = run(*words, "--seed", "5", "--num-samples", "2", "--json").out.splitlines()
    assert [json.loads(line)["text"] + "\n" for line in lines] == singles


@pytest.mark.integration
@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_suggested_sampling_that_is_not_in_use_is_reported(
    run: Run, tmp_path: Path, command: str
) -> None:
    write_model(tmp_path / "m", small_model(vocab_size=257), BytesTokenizer())
    path = tmp_path / "m" / "generation_config.json"
    words = [command, "ab", "--model", str(tmp_path / "m"), "--max-new-tokens", "1"]
    assert "suggests" not in run(*words).err
    suggested = {
        "temperature": 0.3,
        "top_k": 50,  # the default of transformers
        "top_p": 0.9,
        "min_p": "many",
        "repetition_penalty": 1.3,
        "max_new_tokens": 7,
    }
    path.write_text(json.dumps(suggested))
    said = "generation_config.json suggests {}: not used"
    # transformers ignores the others without do_sample.
    assert said.format("--repetition-penalty 1.3") in run(*words).err
    path.write_text(json.dumps(suggested | {"do_sample": True}))
    all_ = "--temperature 0.3 --top-p 0.9 --repetition-penalty 1.3"
    assert run(*words).err.count(said.format(all_)) == 1
    given = run(*words, "--top-p=0.8", "--repetition-penalty", "1")
    assert said.format("--temperature 0.3") in given.err
    greedy = run(*words, "--temperature", "0", "--repetition-penalty", "1.3")
    for result in (greedy, run(*words, "--json")):
        assert result.code == 0, result.err
        assert "suggests" not in result.err
    (path.parent / "manifest.json").write_text("{}")  # of a run: its model's file
    assert "suggests" not in run(*words).err


@pytest.mark.integration
def test_many_samples_are_shown_in_order_and_in_full(run: Run) -> None:
    """Each equals a single sample, streamed or not, in text and JSON; their lengths differ."""
    words = ["generate", "The", "--max-new-tokens", "40", "--temperature", "9", "--stop", "e"]
    singles = [run(*words, "--seed", str(seed)).out for seed in range(5, 13)]
    assert len({len(single) for single in singles}) > 4
    words += ["--num-samples", "8", "--seed", "5"]
    result = run(*words)
    assert result.out == ("-" * 20 + "\n").join(singles)
    assert run(*words, "--no-stream").out == result.out
    assert re.findall(r"seed (\d+)", result.err) == [str(seed) for seed in range(5, 13)]
    assert re.search(r"\n8 samples, \d+ tokens, [\d.e+]+ tok/s together\n$", result.err)
    facts = [json.loads(line) for line in run(*words, "--json").out.splitlines()]
    assert [f["text"] + "\n" for f in facts] == singles
    assert [f["seed"] for f in facts] == list(range(5, 13))


def test_logprobs_are_in_the_json_and_on_stderr(run: Run) -> None:
    words = ["generate", "The", "--max-new-tokens", "6", "--seed", "3", "--logprobs", "2"]
    result = run(*words)
    facts = json.loads(run(*words, "--json").out)
    assert result.out == facts["text"] + "\n"
    assert len(facts["steps"]) == 6
    _, *lines = result.err.splitlines()  # the first line names the model
    assert len(lines) == 7
    for step, line in zip(facts["steps"], lines, strict=False):
        values = [best["log_probability"] for best in step["best"]]
        assert values == sorted(values, reverse=True)
        assert step["log_probability"] <= values[0] + 1e-6
        shares = re.findall(r"([\d.]+)%", line)
        expected = [step["log_probability"], *values]
        assert [float(share) for share in shares] == pytest.approx(
            [100 * math.exp(value) for value in expected], abs=0.006
        )
    assert "steps" not in json.loads(run(*words[:-2], "--json").out)
    greedy = json.loads(run(*words, "--temperature", "0", "--json").out)["steps"]
    assert all(step["best"][0]["token"] == step["token"] for step in greedy)


@pytest.mark.integration
def test_a_sliding_window_is_reported(run: Run) -> None:
    words = ["generate", "x" * 60, "--temperature", "0", "--overflow", "slide"]
    result = run(*words, "--max-new-tokens", "50")
    facts = json.loads(run(*words, "--json", "--max-new-tokens", "50").out)
    assert (facts["n_tokens"], facts["finish_reason"]) == (50, "length")
    # The window slides at 65 tokens and keeps 36; then again after 29 more.
    assert (facts["n_slides"], facts["n_forgotten"]) == (2, 58)
    assert "; the window slid 2 times and dropped 58 tokens" in result.err
    short = json.loads(run(*words, "--json", "--max-new-tokens", "5").out)
    assert (short["n_slides"], short["n_forgotten"]) == (0, 0)
    assert facts["text"].startswith(short["text"])


@pytest.mark.integration
def test_ignore_eos_never_samples_the_end_of_text(run: Run) -> None:
    words = ["generate", "The", "--json", "--temperature", "99", "--num-samples", "40"]
    words += ["--seed", "1", "--max-new-tokens", "60"]
    free = [json.loads(line) for line in run(*words).out.splitlines()]
    assert "end_of_text" in {f["finish_reason"] for f in free}
    ignored = [json.loads(line) for line in run(*words, "--ignore-eos").out.splitlines()]
    assert {f["finish_reason"] for f in ignored} == {"length"}
    assert "<|endoftext|>" not in "".join(f["text"] for f in ignored)


@pytest.mark.parametrize("command", ["generate", "attention-trace", "evaluate"])
def test_threads_sets_the_number_of_torch_threads(
    run: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    words = ["corpus.txt"] if command == "evaluate" else ["x", "--max-new-tokens", "1"]
    assert run(command, *words, "--threads", "1").code == 0
    assert asked == [1]
    assert run(command, *words).code == 0
    assert asked == [1]
    result = run(command, *words, "--threads", "0")
    assert result.code == 2
    assert "--threads must be at least 1: it is 0." in result.err


def test_a_trace_refuses_a_sliding_window(run: Run) -> None:
    result = run("attention-trace", "x", "--overflow", "slide")
    assert result.code == 2
    assert "overflow slide would recompute rows that were already traced." in error_line(result)


def interrupt_after(
    n_writes: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT
) -> None:
    """Send a signal after some writes to stdout."""
    write, written = samples.write_result, []

    def write_and_press(text: str) -> None:
        write(text)
        written.append(text)
        if len(written) == n_writes:
            signal.raise_signal(number)

    monkeypatch.setattr(samples, "write_result", write_and_press)


def test_ctrl_c_keeps_the_text_so_far(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "The", "--temperature", "0", "--max-new-tokens", "50"]
    whole = run(*words).out
    interrupt_after(7, monkeypatch)
    result = run(*words, "--num-samples", "3")
    assert result.code == 130
    assert result.out.endswith("\n")
    assert whole.startswith(result.out.removesuffix("\n"))
    assert 0 < len(result.out) < len(whole)
    assert re.fullmatch(r"model .*\n7 tokens, .* tok/s, seed \d+; interrupted\n", result.err)


def test_sigterm_ends_with_its_code_and_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(7, monkeypatch, signal.SIGTERM)
    result = run("generate", "The", "--temperature", "0")
    assert (result.code, result.err) == (143, "model checkpoints/tiny/step-000004\n")
    assert result.out


def test_ctrl_c_while_loading_prints_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.commands import loading

    monkeypatch.setattr(loading, "resolve_model", lambda spec: signal.raise_signal(signal.SIGINT))
    result = run("generate", "The")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")


def test_ctrl_c_leaves_valid_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.generation import samples

    real = samples.stream_samples

    def press_after_five(*words: object, **more: object) -> object:
        for number, item in enumerate(real(*words, **more)):  # type: ignore[arg-type]
            yield item
            if number == 4:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(samples, "stream_samples", press_after_five)
    result = run("generate", "The", "--json", "--temperature", "0")
    facts = json.loads(result.out)
    assert result.code == 130
    assert (facts["n_tokens"], facts["finish_reason"]) == (5, "interrupted")


@pytest.mark.parametrize(
    ("after", "flags", "is_started"),
    [
        ("0", [], True),
        ("never", [], False),
        (None, [], False),  # without a terminal
        ("3600", [], False),
        ("0", ["--no-compile"], False),
        ("0", ["--num-samples", "2"], False),
    ],
)
def test_long_decoding_starts_a_reported_background_compilation(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    after: str | None,
    flags: list[str],
    is_started: bool,
) -> None:
    models: list[object] = []
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(background, "start", lambda model: models.append(model) or True)
    monkeypatch.setattr(compiling.atexit, "register", lambda *call: at_exit.append(partial(*call)))
    monkeypatch.delenv(background.VARIABLE, raising=False)
    if after is not None:
        monkeypatch.setenv(background.VARIABLE, after)
    assert run("generate", "The", "--max-new-tokens", "4", *flags).code == 0
    for call in at_exit:
        call()
    assert len(models) == is_started
    said = "compiling the model in the background" in capfd.readouterr().err
    assert said == is_started


@pytest.mark.integration
@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_a_compiled_graph_in_the_cache_is_used_by_default_and_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def uncompiled(step: GraphStep, **_: object) -> compiled.CompiledStep:
        n = step.model.config.n_layer
        return lambda tensors: list(step(*tensors[:3], tensors[3:-n], tensors[-n:]))

    words = [command, "The", "--max-new-tokens", "20", "--temperature", "3", "--seed", "1"]
    eager = run(*words)
    assert "compiled graph" not in eager.err
    monkeypatch.setattr(fast, "is_default", lambda model: True)
    monkeypatch.setattr(compiled, "load_step", uncompiled)
    cached = run(*words)
    assert "decoding with the compiled graph in the cache; --no-compile" in cached.err
    assert cached.out == eager.out
    assert "compiled graph" not in run(*words, "--no-compile").err
    n_said = run(*words, "--num-samples", "2").err.count("compiled graph")
    assert n_said == (command == "attention-trace")  # the graph does not support batches
