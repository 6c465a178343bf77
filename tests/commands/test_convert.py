"""minigpt checkpoints export and import."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from calls import Run, error_line
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def tiny(trained: Path, workplace: Path) -> Path:
    """Return the run tiny."""
    return Path(shutil.copytree(trained / "checkpoints" / "tiny", "checkpoints/tiny"))


def test_export_reports_the_file_and_how_to_run_it(run: Run) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf to write GGUF files")
    result = run("checkpoints", "export", "tiny", "--gguf", "out/tiny it.gguf")
    assert (result.code, result.err) == (0, "")
    n_kb = Path("out/tiny it.gguf").stat().st_size / 1000
    assert result.out == (
        f"out/tiny it.gguf: {n_kb:.1f} kB, f16. "
        "Run it: llama-completion -p 'Once upon a time' -m 'out/tiny it.gguf'\n"
    )
    assert [path.name for path in Path("out").iterdir()] == ["tiny it.gguf"]


def test_export_and_import_suggest_no_text_prompt_without_a_vocabulary(run: Run) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf to write GGUF files")
    folder = next(Path("checkpoints/tiny").glob("step-*"))
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        (folder / name).unlink(missing_ok=True)
    result = run("checkpoints", "export", str(folder), "--gguf", "t.gguf")
    assert result.out.endswith("kB, f16\n")
    result = run("checkpoints", "export", str(folder), "--gguf", "j.gguf", "--json")
    assert json.loads(result.out)["run"] is None
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    result = run("checkpoints", "import", str(folder), "new")
    assert "so prompts and texts are token ids" in result.err
    assert result.out.endswith("minigpt generate --model new '0 1 2'\n")
    assert run("generate", "--model", "new", "0 1 2", "--max-new-tokens", "2").code == 0


def test_export_as_json_has_type_and_size(run: Run) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf to write GGUF files")
    result = run("checkpoints", "export", "tiny", "--gguf", "t.gguf", "--type", "q8_0", "--json")
    facts = json.loads(result.out)
    assert (facts["file"], facts["type"]) == ("t.gguf", "q8_0")
    assert facts["n_bytes"] == Path("t.gguf").stat().st_size
    assert facts["notes"] == []


def test_export_refuses_bad_input_in_one_line(run: Run) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf to write GGUF files")
    Path("there.gguf").write_text("mine")

    def refused(code: int, message: str, *words: str) -> None:
        result = run("checkpoints", "export", *words)
        assert result.code == code
        assert message in error_line(result)

    refused(2, "'there.gguf' exists already", "tiny", "--gguf", "there.gguf")
    refused(2, "unknown --type 'q4'", "tiny", "--gguf", "a.gguf", "--type", "q4")
    refused(2, "--gguf is empty. Give a path.", "tiny", "--gguf", "")
    refused(4, "Did you mean tiny?", "tine", "--gguf", "a.gguf")
    refused(6, "there.gguf", "tiny", "--gguf", "there.gguf/a.gguf")
    assert Path("there.gguf").read_text() == "mine"
    assert not Path("a.gguf").exists()


def test_import_reports_the_model_and_generate_opens_it(run: Run) -> None:
    text = "The king said: once upon a time.\n"
    Path("input.txt").write_text(text)
    vocab_size, width = len(set(text)), 8
    shape = {"n_layer": 1, "n_head": 2, "n_embd": width, "block_size": 16, "dropout": 0.0}
    sizes = {"attn.c_attn": (24, width), "attn.c_proj": (width, width)}
    sizes |= {"mlp.c_fc": (32, width), "mlp.c_proj": (width, 32), "ln_1": (width,)}
    names = {f"h.0.{name}": size for name, size in (sizes | {"ln_2": (width,)}).items()}
    names |= {"wte": (vocab_size, width), "wpe": (16, width), "ln_f": (width,)}
    model = {f"transformer.{name}.weight": torch.ones(size) for name, size in names.items()}
    args = shape | {"vocab_size": vocab_size, "bias": False}
    torch.save({"model": model, "model_args": args}, "ckpt.pt")
    result = run("checkpoints", "import", "ckpt.pt", "checkpoints/nano", "--vocabulary=input.txt")
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(
        r"checkpoints/nano: [\d.]+k parameters from ckpt.pt of nanoGPT. "
        r"Run it: minigpt generate --model checkpoints/nano\n",
        result.out,
    )
    assert run("checkpoints", "verify", "nano").code == 0
    assert run("generate", "--model", "nano", "--max-new-tokens", "2", "The").code == 0
    as_json = run("checkpoints", "import", "ckpt.pt", "a", "--vocabulary=input.txt", "--json")
    assert json.loads(as_json.out)["folder"] == "a"


def test_import_refuses_bad_input_in_one_line(run: Run) -> None:
    def refused(code: int, message: str, *words: str) -> None:
        result = run("checkpoints", "import", *words)
        assert result.code == code
        assert message in error_line(result)

    Path("ckpt.pt").write_bytes(b"junk")
    refused(2, "'checkpoints/tiny' exists already", "ckpt.pt", "checkpoints/tiny")
    refused(4, "'ckpt.pt' is not a complete torch.save file", "ckpt.pt", "new")
    Path("m.gguf").write_bytes(b"GGUF")
    refused(4, "'m.gguf' is a GGUF file, which minigpt writes but does not read", "m.gguf", "new")
    refused(4, "there is no 'nowhere.pt'", "nowhere.pt", "new")
    refused(2, "unknown --activation 'relu'", "ckpt.pt", "new", "--activation", "relu")
    assert not Path("new").exists()
    result = run("generate", "--model", "ckpt.pt")
    assert result.code == 4
    assert "minigpt checkpoints import ckpt.pt NEW_FOLDER" in error_line(result)
