"""The examples' two forms: quick, and full with `--full`."""

import argparse


def full(about: str) -> bool:
    """Whether the full form is asked for; any other argument is refused.

    It has the replicates that standard errors need; what it printed is in
    `docs/outputs`.
    """
    about = about.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="with more replicates")
    return parser.parse_args().full
