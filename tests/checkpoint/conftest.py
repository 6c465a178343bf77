"""Fixtures of the tests of model folders."""

from collections.abc import Callable

import pytest
from layout_models import LAYOUTS, make_model

from minigpt.model.gpt import GPT


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(259, request.param)


@pytest.fixture
def make() -> Callable[[int, str], GPT]:
    return make_model
