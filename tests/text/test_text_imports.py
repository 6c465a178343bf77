"""The import cost of minigpt.text."""

import subprocess
import sys


def test_importing_minigpt_text_does_not_import_torch() -> None:
    modules = [
        "batches",
        "building",
        "corpus",
        "datasets",
        "prepared_folders",
        "tokens",
        "tokenizer",
    ]
    lines = [f"import minigpt.text.{name}" for name in modules]
    code = "; ".join([*lines, "import sys; print('torch' in sys.modules)"])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
