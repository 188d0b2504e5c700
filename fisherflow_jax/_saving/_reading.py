"""Nodes of JSON and arrays as a state again, and where it is not as expected."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground.telling import told
from fisherflow_jax._saving import _kinds as kinds
from fisherflow_jax._saving._container import Fault
from fisherflow_jax._saving._writing import (
    KEYS,
    PLAIN,
    Node,
    Writer,
    form_of,
    one_level,
)
from fisherflow_jax.layers import Layers


class Reader:
    """Makes values of nodes.

    Args:
      arrays: of the file.
      tables: the nodes of its layers tables.
      alone: whether no `like` was given, so that functions are missing.

    Attributes:
      missing: what is a function, or of another library, and was not given, by name.
      differs: how the file is not what `like` is, in words.
    """

    def __init__(self, arrays: list[np.ndarray], tables: Any, alone: bool) -> None:
        if not isinstance(tables, list):
            raise Fault("its tables are no list")
        self.arrays, self.tables, self.alone = arrays, tables, alone
        self.missing: list[str] = []
        self.differs: list[str] = []
        self.used: set[int] = set()
        self._made: dict[int, Any] = {}

    def value(self, node: Node, like: Any, where: str) -> Any:
        """What the node says; of `like`, `...` stands for what the file has."""
        if node is None or type(node) in PLAIN:
            return self._same(node, like, where)
        if not isinstance(node, dict):
            raise Fault(f"{where} is a {type(node).__name__} in the header")
        for sign, make in self._ways.items():
            if sign in node:
                return make(self, node, like, where)
        raise Fault(f"{where} is none of the nodes {', '.join(self._ways)}")

    def _same(self, value: Any, like: Any, where: str) -> Any:
        if like is not ... and type(like) is not type(value):
            self._tell(where, words(value), like)
        return value

    def _tell(self, where: str, own: str, like: Any) -> None:
        self.differs.append(f"{where} is {own} in the file, and {words(like)} in like")

    def _float(self, node: Node, like: Any, where: str) -> Any:
        text = node["float"]
        try:
            return self._same(float.fromhex(text), like, where)
        except (TypeError, ValueError, OverflowError):
            raise Fault(f"{where} is no float: {str(text)[:40]!r}") from None

    def _array(self, node: Node, like: Any, where: str) -> Any:
        index = node["array"]
        if type(index) is not int or not 0 <= index < len(self.arrays):
            raise Fault(f"{where} is array {str(index)[:40]}, of {len(self.arrays)}")
        if index in self.used:
            raise Fault(f"{where} is array {index}, which another name has already")
        self.used.add(index)
        held, key = self.arrays[index], node.get("key")
        value: Any
        if key is not None:
            value = _key(held, key, where)
        elif node.get("numpy"):
            value = held.copy() if held.ndim else held[()]
        else:
            kept = jax.dtypes.canonicalize_dtype(held.dtype)
            if kept != held.dtype:
                raise Fault(
                    f"{where} is {held.dtype}, which JAX holds with "
                    'jax.config.update("jax_enable_x64", True) alone'
                )
            value = jnp.array(held)  # whose memory an update may take
        if like is not ...:
            shape, dtype = getattr(like, "shape", None), getattr(like, "dtype", None)
            if (shape, dtype) != (value.shape, value.dtype):
                self._tell(where, words(value), like)
        return value

    def _function(self, node: Node, like: Any, where: str) -> Any:
        name = str(node["function"])
        if like is ...:
            if self.alone:
                self.missing.append(where)
            shown = node.get("shown")
            parts = shown.items() if isinstance(shown, dict) else ()
            known = {key: self.value(x, ..., f"{where}.{key}") for key, x in parts}
            return NotStored(name, where, known)
        if not callable(like) and not isinstance(like, kinds.CHOICES):
            self._tell(where, f"the function {name}", like)
        elif node.get("choice") is True and told(like) != name:
            self._tell(where, name, like)
        return like

    def _likelihood(self, node: Node, like: Any, where: str) -> Any:
        family = kinds.FAMILIES.get(_text(node["likelihood"]))
        if family is None:
            raise Fault(
                f"{where} is the likelihood {_text(node['likelihood'])!r}, unknown"
            )
        arguments = self.value(node.get("arguments"), ..., where)
        if not isinstance(arguments, dict):
            raise Fault(f"{where} has no arguments")
        if isinstance(like, kinds.Likelihood):
            if told(like) != node.get("told"):
                self._tell(where, _text(node.get("told")), like)
            return like
        try:
            made = family(**arguments)
        except Exception as error:  # of any kind, by what a stranger wrote
            raise Fault(f"{where} cannot be made: {error}") from error
        return self._same(made, like, where)

    def _table(self, node: Node, like: Any, where: str) -> Any:
        index = node["table"]
        if type(index) is not int or not 0 <= index < len(self.tables):
            raise Fault(f"{where} is table {str(index)[:40]}, of {len(self.tables)}")
        if isinstance(like, Layers):
            own = Writer()
            own.node(like, where)
            if _compared(own.tables[0]) != _compared(self.tables[index]):
                self._tell(where, "another table of layers", like)
            return like
        if index not in self._made:
            self._made[index] = self.value(self.tables[index], ..., where)
        return self._same(self._made[index], like, where)

    def _record(self, node: Node, like: Any, where: str) -> Any:
        kind = kinds.by_name().get(_text(node["type"]))
        inside, known = node.get("fields"), kinds.fields(kind or object)
        if kind is None or known is None:
            raise Fault(f"{where} is of the type {_text(node['type'])!r}, unknown here")
        if not isinstance(inside, dict):
            raise Fault(f"{where} has no fields")
        odd = [name for name in inside if name not in known]
        odd += [name for name in known if name not in inside and known[name] is ...]
        if odd:
            raise Fault(
                f"{where} is no {kind.__name__} of this version: {odd[0][:40]!r}"
            )
        if like is not ... and type(like) is not kind:
            self._tell(where, f"a {kind.__name__}", like)
            return None
        parts = {
            name: self.value(
                part, like if like is ... else getattr(like, name), f"{where}.{name}"
            )
            for name, part in inside.items()
        }
        try:
            made = kind(**parts)
        except Exception as error:
            raise Fault(f"{where} cannot be made: {error}") from error
        if dataclasses.is_dataclass(kind) and not self.missing:
            wrong = kinds.misfit(made)
            if wrong is not None:
                raise Fault(f"{where}.{wrong} is not what a {kind.__name__} has there")
        return made

    def _treedef(self, node: Node, like: Any, where: str) -> Any:
        return jax.tree.structure(self.value(node["treedef"], ..., where))

    def _sequence(self, node: Node, like: Any, where: str) -> Any:
        kind = list if "list" in node else tuple
        parts = node[kind.__name__]
        if not isinstance(parts, list):
            raise Fault(f"{where} has no parts")
        if like is not ... and (type(like) is not kind or len(like) != len(parts)):
            self._tell(where, f"a {kind.__name__} of {len(parts)}", like)
            return None
        each = [like if like is ... else like[k] for k in range(len(parts))]
        return kind(
            self.value(part, one, f"{where}.{k}")
            for k, (part, one) in enumerate(zip(parts, each, strict=True))
        )

    def _dict(self, node: Node, like: Any, where: str) -> Any:
        items = node["dict"]
        pairs = isinstance(items, list) and all(
            isinstance(x, list) and len(x) == 2 and type(x[0]) in (str, int)
            for x in items
        )
        if not pairs or len({key for key, _ in items}) < len(items):
            raise Fault(f"{where} is no dict of names")
        keys = {key for key, _ in items}
        if like is not ... and (type(like) is not dict or like.keys() != keys):
            self._tell(where, f"a dict of {_listed(keys)}", like)
            return None
        return {
            key: self.value(part, like if like is ... else like[key], f"{where}.{key}")
            for key, part in items
        }

    def _foreign(self, node: Node, like: Any, where: str) -> Any:
        parts, name = node.get("children"), _text(node["node"])
        if not isinstance(parts, list):
            raise Fault(f"{where} has no children")
        if like is ...:
            self.missing.append(f"{where} (a {name})")
            return None
        children, form = one_level(like)
        if form_of(form) != node.get("form") or len(children) != len(parts):
            self._tell(where, f"a {name}, {_text(node.get('form'))}", like)
            return None
        both = enumerate(zip(parts, children, strict=True))
        made = [self.value(part, child, f"{where}.{k}") for k, (part, child) in both]
        return jax.tree.unflatten(form, made)

    _ways: ClassVar[dict[str, Callable]] = {
        "float": _float,
        "array": _array,
        "function": _function,
        "likelihood": _likelihood,
        "table": _table,
        "type": _record,
        "treedef": _treedef,
        "list": _sequence,
        "tuple": _sequence,
        "dict": _dict,
        "node": _foreign,
    }


class NotStored:
    """What stands for a function, which no file holds: it says so when it is used.

    Of a choice it has the texts and the table of layers, for printing.
    """

    def __init__(self, name: str, where: str, shown: dict[str, Any]) -> None:
        self._name, self._where, self._shown = name, where, shown

    def __repr__(self) -> str:
        return self._name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._shown:
            return self._shown[name]
        raise AttributeError(f"no {name}: {self._told()}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(self._told())

    def _told(self) -> str:
        return (
            f"{self._name} is not in the file that this was loaded from, which holds "
            f"no functions: give it in ff.load(path, like=...), as {self._where}."
        )


def _key(held: np.ndarray, name: Any, where: str) -> jax.Array:
    if name not in KEYS:
        raise Fault(f"{where} is a key of {_text(name)!r}; there are {', '.join(KEYS)}")
    try:
        return jax.random.wrap_key_data(jnp.asarray(held), impl=name)
    except (TypeError, ValueError) as error:
        raise Fault(f"{where} is no key of {name}: {error}") from error


def _compared(table: Node) -> Node:
    """A table of layers without what tables are not compared by."""
    if isinstance(table, dict):
        left_out = ("uses", "input_shapes")
        return {k: _compared(x) for k, x in table.items() if k not in left_out}
    return [*map(_compared, table)] if isinstance(table, list) else table


def _text(value: Any) -> str:
    return str(value)[:200]


def _listed(keys: Any) -> str:
    names = [*map(str, keys)]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def words(value: Any) -> str:
    """What a value is, for one line of an error."""
    if value is None:
        return "nothing"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if callable(value) or isinstance(value, kinds.CHOICES):
        return told(value)
    if isinstance(value, dict):
        return f"a {type(value).__name__} of {_listed(value)}"
    if type(value) in (list, tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
