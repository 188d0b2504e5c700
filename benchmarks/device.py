"""What an accelerator does, against what it could: bytes, rows and matrix products.

Sized for ten minutes on one GPU with 80 GB; on a CPU, or with `--small`, it takes some
seconds and only shows that all of it runs.

    python benchmarks/device.py
    python benchmarks/device.py --only diagonal --trace FOLDER   # and a profile

One: what the device copies and multiplies, which the rest is held against. Two: rows a
second of a streaming flow. Three: a diagonal flow and estimators at a billion
parameters, against the bytes that must move. Four: K-FAC and SOAP on a transformer of
12 layers and d_model 1024 in bfloat16, against their matrix products. Five:
predictions, against the model alone.
"""

import argparse
import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import classifiers
import jax
import jax.numpy as jnp
import optax
from measuring import describe_machine, seconds, table

import fisherflow_jax as ff

# A float32 a parameter that a diagonal flow's update must read or write: mean and
# information in and out (4), the model over the mean forward, backward and, for the
# evidence, forward at the solution (3), gradient and squares out and in (4).
FLOW_BYTES = 4 * 11
# An estimator added to a sum: forward and backward (2), squares out and in (2), the sum
# in and out (2).
ESTIMATOR_BYTES = 4 * 6
TARGET = 2.0  # times what these bytes take at the measured bandwidth


class Sizes(NamedTuple):
    copied: int  # floats
    multiplied: int  # the side of a square matrix
    rows: int
    batches: tuple[int, ...]
    width: int  # of the four layers of the diagonal flow
    layers: int  # of the transformer
    d_model: int
    vocabulary: int
    tokens: tuple[int, int]  # rows, length
    predicted: tuple[int, int]  # rows, width
    estimators: tuple[Callable, ...]  # of the diagonal flow
    rounds: int


FULL = Sizes(
    copied=2**30,
    multiplied=8192,
    rows=10_000_000,
    batches=(1_000, 10_000, 100_000),
    width=15_872,
    layers=12,
    d_model=1024,
    vocabulary=32_000,
    tokens=(8, 512),
    predicted=(65_536, 1024),
    estimators=(ff.estimators.exact, ff.estimators.hutchinson),
    rounds=7,
)
SMALL = Sizes(
    copied=2**24,
    multiplied=512,
    rows=100_000,
    batches=(1_000,),
    width=768,
    layers=1,
    d_model=64,
    vocabulary=100,
    tokens=(4, 16),
    predicted=(1_024, 64),
    estimators=(ff.estimators.exact,),
    rounds=3,
)


class Rates(NamedTuple):
    bytes: float  # a second, of a copy: read and written
    flops: float  # a second, of a product in bfloat16


class Timed(NamedTuple):
    median: float
    spread: str


def timed(call: Callable[[], Any], rounds: int) -> Timed:
    """Of calls after the first, which compiles; what they return is let go."""
    jax.block_until_ready(call())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    spread = f"{seconds(min(found))}-{seconds(max(found))}"
    return Timed(statistics.median(found), spread)


def carried(step: Callable, state: Any) -> Callable[[], Any]:
    """Calls of `step`, each in the memory of the state before."""
    held = [state]

    def call() -> Any:
        held[0], told = step(held[0])
        return told

    return call


# --- one: the device ---


def measured(sizes: Sizes) -> Rates:
    x = jnp.ones(sizes.copied, jnp.float32)
    copy = timed(functools.partial(jax.jit(lambda x: x + 1), x), sizes.rounds)
    moved = 2 * x.nbytes
    del x
    side = sizes.multiplied
    a = jnp.ones((side, side), jnp.bfloat16)
    product = timed(functools.partial(jax.jit(jnp.matmul), a, a), sizes.rounds)
    rates = Rates(moved / copy.median, 2 * side**3 / product.median)
    print("1. The device\n")
    rows = [
        ("copy", f"{moved / 1e9:.2f} GB", f"{rates.bytes / 1e9:,.0f} GB/s", *copy[1:]),
        (
            "product, bfloat16",
            f"{side}^3",
            f"{rates.flops / 1e12:.3g} TFLOP/s",
            *product[1:],
        ),
    ]
    print(table(("", "size", "rate", "range"), rows), "\n", flush=True)
    return rates


# --- two: rows a second ---


