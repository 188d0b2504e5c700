"""Beliefs made by hand."""

import pytest

from beliefs import Belief


@pytest.fixture(scope="session")
def belief() -> type[Belief]:
    return Belief
