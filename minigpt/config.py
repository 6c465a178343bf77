"""Every setting: frozen dataclasses that check themselves; settings.py makes them of plain values.

A config that exists is valid: a bad value is a ConfigError when it is made. A field of 0 that
is said to be derived is filled in at the same moment, so that what is written down is complete.
"""

import math
from dataclasses import dataclass, field

from minigpt.errors import ConfigError, nearest

ARCHS = ("gpt", "lstm", "lstm-attention")
FAMILIES = ("llama", "gpt2")
ATTENTIONS = ("scaled_dot", "dot", "general", "concat", "additive")
ATTENTION_BIASES = ("none", "qkv", "all")
ACTIVATIONS = ("silu", "relu2", "gelu_tanh", "gelu")
SCHEDULES = ("wsd", "cosine", "linear", "constant")
OPTIMIZERS = ("muon", "adamw")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")
ON_NANS = ("stop", "skip")
OVERFLOWS = ("stop", "slide")
QUANTIZATIONS = ("int8",)


_ATTENTION_OF = {"gpt": "scaled_dot", "lstm": "none", "lstm-attention": "additive"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, which does not exist. {nearest(value, choices)}")


def _between(name: str, value: float, low: float, high: float = math.inf) -> None:
    _require(value != math.inf, f"{name} must be a finite number: it is {value}.")
    if not low <= value <= high:
        bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{name} must be {bound}: it is {value}.")


def _above(name: str, value: float, low: float) -> None:
    if not low < value < math.inf:
        raise ConfigError(f"{name} must be a finite number above {low}: it is {value}.")


def round_up(value: float, multiple: int) -> int:
    """Return the least multiple of ``multiple`` that is at least ``value``."""
    return math.ceil(value / multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a language model; enough to build it and to write its config.json."""

    vocab_size: int
    """Tokens in the vocabulary, V."""
    context_length: int
    """The most positions that the model can see, prompt included."""
    n_layer: int
    """Blocks."""
    n_head: int
    """Query heads in each block, H; 1 for an lstm."""
    d_model: int
    """Width of the residual stream, C."""
    arch: str = "gpt"
    """gpt, or for comparison lstm, or lstm-attention, which looks back over its states."""
    family: str = "llama"
    """Block layout: llama (RMSNorm, rotary, gated MLP) or gpt2 (LayerNorm, learned positions)."""
    n_kv_head: int = 0
    """Key/value heads, G; they divide n_head. 0 derives n_head."""
    d_head: int = 0
    """Width of one head, D; even for llama. 0 derives d_model / n_head."""
    d_mlp: int = 0
    """Hidden width of the MLP. 0 derives 4 d_model (gpt2) or 8/3 d_model in steps of 32 (llama).
    An lstm has 4 d_model gates."""
    activation: str = ""
    """silu, relu2, gelu_tanh or gelu. Empty derives silu (llama) or gelu_tanh (gpt2)."""
    attention: str = ""
    """How a query scores a key: scaled_dot, dot, general, concat or additive (model/scores.py).
    Empty derives scaled_dot (gpt), additive (lstm-attention) or none (lstm)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys (llama; Hugging Face calls this layout qwen3)."""
    attention_bias: str = "none"
    """Biases of attention's projections (llama): none, qkv, or all with the output's."""
    mlp_bias: bool = False
    """Biases of the MLP's projections (llama; gpt2 always has all biases)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths (llama)."""
    rope_scaling_factor: float = 1.0
    """By how much long rotary wavelengths are stretched, as in Llama 3; 1 leaves them alone."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths above rope_original_context over this are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths below rope_original_context over this stay; those between, in part."""
    rope_original_context: int = 8192
    """Positions that were seen before the wavelengths were stretched."""
    norm_eps: float = 1e-5
    """Added under the root of every norm."""
    tie_embeddings: bool = False
    """Use the token embedding as the output projection too."""
    dropout: float = 0.0
    """Share of residual-branch outputs and embeddings dropped in training, 0 to below 1."""
    model_type: str = ""
    """Hugging Face's name of this layout. Empty derives gpt2, llama, qwen2 or qwen3; minigpt where
    it has none."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model"):
            _between(name, getattr(self, name), 1)
        _choice("family", self.family, FAMILIES)
        _choice("arch", self.arch, ARCHS)
        is_llama = self.family == "llama"
        is_wide = self.arch != "gpt" or not is_llama
        if not self.d_head:
            self._check_n_head_divides()
        derived = {
            "n_kv_head": self.n_head,
            "d_head": self.d_model // self.n_head,
            "d_mlp": 4 * self.d_model if is_wide else round_up(self.d_model * 8 / 3, 32),
            "activation": "silu" if is_llama else "gelu_tanh",
            "attention": _ATTENTION_OF[self.arch],
        }
        for name, value in derived.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "model_type", self.model_type or self._layout())
        self._check_arch()
        _choice("activation", self.activation, ACTIVATIONS)
        for name in ("n_kv_head", "d_head", "d_mlp"):
            _between(name, getattr(self, name), 1)
        _require(
            self.n_head % self.n_kv_head == 0,
            f"n_kv_head must divide n_head: {self.n_kv_head} does not divide {self.n_head}.",
        )
        if is_llama:
            _require(
                self.d_head % 2 == 0 or self.arch != "gpt",
                f"rotary positions turn pairs, so d_head must be even: it is {self.d_head}. "
                f"Try d_model {self.n_head * (self.d_head + 1)}.",
            )
        else:
            _require(
                not self.qk_norm and self.n_kv_head == self.n_head,
                "the gpt2 family has neither qk_norm nor grouped heads. Use family llama.",
            )
            _require(
                self.attention_bias == "none" and not self.mlp_bias,
                "the gpt2 family always has all biases: leave attention_bias and mlp_bias alone.",
            )
            self._check_n_head_divides()
            _require(
                self.d_head == self.d_model // self.n_head,
                f"the gpt2 family needs d_head = d_model / n_head: d_head is {self.d_head}.",
            )
        self._check_layout()
        _above("rope_theta", self.rope_theta, 0)
        _above("rope_scaling_factor", self.rope_scaling_factor, 0)
        _above("rope_low_freq_factor", self.rope_low_freq_factor, 0)
        _above("rope_high_freq_factor", self.rope_high_freq_factor, self.rope_low_freq_factor)
        _between("rope_original_context", self.rope_original_context, 1)
        _above("norm_eps", self.norm_eps, 0)
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1): it is {self.dropout}.")

    @property
    def kind(self) -> str:
        """What it is, in a word or two."""
        if self.arch != "gpt":
            return self.arch
        return self.family if self.attention == "scaled_dot" else f"{self.family}, {self.attention}"

    @property
    def n_attention_layer(self) -> int:
        """Layers that attend."""
        return {"gpt": self.n_layer, "lstm-attention": 1, "lstm": 0}[self.arch]

    def _check_arch(self) -> None:
        has_none = self.arch == "lstm"
        _require(
            has_none == (self.attention == "none"),
            f"attention is {self.attention}, and arch is {self.arch}. Leave the attention out, or "
            f"choose arch {'lstm-attention' if has_none else 'lstm'}.",
        )
        if not has_none:
            _choice("attention", self.attention, ATTENTIONS)
        if self.arch == "gpt":
            return
        for name, only in {
            "family": "llama",
            "n_head": 1,
            "n_kv_head": 1,
            "d_head": self.d_model,
            "d_mlp": 4 * self.d_model,
            "qk_norm": False,
            "attention_bias": "none",
            "mlp_bias": False,
        }.items():
            _require(
                getattr(self, name) == only,
                f"with arch {self.arch}, {name} can only be {only}: it is {getattr(self, name)}. "
                "Leave it out.",
            )

    def _layout(self) -> str:
        if self.arch != "gpt" or self.attention != "scaled_dot":
            return "minigpt"
        if self.family == "gpt2" or self.qk_norm:
            return "gpt2" if self.family == "gpt2" else "qwen3"
        return "qwen2" if self.attention_bias == "qkv" else "llama"

    def _check_layout(self) -> None:
        _choice("attention_bias", self.attention_bias, ATTENTION_BIASES)
        layout = self._layout()
        known = {"llama": ("llama", "mistral")}.get(layout, (layout,))
        _choice("model_type", self.model_type, known)
        # What we train must open elsewhere: these have no name there.
        _require(
            not (self.qk_norm and self.attention_bias == "qkv"),
            "no published layout has qk_norm and biases of qkv only. Use attention_bias all.",
        )
        _require(
            not self.mlp_bias or self.model_type in ("llama", "minigpt"),
            f"the layout {self.model_type} has no biases in its MLP. Set mlp_bias to false.",
        )

    def _check_n_head_divides(self) -> None:
        _require(
            self.d_model % self.n_head == 0,
            f"n_head must divide d_model: {self.n_head} does not divide {self.d_model}. "
            f"Try d_model {round_up(self.d_model, self.n_head)}.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is trained on, and how it becomes tokens."""

    paths: tuple[str, ...] = ()
    """Files, folders, globs, names of corpora, or - for standard input; empty: the built-in one."""
    tokenizer: str = "bytes"
    """bytes, bpe (trained on the corpus, its size by the corpus's), bpe:N (N tokens in all), gpt2,
    cl100k_base or o200k_base; with ``from``, the name of the model's own."""
    val_fraction: float = 0.1
    """The last share of the tokens, in order, kept for validation. No merges of ``bpe`` are learned
    from that share of the text either."""

    def __post_init__(self) -> None:
        _require(
            0 < self.val_fraction < 1,
            f"val_fraction must be between 0 and 1: it is {self.val_fraction}.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the weights are found: budget, optimizer, schedule, and when to look."""

    max_steps: int = 0
    """Optimizer steps; 0 sets no limit, and then max_minutes or max_epochs must."""
    max_minutes: float = 0.0
    """Minutes of training, evaluation left out; 0 sets no limit. The schedule ends with it."""
    max_epochs: float = 0.0
    """Passes over the training tokens, which become max_steps once there are tokens; 0 sets no
    limit."""
    batch_size: int = 16
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 0
    """The most sequences per forward pass of a process; the gradients of several add up. 0 derives
    batch_size."""
    sequence_length: int = 0
    """Tokens per training sequence; 0 is the model's context_length."""
    context_warmup_length: int = 0
    """Tokens per sequence at first, as many more sequences as make up for it; 0 is off. It
    divides the sequences' later length."""
    context_warmup_fraction: float = 0.5
    """Share of the budget over which context_warmup_length holds."""
    optimizer: str = "muon"
    """muon (Muon on the matrices, AdamW on the rest) or adamw (AdamW on everything)."""
    lr: float = 0.01
    """Peak learning rate of the matrices, in AdamW's scale (Muon's updates are matched to it)."""
    embedding_lr: float = 0.01
    """Peak learning rate of embeddings, output projection, norms and biases (AdamW)."""
    weight_decay: float = 0.0
    """Decoupled decay of the matrices, times the learning rate."""
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    newton_schulz_steps: int = 5
    """Iterations of Muon's orthogonalisation."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    on_nan: str = "stop"
    """What a loss or gradient that is no finite number does: stop ends the run; skip leaves that
    step out, and ends the run after as many in a row as training/readings.py says."""
    schedule: str = "wsd"
    """wsd (warm-up, stable, decay), cosine, linear or constant."""
    warmup_fraction: float = 0.02
    """Share of the budget over which the learning rate rises."""
    decay_fraction: float = 0.6
    """wsd: the last share of the budget, over which the learning rate falls."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end over its peak."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; the loss is read from the device only then."""
    eval_every: int = 250
    """Steps between validation passes; 0 evaluates only at the end."""
    eval_tokens: int = 262_144
    """The most validation tokens in a pass; more are thinned to evenly spread windows."""
    save_every: int = 250
    """Steps between checkpoints, each with its validation loss; 0 saves only at the end."""
    keep: int = 2
    """Checkpoints kept besides best and latest."""
    sample_every: int | None = None
    """Steps between printed samples; 0 prints none. Left out: a line of one at each evaluation,
    where stderr is a terminal."""
    seed: int = 1337
    """Of the initial weights, the order of the data and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto, float32 or bfloat16 (autocast; the weights stay float32)."""
    compile: bool = False
    """Run the model through torch.compile."""
    shard: bool = False
    """Of several processes, let each hold a part of weights, gradients and optimizer state."""
    recompute: bool = False
    """Compute blocks again in the backward pass, and keep nothing of them until then."""

    def __post_init__(self) -> None:
        if not self.micro_batch_size:
            object.__setattr__(self, "micro_batch_size", self.batch_size)
        for name in (
            "batch_size",
            "micro_batch_size",
            "eval_tokens",
            "newton_schulz_steps",
            "log_every",
        ):
            _between(name, getattr(self, name), 1)
        for name in (
            "max_steps",
            "max_minutes",
            "max_epochs",
            "sequence_length",
            "context_warmup_length",
            "weight_decay",
            "grad_clip",
            "eval_every",
            "save_every",
            "keep",
        ):
            _between(name, getattr(self, name), 0)
        _between("sample_every", self.sample_every or 0, 0)
        _between("seed", self.seed, 0, 2**63 - 1)
        _require(
            bool(self.max_steps or self.max_minutes or self.max_epochs),
            "training needs an end: set max_steps, max_minutes or max_epochs.",
        )
        _require(
            self.batch_size % self.micro_batch_size == 0,
            f"micro_batch_size must divide batch_size: {self.micro_batch_size} does not divide "
            f"{self.batch_size}.",
        )
        for name in ("lr", "embedding_lr"):
            _above(name, getattr(self, name), 0)
        for name in ("momentum", "beta1", "beta2"):
            _require(
                0 <= getattr(self, name) < 1,
                f"{name} must be in [0, 1): it is {getattr(self, name)}.",
            )
        for name in (
            "warmup_fraction",
            "decay_fraction",
            "final_lr_fraction",
            "context_warmup_fraction",
        ):
            _between(name, getattr(self, name), 0, 1)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("on_nan", self.on_nan, ON_NANS)
        _choice("device", self.device, DEVICES)
        _choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn from the logits, and when to stop."""

    max_new_tokens: int = 256
    """The most tokens generated after the prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to p, in (0, 1]."""
    min_p: float = 0.0
    """Draw from tokens at least min_p times as probable as the best, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already there, the prompt's
    included (Keskar 2019)."""
    presence_penalty: float = 0.0
    """Taken once from the logit of a token that was generated before (OpenAI)."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that it was generated before (OpenAI)."""
    ignore_eos: bool = False
    """Never draw the end of the text."""
    seed: int | None = None
    """Of the draws, sample i of several having seed + i; None takes a fresh one."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of the result."""
    num_samples: int = 1
    """Independent continuations of the prompt."""
    logprobs: int = 0
    """How many of the model's most probable tokens to report with each token."""
    overflow: str = "stop"
    """What a full context window does: stop, or slide (see generation/window.py)."""

    def __post_init__(self) -> None:
        _between("max_new_tokens", self.max_new_tokens, 1)
        _between("num_samples", self.num_samples, 1)
        _between("top_k", self.top_k, 0)
        _between("logprobs", self.logprobs, 0)
        _between("min_p", self.min_p, 0, 1)
        _require(
            0 <= self.temperature < math.inf,
            f"temperature must be 0 or more and finite: it is {self.temperature}.",
        )
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1]: it is {self.top_p}.")
        _above("repetition_penalty", self.repetition_penalty, 0)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(math.isfinite(value), f"{name} must be a finite number: it is {value}.")
        if self.seed is not None:
            _between("seed", self.seed, 0, 2**63 - 1)
        _require(all(self.stop), "stop must not be the empty text.")
        _choice("overflow", self.overflow, OVERFLOWS)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole: what config.toml in its folder says."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    preset: str = "nano"
    """The preset that the run started from; empty if it started from a model."""
    from_: str | None = None
    """The model folder whose weights it started from; None if its weights were drawn."""
    command: str = ""
    """What was typed to start it, for the model card; empty if it was started from Python."""

    def __post_init__(self) -> None:
        full = self.model.context_length
        _require(
            self.training.sequence_length <= full,
            f"training.sequence_length (--context-length with --from) is "
            f"{self.training.sequence_length}, and the model sees {full} tokens. Use at most that.",
        )
        short, full = self.training.context_warmup_length, self.sequence_length
        _require(
            not short or full % short == 0,
            f"training.context_warmup_length must divide model.context_length, or the "
            f"sequence_length if there is one: {short} does not divide {full}. Use 0 for none.",
        )

    @property
    def sequence_length(self) -> int:
        """Tokens per training sequence, a warm-up with shorter ones left out."""
        return self.training.sequence_length or self.model.context_length