def stream(sizes: Sizes, rates: Rates) -> None:
    dimension = 20
    key, other = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key, (sizes.rows, dimension))
    y = (jax.random.uniform(other, (sizes.rows,)) < jax.nn.sigmoid(x[:, 0])) * 1.0
    moved = x.nbytes + y.nbytes
    rows = []
    for size in sizes.batches:
        batches = x.reshape((-1, size, dimension)), y.reshape((-1, size))
        for steps in (1, 10):
            flow = ff.fisher_flow(
                lambda params, x: x @ params,
                ff.likelihoods.bernoulli(),
                num_steps=steps,
            )
            scan = jax.jit(lambda s, b, f=flow: jax.lax.scan(f.update, s, b)[0].mean)
            state = flow.init(jnp.zeros(dimension))
            call = functools.partial(scan, state, batches)
            found = timed(call, sizes.rounds)
            rows.append(
                (
                    f"{size:,} rows",
                    f"{steps}",
                    seconds(found.median),
                    found.spread,
                    f"{sizes.rows / found.median:.3g}",
                    f"{moved / rates.bytes / found.median:.2%}",
                )
            )
    print(
        f"2. A full flow over {sizes.rows:,} rows at d = {dimension}, one scan; share: "
        "of the copy's bandwidth, the rows read once\n"
    )
    header = ("batches of", "steps", "median", "range", "rows/s", "share")
    print(table(header, rows), "\n", flush=True)


# --- three: a billion parameters ---


def deep(params: dict, x: jax.Array) -> jax.Array:
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer)
    return x @ params["head"]


def fitting(width: int) -> int:
    """The width, or the widest of which state and what is made beside it fit."""
    stats = jax.devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", math.inf)
    while 4 * width**2 * 32 > 0.9 * limit:  # bytes a parameter, in all
        width -= 256
    return width


def verdict(ratio: float) -> str:
    if jax.default_backend() == "cpu":
        return "-"
    return "met" if ratio <= TARGET else "missed"


