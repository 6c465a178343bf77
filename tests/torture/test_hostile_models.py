"""Untrusted configs, safetensors headers and prepared corpora are read or refused in one line."""

import json
import re
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_values import VALUES, changed, places, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupted_runs import CONFIG
from safetensors.torch import load_file, save_file
from small_models import LAYOUTS, small_config
from small_runs import trainer_of

from minigpt.checkpoint.config_json import read_config_json
from minigpt.checkpoint.families import model_config_to_hf
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import MANIFEST, verify, write_manifest
from minigpt.checkpoint.model_folder import STATE_FOLDER, read_config, read_model
from minigpt.config import DataConfig, ModelConfig, RunConfig, SamplingConfig, TrainingConfig
from minigpt.errors import CheckpointError, ConfigError, DataError, MinigptError
from minigpt.settings import build, read_toml
from minigpt.text.shard_files import open_prepared
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.reports.curves import read_curves

QUIET = settings(
    max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
CONFIGS = {name: model_config_to_hf(small_config(name), None) for name in LAYOUTS}


def refusal(error: pytest.ExceptionInfo[Exception] | None) -> None:
    """Check that a message is short."""
    assert error is None or len(str(error.value)) < 700


def read_or_refuse(config: Any) -> None:
    try:
        read_config_json(config)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 700


@pytest.mark.parametrize("layout", CONFIGS)
def test_a_config_value_of_400_digits_is_refused_by_name(layout: str) -> None:
    for name, value in CONFIGS[layout].items():
        # n_ctx is read only by other programs.
        if type(value) is int and not name.endswith("token_id") and name != "n_ctx":
            for hostile in (10**400, -(10**400), 2**63, 2**31):
                with pytest.raises(CheckpointError, match=r"config\.json: "):
                    read_config_json(CONFIGS[layout] | {name: hostile})
        else:
            read_or_refuse(CONFIGS[layout] | {name: 10**400})


@pytest.mark.integration
@QUIET
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_changed_config_is_read_or_refused(layout: str, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from([p for p in places(CONFIGS[layout]) if p]))
    read_or_refuse(changed(CONFIGS[layout], place, data.draw(values)))


@pytest.mark.torture
@pytest.mark.parametrize("layout", CONFIGS)
def test_every_value_in_every_field_of_a_config_is_read_or_refused(layout: str) -> None:
    for place in places(CONFIGS[layout]):
        for value in VALUES:
            if place:
                read_or_refuse(changed(CONFIGS[layout], place, value))


def test_settings_with_400_digits_are_refused_by_name() -> None:
    plain = {"context_length": 8, "n_layer": 1, "n_head": 1, "d_model": 8, "vocab_size": 9}
    full: dict[type, dict[str, Any]] = {
        ModelConfig: plain,
        TrainingConfig: {"max_steps": 1},
        DataConfig: {},
        SamplingConfig: {},
    }
    for cls, given_values in full.items():
        for name, hint in cls.__annotations__.items():
            if "int" in str(hint) or "float" in str(hint):
                for value in (10**400, -(10**400)):
                    with pytest.raises(ConfigError, match=name.rstrip("_")) as caught:
                        build(cls, given_values | {name: value})
                    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("cls", "name"), [(TrainingConfig, "newton_schulz_steps"), (SamplingConfig, "num_samples")]
)
def test_an_absurdly_large_count_is_refused(cls: type, name: str) -> None:
    plain = {"max_steps": 1} if cls is TrainingConfig else {}
    with pytest.raises(ConfigError, match=f"{name} must be in"):
        build(cls, plain | {name: 10**9})


def with_header(folder: Path, header: bytes, body: bytes = b"", size: int | None = None) -> None:
    n_bytes = len(header) if size is None else size
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", n_bytes) + header + body)


@pytest.mark.integration
def test_a_header_that_claims_a_million_tensors_uses_little_memory(model_folder: Path) -> None:
    one = '"t%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    with_header(model_folder, ("{" + ",".join(one % i for i in range(1_000_000)) + "}").encode())
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"its header has .* at most 4,194,304 are read"):
        read_model(model_folder)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_tensor_name_of_megabytes_is_truncated_in_the_message(model_folder: Path) -> None:
    for name in ("x" * 3_000_000, "\x1b[2J" * 100_000, "\u202e" * 100_000):
        tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        with_header(model_folder, json.dumps({name: tensor}).encode())
        with pytest.raises(CheckpointError) as caught:
            read_model(model_folder)
        assert len(str(caught.value)) < 500 + len(str(model_folder))
        assert "\x1b" not in str(caught.value)


HEADERS = st.dictionaries(
    st.sampled_from(["model.norm.weight", "a", "__metadata__", "model.embed_tokens.weight"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F8_E5M2", "X", "", "I64", None, 5]),
            "shape": st.lists(st.integers(-1, 2**63), max_size=3) | st.just("x"),
            "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3),
        },
    )
    | st.none()
    | st.integers(),
    max_size=3,
)


@pytest.mark.integration
@QUIET
@given(HEADERS | st.lists(st.integers()), st.binary(max_size=64), st.none() | st.integers(0, 2**63))
def test_any_safetensors_header_is_read_or_refused(
    model_folder: Path, header: Any, body: bytes, size: int | None
) -> None:
    with_header(model_folder, json.dumps(header).encode("utf-8", "replace"), body, size)
    with pytest.raises(CheckpointError) as caught:
        read_model(model_folder)
    refusal(caught)


