"""Fixtures shared by several test packages."""

import os
import random
import secrets
import signal
import tempfile
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: no test may look a name up on the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: parallel test workers share the cores, so one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    # One cache for the session and its workers: no test may read or change the user's cache, and
    # slow results are computed once.
    _cache = tempfile.TemporaryDirectory(prefix="minigpt-tests-")
    os.environ["MINIGPT_CACHE_DIR"] = _cache.name


# A shell makes background jobs ignore Ctrl-C, and the tested program would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Folder of real corpora and weights next to the project; without it, the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the corpora and weights of {SHARED.name}/ next to the project")
    return SHARED


@pytest.fixture(autouse=True)
def _repeatable_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make unseeded calls deterministic: a random seed may end a text early."""
    monkeypatch.setattr(secrets, "randbelow", random.Random(0).randrange)
