"""minigpt.train, evaluate, trace and generate from Python; importing minigpt stays light."""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_model

import minigpt
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.commands.evaluate import EvaluationConfig
from minigpt.commands.evaluate.measuring import measure
from minigpt.commands.options import ModelSource
from minigpt.errors import DISTRIBUTION, CheckpointError, ConfigError, DataError
from minigpt.settings import read_toml
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.training.events import EvalEvent, StepEvent

TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "max_steps": 4,
    "context_length": 64,
    "batch_size": 2,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
    "d_mlp": 16,
    "log_every": 1,
    "dtype": "float32",  # evaluate uses float32 on any CPU
}
MODEL = small_model("gpt2", vocab_size=257, context_length=64)
OPTIONS: dict[str, Any] = {"tokenizer": BytesTokenizer(), "max_new_tokens": 6}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a text file in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "book.txt"
    path.write_text("The king said: once upon a time.\n" * 90)
    return path


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


def test_train_works_in_a_thread(text: Path) -> None:
    runs: list[Path] = []
    worker = threading.Thread(target=lambda: runs.append(minigpt.train(text, name="a", **TINY)))
    worker.start()
    worker.join()
    assert runs == [Path("checkpoints/a")]


def test_evaluate_returns_the_numbers_of_the_command(text: Path) -> None:
    run = minigpt.train(text, name="book", **TINY)
    config = EvaluationConfig(data=("book.txt",), stride=32)
    expected = measure(config, ModelSource(model="book"), is_quiet=True)
    found = minigpt.evaluate(run, text.name, stride=32)
    for name in ("nats_per_token", "bits_per_byte", "n_tokens", "n_bytes"):
        assert found[name] == expected[name]
    assert minigpt.evaluate(data=[text], threads=1)["n_tokens"] == found["n_tokens"]


def test_invalid_arguments_raise_before_any_work(text: Path) -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: minigpt.train(text, max_step=3), ConfigError, "Did you mean max_steps?"),
        (lambda: minigpt.train(text, n_layer="two"), ConfigError, "model.n_layer"),
        (lambda: minigpt.train("no.txt", **TINY), DataError, "no.txt"),
        (lambda: minigpt.train(text, resume=True), CheckpointError, "no run to resume"),
        (lambda: minigpt.evaluate("none", text), CheckpointError, "none"),
        (lambda: minigpt.evaluate("none", text, strid=3), ConfigError, "Did you mean stride?"),
        (
            lambda: minigpt.generate(MODEL, ["a", 3], **OPTIONS),
            ConfigError,
            "all texts or all",
        ),
        (
            lambda: minigpt.trace(MODEL, ["a", [3]], **OPTIONS),
            ConfigError,
            "all texts or all",
        ),
        (lambda: minigpt.generate(MODEL, [], **OPTIONS), DataError, "empty"),
        (lambda: minigpt.evaluate(MODEL, text), ConfigError, "of type GPT"),  # type: ignore[arg-type]
        (lambda: minigpt.generate(3, "a"), ConfigError, "of type int"),  # type: ignore[arg-type]
        (lambda: minigpt.evaluate("none", text, devise="cpu"), ConfigError, "Did you mean device?"),
        (lambda: minigpt.train(text, resum=True), ConfigError, "Did you mean resume?"),
        (lambda: minigpt.generate(MODEL, "a", devise="cpu"), ConfigError, "Did you mean device?"),
        (lambda: minigpt.trace(MODEL, "a", densee=True), ConfigError, "Did you mean dense?"),
        (lambda: minigpt.generate(MODEL, "a", temp=1), ConfigError, "Did you mean temperature?"),
        (lambda: minigpt.generate(MODEL, "a", n_sources=1), ConfigError, "unknown setting"),
        (lambda: minigpt.trace(MODEL, "a", sources=1), ConfigError, "Did you mean n_sources?"),
        (lambda: minigpt.trace(MODEL, "a", ablates="0.0"), ConfigError, "Did you mean ablate"),
        (
            lambda: minigpt.trace(MODEL, "a", heads=[(0, 1, 2)], **OPTIONS),
            ConfigError,
            "it is '1.2'",
        ),
        (lambda: minigpt.trace(MODEL, "a", layers=[0.5], **OPTIONS), ConfigError, "0.5"),
        (lambda: minigpt.trace(MODEL, "a", layers=2), ConfigError, "must be of type str"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)):
            call()


