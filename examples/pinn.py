"""A boundary value problem by a network: four kinds of steps at equal seconds.

`-u'' = pi^2 sin(pi x)` on [0, 1], zero at both ends. The residual is least squares in
the network's second derivative, so that the full Fisher information is the
Gauss-Newton matrix. The network carries jets, value, slope and curvature, as three rows
through the same kernels: K-FAC then finds dense layers that are shared by three
positions (Dangel, Mueller, Zeinhofer, "Kronecker-factored approximate curvature for
physics-informed neural networks", 2024), where nested `jax.grad` would hide them. Each
method has the same processor seconds, compiling left out, and two settings, of a few
that were tried.

Over eight starts the median error of Gauss-Newton is 3e-9, and that of L-BFGS, which
is the habit of this field, 5e-8: as much as Gauss-Newton's with more damping. K-FAC,
without a line search here, ends at 2e-6 and wins nothing from them; Adam ends at 2e-5
where its rate is halved on a schedule (in another run, with more steps to its seconds,
at 4e-6), and at one rate far above. Seconds depend on the machine: with 321 parameters
the full matrix is cheap.

    python examples/pinn.py

A minute and a half; with `--full`, which has eight starts, three. Saves the picture in
`outputs/`. Needs `pip install "fisherflow-jax[examples]"`.
"""

import time
from collections.abc import Callable
from pathlib import Path

import figures
import form
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import fisherflow_jax as ff

jax.config.update("jax_enable_x64", True)

HIDDEN, SECONDS = 16, 2.0
INSIDE = jnp.linspace(0, 1, 62)[1:-1]
# Rows (x, 1 at the boundary): there the value counts, ten times; inside the curvature.
X = jnp.concatenate(
    [jnp.stack([INSIDE, 0 * INSIDE], 1), jnp.array([[0.0, 1.0], [1.0, 1.0]])]
)
Y = jnp.concatenate([-(jnp.pi**2) * jnp.sin(jnp.pi * INSIDE), jnp.zeros(2)])
GRID = jnp.linspace(0, 1, 201)


def dense(kernel: jax.Array, rows: jax.Array) -> jax.Array:
    """A layer on jets `(n, 3, units)`; its bias enters the value alone."""
    value = jnp.array([1.0, 0.0, 0.0])[:, None]
    ones = jnp.broadcast_to(value, (*rows.shape[:-1], 1))
    return jnp.concatenate([rows, ones], -1) @ kernel


def tanh(rows: jax.Array) -> jax.Array:
    value, slope, curvature = jnp.moveaxis(rows, 1, 0)
    t = jnp.tanh(value)
    s = 1 - t**2
    return jnp.stack([t, s * slope, s * curvature - 2 * t * s * slope**2], 1)


def jets(params: dict, x: jax.Array) -> jax.Array:
    """u, u' and u'' at x, `(n, 3)`."""
    rows = jnp.stack([x, jnp.ones_like(x), jnp.zeros_like(x)], 1)[..., None]
    rows = tanh(dense(params["w1"], rows))
    rows = tanh(dense(params["w2"], rows))
    return dense(params["w3"], rows)[..., 0]


def residual(params: dict, inputs: jax.Array) -> jax.Array:
    found = jets(params, inputs[:, 0])
    return jnp.where(inputs[:, 1] > 0, 10 * found[:, 0], found[:, 2])


MODEL = residual, ff.likelihoods.gaussian()


def loss(params: dict, batch: object = None) -> jax.Array:
    """Half the mean squared residual; the batch, which L-BFGS hands on, is all rows."""
    return 0.5 * jnp.mean((residual(params, X) - Y) ** 2)


def start(key: jax.Array) -> dict:
    keys = jax.random.split(key, 3)
    sizes = (1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)
    spreads = 2.0, 0.25, 0.25
    return {
        f"w{k + 1}": jnp.concatenate(
            [
                spread * jax.random.normal(key, size),
                (k == 0) * jax.random.normal(jax.random.fold_in(key, 1), (1, size[1])),
            ]
        )
        for k, (key, size, spread) in enumerate(zip(keys, sizes, spreads, strict=True))
    }


@jax.jit
def error(params: dict) -> jax.Array:
    """Relative, in L2."""
    away = jets(params, GRID)[:, 0] - jnp.sin(jnp.pi * GRID)
    return jnp.linalg.norm(away) / jnp.linalg.norm(jnp.sin(jnp.pi * GRID))


