"""Token ids of the texts of --force and --against, which continue a prompt."""

from collections.abc import Sequence

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, cut
from minigpt.model.language_model import LanguageModel
from minigpt.text.tokenizer import Tokenizer


def continuation_ids(
    tokenizer: Tokenizer, text: str, option: str, *, special: bool = False
) -> list[int]:
    """Return the token ids of an option's text, which continues another text.

    Raises: ConfigError for characters that the vocabulary cannot represent.
    """
    if not special and (unencodable := sorted(tokenizer.unencodable(text))):
        raise ConfigError(
            f"the vocabulary has no token for {cut(unencodable[0])} in the text of {option}, "
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

    Raises: ConfigError if there are more than max_new_tokens, or they do not fit into the context;
        as ``continuation_ids``.
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
    # The last token is never fed to the model, so it may lie one position beyond the context.
    if n_positions > context + 1 and sampling.overflow == "stop":
        raise ConfigError(
            f"the prompt and the text of --force have {n_positions} tokens, but the model sees "
            f"{context}. Shorten one of them."
        )
    return ids
