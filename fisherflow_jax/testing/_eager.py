"""Laws that look at calls outside of any program: what a user's terminal does."""

from typing import Any

import jax

from fisherflow_jax import information as ops
from fisherflow_jax.testing._laws import QUICKLY
from fisherflow_jax.testing._material import Material, PyTree


def compiled(m: Material) -> Any:
    """jit: eager calls give the numbers of compiled ones"""

    def run(information: Any, vector: PyTree, key: jax.Array) -> list[jax.Array]:
        return [
            m.flat(ops.solve(information, vector)),
            m.flat(ops.matvec(information, vector)),
            ops.logdet(information, m.params),
            m.flat(ops.sample(information, key, m.params)),
        ]

    arguments = m.whole, m.vector, m.key
    jitted = jax.jit(run, compiler_options=QUICKLY)(*arguments)
    return list(zip(jitted, run(*arguments), strict=True))
