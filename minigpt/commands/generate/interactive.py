"""minigpt generate --interactive: text that continues from each typed line."""

import sys

from minigpt.commands.generate.samples import SampleDisplay
from minigpt.commands.loading import Ready, compiling, read_line
from minigpt.commands.output import note
from minigpt.config import SamplingConfig
from minigpt.errors import DataError
from minigpt.generation.api import encode_prompt
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text

_MARKER = "> "


def converse(
    ready: Ready,
    sampling: SamplingConfig,
    display: SampleDisplay,
    *,
    seed: int,
    compile: bool | None,
    has_prompt: bool,
    special: bool = False,
) -> None:
    """Continue from each text of standard input, until its end or a full context window.

    The cache keeps the earlier turns, so only the new text is processed.

    Args: seed, of the first answer; later ones have the next seeds. has_prompt, whether the first
        text is the prompt of the command line. special, whether special tokens are parsed.
    """
    decoder: Decoder | None = None
    tokenizer = ready.tokenizer
    text = ready.text if has_prompt else _typed()
    while text is not None:
        try:
            if decoder is None:
                ids = encode_prompt(tokenizer, text, special=special)
                with compiling(ready.model, compile):
                    decoder = Decoder(ready.model, ids, compiles=compile)
            else:
                ids = tokenizer.encode(text, is_start=False, special=special)
                decoder.extend(ids, overflow=sampling.overflow)
        except DataError as error:  # too long; the next one may fit
            note(str(error))
            text = _typed()
            continue
        steps = decoder.generate(sampling, seed=seed, end_of_text=tokenizer.end_of_text_ids)
        display.show(
            stream_text(steps, tokenizer, sampling.stop),
            seed=seed,
            prompt=text,
            n_prompt_tokens=len(decoder.prompt),
            is_prompt_shown=has_prompt,
        )
        if decoder.is_full and sampling.overflow == "stop":
            note("Start again for more, or use --overflow slide")
            return
        seed, has_prompt = seed + 1, False
        text = _typed()


def _typed() -> str | None:
    r"""Return the next typed text without its last line break; None at the end of input.

    A line that ends with \ continues on the next one. Ctrl-C discards the text.
    """
    lines: list[str] = []
    while True:
        try:
            if sys.stdin.isatty():
                sys.stderr.write(_MARKER)
                sys.stderr.flush()
            line = read_line()
        except KeyboardInterrupt:
            lines = []
            _break_line()
            note("Ctrl-D ends")
            continue
        if line is None or not line.endswith("\\"):
            break
        lines.append(line[:-1])
    if line is None and not lines:
        _break_line()
        return None
    return "\n".join([*lines, line or ""])


def _break_line() -> None:
    if sys.stdin.isatty():
        sys.stderr.write("\n")
