"""The text of an option as tokens that continue a prompt: --force, --against."""

from collections.abc import Sequence

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, cut
from minigpt.model.language_model import LanguageModel
from minigpt.text.tokenizer import Tokenizer


def continuation_ids(
    tokenizer: Tokenizer, text: str, option: str, *, special: bool = False
) -> list[int]:
    """Return the token ids of the text of an option, which continues another text.

    Raises: ConfigError for characters that the vocabulary cannot represent.
    """
    if not special and (lacking := sorted(tokenizer.unencodable(text))):
        raise ConfigError(
            f"the vocabulary has no token for {cut(lacking[0])} in the text of {option}, "
            f"{cut(text)}. Use other characters."
        )
    return list(tokenizer.encode(text, is_start=False, special=special))


def forced_ids(
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    special: bool = False,
) -> list[int]:
    """Return the token ids of ``sampling.force``, which follow a prompt.

    Raises: ConfigError if they are more than max_new_tokens, or do not fit into the context; as
        ``encode_prompt``.
    """
    if sampling.force is None:
        return []
    ids = continuation_ids(tokenizer, sampling.force, "--force", special=special)
    if len(ids) > sampling.max_new_tokens:
        raise ConfigError(
            f"the text of --force has {len(ids)} tokens, and max_new_tokens is "
            f"{sampling.max_new_tokens}. Use --max-new-tokens {len(ids)} or more."
        )
    n_positions, context = len(prompt) + len(ids), model.config.context_length
    # The last token is not fed, but a step beyond the context ends a text.
    if n_positions > context + 1 and sampling.overflow == "stop":
        raise ConfigError(
            f"the prompt and the text of --force have {n_positions} tokens, the model sees "
            f"{context}. Shorten one of them."
        )
    return ids
