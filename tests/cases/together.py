"""Many small facts in one test, which lists all that fail."""

import functools
import inspect
import itertools
from collections.abc import Callable

import pytest


def labelled(values, ids, single: bool) -> list[tuple[str, tuple]]:
    """Each row of a parametrize mark with its name."""
    values = list(values)
    if ids is None or callable(ids):
        ids = map(ids or str, values)
    rows = [(value,) if single else tuple(value) for value in values]
    return [(str(label)[:80], row) for label, row in zip(ids, rows, strict=True)]


def together(test: Callable) -> Callable:
    """One test of all cases of a test's parametrize marks, in place of one each.

    For facts that take less time than a test's own set-up. Every case runs, whatever
    fails before it, and each failure is reported with its case. Stands above the marks;
    other arguments remain fixtures.
    """
    others = [mark for mark in test.pytestmark if mark.name != "parametrize"]
    names, tables = [], []
    for mark in reversed(test.pytestmark):
        if mark.name == "parametrize":
            arguments, values = mark.args
            if isinstance(arguments, str):
                arguments = [name.strip() for name in arguments.split(",")]
            names += arguments
            tables.append(labelled(values, mark.kwargs.get("ids"), len(arguments) == 1))
    fixtures = [
        parameter
        for parameter in inspect.signature(test).parameters.values()
        if parameter.name not in names
    ]

    @functools.wraps(test)
    def all_cases(subtests: pytest.Subtests, **given):
        for rows in itertools.product(*tables):
            values = itertools.chain.from_iterable(row for _, row in rows)
            case = dict(zip(names, values, strict=True))
            with subtests.test(", ".join(label for label, _ in rows)):
                test(**case, **given)

    subtests = inspect.Parameter("subtests", inspect.Parameter.KEYWORD_ONLY)
    keywords = [f.replace(kind=inspect.Parameter.KEYWORD_ONLY) for f in fixtures]
    all_cases.__signature__ = inspect.Signature([subtests, *keywords])
    all_cases.pytestmark = others
    return all_cases
