"""Claims about random estimates and bounds of the Fisher diagonal, measured on digits.

Each row: what is claimed, what was measured, and whether it holds. Needs the extra
`benchmarks`, and no pretrained weights:

    python benchmarks/claims.py            # about two minutes
    python benchmarks/claims.py --quick    # fewer draws
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import classifiers
import jax
import jax.numpy as jnp
import numpy as np
from classifiers import CATEGORICAL, Classifier
from measuring import describe_machine, table

import fisherflow_jax as ff

Row = tuple[str, str, bool | None]
kinds, roots = ff.estimators, ff.likelihoods


def build(
    model: Classifier, factory: Callable, **options: Any
) -> ff.estimators.Estimator:
    structure = ff.structures.diagonal()
    return factory(model.apply_fn, CATEGORICAL, structure, **options)


def entries(
    model: Classifier, factory: Callable, key: Any = None, **options: Any
) -> np.ndarray:
    """One estimate on the model's batch, as one vector."""
    estimator = build(model, factory, **options)
    information = jax.jit(estimator)(model.params, model.batch, key)
    return flat(information.entries)


def fisher(model: Classifier) -> np.ndarray:
    """The exact diagonal, from another root than those that the bounds share."""
    return entries(model, kinds.exact, root=lambda likelihood: likelihood)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def first_rows(model: Classifier, count: int) -> Classifier:
    return model._replace(batch=jax.tree.map(lambda x: x[:count], model.batch))


class Moments(NamedTuple):
    """Of the entries with any information, over the draws, relative to the mean."""

    z: np.ndarray  # (mean - expected) in standard errors
    cv: np.ndarray  # standard deviation over the expected value


def moments(
    model: Classifier,
    expected: np.ndarray,
    num_draws: int,
    factory: Callable,
    **options: Any,
) -> Moments:
    estimator = build(model, factory, **options)

    @jax.jit
    def sums(params: Any, batch: tuple, keys: jax.Array) -> Any:
        def body(total: Any, key: jax.Array) -> tuple[Any, None]:
            draw = estimator(params, batch, key).entries
            add = jax.tree.map(
                lambda t, x: (t[0] + x, t[1] + jnp.square(x)),
                total,
                draw,
                is_leaf=lambda t: isinstance(t, tuple),
            )
            return add, None

        zero = jax.tree.map(lambda p: (jnp.zeros_like(p), jnp.zeros_like(p)), params)
        return jax.lax.scan(body, zero, keys)[0]

    keys = jax.random.split(jax.random.key(7), num_draws)
    total = sums(model.params, model.batch, keys)
    first, second = (
        flat(
            jax.tree.map(lambda t, i=i: t[i], total, is_leaf=lambda t: type(t) is tuple)
        )
        for i in (0, 1)
    )
    seen = expected > 0  # a pixel that is always dark has no information to estimate
    mean, square = first[seen] / num_draws, second[seen] / num_draws
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    return Moments(
        (mean - expected[seen]) / (deviation / math.sqrt(num_draws)),
        deviation / expected[seen],
    )


# --- the claims ---


def relative_error(num_draws: int) -> float:
    """Of a standard deviation measured on squares of normal variables, the worst."""
    return math.sqrt(14 / (4 * num_draws))


def draws(soft: Classifier, sure: Classifier, num_draws: int) -> Iterator[Row]:
    """Unbiased, and never noisier than the square root of two."""
    bound = math.sqrt(2)
    limit = bound * (1 + 5 * relative_error(num_draws))
    for label, model in (("soft", soft), ("trained", sure)):
        exact = fisher(model)
        by_probe = {}
        for name, options in (
            ("Rademacher", {}),
            ("Gaussian", {"probe": kinds.gaussian}),
            ("8 groups", {"groups": 8}),
            ("per example", {"groups": None}),
        ):
            found = moments(model, exact, num_draws, kinds.hutchinson, **options)
            by_probe[name] = found.cv
            worst = np.max(np.abs(found.z))
            yield (
                f"hutchinson is unbiased, {name}, {label} net",
                f"z: rms {np.sqrt(np.mean(found.z**2)):.2f}, largest {worst:.1f} "
                f"of {found.z.size}",
                bool(worst < 5.5),
            )
        for name, cv in by_probe.items():
            yield (
                f"relative sd at most sqrt(2), {name}, {label} net",
                f"median {np.median(cv):.3f}, largest {np.max(cv):.3f}",
                bool(np.max(cv) <= limit),
            )
        signs, normal = by_probe["Rademacher"], by_probe["Gaussian"]
        yield (
            f"random signs are less noisy than Gaussian probes, {label} net",
            f"median {np.median(signs):.3f} < {np.median(normal):.3f}",
            bool(np.median(signs) < np.median(normal)),
        )
        for name, factory, root in (
            ("hutchinson_dg", kinds.hutchinson_dg, roots.diagonal_root),
            ("hutchinson_rankk", kinds.hutchinson_rankk, rank(2)),
        ):
            target = entries(model, kinds.exact, root=root)
            found = moments(model, target, num_draws, factory)
            worst = np.max(np.abs(found.z))
            yield (
                f"{name} is unbiased for its bound, {label} net",
                f"z: rms {np.sqrt(np.mean(found.z**2)):.2f}, largest {worst:.1f}",
                bool(worst < 5.5),
            )


