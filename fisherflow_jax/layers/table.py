"""How each parameter is treated, as a table to read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fisherflow_jax.layers.layer import Layers

HEADER = ("parameter", "shape", "treatment", "inputs", "outputs", "stacked", "shared")


def table(layers: "Layers") -> str:
    """One row for each leaf, in their order."""
    names = [name or "(the only array)" for name in layers.names]
    rows: dict[int, tuple[str, ...]] = {}
    for leaf, reason in layers.fallback:
        rows[leaf] = (f"no layer: {reason}", "", "", "", "")
    for layer in layers.layers:
        numbers = (layer.num_outputs, layer.num_stacked, layer.num_positions)
        sizes = tuple(map(str, numbers))
        rows[layer.kernel] = (layer.kind, str(layer.num_inputs), *sizes)
        if layer.bias is not None:
            rows[layer.bias] = (f"bias of {names[layer.kernel]}", "1", *sizes)
    lines = [HEADER] + [
        (name, str(layers.shapes[i]), *rows[i]) for i, name in enumerate(names)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(map(str.ljust, line, widths)).rstrip()  # one line a parameter
        for line in lines
    )
    return "\n".join(padded)
