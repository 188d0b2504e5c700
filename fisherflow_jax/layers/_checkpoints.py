"""Layers in checkpoints of flax: checked when restored, never read from there."""

import functools

from fisherflow_jax.layers._layer import Layers


@functools.cache
def register() -> None:
    """Tells flax of `Layers`, where flax is installed."""
    try:
        from flax import serialization
    except ImportError:
        return
    serialization.register_serialization_state(Layers, _to_state_dict, _restored)


def _to_state_dict(layers: Layers) -> dict[str, str]:
    """What each parameter is, by its name, as text."""
    return dict(zip(layers.names, layers.descriptions(), strict=True))


def _restored(layers: Layers, state: dict[str, str]) -> Layers:
    expected = _to_state_dict(layers)
    for name in {**expected, **state}:
        if expected.get(name) != state.get(name):
            raise ValueError(
                "the checkpoint is of a state with other layers: there parameter "
                f"{name} is {state.get(name, 'missing')}; here it is "
                f"{expected.get(name, 'missing')}."
            )
    return layers
