"""A training state whose optimiser sees the batch."""

import functools
from typing import Any

import optax
from flax.training import train_state

PyTree = Any


class TrainState(train_state.TrainState):
    """flax's training state, which passes the batch on to the optimiser.

    Its own `apply_gradients` drops what an update of this package needs. Made, saved
    and restored as flax's; any other Optax transformation leaves the batch alone.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import fisherflow_jax as ff
      >>> module, x = nn.Dense(3), jnp.ones((8, 2))
      >>> apply_fn = lambda params, x: module.apply({"params": params}, x)
      >>> likelihood, batch = ff.likelihoods.categorical(), (x, jnp.arange(8) % 3)
      >>> training = ff.flax.TrainState.create(
      ...     apply_fn=apply_fn,
      ...     params=module.init(jax.random.key(0), x)["params"],
      ...     tx=ff.kfac(0.1, apply_fn, likelihood, inputs=x, key=0),
      ... )
      >>> loss = ff.negative_log_likelihood(apply_fn, likelihood)
      >>> gradients = jax.grad(loss)(training.params, batch)
      >>> training.apply_gradients(grads=gradients, batch=batch).step
      1
    """

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        batch: Any = None,
        value: Any = None,
        key: Any = None,
        **replaced: Any,
    ) -> "TrainState":
        """One step of the optimiser, by gradients and the batch that they are of.

        Args:
          grads: like the parameters.
          batch: `(inputs, targets)`, as updates take it; None is not passed on.
          value: the loss at the parameters, for `ff.transforms.adapt_damping`.
          key: of this update alone, in place of the optimiser's own.
          **replaced: further fields of a subclass, as `batch_stats`.

        Returns:
          A state of the same type, its step one more.
        """
        own = {"batch": batch, "value": value, "key": key}
        own = {name: given for name, given in own.items() if given is not None}
        whole = optax.with_extra_args_support(self.tx)
        told = optax.GradientTransformationExtraArgs(
            whole.init, functools.partial(whole.update, **own)
        )
        # flax's own step, with an optimiser that knows the batch for its length
        after = train_state.TrainState.apply_gradients(
            self.replace(tx=told), grads=grads, **replaced
        )
        return after.replace(tx=self.tx)