def trained(optimizer: optax.GradientTransformation, chunk: int) -> Callable:
    """`key -> (seconds, errors, steps)`, for SECONDS of the processor."""
    extended = optax.with_extra_args_support(optimizer)

    @jax.jit
    def run(params: dict, state: optax.OptState) -> tuple:
        def step(carried: tuple, _: None) -> tuple:
            params, state = carried
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = extended.update(
                gradients,
                state,
                params,
                batch=(X, Y),
                value=value,
                grad=gradients,
                value_fn=loss,
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=chunk)[0]

    def from_start(key: jax.Array) -> tuple[np.ndarray, np.ndarray, int]:
        params = start(key)
        state = extended.init(params)
        jax.block_until_ready(run(*run(params, state)))  # compiles, for both states
        seconds, errors = [0.0], [error(params)]
        while seconds[-1] < SECONDS:
            began = time.process_time()
            params, state = jax.block_until_ready(run(params, state))
            seconds.append(seconds[-1] + time.process_time() - began)
            errors.append(error(params))
        return np.array(seconds), np.array(errors), chunk * (len(seconds) - 1)

    return from_start


def methods() -> dict[str, tuple[optax.GradientTransformation, int, str]]:
    """Name: optimiser, steps between two looks, colour."""
    exact = ff.estimators.exact
    found = {}
    halved = optax.exponential_decay(0.01, 4000, 0.5)
    for rate, name in ((3e-3, "rate 0.003"), (halved, "halved each 4000 steps")):
        found[f"Adam, {name}"] = optax.adam(rate), 100, figures.GREY
    for memory in (10, 100):
        found[f"L-BFGS, memory {memory}"] = optax.lbfgs(memory_size=memory), 20, "black"
    for damping in (1e-4, 1e-8):
        newton = optax.chain(
            ff.natural_gradient(
                1.0,
                exact(*MODEL, ff.structures.full()),
                memory=ff.memories.exponential(1e-3),
                damping=damping,
            ),
            ff.clip_by_kl(*MODEL, 1.0),
        )
        found[f"Gauss-Newton, damping {damping:g}"] = newton, 2, figures.BLUE
    for rate, damping in ((0.1, 1e-2), (0.3, 1e-3)):
        kfac = ff.kfac(
            rate, *MODEL, inputs=X, estimator=exact, damping=damping, max_kl=1.0
        )
        found[f"K-FAC, rate {rate:g}, damping {damping:g}"] = kfac, 20, figures.ORANGE
    return found


def main(full: bool) -> None:
    starts = 8 if full else 3
    params = start(jax.random.key(0))

    def u(x: jax.Array) -> jax.Array:
        return jets(params, x[None])[0, 0]

    at = jnp.array(0.3)
    expected = jnp.stack([u(at), jax.grad(u)(at), jax.grad(jax.grad(u))(at)])
    np.testing.assert_allclose(jets(params, at[None])[0], expected, rtol=1e-10)
    print(ff.layers.find_layers(residual, params, X))
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    print(f"{SECONDS:g} processor seconds each, {starts} starts: relative error")
    print(f"{'':32s} {'median':>8s} {'best':>8s} {'worst':>8s} {'steps':>6s}")
    last = {}
    for number, (name, (optimizer, chunk, colour)) in enumerate(methods().items()):
        run = trained(optimizer, chunk)
        runs = [run(jax.random.key(k)) for k in range(starts)]
        ends = np.array([errors[-1] for _, errors, _ in runs])
        last[name] = np.median(ends)
        print(
            f"{name:32s} {np.median(ends):8.1e} {ends.min():8.1e} {ends.max():8.1e} "
            f"{np.median([steps for *_, steps in runs]):6.0f}",
            flush=True,
        )
        style = "-" if number % 2 == 0 else "--"
        for k, (seconds, errors, _) in enumerate(runs[:3]):
            axis.plot(
                seconds, errors, style, color=colour, lw=1, label=None if k else name
            )
    adam = min(value for name, value in last.items() if name.startswith("Adam"))
    newton = min(value for name, value in last.items() if name.startswith("Gauss"))
    assert newton < 0.1 * adam, last
    axis.set(yscale="log", xlabel="processor seconds", ylabel="relative error")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    path = Path("outputs/pinn.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"saved {path}")


if __name__ == "__main__":
    main(form.full(__doc__))
