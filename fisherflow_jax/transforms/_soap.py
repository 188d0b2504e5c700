"""Shampoo and SOAP: squares of gradients kept in two factors of each matrix."""

from typing import Any

import optax

from fisherflow_jax import structures
from fisherflow_jax._ground import checks, placement
from fisherflow_jax.transforms import _two_sided as two_sided
from fisherflow_jax.transforms._descent import Descent

_STATIC = (
    "within optax.inject_hyperparams name it in static_args, as widest, inverse_period "
    "and exponent, where they are given."
)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    mu_dtype: Any = None,
    *,
    exponent: float | None = None,
    damping: Any = 1e-6,
    graft: str | None = None,
    inverse_period: int | None = None,
    widest: int | None = None,
    stacked: Any = None,
    store: Any = None,
    factor_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo: roots of the two factors of each matrix of gradients.

    .. math:: W_{t+1} = W_t - \eta\, A_t^{-1/4}\, m_t\, G_t^{-1/4}, \qquad
       A_t = \sum_s c_s V_s V_s^\top, \quad G_t = \sum_s c_s V_s^\top V_s

    with the gradients V of a matrix W, their moving average m and the weights c of
    another. It is Adam with its squares in the structure `ff.structures.two_sided`
    instead of the diagonal: a plain Optax transformation, for any loss. Other arrays
    (vectors, scalars, both sides too wide) get Adam.

    All axes of an array but the last are its rows, as in K-FAC of convolutions:
    `(I, O)` is itself, `(height, width, inputs, outputs)` a matrix of `height width
    inputs` rows. Name what holds separate matrices along its first axis, as scanned
    layers and experts do, with `stacked`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the gradients' average, in [0, 1).
      b2: decay of the squares' average, in [0, 1]. 1 forgets nothing, and divides by
        the mean of all: the paper's sums with a learning rate over `sqrt(step + 1)`. 0
        remembers the last gradient alone: with `b1=0` the step is its orthogonal factor
        `U V^T`, and Muon's with a momentum before it.
      eps: Adam's, added after the root where an array keeps its diagonal.
      weight_decay: decoupled, as in AdamW; of none, `update` needs no parameters.
      mask: which parameters decay, a tree of booleans (or prefix), or a function of the
        parameters that returns one; None: all.
      mu_dtype: type in which the gradients' average is kept; None: the parameters'.
      exponent: 1/4, as above (None: the same); or 1/2, for `A^-1/2 m G^-1/2 tr(A)^1/2`,
        the root of `A (x) G / tr A`, which approximates the full second moment.
      damping: added to the eigenvalues of each factor, in units of their mean. (The
        paper adds a constant to its sums.)
      graft: None; or "adam" or "sgd", whose step (the momentum itself) gives each
        matrix's step its norm.
      inverse_period: steps between two renewals of the roots, which are renewed at each
        of the first so many, too; None: 10.
      widest: sides of more than so many units keep the diagonal of their factor; 0 is
        Adam. None: 4096.
      stacked: which arrays are stacks of matrices: a predicate of a parameter's name, a
        list of names, booleans like the parameters (or a prefix); None: none.
      store: type in which roots are kept, such as "bfloat16"; None: float32 or wider,
        in which the factors are kept in any case.
      factor_sharding: where factors, roots and second moments lie on a mesh, and among
        whom the work on roots is divided, as in `ff.scale_by_fisher`.

    Returns:
      A transformation; no model, batch or key is needed, and extra arguments are
      ignored. A step with a non-finite value returns zeros before the decay, keeps the
      state, and is counted in `num_skipped`. Cost of a step: four products with a
      side, I O (I + O) each pair; every `inverse_period` steps an eigendecomposition a
      side, I^3 + O^3. Memory: two matrices a side, the momentum, and one like the
      parameters with `graft="adam"`. `ff.get_information` refuses its squares, which
      are no Fisher information.

    Raises:
      ValueError: for options out of range; at init, for parameters that are not real
        and a `stacked` that does not fit them; at update, for another tree.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> target = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> loss = lambda w: jnp.mean(jnp.square(w - target))
      >>> optimizer = ff.shampoo(0.3)
      >>> def step(carry, _):
      ...     w, state = carry
      ...     updates, state = optimizer.update(jax.grad(loss)(w), state)
      ...     return (optax.apply_updates(w, updates), state), None
      >>> start = jnp.zeros((2, 2))
      >>> (w, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=60)
      >>> bool(loss(w) < 0.1 * loss(start))
      True

    References:
      Gupta, Koren, Singer, "Shampoo: preconditioned stochastic tensor optimization",
      2018.
      Morwani, Shapira, Vyas, Malach, Kakade, Janson, "A new perspective on Shampoo's
      preconditioner", 2024.
      Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling adaptive gradient methods from
      learning rates", 2020 (grafting).
    """
    exponent = 0.25 if exponent is None else exponent
    if not isinstance(exponent, (int, float)) or exponent not in (0.25, 0.5):
        raise ValueError(f"exponent is 1/4 or 1/2; got {exponent!r}; {_STATIC}")
    if graft not in (None, "adam", "sgd"):
        raise ValueError(f'graft is None, "adam" or "sgd"; got {graft!r}.')
    checks.not_negative(damping, "damping")
    shared = inverse_period, widest, stacked, store, factor_sharding
    adams = learning_rate, b1, b2, eps, weight_decay, mask, mu_dtype
    return _optimizer(two_sided.Roots(exponent, damping, graft), *adams, *shared)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    mu_dtype: Any = None,
    *,
    decomposition: bool = False,
    inverse_period: int | None = None,
    widest: int | None = None,
    stacked: Any = None,
    store: Any = None,
    factor_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the eigenbasis of the two factors of each matrix of gradients.

    .. math:: W_{t+1} = W_t - \eta\, P\, \frac{P^\top m_t\, Q}
       {\sqrt{v_t} + \epsilon}\, Q^\top, \qquad
       v_t = \sum_s c_s \left(P^\top V_s\, Q\right)^2

    with the gradients V of a matrix W, their moving average m, and the eigenvectors P
    and Q of the averages A of `V V^T` and G of `V^T V`, as in `ff.shampoo`. It is the
    eigenvalue correction of EK-FAC with the power -1/2, on squares of gradients: a
    plain Optax transformation, for any loss. Other arrays (vectors, scalars, both sides
    too wide) get Adam.

    A basis is made of past gradients, after the step: in its own basis a gradient would
    be more diagonal than the next. So the first gradient makes the first basis, and is
    in no average of a matrix, which does not move at this step; Adam starts with the
    second. A renewal is one step of orthogonal iteration, in whose little turn the
    second moments are kept as they are. With `decomposition` the eigenvectors are taken
    anew, and the second moments move with them, as in `ff.kfac(...,
    eigenvalue_correction=True)`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the gradients' average, in [0, 1).
      b2: decay of the squares' averages, in [0, 1]; 1 forgets nothing.
      eps: added after the root.
      weight_decay: decoupled, as in AdamW; of none, `update` needs no parameters.
      mask: which parameters decay, a tree of booleans (or prefix), or a function of the
        parameters that returns one; None: all.
      mu_dtype: type in which the gradients' average is kept; None: the parameters'.
      decomposition: whether eigenvectors are taken anew at a renewal.
      inverse_period: steps between two renewals of the bases; None: 10.
      widest: sides of more than so many units are not turned; 0 is Adam. None: 4096.
      stacked: which arrays are stacks of matrices, as in `ff.shampoo`, where it is also
        said how others are seen as one.
      store: type in which bases are kept, such as "bfloat16"; None: float32 or wider,
        in which factors and second moments are kept in any case.
      factor_sharding: where factors, bases and second moments lie on a mesh, and among
        whom the work on bases is divided, as in `ff.scale_by_fisher`.

    Returns:
      A transformation; no model, batch or key is needed, and extra arguments are
      ignored. A step with a non-finite value returns zeros before the decay, keeps the
      state, and is counted in `num_skipped`. Cost of a step: eight products with a
      side, I O (I + O) each pair; every `inverse_period` steps a product and a QR
      decomposition a side, of I^3 + O^3. Memory: two matrices a side, the momentum and
      the second moments. `ff.get_information` refuses its squares, which are no Fisher
      information.

    Raises:
      ValueError: for options out of range; at init, for parameters that are not real
        and a `stacked` that does not fit them; at update, for another tree.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> target = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> loss = lambda w: jnp.mean(jnp.square(w - target))
      >>> optimizer = ff.soap(0.3)
      >>> def step(carry, _):
      ...     w, state = carry
      ...     updates, state = optimizer.update(jax.grad(loss)(w), state)
      ...     return (optax.apply_updates(w, updates), state), None
      >>> start = jnp.zeros((2, 2))
      >>> (w, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=60)
      >>> bool(loss(w) < 0.1 * loss(start))
      True

    References:
      Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson, Kakade, "SOAP: improving and
      stabilizing Shampoo using Adam", 2024.
      George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient
      descent in a Kronecker-factored eigenbasis", 2018.
    """
    if not isinstance(decomposition, bool):
        raise ValueError(f"decomposition is True or False; got {decomposition!r}.")
    shared = inverse_period, widest, stacked, store, factor_sharding
    adams = learning_rate, b1, b2, eps, weight_decay, mask, mu_dtype
    return _optimizer(two_sided.Rotation(decomposition), *adams, *shared)


