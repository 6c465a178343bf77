"""Fast decoding of a GPT: a step of few calls, compiled graphs, weight-only quantization."""

import torch

from minigpt.generation.fast.compiled import CompiledForward
from minigpt.generation.fast.decode_step import StepForward
from minigpt.generation.fast.eager import EagerForward
from minigpt.generation.fast.products import join_weights
from minigpt.model.attention import Recorder
from minigpt.model.gpt import GPT, Block
from minigpt.model.language_model import LanguageModel
from minigpt.model.layers import GatedMLP


def supports(model: LanguageModel, *, compiles: bool = False) -> bool:
    """Return whether the decode step computes what this model's own forward does.

    A subclass of GPT may compute something else, so only GPT itself is supported. The step does not
    run the hooks of modules.
    """
    if type(model) is not GPT or model.training:
        return False
    if any(module._forward_pre_hooks or module._forward_hooks for module in model.modules()):
        return False
    if compiles:
        return model.config.attention == "scaled_dot" and model.device.type in ("cpu", "cuda")
    return model.device.type == "cpu"


@torch.no_grad()
def prepare_for_decoding(model: LanguageModel, *, compiles: bool = False) -> None:
    """Lay out the weights in memory as the decode step reads them, without changing any value.

    A step for a model that was not prepared copies the weights that it needs in another layout.
    The model must not be trained afterwards.
    """
    if not supports(model, compiles=compiles):
        return
    if compiles:
        for weight in model.parameters():
            weight.data = weight.data.contiguous()
        return
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        up = [mlp.gate, mlp.up] if isinstance(mlp, GatedMLP) else [mlp.up]
        for layers in (
            [attention.query, attention.key, attention.value],
            [attention.output],
            up,
            [mlp.down],
        ):
            join_weights(layers)
    join_weights([model.unembedding or model.embedding])


def make_forward(
    model: GPT,
    *,
    capacity: int,
    n_rows: int = 1,
    recorder: Recorder | None = None,
    compiles: bool = False,
) -> StepForward:
    """Return the decode step of a model that is supported.

    Args: capacity, the number of positions that the cache has room for; n_rows, the largest number
        of rows.
    """
    if compiles:
        return CompiledForward(model, capacity=capacity, n_rows=n_rows, recorder=recorder)
    return EagerForward(model, capacity=capacity, recorder=recorder)
