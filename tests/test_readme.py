"""README, guide and tutorial are correct: every command that they show runs, in order."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minigpt.commands import app

ROOT = Path(__file__).resolve().parents[1]

# The same commands with a model small enough to train in a second.
TINY = shlex.split(
    "--max-steps 2 --context-length 32 --batch-size 2 --set model.d_model=16 "
    "--set model.n_head=4 --set model.d_mlp=16 --set training.micro_batch_size=2"
)
TINY_COMPARED = shlex.split(
    "--budget steps:2 --seeds 1 --tokenizer bytes --set model.context_length=32 "
    "--set training.batch_size=2 --set model.d_model=32 --set model.n_head=4"
)
TINY_FROM = shlex.split("--max-steps 2 --context-length 32 --batch-size 2")


def shown_commands(page: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = []
    for block in blocks:
        # In a block with outputs, commands follow a shell prompt.
        commands = re.findall(r"^\$ (.*)$", block, re.MULTILINE) or block.splitlines()
        lines += [line for line in commands if "minigpt " in line]
    return lines


def run(line: str) -> tuple[int, str]:
    before, _, command = line.rpartition("| ")
    given = shlex.split(before)[1] + "\n" if before else None
    arguments = shlex.split(command)[1:]
    if arguments[0] == "train" and "--resume" not in arguments:
        arguments += TINY_FROM if "--from" in arguments else TINY
        if "--arch" in arguments:
            # A recurrent model has one head and no MLP.
            arguments += ["--set", "model.n_head=1", "--set", "model.d_mlp=0"]
    elif arguments[0] == "train":
        arguments[arguments.index("--max-steps") + 1] = "4"
    elif arguments[0] == "compare":
        arguments += TINY_COMPARED
    elif "prune" in arguments:
        arguments.append("--yes")
    elif arguments[0] in ("generate", "attention-trace") and not (
        {"--max-new-tokens", "--replay", "--diff"} & {*arguments}
    ):
        arguments += ["--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input=given)
    return result.exit_code, f"{line}\n{result.output}\n{result.exception!r}"


@pytest.mark.integration
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(f"docs/{name}.md" for name in ("guide", "tutorial", "worksheet", "reading-a-trace")),
    ],
)
def test_every_command_that_a_page_shows_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path / "cache"))
    text = "The king said: once upon a time there was a book. To be, or not to be!\n" * 60
    for name in ("my-book.txt", "my-letters.txt"):
        (tmp_path / name).write_text(text)
    commands = shown_commands(page)
    assert commands
    for line in commands:
        code, output = run(line)
        assert code == 0, output


def test_the_first_two_commands_are_demo_and_test() -> None:
    first_block = re.search(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first_block is not None
    targets = [line.split("#")[0].strip() for line in first_block[1].splitlines()]
    assert targets == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo: $(RUNTIME)" in makefile, "make demo must not install more than it needs"
    assert "\ntest: $(INSTALLED)" in makefile


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


PAGES = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").glob("**/*.md")),
    ROOT / "checkpoints" / "storyteller" / "README.md",
]
EXTERNAL_OPTIONS = {"shutdown-timeout", "max-restarts", "logdir", "softcap"}
"""Options of torchrun, TensorBoard and an example."""


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub generates for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_to_a_page_and_a_heading(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", prose(page)):
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_and_files_that_a_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # the changelog names options of earlier versions
    help_pages = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "tests" / "commands" / "help").iterdir()
    )
    scripts = [path for name in ("benchmarks", "docs") for path in (ROOT / name).glob("*.py")]
    options = set(re.findall(r"--(?:\[no-\])?([a-z][\w-]*)", help_pages))
    for script in scripts:
        options |= set(re.findall(r'"--([a-z][\w-]*)', script.read_text(encoding="utf-8")))
    named = re.findall(r"(?:`|minigpt [^`\n]*?)--(?:no-)?([a-z][\w-]*)", prose(page))
    assert {*named} <= options | EXTERNAL_OPTIONS

    folders = ("minigpt", "tests", "docs", "benchmarks", "examples")
    files = {path.as_posix() for name in folders for path in (ROOT / name).rglob("*.py")}
    files |= {path.as_posix() for path in ROOT.glob("*.py")}
    for name in re.findall(r"(?:[\w-]+/)+[a-z_]+\.py\b", prose(page)):
        assert any(path.endswith("/" + name) for path in files), name
    for test, words in re.findall(r"pytest[^`]*? (tests/\S+\.py) -k \"?([\w ]+)", prose(page)):
        source = (ROOT / test).read_text(encoding="utf-8")
        for word in words.split(" or "):
            assert re.search(rf"def test_\w*{word}", source), f"{test} -k {word}"


def test_the_pages_of_the_commands_equal_their_help() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "outputs.py"))
    shown = {path.name: path.read_text() for path in (ROOT / "docs" / "commands").iterdir()}
    assert shown == module["command_pages"](), "run make docs, or docs/outputs.py --commands"


@pytest.mark.integration
def test_the_reading_order_names_the_core_with_its_line_counts() -> None:
    script = [sys.executable, str(ROOT / "docs" / "reading_order.py")]
    now = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("reading order: begin -->\n")[1].split("<!-- reading order: end")[0]
    number = re.compile(r"([\d,]+) \|$", re.MULTILINE)
    assert number.sub("", shown) == number.sub("", now), "run docs/reading_order.py --write"
    counts = [[int(n.replace(",", "")) for n in number.findall(text)] for text in (shown, now)]
    # Exact counts would make every change edit the README; `make format` writes them.
    assert counts[0] == pytest.approx(counts[1], rel=0.05), "run docs/reading_order.py --write"


def test_options_that_the_pages_name_exist() -> None:
    helps = "".join(p.read_text() for p in (ROOT / "tests" / "commands" / "help").glob("*.txt"))
    known = set(re.findall(r"--[a-z][a-z-]+", helps.replace("--[no-]", "--")))
    known |= {f"--no-{name}" for name in re.findall(r"--\[no-\]([a-z-]+)", helps)}
    pages = ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
    for page in pages:
        if page in ("docs/decoding.md", "docs/gpu.md", "docs/scaling.md", "docs/training.md"):
            continue  # options of benchmarks and of other programs
        text = re.sub(r".*(benchmarks/|tensorboard --).*", "", (ROOT / page).read_text())
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert named <= known | {"--nproc-per-node"}, page
