"""Install minigpt into .venv, with PyTorch's small CPU build if there is no GPU.

    python install.py            the dependencies of minigpt
    python install.py dev        also those of its tests: any extras of pyproject.toml

uv is used because it can choose the build of PyTorch, with the settings of pip (mirrors, folders
of wheels). If uv fails, pip is used. This script needs the standard library only.
"""

import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON, UV = BIN / "python", BIN / "uv"
# uv's variable for each setting of pip, and the separator of its values.
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
}


def uv_environment(pip_config: str) -> dict[str, str]:
    """Return pip's indexes and folders of wheels, from `pip config list`, as variables of uv.

    The environment (`:env:`) is listed first and takes precedence over the files, as in pip.
    """
    found: dict[str, str] = {}
    for line in pip_config.splitlines():
        name, _, value = line.partition("=")
        variable, separator = SETTINGS.get(name.rpartition(".")[2], ("", ""))
        if variable:
            words = shlex.split(value)[0].replace("\\n", " ").split()
            found.setdefault(variable, separator.join(words))
    if "UV_INDEX" in found:
        # As in pip: the best version of all indexes, not that of the first one with the package.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main() -> None:
    extras = f"[{','.join(sys.argv[1:])}]" if sys.argv[1:] else ""
    requirements = ["--constraint", "constraints.txt", "--editable", f".{extras}"]
    say("Installing minigpt and PyTorch into .venv, once.")
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    if not has_pip() and (failed := run(sys.executable, "-m", "venv", VENV).returncode):
        sys.exit(failed)  # it has printed the remedy, such as a package of Debian
    say("  installing uv, which installs the packages")
    run(*pip, "install", "--quiet", "uv", stderr=subprocess.DEVNULL)
    listed = run(*pip, "config", "list", stdout=subprocess.PIPE, text=True)
    environment = uv_environment(listed.stdout) | os.environ
    say("  choosing the build of PyTorch for this machine")
    for backend in (["--torch-backend=auto"], []):
        install = [UV, "pip", "install", "--python", VENV, *backend, *requirements]
        try:
            # A dry run without output first: the errors of an unreachable index are long.
            tried = run(
                *install,
                "--dry-run",
                "--quiet",
                env=environment | {"UV_HTTP_RETRIES": "1"},
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            break
        if tried.returncode == 0 and install_with_progress(*install, env=environment):
            return
        if backend:
            say("  PyTorch's own index cannot be used; using PyTorch from your package index")
    say("uv failed; installing with pip.")
    sys.exit(run(*pip, "install", *requirements).returncode)


def has_pip() -> bool:
    """Return whether .venv has pip, which is missing if its creation was interrupted."""
    is_there = PYTHON.with_suffix(".exe" if os.name == "nt" else "").exists()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return is_there and not run(PYTHON, "-m", "pip", "--version", **quiet).returncode


def install_with_progress(*words, env: dict[str, str]) -> bool:
    """Run uv and show its progress in one line, instead of a list of packages.

    Its output is printed if it fails. Returns: whether it succeeded.
    """
    output, task, started = [], "", time.monotonic()
    is_live, width = sys.stdout.isatty(), 0
    command = [str(word) for word in words]
    pipe = {"stderr": subprocess.PIPE, "text": True, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipe) as process:
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr])
        reader.start()
        while reader.is_alive() or not lines.empty():
            try:
                output.append(lines.get(timeout=0.25))
                task = current_task(output[-1]) or task
            except queue.Empty:
                pass
            if is_live:
                width = max(shutil.get_terminal_size().columns - 1, 20)
                line = f"  installing, {time.monotonic() - started:.0f} s: {task}"
                print(f"\r{line[:width]:<{width}}", end="", flush=True)
    if is_live:
        print(f"\r{'':<{width}}\r", end="")
    if process.returncode:
        say("".join(output))
        return False
    say(f"  installed in {time.monotonic() - started:.0f} s")
    return True


def current_task(line: str) -> str:
    """Return the task in a line of uv's output; empty for an entry of its list of packages."""
    words = line.split()
    return "" if not words or words[0] in "+-~" else " ".join(words)


def run(*words, **options):
    """Run a command in this folder."""
    return subprocess.run([str(word) for word in words], cwd=ROOT, **options)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
