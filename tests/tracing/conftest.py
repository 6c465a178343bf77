"""Fixtures for the tests of knockouts."""

import pytest

from minigpt.tracing.analysis import knockout


@pytest.fixture(params=["fast", "plain"])
def knockout_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute knockouts with the fast decode step or with the model's own forward."""
    if request.param == "plain":
        monkeypatch.setattr(knockout, "find_ring", lambda _: None)
    return str(request.param)
