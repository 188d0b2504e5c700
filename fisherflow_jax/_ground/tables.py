"""Text tables."""

import html as _html
from collections.abc import Iterable, Sequence


def aligned(
    rows: Iterable[Sequence[object]], *, text: bool = False, rule: bool = False
) -> str:
    """Rows of cells in columns, the first row their heads.

    The first column stands to the left and the others, numbers, to the right; all to
    the left with `text`. `rule` draws a line below the heads.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust] + [str.ljust if text else str.rjust] * (len(widths) - 1)
    lines = [
        "  ".join(
            side(cell, width)
            for side, cell, width in zip(sides, row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def html(
    head: Sequence[object], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()
) -> str:
    """The same as an HTML table; a row of one cell runs through all columns."""

    def cells(row: Sequence[object], kind: str) -> str:
        wide = f' colspan="{len(head)}"' if len(row) == 1 and len(head) > 1 else ""
        inside = "".join(
            f"<{tag}{wide}>{_html.escape(str(cell))}</{tag}>"
            for tag, cell in zip(["th", *[kind] * (len(row) - 1)], row, strict=True)
        )
        return f"<tr>{inside}</tr>"

    lines = [f"<thead>{cells(head, 'th')}</thead>", "<tbody>"]
    lines += [cells(row, "td") for row in rows]
    lines += ["</tbody>"]
    below = "".join(f"<p>{_html.escape(note)}</p>" for note in notes)
    return f"<table>{''.join(lines)}</table>{below}"
