"""The distribution: its name in messages and pages, its contents and its installation."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from minigpt.errors import DISTRIBUTION, install_extra

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = {".py", ".md", ".toml", ".txt", ".ipynb", ".sh", ".js", ".html", ""}


def our_texts() -> dict[str, str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs a git checkout to list the project's files")
    paths = [Path(name) for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return {str(path): (ROOT / path).read_text() for path in paths if path.suffix in TEXTS}


def clone_sources(folder: Path) -> Path:
    """Copy the files from which the distribution is built."""
    clone = folder / "minigpt"
    shutil.copytree(
        ROOT / "minigpt", clone / "minigpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    return clone


def test_the_distribution_does_not_use_the_name_taken_on_pypi() -> None:
    assert PROJECT["name"] == DISTRIBUTION != "minigpt"
    assert PROJECT["scripts"].keys() == {"minigpt"}


def test_install_hints_name_extras_that_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "minigpt").rglob("*.py"))
    extras = set(re.findall(r"install_extra\([\"'](\w+)", sources))
    assert {"plot", "hub", "tensorboard"} <= extras <= PROJECT["optional-dependencies"].keys()
    assert install_extra("plot") == f"pip install '{DISTRIBUTION}[plot]'"


def test_no_file_recommends_the_unrelated_package_on_pypi() -> None:
    # A string literal may continue on the next line.
    stranger = re.compile(
        r"pip\s+install[\s\"'f\\]+(-\S+\s+)*minigpt(?![\w-])|[\"'\s]minigpt\[[a-z,]+\]"
    )
    assert stranger.search("pip install 'minigpt[plot]'")
    assert stranger.search("pip install --upgrade minigpt")
    assert not stranger.search(install_extra("plot"))
    ours = {
        name: text for name, text in our_texts().items() if name != "tests/test_installation.py"
    }
    assert {name: found[0] for name, text in ours.items() if (found := stranger.search(text))} == {}


@pytest.mark.integration
def test_an_editable_install_is_found_from_the_folder_of_the_clone(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="needs setuptools to build without a network")
    clone = clone_sources(tmp_path)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    site_packages = next(path for path in sys.path if path.endswith("site-packages"))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*install, "--disable-pip-version-check", "-e", clone],
        env=clean | {"PYTHONPATH": site_packages},
        check=True,
        timeout=120,
    )
    code = "import minigpt, importlib.metadata as m; print(minigpt.__file__, m.version('{}'))"
    for folder in (tmp_path, clone, venv):
        found = subprocess.run(
            [python, "-c", code.format(DISTRIBUTION)],
            cwd=folder,
            env=clean,
            capture_output=True,
            text=True,
        )
        expected = f"{clone / 'minigpt' / '__init__.py'} {PROJECT['version']}"
        assert (found.stdout.strip(), found.stderr) == (expected, ""), folder


@pytest.mark.integration
def test_sdist_and_wheel_contain_the_model_and_the_tales(tmp_path: Path) -> None:
    build_meta = pytest.importorskip("setuptools.build_meta", reason="needs setuptools to build")
    clone = clone_sources(tmp_path)
    model = clone / "checkpoints/storyteller"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (clone / "checkpoints/mine").mkdir()
    (clone / "checkpoints/mine/config.json").write_text("{}")
    build = "import setuptools.build_meta as b, sys; b.build_{}(sys.argv[1])"
    assert build_meta
    for kind in ("sdist", "wheel"):
        subprocess.run(
            [sys.executable, "-c", build.format(kind), tmp_path],
            cwd=clone,
            check=True,
            capture_output=True,
            timeout=120,
        )
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        names = [name.partition("/")[2] for name in packed.getnames()]
    assert {"checkpoints/storyteller/config.json", "minigpt/text/tales.txt"} <= set(names)
    assert not any("mine" in name for name in names)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    data = {"minigpt/storyteller/config.json", "minigpt/py.typed", "minigpt/text/tales.txt"}
    assert data <= set(names)
    assert not any("mine" in name for name in names)


def test_the_workflows_run_the_make_targets_of_ci() -> None:
    targets = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert targets
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    tests = re.search(r"^test:.*\n\t\$\(BIN\)/python -m pytest (.*)$", makefile, re.MULTILINE)
    assert tests
    flat = re.sub(r"\s+", " ", workflow)
    assert tests[1].replace("'", '"') in flat
    for target in set(targets) - {"test"}:
        assert re.search(rf"[ \[]{target}\b", workflow), target
    for minor in range(11, 15):
        assert f'"3.{minor}"' in workflow


def test_uv_gets_the_indexes_and_folders_that_pip_is_configured_for() -> None:
    uv_environment = runpy.run_path(str(ROOT / "install.py"))["uv_environment"]
    listed = (
        ":env:.find-links='/wheels /more wheels'\n"
        ":env:.cert='/etc/cert.pem'\n"
        "global.extra-index-url='file:///a/simple\\nfile:///b/simple'\n"
        "global.find-links='/not/these'\n"
        "global.index-url='https://mirror/simple'\n"
    )
    assert uv_environment(listed) == {
        "UV_FIND_LINKS": "/wheels,/more,wheels",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://mirror/simple",
    }
    assert uv_environment("") == {}


@pytest.mark.parametrize("code", [0, 2])
def test_pip_output_is_shown_only_if_the_installation_fails(
    code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    install = runpy.run_path(str(ROOT / "install.py"))["install_with_progress"]
    program = "import sys; sys.stderr.write('Resolved 2 packages\\n + torch==2\\n'); sys.exit({})"
    done = install(sys.executable, "-c", program.format(code), env=dict(os.environ))
    shown = capfd.readouterr().out
    assert done == (code == 0)
    assert ("installed in" in shown) == done
    assert ("+ torch==2" in shown) != done


@pytest.mark.skipif(os.name == "nt", reason="needs a shell script in place of Python")
def test_an_environment_without_pip_counts_as_interrupted(tmp_path: Path) -> None:
    has_pip = runpy.run_path(str(ROOT / "install.py"))["has_pip"]
    python = has_pip.__globals__["PYTHON"] = tmp_path / "python"
    assert not has_pip()
    for code in (0, 1):
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
        assert has_pip() == (code == 0)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_shows_each_target_with_its_whole_description() -> None:
    described = re.findall(r"^([a-z-]+):.*?## (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    )
    assert [tuple(line.split(maxsplit=1)) for line in shown.stdout.splitlines()] == described


def test_install_and_demo_need_the_standard_library_only() -> None:
    for name in ("install.py", "demo.py"):
        imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / name).read_text(), re.MULTILINE)
        assert set(imported) <= sys.stdlib_module_names, name


def test_cli_in_another_environment_says_which_package_is_missing_and_the_remedy() -> None:
    command = [sys.executable, "-S", "cli.py", "--version"]  # -S: without installed packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: typer is not installed for {sys.executable}. ")
    assert "install.py" in line


def test_demo_in_another_environment_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(ROOT / "demo.py"))["main"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match=r"^error: minigpt is not installed for .* install\.py"):
        main()


def test_a_checkout_on_windows_keeps_line_endings() -> None:
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()
    assert not [name for name, text in our_texts().items() if "\r\n" in text]
