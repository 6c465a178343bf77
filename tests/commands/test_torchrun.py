"""minigpt train under torchrun: messages, stopping and resuming."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from calls import ROOT, TINY, Run

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.model_folder import read_model
from minigpt.settings import read_toml

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        not Path("/proc/self/task").is_dir(), reason="needs /proc to find processes"
    ),
]
Launch = Callable[..., "Popen[bytes]"]
LONG = [*TINY, "--max-steps", "100000", "--save-every", "5"]
RUN = RunFolder(Path("checkpoints/a"))


@pytest.fixture(autouse=True)
def corpus(trained: Path, workplace: Path) -> None:
    shutil.copy(trained / "corpus.txt", workplace)


@pytest.fixture
def launch(workplace: Path) -> Iterator[Launch]:
    """Start the program as two ranks: launch("train", ...) -> Popen of torchrun."""
    launched: list[Popen[bytes]] = []

    def begin(*words: str, n_restarts: int = 0) -> "Popen[bytes]":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        restarts = ["--max-restarts", str(n_restarts)]
        process = Popen(
            [sys.executable, *torchrun, *restarts, "-m", "minigpt", *words],
            cwd=workplace,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        launched.append(process)
        return process

    yield begin
    for process in launched:
        for pid in [
            *children_of(process),
            process.pid,
        ]:  # so that a failed test leaves no rank running
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()  # also closes its pipes


def children_of(process: "Popen[bytes]") -> list[int]:
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in children.split()]


def end_of(process: "Popen[bytes]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


def wait_for_checkpoint(process: "Popen[bytes]", *, after: int = 0) -> None:
    deadline = time.monotonic() + 120
    while max(RUN.steps(), default=0) <= after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def process_of(rank: int, torchrun: "Popen[bytes]") -> int:
    """Return the process id of a rank."""
    for child in children_of(torchrun):
        if f"RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return child
    raise AssertionError(f"torchrun has no rank {rank}")


def resume_command(err: str) -> list[str]:
    """Return the program's arguments in the last suggested resume command."""
    command = re.findall(r"torchrun --nproc-per-node 2 -m minigpt (train --resume.*)", err)[-1]
    return shlex.split(command)


