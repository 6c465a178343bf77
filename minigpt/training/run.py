"""A training run: its model, optimizers, data and progress."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.config import RunConfig
from minigpt.errors import CheckpointError
from minigpt.model.device import has_fast_bfloat16, keep_freed_memory
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.rings import find_ring, ring
from minigpt.text.batches import require_length
from minigpt.text.tokens import PreparedData, TokenSpan
from minigpt.training.optim import make_optimizers
from minigpt.training.schedule import lr_scale, progress, with_max_steps
from minigpt.training.world import ALONE, World


def resolve_for_text(
    config: RunConfig, data: PreparedData
) -> tuple[RunConfig, TokenSpan, TokenSpan]:
    """Return the config with its text-dependent settings, and training and validation tokens.

    Raises: DataError if the text is too short.
    """
    train_tokens, val_tokens = data.tokens.split(config.data.val_fraction)
    config = with_max_steps(config, len(train_tokens))
    if overfitting := find_ring("training.overfitting"):
        config = overfitting.with_evaluations(config, len(train_tokens), len(val_tokens))
    parts = (train_tokens, val_tokens or train_tokens)  # there may be no validation text
    require_length(min(parts, key=len), config.sequence_length)  # an error names the shorter part
    return config, train_tokens, val_tokens


class Run:
    """The state that training steps read and update; each process of a run has its own."""

    step = 0
    """Number of steps taken."""
    elapsed_s = 0.0
    """Seconds of training, without evaluation and saving."""
    n_skipped = 0
    """Number of steps skipped because of NaN or inf."""
    last_lr_scale: float | None = None
    """Learning rate of the last step as a fraction of the peak."""
    saved_step: int | None = None
    """Step of the latest checkpoint."""
    average: Any = None
    """Moving average of the weights, an ``overfitting.WeightAverage``. None without one."""
    early_stop: Any = None
    """Early stopping, an ``overfitting.EarlyStop``. None without it."""
    seam: Any = None
    """Latest change of the schedule, a ``state.Seam``. None if it never changed."""
    moved_from: str | None = None
    """Where the checkpoint was computed, if resuming is not bit-exact because of that."""
    is_compiled = False
    """Whether the training step is compiled."""
    compile_failed = False
    """Whether the compiler failed, so that the run continued uncompiled."""

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        folder: RunFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        start_from: LanguageModel | None = None,
        resume_from: Path | None = None,
        carried: Any = None,
        world: World = ALONE,
    ) -> None:
        """Start a run, or resume it from a checkpoint.

        Args: dtype of autocast (weights stay float32); start_from, a float32 model to fine-tune;
            resume_from, a checkpoint folder; carried, files and tensors to keep from one of these.
        Raises: DataError if the corpus is too short, or differs from that of the checkpoint;
            CheckpointError if the checkpoint is damaged or has another model; ConfigError if the
            ranks cannot divide the batch equally or outnumber the GPUs.
        """
        self.data, self.folder, self.carried = data, folder, carried
        self.world = world.on(device, shard=config.training.shard)
        self.device, self.dtype = self.world.device, dtype
        if self.device.type == "cpu":
            keep_freed_memory()
        self.config, self.train_tokens, self.val_tokens = resolve_for_text(config, data)
        training = config.training
        self.micro_batch_size = world.micro_batch_size(training)
        """Sequences per forward pass of a rank."""
        self.model = self.world.place(self._make_model(start_from, resume_from))
        find = ring if training.compile else find_ring
        if compiling := find("training.compiling"):
            compiling.use_kernels(self)
        product_dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
        self.optimizers = make_optimizers(self.model, training, product_dtype, self.world)
        find = ring if training.average or training.patience else find_ring
        if overfitting := find("training.overfitting"):
            overfitting.enable(self)
        if resume_from:
            ring("training.state").restore(self, resume_from)

    def _make_model(
        self, start_from: LanguageModel | None, resume_from: Path | None
    ) -> LanguageModel:
        config = self.config.model
        if resume_from:
            start_from = read_model(resume_from, dtype=torch.float32, is_exact=True).model
        if start_from is None:
            model = model_class(config)(config)
            # On the CPU, so that every device starts from the same weights.
            model.init_weights(torch.Generator().manual_seed(self.config.training.seed))
            return model
        # Dropout has no weights, and may change when a run is resumed.
        if replace(start_from.config, dropout=config.dropout) != config:
            raise CheckpointError(
                f"{str(resume_from)!r} has a model of another shape than the run's config. "
                "Resume with the run's own settings."
            )
        return model_class(config).from_tensors(config, start_from.state_dict())

    @property
    def progress(self) -> float:
        """Fraction of the budget used, in [0, 1]."""
        return progress(self.config.training, self.step, self.elapsed_s)

    @property
    def lr_scale(self) -> float:
        """Learning rate of the next step as a fraction of the peak."""
        scale = lr_scale(self.config.training, self.progress)
        return self.seam.limit(scale, self.step) if self.seam else scale

    @property
    def context_length(self) -> int:
        """Tokens per sequence of the next step.

        Short sequences at the start give more gradients in the same time (Li et al. 2021,
        arXiv:2108.06084).
        """
        config, full = self.config.training, self.config.sequence_length
        is_warm = self.progress >= config.context_warmup_fraction
        is_warm = is_warm or bool(self.seam and self.seam.is_warm)
        return full if is_warm else config.context_warmup_length or full

    def epochs(self, n_steps: int) -> float:
        """Return the number of passes over the training text in some steps."""
        return n_steps * self.config.step_tokens / len(self.train_tokens)

    @property
    def is_early_stop_due(self) -> bool:
        """Whether the validation loss has not fallen for ``patience`` epochs."""
        return self.early_stop is not None and self.early_stop.is_due(self)

    def set_dropout(self) -> None:
        """Set dropout for the next step; its masks are a pure function of seed, step and rank."""
        config, dropout = self.config.training, self.config.model.dropout
        if not dropout:
            return
        has_begun = self.epochs(self.step) >= config.dropout_start
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout if has_begun else 0.0
        torch.manual_seed(config.seed + 1_000_003 * (self.step + 1) + self.world.rank)
