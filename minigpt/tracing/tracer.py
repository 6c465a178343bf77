"""Tracing: generation that yields each token with the earlier tokens it attended to."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder, FinishReason
from minigpt.generation.stream import TextStep, stream_text
from minigpt.model.attention import Recorder
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing import events
from minigpt.tracing.config import TraceConfig, config_class, has_prompt_rows
from minigpt.tracing.events import EndTrace, Row, Source, Token, TraceEvent, TraceHeader, TraceStep
from minigpt.tracing.recorder import RowRecorder

if TYPE_CHECKING:
    from minigpt.intervention_config import InterventionConfig

RECORDS: Any = find_ring("tracing.findings") or events
"""Module that defines the records of a trace: the analysis ring's, if installed."""


def trace(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    config: TraceConfig | None = None,
    *,
    seed: int,
    model_name: str = "",
    compile: bool | None = False,
    forced: Sequence[int] = (),
    intervention: "InterventionConfig | None" = None,
    special: bool = False,
    dense: Callable[[Tensor], None] | None = None,
) -> Iterator[TraceEvent]:
    """Generate as ``Decoder`` does, and yield a header, a step per token, and a footer.

    The tokens are the same as without tracing. If ``max_new_tokens`` is 0, the steps are those
    of the prompt's tokens, from the second on. A KeyboardInterrupt or SystemExit after the header,
    raised here or thrown into this generator, ends the trace with a footer; SystemExit is then
    raised again. EndTrace, thrown into it, ends the trace after the steps already observed.

    Args: forced, the token ids of ``sampling.force``; intervention, the one applied to ``model``,
        for the header; special, whether special tokens in ``config.against`` are parsed; dense,
        called with the weights of all heads (L, H, S) at each step.
    Raises: DataError if the prompt is empty or longer than the context; ConfigError for overflow
        slide, or if the model cannot be traced with this config; CheckpointError if the logits are
        NaN or inf.
    """
    config = config or config_class()()
    if sampling.overflow != "stop":
        raise ConfigError(
            "overflow slide would recompute rows that were already traced. Trace at most one "
            "context window, or generate without a trace."
        )
    # Only that ring can trace the prompt's own tokens or pass dense weights on.
    find = ring if has_prompt_rows(config, sampling) or dense is not None else find_ring
    observers = find("tracing.observers")
    arguments = (model, config, len(prompt), sampling, tokenizer)
    observer: AttentionObserver
    if observers is None:
        observer = AttentionObserver(*arguments)
    else:
        observer = observers.make_observer(*arguments, special=special, dense=dense)
    sampling = observer.sampling
    tokens = [Token(i, token, tokenizer.token_bytes(token)) for i, token in enumerate(prompt)]
    started = time.perf_counter()
    decoder = Decoder(
        model,
        prompt,
        observer.watcher,
        max_new_tokens=sampling.max_new_tokens,
        compile=compile,
    )
    yield observer.header(
        model=model_name,
        kernel=_kernel(model, is_compiled=decoder.forward.is_compiled),
        seed=seed,
        sampling=sampling,
        prompt=tuple(tokens),
        intervention=intervention,
    )
    end_of_text = tokenizer.end_of_text_ids
    generated = decoder.generate(sampling, seed=seed, end_of_text=end_of_text, forced=forced)
    items = stream_text(generated, tokenizer, sampling.stop)
    finish: FinishReason | None = None if sampling.max_new_tokens else "length"
    n_generated = 0
    interrupt: BaseException | None = None
    try:
        for step in observer.steps(items, tokens, decoder):
            if step.token.position >= len(prompt):
                finish, n_generated = step.finish, n_generated + 1
            try:
                yield step
            except EndTrace:
                observer.is_ended = True
    except (KeyboardInterrupt, SystemExit) as error:  # SIGTERM is an exit with a code
        observer.is_ended, interrupt = True, error
    if observer.is_ended:
        finish = None
    seconds = time.perf_counter() - started
    text = tokens[: len(prompt) + n_generated]
    yield RECORDS.TraceFooter(n_generated, finish, seconds, **observer.results(text))
    if isinstance(interrupt, SystemExit):
        raise interrupt


def _kernel(model: LanguageModel, *, is_compiled: bool) -> str:
    if is_compiled:
        return "compiled graph"
    is_dot_product = model.attentions[0].score.is_dot_product
    return "scaled_dot_product_attention" if is_dot_product else "tanh score, in chunks"


class AttentionObserver:
    """Turns the attention of each forward pass into a row of a trace."""

    is_ended = False
    """Whether to stop after the tokens that are ready."""

    def __init__(
        self,
        model: LanguageModel,
        config: TraceConfig,
        n_prompt: int,
        sampling: SamplingConfig,
        tokenizer: Tokenizer,
    ) -> None:
        """Prepare to observe the forward passes that a decoder sends to ``watcher``.

        Raises: ConfigError if the model cannot be traced with this config.
        """
        self.recorder = RowRecorder(model)
        self.watcher: Recorder = self.recorder
        self.model, self.config = model, config
        self.n_prompt, self.sampling, self.tokenizer = n_prompt, sampling, tokenizer

    def header(self, **fields: Any) -> TraceHeader:
        """Return the header; call it after the prefill.

        Args: fields, those of the header that cannot be read from the model.
        """
        shape = self.model.config
        header: TraceHeader = RECORDS.TraceHeader(
            n_layer=shape.n_attention_layer,
            n_head=shape.n_head,
            n_kv_head=shape.n_kv_head,
            d_model=shape.d_model,
            d_head=shape.d_head,
            dtype=str(self.model.dtype).removeprefix("torch."),
            score=self.model.attentions[0].score.name,
            **fields,
        )
        return header

    def steps(
        self, items: Iterator[TextStep], tokens: list[Token], decoder: Decoder
    ) -> Iterator[TraceStep]:
        """Yield a step for each generated token.

        Args: tokens, the prompt's; generated tokens are appended to it.
        """
        for index, (item, found) in enumerate(self.observed(items, tokens, decoder)):
            step = item.step
            yield RECORDS.TraceStep(
                index=index,
                token=tokens[step.position],
                log_probability=step.log_probability,
                text=item.text,
                finish=step.finish,
                is_given=step.is_forced,
                **found,
            )

    def observed(
        self, items: Iterator[TextStep], tokens: list[Token], decoder: Decoder
    ) -> Iterator[tuple[TextStep, dict[str, Any]]]:
        """Yield each generated token with the step fields computed from its attention."""
        for item in items:
            self.add_token(item, tokens)
            yield item, {"rows": (self._row(tokens),)}

    def add_token(self, item: TextStep, tokens: list[Token]) -> None:
        """Append a generated token to the tokens of the text."""
        step = item.step
        tokens.append(Token(step.position, step.token, self.tokenizer.token_bytes(step.token)))

    @torch.inference_mode()
    def _row(self, tokens: Sequence[Token]) -> Row:
        """Return the last pass's row, averaged over all heads."""
        row_S = self.recorder.weights_LHS.flatten(0, 1).mean(dim=0).cpu()
        top = row_S[1:].topk(min(self.config.n_kept, len(row_S) - 1))  # position 0 is the sink
        largest = zip((top.indices + 1).tolist(), top.values.tolist(), strict=True)
        return Row(
            total=row_S.sum().item(),
            sink=row_S[0].item(),
            entropy=torch.special.entr(row_S).sum().item() / math.log(2),
            sources=tuple(Source(tokens[position], weight) for position, weight in largest),
            weights_S=row_S.numpy(),
        )

    def results(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the footer fields that hold results. Args: tokens, all tokens of the text."""
        return {}