@pytest.mark.integration
@QUIET
@given(st.binary(max_size=200))
def test_any_bytes_as_a_file_of_a_model_are_refused(model_folder: Path, data: bytes) -> None:
    for name in ("model.safetensors", "config.json"):
        kept = (model_folder / name).read_bytes()
        (model_folder / name).write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            read_model(model_folder)
        refusal(caught)
        (model_folder / name).write_bytes(kept)
    read_config(model_folder)


@pytest.mark.integration
@QUIET
@given(values)
def test_any_manifest_is_checked_or_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a").write_text("text")
    for manifest in (value, {"files": value}, {"files": {"a": value}}, {"files": {"../a": value}}):
        try:
            text = json.dumps(manifest)
        except TypeError:
            continue
        (tmp_path / "manifest.json").write_text(text, "utf-8")
        with pytest.raises(CheckpointError) as caught:
            verify(tmp_path, hashes=True)
        assert len(str(caught.value)) < 700


@QUIET
@given(
    st.text(max_size=60) | st.sampled_from(["a = " + "[" * 5000, "a = " + "9" * 5000, "a" * 50000])
)
def test_any_toml_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        build(RunConfig, read_toml(path))
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 700


@pytest.mark.integration
@QUIET
@given(st.binary(max_size=80), values)
def test_any_metrics_are_read_or_refused(tmp_path: Path, data: bytes, value: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    event = {"event": "step", "step": 1, "elapsed_s": 1.0, "train_loss": 2.0, "loss": 2.0}
    contents = [data + b"\n"]
    for name in event:
        try:
            contents.append(json.dumps(event | {name: value}).encode() + b"\n")
        except TypeError:
            continue
    for content in contents:
        path.write_bytes(content)
        try:
            read_curves(tmp_path)
        except CheckpointError as error:
            assert re.search("is not a line of metrics|Git LFS", str(error))  # noqa: PT017


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.txt").write_text("the king said " * 40)
    return prepare(DataConfig(paths=(str(folder / "a.txt"),)), cache_dir=folder / "cache").folder


@pytest.mark.integration
@QUIET
@given(st.data())
def test_any_changed_prepared_corpus_is_read_or_refused(
    prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("text") / "copy"
    shutil.copytree(prepared_folder, folder)
    path = folder / data.draw(st.sampled_from(["manifest.json", "vocabulary.json"]))
    content = json.loads(path.read_text())
    place = data.draw(st.sampled_from(list(places(content))))
    try:
        path.write_text(json.dumps(changed(content, place, data.draw(values))), "utf-8")
    except TypeError:
        return
    try:
        open_prepared(folder)
    except DataError as error:
        assert len(str(error)) < 900  # noqa: PT017


@pytest.fixture(scope="module")
def state_folder(data: PreparedData, begun: Path) -> Path:
    latest = RunFolder(begun).latest()
    assert latest is not None
    return latest.folder / STATE_FOLDER


@pytest.mark.integration
@QUIET
@given(draw=st.data())
def test_any_changed_training_state_is_resumed_or_refused(
    begun: Path,
    state_folder: Path,
    data: PreparedData,
    tmp_path_factory: pytest.TempPathFactory,
    draw: st.DataObject,
) -> None:
    run = tmp_path_factory.mktemp("state") / "run"
    shutil.copytree(begun, run)
    path = run / state_folder.relative_to(begun) / "progress.json"
    content = json.loads(path.read_text())
    place = draw.draw(st.sampled_from(list(places(content))))
    try:
        path.write_text(json.dumps(changed(content, place, draw.draw(values))), "utf-8")
    except TypeError:
        return
    (path.parents[1] / MANIFEST).unlink()
    write_manifest(path.parents[1], {})
    try:
        trainer = trainer_of(CONFIG, data, run, resume=True)
    except MinigptError as error:
        assert len(str(error)) < 700 + len(str(run))  # noqa: PT017
    else:
        assert 0 <= trainer.step < 2**63
        assert trainer.lr_scale >= 0


@pytest.mark.integration
@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (3,)},
        {"dtype": torch.int64},
        {"name": "nowhere/momentum_buffer"},
        {"name": "/"},
        {"name": ""},
        {"name": "\x1b[2J/step"},
    ],
)
def test_a_hostile_optimizer_state_is_refused(
    changes: dict[str, Any], begun: Path, state_folder: Path, data: PreparedData, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    path = run / state_folder.relative_to(begun) / "optimizer.safetensors"
    tensors = load_file(path)
    for old in list(tensors):
        new = dict(tensors)
        tensor = new.pop(old)
        shape = changes.get("shape", tensor.shape)
        new[changes.get("name", old)] = torch.zeros(shape, dtype=changes.get("dtype", tensor.dtype))
        save_file(new, path)
        (path.parents[1] / MANIFEST).unlink()
        write_manifest(path.parents[1], {})
        with pytest.raises(CheckpointError, match="training_state") as caught:
            trainer_of(CONFIG, data, run, resume=True)
        assert "\x1b" not in str(caught.value)
