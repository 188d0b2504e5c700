"""A model as one gives it to an estimator: its apply_fn, its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks
from fisherflow_jax._ground.choices import Compared

PyTree = Any


def linear(params: PyTree, inputs: Any) -> Any:
    """Also of numpy arrays, which compiles nothing."""
    return inputs @ params["coef"] + params["intercept"]


def linear_params(num_features: int, shape: tuple[int, ...]) -> PyTree:
    return {"coef": jnp.zeros((num_features, *shape)), "intercept": jnp.zeros(shape)}


@dataclasses.dataclass(frozen=True)
class _Linen:
    module: Any

    def __call__(self, params: PyTree, inputs: jax.Array) -> jax.Array:
        return self.module.apply({"params": params}, inputs)


@dataclasses.dataclass(frozen=True)
class _Nnx:
    """What is no parameter is compared by value, so that clones compile once."""

    graph: Any
    rest: Compared

    def __call__(self, params: PyTree, inputs: jax.Array) -> jax.Array:
        from flax import nnx

        return nnx.merge(self.graph, params, jax.tree.unflatten(*self.rest.value))(
            inputs
        )


@dataclasses.dataclass(frozen=True)
class _OneColumn:
    """Outputs `(n, 1)` as `(n,)`."""

    apply_fn: Callable

    def __call__(self, params: PyTree, inputs: jax.Array) -> jax.Array:
        return self.apply_fn(params, inputs)[..., 0]


def draws(model: Any) -> bool:
    """Whether the model's first parameters are drawn."""
    return _module(model, "linen")


def apply_fn_of(model: Any, output_shape: tuple[int, ...]) -> Callable:
    """`(params, inputs) -> outputs`; `output_shape`: the model's own, of one row."""
    apply_fn = _apply_fn(model)
    return _OneColumn(apply_fn) if output_shape == (1,) else apply_fn


def _apply_fn(model: Any) -> Callable:
    if model is None:
        return linear
    if _module(model, "linen"):
        return _Linen(model)
    if _module(model, "nnx"):
        from flax import nnx

        graph, *states = nnx.split(model, nnx.Param, ...)
        leaves, tree = jax.tree.flatten(states[1])
        return _Nnx(graph, Compared((tree, leaves)))
    if isinstance(model, tuple) and len(model) == 2 and callable(model[0]):
        return model[0]
    raise TypeError(
        "model is None (linear), a flax module (linen or nnx), or a pair "
        f"(apply_fn, params); got {checks.described(model)}."
    )


def start_of(model: Any, inputs: jax.Array, key: Any) -> tuple[PyTree, PyTree]:
    """Where the search sets out from, and the mean of the prior, in float64.

    Those of a linen module are drawn, about zero; others are the model's own.
    """
    if _module(model, "linen"):
        variables = model.init(jax.random.key(key), inputs[:1])
        params = variables.pop("params")
        if variables:
            raise ValueError(
                f"the module keeps {', '.join(variables)} beside its parameters: give "
                "model=(apply_fn, params), with a function that knows them."
            )
        return _wide(params), jax.tree.map(jnp.zeros_like, _wide(params))
    if _module(model, "nnx"):
        from flax import nnx

        params = nnx.split(model, nnx.Param, ...)[1]
    else:
        params = model[1]
    return _wide(params), _wide(params)


def _wide(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


def _module(model: Any, kind: str) -> bool:
    from flax import linen, nnx

    return isinstance(model, {"linen": linen, "nnx": nnx}[kind].Module)


_compiled = jax.jit(lambda apply_fn, params, x: apply_fn(params, x), static_argnums=0)


def outputs_of(apply_fn: Callable, params: PyTree, inputs: np.ndarray) -> np.ndarray:
    """At these parameters, on this host."""
    if apply_fn is linear:
        return linear(jax.tree.map(np.asarray, params), inputs)
    return np.asarray(_compiled(apply_fn, params, inputs))
