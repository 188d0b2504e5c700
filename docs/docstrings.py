"""Docstrings in this package's style, as reStructuredText."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fisherflow_jax as ff

SECTIONS = "Args|Attributes|Returns|Raises|Warns|Example|References"
HEADINGS = {"Args": "Arguments", "References": "Sources"}


def docstring(value: Any) -> str:
    """The docstring of a name, with the fields that only comments explain."""
    if isinstance(value, functools.partial):
        given = ", ".join(
            f"{name}={option!r}" for name, option in value.keywords.items()
        )
        return f"As below, with {given}.\n\n{inspect.getdoc(value.func)}"
    if not isinstance(value, type | ModuleType) and not callable(value):
        return ""  # a number has that of its type
    text = inspect.getdoc(value) or ""
    fields = commented(value) if isinstance(value, type) else []
    if fields and "\nAttributes:\n" not in text:
        head, example, rest = text.partition("\n\nExample:")
        text = "\n".join([head, "", "Attributes:", *fields]) + example + rest
    return text


@functools.cache
def classes() -> dict[tuple[str, ...], str]:
    """The source of each class of the package, by its name and its fields."""
    found = {}
    for path in Path(ff.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found[node.name, *fields_of(node)] = ast.get_source_segment(text, node)
    return found


def fields_of(node: ast.ClassDef) -> list[str]:
    lines = (line.target for line in node.body if isinstance(line, ast.AnnAssign))
    return [target.id for target in lines if isinstance(target, ast.Name)]


def commented(value: type) -> list[str]:
    """`name: comment` of the fields of a class whose source has comments on them."""
    source = classes().get((value.__name__, *getattr(value, "_fields", ())), "")
    told = re.findall(
        r"^    (\w+): [^#\n]*?(?:# type: \S+ +)?# *(?!type:)(.*)$", source, re.M
    )
    return [f"  {name}: {comment}" for name, comment in told]


def inline(text: str) -> str:
    """Backticks hold code; outside of them no sign is markup, but `**bold**`."""
    parts = re.split(r"(:math:`[^`]*`|``[^`]+``|`[^`]+`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"(?<=\w)_(?!\w)|\||\\", lambda sign: "\\" + sign[0], part)
            stars = r"(\*\*[^*]+\*\*|(?<!\w)\*\w[^*]*\w\*(?!\w))|\*"
            parts[i] = re.sub(stars, lambda sign: sign[1] or r"\*", part)
        elif not part.startswith((":math:", "``")):
            after = r"\ " if parts[i + 1][:1].isalnum() else ""
            parts[i] = f"``{' '.join(part[1:-1].split())}``{after}"
    return "".join(parts)


def prose(lines: list[str]) -> list[str]:
    """Paragraphs, with what stands in them as it is: examples and mathematics."""
    written: list[str] = []
    text: list[str] = []
    inside: int | None = None  # the indent of the directive or example that is open

    def close() -> None:
        written.extend(inline("\n".join(text)).split("\n") if text else [])
        text.clear()

    for line in lines:
        indent = len(line) - len(line.lstrip())
        if inside is not None and line.strip() and indent <= inside:
            inside = None
        opens = re.match(r"\s*(\.\. \w+::|>>> )", line)
        if opens and inside is None:
            close()
            if written and written[-1].strip():
                written.append("")
            inside = -1 if ">>>" in opens[0] else indent
        if inside == -1 and not line.strip():
            inside = None
        if inside is None:
            text.append(line)
        else:
            written.append(line)
    close()
    return written


def items(lines: list[str]) -> list[str]:
    """`name: what it is`, one below the other, as a list of definitions."""
    written: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).split("\n"):
        item = re.match(r"([\w*.`]+(?:, [\w*.`]+)*): ?(.*)", line)
        if item:
            names = ", ".join(f"``{name.strip('`')}``" for name in item[1].split(", "))
            written += ["", names, f"   {item[2]}"]
        else:
            written.append(f" {line}" if line.strip() else "")
    body: list[str] = []
    for block in split_items(written):
        body += ["", block[0], *prose(block[1:])]
    return body


def split_items(lines: list[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in lines:
        if line.startswith("``"):
            if block:
                yield block
            block = [line]
        elif block:
            block.append(line)
    if block:
        yield block


def rendered(doc: str) -> list[str]:
    """A docstring in this package's style, as reStructuredText."""
    start, *sections = re.split(rf"^({SECTIONS}):\n", doc, flags=re.M)
    written = prose(start.rstrip().split("\n"))
    for heading, whole in zip(sections[::2], sections[1::2], strict=True):
        # What is not indented is no part of the section any more.
        body, *after = re.split(r"\n(?=\S)", whole, maxsplit=1)
        written += ["", f".. rubric:: {HEADINGS.get(heading, heading)}", ""]
        if heading == "References":
            written += [f"- {inline(source)}" for source in sources(body)]
        elif heading in ("Args", "Attributes", "Raises", "Warns"):
            written += items(body.rstrip().split("\n"))
        else:
            written += prose(textwrap.dedent(body).rstrip().split("\n"))
        if after:
            written += ["", *prose(after[0].rstrip().split("\n"))]
    return written


def sources(body: str) -> list[str]:
    """The sources of a References section: each has a year, and ends with a stop."""
    lines = " ".join(body.split())
    return [part.strip() for part in re.findall(r".*?\d{4}.*?\.(?= |$)", lines)]
