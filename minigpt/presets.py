"""Named starting points for a run: architecture, budget and settings that fit each other.

Every value can be changed by an option, a TOML file or --set.
"""

import tomllib
from pathlib import Path
from typing import Any

from minigpt.config import RunConfig
from minigpt.errors import require_choice
from minigpt.settings import build, merge

DEFAULT_PRESET = "nano"
PRESETS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("presets.toml").read_text(encoding="utf-8")
)
"""Settings of each preset, nested as in RunConfig."""


def preset(name: str) -> dict[str, Any]:
    """Return a preset's settings, nested as in RunConfig.

    Raises: ConfigError for an unknown name, with the nearest known one.
    """
    require_choice("preset", name, PRESETS)
    return merge(PRESETS[name])


def default_run() -> RunConfig:
    """Return the settings of the default preset, with a placeholder for the vocabulary size."""
    return build(RunConfig, merge(preset(DEFAULT_PRESET), {"model": {"vocab_size": 257}}))
