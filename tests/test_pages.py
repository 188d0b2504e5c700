"""What a reader is shown: examples, sources, links that lead somewhere."""

import importlib
import json
import re
import tomllib
from pathlib import Path
from types import GenericAlias, ModuleType

import pytest

import fisherflow_jax as ff

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")


@pytest.fixture(scope="module")
def docs():
    """The programs that write docs/api.txt and the site's pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("pages")


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^-\w ]", "", h).lower().replace(" ", "-") for h in headings}


def example_of(docs, value) -> bool:
    """Whether an entry has an example, or names who makes it, who has one."""
    text = docs.docstring(value)
    maker = re.search(r"(?:[Mm]ade|[Kk]ept|Raised) by `(ff\.[\w.]+)`", text)
    return ">>> " in text or bool(
        maker and ">>> " in docs.docstring(docs.resolved(maker[1]))
    )


@pytest.mark.slow
def test_every_name_of_the_package_has_an_example(docs, record_property):
    names = [value for _, room, _, value in docs.api.names() if not room]
    rooms = [n for n in ff.__all__ if isinstance(getattr(ff, n), ModuleType)]
    assert len(names) + len(rooms) == len(ff.__all__)
    assert [v.__name__ for v in names if ">>> " not in docs.docstring(v)] == []
    record_property("names of the package with an example", len(names))


def test_every_name_of_a_room_has_an_example(docs, record_property):
    shown = [
        (f"ff.{room}.{name}", value)
        for _, room, name, value in docs.api.names()
        if room and callable(value) and not isinstance(value, GenericAlias)
    ]
    without = [path for path, value in shown if not example_of(docs, value)]
    assert without == []
    record_property("names of its rooms with an example", len(shown))


def test_every_source_is_cited_in_one_form(docs):
    cited = docs.cited()
    assert len(cited) > 100
    forms: dict[str, set[str]] = {}
    for source in cited:
        title = re.search(r'"(.+)"', source)
        assert title, f'{source}: authors, "title", year'
        forms.setdefault(title[1].lower(), set()).add(source)
    assert [form for form in forms.values() if len(form) > 1] == []


def test_links_of_the_readme():
    links = LINK.findall((ROOT / "README.md").read_text())
    assert len(links) > 20
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(ROOT / path), (path, anchor)


def test_links_of_the_notebooks():
    links = 0
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        text = "\n".join(
            "".join(c["source"]) for c in cells if c["cell_type"] != "code"
        )
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        for path, anchor in LINK.findall(text):
            links += 1
            if not path:
                assert anchor in {h.replace(" ", "-") for h in headings}, anchor
                continue
            target = notebook.parent / path
            assert target.exists(), path
            assert not anchor or anchor in anchors(target), (path, anchor)
    assert links > 20


def test_the_long_description_links_to_nothing_that_an_index_lacks():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / part["path"]).read_text() for part in hook["fragments"])
    for each in hook["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    assert LINK.findall(text) == []
    assert "the guide" in text  # the words stay


def test_the_package_points_to_what_it_brings():
    assert "`help(ff.fisher_flow)`" in ff.__doc__
    assert "docs/ of the repository" in ff.__doc__  # no wheel has it


def test_every_fence_is_closed():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    fences = {p.name: re.findall(r"^ *```", p.read_text(), re.M) for p in pages}
    assert sum(map(len, fences.values())) > 100
    assert [name for name, found in fences.items() if len(found) % 2] == []


def test_pictures_are_small():
    pictures = list((ROOT / "docs/pictures").iterdir())
    assert pictures
    assert [p.name for p in pictures if p.stat().st_size > 100_000] == []
