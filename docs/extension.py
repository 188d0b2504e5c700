"""What the site adds to Sphinx: its generated pages, mathematics, and links by name."""

import re
from pathlib import Path

import pages
from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

log = logging.getLogger(__name__)
PAGES = {
    **{
        rf"\]\((?:\.\./)*{name.upper()}\.md": f"](/generated/{name}.md"
        for name in pages.FROM_ROOT
    },
    r"\]\((?:\.\./)+notebooks/(\w+)\.ipynb": r"](/generated/gallery/\1_notebook.ipynb",
    r"\]\((?:\.\./)+examples/(\w+)\.py": r"](/generated/gallery/\1.md",
}
# What docutils does not read, and what says the same: brackets grow by themselves.
SPELLINGS = {
    r"\\[bB]igg?[lrm]?(?![A-Za-z])": "",
    r"\\(textstyle|mathrel)(?![A-Za-z])": "",
    r"\\dots(?![A-Za-z])": r"\\ldots",
    r"\\(hat|bar|tilde)(?![a-z]) *(\\[A-Za-z]+|\w)(?=[_^])": r"{\\\1{\2}}",
    # A function's name stands apart from its argument.
    r"\\(arg|cos|det|exp|log|max|min|sin)(?![A-Za-z_^]) *(?=[\w\\])": r"\\\1\\,",
    r"(\\operatorname\{\w+\}) *(?=[A-Za-z\\])": r"\1\\,",
    r"\\([td]?frac)(\d)(\w)": r"\\\1{\2}{\3}",
}
NAME = re.compile(r"ff(\.[A-Za-z]\w*)+(?![\w.*])")


def drawn(node: nodes.Node, text: str, **options: bool) -> str:
    """MathML, which browsers draw themselves: no script, and nothing to fetch."""
    for pattern, plain in SPELLINGS.items():
        text = re.sub(pattern, plain, text)
    try:
        return latex2mathml.tex2mathml(text, **options)
    except MathError as error:
        log.warning("mathematics: %s", error, location=node)
        return ""


def inline_math(writer, node):
    writer.body.append(drawn(node, node.astext()))
    raise nodes.SkipNode


def block_math(writer, node):
    text = node.astext()
    if r"\\" in text and r"\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    shown = drawn(node, text, as_block=True)
    writer.body.append(f'<div class="math">{shown}</div>')
    raise nodes.SkipNode


def link_names(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Make `ff.kfac`, wherever it is written as code, a link to its entry."""
    entries = app.env.domains["py"].objects
    for node in list(tree.findall(nodes.literal)):
        found = NAME.match(node.astext())
        if found is None or isinstance(node.parent, nodes.reference):
            continue
        name = pages.ALIASES.get(found[0], found[0])
        entry = entries.get(name)
        if entry is None:
            if page == "generated/changelog":  # it tells of names that are gone
                continue
            log.warning("%s has no entry in the reference", name, location=node)
            continue
        if entry.docname == page and name in own_ids(node):
            continue
        target = make_refnode(
            app.builder, page, entry.docname, entry.node_id, node.deepcopy(), name
        )
        node.replace_self(target)


def own_ids(node: nodes.Node) -> list[str]:
    """The ids of the entry that a node stands in: it needs no link to itself."""
    while node.parent is not None:
        node = node.parent
        if node.tagname == "desc":
            return node[0].get("ids", [])
    return []


def link_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to notebooks and examples, right in a clone, go to their pages here."""
    for pattern, target in PAGES.items():
        source[0] = re.sub(pattern, target, source[0])
    # The empty line that ends what an example prints, for doctest, is not shown.
    source[0] = re.sub(r"\n\n(```)$", r"\n\1", source[0], flags=re.M)


def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("builder-inited", lambda app: pages.write(Path(app.srcdir)))
    app.connect("source-read", link_pages)
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
