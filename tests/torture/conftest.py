"""What a stranger, a full disk, a kill or a power cut can do; tests run whole with make torture.

A test of the default suite takes a few seconds at most; the long forms have the marker torture.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Helpers of the other test packages: small_runs, small_traces, calls.
sys.path += [str(ROOT / "tests" / name) for name in ("training", "tracing", "commands")]

from interrupted_runs import train  # noqa: E402
from small_models import small_model  # noqa: E402
from small_runs import data_of, text  # noqa: E402

from minigpt.checkpoint.model_folder import write_model  # noqa: E402
from minigpt.text.tokenizer import BytesTokenizer  # noqa: E402
from minigpt.text.tokens import PreparedData  # noqa: E402


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with a model of random weights and byte tokens."""
    folder = tmp_path / "model"
    write_model(folder, small_model(vocab_size=257), BytesTokenizer())
    return folder


@pytest.fixture(autouse=True)
def limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that hangs, as a read of a FIFO does."""

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
    """The environment of the program as a process of its own."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return data_of(text(400), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def begun(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(folder, data, until=2)
    return folder


@pytest.fixture(scope="session")
def straight(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder, data)
    return folder
