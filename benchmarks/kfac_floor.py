"""The floor of a step of K-FAC: the same updates, written out for dense layers.

The gradient, a pass back for sampled labels, factors and their moving averages,
inverses by Cholesky every so many steps, products on both sides, momentum, and the
trust region where there is one; no bad rows, no values that are not finite. One forward
pass serves all of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optimizer_methods as methods
from jax.scipy.linalg import solve_triangular
from optimizer_methods import Setting
from optimizer_problems import Problem

import fisherflow_jax as ff

Arrays = list[jax.Array]


class State(NamedTuple):
    """Of each layer; its bias is its kernel's last row."""

    input_factors: Arrays  # (I + 1, I + 1), of an observation, summed with `weight`
    output_factors: Arrays  # (O, O)
    weight: jax.Array  # () of the moving averages
    input_inverses: Arrays
    output_inverses: Arrays
    velocity: Arrays  # (I + 1, O)
    step: jax.Array  # () int32


class FloorRun:
    """As `optimizer_methods.OptaxRun`, for layers {"w", "b"} in a row."""

    def __init__(
        self,
        problem: Problem,
        activations: list[Callable | None],
        *,
        period: int = 1,
        inverse_period: int = methods.INVERSE_PERIOD,
        max_kl: float | None = None,
    ) -> None:
        self._problem, self._activations = problem, activations
        self._periods, self._max_kl = (period, inverse_period), max_kl
        self._classes = problem.likelihood is ff.likelihoods.categorical()
        self.step = jax.jit(self._step, donate_argnums=1)

    def start(self, setting: Setting) -> tuple[Any, State]:
        del setting
        params = jax.tree.map(jnp.copy, self._problem.params)
        sides = [(layer["w"].shape[0] + 1, layer["w"].shape[1]) for layer in params]
        inputs = [jnp.zeros((rows, rows)) for rows, _ in sides]
        outputs = [jnp.zeros((columns, columns)) for _, columns in sides]
        velocity, nothing = [jnp.zeros(x) for x in sides], jnp.zeros(())
        kept = [*map(jnp.copy, inputs)], [*map(jnp.copy, outputs)]
        count = jnp.zeros((), jnp.int32)
        return params, State(inputs, outputs, nothing, *kept, velocity, count)

    def params(self, carry: tuple) -> Any:
        return carry[0]

    def _step(self, setting: Setting, carry: tuple, batch: tuple) -> tuple:
        params, state = carry
        x, targets = batch
        count = x.shape[0]
        gradients = [_matrix(g) for g in jax.grad(self._loss)(params, x, targets)]
        entering, outputs, slopes = self._forward(params, x)
        mean = jax.nn.softmax(outputs) if self._classes else jax.nn.sigmoid(outputs)
        (period, inverse_period), step = self._periods, state.step

        def measured() -> tuple:
            labels = self._drawn(outputs, mean, step)
            sampled = self._back(params, slopes, labels - mean)
            old, share = methods.DECAY, (1 - methods.DECAY) / count

            def averaged(factors: Arrays, rows: Arrays) -> Arrays:
                pairs = zip(factors, rows, strict=True)
                return [old * f + share * (r.T @ r) for f, r in pairs]

            return (
                averaged(state.input_factors, entering),
                averaged(state.output_factors, sampled),
                old * state.weight + (1 - old),
            )

        if period == 1:
            factors = measured()
        else:
            factors = jax.lax.cond(step % period == 0, measured, lambda: state[:3])
        inverses = jax.lax.cond(
            step % inverse_period == 0,
            lambda: _inverses(*factors, setting.damping),
            lambda: state[3:5],
        )
        parts = zip(state.velocity, inverses[0], gradients, inverses[1], strict=True)
        velocity = [
            methods.MOMENTUM * v + left @ g @ right for v, left, g, right in parts
        ]
        if self._max_kl is not None:
            moves = [-setting.learning_rate * v for v in velocity]
            kl = self._divergence(params, slopes, entering, moves, mean)
            factor = jnp.sqrt(self._max_kl / jnp.maximum(kl, self._max_kl))
            velocity = [factor * v for v in velocity]
        rate = setting.learning_rate
        moved = [
            {"w": layer["w"] - rate * v[:-1], "b": layer["b"] - rate * v[-1]}
            for layer, v in zip(params, velocity, strict=True)
        ]
        return moved, State(*factors, *inverses, velocity, step + 1)

    def _loss(self, params: list, x: jax.Array, targets: jax.Array) -> jax.Array:
        outputs = self._problem.apply_fn(params, x)
        if self._classes:
            of_each = optax.losses.softmax_cross_entropy_with_integer_labels
            return jnp.mean(of_each(outputs, targets))
        of_each = optax.losses.sigmoid_binary_cross_entropy(outputs, targets)
        return jnp.sum(of_each) / x.shape[0]

    def _forward(self, params: list, x: jax.Array) -> tuple[Arrays, jax.Array, list]:
        """What enters each layer and a one, the outputs, and pulling back through."""
        entering, slopes = [], []
        for layer, activation in zip(params, self._activations, strict=True):
            entering.append(jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1))
            x, slope = x @ layer["w"] + layer["b"], None
            if activation is not None:
                x, slope = jax.vjp(activation, x)
            slopes.append(slope)
        return entering, x, slopes

    def _back(self, params: list, slopes: list, returned: jax.Array) -> Arrays:
        """What returns to each layer's outputs."""
        found = [returned]
        for layer, slope in zip(params[:0:-1], slopes[-2::-1], strict=True):
            returned = returned @ layer["w"].T
            if slope is not None:
                (returned,) = slope(returned)
            found.append(returned)
        return found[::-1]

    def _drawn(self, outputs: jax.Array, mean: jax.Array, step: jax.Array) -> jax.Array:
        """Labels, one a target, each example's from its own key, as in the package."""
        key = jax.random.fold_in(jax.random.key(0), step)

        def one(index: jax.Array, outputs: jax.Array, mean: jax.Array) -> jax.Array:
            own = jax.random.split(jax.random.fold_in(key, index), 1)[0]
            if self._classes:
                drawn = jax.random.categorical(own, outputs[None])[0]
                return jax.nn.one_hot(drawn, outputs.shape[0])
            return jax.random.bernoulli(own, mean[None])[0].astype(mean.dtype)

        indices = jnp.arange(outputs.shape[0], dtype=jnp.uint32)
        return jax.vmap(one)(indices, outputs, mean)

    def _divergence(
        self, params: list, slopes: list, entering: Arrays, moves: Arrays, mean: Any
    ) -> jax.Array:
        """Of an observation, to second order."""
        change = jnp.zeros_like(entering[0][:, :-1])
        for layer, slope, a, move in zip(params, slopes, entering, moves, strict=True):
            change = a @ move + change @ layer["w"]
            if slope is not None:
                # entry by entry, a function's pull-back is also its push-forward
                (change,) = slope(change)
        if self._classes:
            change = change - jnp.sum(mean * change, 1, keepdims=True)
            squares = mean * jnp.square(change)
        else:
            squares = mean * (1 - mean) * jnp.square(change)
        return jnp.sum(squares) / (2 * mean.shape[0])


def _matrix(layer: dict) -> jax.Array:
    return jnp.concatenate([layer["w"], layer["b"][None]])


def _inverses(
    inputs: Arrays, outputs: Arrays, weight: jax.Array, damping: jax.Array
) -> tuple[Arrays, Arrays]:
    """Of factors damped each by its share."""
    left, right = [], []
    for of_inputs, of_outputs in zip(inputs, outputs, strict=True):
        a, g = of_inputs / weight, of_outputs / weight
        root = jnp.sqrt(damping)
        balance = jnp.sqrt(_mean_eigenvalue(a) / _mean_eigenvalue(g))
        left.append(_inverse(a, balance * root))
        right.append(_inverse(g, root / balance))
    return left, right


def _mean_eigenvalue(factor: jax.Array) -> jax.Array:
    return jnp.trace(factor) / factor.shape[0]


def _inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    identity = jnp.eye(factor.shape[0])
    root = jnp.linalg.cholesky(factor + damping * identity, symmetrize_input=False)
    half = solve_triangular(root, identity, lower=True)
    return half.T @ half
