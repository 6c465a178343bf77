"""The Python API of tracing: ``minigpt.trace``."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.checkpoint.resolve import shown_name
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation import api
from minigpt.generation.decoder import fresh_seed
from minigpt.generation.forcing import forced_ids
from minigpt.model.device import torch_defaults
from minigpt.settings import build
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing import tracer
from minigpt.tracing.config import SAMPLING, config_class
from minigpt.tracing.findings import Trace


def trace(
    model: api.Models,
    prompt: api.Prompts = "",
    *,
    tokenizer: Tokenizer | None = None,
    special: bool = False,
    dense: bool = False,
    chat_template: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    compile: bool | None = None,
    **options: Any,
) -> Any:
    """Continue a prompt and return the attention of each generated token.

        import minigpt

        trace = minigpt.trace("book", "Once upon a time", temperature=0, n_verified=3)
        trace.steps[0].row.sources[0].token.data

    Returns a ``Trace``, or for a list of prompts a list, where prompt i uses the seed ``seed + i``.
    With ``dense=True``, ``trace.weights_LHTS`` has the weights of all heads, independent of the
    heads that rows are reduced from; ``max_new_tokens=0`` traces the prompt itself.

    A notebook displays a trace as the page that ``--html`` writes.

    Args:
        model, prompt, tokenizer, special, chat_template, device, dtype, quantize, compile: as for
            ``minigpt.generate``.
        dense: whether to keep the weights of every head: 4 x layers x heads x positions bytes for
            each token.
        options: fields of AnalysisConfig (heads="4.2,5.*" or [(4, 2), "5.*"], layers=[0, 2],
            measure="both", n_verified=3, roles=True...; has_heads is True by default) and of
            SamplingConfig (temperature, seed...; max_new_tokens is 40 by default), and
            interventions as for ``minigpt.generate``.
    Raises: those of ``minigpt.generate``, and ConfigError for heads that the model does not have.
    """
    config_type = config_class()
    options = api.checked_options(trace, options, config_type, SamplingConfig)
    names = {f.name for f in fields(config_type)}
    chosen = {name: options.pop(name) for name in names & options.keys()}
    interventions, source = api.interventions_in(options)
    config = build(config_type, {"has_heads": True} | chosen)
    sampling = build(SamplingConfig, vars(SAMPLING) | options)
    if sampling.num_samples != 1:
        raise ConfigError(
            f"num_samples must be 1 in a trace: it is {sampling.num_samples}. "
            "Call trace once for each seed."
        )
    network, tokenizer, name = api.model_and_tokenizer(
        model, tokenizer, device=device, dtype=dtype, quantize=quantize, compile=compile
    )
    if network.dtype == torch.float64:
        raise ConfigError(
            "a model in float64 cannot be traced: a trace is in float32. Call model.float() first."
        )
    seed = fresh_seed() if sampling.seed is None else sampling.seed
    encode = partial(
        api.prompt_ids, tokenizer, folder=name, special=special, chat_template=chat_template
    )
    traces = []
    prompts, is_list = api.prompts_of(prompt)
    for number, one in enumerate(prompts):
        ids, ending = encode(one)
        changed, intervention = api.intervened(
            network, interventions, ids, encode, tokenizer, source
        )
        forced = forced_ids(ending, sampling, network, ids, special=special)
        kept: list[NDArray[np.float32]] = []
        events = tracer.trace(
            changed,
            ending,
            ids,
            sampling,
            config,
            seed=seed + number,
            model_name=name and shown_name(Path(name)),
            compile=compile,
            forced=forced,
            intervention=intervention,
            special=special,
            dense=partial(_keep, kept) if dense else None,
        )
        with torch_defaults():
            traces.append(Trace.of(events, kept))
    return traces if is_list else traces[0]


def _keep(kept: list[NDArray[np.float32]], weights_LHS: Tensor) -> None:
    kept.append(weights_LHS.to("cpu", torch.float32, copy=True).numpy())
