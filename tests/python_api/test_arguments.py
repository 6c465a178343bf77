"""Types of arguments in Python: those of NumPy, torch and pathlib are taken, others refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_calls import MODEL, OPTIONS, TINY

import minigpt
from minigpt.checkpoint.folder import RunFolder
from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.settings import read_toml


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


def test_arguments_that_cannot_be_used_are_refused(text: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: minigpt.train(text, name=3), "name must be text: it is of type int"),  # type: ignore[arg-type]
        (lambda: minigpt.train(3), "data must be a path or a list of paths: it is 3"),  # type: ignore[arg-type]
        (lambda: minigpt.evaluate("a", b"x"), "of type bytes"),  # type: ignore[arg-type]
        (lambda: minigpt.train(text, from_=MODEL), "from must name a model: it is of type GPT"),
        (lambda: minigpt.train(text, shard=True), "but this is the only one. Start them with"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_dir_lists_every_public_name_for_completion() -> None:
    assert set(minigpt.__all__) <= set(dir(minigpt))
