"""Several processes that train one model: what torchrun started, behind one small object.

Every rank calls the methods of a World at the same places of the loop, or they wait for each other
for ever. Alone, each method returns what it is given.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from math import gcd, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from minigpt.errors import ConfigError
from minigpt.evaluation import Evaluation
from minigpt.model.language_model import LanguageModel
from minigpt.model.registry import model_class

# torch.distributed's tensor and fsdp take a second to import: that is left to those who need them.

_TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 saves or samples
_PLAN = "plan"
_POLL_S = 0.1


@dataclass(frozen=True)
class World:
    """The processes of a run, seen by one of them; rank 0 alone writes and speaks."""

    rank: int = 0
    """Which process this is, on all machines together."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Which one this is on its machine; the number of its GPU."""
    local_size: int = 1
    """How many there are on this machine."""
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    """What this rank computes on."""
    is_sharded: bool = False
    """Whether each rank holds a part of every weight, and not all of them."""
    mesh: DeviceMesh | None = None
    """All ranks in a row; None if there is one."""
    store: Any = None
    """Where rank 0 leaves words for the others."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def on(self, device: torch.device, *, shard: bool) -> "World":
        """Return the world with each rank on its own GPU, or with all on CPUs.

        Args: shard, whether weights, gradients and optimizer state are to be parted among ranks.
        Raises: ConfigError if there are fewer GPUs than processes.
        """
        if self.size == 1:
            return replace(self, device=device)
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

    def micro_batch_size(self, batch_size: int, wanted: int) -> int:
        """Return how many sequences a rank takes at once: at most ``wanted``, in equal parts.

        Raises: ConfigError if the ranks cannot share the batch equally.
        """
        if batch_size % self.size:
            raise ConfigError(
                f"--batch-size {batch_size} cannot be shared by {self.size} processes. Use a "
                "multiple of that."
            )
        return gcd(batch_size // self.size, wanted)

    def tell(self, plan: dict[str, Any]) -> None:
        """Leave a plan for the other ranks, as rank 0; an empty one gives up."""
        if self.store is not None:
            self.store.set(_PLAN, json.dumps(plan))

    def told(self) -> dict[str, Any]:
        """Wait for rank 0's plan, however long it takes to make it."""
        assert self.store is not None
        while not self.store.check([_PLAN]):
            time.sleep(_POLL_S)  # and not store.wait, in which no signal is heard
        plan: dict[str, Any] = json.loads(self.store.get(_PLAN))
        return plan

    def from_first(self, number: float) -> float:
        """Return rank 0's number on every rank."""
        if self.size == 1:
            return number
        box = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(box, src=0)
        return box.item()

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers, when all of them have asked."""
        if self.size == 1:
            return number
        box = torch.tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box.item())

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.largest(0)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of the ranks' values."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def evaluate(
        self,
        evaluate: Callable[[Iterable[tuple[Tensor, Tensor]]], Evaluation],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> Evaluation:
        """Evaluate batches, each rank its share of them.

        What is left over is evaluated by every rank and counted once: where weights are in parts,
        all must do as many forward passes.
        """
        if self.size == 1:
            return evaluate(batches)
        batches = list(batches)
        n_shared = len(batches) // self.size * self.size
        own = evaluate(batches[self.rank : n_shared : self.size])
        rest = evaluate(batches[n_shared:])
        sums = torch.tensor([own.nats, own.n_tokens, own.n_bytes], dtype=torch.float64)
        dist.all_reduce(sums)
        nats, n_tokens, n_bytes = sums.tolist()
        return Evaluation(
            nats=nats + rest.nats,
            n_tokens=int(n_tokens) + rest.n_tokens,
            n_bytes=int(n_bytes) + rest.n_bytes,
        )

    def place(self, model: LanguageModel) -> LanguageModel:
        """Put a model on this rank's device: all of it, or this rank's part of every weight.

        Source: Zhao et al. 2023, arXiv:2304.11277, as torch's fully_shard.
        """
        if not self.is_sharded:
            return model.to(self.device)
        from torch.distributed.fsdp import fully_shard

        # A block's weights are whole only while it computes.
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        return model

    def averaging(self, model: nn.Module) -> nn.Module:
        """Return the module whose backward pass leaves the ranks' mean gradient in the weights."""
        if self.size == 1 or self.is_sharded:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)

    def gather(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return named tensors, whole, on rank 0; nothing on the others."""
        gathered = {}
        for name, tensor in tensors:
            # Onto the CPU one after the other: all at once, they need not fit the device.
            whole_tensor = whole(tensor).cpu() if self.is_sharded else tensor
            if self.is_first:
                gathered[name] = whole_tensor
        return gathered

    def whole_model(self, model: LanguageModel) -> LanguageModel | None:
        """Return the model as one process would hold it, on rank 0; None on the others."""
        if not self.is_sharded:
            return model if self.is_first else None
        tensors = self.gather(model.state_dict().items())
        return (
            model_class(model.config).from_tensors(model.config, tensors) if self.is_first else None
        )

    def leave(self) -> None:
        """Part from the others, when all is done."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World()
"""One process by itself."""


def join() -> World:
    """Meet the other processes that torchrun started; alone, there is none to meet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    # On one machine torchrun starts anew with the store of the run that failed, and its old words
    # in it. Several machines make a new one, and may not have counted the same restarts.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_size == size else "0"
    store = dist.PrefixStore(f"minigpt-{attempt}", store)  # type: ignore[attr-defined]
    # What the ranks agree on goes over the CPU, so that no step waits for its GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    return World(
        rank=rank,
        size=size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=local_size,
        store=store,
    )


def is_lost_process(error: RuntimeError) -> bool:
    """Tell whether an error says that another process is no longer there to answer."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def accumulating(forward: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Return the context of one micro-batch: gradients are averaged at a step's last one alone."""
    if isinstance(forward, DistributedDataParallel) and not is_last:
        return forward.no_sync()
    return nullcontext()


def is_part(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this rank may hold a part."""
    part: Any = tensor
    return part.full_tensor() if is_part(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, to be changed in place."""
    part: Any = tensor
    return part.to_local() if is_part(tensor) else tensor


def parted_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor, of which every rank has a copy, as a parameter of its shape is held.

    One of another shape, such as a counter, stays whole.
    """
    tensor = tensor.to(parameter.device)
    if tensor.shape != parameter.shape or not is_part(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def for_each_matrix(
    function: Callable[[Tensor], Tensor],
    matrices: Tensor,
    shape: torch.Size,
    mesh: DeviceMesh,
    *,
    is_sharded: bool,
) -> Tensor:
    """Apply a function to a stack of matrices, each rank to some of them whole.

    Args: function, of (n, R, C), which keeps the shape; matrices (N, R, C), or, if they are
        sharded, the rows that this rank holds of each; shape, (R, C) of a whole one.
    Returns: what the function makes of ``matrices``, the same part of it.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole_shape = torch.Size([len(matrices), *shape])
    strides = tuple(prod(whole_shape[i + 1 :]) for i in range(3))

    def stack(part: Tensor, placement: Any) -> Any:
        return DTensor.from_local(part, mesh, [placement], shape=whole_shape, stride=strides)

    held = Shard(1) if is_sharded else Replicate()
    some = stack(matrices, held).redistribute(placements=[Shard(0)]).to_local()
    result = function(some) if len(some) else some
    return stack(result, Shard(0)).redistribute(placements=[held]).to_local()