def test_objects_of_transformers_are_refused_with_what_to_give_instead() -> None:
    class Pretrained:
        def save_pretrained(self, folder: str) -> None: ...

    hf: Any = Pretrained()
    for refused in (minigpt.load, minigpt.generate, minigpt.trace, minigpt.evaluate):
        arguments = [hf, "a"] if refused is minigpt.evaluate else [hf]
        with pytest.raises(ConfigError, match=r"type Pretrained. Save it .* save_pretrained\(FOLD"):
            refused(*arguments)  # type: ignore[operator]
    for tokenizer in (hf, "folder"):
        with pytest.raises(ConfigError, match=r"of type .* copy its tokenizer\.json"):
            minigpt.generate(MODEL, "a", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"x", "of type bytes"),
        (bytearray(b"x"), "of type bytearray"),
        (3, "of type int"),
        (None, "of type NoneType"),
        ([True], "the prompt has True, of type bool"),
        ([1.5], "the prompt has 1.5, of type float"),
        ([1, 2.0], "the prompt has 2.0, of type float"),
        ([None], "the prompt has None, of type NoneType"),
        ([b"x"], "of type bytes"),
        ([[True]], "the prompt has True, of type bool"),
        ([[1], ["a"]], "the prompt has 'a', of type str"),
        ([3, {"role": "user"}], "of type dict"),
        ({"a": 1}, "of type dict"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", [minigpt.generate, minigpt.trace])
def test_a_prompt_of_a_wrong_type_is_refused_with_its_type(
    call: Any, prompt: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        list(call(MODEL, prompt, **OPTIONS))


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


def test_lists_of_heads_and_layers_equal_the_strings_of_the_command() -> None:
    def tokens_and_rows(**lists: Any) -> list[Any]:
        trace = minigpt.trace(MODEL, "Once upon", n_verified=1, seed=1, **lists, **OPTIONS)
        return [(s.token.id, s.row.weights_S.tolist(), s.effects) for s in trace.steps]

    lists = {"heads": [(1, 2), [0, 0], "0.*"], "verify_layers": [0, 1], "ablate": [(0, 1)]}
    texts = {"heads": "1.2,0.0,0.*", "verify_layers": "0,1", "ablate": "0.1"}
    assert tokens_and_rows(**lists) == tokens_and_rows(**texts)
    assert tokens_and_rows(layers=(0, 1)) == tokens_and_rows(layers="0,1")
    assert tokens_and_rows(layers=[1]) != tokens_and_rows(layers=[0])


def test_numpy_numbers_and_ranges_equal_python_numbers() -> None:
    numbers = {"seed": np.int64(3), "temperature": np.float32(0.5), "n_verified": np.int32(1)}
    places = {"layers": range(1), "ablate": [(np.int64(1), 0)]}
    ours = minigpt.trace(MODEL, "abc", **OPTIONS, **numbers, **places)
    same = {"seed": 3, "temperature": 0.5, "n_verified": 1, "layers": "0", "ablate": "1.0"}
    expected = minigpt.trace(MODEL, "abc", **OPTIONS, **same)
    assert ours.to_jsonl().splitlines()[:-1] == expected.to_jsonl().splitlines()[:-1]


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


def test_importing_minigpt_and_its_version_import_no_torch() -> None:
    code = "import sys, minigpt; minigpt.__version__; print('torch' in sys.modules, dir(minigpt))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("False")
    for name in minigpt.__all__:
        assert getattr(minigpt, name)


@pytest.mark.integration
def test_the_code_of_the_page_about_python_runs(text: Path) -> None:
    page = Path(__file__).resolve().parents[1] / "docs/python.md"
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


@pytest.mark.parametrize(
    "options",
    [
        {"measure": "gradient"},
        {"n_verified": "all", "verify_heads": "1.0"},
        {"ablate": "0.1"},
        {"patch_from": "the"},
    ],
    ids=str,
)
def test_a_trace_adds_no_hook_to_a_model_that_other_threads_may_use(
    options: dict[str, Any],
) -> None:
    model = small_model("gpt2", vocab_size=257)
    counts: list[int] = []

    def count(*_: object) -> None:
        hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
        counts.append(sum(len(kind) for pair in hooks for kind in pair))

    changes = {"patch": "1.0"} if "patch_from" in options else {}
    with model.final_norm.register_forward_hook(count):
        minigpt.trace(
            model, "abc", tokenizer=BytesTokenizer(), max_new_tokens=2, **options, **changes
        )
    assert set(counts) == {1}


@pytest.mark.integration
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}], ids=str)
def test_threads_that_share_a_model_laid_out_for_decoding_get_their_own_text(
    options: dict[str, Any],
) -> None:
    loaded = minigpt.load("storyteller", for_decoding=True, **options)
    prompts = ["The king was", "Once upon a time there was a", "A fox"]

    def text(prompt: str) -> str:
        return minigpt.trace(loaded, prompt, temperature=0, max_new_tokens=12).text

    expected = [text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(text, prompts)) == expected


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["tensor", "array"])
def test_token_ids_may_be_a_tensor_or_an_array(make: Any) -> None:
    ids = [84, 104, 101]
    options = OPTIONS | {"seed": 1}
    expected = minigpt.trace(MODEL, ids, patch_from=ids, patch="0", **options)
    ours = minigpt.trace(MODEL, make(ids), patch_from=make(ids), patch="0", **options)
    assert str(ours) == str(expected)
    assert [str(trace) for trace in minigpt.trace(MODEL, make([ids, ids]), **options)] == [
        str(minigpt.trace(MODEL, ids, **(options | {"seed": seed}))) for seed in (1, 2)
    ]
    assert [s.text for s in minigpt.generate(MODEL, make(ids), **options)] == [
        s.text for s in minigpt.generate(MODEL, ids, **options)
    ]


