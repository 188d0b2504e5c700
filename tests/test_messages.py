"""What goes wrong first: each error names the value, the rule and the way out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from jax.experimental import sparse
from scipy.sparse import csr_matrix

import fisherflow_jax as ff
from together import together

L, S, M, E = ff.likelihoods, ff.structures, ff.memories, ff.estimators
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype(np.float32)
Y, CLASSES = np.zeros(8, np.float32), np.arange(8) % 3
W, HEAD = jnp.zeros(3), jnp.zeros((3, 3))
MANY = jnp.zeros(3_000_000, jnp.float32)
DICTS = [{"x": X, "y": Y}]
PAIR = lambda item: (item["x"], item["y"])  # noqa: E731


def linear(w, x):
    return x @ w


def written(w, x):
    return x.reshape(8, 3) @ w


def expert(kernel, x):
    return jax.lax.ragged_dot(x, kernel, jnp.full(1, x.shape[0], jnp.int32))


def loss(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


class Filtered:
    """A module of a pytree library, its activation a leaf."""

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation


jax.tree_util.register_pytree_with_keys(
    Filtered,
    lambda module: (
        [(jax.tree_util.GetAttrKey(k), v) for k, v in vars(module).items()],
        None,
    ),
    lambda _, leaves: Filtered(*leaves),
)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layer, self.drop = nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


PROBIT = ff.predictions.probit
MODEL, CATEGORICAL = (linear, L.gaussian()), L.categorical()
FLOW, DIAGONAL = ff.fisher_flow(*MODEL), ff.fisher_flow(*MODEL, structure=S.diagonal())
FADING = ff.fisher_flow(*MODEL, memory=M.exponential(0.9))
UNKNOWN = ff.fisher_flow(linear, L.gaussian(None))
ROBUST = ff.fisher_flow(*MODEL, robust=True)
CLUSTERED = ff.fisher_flow(*MODEL, robust=True, num_clusters=3)
DOUBTFUL = ff.fisher_flow(*MODEL, prior_precision=0.2)
OF_CLUSTERS, NAMES = CLUSTERED.init(W), np.array([*"abcabcab"])
TOGETHER = ff.fisher_flow(linear, L.gaussian(covariance=jnp.eye(2)))
STATE, OF_CLASSES = FLOW.init(W), ff.posterior(HEAD, S.diagonal(), prior_precision=1.0)
EXACT = E.exact(*MODEL, S.diagonal())
LOSS, OF_LABELS = (
    ff.negative_log_likelihood(*MODEL),
    ff.negative_log_likelihood(linear, CATEGORICAL),
)
LAYERS = ff.layers.find_layers(linear, HEAD, X)
TABLE = pd.DataFrame({"a": X[:, 0], "b": X[:, 1]})
TEXT, BOOL = TABLE.assign(t="u"), TABLE.assign(t=True)
DATE = TABLE.assign(t=pd.Timestamp(0))
NET = Net(nnx.Rngs(0))
MANY_LAYERS = {f"layer_{k}": {"lora_a": W, "w": W} for k in range(20)}
MODULE = Filtered(jnp.ones((3, 3)), jax.nn.relu)

CHOICES = {
    "a likelihood uncalled": (
        r"likelihood .* call such as .*got ff.likelihoods.gaussian itself. Call it: "
        r"ff.likelihoods.gaussian\(\)",
        [
            lambda: ff.fisher_flow(linear, L.gaussian),
            lambda: ff.negative_log_likelihood(linear, L.gaussian),
            lambda: ff.scores(linear, L.gaussian, W, (X, Y)),
            lambda: ff.kfac(0.1, linear, L.gaussian, LAYERS, key=0),
            lambda: ff.natural_gradient(
                0.1, E.exact, linear, L.gaussian, structure=S.full()
            ),
            lambda: ff.predict(STATE, linear, L.gaussian, X),
            lambda: ff.predictions.weight_samples(STATE, linear, L.gaussian, X, 0, 2),
            lambda: ff.calibrate(STATE, linear, L.gaussian, [(X, Y)]),
            lambda: ff.laplace(linear, L.gaussian, W, [(X, Y)]),
            lambda: E.exact(linear, L.gaussian, S.full()),
        ],
    ),
    "a likelihood by its name": (
        r"likelihood .*got 'poisson'. Call it: ff.likelihoods.poisson\(\)",
        [
            lambda: ff.fisher_flow(linear, "poisson"),
            lambda: ff.negative_log_likelihood(linear, "poisson"),
        ],
    ),
    "a loss as a likelihood": (
        r"likelihood .*the function loss. A loss function is no.*from_log_prob\(",
        [
            lambda: ff.fisher_flow(linear, loss),
            lambda: ff.negative_log_likelihood(linear, loss),
            lambda: ff.predict(STATE, linear, loss, X),
        ],
    ),
    "a structure uncalled, or by its name": (
        r"structure comes from a call .*Call it: ff.structures.full\(\)",
        [
            lambda: ff.fisher_flow(*MODEL, structure=S.full),
            lambda: ff.fisher_flow(*MODEL, structure="full"),
            lambda: EXACT.with_structure(S.full),
            lambda: E.exact(*MODEL, "full"),
            lambda: ff.natural_gradient(0.1, E.exact, *MODEL, structure="full"),
        ],
    ),
    "a memory uncalled, or by its name": (
        r"memory comes from a call .*Call it: ff.memories.exponential\(decay\)",
        [
            lambda: ff.fisher_flow(*MODEL, memory=M.exponential),
            lambda: ff.fisher_flow(*MODEL, memory="exponential"),
            lambda: ff.natural_gradient(0.1, EXACT, memory="exponential"),
        ],
    ),
    "a link uncalled, or by its name": (
        r"a link is a function .*got .*probit.*Call it: ff.predictions.probit\(\)",
        [
            lambda: ff.predict(OF_CLASSES, linear, CATEGORICAL, X, link=PROBIT),
            lambda: ff.predict(OF_CLASSES, linear, CATEGORICAL, X, link="probit"),
        ],
    ),
    "an estimator by its name": (
        r"estimator is a choice such as .*got 'exact'",
        [lambda: ff.fisher_flow(*MODEL, estimator="exact")],
    ),
    "an unbound estimator over data": (
        r"accumulate runs an estimator that is bound to a model",
        [lambda: ff.accumulate(E.exact, W, [(X, Y)])],
    ),
    "what a factory needs": (
        r"missing a required argument: 'layers'.*ff.layers.find_layers",
        [lambda: S.kronecker()],
    ),
    "kronecker of no layers": (
        r"layers is what ff.layers.find_layers\(apply_fn, params, inputs\) returns",
        [lambda: S.kronecker(linear), lambda: S.kronecker("w")],
    ),
    "the sampler of from_log_prob": (
        r"from_log_prob: missing .* 'sample'; sample: `\(key, outputs\) -> targets`",
        [lambda: L.from_log_prob(lambda outputs, targets: targets)],
    ),
}
SWAPPED = {
    "apply_fn is no function": (
        r"apply_fn is a function \(params, inputs\) -> outputs, and stands before",
        [
            lambda: ff.fisher_flow(L.gaussian(), linear),
            lambda: ff.negative_log_likelihood(L.gaussian(), linear),
            lambda: ff.predict(STATE, X, *MODEL),
            lambda: ff.predict(STATE, L.gaussian(), linear, X),
            lambda: ff.calibrate(STATE, [(X, Y)], *MODEL),
            lambda: ff.predictions.joint(STATE, X, linear),
            lambda: ff.natural_gradient(0.1, *MODEL, structure=S.full()),
        ],
    ),
    "the arguments of that function": (
        r"The order is ff.(predict|calibrate|laplace)\((state, )?apply_fn, likeli",
        [
            lambda: ff.predict(*MODEL, STATE, X),
            lambda: ff.calibrate(*MODEL, STATE, [(X, Y)]),
            lambda: ff.laplace(L.gaussian(), linear, W, [(X, Y)]),
        ],
    ),
    "no learning rate": (
        r"missing .*It is called as \w+\(learning_rate, .*learning_rate comes first",
        [lambda: ff.kfac(*MODEL), lambda: ff.natural_gradient(EXACT)],
    ),
    "a batch taken apart": (
        r"takes \d .*but \d were given.*It is called as .*\(X, y\)",
        [
            lambda: FLOW.update(STATE, X, Y),
            lambda: ff.calibrate(STATE, *MODEL, X, Y),
            lambda: ff.laplace(*MODEL, W, X, Y),
            lambda: ff.run(FLOW, STATE, X, Y),
            lambda: ff.refine(FLOW, STATE, X, Y),
        ],
    ),
    "the batch before the state": (
        r"update is \(state, batch\).*got a tuple: the batch comes second",
        [lambda: FLOW.update((X, Y), STATE)],
    ),
    "the batch before the parameters": (
        r"a batch is \(inputs, targets\).*parameters stand before the batch",
        [lambda: LOSS((X, Y), W), lambda: EXACT((X, Y), W)],
    ),
    "a number of draws in place of their shape": (
        r"the shape is a tuple, \(1000,\) for a thousand draws; got 10",
        [lambda: ff.sample(STATE, 0, 10)],
    ),
    "a list in place of an array": (
        r"pytree prefix of the parameters, and a list is read as a tree.*numpy.asarray",
        [lambda: ff.fisher_flow(*MODEL, prior_precision=[1.0, 2.0, 3.0]).init(W)],
    ),
    "the state before the flow": (
        r"a flow stands before its state .*got a FlowState",
        [
            lambda: ff.refine(STATE, FLOW, [(X, Y)]),
            lambda: ff.warm_start(STATE, FLOW, (X, Y)),
        ],
    ),
    "update's pair in place of the state": (
        r"\(state, info\)",
        [
            lambda: ff.summary(_updated()),
            lambda: ff.confidence_interval(_updated()),
            lambda: ff.predict(_updated(), *MODEL, X),
            lambda: FLOW.update(_updated(), (X, Y)),
        ],
    ),
    "a number of features": (
        r"(?s)apply_fn\(params, inputs\) with params of shapes \(3,\) and inputs of "
        r"shapes \(\d, 4\) raised: dot_general .*\(4,\) and \(3,\)(?!.*swapped)",
        [
            lambda: FLOW.update(STATE, (X[:, [0, 0, 1, 2]], Y)),
            lambda: LOSS(W, (X[:, [0, 0, 1, 2]], Y)),
            lambda: EXACT(W, (X[:, [0, 0, 1, 2]], Y)),
            lambda: ff.layers.find_layers(linear, W, X[:, [0, 0, 1, 2]]),
            lambda: ff.predict(STATE, *MODEL, X[:, [0, 0, 1, 2]]),
        ],
    ),
    "the model's own arguments": (
        r"(?s)raised: dot_general.*With its arguments swapped it runs: apply_fn takes "
        "params first",
        [
            lambda: ff.negative_log_likelihood(lambda x, w: x @ w, MODEL[1])(W, (X, Y)),
            lambda: ff.layers.find_layers(lambda x, w: x @ w, W, X),
        ],
    ),
    "a batch size in the model": (
        r"(?s)cannot reshape.*One example is run here by itself.*x.shape\[0\].*"
        "batched=True",
        [
            lambda: ff.layers.find_layers(written, W, X),
            lambda: E.exact(written, MODEL[1], S.diagonal())(W, (X, Y)),
        ],
    ),
}
DATA = {
    "text labels": (
        r"targets are not numbers but .*numpy.unique\(labels",
        [
            lambda: OF_LABELS(HEAD, (X, np.array(["a", "b"] * 4))),
            lambda: OF_LABELS(HEAD, (X, np.array(["a", 1] * 4, object))),
        ],
    ),
    "labels from 1": (
        r"targets\[2\] = 3, which is none of the model's 3 classes.*run from 1 to 3, "
        r"and classes are counted from 0: give targets - 1",
        [lambda: OF_LABELS(HEAD, (X, CLASSES + 1))],
    ),
    "labels that mark padding": (
        r"Classes are 0 to 2; labels that are none of them: -100, 7.*weight 0",
        [lambda: OF_LABELS(HEAD, (X, np.where(CLASSES == 1, [-100, 7] * 4, CLASSES)))],
    ),
    "labels of -1 and 1, or 1 and 2": (
        r"targets are -1.* and 1.*: give \(targets \+ 1\) / 2|give targets - 1",
        [
            lambda y=y: ff.negative_log_likelihood(linear, L.bernoulli())(W, (X, y))
            for y in (np.sign(X[:, 0]), CLASSES % 2 + 1)
        ],
    ),
    "a column of text": (
        r"inputs have columns that are not plain numbers: 't' \(.*get_dummies",
        [
            lambda: LOSS(W, (TEXT, Y)),
            lambda: FLOW.update(STATE, (TEXT, Y)),
            lambda: ff.layers.find_layers(linear, W, TEXT),
            lambda: ff.predict(STATE, *MODEL, TEXT),
            lambda: ff.accumulate(EXACT, W, [(TEXT, Y)]),
        ],
    ),
    "a column of truth values or dates": (
        r"inputs have columns .*: 't' \((bool|datetime64.*)\).*astype\(float\), dates",
        [lambda: LOSS(W, (BOOL, Y)), lambda: LOSS(W, (DATE, Y))],
    ),
    "a column of pandas' own integers": (
        r"columns that are not plain numbers: 't' \(Int64\).*\(Int64\) by .astype\(",
        [lambda: LOSS(W, (TABLE.assign(t=pd.array([1, None] * 4, "Int64")), Y))],
    ),
    "records": (
        r"inputs are records with fields \('a', 'b'\).*structured_to_unstructured",
        [lambda: LOSS(W, (TABLE.to_records(index=False), Y))],
    ),
    "a table in place of a batch": (
        r"got DataFrame.*taken apart, \(table\[\['a'\]\], table\['b'\]\)",
        [lambda: FLOW.update(STATE, TABLE), lambda: ff.run(FLOW, STATE, [TABLE])],
    ),
    "a table in place of batches": (
        r"batches is a list or another iterable.*got DataFrame",
        [
            lambda: ff.run(FLOW, STATE, TABLE),
            lambda: ff.accumulate(EXACT, W, TABLE),
        ],
    ),
    "a row in place of a batch": (
        r"leading example axis.*got shapes \[\(3,\), \(\)\]. One row alone is "
        r"\(x\[None\], y\[None\]\); one batch.*in a list, \[batch\]",
        [
            lambda: FLOW.update(STATE, (X[0], Y[0])),
            lambda: ff.refine(FLOW, STATE, (X, Y)),
        ],
    ),
    "a row to predict in place of a batch": (
        r"one row alone is x\[None\]|predicted as it is alone \(one row is x\[None\]\)",
        [
            lambda: ff.predict(STATE, *MODEL, X[0]),
            lambda: ff.predict(OF_CLASSES, linear, CATEGORICAL, X[0]),
            lambda: ff.predictions.linearized_outputs(STATE, linear, X[0]),
        ],
    ),
    "one target in place of a batch": (
        r"One row alone is \(x\[None\], y\[None\]\)|one row alone is \(x\[None\], y",
        [
            lambda: TOGETHER.update(TOGETHER.init(W), (X[:2], Y[:2])),
            lambda: FLOW.update(STATE, (X, Y[0])),
            lambda: FLOW.update(STATE, (X[0], Y[:1])),
        ],
    ),
    "one batch in place of several": (
        r"batches is a list .*got tuple \(one batch alone goes in a list, \[batch\]\)",
        [
            lambda: ff.choose({"full": FLOW}, W, (X, Y)),
            lambda: ff.accumulate(EXACT, W, (X, Y)),
        ],
    ),
    "several bad rows": (
        r"row 1 of the batch has .*, and bad are rows 2, 3, 4, 5, 6 and 1 more\. ",
        [lambda: FLOW.update(STATE, (X, np.where(np.arange(8) > 0, np.nan, Y)))],
    ),
    "names of clusters": (
        r"clusters are not numbers but <U1: .*numpy.unique\(.*return_inverse",
        [lambda: CLUSTERED.update(OF_CLUSTERS, ff.Batch(X, Y, None, NAMES))],
    ),
    "clusters from 1": (
        r"clusters are numbered 0 to 2.*got 3 in row 2.*numpy.unique\(names",
        [lambda: CLUSTERED.update(OF_CLUSTERS, ff.Batch(X, Y, None, CLASSES + 1))],
    ),
    "clusters as a list": (
        r"clusters are a list.*numpy.asarray\(clusters",
        [lambda: CLUSTERED.update(OF_CLUSTERS, ff.Batch(X, Y, None, CLASSES.tolist()))],
    ),
    "sparse": (
        r"inputs hold a sparse matrix \(.*toarray",
        [
            lambda: LOSS(W, (csr_matrix(X), Y)),
            lambda: LOSS(W, (sparse.BCOO.fromdense(X), Y)),
            lambda: ff.layers.find_layers(linear, W, csr_matrix(X)),
            lambda: ff.predict(STATE, *MODEL, sparse.BCOO.fromdense(X)),
        ],
    ),
    "nested lists": (
        r"(inputs|targets) (are|hold) a list.*numpy.asarray",
        [
            lambda: LOSS(W, (X.tolist(), Y)),
            lambda: LOSS(W, (X, Y.tolist())),
            lambda: LOSS(W, ((X, Y.tolist()), Y)),
        ],
    ),
    "a mask that is not wrapped": (
        r"agree in their leading axis.*ff.Shared.*\(4, 4\)",
        [
            lambda: LOSS(W, ({"x": X, "mask": np.ones((4, 4))}, Y)),
            lambda: ff.layers.find_layers(linear, W, (X, np.ones((4, 4)))),
        ],
    ),
    "task ids": (
        r"third entry .* is its weights.*ff.Batch",
        [lambda: LOSS(W, (X, Y, CLASSES))],
    ),
    "dicts": (
        r"got dict .*Take it apart, \(batch\['x'\], batch\['y'\]\).*to_batch=",
        [
            lambda: FLOW.update(STATE, DICTS[0]),
            lambda: ff.accumulate(EXACT, W, DICTS),
            lambda: ff.refine(FLOW, STATE, DICTS),
            lambda: ff.calibrate(STATE, *MODEL, DICTS),
        ],
    ),
    "to_batch of no loader": (
        r"to_batch is for a loader: .*got (tuple|Stacked)|to_batch is a function",
        [
            lambda: ff.accumulate(EXACT, W, (X, Y), to_batch=PAIR),
            lambda: ff.accumulate(EXACT, W, ff.Stacked(X[None], None), to_batch=PAIR),
            lambda: ff.calibrate(STATE, *MODEL, (X, Y), to_batch=PAIR),
            lambda: ff.accumulate(EXACT, W, DICTS, to_batch="x"),
        ],
    ),
}
MODELS = {
    "a module that is not filtered": (
        r"activation is .*eqx.partition\(model, eqx.is_inexact_array\)",
        [
            lambda: FLOW.init(MODULE),
            lambda: ff.layers.find_layers(linear, MODULE, X),
            lambda: ff.scores(*MODEL, MODULE, (X, Y)),
            lambda: EXACT(MODULE, (X, Y)),
            lambda: ff.kfac(0.1, linear, CATEGORICAL, LAYERS, key=0).init(MODULE),
        ],
    ),
    "a module that is not split": (
        r"drop.rngs.count has dtype uint32: .*nnx.split\(net, nnx.Param, ...\)",
        [
            lambda: FLOW.init(NET),
            lambda: ff.layers.find_layers(linear, NET, X),
            lambda: FLOW.init(nnx.state(NET)),
        ],
    ),
    "whole numbers among the parameters": (
        r"q has dtype int\d\d: whole numbers .*ff.Shared",
        [
            lambda: FLOW.init({"q": jnp.arange(3)}),
            lambda: ff.layers.find_layers(linear, {"q": jnp.arange(3)}, X),
        ],
    ),
    "no parameters": (
        r"params must be a pytree with at least one array; got (None|\{\})",
        [lambda: FLOW.init(None), lambda: FLOW.init({})],
    ),
    "complex parameters": (
        r"theta has dtype complex64: give its real and its imaginary part",
        [lambda: FLOW.init(jnp.zeros(3, jnp.complex64))],
    ),
    "several outputs": (
        r"must return one array .*side by side.*jnp.concatenate\(outputs, -1\)",
        [
            lambda: ff.layers.find_layers(lambda w, x: (x @ w, w), W, X),
            lambda: ff.negative_log_likelihood(
                lambda w, x: (x @ w, x), L.from_log_prob(loss, sample=loss)
            )(W, (X, Y)),
            lambda: ff.predict(STATE, lambda w, x: (x @ w, x), L.gaussian(), X),
        ],
    ),
    "what cannot be mapped": (
        r"jax.vmap does not map .*ragged_dot.*chunk_size=1 .*groups=1 .*batched=True",
        [lambda: E.empirical(expert, CATEGORICAL, S.full())(HEAD[None], (X, CLASSES))],
    ),
    "what would not fit": (
        r"full\(\) of 3,000,000 parameters takes 36,000,000,000,000 bytes.*there are "
        r".*diagonal\(\).*kronecker\(ff.layers.find_layers.*ff.only\(",
        [
            lambda: FLOW.init(MANY),
            lambda: ff.posterior(MANY, S.full(), prior_precision=1.0),
            lambda: ff.accumulator(E.exact(*MODEL, S.full())).init(MANY),
            lambda: ff.natural_gradient(0.1, E.exact(*MODEL, S.full())).init(MANY),
            lambda: E.exact(*MODEL, S.full())(MANY, (jnp.zeros((1, 3_000_000)), None)),
        ],
    ),
}
STATES = {
    "chosen by part of a name": (
        r"names are 40, among them \['layer_7.lora_a'(, '[^']*'){9}\].*lambda name: ",
        [lambda: ff.only(linear, MANY_LAYERS, ["layer_7.lora"])],
    ),
    "of another structure": (
        r"another flow's than .*diagonal\(\).*information is Full, not Diagonal",
        [
            lambda: DIAGONAL.update(STATE, (X, Y)),
            lambda: jax.jit(DIAGONAL.update)(STATE, (X, Y)),
            lambda: ff.warm_start(DIAGONAL, STATE, (X, Y)),
            lambda: ff.refine(DIAGONAL, STATE, [(X, Y)]),
        ],
    ),
    "of another memory": (
        r"its memory is ff.memories.(stationary, not ff.memories.exp|exponential, not)",
        [
            lambda: FADING.update(STATE, (X, Y)),
            lambda: FLOW.update(FADING.init(W), (X, Y)),
        ],
    ),
    "of another window": (
        r"its memory is .*\(4,.*\(2,",
        [
            lambda: ff.fisher_flow(*MODEL, memory=M.windowed(2)).update(
                ff.fisher_flow(*MODEL, memory=M.windowed(4)).init(W), (X, Y)
            )
        ],
    ),
    "of another dispersion": (
        r"it (lacks|has) the sum of squares of an unknown dispersion",
        [
            lambda: UNKNOWN.update(STATE, (X, Y)),
            lambda: FLOW.update(UNKNOWN.init(W), (X, Y)),
        ],
    ),
    "without squared scores": (
        r"it lacks the squared scores of robust=True",
        [lambda: ROBUST.update(STATE, (X, Y))],
    ),
    "a posterior": (
        r"got a Posterior: .*prior_precision=state.information\).init\(state.mean\)",
        [lambda: FLOW.update(OF_CLASSES, (X, Y))],
    ),
    "of a bank": (
        r"a bank's (state goes to|update is \(state, batch\))",
        [
            lambda: FLOW.update(ff.bank([FLOW]).init(W), (X, Y)),
            lambda: ff.bank([FLOW]).update(STATE, (X, Y)),
        ],
    ),
    "merged with that of another flow": (
        r"worker 1's is another than the start's: its information is Diagonal, not",
        [lambda: ff.merge([STATE, DIAGONAL.init(W)], STATE)],
    ),
    "merged from no start, or not as a list": (
        r"ff.merge\(\[a, b\], (flow.init\(params\)|start)\).*flow.init\(params\)|"
        r"none was given: ff.merge\(\[a, b\], flow.init\(params\)\)",
        [lambda: ff.merge([STATE, STATE]), lambda: ff.merge(STATE, STATE)],
    ),
    "merged from one of the workers": (
        r"start has made 1 updates, and so has worker 1, with another mean",
        [
            lambda: ff.merge(
                [_updated()[0], FLOW.update(STATE, (X, Y + 1))[0]], _updated()[0]
            )
        ],
    ),
    "merged from a start with more data": (
        r"start has seen 8 observations in 1 updates, and worker 1 0 in 0",
        [lambda: ff.merge([_updated()[0], STATE], _updated()[0])],
    ),
    "merged from a start with another prior": (
        r"worker 0 has another prior than start",
        [
            lambda: ff.merge(
                [ff.fisher_flow(*MODEL, prior_precision=5.0).init(W)], STATE
            )
        ],
    ),
    "which is none": (
        r"a state has .mean and .information: that of a flow, or ff.posterior",
        [lambda: ff.sample(0, STATE, 3), lambda: ff.summary(W)],
    ),
}
_CACHE = {}


def _updated():
    if not _CACHE:
        _CACHE["pair"] = FLOW.update(STATE, (X, Y))
    return _CACHE["pair"]


TABLE_OF = {
    f"{room}: {name}": case
    for room, table in (
        ("choices", CHOICES),
        ("swapped", SWAPPED),
        ("data", DATA),
        ("models", MODELS),
        ("states", STATES),
    )
    for name, case in table.items()
}


@pytest.mark.slow
@together
@pytest.mark.parametrize(("pattern", "calls"), TABLE_OF.values(), ids=TABLE_OF)
def test_an_error_names_value_rule_and_way_out(pattern, calls):
    for number, call in enumerate(calls):
        try:
            call()
        except (TypeError, ValueError, NotImplementedError) as error:
            told = f"call {number}: {type(error).__name__}: {error}"
            assert re.search(pattern, told), told
        else:
            pytest.fail(f"call {number} raised nothing")


@pytest.mark.parametrize(
    "ask", ["predict", "linearized_outputs", "joint", "weight_samples", "greedy"]
)
def test_a_table_predicts_as_the_array_of_its_columns(ask):
    state = ff.fisher_flow(*MODEL).init(jnp.arange(2.0))

    def found(inputs):
        if ask == "predict":
            return ff.predict(state, *MODEL, inputs).mean
        if ask == "greedy":
            return ff.selection.greedy(state, *MODEL, inputs, 2).gains
        if ask == "weight_samples":
            return ff.predictions.weight_samples(state, *MODEL, inputs, 0, 4).mean
        return getattr(ff.predictions, ask)(state, linear, inputs).mean

    np.testing.assert_array_equal(found(TABLE), found(TABLE.to_numpy()))
