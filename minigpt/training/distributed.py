"""Distributed training with torchrun: data parallel (DDP), or sharded (FSDP2)."""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from minigpt.config import TrainingConfig
from minigpt.errors import ConfigError, ResourceError
from minigpt.evaluation import Evaluation
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.training.world import Batches, World, full_tensor, is_sharded

# torch.distributed's tensor and fsdp modules take a second to import, so methods import them.

_TIMEOUT = timedelta(hours=1)  # the other ranks wait while rank 0 saves or samples
_CONNECT_TIMEOUT = timedelta(seconds=10)  # torchrun starts its store before the ranks
_PLAN = "plan"
_POLL_S = 0.1


@dataclass(frozen=True)
class DistributedWorld(World):
    """Several processes, one per GPU or several on the CPU."""

    local_rank: int = 0
    """Index of this process on its machine, and of its GPU."""
    local_size: int = 1
    """Number of processes on this machine."""
    mesh: DeviceMesh | None = None
    """One-dimensional device mesh of all ranks."""
    store: Any = None
    """Key-value store through which rank 0 sends its plan."""

    def on(self, device: torch.device, *, shard: bool) -> Self:
        """Return this world with its device set.

        Raises: ConfigError if there are fewer GPUs than processes.
        """
        if device.type == "cuda":
            n_gpus = torch.cuda.device_count()
            if self.local_rank >= n_gpus:
                raise ConfigError(
                    f"torchrun started {self.local_size} processes on a machine with {n_gpus} GPUs."
                    f" Use --nproc-per-node {n_gpus}, or --device cpu."
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        elif device.type != "cpu":
            raise ConfigError(
                f"several processes cannot share the device {device.type}. Use --device cpu, or "
                "train without torchrun."
            )
        mesh = init_device_mesh(device.type, (self.size,))
        return replace(self, device=device, mesh=mesh, is_sharded=shard)

    def micro_batch_size(self, config: TrainingConfig) -> int:
        """Return the sequences per forward pass of a rank.

        Raises: ConfigError if the batch cannot be divided equally among the ranks.
        """
        if config.batch_size % self.size:
            raise ConfigError(
                f"--batch-size {config.batch_size} cannot be divided among {self.size} processes. "
                f"Use a multiple of {self.size}."
            )
        return super().micro_batch_size(config)

    def send_plan(self, plan: dict[str, Any]) -> None:
        """Send the plan of a run from rank 0 to the others. An empty plan tells them to exit."""
        self.store.set(_PLAN, json.dumps(plan))

    def receive_plan(self) -> dict[str, Any]:
        """Wait for rank 0's plan, however long it takes."""
        while not self.store.check([_PLAN]):
            time.sleep(_POLL_S)  # store.wait would block signals
        return json.loads(self.store.get(_PLAN))

    def broadcast(self, number: float) -> float:
        box = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(box, src=0)
        return box.item()

    def max(self, number: int) -> int:
        box = torch.tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box.item())

    def mean(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def evaluate(
        self, model: nn.Module, evaluate: Callable[[Batches], Evaluation], batches: Batches
    ) -> Evaluation:
        """Evaluate a model on batches, each rank on an equal number of them.

        Every rank evaluates the remaining batches, which are counted once: with sharded parameters
        all ranks must run the same number of forward passes.
        """
        batches = list(batches)
        n_shared = len(batches) // self.size * self.size
        own = evaluate(batches[self.rank : n_shared : self.size])
        rest = evaluate(batches[n_shared:])
        sums = torch.tensor([own.nats, own.n_tokens, own.n_bytes], dtype=torch.float64)
        dist.all_reduce(sums)
        nats, n_tokens, n_bytes = sums.tolist()
        for module in model.modules():  # no backward pass will free the full parameters
            if self.is_sharded and hasattr(module, "reshard"):  # FSDP2's own modules
                cast("Any", module).reshard()
        return Evaluation(
            nats=nats + rest.nats,
            n_tokens=int(n_tokens) + rest.n_tokens,
            n_bytes=int(n_bytes) + rest.n_bytes,
        )

    def place(self, model: LanguageModel) -> LanguageModel:
        """Move a model to this rank's device, or shard it with FSDP2.

        Source: Zhao et al. 2023, arXiv:2304.11277, in torch's fully_shard.
        """
        if not self.is_sharded:
            return super().place(model)
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:  # parameters are gathered one block at a time
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        return model

    def replicate(self, model: nn.Module) -> nn.Module:
        if self.is_sharded:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        if isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return super().no_sync(model)

    def gather(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        gathered = {}
        for name, tensor in tensors:
            # Moved to the CPU one at a time: all full tensors together may not fit on the device.
            full = full_tensor(tensor).cpu() if self.is_sharded else tensor
            if self.rank == 0:
                gathered[name] = full
        return gathered

    def full_model(self, model: LanguageModel) -> LanguageModel | None:
        if self.is_sharded:
            tensors = self.gather(model.state_dict().items())
            if self.rank == 0:
                return model_class(model.config).from_tensors(model.config, tensors)
        return model if self.rank == 0 else None

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], matrices: Tensor, parameter: Tensor
    ) -> Tensor:
        """Apply a function to a stack of matrices; each rank computes some full matrices.

        Args: function, (n, R, C) -> (n, R, C); matrices, (N, R, C) or this rank's shard of it;
            parameter, one of the model's parameters in the stack.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        assert self.mesh is not None
        mesh = self.mesh
        shape = torch.Size([len(matrices), *parameter.shape])
        strides = tuple(prod(shape[i + 1 :]) for i in range(3))

        def stack(part: Tensor, placement: Any) -> Any:
            return DTensor.from_local(part, mesh, [placement], shape=shape, stride=strides)

        held = Shard(1) if is_sharded(parameter) else Replicate()
        some = stack(matrices, held).redistribute(placements=[Shard(0)]).to_local()
        result = function(some) if len(some) else some
        return cast("Tensor", stack(result, Shard(0)).redistribute(placements=[held]).to_local())

    def close(self) -> None:
        """Destroy the process group at the end of a run."""
        dist.destroy_process_group()


def join() -> DistributedWorld:
    """Join the process group that torchrun's environment variables describe.

    Raises: ResourceError if torchrun has exited; ConfigError if torchrun did not set the variables.
    """
    _require_environment()
    timeout = _TIMEOUT
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        timeout = _CONNECT_TIMEOUT
        _end_with_torchrun()
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    except dist.DistError:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ResourceError(
            f"torchrun's store at {address} cannot be reached. Start the run again."
        ) from None
    store.set_timeout(_TIMEOUT)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    # On one machine, torchrun restarts with the store of the failed attempt, which still has its
    # plan. On several machines, the store is new, and their restart counts may differ.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_size == size else "0"
    store = dist.PrefixStore(f"minigpt-{attempt}", store)  # type: ignore[attr-defined]
    # Scalars that ranks exchange use the CPU backend, so that no step waits for its GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    return DistributedWorld(
        rank=rank,
        size=size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=local_size,
        store=store,
    )


def _require_environment() -> None:
    """Raise ConfigError if WORLD_SIZE was set by something other than torchrun."""
    numbers = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in (*numbers, "MASTER_ADDR")}
    bad = next((name for name in numbers if not values[name].isdecimal()), None)
    if not bad and int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        bad = "RANK"
    if bad or not values["MASTER_ADDR"]:
        bad = bad or "MASTER_ADDR"
        raise ConfigError(
            f"the environment has WORLD_SIZE={values['WORLD_SIZE'][:40]}, as if torchrun had "
            f"started this process, but {bad} is {values[bad][:40]!r}. Use torchrun "
            "--nproc-per-node N -m minigpt train ..., or unset WORLD_SIZE to train in one process."
        )


def _end_with_torchrun() -> None:
    """Have Linux send SIGTERM to this process when torchrun, its parent, is killed.

    Otherwise the ranks of a run would continue in the background and hold its lock.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether an error means that another process has ended."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
