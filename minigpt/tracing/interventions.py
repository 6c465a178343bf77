"""Interventions: ablate heads of a model, or patch heads or layers from another prompt.

A head's output is the weighted sum of its values, before W_O.

- Zero ablation sets it to 0 at every position, as if the head's columns of W_O were zero.
- Mean ablation sets it, at every position, to its mean over the positions of the prompt in a run
  without interventions.
- Activation patching replaces it, at one or all positions of the prompt, with its value at the same
  position in a run on a second prompt. A layer's output (residual stream) is patched likewise.

The interventions are hooks on a copy of the modules that shares the weights: the model itself is
not changed, and decoding uses GPT.forward, which calls the hooks.

Sources: Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262 (patching).

Shapes: B rows, T new tokens, H query heads, D head dim, P positions of the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minigpt.errors import ConfigError, DataError
from minigpt.intervention_config import InterventionConfig
from minigpt.model.attention import PassCollector
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.head_lists import HeadSelection, select_heads
from minigpt.tracing.shallow_copies import shallow_copy


def intervene(
    model: LanguageModel,
    config: InterventionConfig,
    prompt: Sequence[int],
    encode: Callable[[str], list[int]],
) -> tuple[LanguageModel, InterventionConfig]:
    """Return a model with the interventions applied, and the config with its position resolved.

    Args: prompt, the tokens to continue; encode, a function from a prompt's text to its tokens.
    Raises: ConfigError for heads or a position that do not exist, prompts of different lengths, or
        a model that is not a GPT; DataError for a prompt longer than the context.
    """
    if not isinstance(model, GPT):
        raise ConfigError(
            f"heads of a model of arch {model.config.arch} cannot be ablated or patched. Use a GPT."
        )
    changed = shallow_copy(model)
    if config.ablate is not None:
        selection = _selected(model, config.ablate, "--ablate")
        means = [x.mean(dim=0) for x in head_outputs(model, prompt)] if config.ablate_mean else None
        _ablate(changed, selection, means)
    if config.patch_from is not None:
        position = _patch(changed, model, config, len(prompt), encode(config.patch_from))
        config = replace(config, patch_position=position)
    return changed, config


def _patch(
    changed: GPT, model: GPT, config: InterventionConfig, n_prompt: int, source: Sequence[int]
) -> int | Literal["all"]:
    """Patch heads or layers of ``changed`` from a run of ``model``; return the position.

    Args: n_prompt, length of the prompt to continue; source, the tokens to patch from.
    """
    parts = (config.patch or "").split(",")
    heads = ",".join(part for part in parts if "." in part)
    layers = ",".join(part for part in parts if "." not in part)
    patched = _selected(model, heads, "--patch") if heads else None
    whole = _selected(model, "*.*", "--patch", layers) if layers or not heads else None
    if len(source) != n_prompt:
        raise ConfigError(
            f"--patch-from needs a prompt of as many tokens as the first: it has "
            f"{len(source)}, and the first has {n_prompt}. Change one of them."
        )
    position = n_prompt - 1 if config.patch_position is None else config.patch_position
    if position == "all":
        positions = range(n_prompt)
    elif position < n_prompt:
        positions = range(position, position + 1)
    else:
        raise ConfigError(
            f"--patch-position must be a position of the prompt, 0 to {n_prompt - 1}, or "
            f"all: it is {position}."
        )
    sites = _PatchSites(changed, positions)
    if patched is not None:
        outputs = head_outputs(model, source)
        _on_heads(changed, patched, lambda x, layer, heads: sites.put(x, outputs[layer], heads))
    if whole is not None:
        _patch_layers(changed, whole, residual_streams(model, source), sites)
    return position


def _selected(model: GPT, heads: str, option: str, layers: str | None = None) -> HeadSelection:
    n_layer, n_head = model.config.n_attention_layer, model.config.n_head
    return select_heads(n_layer, n_head, layers=layers, heads=heads, options=(option, option))


@torch.inference_mode()
def head_outputs(model: GPT, tokens: Sequence[int]) -> list[Tensor]:
    """Run a model on some tokens and return the head outputs of each layer (P, H, D)."""
    seen: list[Tensor] = []
    watched = shallow_copy(model)

    def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0][0].unflatten(-1, (model.config.n_head, -1)))

    for attention in watched.attentions:
        attention.output.register_forward_pre_hook(see)
    _run(watched, tokens)
    return [x.clone() for x in seen]


def _run(model: GPT, tokens: Sequence[int]) -> None:
    """Run a prompt through a model; raise DataError if it does not fit."""
    if len(tokens) > model.config.context_length:
        raise DataError(
            f"the prompt has {len(tokens)} tokens, but the model sees "
            f"{model.config.context_length}: this intervention needs a forward pass of the full "
            "prompt. Shorten it."
        )
    if unknown := [token for token in tokens if not 0 <= token < model.config.vocab_size]:
        raise DataError(
            f"the prompt has the token id {unknown[0]}: the model's are 0 to "
            f"{model.config.vocab_size - 1}. Encode the prompt with the model's own tokenizer."
        )
    model(torch.tensor([list(tokens)], device=model.device), logits_to_keep=1)


@torch.inference_mode()
def residual_streams(model: GPT, tokens: Sequence[int]) -> list[Tensor]:
    """Run a model on some tokens and return the residual stream after each block (P, C)."""
    seen: list[Tensor] = []
    watched = shallow_copy(model)
    for block in watched.blocks:
        block.register_forward_hook(lambda _, inputs, x_BTC: seen.append(x_BTC[0].clone()))
    _run(watched, tokens)
    return seen


def _ablate(model: GPT, selection: HeadSelection, means: Sequence[Tensor] | None) -> None:
    def put(x_BTHD: Tensor, layer: int, is_chosen_H1: Tensor) -> bool:
        value = torch.zeros_like(x_BTHD[0, 0]) if means is None else means[layer].to(x_BTHD)
        x_BTHD.copy_(torch.where(is_chosen_H1, value, x_BTHD))
        return True

    _on_heads(model, selection, put)


class _PatchSites:
    """The positions to patch, and the first position of the current forward pass."""

    def __init__(self, model: GPT, positions: range) -> None:
        self._positions, self._first = positions, 0
        # Not of the model: its forward may compute cached positions again (LongRoPE).
        model.blocks[0].register_forward_pre_hook(self._note_first)

    def _note_first(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        cache = inputs[2] if len(inputs) > 2 else None
        self._first = 0 if cache is None else cache.length

    def put(self, x_BTX: Tensor, source_PX: Tensor, is_chosen: Tensor | None = None) -> bool:
        """Overwrite the activations at the patched positions, for the chosen heads or for all.

        Returns: whether the last position of the forward pass is one of them.
        """
        for position in self._positions:
            if self._first <= position < self._first + x_BTX.shape[1]:
                x_BX, source_X = x_BTX[:, position - self._first], source_PX[position].to(x_BTX)
                x_BX.copy_(
                    source_X if is_chosen is None else torch.where(is_chosen, source_X, x_BX)
                )
        return self._first + x_BTX.shape[1] - 1 in self._positions


def _patch_layers(
    model: GPT, selection: HeadSelection, streams: Sequence[Tensor], sites: _PatchSites
) -> None:
    """Replace the residual stream after the chosen layers with that of another run."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def change(_: nn.Module, inputs: tuple[Any, ...], x_BTC: Tensor) -> Tensor:
            x_BTC = x_BTC.clone()
            has_last = sites.put(x_BTC, streams[layer])
            collector = inputs[3] if len(inputs) > 3 else None
            if collector is not None and collector.residual_BC and has_last:
                collector.residual_BC[-1] = x_BTC[:, -1].detach().clone()
                collector.first_state = len(collector.residual_BC) - 1
            return x_BTC

        return change

    for layer, heads in enumerate(selection.heads_by_layer):
        if heads:
            model.blocks[layer].register_forward_hook(hook(layer))


