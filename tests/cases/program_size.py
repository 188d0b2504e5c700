"""The largest array that a program makes, its equations, its calls of LAPACK."""

import math
import re

import jax


def largest(jaxpr):
    """The most entries of any array, inner programs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in equation.outvars]
        for value in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)


def equations(jaxpr):
    """How many there are, each inner program counted where it is called.

    `1 - x^2`, of tanh's derivative, are two, which from JAX 0.12 on have one name.
    """
    names = [equation.primitive.name for equation in jaxpr.eqns]
    count = len(names) + names.count("one_minus_square")
    for equation in jaxpr.eqns:
        values = equation.params.values()
        for value in jax.tree.leaves(tuple(values)):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += equations(inner)
    return count


def stacks_in_lapack(program):
    """Calls of LAPACK in a compiled program with an array of more than two axes."""
    calls = [x for x in program.as_text().splitlines() if 'target="lapack_' in x]
    assert calls or jax.default_backend() != "cpu"
    outputs = [call.partition(" custom-call(")[0] for call in calls]
    return [call for call in outputs if re.search(r"\[\d+(,\d+){2,}\]", call)]
