"""The command line: `fisherflow-estimators estimate | compare | plot`."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisherflow_jax.comparison._comparing import Comparison, compare, table
from fisherflow_jax.comparison._estimating import KNOWN, estimate, find_estimator
from fisherflow_jax.comparison._measurement import load, save
from fisherflow_jax.comparison._plotting import plot
from fisherflow_jax.comparison._problem import as_problem, find_function

_OPTIONS = ("num_probes", "num_samples", "groups", "k", "num_iterations")


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

    one = commands.add_parser("estimate", help="run estimators, one file for each")
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
        help=f"of {', '.join(KNOWN)} (default: exact hutchinson)",
    )
    one.add_argument("--num-probes", type=int, help="Hutchinson probes an example")
    one.add_argument("--num-samples", type=int, help="Monte Carlo labels an example")
    one.add_argument(
        "--groups",
        type=_groups,
        help="micro-batches of a batch that are squared separately, or 'examples'",
    )
    one.add_argument("--k", type=int, help="rank of hutchinson_rankk")
    one.add_argument(
        "--num-iterations", type=int, help="of the rank-k bound; none: its closed form"
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


def _groups(text: str) -> int | str:
    return text if text == "examples" else int(text)


def _estimate(options: argparse.Namespace) -> int:
    chosen = [(name, *_refuse(find_estimator, name)) for name in options.estimators]
    given = {
        name: getattr(options, name)
        for name in _OPTIONS
        if getattr(options, name) is not None
    }
    for name in given:
        if not any(name in taken for _, _, taken in chosen):
            raise _Refused(
                f"--{name.replace('_', '-')} is taken by none of "
                f"{', '.join(options.estimators)}."
            )
    if given.get("groups") == "examples":
        given["groups"] = None
    function = _refuse(find_function, options.problem)
    problem = _refuse(as_problem, function())
    _refuse(options.output.mkdir, parents=True, exist_ok=True)
    for name, factory, taken in chosen:
        used = {key: value for key, value in given.items() if key in taken}
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
        text = json.dumps([_jsonable(each) for each in comparisons], indent=2)
        _refuse(options.json.write_text, text + "\n")
    return 0


def _jsonable(comparison: Comparison) -> dict[str, Any]:
    """Without NaN, which JSON does not have."""

    def readable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: readable(each) for key, each in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return readable(comparison._asdict())


def _plot(options: argparse.Namespace) -> int:
    figure = _refuse(plot, *_measurements(options))
    _refuse(figure.savefig, options.output, dpi=150)
    print(options.output)
    return 0
