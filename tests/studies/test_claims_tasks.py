"""Synthetic tasks: the source is where the batch says, and nothing else predicts the answer."""

import pytest
import torch

from minigpt.studies.claims.long_range import TEST_SEED
from minigpt.studies.claims.tasks import (
    COPY,
    FIRST_KEY,
    FIRST_VALUE,
    N_COPIED,
    N_PAIRS,
    N_VALUES,
    RECALL,
    TASKS,
    VOCAB_SIZE,
    Task,
)

EACH_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distances(n: int, least: int = 8, greatest: int = 40) -> torch.Tensor:
    return torch.randint(least, greatest + 1, (n,), generator=generator(1))


@EACH_TASK
def test_the_source_contains_the_answer_at_the_exact_distance(task: Task) -> None:
    distance_B = distances(200)
    batch = task.draw(distance_B, generator())
    for i, distance in enumerate(distance_B.tolist()):
        query, source = int(batch.query_B[i]), int(batch.source_B[i])
        assert query - source == distance
        tokens, targets = batch.tokens_BT[i], batch.targets_BT[i]
        for j in range(task.n_exact):
            token = int(tokens[query + j - distance])
            value = token % N_VALUES if task is RECALL else token - FIRST_VALUE
            assert targets[query + j] == FIRST_VALUE + value
        assert (targets[:query] == -100).all()
        assert len(tokens) == query + task.n_asked
    assert 0 <= int(batch.tokens_BT.min()) <= int(batch.tokens_BT.max()) < VOCAB_SIZE


def test_recalled_answers_equal_a_dictionary_lookup() -> None:
    batch = RECALL.draw(distances(100), generator())
    for tokens, targets, query in zip(
        batch.tokens_BT.tolist(), batch.targets_BT.tolist(), batch.query_B.tolist(), strict=True
    ):
        pairs = [divmod(token, N_VALUES) for token in tokens if token < FIRST_KEY]
        assert len(dict(pairs)) == len(pairs) == N_PAIRS
        asked = range(query, len(tokens), 2)
        answers = [FIRST_VALUE + dict(pairs)[tokens[t] - FIRST_KEY] for t in asked]
        assert [targets[t] for t in asked] == answers
        assert [tokens[t + 1] for t in asked] == answers
        assert all(targets[t] == -100 for t in range(len(tokens)) if t not in asked)


def test_a_copy_repeats_the_string_and_its_symbols_are_distinct() -> None:
    batch = COPY.draw(distances(100), generator())
    for tokens, targets, query, source in zip(
        batch.tokens_BT.tolist(),
        batch.targets_BT.tolist(),
        batch.query_B.tolist(),
        batch.source_B.tolist(),
        strict=True,
    ):
        string = tokens[source : source + N_COPIED]
        assert targets[query:] == string
        assert tokens[query + 1 :] == string[:-1]
        assert len(set(string)) == N_COPIED
        assert not set(string) & set(tokens[:source] + tokens[source + N_COPIED : query])


@EACH_TASK
def test_the_control_is_another_item_of_the_same_kind(task: Task) -> None:
    batch = task.draw(distances(200), generator())
    kinds = batch.tokens_BT.gather(1, batch.source_B[:, None])
    others = batch.tokens_BT.gather(1, batch.other_B[:, None])
    kind = range(FIRST_KEY) if task is RECALL else range(FIRST_VALUE, FIRST_VALUE + N_VALUES)
    assert set(kinds.flatten().tolist()) <= set(kind)
    assert set(others.flatten().tolist()) <= set(kind)
    assert (batch.other_B != batch.source_B).all()
    assert (batch.other_B < batch.query_B).all()


@EACH_TASK
def test_answers_are_balanced_and_independent_of_their_positions(task: Task) -> None:
    batch = task.draw(torch.full((8000,), 24), generator())
    answers = batch.targets_BT.gather(1, batch.query_B[:, None]).flatten()
    shares = answers.bincount()[FIRST_VALUE:].double() / len(answers)
    n_answers = round(1 / task.chance)
    assert len(shares) == n_answers
    # Five standard deviations of a frequency over this many draws.
    allowed = 5 * (task.chance * (1 - task.chance) / len(answers)) ** 0.5
    assert (shares - task.chance).abs().max() < allowed
    if task is RECALL:  # the position of the queried pair
        first_pair = (batch.tokens_BT < FIRST_KEY).int().argmax(dim=1)
        place = batch.source_B - first_pair
        assert place.bincount().double().sub(2000).abs().max() < 5 * (8000 * 0.25 * 0.75) ** 0.5


@EACH_TASK
def test_batches_are_deterministic_and_test_sequences_are_unseen(task: Task) -> None:
    distance_B = distances(500)
    ours = task.draw(distance_B, generator(3)).tokens_BT
    assert torch.equal(ours, task.draw(distance_B, generator(3)).tokens_BT)
    tested = task.draw(distance_B, generator(TEST_SEED + 3)).tokens_BT
    assert not {tuple(row) for row in ours.tolist()} & {tuple(row) for row in tested.tolist()}