@pytest.mark.integration
def test_settings_of_numpy_torch_and_pathlib_equal_those_of_python(text: Path) -> None:
    run = minigpt.train(text, name="a", **TINY)
    settings = {"n_layer": np.int64(2), "lr": np.float32(0.001), "max_steps": torch.tensor(4)}
    other = minigpt.train(text, name=np.str_("b"), **TINY | settings)
    same = minigpt.train(text, name="c", **TINY | {"lr": float(np.float32(0.001))})
    assert minigpt.evaluate(other)["nats_per_token"] == minigpt.evaluate(same)["nats_per_token"]
    assert RunFolder(minigpt.train(text, name="d", from_=run, max_steps=1)).steps() == [1]
    assert minigpt.evaluate(run, stride=np.int64(32))["stride"] == 32


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


def test_devices_and_dtypes_of_torch_equal_their_names(text: Path) -> None:
    place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    run = minigpt.train(text, name="a", save_dtype=torch.float16, **TINY | place)
    config = read_toml(run / "config.toml")["training"]
    assert [config[name] for name in ("device", "dtype", "save_dtype")] == [
        "cpu",
        "bfloat16",
        "float16",
    ]
    assert minigpt.evaluate(run, **place)["dtype"] == "bfloat16"
    loaded, named = (minigpt.load(run, **options) for options in (place, {"dtype": "bfloat16"}))
    assert loaded.model.dtype == named.model.dtype
    (step,) = minigpt.generate(run, "a", max_new_tokens=1, temperature=0, **place)
    assert minigpt.trace(run, "a", max_new_tokens=1, temperature=0, **place).text == step.text
    with pytest.raises(ConfigError, match="'float64'"):
        minigpt.load(run, dtype=torch.float64)


