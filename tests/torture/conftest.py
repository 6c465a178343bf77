"""Hostile files, full disks, kills and power cuts; make torture runs the long forms too.

Tests of the default suite take a few seconds at most; the long forms have the marker torture.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Helper modules of the other test folders: small_runs, small_traces, calls.
sys.path += [str(ROOT / "tests" / name) for name in ("training", "tracing", "commands")]

from interrupted_runs import train  # noqa: E402
from small_models import small_model  # noqa: E402
from small_runs import data_of, text  # noqa: E402

from minigpt.checkpoint.model_folder import write_model  # noqa: E402
from minigpt.text.tokenizer import BytesTokenizer  # noqa: E402
from minigpt.text.tokens import PreparedData  # noqa: E402


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Return a folder with a model of random weights and a byte tokenizer."""
    folder = tmp_path / "model"
    write_model(folder, small_model(vocab_size=257), BytesTokenizer())
    return folder


@pytest.fixture(autouse=True)
def limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that hangs, for example while reading a FIFO."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the test hangs")

    if request.node.get_closest_marker("torture") or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 120)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def program() -> dict[str, str]:
    """Return the environment for running the program in a separate process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return data_of(text(400), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def begun(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with two steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(folder, data, until=2)
    return folder


@pytest.fixture(scope="session")
def straight(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of six steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder, data)
    return folder
