"""Install minigpt into .venv, with PyTorch's small CPU build where there is no GPU.

    python install.py            what minigpt needs
    python install.py dev        what its tests need, too: the extras of pyproject.toml

uv does it, since it chooses the build of PyTorch and shows its progress; with it goes what pip is
configured for (mirrors, folders of wheels). Where uv cannot, pip does. Needs the standard library
only.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON, UV = BIN / "python", BIN / "uv"
# uv's variable for each setting of pip, and what separates the values in it.
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
}


def uv_environment(pip_config: str) -> dict[str, str]:
    """Return pip's indexes and folders of wheels, from `pip config list`, as variables of uv.

    The environment (`:env:`) is listed first and wins over the files, as in pip.
    """
    found: dict[str, str] = {}
    for line in pip_config.splitlines():
        name, _, value = line.partition("=")
        variable, separator = SETTINGS.get(name.rpartition(".")[2], ("", ""))
        if variable:
            words = shlex.split(value)[0].replace("\\n", " ").split()
            found.setdefault(variable, separator.join(words))
    if "UV_INDEX" in found:
        # As pip does: the best version of all indexes, not those of the first that has the name.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main() -> None:
    extras = f"[{','.join(sys.argv[1:])}]" if sys.argv[1:] else ""
    what = ["--constraint", "constraints.txt", "--editable", f".{extras}"]
    say("Installing minigpt and PyTorch into .venv, once.")
    if not PYTHON.with_suffix(".exe" if os.name == "nt" else "").exists():
        run(sys.executable, "-m", "venv", VENV, check=True)
    say("  getting uv, which installs the packages")
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "uv", stderr=subprocess.DEVNULL)
    listed = run(*pip, "config", "list", stdout=subprocess.PIPE, text=True)
    environment = uv_environment(listed.stdout) | os.environ
    say("  choosing the build of PyTorch for this machine")
    for backend in (["--torch-backend=auto"], []):
        install = [UV, "pip", "install", "--python", VENV, *backend, *what]
        try:
            # Without output first: what an index out of reach has to say is long.
            tried = run(
                *install,
                "--dry-run",
                "--quiet",
                env=environment | {"UV_HTTP_RETRIES": "1"},
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            break
        if tried.returncode == 0 and run(*install, env=environment).returncode == 0:
            return
        if backend:
            say("  PyTorch's own index is out of reach; taking PyTorch from your package index")
    say("uv cannot install it, so pip does.")
    sys.exit(run(*pip, "install", *what).returncode)


def run(*words, **options):
    """Run a command in this folder."""
    return subprocess.run([str(word) for word in words], cwd=ROOT, **options)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
