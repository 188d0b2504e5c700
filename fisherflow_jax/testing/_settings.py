"""How checks run: in a float type, under strict promotion, compiled in haste."""

import contextlib
from collections.abc import Iterator

import jax

# A program runs once or a few times: compiling it is what takes time.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@contextlib.contextmanager
def setting(float_type: str) -> Iterator[None]:
    """Locally enables float64 or not; nothing is promoted silently."""
    with (
        jax.enable_x64(float_type == "float64"),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield
