"""The class of a model, by its config."""

from minigpt.config import ARCHS, HF_LAYOUTS, ModelConfig
from minigpt.model.language_model import LanguageModel
from minigpt.rings import load_class, ring


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """Return the class that builds a model of this config: its family's own, or that of its arch.

    Raises: ConfigError if it is in a file that this installation does not have.
    """
    if config.hf_fields or config.model_type not in (*HF_LAYOUTS, "minigpt"):
        # Looked up by name: families are above this package.
        own: type[LanguageModel] | str | None
        own = ring(f"checkpoint.families.{config.model_type}").FAMILY.model
        if own is not None:
            return load_class(own) if isinstance(own, str) else own
    return load_class(ARCHS[config.arch])