def _on_heads(
    model: GPT, selection: HeadSelection, put: Callable[[Tensor, int, Tensor], bool]
) -> None:
    """Add hooks in which ``put`` changes a copy of each chosen layer's head outputs (B, T, H, D).

    ``put`` returns whether it changed the last position; if so, the collector is updated.
    """

    def change_in(layer: int, heads: list[int]) -> None:
        attention = model.attentions[layer]
        # A mask, built once: an index would be copied to the GPU for every token, and block it.
        is_chosen = [[head in heads] for head in range(model.config.n_head)]
        is_chosen_H1 = torch.tensor(is_chosen, device=model.device)
        collector: PassCollector | None = None

        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal collector
            collector = inputs[3] if len(inputs) > 3 else None

        def change(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            x_BTHD = inputs[0].unflatten(-1, (model.config.n_head, -1)).clone()
            is_last = put(x_BTHD, layer, is_chosen_H1)
            if collector is not None and is_last:
                are_replaced_H1 = is_chosen_H1
                if layer in collector.replaced:  # by an ablation, and now by a patch
                    are_replaced_H1 = is_chosen_H1 | collector.replaced[layer][0]
                collector.replaced[layer] = are_replaced_H1, x_BTHD[:, -1].detach()
            return x_BTHD.flatten(2)

        attention.register_forward_pre_hook(note)
        attention.output.register_forward_pre_hook(change)

    for layer, heads in enumerate(selection.heads_by_layer):
        if heads:
            change_in(layer, list(heads))
