"""Model configuration, and the names of architectures, activations and attention scores.

Import ModelConfig from ``config``: with the ring hf_config, it also has the settings of Hugging
Face model types.
"""

from dataclasses import dataclass
from typing import Literal

from minigpt.errors import require_choice
from minigpt.fields import check_fields, option, require, require_divides, round_up, setting
from minigpt.rings import ring

OWN_TYPE = "minigpt"
"""Model type of models without a Hugging Face equivalent: other attention scores, LSTMs."""
ACTIVATIONS = ("silu", "relu", "relu2", "gelu_tanh", "gelu", "gelu_sigmoid")
ARCHS = {
    "gpt": "model.gpt:GPT",
    "lstm": "model.variants.lstm:LSTM",
    "lstm-attention": "model.variants.lstm:LSTM",
}
"""Architecture -> its class, as module:name below ``minigpt``."""
ATTENTIONS = {
    "scaled_dot": "model.scores:Score",
    "dot": "model.variants.products:DotScore",
    "general": "model.variants.products:GeneralScore",
    "concat": "model.variants.tanh_scores:ConcatScore",
    "additive": "model.variants.tanh_scores:AdditiveScore",
}
"""Attention score -> its class."""
_ATTENTION_OF = {"gpt": "scaled_dot", "lstm": "none", "lstm-attention": "additive"}


@dataclass(frozen=True, kw_only=True)
class PlainModelConfig:
    """Architecture of a language model: enough to build it and to write its config.json."""

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
    """Key/value heads per block, G, a divisor of n_head. 0 derives n_head."""
    d_head: int = setting(0, "[0, 2**28]")
    """Width of each head, D; even for llama. 0 derives d_model / n_head."""
    d_mlp: int = setting(0, "[0, 2**28]")
    """Hidden width of the MLP. 0 derives 4 d_model (gpt2) or 8/3 d_model, rounded up to a multiple
    of 32 (llama). An LSTM has 4 d_model gates."""
    activation: str = ""
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
    rope_theta: float = setting(10_000.0, "(0, inf)")
    """Base of the RoPE frequencies (llama)."""
    norm_eps: float = setting(1e-5, "(0, inf)")
    """Epsilon added under the square root of every norm."""
    tie_embeddings: bool = False
    """Whether the token embedding and the output projection share one matrix."""
    dropout: float = option(0.0, "[0, 1)", shown="by the size of the text")
    """Dropout probability of embeddings and residual branches, in [0, 1)."""
    model_type: str = ""
    """Hugging Face model type. Empty derives gpt2, llama, qwen2 or qwen3, or minigpt for a model
    without a Hugging Face equivalent."""

    def __post_init__(self) -> None:
        check_fields(self)
        is_llama = self.family == "llama"
        is_wide = self.arch != "gpt" or not is_llama
        is_derived = not self.d_head
        if is_derived or not is_llama:
            require_divides("n_head", self.n_head, "d_model", self.d_model, self._widths())
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
        if "lstm" in self.arch or self.attention == "none":
            ring("model.variants").check_lstm(self)
        require_divides("n_kv_head", self.n_kv_head, "n_head", self.n_head)
        if is_llama:
            require(
                self.d_head % 2 == 0 or self.arch != "gpt",
                f"d_head must be even, because RoPE rotates pairs: it is {self.d_head}."
                + (self._widths() if is_derived else f" Try d_head {self.d_head + 1}."),
            )
        else:
            self._check_gpt2()
        self._check_layout()

    @property
    def kind(self) -> str:
        """Model type of config.json; for minigpt's own models, a description of a word or two."""
        if self.model_type != OWN_TYPE:
            return self.model_type
        return f"{self.family}, {self.attention}" if self.arch == "gpt" else self.arch

    @property
    def n_attention_layer(self) -> int:
        """Number of layers with attention."""
        return {"gpt": self.n_layer, "lstm-attention": 1, "lstm": 0}[self.arch]

    def _widths(self) -> str:
        """Return the remedy for a d_model that does not fit the heads: the nearest that do."""
        unit = self.n_head * (2 if self.family == "llama" and self.arch == "gpt" else 1)
        below, above = self.d_model // unit * unit, round_up(self.d_model + 1, unit)
        return f" Try d_model {above}.{f' The next smaller one is {below}.' if below else ''}"

    def _check_gpt2(self) -> None:
        require(
            not self.qk_norm and self.n_kv_head == self.n_head,
            "the gpt2 family has neither qk_norm nor grouped heads. Use family llama.",
        )
        require(
            self.attention_bias == "none" and not self.mlp_bias,
            "the gpt2 family always has all biases: leave attention_bias and mlp_bias out.",
        )
        require(
            self.d_head == self.d_model // self.n_head,
            f"the gpt2 family needs d_head = d_model / n_head: d_head is {self.d_head}.",
        )

    def _layout(self) -> str:
        """Return the model type of this shape."""
        return OWN_TYPE

    def _check_layout(self) -> None:
        """Raise ConfigError for a setting that this model type does not support."""
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("model_type", self.model_type, (OWN_TYPE,))
