"""`python -m fisherflow_jax.comparison`: the command line."""

import sys

from fisherflow_jax.comparison._command import main

if __name__ == "__main__":
    sys.exit(main())