def _optimizer(
    rule: Any,
    learning_rate: optax.ScalarOrSchedule,
    b1: Any,
    b2: Any,
    eps: Any,
    weight_decay: Any,
    mask: Any,
    mu_dtype: Any,
    inverse_period: int | None,
    widest: int | None,
    stacked: Any,
    store: Any,
    factor_sharding: Any,
) -> optax.GradientTransformationExtraArgs:
    """What both share, checked, in the order of their arguments."""
    checks.decay(b1, "b1", one=False)
    checks.decay(b2, "b2")
    checks.not_negative(eps, "eps")
    period = 10 if inverse_period is None else inverse_period
    widest = 4096 if widest is None else widest
    try:
        checks.whole(period, "inverse_period", of="steps")
        structure = structures.two_sided(widest=widest, stacked=stacked)
    except ValueError as error:
        raise ValueError(f"{error} Or {_STATIC}") from error
    method = two_sided.Method(
        rule=rule,
        structure=structure,
        first=two_sided.Average(b1),
        second=two_sided.Average(b2),
        eps=eps,
        inverse_period=period,
        mu_dtype=checks.floating(mu_dtype, "mu_dtype"),
        store=checks.floating(store, "store"),
        factor_sharding=placement.rule_of(factor_sharding),
    )
    descent = Descent(learning_rate, weight_decay, mask)
    return descent.after(two_sided.transformation(method))
