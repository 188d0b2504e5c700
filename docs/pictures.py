"""Makes docs/pictures: `python docs/pictures.py FOLDER`.

The front page's picture is drawn here. FOLDER holds what the examples left, each in a
folder of its name: of each the picture of that name, or the first one, is made small
enough to be kept. So is the first picture of each notebook, of an executed copy where
FISHERFLOW_NOTEBOOKS names a folder of them.
"""

import base64
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pages

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import fisherflow_jax as ff

PICTURES = Path(__file__).with_name("pictures")
BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def linear(params: jax.Array, x: jax.Array) -> jax.Array:
    return x @ params


def optimise(axes: plt.Axes) -> None:
    """Two ways down the loss of a regression whose columns nearly agree."""
    shared = jax.random.normal(jax.random.key(0), (200, 1))
    own = jax.random.normal(jax.random.key(1), (200, 2))
    x = shared + 0.45 * own
    truth = jnp.array([1.0, -0.5])
    y = jax.random.bernoulli(jax.random.key(2), jax.nn.sigmoid(x @ truth)).astype(float)
    likelihood = ff.likelihoods.bernoulli()
    loss = ff.negative_log_likelihood(linear, likelihood)

    def path(optimizer: optax.GradientTransformation, **extra: tuple) -> np.ndarray:
        params = jnp.array([-1.6, 1.3])
        state, points = optimizer.init(params), [params]
        for _ in range(40):
            gradients = jax.grad(loss)(params, (x, y))
            updates, state = optimizer.update(gradients, state, params, **extra)
            params = optax.apply_updates(params, updates)
            points.append(params)
        return np.asarray(points)

    exact = ff.estimators.exact(linear, likelihood, ff.structures.full())
    natural = ff.natural_gradient(0.5, exact, damping=1e-6)
    a, b = np.meshgrid(np.linspace(-2.2, 2.4, 80), np.linspace(-2.2, 2.2, 80))
    heights = jax.vmap(lambda p: loss(p, (x, y)))(jnp.stack([a.ravel(), b.ravel()], 1))
    axes.contour(a, b, np.asarray(heights).reshape(a.shape), 14, colors="#cbd5e0")
    for label, colour, points in (
        ("gradient, 40 steps", GREY, path(optax.sgd(0.5))),
        ("natural gradient", BLUE, path(natural, batch=(x, y))),
    ):
        axes.plot(*points.T, ".-", color=colour, label=label, markersize=4)
    axes.set(title="Optimise", xticks=[], yticks=[])
    axes.legend(loc="upper right", frameon=True, fontsize=8)


def infer(axes: plt.Axes) -> None:
    """A mean that jumps, followed by a flow that tests for jumps."""
    truth = np.where(np.arange(120) < 70, 1.0, 2.2)
    noise = np.asarray(jax.random.normal(jax.random.key(3), (120, 4)))
    y = jnp.asarray(truth[:, None] + noise)
    flow = ff.fisher_flow(
        linear, ff.likelihoods.gaussian(), memory=ff.memories.adaptive()
    )

    def step(state: ff.FlowState, batch: tuple) -> tuple:
        state, info = flow.update(state, batch)
        return state, (state.mean[0], ff.standard_error(state)[0], info.memory.alarm)

    batches = jnp.ones((120, 4, 1)), y
    _, found = jax.lax.scan(step, flow.init(jnp.zeros(1)), batches)
    mean, error, alarm = map(np.asarray, found)
    time = np.arange(120)
    axes.plot(time, y.mean(1), ".", color="#cbd5e0", markersize=4)
    axes.fill_between(
        time, mean - 1.96 * error, mean + 1.96 * error, color=BLUE, alpha=0.25
    )
    axes.plot(time, mean, color=BLUE, label="estimate, 95 %")
    axes.plot(time, truth, "--", color=GREY, linewidth=1, label="truth")
    for at in time[alarm.astype(bool)]:
        axes.axvline(at, color=ORANGE, linewidth=1, label="alarm")
    axes.set(title="Infer", xticks=[], yticks=[], ylim=(-0.6, 3.6))
    axes.legend(loc="upper left", frameon=True, fontsize=8)


def uncertainty(axes: plt.Axes) -> None:
    """A trained network, sure where it saw data and unsure where it saw none."""
    x = jnp.concatenate([jnp.linspace(-3, -0.8, 40), jnp.linspace(1.0, 2.4, 25)])[
        :, None
    ]
    y = jnp.sin(1.5 * x[:, 0]) + 0.2 * jax.random.normal(jax.random.key(4), (65,))

    def network(params: dict, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]

    keys = jax.random.split(jax.random.key(5), 3)
    params = {
        "w": 1.5 * jax.random.normal(keys[0], (1, 24)),
        "b": 1.5 * jax.random.normal(keys[1], (24,)),
        "v": jax.random.normal(keys[2], (24,)) / 5,
    }
    model = network, ff.likelihoods.gaussian(scale=0.2)
    flow = ff.fisher_flow(*model, prior_precision=1.0, num_steps=60)
    state, _ = jax.jit(flow.update)(flow.init(params), (x, y))
    grid = jnp.linspace(-4.2, 4.2, 200)[:, None]
    found = ff.predict(state, *model, grid)
    mean, std = np.asarray(found.mean), np.asarray(found.std)
    for width in (1.96, 1.0):
        axes.fill_between(
            grid[:, 0], mean - width * std, mean + width * std, color=BLUE, alpha=0.2
        )
    axes.plot(grid, mean, color=BLUE, label="network, 68 and 95 %")
    axes.plot(x, y, ".", color=ORANGE, markersize=4, label="data")
    axes.set(title="Say how sure", xticks=[], yticks=[], ylim=(-3.2, 3.4))
    axes.legend(loc="upper left", frameon=True, fontsize=8)


def front() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for draw, part in zip((optimise, infer, uncertainty), axes, strict=True):
        draw(part)
        part.spines[["top", "right"]].set_visible(False)
    path = PICTURES / "front.png"
    figure.savefig(path, dpi=100)
    shrink(path, path, width=1200)


def shrink(source: Path | io.BytesIO, target: Path, width: int = 800) -> None:
    """A copy of at most this width, in at most 128 colours."""
    picture = Image.open(source).convert("RGB")
    height = round(picture.height * width / picture.width)
    if picture.width > width:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def outputs(notebook: Path) -> list[bytes]:
    """The pictures in a notebook."""
    return [
        base64.b64decode(output["data"]["image/png"])
        for cell in json.loads(notebook.read_text())["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    front()
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        found = sorted(folder.rglob("*.png"))
        named = [path for path in found if path.stem == folder.name]
        for path in (named or found)[:1]:
            shrink(path, PICTURES / f"{folder.name}.png")
    for path in pages.notebooks():
        for picture in outputs(path)[:1]:
            shrink(io.BytesIO(picture), PICTURES / f"{path.stem}_notebook.png")
