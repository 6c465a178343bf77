"""One small corpus shared by all training tests."""

import pytest
from small_runs import data_of, text

from minigpt.text.tokens import PreparedData


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return data_of(text(600), tmp_path_factory.mktemp("corpus"))
