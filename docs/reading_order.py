"""Print the core of minigpt in reading order, with line counts; --write puts it into the README.

The core is every module that belongs to no ring; pyproject.toml, [tool.minigpt], lists both the
rings and the order of the core's parts. Lines of code exclude blank lines, comments and docstrings.
"""

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- reading order: begin -->\n", "<!-- reading order: end -->\n"


def core_files() -> list[Path]:
    """Return the files of the package that belong to no ring."""
    rings = _settings()["rings"]
    removed = [ROOT / path for paths in rings.values() for path in paths]
    return [
        path
        for path in sorted((ROOT / "minigpt").rglob("*.py"))
        if not any(path == ring or ring in path.parents for ring in removed)
    ]


def table() -> str:
    """Return the reading order as a Markdown table."""
    left = core_files()
    rows, total, total_code = [], 0, 0
    for part in _settings()["reading_order"]:
        files = [ROOT / "minigpt" / name for name in part["files"]]
        names = [f"`{name}`" for name in part["files"]]
        folder = ROOT / "minigpt" / part["rest_of"]
        is_top = not part["rest_of"]  # the modules outside any sub-package
        rest = [p for p in left if (p.parent == folder if is_top else folder in p.parents)]
        files += [path for path in rest if path not in files]
        left = [path for path in left if path not in files]
        n_lines, n_code = sum(map(_n_lines, files)), sum(map(_n_code, files))
        total, total_code = total + n_lines, total_code + n_code
        rows.append(f"| {part['what']} | {', '.join(names)} | {n_lines:,} | {n_code:,} |")
    if left:
        names = ", ".join(str(path.relative_to(ROOT)) for path in left)
        raise SystemExit(f"reading_order in [tool.minigpt] does not list {names}")
    head = [
        "| read | files, most important first | lines | of code |",
        "| --- | --- | ---: | ---: |",
    ]
    return "\n".join([*head, *rows, f"| the core | | {total:,} | {total_code:,} |"]) + "\n"


def _n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _n_code(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    docstrings = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and n not in docstrings for n, line in lines)


def _settings() -> dict:  # type: ignore[type-arg]
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["minigpt"]


def readme_with(text: str) -> str:
    """Return the README with this table."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{text}{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        (ROOT / "README.md").write_text(readme_with(table()), encoding="utf-8")
    else:
        sys.stdout.write(table())
