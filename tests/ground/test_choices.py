import copy
import dataclasses
import functools
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax._ground import choices


@choices.choice
def made(first=1.0, *, second=None):
    return {"first": first, "second": second}


@dataclasses.dataclass(frozen=True)
class Recipe:
    function: object
    number: object = 1.0


def total(recipe, x):
    return recipe.function(x) + recipe.number


def test_equal_calls_give_one_object():
    assert made() is made(1.0) is made(first=1.0, second=None)
    assert made() is not made(2.0)
    assert made(1) is made(1.0) is not made(True)
    partial = functools.partial
    assert made(partial(max, 1)) is made(partial(max, 1))
    assert made(partial(max, 1)) is not made(partial(max, 2))


def test_every_call_is_checked():
    @choices.choice
    def counted(size):
        if not isinstance(size, int):
            raise ValueError(f"size must be a whole number; got {size}.")
        return object()

    assert counted(2) is counted(2)
    with pytest.raises(ValueError, match=r"whole number; got 2\.0"):
        counted(2.0)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_arrays_compare_by_shape_dtype_and_bytes(array):
    def call(values):
        return made({"a": array(values)}, second=[array(values)])

    one = call([1.0, 2.0])
    assert one is call([1.0, 2.0])
    assert one is not call([1.0, 3.0])
    assert one is not call([[1.0, 2.0]])
    assert one is not call(np.array([1.0, 2.0], np.float32))
    assert call(np.zeros((0, 2))) is not call(np.zeros((0, 3)))


def test_a_choice_stays_what_it_was_made_as():
    values = np.ones(2)
    one = made(values)
    values[0] = 5.0
    assert made(values) is not one
    assert made(np.ones(2)) is one
    np.testing.assert_array_equal(one["first"], 1.0)


def test_tracers_and_what_has_no_hash_make_a_fresh_object():
    seen = []

    @jax.jit
    def traced(x):
        seen.extend([made(x), made(x), made([x])])
        return made(x)["first"]

    assert traced(3.0) == 3.0
    assert len({id(one) for one in seen}) == 3
    assert made(bytearray()) is not made(bytearray())


def test_a_choice_first_made_within_a_trace_keeps_nothing_of_it():
    @choices.choice
    def with_array(value):
        return jnp.ones(2) * value

    jax.jit(lambda x: x * with_array(2.0))(1.0)
    assert not isinstance(with_array(2.0), jax.core.Tracer)


@pytest.mark.slow
def test_choices_let_go_in_the_end():
    class Value:
        pass

    first = Value()
    watched = weakref.ref(first)
    made(first)
    del first
    for _ in range(256):
        made(Value())
    gc.collect()
    assert watched() is None


def test_equal_recipes_are_compiled_once():
    traces = []

    def function(x):
        traces.append(jnp.shape(x))
        return 2 * x

    number = np.array([1.0, 2.0])
    recipes = [
        choices.shared(Recipe(function, choices.Compared(value)))
        for value in (number, number.copy(), number + 1)
    ]
    assert recipes[0] is recipes[1] is not recipes[2]

    def run(recipe, x):
        return recipe.function(x) + recipe.number.value

    for recipe in recipes:
        choices.compiled(recipe, run)(1.0)
        choices.compiled(recipe, run)(2.0)
    assert len(traces) == 2


def test_a_function_without_a_hash_compares_by_identity():
    class Model:
        __hash__ = None

        def __call__(self, x):
            return 3 * x

    one, other = Model(), Model()
    recipes = [
        choices.shared(Recipe(choices.hashable(model))) for model in (one, one, other)
    ]
    assert recipes[0] is recipes[1] is not recipes[2]
    assert choices.compiled(recipes[0], total)(2.0) == 7.0


@pytest.mark.slow
@pytest.mark.parametrize("closed_over", [False, True])
def test_a_traced_number_is_left_to_its_trace(closed_over):
    def build(number):
        if closed_over:
            return choices.shared(Recipe(lambda x: x * 2 + number, 0.0))
        return choices.shared(Recipe(lambda x: 2 * x, number))

    def function(number):
        first, second = build(number), build(number)
        assert first is not second
        return choices.compiled(first, total)(3.0)

    with jax.checking_leaks():
        assert jax.jit(function)(1.0) == 7.0
        assert jax.grad(function)(1.0) == 1.0
    assert "total" not in jax.jit(function).lower(1.0).as_text()  # no function apart


@pytest.mark.slow
def test_closures_of_evicted_recipes_are_let_go():
    class Weights:
        def __init__(self):
            self.values = np.ones(1 << 17)  # 1 MB

    watched = []
    for _ in range(100):
        weights = Weights()
        watched.append(weakref.ref(weights))
        recipe = choices.shared(Recipe(lambda x, w=weights: x * w.values.sum()))
        choices.compiled(recipe, total)(1.0)
    del weights, recipe
    gc.collect()
    assert sum(one() is not None for one in watched) <= 32


def test_a_recipe_in_use_keeps_what_is_compiled():
    traces = []

    def function(x):
        traces.append(jnp.shape(x))
        return x

    kept = choices.shared(Recipe(function))
    choices.compiled(kept, total)(1.0)
    for number in range(40):
        choices.shared(Recipe(function, number + 2))
    choices.compiled(kept, total)(1.0)
    assert len(traces) == 1


def test_a_choice_is_copied_as_itself_and_pickled_as_its_call():
    for choice in [
        ff.structures.full(),
        ff.structures.low_rank(2),
        ff.memories.exponential(0.9, floor=False),
        ff.memories.random_walk(np.eye(2)),
        ff.likelihoods.gaussian(scale=None),
        ff.likelihoods.gaussian(covariance=np.eye(2)),
        ff.expectations.outputs(order=5),
    ]:
        assert copy.deepcopy(choice) is choice
        assert pickle.loads(pickle.dumps(choice)) is choice
    changed = ff.likelihoods.poisson()._replace(name="other")
    assert copy.deepcopy(changed).name == "other"


def test_a_choice_in_use_is_its_own_copy_however_many_others_were_made():
    for number in range(300):
        kept = ff.structures.full()
        ff.memories.exponential(1 - 1 / (number + 2.5))
    assert copy.deepcopy(kept) is kept