def rank(k: int) -> Callable:
    return functools.partial(roots.rank_root, k=k)


def rare_labels(num_draws: int) -> Iterator[Row]:
    """Sampled labels against probes on one example of two classes."""

    def constant(logits: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.broadcast_to(logits, (inputs.shape[0], 2))

    batch = jnp.zeros((1, 1)), None
    structure = ff.structures.diagonal()

    @functools.partial(jax.jit, static_argnums=0)
    def spread(factory: Callable, logits: jax.Array) -> jax.Array:
        estimator = factory(constant, CATEGORICAL, structure)
        keys = jax.random.split(jax.random.key(5), num_draws)
        values = jax.vmap(lambda k: estimator(logits, batch, k).entries[0])(keys)
        return jnp.std(values) / jnp.mean(values)

    sampled, probed = [], []
    for chance in (1e-1, 1e-2, 1e-4):
        logits = jnp.log(jnp.array([1 - chance, chance]))
        sampled.append(float(spread(kinds.monte_carlo, logits)))
        probed.append(float(spread(kinds.hutchinson, logits)))
        theory = (1 - 2 * chance) / math.sqrt(chance * (1 - chance))
        bound = 2 * math.sqrt(chance * (1 - chance))
        yield (
            f"a label of probability {chance:g}: relative sd",
            f"sampled labels {sampled[-1]:.3g} (theory {theory:.3g}), hutchinson "
            f"{probed[-1]:.3g} (theory {bound:.3g})",
            abs(sampled[-1] / theory - 1) < 0.5 and abs(probed[-1] / bound - 1) < 0.1,
        )
    yield (
        "sampled labels have no bound as the net grows sure; probes do",
        f"{sampled[-1] / sampled[0]:.0f} times noisier; probes "
        f"{probed[-1] / probed[0]:.2f} times",
        sampled[-1] > 10 * sampled[0] and max(probed) <= math.sqrt(2),
    )


def ordering(soft: Classifier, sure: Classifier) -> Iterator[Row]:
    """The bounds without noise, through the exact estimator with other roots."""
    for label, model in (("soft", soft), ("trained", sure)):
        exact = fisher(model)
        upper = entries(model, kinds.exact, root=roots.diagonal_root)
        ladder = {k: entries(model, kinds.exact, root=rank(k)) for k in (1, 2, 4, 8, 9)}
        slack = 1e-12 * exact
        yield (
            f"DG >= F for every entry, {label} net",
            f"sum of DG {upper.sum() / exact.sum():.3g} times that of F",
            bool(np.all(upper >= exact - slack)),
        )
        steps = [*ladder.values(), exact]
        shares = ", ".join(f"{v.sum() / exact.sum():.3f}" for v in ladder.values())
        yield (
            f"F >= rank 8 >= 4 >= 2 >= 1 for every entry, {label} net",
            f"shares of the sum for k = 1, 2, 4, 8, 9: {shares}",
            all(np.all(low <= high + slack) for low, high in itertools.pairwise(steps)),
        )
        gap = np.max(np.abs(ladder[9] - exact)) / np.max(exact)
        yield f"rank C - 1 is F, {label} net", f"difference {gap:.0e}", gap < 1e-12
        iterated = functools.partial(roots.rank_root, k=2, num_iterations=30)
        power = entries(model, kinds.exact, root=iterated)
        yield (
            f"30 subspace iterations are still a lower bound, {label} net",
            f"share for k = 2: {power.sum() / exact.sum():.3f}",
            bool(np.all(power <= exact + slack)),
        )


def two_classes(model: Classifier) -> Iterator[Row]:
    """One column, squared example by example: a sign cannot matter."""
    exact = fisher(model)
    options = {"root": roots.cholesky_root, "groups": None}
    estimator = jax.jit(build(model, kinds.hutchinson, **options))
    gaps = [
        np.max(np.abs(flat(estimator(model.params, model.batch, key).entries) - exact))
        for key in jax.random.split(jax.random.key(3), 10)
    ]
    gap = max(gaps) / np.max(exact)
    yield (
        "two classes, Cholesky root, per example: one pass is exact",
        f"largest difference in 10 draws {gap:.0e}",
        bool(gap < 1e-12),
    )


def data_labels(start: Classifier, sure: Classifier) -> Iterator[Row]:
    """The empirical Fisher before and after training, on all digits."""
    for label, model in (("before", start), ("after", sure)):
        exact = fisher(model)

        def off(estimate: np.ndarray, exact: np.ndarray = exact) -> str:
            error = np.sum(np.abs(estimate - exact)) / exact.sum()
            return f"sum {estimate.sum() / exact.sum():.3f}, error {error:.2f}"

        key = jax.random.key(4)
        empirical = entries(model, kinds.empirical)
        sampled = entries(model, kinds.monte_carlo, key)
        probed = entries(model, kinds.hutchinson, key, groups=None)
        close = abs(empirical.sum() / exact.sum() - 1) < 0.2
        yield (
            "data labels are biased on a net that fits them"
            if label == "after"
            else "data labels are near the Fisher before training",
            off(empirical),
            not close if label == "after" else close,
        )
        yield f"  sampled labels, per example, {label}", off(sampled), None
        error = np.sum(np.abs(probed - exact)) / exact.sum()
        yield f"  hutchinson, per example, {label}", off(probed), bool(error < 0.3)


def layers(start: Classifier, sure: Classifier) -> Iterator[Row]:
    """How the information is spread over the layers."""
    for label, model in (("before", start), ("after", sure)):
        rows = model.batch[0].shape[0]
        information = build(model, kinds.exact)(model.params, model.batch)
        kernels = [np.asarray(layer["w"]) / rows for layer in information.entries]
        means = [float(np.mean(kernel)) for kernel in kernels]
        shares = [float(np.mean(kernel < 1e-5)) for kernel in kernels]
        small = float(np.mean(flat(information.entries) / rows < 1e-5))
        yield (
            f"over 20 % of the entries of every layer are under 1e-5, {label} training",
            f"by layer {', '.join(f'{share:.2f}' for share in shares)}; of all "
            f"{small:.2f}",
            min(shares) > 0.2,
        )
        yield (
            f"the last layer has the largest mean entry, {label} training",
            "by layer " + ", ".join(f"{mean:.1e}" for mean in means),
            means[-1] == max(means),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer draws")
    quick = parser.parse_args().quick
    jax.config.update("jax_enable_x64", True)
    began = time.perf_counter()
    print(describe_machine(("jax", "jaxlib", "scikit-learn")), "\n")
    start = classifiers.digits(10)
    sure = classifiers.trained(start, 100, 1e-2)
    accuracy, likeliest = classifiers.confidence(sure)
    print(
        f"{start.name}, tanh, float64, {start.num_params:,} parameters; trained: "
        f"accuracy {accuracy:.1%}, mean probability of the likeliest class "
        f"{likeliest:.3f}\n"
    )
    small, small_sure = first_rows(start, 16), first_rows(sure, 16)
    num_draws = 1_000 if quick else 5_000
    two = classifiers.trained(classifiers.digits(2), 20, 1e-2)
    rows: list[Row] = [
        *draws(small, small_sure, num_draws),
        *rare_labels(200_000 if quick else 1_000_000),
        *ordering(start, sure),
        *two_classes(two),
        *data_labels(start, sure),
        *layers(start, sure),
    ]
    words = {True: "holds", False: "fails here", None: ""}
    print(table(("claim", "measured", ""), [(*row[:2], words[row[2]]) for row in rows]))
    failed = sum(row[2] is False for row in rows)
    print(
        f"\n{num_draws} draws on 16 digits for means and deviations, all digits for "
        "the rest. A measured deviation is\nuncertain by "
        f"{relative_error(num_draws):.1%}; the largest of all may exceed its bound by "
        "five times that.\n"
        f"{failed} claims fail here.\n"
        f"{time.perf_counter() - began:.0f} seconds in all."
    )


if __name__ == "__main__":
    main()
