"""The base class of all architectures, causal language models, and the lookup of their classes.

Shapes: B batch, T new tokens, C model dim, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt.config import ModelConfig
from minigpt.model.attention import AttentionLayer
from minigpt.model.cache import KVCache
from minigpt.model_config import ARCHS, OWN_TYPE
from minigpt.rings import load_class, ring


class _WithoutInit(TorchFunctionMode):
    """Skips the random initialization of torch's modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class LanguageModel(nn.Module):
    """Token ids in, logits of each next token out; ``forward`` has the signature of GPT.forward.

    Subclasses create the modules named here, in the order of their initialization.
    """

    embedding: nn.Embedding
    blocks: nn.ModuleList
    final_norm: nn.Module
    unembedding: nn.Module | None
    """None if tied: logits use the transposed embedding."""

    def __init__(self, config: ModelConfig) -> None:
        """Build with torch's default initial weights; ``init_weights`` draws minigpt's."""
        super().__init__()
        self.config = config

    @classmethod
    def without_weights(cls, config: ModelConfig) -> Self:
        """Build a model on the meta device: shapes without memory."""
        # Initializing on the meta device would import torch's compiler, which takes over a second.
        with torch.device("meta"), _WithoutInit():
            return cls(config)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Self:
        """Build a model around loaded weights without allocating them twice.

        Raises: RuntimeError, as load_state_dict, for missing, extra or wrongly shaped tensors.
        """
        model = cls.without_weights(config)
        model.load_state_dict(tensors, strict=True, assign=True)
        return model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations without autocast. Quantized weights are buffers of another dtype."""
        return next(self.parameters()).dtype

    @property
    def logit_softcap(self) -> float:
        """Smooth bound of the logits, cap * tanh(logits / cap). 0 for none."""
        return 0.0

    @property
    def attentions(self) -> Sequence[AttentionLayer]:
        """The attention layers, in the order of a recorder's layers."""
        raise NotImplementedError

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights in-place."""
        raise NotImplementedError

    def positions_of(self, tokens: Tensor, cache: KVCache | None) -> tuple[int, int]:
        """Return the first position of new tokens, and one past the last; raise as ``forward``."""
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(
                f"the model sees {self.config.context_length} positions; {end} were given"
            )
        return start, end

    def logits(self, x: Tensor, logits_to_keep: int) -> Tensor:
        """Return the logits of the last ``logits_to_keep`` positions of x (B, T, C); 0 for all."""
        x = self.final_norm(x[:, -logits_to_keep:])  # [-0:] is all of them
        head = self.unembedding
        logits: Tensor = head(x) if head is not None else F.linear(x, self.embedding.weight)
        cap = self.logit_softcap
        return cap * (logits / cap).tanh() if cap else logits


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """Return the class that builds a model of this config.

    Raises: ModuleNotFoundError if its file is not installed.
    """
    if config.model_type == OWN_TYPE:
        return load_class(ARCHS[config.arch])
    # Imported by name, because families are in a higher layer than this package.
    return ring("checkpoint.families").model_class(config)
