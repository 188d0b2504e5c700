"""Information about fewer parameters, or about more."""

import functools
from typing import Any

PyTree = Any


@functools.singledispatch
def restrict(information: Any, shown: PyTree, like: PyTree | None = None) -> Any:
    """The information about some parameters, the others being held.

    Rows and columns of what `shown` shows, a tree like the parameters with
    `optax.MaskedNode` at what is held; kept in the structure that the information has,
    about a tree with these holes. One number for all parameters, and layers by name,
    fit such a tree as they are.

    Args:
      information: of any structure.
      shown: a tree with the parameters' shapes, and holes.
      like: the whole tree, for structures that store no shape.

    Returns:
      An information. A structure that does not register it returns a `Full`, by its
      dense matrix; `Structure.restrict` brings that back into the structure.

    Raises:
      ValueError: where a dense matrix of more than 4,096 parameters would be needed,
        with its bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(
      ...     {"a": jnp.array([2.0, 1.0]), "b": jnp.array([1.0, 3.0])}
      ... )
      >>> held = ff.information.restrict(
      ...     information, {"a": jnp.zeros(()), "b": optax.MaskedNode()}
      ... )
      >>> ff.information.to_dense(held)
      Array([[2.]], dtype=float32)
    """
    raise TypeError(
        f"a {type(information).__name__} information has no restriction to some of "
        "the parameters."
    )


@functools.singledispatch
def embed(
    information: Any,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> Any:
    r"""The information about more parameters, of which a prior alone tells.

    .. math:: \begin{pmatrix} I & 0 \\ 0 & \mathrm{diag}(p) \end{pmatrix}

    The converse of `restrict`: leaves are found by name, and what is known stands at
    the beginning of each of their axes.

    Args:
      information: I, of any structure.
      entries: a tree like the new parameters: p, the precision of entries that are
        new. Those of others are not read.
      like: a tree with the old shapes, for structures that store none.
      template: an information, or its shapes, about the new parameters: of kronecker,
        and of blocks where there are new leaves, which do not say where they belong.

    Returns:
      An information of the same structure; of a scalar a `Diagonal`, as one number
      cannot tell old from new. A structure that does not register it returns a `Full`,
      by its dense matrix; `Structure.embed` brings that back into the structure.

    Raises:
      ValueError: for a leaf that is gone or has fewer entries than before, by name;
        without the template that is needed; for entries that a kronecker information
        cannot hold exactly.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> ff.information.embed(information, jnp.full(3, 0.5)).rows
      Array([[2. , 1. , 0. ],
             [1. , 2. , 0. ],
             [0. , 0. , 0.5]], dtype=float32)
    """
    raise TypeError(
        f"a {type(information).__name__} information has none about more parameters."
    )
