"""Recording of attention: the last query's row of every head.

Shapes: L layers, B batch, H query heads, G key/value heads, S keys, D head dim.
"""

from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel


class RowRecorder:
    """Keeps each head's attention row for the last query of the last forward pass.

    In a decode step these are the weights that the model used; in a prefill, which uses a fused
    kernel, they are recomputed as the softmax of the model's score, in float32.
    """

    needs_queries = needs_residual = False
    """Whether to receive more than the last query's weights, as in ``Recorder``."""

    def __init__(self, model: LanguageModel) -> None:
        """Raises: ConfigError if the model has no attention."""
        if not model.attentions:
            raise ConfigError(
                f"a model of arch {model.config.arch} has no attention to show. Choose another one."
            )
        self._last: AttentionPass | None = None

    def record(self, attention: AttentionPass) -> None:
        """Record a forward pass."""
        self._last = attention

    @property
    def attention(self) -> AttentionPass:
        """The last forward pass."""
        assert self._last is not None, "no forward pass was recorded"
        return self._last

    @property
    def weights_LHS(self) -> Tensor:
        """Attention weights of the last pass, float32, on the model's device; rows sum to 1."""
        return self.attention.weights_LBHS[:, 0]
