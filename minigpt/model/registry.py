"""Which class a config is of."""

from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.model.variants.lstm import LSTM

_CLASSES: dict[str, type[LanguageModel]] = {"gpt": GPT, "lstm": LSTM, "lstm-attention": LSTM}


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """Return the class that builds a model of this config."""
    return _CLASSES[config.arch]
