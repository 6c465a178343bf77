"""Hugging Face model families: MODEL_TYPE.py in this folder defines the ``FAMILY`` of a model_type.

It maps config.json to ModelConfig and Hugging Face's tensor names to ours, in both directions.
Each field of a config.json is used, has no effect, or is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pkgutil import iter_modules
from typing import Any

from minigpt.checkpoint.config_json import check_known, common_fields
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, cut
from minigpt.hf_config import has_family
from minigpt.model.language_model import LanguageModel
from minigpt.model_config import ARCHS, OWN_TYPE
from minigpt.rings import load_class, ring
from minigpt.settings import build
from minigpt.text.tokenizer import Tokenizer

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
    "relu": "relu",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "quick_gelu": "gelu_sigmoid",
}
"""config.json's activation -> ModelConfig's. Of several names, the first is written."""
# Words in the names of fields that change what a model computes. Sizes are not included: an unread
# size cannot be wrong, since the shapes of all tensors are checked.
_COMPUTATION = re.compile(
    r"""(?:^|[_.])(?:
    act(?:_|$)|activation|alibi|attend|attention|attn|bidirectional|cap(?!tion)|causal|clamp|clip|
    conv(?!er)|embed|embedding|eps|epsilon|expert|factor|fourier|gate|gelu|global|glu|interpolat|
    kv_shar|layernorm|local|logit|loop|mamba|mask|memory|mix|moe|mrope|multipl|mup|nope|norm|ntk|
    parallel|position|qk|quant|recurren|relu|residual|rmsnorm|rop|rotar|router|scal|shar(?!d)|silu|
    sink|sliding|soft|sparse|sparsity|ssm|swiglu|temperature|theta|window|yarn)""",
    re.VERBOSE | re.IGNORECASE,
)
# Fields of training, generation and other tasks whose names match the pattern above.
_WORDS = """
    attn_implementation clip_grad_norm encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
    experts_implementation gradient_checkpointing gradient_clip_norm guidance_scale
    label_smoothing_factor local_dir local_files_only local_rank low_memory mask_token_id
    max_grad_norm mixed_precision num_logits_to_keep
    output_attentions output_hidden_states output_logits output_router_logits temperature
    renormalize_logits router_aux_loss_coef use_flash_attention use_flash_attn
"""
_NOT_COMPUTED = frozenset(_WORDS.split())
_FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}
_DERIVED = ("n_inner", "num_key_value_heads", "head_dim")  # derived from others if null
BOTH = ("weight", "bias")
"""Tensors of a module with a bias, for ``same``."""


@dataclass(frozen=True)
class TensorName:
    """A Hugging Face tensor and its name in our models; ``{i}`` is the index of the block."""

    theirs: str
    """Name without the prefix of the family."""
    ours: tuple[str, ...]
    """Our name; several if theirs is the concatenation of ours along the outputs."""
    is_transposed: bool = False
    """Whether theirs is (in, out), as in GPT-2's Conv1D, and ours (out, in), as in nn.Linear."""
    shares: tuple[int, ...] = ()
    """Relative sizes of ours in theirs. Empty for equal sizes."""
    n_groups: int = 1
    """Number of groups of outputs, such as heads, each with a part of all of ours."""


def same(theirs: str, ours: str, *suffixes: str) -> Iterator[TensorName]:
    """Yield the names of a module's tensors (default: its weight) that only need renaming."""
    for suffix in suffixes or ("weight",):
        yield TensorName(f"{theirs}.{suffix}", (f"{ours}.{suffix}",))


@dataclass(frozen=True, kw_only=True)
class Family:
    """Mapping of a Hugging Face model type to ModelConfig and our tensors."""

    architecture: str
    """Name of the transformers class, such as LlamaForCausalLM."""
    prefix: str
    """Prefix of all tensor names except that of the output projection."""
    head: str = "lm_head.weight"
    """Name of the output projection."""
    fields: Mapping[str, str]
    """ModelConfig field -> config.json field."""
    activations: Mapping[str, str]
    """config.json's activation -> ModelConfig's. Of several names, the first is written."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """config.json field -> value that transformers uses if it is absent."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """config.json field -> the only supported value; absent or null means the same."""
    no_effect: frozenset[str] = frozenset()
    """config.json fields that change no logits, or that ``read`` reads."""
    constants: Mapping[str, Any]
    """ModelConfig field -> value that the model type implies."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """config.json field -> value written for every model."""
    model: type[LanguageModel] | str | None = None
    """Model class, or "module:Class" of one in a ring; None for GPT. Models in a layout that GPT
    can compute use it only if they have ``hf_fields``."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ModelConfig values of config.json fields that need more than renaming.

        ``hf_fields`` are the fields that the model class reads; they are written back as read.
        """
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the config.json fields of ModelConfig values that need more than renaming."""
        return {}

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        """Yield the names of all tensors except the output projection, embedding first."""
        raise NotImplementedError


