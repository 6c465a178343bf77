"""A note about sampling options that a model folder suggests; minigpt has its own defaults."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from minigpt.checkpoint.manifest import MANIFEST
from minigpt.checkpoint.model_folder import GENERATION_CONFIG
from minigpt.config import SamplingConfig
from minigpt.console import note
from minigpt.errors import ConfigError
from minigpt.files import read_json
from minigpt.settings import build

_DEFAULTS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "max_new_tokens": None,
}
"""Options of transformers with the same name and meaning here, and their defaults there."""
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")  # without do_sample, it ignores them


def note_suggested(folder: Path, sampling: SamplingConfig) -> None:
    """Print a note if generation_config.json has sampling options that are not in use.

    Options that the user gave are left out, and so is a checkpoint of a run: its file is that of
    the model that it started from.
    """
    path = folder / GENERATION_CONFIG
    is_own = (folder / MANIFEST).exists()
    if is_own or not sampling.max_new_tokens or not os.path.lexists(path):
        return
    settings = read_json(path)
    typed = {word.partition("=")[0] for word in sys.argv}
    is_greedy = sampling.temperature == 0 and "--temperature" in typed
    found = []
    for name, default in _DEFAULTS.items():
        option, value = f"--{name.replace('_', '-')}", settings.get(name)
        is_used = name not in _SAMPLING_ONLY or (settings.get("do_sample") and not is_greedy)
        if value in (None, default) or option in typed or not is_used:
            continue
        with suppress(ConfigError):  # not a valid value
            if getattr(build(SamplingConfig, {name: value}), name) != getattr(sampling, name):
                found.append(f"{option} {value}")
    if found:
        note(f"{GENERATION_CONFIG} suggests {' '.join(found)}: not used")
