"""The pages in docs, and which of their programs only a long run takes.

A page runs with `.ci/run`, and with `pytest` alone only where a reader begins: others
are marked `slow`. A fence under the comment `<!-- long -->` is left out there; the page
with it is another item, marked `long`, which `.ci/run --all` runs.
"""

import copy
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs"
QUICK = {"guide.md", "start.md"}
LONG_FENCE = re.compile(r"^<!-- long -->\n```python\n.*?^```$", re.M | re.S)


def long_lines(text: str) -> set[int]:
    """The lines, counted from 0, of the fences under `<!-- long -->`."""
    ranges = (
        range(text.count("\n", 0, found.start()), text.count("\n", 0, found.end()))
        for found in LONG_FENCE.finditer(text)
    )
    return {line for lines in ranges for line in lines}


def mark(items: list[pytest.Item]) -> None:
    """Mark the pages among the items, and add to each what is long."""
    for item in list(items):
        page = item.path.is_relative_to(FOLDER) and item.path.name not in QUICK
        if not isinstance(item, pytest.DoctestItem) or not page:
            continue
        examples, lines = item.dtest.examples, long_lines(item.path.read_text())
        quick = [example for example in examples if example.lineno not in lines]
        if len(quick) < len(examples):
            whole = type(item).from_parent(
                item.parent,
                name=f"{item.name}, whole",
                runner=item.runner,
                dtest=copy.copy(item.dtest),
            )
            whole.dtest.globs = dict(item.dtest.globs)
            whole.add_marker("long")
            item.dtest.examples = quick
            items.append(whole)
        item.add_marker("slow")