def test_ctrl_c_saves_and_the_printed_command_resumes(launch: Launch, run: Run) -> None:
    process = launch("train", "corpus.txt", "--name", "a", *LONG)
    wait_for_checkpoint(process)
    process.send_signal(signal.SIGINT)  # torchrun forwards it to both
    code, out, err = end_of(process)
    assert (code != 0, out) == (True, "")
    assert err.count("\nmodel  ") == err.count("\nbest   ") == 1, "only rank 0 may print"
    assert "on 2 x cpu in " in err
    latest = RUN.latest()
    assert latest is not None
    lines = Path("checkpoints/a/metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    steps = [event["step"] for event in logged if event["event"] == "step"]
    assert steps == list(range(1, latest.step + 1)), "only rank 0 may write"

    more = ["--max-steps", str(latest.step + 2), "--shard", "--recompute"]
    code, out, err = end_of(launch(*resume_command(err), *more))
    assert (code, out) == (0, ""), err
    assert re.search(rf"2 x cpu, weights in shards, in \w+, from step {latest.step} on", err)
    training = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert training["shard"] is training["recompute"] is True
    result = run("train", "--resume", "--name", "a", "--max-steps", str(latest.step + 3))
    assert result.code == 0
    assert "saved on 2 ranks of cpu" in result.err
    assert RUN.steps()[-2:] == [latest.step + 2, latest.step + 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_with_a_message_how_to_resume(
    rank: int, launch: Launch, run: Run
) -> None:
    process = launch("train", "corpus.txt", "--name", "a", *LONG)
    wait_for_checkpoint(process)
    os.kill(process_of(rank, process), signal.SIGKILL)
    code, out, err = end_of(process)
    assert (code, out) == (1, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    latest = RUN.latest()
    assert latest is not None
    assert "another process of this run has ended" in line
    assert f"The last checkpoint is of step {latest.step}. Resume with: torchrun" in line
    words = resume_command(line)
    assert "Traceback" not in err.split("error: ")[1].split("torch/distributed")[0]
    assert run(*words, "--max-steps", str(latest.step + 1)).code == 0
    assert RUN.steps()[-1] == latest.step + 1


def weights_of(name: str) -> dict[str, torch.Tensor]:
    latest = RunFolder(Path("checkpoints", name)).latest()
    assert latest is not None
    assert latest.step == 120
    verify(latest.folder, hashes=True)
    return dict(read_model(latest.folder).model.state_dict())


@pytest.mark.torture
@pytest.mark.parametrize("words", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_ranks_killed_at_random_moments_resume_with_the_same_bits(
    words: list[str], launch: Launch
) -> None:
    train = ["train", "corpus.txt", *TINY, "--max-steps", "120", "--save-every", "2", *words]
    train += ["--patience", "0"]
    code, _, err = end_of(launch(*train, "--name", "straight"))
    assert code == 0, err
    rng, newest, n_killed = random.Random(5), 0, 0
    process = launch(*train, "--name", "a")
    for _ in range(40):
        if rng.random() < 0.7:  # otherwise kill it while it starts or writes its first checkpoint
            while process.poll() is None and max(RUN.steps(), default=0) <= newest:
                time.sleep(0.02)
        while process.poll() is None and not children_of(process):
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 1))
        victims = [process.pid, *children_of(process)]
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        # Killing torchrun leaves its ranks running for a while; they hold the lock.
        victims = victims[1:] if number == signal.SIGKILL else victims
        victim = rng.choice(victims) if victims else 0
        if process.poll() is None and victim and n_killed < 8:
            with suppress(ProcessLookupError):
                os.kill(victim, number)
                n_killed += 1
        code, out, err = end_of(process)
        assert out == ""
        assert "bug in minigpt" not in err, err
        latest = RUN.latest()
        assert (latest.step if latest else 0) >= newest, "a checkpoint was lost"
        newest = latest.step if latest else 0
        if newest == 120:
            break
        process = launch(*(["train", "--resume"] if latest else train), "--name", "a")
    assert n_killed > 3
    found, expected = weights_of("a"), weights_of("straight")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_run_that_torchrun_restarts_resumes_from_its_checkpoint(launch: Launch, run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    words = ["train", "--resume", "--name", "a", "--max-steps", "400", "--save-every", "20"]
    words += ["--patience", "0"]
    process = launch(*words, n_restarts=1)
    wait_for_checkpoint(process, after=4)
    os.kill(process_of(1, process), signal.SIGKILL)
    code, _, err = end_of(process)
    assert code == 0, err
    steps = [int(step) for step in re.findall(r"from step (\d+) on", err)]
    assert steps[0] == 4
    assert steps[1] >= 20
    assert RUN.steps()[-1] == 400


def test_a_signal_to_one_rank_saves_and_stops_all_ranks(launch: Launch) -> None:
    process = launch("train", "corpus.txt", "--name", "a", *LONG)
    wait_for_checkpoint(process)
    os.kill(process_of(1, process), signal.SIGUSR1)
    code, out, err = end_of(process)
    assert (code, out) == (1, "")  # torchrun exits with 1 for any failure
    assert re.search(r"rank +: 0 .*\n +exitcode +: 138 ", err), err
    assert resume_command(err)[:2] == ["train", "--resume"]
    latest = RUN.latest()
    assert latest is not None
    assert last_logged_step() == latest.step


def test_ctrl_c_in_a_terminal_saves_although_ranks_receive_it_twice(launch: Launch) -> None:
    process = launch("train", "corpus.txt", "--name", "a", *LONG)
    wait_for_checkpoint(process)
    for pid in [process.pid, *children_of(process)]:  # torchrun forwards it to its ranks
        os.kill(pid, signal.SIGINT)
    _, out, err = end_of(process)
    assert out == ""
    latest = RUN.latest()
    assert latest is not None
    assert last_logged_step() == latest.step
    assert resume_command(err)[:2] == ["train", "--resume"]


def last_logged_step() -> int:
    events = map(json.loads, Path("checkpoints/a/metrics.jsonl").read_text().splitlines())
    return max(event["step"] for event in events)


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux, which signals the death of a parent process"
)
@pytest.mark.parametrize("words", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_ranks_end_when_their_torchrun_is_killed(
    words: list[str], launch: Launch, run: Run
) -> None:
    process = launch("train", "corpus.txt", "--name", "a", *LONG, *words)
    wait_for_checkpoint(process)
    kill_torchrun_alone(process)  # Linux signals each rank several times
    latest = RUN.latest()
    assert latest is not None
    assert latest.step == last_logged_step(), "a step was lost"
    verify(latest.folder, hashes=True)
    more = ["--resume", "--name", "a", "--max-steps", str(latest.step + 1)]
    assert run("train", *more).code == 0, "the lock must be free"


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux, which signals the death of a parent process"
)
@pytest.mark.parametrize("moment", ["started", "torch is loaded", "the run has a folder"])
def test_ranks_end_when_their_torchrun_is_killed_while_they_start(
    moment: str, launch: Launch
) -> None:
    process = launch("train", "corpus.txt", "--name", "a", *LONG)
    while len(ranks := children_of(process)) < 2 or not has_reached(moment, ranks[0]):
        assert process.poll() is None
        time.sleep(0.01)
    kill_torchrun_alone(process)


def has_reached(moment: str, rank: int) -> bool:
    """Return whether a rank has reached a point of its start."""
    if moment == "torch is loaded":
        return "libtorch_cpu" in Path(f"/proc/{rank}/maps").read_text()
    return moment == "started" or RUN.path.is_dir()


def kill_torchrun_alone(process: "Popen[bytes]") -> None:
    """Kill only torchrun, and wait until its ranks have ended."""
    ranks = children_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    try:
        while any(is_alive(rank) for rank in ranks):
            assert time.monotonic() < deadline, "a rank is still running"
            time.sleep(0.05)
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Return whether a process is still running."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_invalid_batch_size_is_reported_once(launch: Launch) -> None:
    code, out, err = end_of(launch("train", "corpus.txt", *TINY, "--batch-size", "3"))
    assert (code, out) == (1, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --batch-size 3 cannot be divided among 2 processes.")
    assert not Path("checkpoints").exists() or not list(Path("checkpoints").glob("*/step-*"))


def losses(name: str) -> list[float]:
    events = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
    return [event["train_loss"] for event in events if "train_loss" in event]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("words", [[], ["--shard"], ["--shard", "--recompute", "--compile"]])
def test_losses_on_two_gpus_equal_those_on_one(words: list[str], launch: Launch, run: Run) -> None:
    options = [*TINY, "--device", "cuda", "--dtype", "float32", "--set", "model.dropout=0.0"]
    assert run("train", "corpus.txt", "--name", "one", *options).code == 0
    code, _, err = end_of(launch("train", "corpus.txt", "--name", "two", *options, *words))
    assert code == 0, err
    assert "on 2 x cuda" in err
    # float32 sums in another order
    assert losses("checkpoints/two") == pytest.approx(losses("checkpoints/one"), rel=1e-3)
