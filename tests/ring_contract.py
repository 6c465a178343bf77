"""An import-linter contract: the core imports no ring."""

import tomllib
from pathlib import Path
from typing import Any

from importlinter.contracts.protected import ProtectedContract


class RingContract(ProtectedContract):
    """Only rings import rings, which are listed in [tool.minigpt.rings] of pyproject.toml."""

    type_name = "rings"

    def __init__(
        self, name: str, session_options: dict[str, Any], contract_options: dict[str, Any]
    ) -> None:
        settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
        rings = settings["tool"]["minigpt"]["rings"].values()
        modules = [path.removesuffix(".py").replace("/", ".") for ring in rings for path in ring]
        lists = {"protected_modules": modules, "allowed_importers": modules}
        super().__init__(name, session_options, contract_options | lists)
