"""The command line: `fisherflow-estimators estimate | compare | plot`."""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fisherflow_jax.comparison._comparing import compare, plot, table
from fisherflow_jax.comparison._measurement import estimate, factories, load, save
from fisherflow_jax.comparison._problem import as_problem, find_function


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; the exit status is 2 for one that cannot be run.

    Example:
      >>> from fisherflow_jax.comparison._command import main
      >>> main(["compare", "nowhere.npz"])  # and says on standard error what is wrong
      2
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except _Refused as error:
        print(f"fisherflow-estimators: error: {error}", file=sys.stderr)
        return 2


class _Refused(Exception):
    """What the user can mend; anything else keeps its traceback."""


def _refuse(function: Any, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except (ValueError, ImportError, OSError) as error:
        raise _Refused(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fisherflow-estimators",
        description="Compare estimators of the diagonal Fisher information of a model.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser(
        "estimate",
        help="run estimators, one file for each",
        epilog="N is a whole number, or none (of groups: every example for itself)",
    )
    one.add_argument(
        "problem",
        help="module:function or file.py:function; it returns apply_fn, "
        "likelihood, params and batches",
    )
    one.add_argument(
        "--estimators",
        nargs="+",
        metavar="NAME",
        default=["exact", "hutchinson"],
        help=f"of {', '.join(factories())} (default: exact hutchinson)",
    )
    for name, takers in _options().items():
        one.add_argument(
            f"--{name.replace('_', '-')}",
            type=_number,
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"of {', '.join(takers)}",
        )
    one.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    one.add_argument(
        "--output", type=Path, default=Path("."), help="folder (default: this one)"
    )
    one.set_defaults(run=_estimate)

    two = commands.add_parser("compare", help="tabulate errors against the truth")
    two.add_argument("--json", type=Path, metavar="FILE", help="write them as JSON too")
    two.set_defaults(run=_compare)

    three = commands.add_parser("plot", help="draw histograms, and error against cost")
    three.add_argument("--output", type=Path, metavar="FILE", required=True)
    three.set_defaults(run=_plot)

    for command in (two, three):
        command.add_argument("truth", help="a file of estimate, of exact for instance")
        command.add_argument("others", nargs="*", help="more files, same parameters")
    return parser


def _number(text: str) -> int | None:
    # `groups=None` is one for each example
    return None if text in ("none", "examples") else int(text)


def _takes(factory: Callable) -> list[str]:
    """The options of an estimator that are whole numbers."""
    given = inspect.signature(factory).parameters.values()
    return [each.name for each in given if each.annotation in (int, int | None)]


def _options() -> dict[str, list[str]]:
    """The options of all estimators that are whole numbers, and who takes each."""
    takers: dict[str, list[str]] = {}
    for estimator, factory in factories().items():
        for name in _takes(factory):
            takers.setdefault(name, []).append(estimator)
    return takers


def _estimate(options: argparse.Namespace) -> int:
    known = factories()
    for name in options.estimators:
        if name not in known:
            raise _Refused(
                f"there is no estimator {name!r} to compare; there are "
                f"{', '.join(known)}."
            )
    chosen = {name: known[name] for name in options.estimators}
    given = {name: vars(options)[name] for name in _options() if name in options}
    for name in given:
        if not any(name in _takes(factory) for factory in chosen.values()):
            raise _Refused(
                f"--{name.replace('_', '-')} is taken by none of "
                f"{', '.join(options.estimators)}."
            )
    function = _refuse(find_function, options.problem)
    problem = _refuse(as_problem, function())
    _refuse(options.output.mkdir, parents=True, exist_ok=True)
    for name, factory in chosen.items():
        used = {key: given[key] for key in _takes(factory) if key in given}
        measured = _refuse(
            estimate, factory, problem, name=name, seed=options.seed, **used
        )
        file = options.output / f"{measured.stem}.npz"
        _refuse(save, file, measured)
        settings = measured.settings
        print(
            f"{file}: {settings['num_examples']:g} examples in "
            f"{settings['seconds']:.2f} s (compiled in "
            f"{settings['compile_seconds']:.1f} s), {settings['num_skipped']} batches "
            "skipped",
            flush=True,
        )
    return 0


def _measurements(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    truth, *others = (_refuse(load, file) for file in (options.truth, *options.others))
    return truth, others


def _compare(options: argparse.Namespace) -> int:
    comparisons = _refuse(compare, *_measurements(options))
    print(table(comparisons))
    if options.json is not None:
        # without NaN, which JSON does not have
        rows = json.dumps([each._asdict() for each in comparisons])
        rows = json.loads(rows, parse_constant=lambda _: None)
        _refuse(options.json.write_text, json.dumps(rows, indent=2) + "\n")
    return 0


def _plot(options: argparse.Namespace) -> int:
    figure = _refuse(plot, *_measurements(options))
    _refuse(figure.savefig, options.output, dpi=150)
    print(options.output)
    return 0
