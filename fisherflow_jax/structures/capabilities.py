"""What a structure may be able to do beyond being added, scaled and solved."""

RANDOM_WALK = "random_walk memory"
ADAPTIVE = "adaptive memory"
ROBUST = "robust=True"
MARGINAL = "marginal=True"
COMPENSATED = "compensated=True"
OBSERVED = "the observed information"
# of every structure whose information is its own part of the matrix
OF_A_MATRIX = frozenset({RANDOM_WALK, ROBUST, COMPENSATED, OBSERVED})
