"""One file of arrays under a header: a zip that `numpy.load` opens, whole or not there.

Each member is stored as it is, not compressed: what a file claims to hold is never more
than its length. Of an array's member nothing is parsed: it must begin with the very
bytes that are written for the dtype and shape that the header says.
"""

import json
import math
import os
import struct
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

HEADER = "header.json"
# Dtypes that .npy files know, and those that stand in them as unsigned integers.
_PLAIN: tuple[str, ...] = (
    "bool",
    *(f"{kind}{8 * size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)),
)
_PLAIN += ("float16", "float32", "float64", "complex64", "complex128")
_OTHER: tuple[str, ...] = (
    "bfloat16",
    "int2",
    "uint2",
    "int4",
    "uint4",
    "float4_e2m1fn",
    "float8_e3m4",
)
_OTHER += ("float8_e4m3", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz")
_OTHER += ("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
DTYPES = {name: np.dtype(name) for name in _PLAIN}
DTYPES |= {name: np.dtype(getattr(jnp, name)) for name in _OTHER if hasattr(jnp, name)}
# numpy's arrays have no more axes.
_MOST_AXES = 64
# What a zip that is no zip, or was changed, makes of the reader.
_DAMAGED: tuple[type[Exception], ...] = (zipfile.BadZipFile, NotImplementedError)
_DAMAGED += (RuntimeError, EOFError, struct.error, OverflowError, UnicodeDecodeError)
_DAMAGED += (MemoryError,)


class Fault(ValueError):
    """What is wrong with a file, without its name."""


def write(path: Path, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
    """Writes beside the path and moves it there: what was there stays until then."""
    kinds = [[array.dtype.name, list(array.shape)] for array in arrays]
    text = json.dumps({**header, "arrays": kinds}, allow_nan=False).encode()
    path = path.resolve()  # of a link: what it leads to
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(new, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_member(HEADER), text)
                for index, array in enumerate(arrays):
                    prefix, raw = _prefix(array.dtype, array.shape), _raw(array)
                    member = _member(_name(index))
                    member.file_size = len(prefix) + raw.nbytes
                    with archive.open(member, "w") as part:
                        part.write(prefix)
                        part.write(raw.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The header and the arrays.

    Raises:
      Fault: for anything but a file that `write` made.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = _checked(archive.infolist(), size)
                header = _header(archive.read(members[HEADER]))
                kinds = _kinds(header, members)
                arrays = [
                    _array(archive.read(members[_name(index)]), index, *kind)
                    for index, kind in enumerate(kinds)
                ]
        except _DAMAGED as error:
            raise Fault(f"it is damaged, or no file of ff.save ({error})") from error
    return header, arrays


def _name(index: int) -> str:
    return f"{index}.npy"


def _member(name: str) -> zipfile.ZipInfo:
    """Of no date: equal states are equal files."""
    return zipfile.ZipInfo(name)


def _checked(found: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name, of which none is larger than what is there of it."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in found:
        if member.filename in members:
            raise Fault(f"it has two members named {member.filename!r}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise Fault(f"its member {member.filename!r} is compressed")
        if member.flag_bits & 0x1:
            raise Fault(f"its member {member.filename!r} is encrypted")
        if member.file_size != member.compress_size:
            raise Fault(f"its member {member.filename!r} has two sizes")
        members[member.filename] = member
    if HEADER not in members:
        raise Fault(f"it has no {HEADER}: it is no file of ff.save")
    claimed = sum(member.file_size for member in found)
    if claimed > size:
        raise Fault(f"its members claim {claimed:,} bytes, and it has {size:,}")
    return members


def _header(raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Fault(f"its {HEADER} has a key twice")
        return found

    def none(text: str) -> Any:
        raise Fault(f"its {HEADER} has the number {text}")

    try:
        header = json.loads(raw, object_pairs_hook=once, parse_constant=none)
    except Fault:
        raise
    except ValueError as error:  # no JSON, no text, or a number of too many digits
        raise Fault(f"its {HEADER} is no JSON ({error})") from error
    except RecursionError:
        raise Fault(f"its {HEADER} is nested too deep") from None
    if not isinstance(header, dict):
        raise Fault(f"its {HEADER} is a {type(header).__name__}, not an object")
    return header


def _kinds(header: dict, members: dict) -> list[tuple[np.dtype, tuple[int, ...]]]:
    """Of each array, dtype and shape, of which the members have the bytes."""
    listed = header.get("arrays")
    if not isinstance(listed, list):
        raise Fault(f"its {HEADER} lists no arrays")
    expected = {HEADER, *map(_name, range(len(listed)))}
    if expected != members.keys():
        odd = sorted(expected ^ members.keys())[0]
        told = "and no such member" if odd in expected else "which the header has not"
        raise Fault(f"its members are not those of its header: {odd!r}, {told}")
    return [_kind(item, index) for index, item in enumerate(listed)]


def _kind(item: Any, index: int) -> tuple[np.dtype, tuple[int, ...]]:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[1], list):
        raise Fault(f"array {index} has no dtype and shape")
    name, shape = item
    if not isinstance(name, str) or name not in DTYPES:
        raise Fault(f"array {index} has the dtype {str(name)[:40]!r}, which is unknown")
    whole = all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not whole or len(shape) > _MOST_AXES:
        raise Fault(f"array {index} has the shape {str(shape)[:80]}")
    return DTYPES[name], tuple(shape)


def _array(raw: bytes, index: int, dtype: np.dtype, shape: tuple) -> np.ndarray:
    prefix = _prefix(dtype, shape)
    if len(raw) != len(prefix) + math.prod(shape) * dtype.itemsize:
        raise Fault(
            f"array {index} is {dtype}{list(shape)} by the header, and its member has "
            f"{len(raw):,} bytes"
        )
    if not raw.startswith(prefix):
        raise Fault(f"array {index} is not the {dtype}{list(shape)} of the header")
    flat = np.frombuffer(raw, _descr(dtype), offset=len(prefix))
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False).view(dtype)
    try:
        return flat.reshape(shape)
    except ValueError as error:  # of no entries, and of axes that are too long
        raise Fault(f"array {index} has the shape {str(shape)[:80]}") from error


def _descr(dtype: np.dtype) -> str:
    """The dtype as it is written, little end first."""
    if dtype.name in _PLAIN:
        return dtype.newbyteorder("<").str
    return np.dtype(f"u{dtype.itemsize}").newbyteorder("<").str


def _prefix(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What stands before the entries in a .npy file of version 1 or 2."""
    # a shape is a tuple there: (3,)
    text = f"{{'descr': '{_descr(dtype)}', 'fortran_order': False, 'shape': {shape}, }}"
    start = b"\x93NUMPY\x01\x00"
    room = -(len(start) + 2 + len(text) + 1) % 64
    line = f"{text}{' ' * room}\n".encode("latin1")
    return start + struct.pack("<H", len(line)) + line


def _raw(array: np.ndarray) -> np.ndarray:
    """The entries, as they are written."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if array.dtype.name not in _PLAIN:
        flat = flat.view(np.dtype(f"u{array.dtype.itemsize}"))
    return flat.astype(_descr(array.dtype), copy=False)
