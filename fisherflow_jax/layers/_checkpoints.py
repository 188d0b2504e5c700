"""Layers in checkpoints of flax: checked when restored, never read from there."""

from flax import serialization

from fisherflow_jax.layers._layer import Layers
from fisherflow_jax.layers._table import descriptions


def _to_state_dict(layers: Layers) -> dict[str, str]:
    """What each parameter is, by its name, as text."""
    return dict(zip(layers.names, descriptions(layers), strict=True))


def _from_state_dict(layers: Layers, state: dict[str, str]) -> Layers:
    expected = _to_state_dict(layers)
    for name in {**expected, **state}:
        if expected.get(name) != state.get(name):
            raise ValueError(
                "the checkpoint is of a state with other layers: there parameter "
                f"{name} is {state.get(name, 'missing')}; here it is "
                f"{expected.get(name, 'missing')}."
            )
    return layers


serialization.register_serialization_state(Layers, _to_state_dict, _from_state_dict)
