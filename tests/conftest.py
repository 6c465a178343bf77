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
    # Before anything imports torch: the workers share the cores, one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    # One cache for the session and its workers: no test may see or change the user's own, and what
    # is slow to make is made once.
    _cache = tempfile.TemporaryDirectory(prefix="minigpt-tests-")
    os.environ["MINIGPT_CACHE_DIR"] = _cache.name


# A shell has the tests ignore Ctrl-C if it runs them in the background; the program would, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real corpora and weights beside the project; its tests skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and weights of {SHARED.name}/ beside the project")
    return SHARED


@pytest.fixture(autouse=True)
def _repeatable_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat the seeds of the calls that pass none: a random one ends a text early now and then."""
    monkeypatch.setattr(secrets, "randbelow", random.Random(0).randrange)
