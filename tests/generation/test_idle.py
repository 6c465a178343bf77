"""The steps of a prepared model are reused by its next decoder without keeping the model alive."""

import gc
import weakref
from functools import partial

import pytest
import torch
from kept_attention import KeptAttention
from small_models import LAYOUTS, random_tokens, small_model

from minigpt.generation.fast.eager import EagerForward
from minigpt.generation.fast.reading import prepare_for_decoding
from minigpt.generation.forward import PlainForward
from minigpt.model.gpt import GPT

# float32 sums in another order.
assert_near = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def prepared(layout: str = "qwen3") -> GPT:
    return prepare_for_decoding(small_model(layout))


def test_the_step_of_a_deleted_decoder_is_reused_by_the_next_one() -> None:
    model, tokens = prepared(), random_tokens(1, 7)
    first = EagerForward(model, capacity=9)
    expected = [first.feed(part).clone() for part in (tokens[:, :1], tokens)]
    first.keep([0, 0, 0])  # its buffers are for three rows
    step = first._step
    beside = EagerForward(model, capacity=9)
    assert beside._step is not step
    del first
    second = EagerForward(model, capacity=9)
    assert second._step is step
    for part, logits in zip((tokens[:, :1], tokens), expected, strict=True):
        assert torch.equal(second.feed(part), logits)
        assert torch.equal(beside.feed(part), logits)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_parameters_may_change_between_decoders(is_prepared: bool) -> None:
    model, tokens = prepared() if is_prepared else small_model("qwen3"), random_tokens(1, 7)
    EagerForward(model, capacity=9).feed(tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = PlainForward(model, capacity=9).feed(tokens)
    assert_near(EagerForward(model, capacity=9).feed(tokens), expected)


def test_idle_steps_do_not_keep_their_model_alive() -> None:
    model = prepared()
    EagerForward(model, capacity=9).feed(random_tokens(1, 7))
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recorder_receives_every_prompt_position_and_changes_no_bit(layout: str) -> None:
    model, tokens = prepared(layout), random_tokens(1, 9)
    kept, expected = KeptAttention(needs_residual=True), KeptAttention(needs_residual=True)
    watched = EagerForward(model, capacity=9, recorder=kept)
    alone = EagerForward(model, capacity=9)
    plain = PlainForward(model, capacity=9, recorder=expected)
    for part in tokens.split([6, 3], dim=1):
        logits = watched.feed(part)
        assert torch.equal(logits, alone.feed(part))
        assert_near(logits, plain.feed(part))
        ours, theirs = kept.last, expected.last
        for name in ("weights_LBHS", "context_LBHD", "values_LBGSD", "residual_NBC"):
            assert_near(getattr(ours, name), getattr(theirs, name))
        assert_near(ours.queries, theirs.queries)
        assert_near(ours.keys, theirs.keys)
