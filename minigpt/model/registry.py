"""The class of a model, by its config."""

from minigpt.config import ARCHS, ModelConfig
from minigpt.model.language_model import LanguageModel
from minigpt.rings import load_class

FAMILY_CLASSES: dict[str, type[LanguageModel]] = {}
"""Classes by model_type, for a family whose computation is not GPT's: see checkpoint/families."""


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """Return the class that builds a model of this config.

    Raises: ConfigError if it is in a ring that this installation does not have.
    """
    own = FAMILY_CLASSES.get(config.model_type)
    return own if own is not None else load_class(ARCHS[config.arch])