def diagonal(sizes: Sizes, rates: Rates, trace: str | None) -> None:
    width = fitting(sizes.width)
    if width != sizes.width:
        print(f"   this device holds layers of {width}, not {sizes.width}")
    keys = jax.random.split(jax.random.key(0), 5)
    shape, scale = (width, width), width**-0.5
    params = {
        "layers": [scale * jax.random.normal(key, shape) for key in keys[:4]],
        "head": scale * jax.random.normal(keys[4], (width, 1)),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    batch = jax.random.normal(keys[0], (8, width)), jnp.ones((8, 1))
    likelihood, structure = ff.likelihoods.gaussian(), ff.structures.diagonal()
    programs: dict[str, tuple] = {}
    for estimator in sizes.estimators:
        name = estimator.__name__
        flow = ff.fisher_flow(
            deep, likelihood, structure=structure, estimator=estimator, num_steps=1
        )
        gather = ff.accumulator(estimator(deep, likelihood, structure))
        programs[f"flow, {name}"] = (
            FLOW_BYTES,
            lambda flow=flow: flow.init(params, key=0),
            lambda state, params, batch, flow=flow: flow.update(state, batch),
        )
        programs[f"estimator, {name}"] = (
            ESTIMATOR_BYTES,
            lambda gather=gather: gather.init(params, 0),
            lambda state, params, batch, gather=gather: (
                (after := gather.update(state, params, batch)),
                after.num_batches,
            ),
        )
    rows, worst = [], []
    for name, (each, begin, update) in programs.items():
        state = begin()
        # a flow's parameters are its own mean
        given = batch[0][:0] if name.startswith("flow") else params
        step = jax.jit(update, donate_argnums=0)
        program = step.lower(state, given, batch).compile()
        found = timed(
            carried(lambda s, p=program, g=given: p(s, g, batch), state), sizes.rounds
        )
        del state
        least = count * each / rates.bytes
        ratio = found.median / least
        used = program.cost_analysis()["bytes accessed"] / count
        kept = program.memory_analysis().temp_size_in_bytes / count
        rows.append(
            (
                name,
                seconds(found.median),
                found.spread,
                f"{each}",
                f"{used:.0f}",
                f"{kept:.0f}",
                f"{ratio:.2f}",
                verdict(ratio),
            )
        )
        if verdict(ratio) == "missed":
            worst.append((name, passes(program.as_text(), width**2, count)))
    print(
        f"3. {count:,} parameters, 4 layers, batches of 8 rows, one step. Bytes a "
        "parameter: that must move,\n   that the compiled program accesses (by its own "
        "account), and that it needs beside the state.\n   ratio: to what the first "
        f"take at the copy's bandwidth; at most {TARGET:g}\n"
    )
    header = (
        "",
        "median",
        "range",
        "must move",
        "accessed",
        "beside",
        "ratio",
        "",
    )
    print(table(header, rows), "\n", flush=True)
    for name, lines in worst:
        print(f"   the passes over the parameters of {name}, bytes a parameter:\n")
        print(table(("instruction", "read", "written", "of"), lines), "\n")
    if trace:
        name, (_, begin, update) = next(iter(programs.items()))
        call = carried(
            lambda s: jax.jit(update, donate_argnums=0)(s, batch[0][:0], batch), begin()
        )
        jax.block_until_ready(call())
        with jax.profiler.trace(trace):
            jax.block_until_ready(call())
        print(f"   profile of {name}: {trace}\n")


_LINE = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (\(?[a-z0-9]+\[.*?) ([\w\-]+)\((.*?)\)")
_ALIASES = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "call"}


def passes(text: str, large: int, count: int) -> list[tuple]:
    """The instructions of a compiled program's entry that touch arrays so large."""

    def size_of(shapes: str) -> int:
        sizes = (
            math.prod(map(int, dims.split(",")))
            for dims in re.findall(r"\[([\d,]+)\]", shapes)
        )
        return sum(4 * size for size in sizes if size >= large)

    found = (_LINE.match(line) for line in text.splitlines())
    shapes = {m.group(1): m.group(2) for m in found if m}
    lines = []
    for line in text[text.rindex("\nENTRY") :].splitlines():
        m = _LINE.match(line)
        if not m or m.group(3) in _ALIASES:
            continue
        operands = re.findall(r"%[\w.\-]+", m.group(4))
        read = sum(size_of(shapes.get(name, "")) for name in operands)
        written = size_of(m.group(2))
        if read or written:
            of = re.search(r'op_name="([^"]*)"', line)
            lines.append(
                (
                    m.group(1),
                    f"{read / count:.1f}",
                    f"{written / count:.1f}",
                    of.group(1)[-40:] if of else "",
                )
            )
    return lines


# --- four: optimisers ---


def transformer(sizes: Sizes) -> tuple[Callable, Any, tuple]:
    width, (rows, length) = sizes.d_model, sizes.tokens
    heads = max(width // 64, 1)
    keys = iter(jax.random.split(jax.random.key(0), 4 * sizes.layers + 4))

    params = {
        "table": 0.02 * jax.random.normal(next(keys), (sizes.vocabulary, width)),
        "position": 0.02 * jax.random.normal(next(keys), (length, width)),
        "layers": [classifiers.block(keys, width) for _ in range(sizes.layers)],
        "norm": classifiers.norm(width),
        "head": classifiers.dense(next(keys), (width, sizes.vocabulary)),
    }
    ids = jax.random.randint(next(keys), (rows, length + 1), 0, sizes.vocabulary)
    causal = jnp.tril(jnp.ones((length, length), bool))

    def apply_fn(params: Any, ids: jax.Array) -> jax.Array:
        x = params["table"][ids] + params["position"][None]
        for layer in params["layers"]:
            x = classifiers.through_block(layer, x, heads, causal)
        x = classifiers.normalised(params["norm"], x)
        return classifiers.affine(params["head"], x)

    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return apply_fn, params, (ids[:, :-1], ids[:, 1:])


PERIOD, WIDEST = 10, 4096


def own_products(params: Any, tokens: int, name: str) -> float:
    """Multiplications and additions of a step beside the gradient's, on average.

    K-FAC: factors of all tokens and inverses every tenth step, inverses applied in
    each. SOAP: factors from the gradient, and into its basis and back, in each; a
    product and an orthogonalisation of each side every tenth.
    """
    total = 0.0
    for layer in params["layers"]:
        for part in ("in", "out", "up", "down"):
            sides = [s for s in layer[part]["w"].shape if s <= WIDEST]
            cells = math.prod(layer[part]["w"].shape)
            cubes = sum(side**3 for side in sides)
            applied = sum(2 * side * cells for side in sides)
            if name == "K-FAC":
                factors = sum(2 * tokens * side**2 for side in sides)
                total += (factors + 2 * cubes) / PERIOD + applied
            elif name == "SOAP":
                total += 3 * applied + (2 + 4) * cubes / PERIOD
    return total


def optimizers(sizes: Sizes, rates: Rates) -> None:
    apply_fn, params, batch = transformer(sizes)
    likelihood, tokens = ff.likelihoods.categorical(), math.prod(sizes.tokens)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    loss = jax.value_and_grad(ff.negative_log_likelihood(apply_fn, likelihood))
    made = {
        "AdamW": optax.adamw(1e-4),
        "K-FAC": ff.kfac(
            1e-3,
            apply_fn,
            likelihood,
            inputs=jax.ShapeDtypeStruct(batch[0].shape, batch[0].dtype),
            key=0,
            period=PERIOD,
            inverse_period=PERIOD,
            widest=WIDEST,
            store="bfloat16",
        ),
        "SOAP": ff.soap(1e-4, inverse_period=PERIOD, widest=WIDEST),
    }
    products = 6 * (count - params["table"].size - params["position"].size) * tokens
    rows = []
    for name, optimizer in made.items():
        optimizer = optax.with_extra_args_support(optimizer)

        def step(
            carry: tuple, optimizer: Any = optimizer, batch: tuple = batch
        ) -> tuple:
            params, state = carry
            value, gradients = loss(params, batch)
            updates, state = optimizer.update(gradients, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), value

        # gives up what it is given: the first parameters are kept for the others
        carry = jax.tree.map(jnp.copy, params), optimizer.init(params)
        run = jax.jit(step, donate_argnums=0)

        def ten(carry: tuple, run: Callable = run) -> tuple:
            for _ in range(PERIOD):
                carry, value = run(carry)
            return carry, value

        found = timed(carried(ten, carry), max(sizes.rounds // 2, 2))
        del carry
        each = found.median / PERIOD
        wanted = products + own_products(params, tokens, name)
        rows.append(
            (
                name,
                seconds(each),
                found.spread,
                f"{wanted / 1e12:.3g}",
                f"{each / (wanted / rates.flops):.2f}",
                f"{ff.transforms.bytes_per_device(optimizer, params) / count:.1f}",
            )
        )
    print(
        f"4. A transformer of {sizes.layers} layers, d_model {sizes.d_model}, "
        f"{count:,} parameters in bfloat16, {tokens:,} tokens.\n   Ten steps at once, "
        "one of which renews factors and inverses. TFLOP: of the matrix products a "
        "step;\n   ratio: to the time that these take at the measured rate\n"
    )
    header = ("", "a step", "ten", "TFLOP", "ratio", "state, bytes a parameter")
    print(table(header, rows), "\n", flush=True)


# --- five: predictions ---


def predictions(sizes: Sizes) -> None:
    count, width = sizes.predicted
    params = classifiers.dense_layers(jax.random.key(0), (784, width, width, 10))
    apply_fn = functools.partial(classifiers.apply_dense, jax.nn.relu)
    likelihood = ff.likelihoods.categorical()
    inputs = jax.random.normal(jax.random.key(1), (count, 784))
    forward = jax.jit(apply_fn)
    rows = []
    plain = timed(lambda: forward(params, inputs), sizes.rounds)
    rows.append(("apply_fn alone", seconds(plain.median), plain.spread, "1.0"))
    layers = ff.layers.find_layers(apply_fn, params, inputs[:2])
    for structure in (ff.structures.diagonal(), ff.structures.kronecker(layers)):
        state = ff.posterior(params, structure, prior_precision=1.0)
        predict = jax.jit(
            lambda state, x: ff.predict(state, apply_fn, likelihood, x).mean
        )
        found = timed(lambda s=state, p=predict: p(s, inputs), sizes.rounds)
        ratio = f"{found.median / plain.median:.1f}"
        rows.append(
            (
                structure.name.partition("(")[0],
                seconds(found.median),
                found.spread,
                ratio,
            )
        )
    print(f"5. Class probabilities of {count:,} rows, 784-{width}-{width}-10\n")
    print(table(("", "median", "range", "x apply_fn"), rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="some seconds, any device")
    parser.add_argument("--only", nargs="+", help="stream diagonal optimizers predict")
    parser.add_argument("--trace", help="a folder for a profile of the diagonal flow")
    arguments = parser.parse_args()
    on_host = jax.default_backend() == "cpu"
    sizes = SMALL if arguments.small or on_host else FULL
    only = arguments.only or ["stream", "diagonal", "optimizers", "predict"]
    print(describe_machine(("jax", "jaxlib", "optax")))
    if on_host:
        print("NO ACCELERATOR HERE: small sizes, which show that it runs and no more")
    print(flush=True)
    rates = measured(sizes)
    if "stream" in only:
        stream(sizes, rates)
    if "diagonal" in only:
        diagonal(sizes, rates, arguments.trace)
    if "optimizers" in only:
        optimizers(sizes, rates)
    if "predict" in only:
        predictions(sizes)


if __name__ == "__main__":
    main()
