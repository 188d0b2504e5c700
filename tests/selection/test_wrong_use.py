"""What is refused, by name and with the way out; and what a large pool takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import selection_cases as cases
from fisherflow_jax import selection
from fisherflow_jax._ground import capacity

FULL = ff.structures.full()
MODEL = cases.apply_fn, cases.LIKELIHOODS["categorical"]


def greedy(count=2, pool=cases.POOL, state=None, model=MODEL, **options):
    state = cases.state("full", "categorical") if state is None else state
    return selection.greedy(state, *model, pool, count, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"count": 31}, r"count = 31, but 30 rows .* replace=True"),
        ({"count": 0}, "count must be a positive whole number of rows"),
        ({"count": 3, "excluded": np.arange(30) > 1}, "28 of 30 being excluded"),
        ({"excluded": np.ones(30, bool), "replace": True}, "all 30 rows"),
        ({"excluded": np.ones(30)}, "one boolean a row"),
        ({"excluded": np.ones(3, bool)}, "one boolean a row"),
        ({"costs": np.ones(3)}, "one number a row"),
        ({"costs": np.zeros(30)}, "costs must be positive"),
        ({"rank": 3}, "k is at most"),
        ({"rank": 0}, "positive whole number"),
        (
            {"pool": cases.POOL.at[4, 0].set(jnp.nan)},
            r"1 rows of the pool are not finite, the first ones \[4\]",
        ),
        (
            {"acquisition": selection.variance_reduction({"w": jnp.ones(2)})},
            "a target is an information, or like the mean",
        ),
        (
            {
                "acquisition": selection.variance_reduction(
                    ff.structures.Diagonal({"w": jnp.ones(2)})
                )
            },
            "another tree",
        ),
        (
            {"state": ff.posterior({"w": jnp.ones(2)}, FULL, prior_precision=1.0)},
            "with params of shapes",
        ),
        (
            {
                "model": (
                    cases.apply_fn,
                    ff.likelihoods.from_log_prob(
                        lambda z, y: -jnp.sum((z - y) ** 2, -1), lambda key, z: z
                    ),
                )
            },
            "drawn at random",
        ),
    ],
)
def test_a_choice_that_cannot_be_made(options, told):
    with pytest.raises((ValueError, TypeError, KeyError), match=told):
        greedy(**options)


def test_what_is_no_acquisition():
    with pytest.raises(TypeError, match=r"selection.values"):
        greedy(acquisition=selection.entropy())
    with pytest.raises(TypeError, match="an acquisition is made by a call"):
        selection.values(
            cases.state("full", "categorical"), *MODEL, cases.POOL, selection.entropy
        )
    with pytest.raises(ValueError, match="is of classes"):
        selection.values(
            cases.state("full", "gaussian"),
            cases.apply_fn,
            cases.LIKELIHOODS["gaussian"],
            cases.POOL,
            selection.disagreement(0),
        )


def test_rows_that_are_not_finite_are_never_chosen_under_jit():
    pool = cases.POOL.at[4, 0].set(jnp.nan)
    found = jax.jit(lambda pool: greedy(29, pool))(pool)
    assert sorted(found.indices.tolist()) == [i for i in range(30) if i != 4]
    assert jnp.all(jnp.isfinite(found.gains))


def wide():
    """20,000 rows, 100 classes, 768 features: a last layer, and its state."""
    shapes = {"w": (768, 100), "b": (100,)}
    at = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    pool = jax.ShapeDtypeStruct((20_000, 768), jnp.float32)
    model = lambda p, x: x @ p["w"] + p["b"], ff.likelihoods.categorical()
    layers = ff.layers.find_layers(model[0], at, pool)
    structure = ff.structures.kronecker(layers)

    def choose(rank, params, pool):
        state = ff.Posterior(params, structure.isotropic(params, 1.0), jnp.ones(()))
        return selection.greedy(state, *model, pool, 10, rank=rank)

    return choose, at, pool


@pytest.mark.slow
def test_a_large_pool_in_few_bytes():
    choose, *given = wide()
    compiled = jax.jit(lambda *x: choose(8, *x)).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 250e6


def test_a_pool_that_does_not_fit_says_its_bytes(monkeypatch):
    choose, *given = wide()
    monkeypatch.setattr(capacity, "num_bytes", lambda: 2**34)
    wanted = 20_000 * 99 * 99 * 11 * 4
    with pytest.raises(ValueError, match=rf"{wanted:,} bytes.*take rank="):
        jax.eval_shape(lambda *x: choose(None, *x), *given)
