"""Compile the training step if it pays off, and fall back to eager mode if that fails."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import RunConfig
from minigpt.errors import ConfigError, MinigptWarning
from minigpt.training import fused, kernels
from minigpt.training.run import Run

LONG_S = 600
"""Planned seconds of training from which the minute that compiling takes pays off."""
THREAD_FLOP_S = 5e10
"""Rough FLOP/s of a CPU thread in eager training. A constant, so that all runs with the same
settings, including resumed ones, make the same decision."""


def is_compiled(
    config: RunConfig, n_parameters: int, device: torch.device, n_ranks: int = 1
) -> bool:
    """Return whether to compile the training step.

    By default, single-process runs of a GPT on a CPU are compiled if planned to take ten minutes.

    Args: config, after ``with_max_steps``.
    """
    training = config.training
    if training.compile is not None:
        return training.compile
    if device.type != "cpu" or n_ranks > 1 or config.model.arch != "gpt":
        return False
    limits = [60 * training.max_minutes]
    flops = 6 * n_parameters * training.max_steps * config.step_tokens
    limits.append(flops / (THREAD_FLOP_S * torch.get_num_threads()))
    return min(limit for limit in limits if limit) >= LONG_S


def use_kernels(run: Run) -> None:
    """Use the kernels of ``kernels.py`` in a run, and decide whether it is compiled."""
    kernels.use_kernels(run.model, run.device, run.dtype)
    n_parameters = sum(p.numel() for p in run.model.parameters())
    run.is_compiled = is_compiled(run.config, n_parameters, run.device, run.world.size)


def loss_of(run: Run, loss: nn.Module, replica: Any) -> Any:
    """Return the callable that computes the loss of a run: fused, compiled or its plain modules.

    Args: as for ``CompiledLoss``.
    """
    eager = fused.fused_loss(run, loss) or replica
    # Includes the DDP wrapper, which averages some gradients while others are still computed.
    return CompiledLoss(loss, replica, eager, run) if run.is_compiled else eager


NOTE = (
    "the training step is compiled, because the run is planned to take over ten minutes: the first "
    "one takes about a minute (--no-compile trains without)"
)
"""Note of a run that is compiled by default."""
FAILED_NOTE = (
    "the training step is not compiled, because torch.compile failed before the checkpoint was "
    "saved (--compile tries again)"
)
"""Note of a resumed run that would be compiled by default, but failed to compile before."""


class CompiledLoss:
    """A compiled loss module, replaced by eager mode if it was not requested and fails to compile.

    Each input shape is compiled separately (``dynamic=False``), so that a run that is resumed after
    the context warm-up uses the same kernels as an uninterrupted one.
    """

    def __init__(self, loss: nn.Module, replica: Any, eager: Any, run: Run) -> None:
        """Args: replica, the loss or a wrapper that averages its gradients over ranks; eager, the
        loss of an uncompiled run; run, whose ``compile_failed`` is set if the compiler fails."""
        for module in loss.modules():
            if type(module) is nn.Embedding:
                module.__class__ = Embedding
        self._loss, self._eager, self._run = loss, eager, run
        self._compiled: Any = torch.compile(replica, dynamic=False)
        self._is_tested = replica is loss  # a wrapper expects one backward pass per forward
        self._shapes: set[torch.Size] = set()

    def __call__(self, inputs: Tensor, targets: Tensor, **options: bool) -> Tensor:
        """Return the loss of a batch.

        Raises: ConfigError if it cannot be compiled and --compile was given.
        """
        if self._is_tested and inputs.shape not in self._shapes:
            self._shapes.add(inputs.shape)
            self._test_compilation(inputs, targets, options)
        return self._compiled(inputs, targets, **options)

    def _test_compilation(self, inputs: Tensor, targets: Tensor, options: dict[str, bool]) -> None:
        """Compile forward and backward pass for a shape; on failure, switch to the eager loss."""
        parameters = [p for p in self._loss.parameters() if p.requires_grad]
        try:
            with torch.random.fork_rng():
                loss = self._compiled(inputs, targets, **options)
                torch.autograd.grad(loss, parameters, allow_unused=True)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # from torch.compile, the C++ compiler or the linker
            reason = " ".join(str(error).split())[:200]
            if self._run.config.training.compile:
                raise ConfigError(
                    f"--compile: torch.compile failed with {type(error).__name__}: {reason}. Use "
                    "--no-compile."
                ) from error
            note = f"training without torch.compile, which failed: {reason}"
            warnings.warn(note, MinigptWarning, stacklevel=2)
            self._compiled, self._is_tested = self._eager, False
            self._run.is_compiled, self._run.compile_failed = False, True


class Embedding(nn.Embedding):
    """An embedding whose compiled gradient is deterministic.

    The kernel that torch.compile generates adds to rows from several threads in any order.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _Embed.apply(input, self.weight)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.n_rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, embedding_gradient(gradients[0], *ctx.saved_tensors, ctx.n_rows)


@torch.library.custom_op("minigpt::embedding_gradient", mutates_args=())
def embedding_gradient(gradient: Tensor, tokens: Tensor, n_rows: int) -> Tensor:
    """Return the gradient of an embedding's weight, computed by torch's eager kernel."""
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, n_rows, -1, False)


@embedding_gradient.register_fake
def _(gradient: Tensor, tokens: Tensor, n_rows: int) -> Tensor:
    return gradient.new_empty(n_rows, gradient.shape[-1])
