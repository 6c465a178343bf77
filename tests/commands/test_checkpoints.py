"""minigpt checkpoints list, show and verify; test_pruning.py has prune."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import ROOT, Run, error_line, flip_a_byte
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from minigpt.checkpoint.tools import inspection
from minigpt.checkpoint.tools.inspection import describe
from minigpt.checkpoint.tools.inventory import take_inventory
from minigpt.commands import app, tables
from minigpt.commands.checkpoints.views import inventory_lines, model_lines

pytestmark = pytest.mark.usefixtures("runs")
NAMES = ["list", "show", "verify", "prune", "average", "export", "import"]


def test_the_list_agrees_with_json_and_the_log(run: Run, runs: Path) -> None:
    shown, as_json = run("checkpoints", "list"), run("checkpoints", "list", "--json")
    assert (shown.code, shown.err, as_json.code, as_json.err) == (0, "", 0, "")
    document = json.loads(as_json.out)
    assert document["folder"] == "checkpoints"
    tiny, plain = document["entries"]
    assert [tiny["name"], plain["name"]] == ["tiny", "plain"]
    log = (runs / "checkpoints" / "tiny" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in log if '"eval"' in line][-1]
    step = tiny["checkpoints"][0]
    assert step["step"] == last["step"] == 4
    assert step["val_loss"] == last["val_loss"]
    assert step["bits_per_byte"] == last["bits_per_byte"]
    assert step["layout"] == plain["checkpoints"][0]["layout"] == "qwen3"
    lines = shown.out.splitlines()
    assert lines[0].split() == ["step", "nats/token", "bits/byte", "size", "written"]
    assert lines[2] == "tiny  qwen3"
    losses = f" 4 +{step['val_loss']:.4f} +{step['bits_per_byte']:.4f} "
    assert re.match(
        losses + r" +\d+(\.\d+)? [kM]B  \d{4}-\d\d-\d\d \d\d:\d\d  latest$", lines[3][4:]
    )
    assert re.match(r" 2 +1\.2500 +1\.7500  .*  best$", lines[5][4:])
    assert lines[8] == "plain  qwen3"
    assert not any(line.endswith(" ") for line in lines)


def test_the_list_accepts_a_folder_or_a_run_and_marks_damage(run: Run, runs: Path) -> None:
    (runs / "checkpoints" / "tiny" / "step-000003" / "model.safetensors").unlink()
    for spec in ("tiny", "checkpoints/tiny", "checkpoints"):
        result = run("checkpoints", "list", spec)
        assert result.code == 0
        assert [line.split()[0] for line in result.out.splitlines() if "damaged" in line] == ["3"]
        assert ("plain" in result.out) == (spec == "checkpoints")
    result = run("checkpoints", "list", "tinny")
    assert "no run or model 'tinny'. Did you mean tiny?" in error_line(result)
    assert result.code == 4


def test_an_empty_list_is_a_note_on_stderr(run: Run, runs: Path) -> None:
    (runs / "empty").mkdir()
    result = run("checkpoints", "list", "empty")
    assert (result.code, result.out) == (0, "")
    assert "`minigpt train`" in result.err
    shutil.rmtree(runs / "checkpoints")
    assert run("checkpoints", "list").code == 0
    assert json.loads(run("checkpoints", "list", "--json").out)["entries"] == []
    assert run("checkpoints", "verify").code == 0


HOSTILE = "\x1b]0;title\x07\n\t\u202e\udcff" + "n" * 90


def test_hostile_names_are_escaped_on_one_line(run: Run, runs: Path) -> None:
    folder = runs / "checkpoints" / HOSTILE
    shutil.move(runs / "checkpoints" / "plain", folder)
    (folder / "generation_config.json").unlink()
    for words in (["list"], ["verify"], ["show", f"checkpoints/{HOSTILE}"]):
        result = run("checkpoints", *words)
        assert (result.code, result.err) == (0, "")
        shown = [line for line in result.out.split("\n") if "title" in line]
        assert len(shown) == 1
        assert r"\x1b]0;title\x07\n\t\u202e\udcff" in shown[0]
        assert result.out.replace("\n", "").isprintable()
    entries = json.loads(run("checkpoints", "list", "--json").out)["entries"]
    assert HOSTILE in [entry["name"] for entry in entries]
    (folder / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
    for words in (["list"], ["verify"]):
        out = run("checkpoints", *words).out
        assert out.replace("\n", "").isprintable()
        assert len(out.split("\n")) == (11 if words == ["list"] else 6)


def test_the_list_fits_80_columns(runs: Path, run: Run) -> None:
    entries = take_inventory(runs / "checkpoints")
    assert all(line.cell_len <= 80 for line in inventory_lines(entries, 80))
    facts = describe(runs / "checkpoints" / "plain")
    heading, *lines = model_lines(facts, 80)
    assert heading.plain == str(runs / "checkpoints" / "plain")
    assert all(line.cell_len <= 80 for line in lines)
    assert any("…" in line.plain for line in list(model_lines(facts, 50)))
    assert not any("…" in line.plain for line in model_lines(facts, None))


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_shows_losses_and_marks_of_checkpoints(runs: Path, width: int) -> None:
    lines = list(map(str, inventory_lines(take_inventory(runs / "checkpoints"), width)))
    assert max(map(len, lines)) <= width
    assert lines[0].split()[:2] == ["step", "nats/token"]
    assert any(line.endswith("latest") for line in lines)


def test_facts_are_wrapped_at_spaces_below_their_column(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"MLP": "gated", "attention": "scaled_dot, 6 heads of 32, 2 key/value heads"}
    monkeypatch.setattr(tables, "line_width", lambda: 30)
    assert list(map(str, tables.fact_lines(facts))) == [
        "MLP        gated",
        "attention  scaled_dot, 6 heads",
        "           of 32, 2 key/value",
        "           heads",
    ]


def test_show_lists_every_tensor_in_json_and_identical_blocks_once(run: Run, runs: Path) -> None:
    facts = json.loads(run("checkpoints", "show", "plain", "--json").out)
    stored = load_file(runs / "checkpoints" / "plain" / "model.safetensors")
    assert {t["name"]: t["shape"] for t in facts["tensors"]} == {
        name: list(tensor.shape) for name, tensor in stored.items()
    }
    assert {t["file"] for t in facts["tensors"]} == {"model.safetensors"}
    assert facts["n_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert facts["n_bytes"] == 4 * facts["n_parameters"]
    assert (facts["config"]["n_layer"], facts["config"]["model_type"]) == (2, "qwen3")
    # keys and values of two layers and two heads of width 8, in four or two bytes
    assert facts["float32_cache_bytes_per_token"] == 2 * 2 * 16 * 4
    assert facts["bfloat16_cache_bytes_per_token"] == 2 * 2 * 16 * 2
    shown = run("checkpoints", "show", "plain")
    assert (shown.code, shown.err) == (0, "")
    assert f"{facts['n_parameters']:,}, stored in" in shown.out
    assert re.search(r"(?m)^model\.layers\.0-1 +2 x \d+(\.\d+)? kB$", shown.out)
    assert re.search(r"(?m)^  self_attn\.q_proj\.weight +F32    16 x 16 +1\.02 kB$", shown.out)
    assert shown.out.count("q_proj") == 1


def test_different_blocks_are_shown_separately(run: Run, runs: Path) -> None:
    path = runs / "checkpoints" / "plain" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].half()}, path)
    out = run("checkpoints", "show", "plain").out
    assert re.search(r"(?m)^model\.layers\.0 +1 x ", out)
    assert re.search(r"(?m)^model\.layers\.1 +1 x ", out)
    assert "(F32, F16)" in out


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("linear", "stretched 4 times (linear)"),
        ("dynamic", "stretched only beyond the context (dynamic)"),
    ],
)
def test_show_says_where_rope_is_stretched(run: Run, runs: Path, kind: str, shown: str) -> None:
    path = runs / "checkpoints" / "plain" / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | {"rope_scaling": {"rope_type": kind, "factor": 4.0}}))
    result = run("checkpoints", "show", "plain")
    assert result.code == 0
    assert f", {shown}\n" in result.out


def test_show_accepts_every_form_of_model_name(run: Run) -> None:
    newest = json.loads(run("checkpoints", "show", "--json").out)
    assert newest["folder"] == "checkpoints/tiny/step-000002"  # the best step
    step = json.loads(run("checkpoints", "show", "checkpoints/tiny/step-000001", "--json").out)
    assert step["folder"] == "checkpoints/tiny/step-000001"
    result = run("checkpoints", "show", "tinny")
    assert "Did you mean tiny?" in error_line(result)
    assert result.code == 4


def test_verify_checks_all_folders_before_failing(run: Run, runs: Path) -> None:
    good = run("checkpoints", "verify")
    assert (good.code, good.err) == (0, "")
    assert len(good.out.splitlines()) == 5
    assert good.out.splitlines()[0] == "ok   checkpoints/tiny/step-000004  as written, by SHA-256"
    assert good.out.splitlines()[4].startswith("ok   checkpoints/plain  no manifest; ")
    flip_a_byte(runs / "checkpoints" / "tiny" / "step-000004")
    bad = run("checkpoints", "verify", "tiny", "plain")
    assert bad.code == 4
    assert [line[:3] for line in bad.out.splitlines()] == ["bad", "ok ", "ok ", "ok ", "ok "]
    assert "'model.safetensors' has changed" in bad.out.splitlines()[0]
    assert bad.err == (
        "error: bad checkpoints: 1 of 5. Use another one, or write or download it again.\n"
    )
    lines = [json.loads(line) for line in run("checkpoints", "verify", "--json").out.splitlines()]
    assert [line["problem"] is None for line in lines] == [False, True, True, True, True]
    assert [line["has_manifest"] for line in lines] == [True, True, True, True, False]
    assert run("checkpoints", "verify", "checkpoints/tiny/step-000002").code == 0


def test_verify_reports_an_unreadable_name_as_bad_and_checks_the_others(
    run: Run, runs: Path
) -> None:
    (runs / "lora").mkdir()
    (runs / "lora" / "adapter_config.json").touch()
    result = run("checkpoints", "verify", "plain", "lora", "nowhere", "tiny")
    lines = result.out.splitlines()
    assert [line[:3] for line in lines] == ["ok ", "bad", "bad", *["ok "] * 4]
    assert lines[1].startswith("bad  lora  'lora' is an adapter (LoRA)")
    assert lines[2].startswith("bad  nowhere  there is no model 'nowhere'")
    assert result.code == 4
    assert result.err.startswith("error: bad checkpoints: 2 of 7. ")


def test_verify_compares_the_headers_of_a_folder_without_manifest(run: Run, runs: Path) -> None:
    path = runs / "checkpoints" / "plain" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 17}))
    result = run("checkpoints", "verify", "plain")
    assert result.code == 4
    assert re.match(r"bad  checkpoints/plain  .*has shape \[16, 16\], not \[16, 17\]", result.out)


def test_a_step_pruned_during_verify_is_not_reported(
    run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = inspection.check

    def remove_and_check(folder: Path, **options: Any) -> Any:
        shutil.rmtree(runs / "checkpoints" / "tiny" / "step-000001", ignore_errors=True)
        return check(folder, **options)

    monkeypatch.setattr(inspection, "check", remove_and_check)
    result = run("checkpoints", "verify", "tiny")
    assert (result.code, len(result.out.splitlines())) == (0, 3)


def help_of(*words: str) -> str:
    result = CliRunner().invoke(
        app, ["checkpoints", *words, "--help"], env={"COLUMNS": "80"}, prog_name="minigpt"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_help_lists_the_commands_and_fits_80_columns(run: Run) -> None:
    text = help_of()
    listed = re.findall(r"(?m)^  ([a-z-]+)  +[A-Z].*[^.]$", text.split("Commands:")[1])
    assert listed == NAMES
    for words in ((), *((name,) for name in NAMES)):
        lines = help_of(*words).splitlines()
        assert all(len(line) <= 80 for line in lines)
        columns = {
            match.end()
            for line in lines
            if (match := re.match(r"  (?=[A-Z-])\S.*?  +(?=\S)", line)) and "  " in line.strip()
        }
        assert len(columns) == 1, "all groups must be aligned in one column"
    without = run("checkpoints")
    assert (without.code, without.out) == (2, "")
    assert without.err == run("checkpoints", "--help").out
    result = run("checkpoints", "lst")
    assert "unknown command 'lst'. Did you mean list?" in error_line(result)
    assert result.code == 2


@pytest.mark.integration
@pytest.mark.parametrize(
    "words", [["--help"], ["show", "--help"], ["list"], ["prune", "tiny", "--yes"]]
)
def test_commands_without_weights_do_not_import_torch(runs: Path, words: list[str]) -> None:
    program = (
        "import sys\n"
        "from minigpt.commands import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "checkpoints",
            *words,
            *(["--yes"] * (words[0] == "prune")),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert (done.returncode, b"AssertionError" in done.stderr) == (0, False)
