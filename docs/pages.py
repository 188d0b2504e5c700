"""The generated pages of the site: the reference, the gallery, benchmarks, sources.

They are written below `docs/generated/`, which is not kept. The reference has the names
and tiers of `docs/api.py`, and the docstrings as they are.
"""

import ast
import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Any

import api
from docstrings import docstring, inline, rendered, sources

import fisherflow_jax as ff

ROOT = Path(__file__).parents[1]
# The door that a name of the package itself stands behind, by the room of its source.
DOORS = {
    "optimise": ("Optimise", ["transforms"]),
    "infer": ("Infer", ["accumulation", "flow", "model", "_choose", "_ground"]),
    "uncertainty": ("Say how sure", []),
}
ABOUT = {
    "optimise": "Optax optimisers, and the transformation that they are made of.",
    "infer": "Streams into states: flows, sums over data sets, batches, models.",
    "uncertainty": "States into intervals, tests, samples, predictions.",
}
# Pages of the repository's root, by their names in lower case.
FROM_ROOT = ("changelog", "contributing", "security")
# `ff.calibration.calibrate` is `ff.calibrate`: one entry.
ALIASES: dict[str, str] = {}


# --- The reference


def resolved(path: str) -> Any:
    value: Any = ff
    for part in path.split(".")[1:]:
        value = getattr(value, part)
    return value


def kind(path: str, value: Any) -> str:
    if isinstance(value, GenericAlias | ModuleType):
        return "data"
    if isinstance(value, type):
        return "exception" if issubclass(value, Warning) else "class"
    if isinstance(resolved(path.rpartition(".")[0]), type):
        return "method"
    return "function" if callable(value) else "data"


def described(room: str, name: str, value: Any) -> Iterator[str]:
    """The entry of a name, and those of a class's methods."""
    lines = api.entries(room, name, value)
    if isinstance(value, ModuleType):
        lines = [f"ff.{room}.{name}", *lines]
    for line in lines:
        path, _, same = line.partition(" is ")
        if same:
            ALIASES[path] = same
            yield f":py:obj:`{path} <{same}>` is ``{same}``.\n"
            continue
        path = re.match(r"[\w.]+", line)[0]
        shown = resolved(path)
        of = kind(path, shown)
        yield f".. py:{of}:: {path if of == 'data' else line}\n"
        yield from (f"   {row}".rstrip() for row in rendered(docstring(shown)))
        yield ""


def door(name: str, value: Any) -> str:
    """The door of the room that a name comes from."""
    line = rf"from fisherflow_jax\.([\w.]+) import {name} as {name}\b"
    found = re.search(line, inspect.getsource(ff))
    home = found[1] if found else value.__module__.partition(".")[2]
    for page, (_, rooms) in DOORS.items():
        if home.partition(".")[0] in rooms:
            return page
    return "uncertainty"


def titled(title: str, sign: str = "=") -> list[str]:
    return [title, sign * len(title), ""]


def is_type(value: Any) -> bool:
    return isinstance(value, type | GenericAlias) or not callable(value)


def row(path: str, value: Any) -> list[str]:
    target = ALIASES.get(path, path)
    about = inline(docstring(value).split("\n")[0])
    return [f"   * - :py:obj:`{path} <{target}>`", f"     - {about}".rstrip()]


def table(rows: list[list[str]]) -> list[str]:
    head = [".. list-table::", "   :widths: 42 58", "   :class: names", ""]
    return [*head, *(line for each in rows for line in each), ""]


def reference() -> Iterator[tuple[str, str]]:
    """(file, text) of the reference: a page of each door and room, and the tiers."""
    texts: dict[str, list[str]] = {}
    tiers: dict[str, dict[str, list[list[str]]]] = {tier: {} for tier in api.TIERS}
    for page, (title, _) in DOORS.items():
        texts[page] = [*titled(title), ABOUT[page], ""]
    # What one calls, then what that returns.
    for tier, room, name, value in sorted(api.names(), key=lambda n: is_type(n[3])):
        page = room or door(name, value)
        if page not in texts:
            about = rendered(docstring(getattr(ff, room)))
            texts[page] = [*titled(f"ff.{room}"), f".. py:module:: ff.{room}", ""]
            texts[page] += [".. py:currentmodule:: None", ""]
            texts[page] += [*about, ""]
        texts[page] += described(room, name, value)
        path = f"ff.{room}.{name}" if room else f"ff.{name}"
        tiers[tier].setdefault(page, []).append(row(path, value))
    index = titled("Reference")
    index += [
        "Every public name, in three tiers: only what is *stable* is promised.",
        "",
    ]
    for tier, meaning in api.TIERS.items():
        index += [*titled(tier.capitalize(), "-"), meaning, ""]
        for page in texts:
            if page not in tiers[tier]:
                continue
            title = DOORS.get(page, (f"ff.{page}",))[0]
            about = ABOUT.get(page) or docstring(getattr(ff, page)).split("\n")[0]
            index += [
                *titled(title, "~"),
                f"{inline(about)} :doc:`All of it <{page}>`.",
                "",
            ]
            index += table(tiers[tier][page])
    index += [".. toctree::", "   :hidden:", "", *(f"   {page}" for page in texts)]
    yield "reference/index.rst", "\n".join(index)
    for page, lines in texts.items():
        yield f"reference/{page}.rst", "\n".join(lines)


# --- Sources, benchmarks, gallery


def cited() -> dict[str, list[str]]:
    """Each source that a public docstring names, to its year, and the names that do."""
    found: dict[str, list[str]] = {}
    for _, room, name, value in api.names():
        if room and getattr(ff, name, None) is value:
            continue
        body = re.search(r"^References:\n((?: .*\n?|\n)+)", docstring(value), re.M)
        for source in sources(body[1]) if body else []:
            source = re.match(r".*?\b\d{4}\b", source)[0]
            path = f"ff.{room}.{name}" if room else f"ff.{name}"
            found.setdefault(source, []).append(path)
    return found


