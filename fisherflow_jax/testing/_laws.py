"""Laws, checked one by one: what held, what did not apply, and what was broken."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax.testing._material import Material, flat

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


class Report(NamedTuple):
    """What a check found; printing it lists the laws."""

    subject: str
    checked: tuple[str, ...]
    not_applicable: dict[str, str]  # law -> why it does not apply

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.checked)} laws hold"]
        lines += [f"  {law}" for law in self.checked]
        if self.not_applicable:
            lines.append("not applicable:")
            lines += [f"  {law}: {why}" for law, why in self.not_applicable.items()]
        return "\n".join(lines)


class Laws:
    """Runs the checks of many laws, and reports all that are broken at once."""

    def __init__(
        self, subject: str, rules: Mapping[str, str], skip: Mapping[str, str] | None
    ):
        self.subject, self.rules = subject, rules
        self.skip = dict(skip or {})
        unknown = sorted(set(self.skip) - set(rules))
        if unknown:
            raise ValueError(
                f"skip names {unknown}, which are no laws; they are {list(rules)}."
            )
        self._checked: list[str] = []
        self._broken: dict[str, str] = {}
        self._not_applicable = dict(self.skip)

    def check(self, law: str, test: Callable[[], None]) -> None:
        """Runs a test of a law, unless the law is skipped or already broken."""
        if law in self._not_applicable or law in self._broken:
            return
        try:
            test()
        except AssertionError as error:
            self._broken[law] = str(error)
        except Exception as error:
            self._broken[law] = f"raised {type(error).__name__}: {error}"
        else:
            if law not in self._checked:
                self._checked.append(law)

    def pass_over(self, law: str, why: str) -> None:
        """Notes that a law does not apply."""
        self._not_applicable.setdefault(law, why)

    def report(self) -> Report:
        """The report.

        Raises:
          AssertionError: if a law is broken, with its rule and the numbers.
        """
        if self._broken:
            lines = [
                f"- {law}: {self.rules[law]}\n  {what}"
                for law, what in self._broken.items()
            ]
            raise AssertionError(
                f"{self.subject} breaks {len(self._broken)} of "
                f"{len(self._broken) + len(self._checked)} laws:\n" + "\n".join(lines)
            )
        held = tuple(law for law in self._checked if law not in self._broken)
        return Report(self.subject, held, self._not_applicable)


def equal(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """Asserts that two arrays agree, relative to the largest expected entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (
        f"{what} has shape {found.shape}, expected {expected.shape}"
    )
    if not found.size:
        return
    unit = max(float(np.max(np.abs(expected))), np.finfo(np.float64).tiny)
    errors = np.abs(found - expected) / unit
    worst = np.unravel_index(
        int(np.argmax(np.where(np.isnan(errors), np.inf, errors))), errors.shape
    )
    place = f" at {tuple(int(i) for i in worst)}" if found.ndim else ""
    assert errors[worst] <= tolerance, (
        f"{what} is {found[worst]:.6g}{place}, expected {expected[worst]:.6g}: an "
        f"error of {errors[worst]:.2g} of the largest entry, allowed {tolerance:.2g}"
    )


def within_noise(scores: Any, bound: float, what: str) -> None:
    """Asserts that no z-score is beyond `bound` standard errors."""
    worst = float(np.max(np.abs(np.where(np.isnan(scores), np.inf, scores))))
    assert worst <= bound, (
        f"{what} is off by {worst:.1f} standard errors, allowed {bound:.1f}"
    )


# ---- laws of structures, measured by JAX and judged in numpy


class Dense(NamedTuple):
    """The matrices of the material, by `to_dense`, in float64."""

    parts: list[np.ndarray]  # (d, d) each
    whole: np.ndarray  # (d, d)
    vector: np.ndarray  # (d,)


class Law(NamedTuple):
    """A law: measured by JAX, judged in numpy."""

    name: str
    rule: str
    measure: Callable[[Material], Any]
    judge: Callable[[Any, Dense, float], None]
    applies: Callable[[Material], str | None] = lambda material: None
    """Why it does not apply to this material's structure; None: it does."""


def law(
    form: Callable[[Any, Material, str], Any],
    name: str,
    rule: str,
    operation: Callable[[Material], Any],
    expected: Callable[[Dense], Any] | None = None,
    applies: Callable[[Material], str | None] = lambda material: None,
) -> Law:
    """A law whose operation has, in some form, the value that is expected.

    A list of results has it in each; without an expected value all are equal.
    """

    def measure(material: Material) -> list:
        results = operation(material)
        results = results if isinstance(results, list) else [results]
        return [form(result, material, name) for result in results]

    def judge(found: list, dense: Dense, tolerance: float) -> None:
        value = found[0] if expected is None else expected(dense)
        for result in found:
            equal(result, value, tolerance, name)

    return Law(name, rule, measure, judge, applies)


def vector(result: Any, material: Material, name: str) -> jax.Array:
    return flat(result, material.params, f"what {name} returns")


def number(result: Any, material: Material, name: str) -> jax.Array:
    assert jnp.shape(result) == (), f"{name} is a number; got {jnp.shape(result)}"
    return result


def matrix(result: Any, material: Material, name: str) -> jax.Array:
    return ops.to_dense(result, material.params)
