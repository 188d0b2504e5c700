"""Laws, checked one by one: what held, what did not apply, and what was broken."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

# Of what is checked: asserts, and returns what was found and what is expected, a pair
# or a list of pairs, if arrays are to agree. A function in place of what is expected
# judges the found array.
Law = Callable[[Any], Any]

# A program runs once or a few times: compiling it is what takes time.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# One false alarm in a million checks of random keys; the key is fixed.
FALSE_ALARM = 1e-6


class NotApplicable(Exception):
    """Raised by a law that does not apply: why."""


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
    """What a check found; printing it lists the laws.

    Made by `ff.testing.check_structure`.
    """

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


def laws_in(*rooms: Any) -> dict[str, Law]:
    """The laws of modules: public functions, whose docstrings are `name: rule`."""
    return {
        str(function.__doc__).split(":")[0]: function
        for room in rooms
        for name, function in vars(room).items()
        if inspect.isfunction(function)
        and function.__module__ == room.__name__
        and not name.startswith("_")
    }


class Laws:
    """Checks many laws, and reports all that are broken at once."""

    def __init__(
        self, subject: str, laws: Mapping[str, Law], skip: Mapping[str, str] | None
    ):
        self._subject, self._not_applicable = subject, dict(skip or {})
        self._checked: dict[str, Law] = {}
        self._broken: dict[str, str] = {}
        unknown = sorted(set(self._not_applicable) - set(laws))
        if unknown:
            raise ValueError(
                f"skip names {unknown}, which are no laws; they are {list(laws)}."
            )

    def check(self, laws: Mapping[str, Law], material: Any) -> None:
        """Checks the laws that are not skipped or already broken."""
        for name, law in self._open(laws):
            with self._noted(name, law):
                self._judge(name, _pairs(law(material)), material.tolerance)

    def check_compiled(self, laws: Mapping[str, Law], material: Any) -> None:
        """The same with all that laws compute in one program, which compiles sooner
        than each operation would; a material has `arrays`, and a copy `of` others."""
        pairs: dict[str, list] = {}

        def run(arrays: Any) -> dict[str, list]:
            traced = material.of(arrays)
            for name, law in self._open(laws):
                with self._noted(name, law):
                    pairs[name] = _pairs(law(traced))
            # judges stay outside
            return {
                name: [[x for x in pair if not callable(x)] for pair in of_law]
                for name, of_law in pairs.items()
            }

        values = jax.jit(run, compiler_options=QUICKLY)(material.arrays)
        for name, law in self._open(laws):
            with self._noted(name, law):
                judged = [
                    (*found, *filter(callable, pair))
                    for found, pair in zip(values[name], pairs[name], strict=True)
                ]
                self._judge(name, judged, material.tolerance)

    def _open(self, laws: Mapping[str, Law]) -> list[tuple[str, Law]]:
        closed = self._not_applicable.keys() | self._broken.keys()
        return [(name, law) for name, law in laws.items() if name not in closed]

    @contextlib.contextmanager
    def _noted(self, name: str, law: Law) -> Iterator[None]:
        try:
            yield
            self._checked[name] = law
        except NotApplicable as why:
            self._not_applicable[name] = str(why)
        except Exception as error:
            is_judgement = isinstance(error, AssertionError)
            raised = "" if is_judgement else f"raised {type(error).__name__}: "
            rule = " ".join(str(law.__doc__).split())
            self._broken[name] = f"- {rule}\n  {raised}{error}"
            self._checked.pop(name, None)

    def _judge(self, name: str, pairs: list, tolerance: float) -> None:
        for found, expected in pairs:
            if callable(expected):
                expected(np.asarray(found))
            else:
                equal(found, expected, tolerance, name)

    def report(self) -> Report:
        """The report.

        Raises:
          AssertionError: if a law is broken, with its rule and the numbers.
        """
        if self._broken:
            count = len(self._broken) + len(self._checked)
            raise AssertionError(
                f"{self._subject} breaks {len(self._broken)} of {count} laws:\n"
                + "\n".join(self._broken.values())
            )
        return Report(self._subject, tuple(self._checked), self._not_applicable)


def _pairs(result: Any) -> list:
    return result if isinstance(result, list) else [] if result is None else [result]


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


def within_noise(scores: np.ndarray, what: str) -> None:
    """Asserts that no z-score is beyond what chance gives once in a million checks."""
    bound = -ndtri(FALSE_ALARM / (2 * max(scores.size, 1)))
    worst = np.max(np.abs(np.where(np.isnan(scores), np.inf, scores)), initial=0.0)
    assert worst <= bound, (
        f"{what} is off by {worst:.1f} standard errors, allowed {bound:.1f}"
    )


def positive_semi_definite(matrix: np.ndarray, tolerance: float) -> None:
    """Asserts that a matrix is symmetric without negative eigenvalues."""
    equal(matrix, matrix.T, tolerance, "the matrix, against its transpose,")
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert values[0] >= -tolerance * max(abs(values[-1]), 1e-30), (
        f"the smallest eigenvalue is {values[0]:.3g}, beside the largest, "
        f"{values[-1]:.3g}"
    )


def same_layout(one: Any, other: Any, what: str) -> None:
    """Raises unless both have one tree, the same shapes and the same types."""
    import chex  # for whoever tests alone

    chex.assert_trees_all_equal_shapes_and_dtypes(one, other, custom_message=what)


def wide(made: Any, what: str) -> None:
    """Asserts that every leaf is float32 or wider."""
    for leaf in jax.tree.leaves(made):
        assert jnp.finfo(leaf.dtype).bits >= 32, f"{what} keeps {leaf.dtype}"
