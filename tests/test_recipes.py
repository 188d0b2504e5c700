"""Recipes are listed, found by the words people look for, and run as marked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from doc_pages import FOLDER, long_lines

CASES = Path(__file__).parent / "cases"
PAGES = {x.stem: x.read_text() for x in sorted((FOLDER / "recipes").glob("*.md"))}
INDEX = PAGES.pop("index")
WORDS = ["Optax", "linen", "nnx", "Equinox", "LoRA", "last layer", "padded", "EWC"]
WORDS += ["calibrated", "prune", "active learning", "influence", "structure", "mask"]
WORDS += ["offset", "exposure", "constraint", "elastic weight consolidation"]
WORDS += ["quasi-likelihood", "cluster", "weights", "contrast", "statsmodels", "pandas"]
WORDS += ["schedule", "micro-batches"]
WORDS += ["rate ratio", "random intercept", "mixed model", "formula", "drift", "alarm"]
WORDS += ["Kalman", "smoother", "forecast", "Orbax", "multiprocessing", "ArviZ", "NUTS"]


def test_the_index_lists_every_page_once():
    assert sorted(re.findall(r"\]\((\w+)\.md\)", INDEX)) == sorted(PAGES)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_in_a_title_or_a_first_sentence(word):
    heads = (
        re.match(r"# .*?\n\n.*?[.:](?=\s)", page, re.S)[0] for page in PAGES.values()
    )
    assert any(word.lower() in head.lower() for head in heads)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_a_program(name):
    assert ">>> " in PAGES[name]
    assert PAGES[name].count("<!-- long -->") == len(
        re.findall(r"^<!-- long -->\n```python$", PAGES[name], re.M)
    )


def test_fences_under_the_comment_are_long():
    quick = "```python\n>>> 1\n1\n\n```\n"
    lines = long_lines(f"{quick}<!-- long -->\n{quick}\n{quick}<!-- long -->\n{quick}")
    assert lines == {5, 6, 7, 8, 9, 17, 18, 19, 20, 21}


CONFTEST = """
import pathlib, pytest, doc_pages
doc_pages.FOLDER = pathlib.Path(__file__).parent
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    doc_pages.mark(items)
"""
WRONG_IN_THE_LONG_FENCE = """
```python
>>> one = 1
>>> one
1

```

<!-- long -->
```python
>>> one + 1
3

```
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen, outcome",
    [
        ("not slow and not long", "2 deselected"),
        ("not long", "1 passed, 1 deselected"),
        ("", "1 failed, 1 passed"),
    ],
)
def test_a_page_is_slow_and_the_whole_of_it_long(tmp_path, chosen, outcome):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  long\n")
    (tmp_path / "page.md").write_text(WRONG_IN_THE_LONG_FENCE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--doctest-glob=*.md", "-m", chosen],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CASES), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout.splitlines()[-1]
