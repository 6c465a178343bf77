"""Fixtures that several rooms share."""

import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: a name that is no folder must not be asked of the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real corpora and weights beside the project; its tests skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and weights of {SHARED.name}/ beside the project")
    return SHARED
