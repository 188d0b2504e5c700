"""How each parameter is treated, as a table to read."""

from typing import TYPE_CHECKING

from fisherflow_jax._ground.tables import aligned

if TYPE_CHECKING:
    from fisherflow_jax.layers._layer import Layer, Layers

HEADER = ("parameter", "shape", "treatment", "inputs", "outputs", "stacked", "shared")


def table(layers: "Layers") -> str:
    """One row for each leaf, in their order."""
    names = layers.names
    rows: dict[int, tuple[str, ...]] = {}
    for leaf, reason in layers.fallback:
        square = "; one square a batch" if leaf in layers.summed else ""
        rows[leaf] = (f"no layer: {reason}{square}", "", "", "", "")
    for layer in layers.layers:
        numbers = (layer.num_outputs, layer.num_stacked, layer.num_positions)
        sizes = tuple(map(str, numbers))
        rows[layer.kernel] = (layer.kind, str(layer.num_inputs), *sizes)
        if layer.bias is not None:
            rows[layer.bias] = (f"bias of {names[layer.kernel]}", "1", *sizes)
    lines = [HEADER] + [
        (name, str(layers.shapes[i]), *rows[i]) for i, name in enumerate(names)
    ]
    text = aligned(lines, text=True)
    if not layers.batched:
        return text
    return f"{text}\nexamples: run together ({layers.together or 'as asked'})"


def descriptions(layers: "Layers") -> list[str]:
    """For each leaf a text that tells it from other treatments."""
    texts = {leaf: f"no layer ({reason})" for leaf, reason in layers.fallback}
    for layer in layers.layers:
        texts[layer.kernel] = _described(layer)
        if layer.bias is not None:
            texts[layer.bias] = (
                f"a bias of {layers.names[layer.kernel]} ({layer.bias_layout})"
            )
    return [texts[i] for i in range(len(layers.names))]


def _described(layer: "Layer") -> str:
    return (
        f"{layer.kind} with K = {layer.num_stacked}, T = {layer.num_positions}, "
        f"I = {layer.num_inputs}, O = {layer.num_outputs} ({layer.kernel_layout})"
    )
