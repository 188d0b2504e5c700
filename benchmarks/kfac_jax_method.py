"""kfac-jax on the same problems, where a version that runs is installed.

Version 0.0.8, the last on PyPI, was written for another `Primitive.get_bind_params`
than that of JAX 0.10: its evaluation of one equation is replaced here. Nothing else of
it is changed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from optimizer_methods import DECAY, INVERSE_PERIOD, MOMENTUM, Setting
from optimizer_problems import Problem

import fisherflow_jax as ff

# its bound is on (learning rate x preconditioned gradient) before momentum
NORM_CONSTRAINT = 1e-3


def load() -> Any:
    """The package, repaired for this JAX.

    Raises:
      ImportError: where it is not installed.
    """
    import kfac_jax
    from kfac_jax._src import tag_graph_matcher

    def eval_jaxpr_eqn(eqn: Any, in_values: list) -> list:
        bound = eqn.primitive.get_bind_params(eqn.params)
        with jax.extend.source_info_util.user_context(eqn.source_info.traceback):
            output = eqn.primitive.bind(*in_values, **bound)
        return list(output) if eqn.primitive.multiple_results else [output]

    tag_graph_matcher.eval_jaxpr_eqn = eval_jaxpr_eqn
    return kfac_jax


class KfacJaxRun:
    """Steps of kfac-jax, each a call of its own: it has no pure update to scan."""

    def __init__(
        self,
        problem: Problem,
        period: int,
        norm_constraint: float | None,
        inverse_period: int = INVERSE_PERIOD,
        adaptive: bool = False,
    ) -> None:
        kfac_jax = load()
        self._problem, self._adaptive = problem, adaptive
        # the loss that the others minimise, of outputs already at hand
        loss = ff.negative_log_likelihood(lambda x, _: x, problem.likelihood)

        def registered(params: Any, batch: Any) -> jax.Array:
            inputs, targets = batch
            outputs = problem.apply_fn(params, inputs)
            if problem.likelihood is ff.likelihoods.bernoulli():
                kfac_jax.register_multi_bernoulli_predictive_distribution(
                    outputs, targets
                )
            else:
                kfac_jax.register_categorical_predictive_distribution(outputs, targets)
            return loss(outputs, batch)

        self._optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(registered),
            l2_reg=0.0,
            value_func_has_aux=False,
            value_func_has_state=False,
            value_func_has_rng=False,
            use_adaptive_learning_rate=False,
            use_adaptive_momentum=False,
            use_adaptive_damping=adaptive,
            initial_damping=1.0 if adaptive else None,  # each start sets its own
            norm_constraint=norm_constraint,
            curvature_ema=DECAY,
            curvature_update_period=period,
            inverse_update_period=inverse_period,
            num_burnin_steps=0,
            multi_device=False,
        )

    def start(self, setting: Setting, params: Any = None) -> Any:
        # its steps donate what they are given
        params = self._problem.params if params is None else params
        params = jax.tree.map(jnp.copy, params)
        batch = jax.tree.map(
            lambda x: x[: self._problem.batch_size], self._problem.data
        )
        key = jax.random.PRNGKey(0)
        state = self._optimizer.init(params, key, batch)
        if self._adaptive:
            state.damping = jnp.asarray(setting.damping)
        return params, state, 0

    def advance(self, carry: Any, setting: Setting, batches: Any) -> Any:
        leaves, treedef = jax.tree.flatten(batches)
        for batch in zip(*leaves, strict=True):
            carry = self.step(setting, carry, jax.tree.unflatten(treedef, batch))
        return carry

    def step(self, setting: Setting, carry: Any, batch: Any) -> Any:
        params, state, count = carry
        params, state, _ = self._optimizer.step(
            params,
            state,
            jax.random.PRNGKey(count),
            batch=batch,
            global_step_int=count,
            learning_rate=jnp.asarray(setting.learning_rate),
            momentum=jnp.asarray(MOMENTUM),
            damping=None if self._adaptive else jnp.asarray(setting.damping),
        )
        return params, state, count + 1

    def params(self, carry: Any) -> Any:
        return carry[0]

    def num_bytes(self) -> int:
        leaves = jax.tree.leaves(self.start(Setting(0.1, 0.1))[1])
        return sum(x.size * x.dtype.itemsize for x in leaves)
