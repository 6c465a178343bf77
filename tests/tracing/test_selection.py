"""Selection of heads: 0,2,4-6 for layers and 4.2,5.* for heads."""

import itertools
import random

import pytest

from minigpt.errors import ConfigError
from minigpt.tracing.head_lists import HeadSelection, select_heads


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0, 1, 2)] * 7),
        ({"layers": "*"}, [(0, 1, 2)] * 7),
        ({"layers": "0,2,4-6"}, [(0, 1, 2), (), (0, 1, 2), (), *[(0, 1, 2)] * 3]),
        ({"layers": " 1 , 3-3 "}, [(), (0, 1, 2), (), (0, 1, 2), (), (), ()]),
        ({"heads": "4.2,5.*"}, [(), (), (), (), (2,), (0, 1, 2), ()]),
        ({"heads": "*.1"}, [(1,)] * 7),
        ({"heads": "0-1.0-1"}, [(0, 1), (0, 1), (), (), (), (), ()]),
        ({"heads": "3.2, 3.0,3.2"}, [(), (), (), (0, 2), (), (), ()]),
        ({"layers": "5-6", "heads": "*.0,4.1"}, [(), (), (), (), (), (0,), (0,)]),
    ],
)
def test_a_selection_is_parsed(options: dict[str, str], expected: list[tuple[int, ...]]) -> None:
    selection = select_heads(7, 3, **options)
    assert list(selection.heads_by_layer) == expected
    assert selection.n_chosen == sum(map(len, expected))
    assert selection.is_all == (selection.n_chosen == 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "x"}, "--layers takes numbers and ranges, as in 0,2,4-6: it is 'x'."),
        ({"layers": ""}, "--layers takes numbers and ranges, as in 0,2,4-6: it is ''."),
        ({"layers": "1,"}, "--layers takes numbers and ranges, as in 0,2,4-6: it is '1,'."),
        ({"layers": "-1"}, "--layers takes numbers and ranges, as in 0,2,4-6: it is '-1'."),
        ({"layers": "1-"}, "--layers takes numbers and ranges, as in 0,2,4-6: it is '1-'."),
        ({"layers": "1-2-3"}, "--layers takes numbers and ranges"),
        ({"layers": "1.5"}, "--layers takes numbers and ranges"),
        ({"layers": "²"}, "--layers takes numbers and ranges"),
        ({"layers": "9" * 5000}, "--layers takes numbers and ranges"),
        ({"layers": "7"}, "--layers 7 is out of range: the model has layers 0 to 6."),
        ({"layers": "0-7"}, "--layers 0-7 is out of range: the model has layers 0 to 6."),
        ({"layers": "0-999999999"}, "is out of range: the model has layers 0 to 6."),
        ({"layers": "3-1"}, "--layers 3-1 is out of range: the model has layers 0 to 6."),
        ({"heads": "3"}, "--heads takes layer.head, as in 4.2 or 5.*: it is '3'."),
        ({"heads": ""}, "--heads takes layer.head, as in 4.2 or 5.*: it is ''."),
        ({"heads": "1.1,"}, "--heads takes layer.head, as in 4.2 or 5.*: it is ''."),
        ({"heads": "1."}, "--heads takes numbers and ranges, as in 0,2,4-6: it is ''."),
        ({"heads": ".1"}, "--heads takes numbers and ranges, as in 0,2,4-6: it is ''."),
        ({"heads": "1.2.0"}, "--heads takes numbers and ranges, as in 0,2,4-6: it is '2.0'."),
        ({"heads": "7.0"}, "--heads 7.0 is out of range: the model has layers 0 to 6."),
        ({"heads": "0.3"}, "--heads 0.3 is out of range: the model has heads 0 to 2."),
        ({"heads": "\x1b[31m.0"}, "--heads takes numbers and ranges, as in 0,2,4-6: it is '\\x1b"),
        ({"layers": "0", "heads": "1.*"}, "--layers 0 and --heads 1.* have no head in common."),
    ],
)
def test_an_invalid_or_empty_selection_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select_heads(7, 3, **options)
    assert message in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_error_messages_name_the_option_that_was_given() -> None:
    options = ("--verify-layers", "--verify-heads")
    for given, message in (
        ({"layers": "7"}, "--verify-layers 7 is out of range: the model has layers 0 to 6."),
        ({"heads": "3"}, "--verify-heads takes layer.head, as in 4.2 or 5.*: it is '3'."),
        ({"heads": "0.3"}, "--verify-heads 0.3 is out of range: the model has heads 0 to 2."),
        ({"layers": "0", "heads": "1.*"}, "--verify-layers 0 and --verify-heads 1.* have no head"),
    ):
        with pytest.raises(ConfigError) as caught:
            select_heads(7, 3, **given, options=options)
        assert message in str(caught.value)


def test_the_text_of_a_selection_parses_to_the_same_selection() -> None:
    source = random.Random(0)
    every = list(itertools.product(range(4), range(5)))
    for _ in range(200):
        chosen = set(source.sample(every, k=source.randint(1, 20)))
        selection = HeadSelection(
            tuple(tuple(h for h in range(5) if (layer, h) in chosen) for layer in range(4)), 5
        )
        assert select_heads(4, 5, heads=selection.as_text()) == selection
