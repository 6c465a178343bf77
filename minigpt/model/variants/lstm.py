"""LSTM language models: without attention, and with attention over the hidden states.

Shapes: L layers, B batch, T new tokens, S positions in view, C model dim, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.config import ModelConfig
from minigpt.model.attention import PassCollector, Recorder, attend
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.model.layers import make_norm
from minigpt.model.scores import make_score


class RecurrentBlock(nn.Module):
    """An LSTM layer: (B, T, C) -> its hidden states (B, T, C).

    Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of
        Gers et al. 2000; dropout between layers, not time steps: Zaremba et al. 2014,
        arXiv:1409.2329.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.lstm = nn.LSTM(config.d_model, config.d_model, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Continue from the last state in the cache, or from zeros.

        All new states are added to the cache, so that it can be truncated anywhere: hidden states
        (B, 1, T, C) as keys, which attention reads, and cell states as values.
        """
        hidden = self._all_steps(x) if cache is None else self._step_by_step(x, cache)
        return self.dropout(hidden)

    def _all_steps(self, x_BTC: Tensor) -> Tensor:
        # On a CPU without AVX-512, oneDNN has no LSTM in bfloat16, which autocast would request.
        is_cast = x_BTC.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
        if is_cast or not torch.is_autocast_enabled("cpu"):
            return self.lstm(x_BTC)[0]
        with torch.autocast("cpu", enabled=False):
            return self.lstm(x_BTC.to(self.lstm.get_parameter("weight_ih_l0").dtype))[0]

    def _step_by_step(self, x_BTC: Tensor, cache: KVCache) -> Tensor:
        # nn.LSTM returns only the last cell state.
        weights = [self.lstm.get_parameter(name) for name in self.lstm._all_weights[0]]
        if cache.length:
            stored = (cache.keys_LBGSD, cache.values_LBGSD)
            h, c = (states[self.layer, :, 0, cache.length - 1] for states in stored)
        else:
            h = c = x_BTC.new_zeros(len(x_BTC), x_BTC.shape[2])
        hidden, cells = [], []
        for x_BC in x_BTC.unbind(dim=1):
            h, c = torch.lstm_cell(x_BC, (h, c), *weights)
            hidden.append(h)
            cells.append(c)
        hidden_BTC = torch.stack(hidden, dim=1)
        cache.write(self.layer, hidden_BTC[:, None], torch.stack(cells, dim=1)[:, None])
        return hidden_BTC


class StateAttention(nn.Module):
    """Causal attention over the hidden states: (B, T, C) -> (B, T, C).

    h' = tanh(W_c [context; h]), with W_c split into ``output`` for the context and ``own`` for h.

    Source: Bahdanau et al. 2014, arXiv:1409.0473 (the additive score); Luong et al. 2015,
        arXiv:1508.04025, equation 5 (the attentional vector).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.score = make_score(config)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)
        self.own = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        h_BTC: Tensor,
        states_B1SC: Tensor,
        collector: PassCollector | None = None,
        visible_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend to the states up to and including those of h."""
        q_B1TC = self.score.fold(h_BTC[:, None])
        context_B1TC = attend(self.score, q_B1TC, states_B1SC, states_B1SC, visible_BS, collector)
        return torch.tanh(self.output(context_B1TC[:, 0]) + self.own(h_BTC))


class LSTM(LanguageModel):
    """An LSTM language model, with attention over the top hidden states if the config has it.

    Source: Mikolov et al. 2010 (recurrent language models); Zaremba et al. 2014, arXiv:1409.2329.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(RecurrentBlock(config, i) for i in range(config.n_layer))
        self.attention = StateAttention(config) if config.n_attention_layer else None
        self.final_norm = make_norm(config, config.d_model)
        self.unembedding = None
        if not config.tie_embeddings:
            self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Self:
        model = super().from_tensors(config, tensors)
        for block in model.blocks:
            assert isinstance(block, RecurrentBlock)
            block.lstm.flatten_parameters()  # for cuDNN
        return model

    @property
    def attentions(self) -> Sequence[StateAttention]:
        return [] if self.attention is None else [self.attention]

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

        Args: as GPT.forward. visible_BS masks states in attention; they still influence later
            states.
        Returns: (B, T, V), or (B, logits_to_keep, V).
        Raises: ValueError if more than context_length positions would be in view, or for visible_BS
            without attention.
        """
        if visible_BS is not None and self.attention is None:
            raise ValueError("an LSTM without attention cannot mask positions")
        _, end = self.positions_of(tokens, cache)
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x, cache)
        if self.attention is not None:
            states_B1SC = x[:, None] if cache is None else cache.keys_LBGSD[-1, :, :, :end]
            collector = None if recorder is None else PassCollector(recorder, tokens.shape[1])
            x = self.attention(x, states_B1SC, collector, visible_BS)
            if collector is not None:
                collector.finish()
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.logits(x, logits_to_keep)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights in-place.

        Matrices are normal with std 1 / sqrt(fan-in), where input and state (or context and state)
        count as one input. Biases are zero, except for the forget gates': one, so that states are
        remembered at first (Jozefowicz et al. 2015). The embedding has std 1, as no norm follows
        it, and the output projection is zero; if tied, both have std 1 / sqrt(C).
        """
        d_model = self.config.d_model
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
            elif name == "embedding.weight":
                std = d_model**-0.5 if self.config.tie_embeddings else 1.0
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name == "unembedding.weight" or ".bias_" in name:
                nn.init.zeros_(parameter)
            elif ".score." not in name:
                nn.init.normal_(parameter, std=(2 * d_model) ** -0.5, generator=generator)
        for block in self.blocks:
            assert isinstance(block, RecurrentBlock)
            # torch's gates are input, forget, cell, output; its two biases are added.
            bias = block.lstm.get_parameter("bias_ih_l0")
            nn.init.ones_(bias.data[d_model : 2 * d_model])
        if self.attention is not None:
            self.attention.score.init_weights(generator)