def bibliography() -> str:
    lines = ["# Bibliography", "", "What the docstrings cite, and where.", ""]
    for source, names in sorted(cited().items(), key=lambda item: item[0].lower()):
        lines.append(f"- {source}. " + ", ".join(f"`{name}`" for name in names))
    return "\n".join(lines) + "\n"


def summary_of(path: Path) -> tuple[str, str]:
    """The first sentence of a program's docstring, and what follows it."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()), rest


def benchmarks() -> str:
    pages = sorted((ROOT / "docs").glob("**/*.md"))
    lines = ["| program | measures | its numbers are in |", "| --- | --- | --- |"]
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if "__main__" not in path.read_text():
            continue
        name = f"benchmarks/{path.name}"
        quoted = [
            f"[{page.stem}](/{page.relative_to(ROOT / 'docs')})"
            for page in pages
            if "generated" not in page.parts and name in page.read_text()
        ]
        lines.append(f"| `{name}` | {summary_of(path)[0]} | {', '.join(quoted)} |")
    return "\n".join(lines) + "\n"


def notebook(path: Path) -> tuple[str, str, str]:
    """(text to show, title, first sentence) of a notebook, its links as here."""
    book = json.loads(path.read_text())
    first = "".join(book["cells"][0]["source"])
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = linked("".join(cell["source"]))
    about = " ".join(re.sub(r"^#.*\n+", "", first).split())
    sentence = re.match(r".*?[.?:](?= |$)", about)[0].replace(":", ".")
    return json.dumps(book), first.splitlines()[0].strip("# "), sentence


def notebooks() -> list[Path]:
    """The notebooks: their executed copies, where a folder of them is named."""
    folder = Path(os.environ.get("FISHERFLOW_NOTEBOOKS") or ROOT / "notebooks")
    return sorted(folder.glob("*.ipynb"))


def linked(text: str) -> str:
    """A notebook's text whose links, right in a clone, go to pages of the site."""
    text = re.sub(r"\]\(#([^)\s]+)\)", anchored, text)
    text = re.sub(r"\]\((\w+)\.ipynb", r"](\1_notebook.ipynb", text)
    return text.replace("](../docs/", "](/")


def anchored(link: re.Match) -> str:
    """A link within a notebook, as headings are named here: lower case, no stops."""
    return f"](#{re.sub(r'[^-0-9a-z_]', '', link[1].lower())})"


def card(name: str, title: str, about: str) -> list[str]:
    lines = [f":::{{grid-item-card}} {title}", f":link: {name}", ":link-type: doc"]
    if (ROOT / "docs/pictures" / f"{name}.png").exists():
        lines.append(f":img-top: /pictures/{name}.png")
    return [*lines, "", about, ":::"]


def example(path: Path) -> tuple[str, str, str]:
    """(text of the page, title, first sentence) of a program."""
    about, rest = summary_of(path)
    title = path.stem.capitalize().replace("_", " ").replace("Ab ", "A/B ")
    about = about.split(": `python")[0].rstrip(".") + "."
    text = [f"# {title}", "", about, "", rest, ""]
    if (ROOT / f"docs/pictures/{path.stem}.png").exists():
        text += [f"![{title}](/pictures/{path.stem}.png)", ""]
    kept = ROOT / f"docs/outputs/{path.stem}.txt"
    if kept.exists():
        text += [f"Its full form, `python examples/{path.name} --full`, printed:", ""]
        text += ["```text", kept.read_text().rstrip(), "```", ""]
    start = ast.parse(path.read_text()).body[0].end_lineno + 2
    text += [f"The program, `examples/{path.name}`:", ""]
    text += [
        f"```{{literalinclude}} /../examples/{path.name}",
        f":lines: {start}-",
        "```",
    ]
    return "\n".join(text) + "\n", title, about


def gallery() -> Iterator[tuple[str, str]]:
    """(file, text) of the gallery: a page of each notebook and program, and cards."""
    index, listed = ["# Gallery", ""], []
    for heading, paths, made, ending in (
        ("Notebooks", notebooks(), notebook, "_notebook.ipynb"),
        ("Programs", sorted((ROOT / "examples").glob("*.py")), example, ".md"),
    ):
        index += [f"## {heading}", "", "::::{grid} 1 2 2 2", ":gutter: 3", ""]
        for path in paths:
            if path.suffix == ".py" and "__main__" not in path.read_text():
                continue  # what programs share
            name, (text, title, about) = path.stem + ending, made(path)
            yield f"gallery/{name}", text
            index += card(name.partition(".")[0], title, about)
            listed.append(f"{title} <{name.partition('.')[0]}>")
        index += ["::::", ""]
    index += ["```{toctree}", ":hidden:", "", *listed, "```", ""]
    yield "gallery/index.md", "\n".join(index)


def from_root(name: str) -> str:
    """A page of the repository's root, its links as seen from the site."""
    return (ROOT / f"{name.upper()}.md").read_text().replace("](docs/", "](/")


def write(docs: Path) -> None:
    """Write what has changed, and take away what is no page any more."""
    folder = docs / "generated"
    texts = {
        **dict(reference()),
        **dict(gallery()),
        "bibliography.md": bibliography(),
        **{f"{name}.md": from_root(name) for name in FROM_ROOT},
        "benchmarks_table.txt": benchmarks(),
    }
    for path in folder.glob("**/*.*"):
        if str(path.relative_to(folder)) not in texts:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
