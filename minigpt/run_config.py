"""Settings of a run's text and training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from minigpt.fields import Checked, check_fields, option, require, require_divides, setting
from minigpt.rings import find_ring

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "tf32", "bfloat16"]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
DEVICES = get_args(Device)
DTYPES = get_args(Dtype)
QUANTIZATIONS = get_args(Quantization)


@dataclass(frozen=True, kw_only=True)
class PlainDataConfig(Checked):
    """The text to train on and its tokenizer, if the ring of corpora is not installed."""

    paths: tuple[str, ...] = ()
    """Text files, one document each."""
    tokenizer: str = option("bytes", metavar="NAME")
    """Tokenizer: bytes, bpe, bpe:N, gpt2, cl100k_base or o200k_base."""
    val_fraction: float = option(0.1, "[0, 1)", metavar="F")
    """Fraction of the text, at its end, held out for validation; 0 to train on all."""


if TYPE_CHECKING:
    from minigpt.data_config import DataConfig as DataConfig
else:
    _corpora = find_ring("data_config")
    DataConfig = _corpora.DataConfig if _corpora else PlainDataConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Budget, optimizer, schedule and reports of a training run."""

    max_steps: int = option(0, "[0, inf)")
    """Number of optimizer steps; 0 for no limit. A run needs one of the three max_ limits."""
    max_minutes: float = option(0.0, "[0, 1e8]")
    """Minutes of training, excluding evaluation; 0 for no limit. The schedule ends with them."""
    max_epochs: float = option(0.0, "[0, 1e6]", shown="by the size of the text")
    """Passes over the training tokens; 0 for no limit. Becomes max_steps once the text is read."""
    batch_size: int = option(16, "[1, 2**24]")
    """Sequences per optimizer step, across all ranks."""
    micro_batch_size: int = setting(0, "[0, inf)")
    """Maximum sequences per forward pass (gradient accumulation). 0 derives batch_size."""
    sequence_length: int = setting(0, "[0, inf)")
    """Tokens per training sequence. 0 for the model's context_length."""
    context_warmup_length: int = setting(0, "[0, inf)")
    """Tokens per sequence during context warm-up; 0 for none. It must divide the full length, and
    batches have proportionally more sequences."""
    context_warmup_fraction: float = setting(0.5, "[0, 1]")
    """Fraction of the budget spent in context warm-up, in [0, 1]."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimizer. muon: Muon for matrices and AdamW for the rest; adamw: AdamW for all."""
    lr: float = option(0.01, "(0, inf)")
    """Peak learning rate of the matrices, on AdamW's scale. Muon's updates are scaled to match."""
    embedding_lr: float = setting(0.01, "(0, inf)")
    """Peak learning rate of embeddings, output projection, norms and biases (AdamW)."""
    weight_decay: float = setting(0.0, "[0, inf)")
    """Decoupled weight decay of the matrices, multiplied by the learning rate."""
    momentum: float = setting(0.95, "[0, 1)")
    """Nesterov momentum of Muon, in [0, 1)."""
    momentum_warmup_steps: int = setting(0, "[0, inf)")
    """Number of steps over which the momentum rises from 0.7 to its value; 0 for none."""
    newton_schulz_steps: int = setting(5, "[1, 100]")
    """Newton-Schulz iterations of Muon's orthogonalization."""
    beta1: float = setting(0.9, "[0, 1)")
    """Decay rate of AdamW's first moment, in [0, 1)."""
    beta2: float = setting(0.95, "[0, 1)")
    """Decay rate of AdamW's second moment, in [0, 1)."""
    grad_clip: float = setting(1.0, "[0, inf)")
    """Largest global gradient norm; 0 for no clipping."""
    on_nan: Literal["stop", "skip"] = option("stop")
    """Action on a NaN or inf loss or gradient. skip discards the update, and ends the run after
    several skipped steps in a row (see training/skipping.py)."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Learning rate schedule. wsd: warm-up, stable, decay."""
    warmup_fraction: float = setting(0.02, "[0, 1]")
    """Fraction of the budget over which the learning rate rises, in [0, 1]."""
    decay_fraction: float = setting(0.6, "[0, 1]")
    """Fraction of the budget, at its end, over which wsd lowers the learning rate, in [0, 1]."""
    final_lr_fraction: float = setting(0.0, "[0, 1]")
    """Final learning rate as a fraction of the peak, in [0, 1]."""
    log_every: int = setting(10, "[1, inf)")
    """Steps between lines of metrics.jsonl. Only then is the loss read from the device."""
    eval_every: int | None = option(
        None,
        "[0, inf)",
        group="Reports",
        shown="an epoch, or a twentieth of the run",
    )
    """Steps between validation passes; 0 for one at the end. None derives an epoch, but at most a
    twentieth of the run or 50 steps, whichever is more."""
    eval_tokens: int | None = setting(None, "[1, inf)")
    """Maximum validation tokens per pass. A longer text is sampled in evenly spaced windows, the
    same in every pass. None derives a tenth of the training FLOPs, and at least 8,192 tokens."""
    patience: float = option(0.0, "[0, inf)", shown="4")
    """Epochs without a lower validation loss after which training stops; 0 for no limit."""
    average: float = setting(0.0, "[0, 1)")
    """Decay per step of a moving average of the weights; 0 for none. A checkpoint contains the
    average if its validation loss is lower."""
    dropout_start: float = setting(0.0, "[0, inf)")
    """Epochs before dropout begins."""
    save_every: int = option(250, "[0, inf)", group="Reports")
    """Steps between checkpoints; 0 for one at the end. Each is evaluated before it is saved."""
    keep: int = setting(2, "[0, inf)")
    """Number of checkpoints to keep in addition to best and latest."""
    sample_every: int | None = option(
        None, "[0, inf)", group="Reports", shown="one line per validation pass on a terminal"
    )
    """Steps between generated samples; 0 for none. None derives one line per validation pass if
    stderr is a terminal."""
    seed: int = option(1337, "[0, 2**63)")
    """Seed of the weights, data order and dropout."""
    device: Device = option("auto")
    """Device."""
    dtype: Dtype = option("auto")
    """Compute dtype. Weights stay float32; bfloat16 uses autocast; tf32 is float32 with faster,
    less precise matrix products (CUDA)."""
    save_dtype: SaveDtype = option("auto", group="Reports", shown="that of --from, else float32")
    """Dtype of saved weights. The float32 weights are saved too, in training_state/."""
    compile: bool | None = option(None, shown="CPU runs of over 10 minutes")
    """Compile the training step with torch.compile. None compiles single-process CPU runs that are
    planned to take at least ten minutes."""
    shard: bool = option(False)
    """Shard parameters, gradients and optimizer state with FSDP2 (torchrun)."""
    recompute: bool = option(False)
    """Save memory by activation checkpointing."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.micro_batch_size:
            object.__setattr__(self, "micro_batch_size", self.batch_size)
        require(
            bool(self.max_steps or self.max_minutes or self.max_epochs),
            "training needs a limit: set max_steps, max_minutes or max_epochs.",
        )
        require_divides("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
