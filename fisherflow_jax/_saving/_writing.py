"""A state as nodes of JSON over a list of arrays."""

from typing import Any

import jax
import numpy as np

from fisherflow_jax._ground import checks, processes
from fisherflow_jax._ground.telling import told
from fisherflow_jax._saving import _kinds as kinds
from fisherflow_jax._saving._container import DTYPES
from fisherflow_jax.layers import Layers

Node = Any
# As `jax.random.key_impl` names them.
KEYS = "threefry2x32", "rbg", "unsafe_rbg"
# What has its place in JSON as it is.
PLAIN = bool, int, str


class Writer:
    """Makes nodes of values, and gathers their arrays.

    Attributes:
      arrays: on this host.
      tables: the nodes of layers tables, each once.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.tables: list[Node] = []
        self._places: dict[int, int] = {}  # of a table, by its identity

    def node(self, value: Any, where: str) -> Node:
        if value is None or type(value) in PLAIN:
            return value
        if type(value) is float:
            return {"float": value.hex()}
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return self._array(value, where)
        if isinstance(value, kinds.CHOICES) or callable(value):
            return self._choice(value, where)
        if isinstance(value, Layers):
            if id(value) not in self._places:
                self._places[id(value)] = len(self.tables)
                self.tables.append(self._record(value, where))
            return {"table": self._places[id(value)]}
        if type(value) in kinds.names():
            return self._record(value, where)
        if isinstance(value, jax.tree_util.PyTreeDef):
            numbered = jax.tree.unflatten(value, range(value.num_leaves))
            return {"treedef": self.node(numbered, where)}
        if type(value) in (list, tuple):
            parts = [self.node(x, f"{where}.{k}") for k, x in enumerate(value)]
            return {type(value).__name__: parts}
        if type(value) is dict and all(type(key) in (str, int) for key in value):
            items = value.items()
            return {"dict": [[key, self.node(x, f"{where}.{key}")] for key, x in items]}
        return self._foreign(value, where)

    def _record(self, value: Any, where: str) -> Node:
        kind = type(value)
        inside = {
            name: self.node(getattr(value, name), f"{where}.{name}")
            for name in kinds.fields(kind) or ()
        }
        return {"type": kinds.names()[kind], "fields": inside}

    def _array(self, value: Any, where: str) -> Node:
        if isinstance(value, jax.core.Tracer):
            raise ValueError(f"ff.save keeps values, and {where} is traced: call it "
                             "outside of jax.jit.")  # fmt: skip
        node: dict[str, Any] = {"array": len(self.arrays)}
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            node["key"] = str(jax.random.key_impl(value))
            if node["key"] not in KEYS:
                raise ValueError(
                    f"ff.save writes keys of {', '.join(KEYS)}; {where} is of "
                    f"{node['key']}."
                )
            value = jax.random.key_data(value)
        elif not isinstance(value, jax.Array):
            node["numpy"] = True
        held = processes.on_host(value)
        if held.dtype.name not in DTYPES:
            raise ValueError(
                f"ff.save writes numbers; {where} is an array of {held.dtype}."
            )
        self.arrays.append(held)
        return node

    def _choice(self, value: Any, where: str) -> Node:
        call = getattr(value, "call", None)
        family = kinds.FAMILIES.get(getattr(call, "factory", ""))
        if (
            isinstance(value, kinds.Likelihood)
            and call is not None
            and family is not None
        ):
            arguments = call.arguments
            if family(**arguments) == value:  # with its own root, that is
                node = self.node(arguments, where)
                return {
                    "likelihood": family.__name__,
                    "arguments": node,
                    "told": told(value),
                }
        shown = {
            name: self.node(getattr(value, name), f"{where}.{name}")
            for name in kinds.fields(type(value)) or ()
            if isinstance(getattr(value, name), (str, Layers))
        }
        shown = shown or {
            name: self.node(part, f"{where}.{name}")
            for name, part in getattr(value, "_shown", {}).items()
        }
        chosen = isinstance(value, kinds.CHOICES)
        return {"function": told(value), "choice": chosen, "shown": shown}

    def _foreign(self, value: Any, where: str) -> Node:
        """A node of another library's type, which `like` has to bring."""
        children, form = one_level(value)
        if len(children) == 1 and children[0] is value:
            raise TypeError(
                "ff.save keeps arrays, numbers, strings and pytrees of these; "
                f"{where} is {checks.described(value)}."
            )
        parts = [self.node(x, f"{where}.{k}") for k, x in enumerate(children)]
        return {"node": type(value).__name__, "form": form_of(form), "children": parts}


def one_level(value: Any) -> tuple[list, Any]:
    """The children of a pytree's node, and what puts them together again."""
    return jax.tree.flatten(value, is_leaf=lambda x: x is not value)


def form_of(treedef: Any) -> str:
    return told(str(treedef)).strip("'\"")