def test_heads_and_prompts_may_be_arrays_or_lists_of_arrays() -> None:
    options = OPTIONS | {"seed": 1}
    expected = minigpt.trace(MODEL, "abc", ablate="0.1,1.0", heads="0.0", layers=None, **options)
    for pairs in (np.array([[0, 1], [1, 0]]), torch.tensor([[0, 1], [1, 0]])):
        for ablate in (pairs, list(pairs)):
            ours = minigpt.trace(MODEL, "abc", ablate=ablate, heads=np.array([[0, 0]]), **options)
            assert [s.row.sources for s in ours.steps] == [s.row.sources for s in expected.steps]
    for make in (np.array, torch.tensor):
        prompts = [make([84, 104]), make([97])]
        assert [str(trace) for trace in minigpt.trace(MODEL, prompts, **options)] == [
            str(trace) for trace in minigpt.trace(MODEL, [[84, 104], [97]], **options)
        ]


@pytest.mark.integration
def test_train_and_evaluate_ignore_and_restore_the_callers_torch_state(text: Path) -> None:
    def losses(name: str) -> tuple[float, float]:
        run = minigpt.train(text, name=name, dropout=0.1, dropout_start=0.0, **TINY)
        found = minigpt.evaluate(run, threads=1)["nats_per_token"]
        return found, minigpt.evaluate(run, threads=1)["nats_per_token"]

    torch.manual_seed(7)
    state, n_threads = torch.get_rng_state(), torch.get_num_threads()
    expected = losses("plain")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.inference_mode(), torch.device("meta"), autocast:
        torch.set_default_dtype(torch.float64)
        try:
            assert losses("other") == expected
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_threads_train_the_same_model_as_one_call(text: Path) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        run = minigpt.train(text, name=name, dropout=0.5, dropout_start=0.0, **TINY)
        return read_model(RunFolder(run).step_folder(4)).model.state_dict()

    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(weights, ["a", "b"]))
    expected = weights("c")
    assert all(torch.equal(own[name], expected[name]) for own in ours for name in expected)


def test_the_callers_autocast_changes_no_trace() -> None:
    def trace() -> str:
        return str(minigpt.trace("storyteller", "The fox", max_new_tokens=2, seed=1, n_verified=1))

    expected = trace()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trace() == expected


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_default_dtype_of_torch_changes_no_text_or_trace(dtype: torch.dtype) -> None:
    loaded = minigpt.load("storyteller")
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "seed": 1}
    analyses: list[dict[str, Any]] = [
        {"n_verified": 2, "roles": True, "lens": True},
        {"measure": "both", "ablate": "4.1"},
        {"measure": "gradient"},
        {"measure": "norm", "patch_from": [400, 401], "patch": "2"},
    ]

    def results() -> tuple[list[str], list[float]]:
        texts = [s.text for s in minigpt.generate(loaded, "The fox", num_samples=2, **options)]
        traces = [minigpt.trace(loaded, "The fox", **options, **more) for more in analyses]
        steps = [step for trace in traces for step in trace.steps]
        weights = [source.weight for step in steps for row in step.rows for source in row.sources]
        return texts, weights + [effect.change for step in steps for effect in step.effects]

    texts, numbers = results()
    torch.set_default_dtype(dtype)
    try:
        ours = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours[0] == texts
    # Queries are knocked out together while a burst lasts, so the last digits vary.
    assert ours[1] == pytest.approx(numbers, abs=1e-4)


def test_names_and_data_of_a_wrong_type_are_refused(text: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: minigpt.train(text, name=3), "name must be text: it is of type int"),  # type: ignore[arg-type]
        (lambda: minigpt.train(3), "data must be a path or a list of paths: it is 3"),  # type: ignore[arg-type]
        (lambda: minigpt.evaluate("a", b"x"), "of type bytes"),  # type: ignore[arg-type]
        (lambda: minigpt.train(text, from_=MODEL), "from must name a model: it is of type GPT"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
