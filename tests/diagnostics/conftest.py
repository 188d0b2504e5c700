"""Diagnostics also run without implicit changes of dtype or rank."""

import pytest


@pytest.fixture(autouse=True)
def strict(strict_promotion):
    return strict_promotion
