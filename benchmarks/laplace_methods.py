"""One posterior by this package and by its peers: fit, predict, evidence.

Every method gets the same parameters and the same data, and answers the same three
calls. Peers that are not installed are left out, and named by `missing`.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from laplace_problem import CATEGORICAL, PRIOR_PRECISION, Data, apply_fn

import fisherflow_jax as ff

OURS, LAPLAX, TORCH = "fisherflow_jax", "laplax", "laplace-torch"
LAST_FULL, LAST_KRONECKER = "last layer, full", "last layer, Kronecker"
DIAGONAL, KRONECKER, FULL = "all, diagonal", "all, Kronecker", "all, full"
# rows at a time of laplace-torch: the diagonal needs gigabytes for all 1437 at once
_TORCH_BATCH = 128
STRUCTURES = (LAST_FULL, LAST_KRONECKER, DIAGONAL, KRONECKER, FULL)


class Method(NamedTuple):
    """One structure by one library."""

    library: str
    structure: str
    fit: Callable[[], Any]  # the curvature of the training data, and the posterior
    probabilities: Callable[[Any, Any], Any]  # (posterior, inputs) -> (n, C)
    log_evidence: Callable[[Any], float]


def installed(library: str) -> bool:
    module = {OURS: "fisherflow_jax", LAPLAX: "laplax", TORCH: "laplace"}[library]
    return importlib.util.find_spec(module) is not None


def methods(params: Any, data: Data, library: str) -> list[Method]:
    """The structures that a library has; in the precision that is switched on."""
    build = {OURS: _ours, LAPLAX: _laplax, TORCH: _laplace_torch}[library]
    return [
        build(params, data, structure)
        for structure in STRUCTURES
        if _has(library, structure)
    ]


def _has(library: str, structure: str) -> bool:
    return library != LAPLAX or "Kronecker" not in structure


# ---- this package


def separate_biases(params: list, inputs: jax.Array) -> jax.Array:
    """The same network; each bias is a layer of its own, which sees ones.

    So laplace-torch cuts its Kronecker blocks: the kernel's and the bias's.
    """
    ones = jnp.ones((inputs.shape[0], 1), inputs.dtype)
    for number, layer in enumerate(params):
        inputs = inputs @ layer["w"] + ones @ layer["b"][None]
        inputs = jnp.tanh(inputs) if number + 1 < len(params) else inputs
    return inputs


def arrays(data: tuple) -> tuple:
    inputs, labels = data
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return jnp.asarray(inputs, dtype), jnp.asarray(labels)


class Part(NamedTuple):
    """A model of the parameters that a row is about; the others are in its inputs."""

    apply: Callable
    params: Any
    inputs: Callable[[Any], jax.Array]  # of the whole model -> of this part


def part_of(params: list, structure: str, apply: Callable = apply_fn) -> Part:
    if not structure.startswith("last layer"):
        return Part(apply, params, jnp.asarray)
    return Part(apply, params[1:], lambda x: _features(params[0], jnp.asarray(x)))


@jax.jit
def _features(first: dict, inputs: jax.Array) -> jax.Array:
    return jnp.tanh(inputs @ first["w"] + first["b"])


def compiled_estimator(
    part: Part, structure: str, likelihood: Any, inputs: jax.Array
) -> Callable:
    """The exact estimator, compiled once for all parameters of one model."""
    layers = None
    if "Kronecker" in structure:
        layers = ff.layers.find_layers(part.apply, part.params, inputs)
    kind = structure.rsplit(", ", 1)[1]
    return _compiled(part.apply, likelihood, kind, layers)


@functools.cache
def _compiled(apply: Callable, likelihood: Any, kind: str, layers: Any) -> Callable:
    structures = ff.structures
    kept = {
        "full": structures.full,
        "diagonal": structures.diagonal,
        "Kronecker": lambda: structures.kronecker(layers),
    }[kind]()
    return jax.jit(ff.estimators.exact(apply, likelihood, kept))


def _ours(
    params: Any, data: Data, structure: str, apply: Callable = apply_fn
) -> Method:
    batch = arrays(data.train)
    params = jax.tree.map(lambda x: jnp.asarray(x, batch[0].dtype), params)
    part = part_of(params, structure, apply)
    batch = part.inputs(batch[0]), batch[1]
    model, chosen = part.apply, part.params
    estimator = compiled_estimator(part, structure, CATEGORICAL, batch[0])

    def fit() -> tuple:
        information = estimator(chosen, batch)
        state = ff.posterior(chosen, information, prior_precision=PRIOR_PRECISION)
        return information, state

    def probabilities(fitted: tuple, inputs: Any) -> jax.Array:
        rows = part.inputs(jnp.asarray(inputs, batch[0].dtype))
        outputs = ff.predictions.linearized_outputs(fitted[1], model, rows)
        return ff.predictions.probit()(outputs, CATEGORICAL).mean

    def log_evidence(fitted: tuple) -> float:
        inputs, labels = batch
        log_likelihood = jnp.sum(CATEGORICAL.log_prob(model(chosen, inputs), labels))
        return float(
            ff.calibration.log_marginal_likelihood(
                chosen, fitted[0], log_likelihood, PRIOR_PRECISION
            )
        )

    return Method(OURS, structure, fit, probabilities, log_evidence)


def ours_with_separate_biases(params: Any, data: Data, structure: str) -> Method:
    return _ours(params, data, structure, separate_biases)


# ---- laplax


def _laplax(params: Any, data: Data, structure: str) -> Method:
    from laplax.curv import cov
    from laplax.curv.ggn import create_ggn_mv
    from laplax.enums import LossFn
    from laplax.eval import pushforward
    from laplax.util.flatten import create_pytree_flattener, wrap_factory

    inputs, labels = arrays(data.train)
    params = jax.tree.map(lambda x: jnp.asarray(x, inputs.dtype), params)
    part = part_of(params, structure)
    model, chosen, inputs = part.apply, part.params, part.inputs(inputs)
    kind = "full" if "full" in structure else "diagonal"
    prior = {"prior_prec": PRIOR_PRECISION}

    def model_fn(input: jax.Array, params: Any) -> jax.Array:
        return model(params, input[None])[0]

    @jax.jit
    def curvature(chosen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        product = create_ggn_mv(
            model_fn,
            chosen,
            {"input": inputs, "target": labels},
            loss_fn=LossFn.CROSS_ENTROPY,
        )
        return cov.CURVATURE_METHODS[kind](product, layout=chosen)

    @jax.jit
    def posterior_state(curvature: jax.Array) -> dict:
        posterior_fn = cov.set_posterior_fn(kind, curvature, layout=chosen)
        return posterior_fn(prior).state

    def fit() -> tuple:
        estimate = curvature(chosen, inputs, labels)
        return estimate, posterior_state(estimate)

    @jax.jit
    def predict(chosen: Any, state: dict, inputs: jax.Array) -> jax.Array:
        # the posterior's arrays as arguments: closed over, they would be folded
        flatten, unflatten = create_pytree_flattener(chosen)
        posterior = cov.Posterior(
            state=state,
            cov_mv=wrap_factory(cov.CURVATURE_STATE_TO_COV[kind], flatten, unflatten),
            scale_mv=wrap_factory(
                cov.CURVATURE_STATE_TO_SCALE[kind], flatten, unflatten
            ),
        )
        predictive = pushforward.set_prob_predictive(
            model_fn=model_fn,
            mean_params=chosen,
            dist_state=pushforward.get_dist_state(
                chosen, model_fn, posterior, linearized=True
            ),
            pushforward_fns=[
                pushforward.lin_setup,
                pushforward.lin_pred_mean,
                pushforward.lin_pred_var,
                pushforward.lin_special_pred_act,
            ],
        )
        return jax.vmap(predictive)(inputs)["special_pred_act"]

    def probabilities(fitted: tuple, rows: Any) -> jax.Array:
        rows = part.inputs(jnp.asarray(rows, inputs.dtype))
        return predict(chosen, fitted[1], rows)

    def log_evidence(fitted: tuple) -> float:
        # its own function refuses the cross-entropy of several classes: the same
        # formula from its precision
        precision = cov.CURVATURE_PRECISION_METHODS[kind](
            curv_estimate=fitted[0], prior_arguments=prior
        )
        logdet = (
            jnp.linalg.slogdet(precision)[1]
            if kind == "full"
            else jnp.sum(jnp.log(precision))
        )
        log_likelihood = jnp.sum(CATEGORICAL.log_prob(model(chosen, inputs), labels))
        leaves = jax.tree.leaves(chosen)
        norm = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)
        size = sum(leaf.size for leaf in leaves)
        prior_logdet = size * np.log(PRIOR_PRECISION)
        penalty = PRIOR_PRECISION * norm + logdet - prior_logdet
        return float(log_likelihood - 0.5 * penalty)

    return Method(LAPLAX, structure, fit, probabilities, log_evidence)


# ---- laplace-torch


def _laplace_torch(params: Any, data: Data, structure: str) -> Method:
    import laplace
    import torch
    from laplace.curvature.curvlinops import CurvlinopsGGN

    dtype = torch.float64 if jax.config.jax_enable_x64 else torch.float32
    torch.set_default_dtype(dtype)

    def tensor(rows: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(rows), dtype=dtype)

    modules: list[torch.nn.Module] = []
    for layer in params:
        linear = torch.nn.Linear(*layer["w"].shape)
        linear.weight.data = tensor(layer["w"]).T.contiguous()
        linear.bias.data = tensor(layer["b"])
        modules += [linear, torch.nn.Tanh()]
    model = torch.nn.Sequential(*modules[:-1])
    inputs, labels = data.train
    dataset = torch.utils.data.TensorDataset(
        tensor(inputs), torch.tensor(np.asarray(labels))
    )
    subset = "last_layer" if structure.startswith("last") else "all"
    kinds = {"Kronecker": "kron", "full": "full", "diagonal": "diag"}

    def fit():
        loader = torch.utils.data.DataLoader(dataset, batch_size=_TORCH_BATCH)
        posterior = laplace.Laplace(
            model,
            "classification",
            subset_of_weights=subset,
            hessian_structure=kinds[structure.rsplit(", ", 1)[1]],
            prior_precision=PRIOR_PRECISION,
            backend=CurvlinopsGGN,
        )
        posterior.fit(loader)
        if subset != "all" or "full" in structure:
            posterior.posterior_precision  # noqa: B018
        return posterior

    def probabilities(posterior, rows: Any) -> np.ndarray:
        found = posterior(tensor(rows), pred_type="glm", link_approx="probit")
        return found.detach().numpy()

    def log_evidence(posterior) -> float:
        return float(posterior.log_marginal_likelihood())

    return Method(TORCH, structure, fit, probabilities, log_evidence)
