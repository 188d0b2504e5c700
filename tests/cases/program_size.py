"""The largest array that a program makes, and how many equations it has."""

import math

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
    """How many there are, each inner program counted where it is called."""
    count = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        values = equation.params.values()
        for value in jax.tree.leaves(tuple(values)):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += equations(inner)
    return count
