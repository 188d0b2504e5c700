"""Text tables."""

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
