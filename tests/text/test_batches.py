"""The order of data: every window once per epoch, for any number of ranks."""

import numpy as np
import pytest
import torch

from minigpt.errors import DataError
from minigpt.text.batches import batch, validation_windows, window_starts
from minigpt.text.tokens import TokenDataset, TokenSpan

GOLDEN_FIRST = [477787, 57947, 297819, 725595, 1003355, 462427]
GOLDEN_LATE = [494690, 19298, 717410, 303714, 553826, 324194]


def span_of(n_tokens: int, name: str = "training") -> TokenSpan:
    """Return a span whose tokens equal their index, in shards of odd sizes."""
    tokens = np.arange(n_tokens, dtype=np.uint32)
    cuts = [n_tokens // 3, n_tokens // 2]
    return TokenSpan(TokenDataset(np.split(tokens, cuts), "test"), 0, n_tokens, name)


def epoch_of(n_tokens: int, context_length: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return all window starts of an epoch, as one step."""
    n_windows = max(1, (n_tokens - context_length) // context_length)
    return window_starts(n_tokens, context_length, n_windows, seed=seed, step=epoch)


@pytest.mark.parametrize(
    ("n_tokens", "context_length"),
    [(9, 8), (15, 8), (16, 8), (17, 8), (24, 8), (1000, 8), (997, 7), (300, 1)],
)
def test_an_epoch_visits_every_window_of_its_grid_once(n_tokens: int, context_length: int) -> None:
    for epoch in range(3):
        starts = np.sort(epoch_of(n_tokens, context_length, seed=5, epoch=epoch))
        phase = starts[0]
        assert 0 <= phase < context_length
        assert starts.tolist() == list(range(phase, starts[-1] + 1, context_length))
        assert starts[-1] + context_length + 1 <= n_tokens
        n_left_out = n_tokens - 1 - len(starts) * context_length
        assert n_left_out < 2 * context_length


def test_different_epochs_and_seeds_have_different_orders_and_phases() -> None:
    def epoch(seed: int, epoch: int) -> np.ndarray:
        return epoch_of(5000, 10, seed=seed, epoch=epoch)

    orders = [epoch(seed, number) // 10 for seed in (0, 1, 2**63) for number in range(3)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).mean() < 0.05
    phases = {int(epoch(0, number).min()) for number in range(30)}
    assert len(phases) >= 7
    assert phases <= set(range(10))


def test_the_order_of_windows_looks_random() -> None:
    starts = epoch_of(200_000, 50, seed=3, epoch=0) // 50
    n = len(starts)
    place = np.arange(n)
    # For n random pairs, |correlation| exceeds 4 / sqrt(n) in 1 of 16,000 cases.
    assert abs(np.corrcoef(place, starts)[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 4 / n**0.5
    # In a random order, about one window is followed by its neighbour.
    assert (np.diff(starts) == 1).sum() < 8


@pytest.mark.integration
def test_each_window_is_equally_likely_to_come_first_over_seeds() -> None:
    firsts = [window_starts(9 * 11, 9, 1, seed=seed, step=0)[0] // 9 for seed in range(1000)]
    counts = np.bincount(firsts, minlength=10)
    chi_squared = ((counts - 100) ** 2 / 100).sum()
    assert len(counts) == 10
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_several_ranks_together_see_the_windows_of_a_single_rank(world_size: int) -> None:
    for step in (0, 1, 57):  # 57 * 8 is beyond the first epoch
        whole = window_starts(3000, 10, 8, seed=1, step=step)
        parts = [
            window_starts(3000, 10, 8, seed=1, step=step, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_any_batch_size_goes_through_the_windows_in_the_same_order() -> None:
    by_one = [window_starts(500, 10, 1, seed=2, step=step) for step in range(120)]
    by_six = [window_starts(500, 10, 6, seed=2, step=step) for step in range(20)]
    assert np.concatenate(by_one).tolist() == np.concatenate(by_six).tolist()


def test_the_order_of_windows_never_changes_between_releases() -> None:
    """Golden values: if they change, a resumed run no longer sees the same data."""
    assert window_starts(1_003_855, 256, 6, seed=1337, step=0).tolist() == GOLDEN_FIRST
    assert window_starts(1_003_855, 256, 6, seed=1337, step=10**6).tolist() == GOLDEN_LATE


def test_windows_are_computed_without_listing_them_all() -> None:
    """A list would have a trillion windows here."""
    starts = window_starts(10**15, 1024, 64, seed=1, step=10**9)
    assert starts.max() > 9 * 10**14


def test_targets_are_the_inputs_shifted_by_one() -> None:
    span = span_of(1000)
    inputs, targets = batch(span, 16, 4, seed=1, step=3)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs[:, 0].tolist() == window_starts(1000, 16, 4, seed=1, step=3).tolist()
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))
    assert torch.equal(targets, inputs + 1)
    second = batch(span, 16, 4, seed=1, step=3, rank=1, world_size=2)
    assert torch.equal(second[0], inputs[2:])


def test_a_span_of_one_window_yields_that_window() -> None:
    inputs, targets = batch(span_of(17), 16, 2, seed=1, step=9)
    assert inputs.tolist() == [list(range(16))] * 2
    assert targets[:, -1].tolist() == [16, 16]


@pytest.mark.parametrize("n_tokens", [0, 1, 8, 16])
def test_too_few_tokens_are_a_data_error_with_both_numbers(n_tokens: int) -> None:
    remedy = "Use a --context-length of at most 15, or more text."
    if n_tokens < 9:
        remedy = "Give more text."
    message = (
        f"too little text: the validation part has {n_tokens} tokens, and a context of 16 needs "
        f"at least 17. {remedy}"
    )
    span = span_of(n_tokens, "validation")
    with pytest.raises(DataError) as caught:
        batch(span, 16, 2, seed=1, step=0)
    assert str(caught.value) == message
    with pytest.raises(DataError) as caught:
        next(validation_windows(span, 16, 1000, 2))
    assert str(caught.value) == message


@pytest.mark.parametrize("n_tokens", [17, 18, 32, 33, 34, 500])
def test_every_token_but_the_first_is_a_validation_target_exactly_once(n_tokens: int) -> None:
    pairs = list(validation_windows(span_of(n_tokens), 16, 10**6, batch_size=3))
    assert all(inputs.shape[0] <= 3 for inputs, _ in pairs)
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in pairs)
    targets = torch.cat([targets.flatten() for _, targets in pairs])
    assert targets.tolist() == list(range(1, n_tokens))


def test_subsampled_validation_uses_evenly_spaced_complete_windows() -> None:
    pairs = list(validation_windows(span_of(1606), 16, 10 * 16 + 15, batch_size=4))
    assert [tuple(inputs.shape) for inputs, _ in pairs] == [(4, 16), (4, 16), (2, 16)]
    starts = torch.cat([inputs[:, 0] for inputs, _ in pairs])
    assert starts.tolist() == [window * 16 for window in range(0, 100, 10)]


def test_validation_uses_at_least_one_window() -> None:
    pairs = list(validation_windows(span_of(1000), 16, 1, batch_size=4))
    assert [inputs[:, 0].tolist() for inputs, _ in pairs] == [[0]]


def contexts_of_the_guide(n_tokens: int, context_length: int, stride: int) -> dict[int, int]:
    """Return the start of each target's window, as in the loop of Hugging Face's guide.

    A window of the guide has context_length tokens in total, one of ours as many inputs.
    """
    begin_of: dict[int, int] = {}
    end_before = 0
    for begin in range(0, n_tokens - 1, stride):
        end = min(begin + context_length, n_tokens - 1)
        begin_of |= {position + 1: begin for position in range(end_before, end)}
        end_before = end
        if end == n_tokens - 1:
            break
    return begin_of


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16])
@pytest.mark.parametrize("n_tokens", [17, 18, 24, 25, 32, 33, 34, 200])
def test_strided_windows_equal_those_of_hugging_faces_perplexity_guide(
    n_tokens: int, stride: int
) -> None:
    begin_of: dict[int, int] = {}
    pairs = validation_windows(span_of(n_tokens), 16, 10**6, batch_size=3, stride=stride)
    for inputs, targets in pairs:
        assert inputs.shape[0] == targets.shape[0] <= 3
        assert torch.equal(targets, inputs[:, -targets.shape[1] :] + 1)
        for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert row == list(range(row[0], row[-1] + 1))
            assert len(row) <= 16
            assert not begin_of.keys() & set(answers), "a target must be counted once"
            begin_of |= dict.fromkeys(answers, row[0])
    assert begin_of == contexts_of_the_guide(n_tokens, 16, stride)


def test_subsampled_strided_windows_are_complete_and_evenly_spaced() -> None:
    pairs = list(validation_windows(span_of(1605), 16, 10 * 4 + 3, batch_size=4, stride=4))
    assert [tuple(inputs.shape) for inputs, _ in pairs] == [(4, 16), (4, 16), (2, 16)]
    assert {targets.shape[1] for _, targets in pairs} == {4}
    starts = torch.cat([inputs[:, 0] for inputs, _ in pairs])
    n_windows = (1604 - 16) // 4 + 1
    assert starts.tolist() == [i * n_windows // 10 * 4 for i in range(10)]
    few = list(validation_windows(span_of(18), 16, 16, batch_size=9, stride=1))
    assert [inputs[:, 0].tolist() for inputs, _ in few] == [[0, 1]]  # at most one window
