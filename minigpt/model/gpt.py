"""The decoder-only Transformer, in GPT-2's block layout and in Llama's.

Shapes: B batch, T new tokens, S positions in view (cached and new), C model dim, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.config import ModelConfig
from minigpt.model.attention import Attention, PassCollector, Recorder
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.model.layers import MLP, GatedMLP, Rotary, make_norm, rotary_table
from minigpt.model.scores import Score


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections: (B, T, C) -> (B, T, C).

    A subclass in checkpoint/families/ may have other norms, or its own forward, which must call
    ``PassCollector.add_residual`` with the residual stream after each branch.
    """

    is_parallel = False
    """Whether the MLP reads the input of the block, without the output of attention."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.d_model)
        self.attention = attention
        self.attention_post_norm: nn.Module = nn.Identity()
        self.mlp_norm = make_norm(config, config.d_model)
        self.mlp = MLP(config) if config.family == "gpt2" else GatedMLP(config)
        self.mlp_post_norm: nn.Module = nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        cache: KVCache | None = None,
        collector: PassCollector | None = None,
        visible_BS: Tensor | None = None,
    ) -> Tensor:
        """Add the outputs of attention and of the MLP to the residual stream."""
        normed = self.attention_norm(x)
        attended = self.attention(normed, rotary, cache, collector, visible_BS)
        residual = x + self.dropout(self.attention_post_norm(attended))
        normed = self.mlp_norm(x if self.is_parallel else residual)
        x = residual + self.dropout(self.mlp_post_norm(self.mlp(normed)))
        if collector is not None:
            collector.add_residual(residual, x)
        return x


class GPT(LanguageModel):
    """A causal language model: token ids in, logits of each next token out.

    Subclasses, such as those in checkpoint/families/, may override ``block_class``,
    ``attention_class``, ``embed``, ``rotary_table`` and ``logits``.

    Source: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama).
    """

    block_class: type[Block] = Block
    attention_class: type[Attention] = Attention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.rotary_cos: Tensor
        self.rotary_sin: Tensor
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.family == "gpt2":
            self.positions = nn.Embedding(config.context_length, config.d_model)
        elif not self.embedding.weight.is_meta:  # on the meta device, no tables are needed
            self._make_rotary()
        self.dropout = nn.Dropout(config.dropout)
        attentions = (self.attention_class(config, layer) for layer in range(config.n_layer))
        self.blocks = nn.ModuleList(self.block_class(config, a) for a in attentions)
        self.final_norm = make_norm(config, config.d_model)
        self.unembedding = None
        if not config.tie_embeddings:
            self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def _make_rotary(self) -> None:
        cos, sin = self.rotary_table()
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Self:
        model = super().from_tensors(config, tensors)
        if config.family == "llama":
            model._make_rotary()
            model.rotary_cos = model.rotary_cos.to(model.device, model.dtype)
            model.rotary_sin = model.rotary_sin.to(model.device, model.dtype)
        return model

    @property
    def attentions(self) -> Sequence[Attention]:
        return [block.attention for block in self.blocks if isinstance(block, Block)]

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the token embeddings (B, T, C); a subclass may scale them, for example."""
        return self.embedding(tokens)

    def rotary_table(self, divisor: Tensor | None = None, scale: float = 1.0) -> Rotary:
        """Return cos and sin of RoPE, whose first axis is the position."""
        return rotary_table(self.config, divisor, scale)

    def rotary(self, start: int, end: int) -> Rotary:
        """Return cos and sin of the positions from ``start`` to ``end``."""
        return self.rotary_cos[start:end], self.rotary_sin[start:end]

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        *,
        visible_BS: Tensor | None = None,
        logits_to_keep: int = 0,
        recompute: bool = False,
    ) -> Tensor:
        """Return the logits of the token after each position.

        Args: tokens (B, T), ids below V, which follow the positions in the cache and are added to
            it; recorder receives the attention of all layers; visible_BS, false for positions that
            no query may attend to; logits_to_keep, number of last positions to return
            logits for, 0 for all; recompute, whether to use activation checkpointing for each block
            (Chen et al. 2016, arXiv:1604.06174).
        Returns: (B, T, V), or (B, logits_to_keep, V).
        Raises: ValueError if more than context_length positions would be in view.
        """
        start, end = self.positions_of(tokens, cache)
        x = self.embed(tokens)
        rotary = None
        if self.config.family == "gpt2":
            x = x + self.positions(torch.arange(start, end, device=tokens.device))
        else:
            rotary = self.rotary(start, end)
        x = self.dropout(x)
        collector = None if recorder is None else PassCollector(recorder, tokens.shape[1])
        if collector is not None:
            collector.add_residual(x)
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, cache, collector, visible_BS)
        if cache is not None:
            cache.advance(tokens.shape[1])
        if collector is not None:
            collector.finish(None if cache is None else cache.values_LBGSD[:, :, :, :end])
        return self.logits(x, logits_to_keep)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights in-place.

        gpt2: normal, std 0.02, divided by sqrt(2 n_layer) for outputs of residual branches (Radford
        et al. 2019). llama: normal, std 1 / sqrt(fan-in), but zero for outputs of residual branches
        and logits, so that blocks begin as the identity (Zhang et al. 2019, arXiv:1901.09321).
        Parameters of scores: see ``Score.init_weights``.
        """
        is_gpt2 = self.config.family == "gpt2"
        for name, parameter in self.named_parameters():
            if ".score." in name:
                continue
            is_branch_output = name.endswith(("attention.output.weight", "mlp.down.weight"))
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            elif is_gpt2:
                std = 0.02 / (2 * self.config.n_layer) ** 0.5 if is_branch_output else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            elif is_branch_output or name == "unembedding.weight":
                nn.init.zeros_(parameter)
            else:
                std = parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)
        for module in self.modules():
            if isinstance(module, Score):
                module.init_weights(generator)