def family_of(model_type: object) -> Family:
    """Return the family of a model type.

    Raises: CheckpointError if there is no file for it.
    """
    if model_type is None:
        raise CheckpointError(
            "the field model_type is missing, so this may be another program's file. "
            "Download the config.json of the model in Hugging Face's format."
        )
    if not isinstance(model_type, str) or not has_family(model_type):
        known = [*sorted(module.name for module in iter_modules(__path__)), OWN_TYPE]
        raise CheckpointError(
            f"unsupported model_type {str(model_type)[:80]!r}. "
            f"Choose a model of type {', '.join(known)}."
        )
    return ring(f"checkpoint.families.{model_type}").FAMILY


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed config.json of a Hugging Face model type; see ``read_config_json``."""
    family = family_of(config.get("model_type"))
    fixed = {**family.fixed, **_FIXED}
    _check_not_quantized(config.get("quantization_config"))
    known = {*family.fields.values(), *fixed, *family.no_effect}
    check_known(config, known.union(filter(_is_ignored, config)))
    for name, value in fixed.items():
        check_fixed(name, config.get(name), value)
    values = {ours: _value(config, family, theirs) for ours, theirs in family.fields.items()}
    values = {ours: value for ours, value in values.items() if value is not None}
    activation = values["activation"]
    if not isinstance(activation, str) or activation not in family.activations:
        raise unsupported(family.fields["activation"], activation, ", ".join(family.activations))
    values["activation"] = family.activations[activation]
    values |= family.read(config)
    own = values.get("hf_fields", {})
    values["hf_fields"] = [f"{name}={json.dumps(own[name])}" for name in sorted(own)]
    return build(ModelConfig, {**values, "model_type": config["model_type"], **family.constants})


def _is_ignored(name: str) -> bool:
    """Return whether a config.json field that the family does not read can be ignored.

    transformers ignores such fields. But one whose name suggests computation may be read by the
    model's own code or by a later version, so it is not ignored.
    """
    return name in _NOT_COMPUTED or not _COMPUTATION.search(name)


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json fields that only the model's family reads.

    Raises: ConfigError if they are not NAME=JSON.
    """
    try:
        pairs = (field.split("=", 1) for field in config.hf_fields)
        return {name: json.loads(value) for name, value in pairs}
    except ValueError as error:
        raise ConfigError(f"hf_fields must be a list of NAME=JSON: {str(error)[:80]}.") from None


def _value(config: Mapping[str, Any], family: Family, name: str) -> Any:
    value = config.get(name, family.defaults.get(name))
    if value is None and name not in _DERIVED:
        value = family.defaults.get(name)
        if value is None:
            raise CheckpointError(f"the field {name} is missing. Download config.json again.")
    return value


def unsupported(name: str, value: Any, supported: Any) -> CheckpointError:
    """Return the error for a field of config.json whose value we do not implement."""
    return CheckpointError(
        f"{name} is {cut(value)}, but only {supported!r} is supported. "
        "Use transformers for this model."
    )


def check_fixed(name: str, value: Any, supported: Any) -> None:
    """Raise CheckpointError if a field of config.json is neither null nor the supported value."""
    if value is None or value == supported:
        return
    if name.endswith("partial_rotary_factor"):
        raise CheckpointError(
            f"{name} is {cut(value)}, but models of this type rotate whole heads, and "
            "transformers ignores this field or fails. Remove it if whole heads are intended."
        )
    raise unsupported(name, value, supported)


def _check_not_quantized(value: Any) -> None:
    """Raise CheckpointError if the field quantization_config of config.json is set."""
    if value is None:
        return
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    how = f" ({method[:40]})" if isinstance(method, str) else ""
    raise CheckpointError(
        f"the weights are stored quantized{how}. Use the model from before it was quantized, or "
        "transformers."
    )


def check_flag(name: str, value: Any) -> None:
    """Raise CheckpointError if a field of config.json is not true, false or null."""
    if not isinstance(value, bool | None):
        raise unsupported(name, value, "true, false")


def check_count(name: str, value: Any) -> None:
    """Raise CheckpointError if a field of config.json is not a positive integer."""
    if type(value) is not int or value < 1:
        raise unsupported(name, value, "a positive integer")


def is_positive(value: Any, limit: float = 1e9) -> bool:
    """Return whether a field of config.json is a positive number below a limit."""
    return type(value) in (int, float) and 0 < value < limit


def head_width(config: Mapping[str, Any]) -> int:
    """Return the head dimension in a Llama-like config.json; 0 if its fields are damaged."""
    d_head, width, n_head = (
        config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads")
    )
    if d_head is None and type(width) is int and type(n_head) is int and n_head > 0:
        d_head = width // n_head
    return d_head if type(d_head) is int else 0


def model_config_to_hf(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return config.json of a Hugging Face model type; see ``config_json``."""
    family = family_of(config.model_type)
    written = {"architectures": [family.architecture], **common_fields(config, tokenizer)}
    written |= {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
    written[family.fields["activation"]] = next(
        theirs for theirs, ours in family.activations.items() if ours == config.activation
    )
    written |= {**family.write(config), **family.written, "embd_pdrop": config.dropout}
    return written | hf_fields(config)


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """Return the class of a model: its family's, or else that of its architecture.

    Raises: ModuleNotFoundError if it is in a file that this installation does not have.
    """
    found: type[LanguageModel] | str = ARCHS[config.arch]
    if config.has_own_class:
        found = ring(f"checkpoint.families.{config.model_type}").FAMILY.model or found
    base: type[LanguageModel] = load_class(found) if isinstance(found, str) else found
    has_long_rope = any(field.startswith("rope_scaling=") for field in config.hf_fields)
    return ring("checkpoint.long_rope").with_long_rope(base) if has_long_rope else base
