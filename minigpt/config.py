"""Every setting of a model and a run, as frozen dataclasses that check themselves.

A config that exists is valid: a bad value raises ConfigError when it is made. A field whose default
is documented as derived is filled in at that moment, so that a saved config is complete.
"""

import codecs
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from minigpt.errors import ConfigError, cut, require_choice
from minigpt.rings import has_ring

DEFAULT_TEXT = "builtin:tales"
"""Name of the text that is read where none is given."""
HF_LAYOUTS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Hugging Face model types that GPT computes; other files in checkpoint/families/ add more."""
ACTIVATIONS = ("silu", "relu", "relu2", "gelu_tanh", "gelu", "gelu_sigmoid")
ARCHS = {
    "gpt": "model.gpt:GPT",
    "lstm": "model.variants.lstm:LSTM",
    "lstm-attention": "model.variants.lstm:LSTM",
}
"""Architectures, and the class of each: module and name below ``minigpt``."""
ATTENTIONS = {
    "scaled_dot": "model.scores:Score",
    "dot": "model.scores:DotScore",
    "general": "model.scores:GeneralScore",
    "concat": "model.variants.tanh_scores:ConcatScore",
    "additive": "model.variants.tanh_scores:AdditiveScore",
}
"""Attention scores, and the class of each."""
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16"]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
DEVICES = get_args(Device)
DTYPES = get_args(Dtype)
QUANTIZATIONS = get_args(Quantization)

_RECURRENT = (("arch", "lstm"), ("arch", "lstm-attention"))
_NO_ROPE = (("family", "gpt2"), *_RECURRENT)
_NO_SCALING = (*_NO_ROPE, ("rope_scaling_factor", 1))
_NOT_LLAMA3 = (*_NO_SCALING, *(("rope_scaling", kind) for kind in ("linear", "dynamic", "yarn")))
_NOT_YARN = (*_NO_ROPE, *(("rope_scaling", kind) for kind in ("llama3", "linear", "dynamic")))
_NOT_WSD = (("schedule", "cosine"), ("schedule", "linear"), ("schedule", "constant"))
_ADAMW = (("optimizer", "adamw"),)
_NO_VALIDATION = (("data.val_fraction", 0),)
_GREEDY = (("temperature", 0), ("top_k", 1))

_LARGEST_FLOAT = 1e30  # float32 holds it, and its square root's square
_ATTENTION_OF = {"gpt": "scaled_dot", "lstm": "none", "lstm-attention": "additive"}


Conditions = Iterable[tuple[str, Any]]
"""Names of other fields, those of another table dotted as in ``--set``, and a value of each."""


def setting(
    default: Any = MISSING, bounds: str = "", choices: Iterable[str] = (), void_if: Conditions = ()
) -> Any:
    """Declare a field that a TOML file and ``--set`` can give.

    Args: bounds, the interval of valid values, as in ``[0, 1)`` or ``(0, inf)``; choices, the valid
        values where the type does not name them; void_if, values of other fields with which this
        one has no effect (see ``commands.usage``).
    """
    metadata = {"bounds": bounds, "choices": tuple(choices), "void_if": tuple(void_if)}
    return field(default=default, metadata=metadata)


def option(
    default: Any = MISSING,
    bounds: str = "",
    choices: Iterable[str] = (),
    void_if: Conditions = (),
    **about: Any,
) -> Any:
    """Declare a field that is a command-line option too, named as the field.

    Args: bounds, choices and void_if, as in ``setting``; about, fields of
        ``commands.options.Option``: what --help shows beside the field's type, default and
        docstring.
    """
    metadata = {"bounds": bounds, "choices": tuple(choices), "void_if": tuple(void_if)}
    return field(default=default, metadata=metadata | {"option": about})


def choices_in(hint: Any) -> tuple[str, ...]:
    """Return the choices of a type that allows nothing but a few words, or None; else ()."""
    words, kinds = parts_of(hint)
    return tuple(word for word in words if word) if set(kinds) <= {NoneType} else ()


def parts_of(hint: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Split a type into the words of its ``Literal[...]`` and its other types."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
    words = tuple(word for literal in literals for word in get_args(literal))
    return words, tuple(kind for kind in kinds if kind not in literals)


def check_fields(config: Any) -> None:
    """Check each field of a config against its choices and bounds.

    Raises: ConfigError for the first value outside them.
    """
    for f in fields(config):
        value, bounds = getattr(config, f.name), f.metadata.get("bounds")
        choices = choices_in(f.type) or f.metadata.get("choices", ())
        if choices and value != f.default:
            require_choice(f.name, value, choices)
        elif bounds and not isinstance(value, str | None):
            require_within(f.name, value, bounds)


def require_within(name: str, value: float, bounds: str) -> None:
    """Raise ConfigError if a value is outside an interval."""
    low, high = _ends(bounds)
    is_count = high == math.inf or (bounds[-1] == "]" and high > 1)
    if isinstance(value, int) and high == math.inf:  # torch's integers have 64 bits
        high, bounds = 2.0**63, bounds.replace("inf", "2**63")
    if isinstance(value, float) and _LARGEST_FLOAT <= value < high:
        raise ConfigError(f"{name} must be below {_LARGEST_FLOAT:g}: it is {value:g}.")
    is_low_enough = value < high or (value == high and bounds[-1] == "]")
    if is_low_enough and (low < value or (value == low and bounds[0] == "[")):
        return
    expected = f"in {bounds}"
    if value in (math.inf, -math.inf) or value != value or low == -math.inf:
        expected = "a finite number"
    elif is_count and value <= low:
        expected = f"at least {low:g}" if bounds[0] == "[" else f"above {low:g}"
    raise ConfigError(f"{name} must be {expected}: it is {cut(value)}.")


@cache
def _ends(bounds: str) -> tuple[float, float]:
    low, high = bounds[1:-1].split(", ")
    base, _, exponent = high.partition("**")
    return float(low), float(base) ** float(exponent or 1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_divides(name: str, part: int, of: str, whole: int, remedy: str = "") -> None:
    message = f"{name} must divide {of}: {part} does not divide {whole}.{remedy}"
    _require(whole % part == 0, message)


def round_up(value: float, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return math.ceil(value / multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a language model; enough to build it and to write its config.json."""

    vocab_size: int = setting(bounds="[1, 2**28]")
    """Number of tokens in the vocabulary, V."""
    context_length: int = option(bounds="[1, 2**28]")
    """Longest sequence that the model can process, in tokens."""
    n_layer: int = option(bounds="[1, 2**12]")
    """Number of blocks."""
    n_head: int = option(bounds="[1, 2**16]")
    """Query heads per block, H. 1 for an LSTM."""
    d_model: int = option(bounds="[1, 2**28]")
    """Width of the residual stream, C."""
    arch: str = option("gpt", choices=tuple(ARCHS))
    """Architecture. An LSTM, with or without attention over its states, is for comparison."""
    family: Literal["llama", "gpt2"] = option("llama")
    """Block layout. llama: RMSNorm, RoPE, gated MLP; gpt2: LayerNorm, learned positions."""
    n_kv_head: int = setting(0, "[0, 2**16]")
    """Key/value heads per block, G, which divides n_head. 0 derives n_head."""
    d_head: int = setting(0, "[0, 2**28]")
    """Width of one head, D, even for llama. 0 derives d_model / n_head."""
    d_mlp: int = setting(0, "[0, 2**28]")
    """Hidden width of the MLP. 0 derives 4 d_model (gpt2) or 8/3 d_model, rounded up to a multiple
    of 32 (llama). An LSTM has 4 d_model gates."""
    activation: str = setting("", void_if=_RECURRENT)
    """Activation function of the MLP. Empty derives silu (llama) or gelu_tanh (gpt2)."""
    attention: str = option("", choices=(*ATTENTIONS, "none"))
    """Attention score. Empty derives scaled_dot (gpt), additive (lstm-attention) or none (lstm).
    See model/scores.py."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head (llama; model type qwen3)."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of the attention projections (llama). all includes the output projection."""
    mlp_bias: bool = False
    """Biases of the MLP projections (llama). The gpt2 family always has all biases."""
    rope_theta: float = setting(10_000.0, "(0, inf)", void_if=_NO_ROPE)
    """Base of the RoPE frequencies (llama)."""
    rope_scaling: Literal["llama3", "linear", "dynamic", "yarn"] = "llama3"
    """Method of RoPE scaling: llama3 and yarn stretch long wavelengths, linear all; dynamic none
    within context_length."""
    rope_scaling_factor: float = setting(1.0, "(0, inf)", void_if=_NO_ROPE)
    """Factor by which RoPE wavelengths are stretched. 1 stretches none."""
    rope_low_freq_factor: float = setting(1.0, "(0, inf)", void_if=_NOT_LLAMA3)
    """Divisor of rope_original_context; longer wavelengths are stretched in full (llama3)."""
    rope_high_freq_factor: float = setting(4.0, "(0, inf)", void_if=_NOT_LLAMA3)
    """Divisor of rope_original_context; shorter wavelengths are not stretched, and those between
    the two limits in part (llama3)."""
    rope_beta_fast: float = setting(32.0, "(0, inf)", void_if=_NOT_YARN)
    """Turns in rope_original_context; wavelengths with more are not stretched (yarn)."""
    rope_beta_slow: float = setting(1.0, "(0, inf)", void_if=_NOT_YARN)
    """Turns in rope_original_context; wavelengths with fewer are stretched in full (yarn)."""
    rope_attention_factor: float = setting(1.0, "(0, inf)", void_if=_NOT_YARN)
    """Factor of rotated queries and keys (yarn)."""
    rope_original_context: int = setting(8192, "[1, inf)", void_if=_NO_SCALING)
    """Context length before RoPE scaling, in tokens."""
    norm_eps: float = setting(1e-5, "(0, inf)")
    """Epsilon added under the square root of every norm."""
    tie_embeddings: bool = False
    """Whether the token embedding is the output projection too."""
    dropout: float = option(0.0, "[0, 1)", shown="by the size of the text")
    """Dropout probability of embeddings and residual branches, in [0, 1)."""
    model_type: str = ""
    """Hugging Face model type. Empty derives gpt2, llama, qwen2 or qwen3, or minigpt for a model
    that Hugging Face does not have."""
    hf_fields: tuple[str, ...] = ()
    """Fields of config.json that only the model type's own class reads, each as NAME=JSON."""

    def __post_init__(self) -> None:
        check_fields(self)
        is_llama = self.family == "llama"
        is_wide = self.arch != "gpt" or not is_llama
        if not self.d_head or not is_llama:
            _require_divides("n_head", self.n_head, "d_model", self.d_model, self._widths())
        is_derived = not self.d_head
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
        _require(
            not self.hf_fields or self.model_type != "minigpt",
            "hf_fields needs a model_type of Hugging Face. Leave it out.",
        )
        self._check_arch()
        _require_divides("n_kv_head", self.n_kv_head, "n_head", self.n_head)
        if is_llama:
            _require(
                self.d_head % 2 == 0 or self.arch != "gpt",
                f"d_head must be even, because RoPE rotates pairs: it is {self.d_head}."
                + (self._widths() if is_derived else f" Try d_head {self.d_head + 1}."),
            )
        else:
            self._check_gpt2()
        self._check_layout()
        _require(
            self.rope_low_freq_factor < self.rope_high_freq_factor,
            f"rope_high_freq_factor must be above rope_low_freq_factor: it is "
            f"{self.rope_high_freq_factor}, not above {self.rope_low_freq_factor}.",
        )
        _require(
            self.rope_scaling != "yarn"
            or (self.rope_beta_slow < self.rope_beta_fast and self.rope_theta > 1),
            "rope_scaling yarn needs rope_beta_fast above rope_beta_slow and rope_theta above 1: "
            f"they are {self.rope_beta_fast}, {self.rope_beta_slow} and {self.rope_theta}.",
        )

    @property
    def kind(self) -> str:
        """Architecture, or block layout and attention score, in a word or two."""
        if self.arch != "gpt":
            return self.arch
        return self.family if self.attention == "scaled_dot" else f"{self.family}, {self.attention}"

    @property
    def n_attention_layer(self) -> int:
        """Number of layers with attention."""
        return {"gpt": self.n_layer, "lstm-attention": 1, "lstm": 0}[self.arch]

    def _widths(self) -> str:
        """Return the remedy for a width that the heads do not divide: those that fit next to it."""
        unit = self.n_head * (2 if self.family == "llama" and self.arch == "gpt" else 1)
        below, above = self.d_model // unit * unit, round_up(self.d_model + 1, unit)
        return f" Try d_model {above}.{f' The next smaller one is {below}.' if below else ''}"

    def _check_arch(self) -> None:
        has_none = self.arch == "lstm"
        _require(
            has_none == (self.attention == "none"),
            f"attention {self.attention} does not go with arch {self.arch}. Leave attention out, "
            f"or choose arch {'lstm-attention' if has_none else 'lstm'}.",
        )
        fixed = {"family": "llama", "n_head": 1, "n_kv_head": 1, "d_head": self.d_model}
        fixed |= {"d_mlp": 4 * self.d_model, "qk_norm": False, "attention_bias": "none"}
        for name, only in (fixed | {"mlp_bias": False}).items():
            _require(
                self.arch == "gpt" or getattr(self, name) == only,
                f"with arch {self.arch}, {name} can only be {only}: it is {getattr(self, name)}. "
                "Leave it out.",
            )

    def _check_gpt2(self) -> None:
        _require(
            not self.qk_norm and self.n_kv_head == self.n_head,
            "the gpt2 family has neither qk_norm nor grouped heads. Use family llama.",
        )
        _require(
            self.attention_bias == "none" and not self.mlp_bias,
            "the gpt2 family always has all biases: leave attention_bias and mlp_bias out.",
        )
        _require(
            self.d_head == self.d_model // self.n_head,
            f"the gpt2 family needs d_head = d_model / n_head: d_head is {self.d_head}.",
        )

    def _layout(self) -> str:
        if self.arch != "gpt" or self.attention != "scaled_dot":
            return "minigpt"
        if self.family == "gpt2":
            return "gpt2"
        return "qwen3" if self.qk_norm else "qwen2" if self.attention_bias == "qkv" else "llama"

    def _check_layout(self) -> None:
        name = self.model_type
        is_file = name.isidentifier() and not name.startswith("_")
        is_other = is_file and name not in (*HF_LAYOUTS, "minigpt")
        if is_other and has_ring(f"checkpoint.families.{name}"):
            return  # the family decides what it can compute
        require_choice("activation", self.activation, ACTIVATIONS)
        layout = self._layout()
        known = {"llama": ("llama", "mistral")}.get(layout, (layout,))
        require_choice("model_type", self.model_type, known)
        # No Hugging Face model type has these, so other programs could not open the model.
        _require(
            not (self.qk_norm and self.attention_bias == "qkv"),
            "no published layout has qk_norm and biases of qkv only. Use attention_bias all.",
        )
        _require(
            not self.mlp_bias or self.model_type in ("llama", "minigpt"),
            f"the layout {self.model_type} has no MLP biases. Set mlp_bias to false.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on and its tokenizer."""

    paths: tuple[str, ...] = (DEFAULT_TEXT,)
    """Files, folders, globs, corpus names, or - for standard input. Empty, as in runs older than
    the tales, is ``builtin:python``."""
    tokenizer: str = option("bytes", metavar="NAME")
    """Tokenizer: bytes, bpe, bpe:N, gpt2, cl100k_base or o200k_base. bpe is trained on the corpus,
    which decides its size; bpe:N has N tokens in all. With ``from``, the name of the model's."""
    special: bool = option(False)
    """Parse special tokens in the text, such as <|endoftext|>, which then ends a document."""
    skip_unencodable: bool = option(False)
    """Skip and count characters that the vocabulary lacks."""
    chat: bool = option(False)
    """Read rows as conversations: messages, or prompt and completion."""
    loss_on: Literal["completion", "all"] | None = option(None, shown="completion with --chat")
    """Tokens of conversations that the loss is averaged over. completion: the assistant's."""
    chat_template: str | None = option(None, metavar="FILE", shown="the model's, or a plain one")
    """Jinja file of the chat template, or the name of one of several in the model folder."""
    format: Literal["text", "jsonl", "json", "csv", "parquet"] | None = option(
        None, shown="by suffix or content"
    )
    """Format of all files. None decides for each file, by its suffix or its first rows."""
    field: str = option("text", metavar="NAME")
    """Field or column that has the text of a row (JSONL, JSON, CSV, Parquet)."""
    encoding: str = option("utf-8", metavar="NAME", void_if=(("format", "parquet"),))
    """Character encoding of the files, by its name in Python: utf-16, cp1252, gb18030."""
    skip_bad: bool = option(False)
    """Leave out rows without text, broken or not in the encoding, and count them."""
    val_fraction: float = option(0.1, "[0, 1)", metavar="F")
    """Fraction of the text kept for validation; 0 to train on all. ``bpe`` learns no merges from
    it."""
    val_split: Literal["tail", "documents"] | None = option(
        None, shown="documents if there are ten", void_if=(("val_fraction", 0),)
    )
    """Text kept for validation. documents: whole documents, chosen by a hash of their text; tail:
    the last tokens. None derives documents if there are at least ten, else tail."""
    val: tuple[str, ...] = option((), metavar="DATA")
    """Validation text of its own, instead of a fraction; repeat for several."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.paths:
            object.__setattr__(self, "paths", ("builtin:python",))
        try:
            is_text = codecs.lookup(self.encoding)._is_text_encoding
            b"text".decode(self.encoding, "ignore")  # not those of host names
        except (LookupError, ValueError):  # ValueError: a NUL in the name, UnicodeError
            is_text = False
        _require(
            is_text,
            f"unknown encoding {self.encoding!r}. Use a name that Python knows, such as utf-8, "
            "utf-16, cp1252, latin-1, gb18030, big5 or shift_jis.",
        )
        _require(
            self.chat or (self.loss_on is None and self.chat_template is None),
            "loss_on and chat_template are for conversations. Give --chat too, or leave them out.",
        )
        _require(
            not self.chat or not (self.special or self.skip_unencodable or self.field != "text"),
            "special, skip_unencodable and field have no effect on conversations. Leave them out, "
            "or --chat.",
        )
        if self.chat and self.loss_on is None:
            object.__setattr__(self, "loss_on", "completion")
        _require(
            not self.val or (self.val_split is None and self.val_fraction == 0.1),
            "val is the whole validation text, so val_split and val_fraction do not go with it. "
            "Leave them out.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Budget, optimizer, schedule and reports of a training run."""

    max_steps: int = option(0, "[0, inf)")
    """Number of optimizer steps; 0 for no limit. A run needs one of the three max_ limits."""
    max_minutes: float = option(0.0, "[0, 1e8]")
    """Minutes of training, without evaluation; 0 for no limit. The schedule ends with it."""
    max_epochs: float = option(0.0, "[0, 1e6]", shown="by the size of the text")
    """Passes over the training tokens; 0 for no limit. Becomes max_steps once the text is read."""
    batch_size: int = option(16, "[1, 2**24]")
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = setting(0, "[0, inf)")
    """Most sequences per forward pass (gradient accumulation). 0 derives batch_size."""
    sequence_length: int = setting(0, "[0, inf)")
    """Tokens per training sequence. 0 for the model's context_length."""
    context_warmup_length: int = setting(0, "[0, inf)")
    """Tokens per sequence during context warm-up; 0 for none. It divides the later length, and a
    batch has as many more sequences."""
    context_warmup_fraction: float = setting(0.5, "[0, 1]", void_if=(("context_warmup_length", 0),))
    """Fraction of the budget spent in context warm-up, in [0, 1]."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimizer. muon: Muon for matrices and AdamW for the rest; adamw: AdamW for all."""
    lr: float = option(0.01, "(0, inf)")
    """Peak learning rate of the matrices, on AdamW's scale. Muon's updates are matched to it."""
    embedding_lr: float = setting(0.01, "(0, inf)")
    """Peak learning rate of embeddings, output projection, norms and biases (AdamW)."""
    weight_decay: float = setting(0.0, "[0, inf)")
    """Decoupled weight decay of the matrices, multiplied by the learning rate."""
    momentum: float = setting(0.95, "[0, 1)", void_if=_ADAMW)
    """Nesterov momentum of Muon, in [0, 1)."""
    newton_schulz_steps: int = setting(5, "[1, 100]", void_if=_ADAMW)
    """Newton-Schulz iterations of Muon's orthogonalization."""
    beta1: float = setting(0.9, "[0, 1)")
    """Decay rate of AdamW's first moment, in [0, 1)."""
    beta2: float = setting(0.95, "[0, 1)")
    """Decay rate of AdamW's second moment, in [0, 1)."""
    grad_clip: float = setting(1.0, "[0, inf)")
    """Largest global gradient norm; 0 for no clipping."""
    on_nan: Literal["stop", "skip"] = option("stop")
    """Action on a NaN or inf loss or gradient. skip leaves the step out, and ends the run after
    several in a row (see training/step_metrics.py)."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Learning rate schedule. wsd: warm-up, stable, decay."""
    warmup_fraction: float = setting(0.02, "[0, 1]")
    """Fraction of the budget over which the learning rate rises, in [0, 1]."""
    decay_fraction: float = setting(0.6, "[0, 1]", void_if=_NOT_WSD)
    """Fraction of the budget, at its end, over which wsd lowers the learning rate, in [0, 1]."""
    final_lr_fraction: float = setting(0.0, "[0, 1]", void_if=(("schedule", "constant"),))
    """Final learning rate as a fraction of the peak, in [0, 1]."""
    log_every: int = setting(10, "[1, inf)")
    """Steps between lines of metrics.jsonl, when the loss is read from the device."""
    eval_every: int | None = option(
        None,
        "[0, inf)",
        group="Reports",
        shown="an epoch, or a twentieth of the run",
        void_if=_NO_VALIDATION,
    )
    """Steps between validation passes; 0 for one at the end. None derives an epoch, at most a
    twentieth of the run, or 50 steps if that is more."""
    eval_tokens: int | None = setting(None, "[1, inf)", void_if=_NO_VALIDATION)
    """Most validation tokens per pass. A longer text is sampled in evenly spaced windows, the same
    in every pass. None derives a tenth of the arithmetic of training, and at least 8,192 tokens."""
    patience: float = option(0.0, "[0, inf)", shown="4", void_if=_NO_VALIDATION)
    """Epochs without a lower validation loss after which training stops; 0 for no limit."""
    average: float = setting(0.0, "[0, 1)", void_if=_NO_VALIDATION)
    """Decay per step of a moving average of the weights; 0 for none. A checkpoint holds the average
    if its validation loss is lower."""
    dropout_start: float = setting(0.0, "[0, inf)", void_if=(("model.dropout", 0),))
    """Epochs before dropout begins."""
    save_every: int = option(250, "[0, inf)", group="Reports")
    """Steps between checkpoints; 0 for one at the end. Each has its validation loss."""
    keep: int = setting(2, "[0, inf)")
    """Number of checkpoints kept besides best and latest."""
    sample_every: int | None = option(
        None, "[0, inf)", group="Reports", shown="one line per validation pass on a terminal"
    )
    """Steps between generated samples; 0 for none. None: a line per validation pass, if stderr is a
    terminal."""
    seed: int = option(1337, "[0, 2**63)")
    """Seed of the weights, data order and dropout."""
    device: Device = option("auto")
    """Device."""
    dtype: Dtype = option("auto")
    """Compute dtype. Weights stay float32; bfloat16 is by autocast."""
    save_dtype: SaveDtype = option("auto", group="Reports", shown="that of --from, else float32")
    """Dtype of saved weights. A checkpoint keeps its float32 weights in training_state/ too."""
    compile: bool = option(False)
    """Compile the model with torch.compile."""
    shard: bool = option(False)
    """Shard parameters, gradients and optimizer state with FSDP2 (torchrun)."""
    recompute: bool = option(False)
    """Save memory by activation checkpointing."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.micro_batch_size:
            object.__setattr__(self, "micro_batch_size", self.batch_size)
        _require(
            bool(self.max_steps or self.max_minutes or self.max_epochs),
            "training needs a limit: set max_steps, max_minutes or max_epochs.",
        )
        _require_divides("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is sampled from the logits, and when generation stops."""

    max_new_tokens: int = option(256, "[1, inf)")
    """Maximum number of generated tokens."""
    temperature: float = option(0.8, "[0, inf)", void_if=(("top_k", 1),))
    """Divisor of the logits; 0 for greedy decoding."""
    top_k: int = option(0, "[0, inf)", void_if=(("temperature", 0),))
    """Number of most probable tokens to sample from; 0 for all."""
    top_p: float = option(1.0, "(0, 1]", void_if=_GREEDY)
    """Nucleus sampling: cumulative probability to sample from, in (0, 1]."""
    min_p: float = option(0.0, "[0, 1]", void_if=_GREEDY)
    """Minimum probability relative to the most probable token, in [0, 1]."""
    repetition_penalty: float = option(1.0, "(0, inf)")
    """Penalty for tokens in the prompt or the output; 1 for none. Positive logits are divided by
    it, negative ones multiplied (Keskar et al. 2019)."""
    presence_penalty: float = option(0.0, "(-1e30, 1e30)")
    """Amount subtracted once from the logits of generated tokens (OpenAI)."""
    frequency_penalty: float = option(0.0, "(-1e30, 1e30)")
    """Amount subtracted from a token's logit each time it was generated (OpenAI)."""
    ignore_eos: bool = option(False)
    """Never sample the end-of-text token."""
    seed: int | None = option(None, "[0, 2**63)", shown="random, printed")
    """Seed of the sampling RNG. Sample i of several has seed + i; None for a random seed."""
    stop: tuple[str, ...] = option((), metavar="TEXT", has_escapes=True)
    r"""Stop string (\n for a line break); repeat for several. It is not part of the output."""
    num_samples: int = option(1, "[1, 2**16]")
    """Number of samples, generated in parallel."""
    logprobs: int = option(0, "[0, inf)", group="Output")
    """Number of most probable tokens to report at each step."""
    overflow: Literal["stop", "slide"] = option("stop")
    """Action when the context window is full. See generation/window.py."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require(all(self.stop), "stop must not be the empty string.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one training run, as in the config.toml of its folder."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    preset: str = "nano"
    """Preset that the run started from. Empty if it started from a model."""
    from_: str | None = option(None, group="Run", metavar="MODEL")
    """Model to fine-tune: a folder, a run, or org/name on the Hub."""
    command: str = ""
    """Command that started the run, for the model card. Empty if it was started from Python."""

    def __post_init__(self) -> None:
        full = self.model.context_length
        _require(
            self.training.sequence_length <= full,
            f"training.sequence_length (--context-length with --from) is "
            f"{self.training.sequence_length}, and the model sees {full} tokens. Use at most that.",
        )
        if short := self.training.context_warmup_length:
            name, full = "training.context_warmup_length", self.sequence_length
            of = "model.context_length, or the sequence_length if there is one"
            _require_divides(name, short, of, full, " Use 0 for none.")

    @property
    def sequence_length(self) -> int:
        """Tokens per training sequence after context warm-up."""
        return self.training.sequence_length or self.model.context_length
