"""Gradient x input: first-order attribution of the token's logit to earlier tokens' embeddings.

For the token y and the embedding e_j at position j: sum_c e_jc d logit(y) / d e_jc.

Source: Shrikumar et al. 2016, arXiv:1605.01713; for contrasts Yin & Neubig 2022, arXiv:2202.10419.

Shapes: B sequences, S positions in view, C model dim.
"""

from torch import Tensor

from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.input_gradients import embeddings, gradients
from minigpt.tracing.analysis.measures import Prediction, Rows, register
from minigpt.tracing.analysis_config import AnalysisConfig


@register(
    description="the embedding of a source times the gradient of the logit (Shrikumar et al. 2016)",
    unit="logits",
    is_signed=True,
    has_heads=False,
    needs_token=True,
    caveat="A gradient says what a small change of an embedding does, not what happens without it.",
)
def gradient(model: LanguageModel, config: AnalysisConfig) -> Rows:
    """Multiply each token's embedding by the gradient of the token's logit."""

    def row_S(prediction: Prediction) -> Tensor:
        x_SC = embeddings(model, prediction.tokens)
        gradient_SC = gradients(model, x_SC[None], prediction)[0]
        return (x_SC * gradient_SC).float().sum(dim=1)

    return row_S
