"""Files that may be damaged or hostile: read within bounds, checked field by field, one ``ValueError`` for each fault.

JSON is read strictly: one object, no duplicate keys, no NaN or Infinity, integers of 64 bits. A sealed record holds
the sha256 of its other fields, so that a changed value is never taken for the one that was written.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

CHECKSUM = "checksum"
# The library's own error, and what it and torch make of types, names and sizes that they do not know.
TENSOR_ERRORS = (
    SafetensorError,
    OSError,
    ArithmeticError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_MAXIMUM_JSON_BYTES = 16 << 20
_MAXIMUM_DIGITS = 20
_MAXIMUM_DEPTH = 32
_TOO_DEEP = f"nested more than {_MAXIMUM_DEPTH} deep"
_INT64 = 2**63


def shorten(value: object) -> str:
    """``repr`` of a value, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    return short.repr(value)


# ------------------------------------------------------------------------------------------------ JSON


def read_json_object(path: Path, *, wide_integers: bool = False) -> dict[str, Any]:
    """Read the JSON object in a file.

    A byte-order mark is passed over. Integers beyond 64 bits are refused, unless the caller checks ranges itself, key
    by key, and asks for ``wide_integers``.

    Raises:
        ValueError: It holds something else; the message names the file.
        OSError: It cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, got a folder or device")
    size = path.stat().st_size
    if size > _MAXIMUM_JSON_BYTES:
        raise ValueError(
            f"{path}: expected a JSON file of at most {_MAXIMUM_JSON_BYTES:,} bytes, got {size:,}"
        )
    try:
        content = json.loads(
            path.read_bytes().decode("utf-8-sig"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=int if wide_integers else _bounded_integer,
        )
        _check_depth(content)
    except RecursionError:
        raise ValueError(f"{path}: not a JSON file ({_TOO_DEEP})") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not a JSON file: expected JSON, got line {error.lineno}: {error.msg}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a JSON file: expected UTF-8, got byte {error.object[error.start]:#x}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(twice)} occurs more than once")
    return content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _bounded_integer(text: str) -> int:
    if len(text) <= _MAXIMUM_DIGITS and -_INT64 <= int(text) < _INT64:
        return int(text)
    raise ValueError(f"{text[:_MAXIMUM_DIGITS]}... is not an integer of 64 bits")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_MAXIMUM_DEPTH):
        level = [
            each
            for value in level
            if isinstance(value, dict | list)
            for each in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(_TOO_DEEP)


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON record with the sha256 of its fields beside them."""
    return {**record, CHECKSUM: _digest(record)}


def check_seal(record: Mapping[str, Any], where: object) -> None:
    """Check that a sealed record is as it was written.

    Raises:
        ValueError: Its checksum is missing, or that of other fields.
    """
    fields = {name: value for name, value in record.items() if name != CHECKSUM}
    if record.get(CHECKSUM) != _digest(fields):
        raise ValueError(
            f"{where}: its checksum is not that of its fields: the file is damaged or was edited"
        )


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- fields


Check = Callable[[Any, str], None]
"""Raises ValueError, which begins with the name given, unless the value is what it must be."""


def _kind(expected: str, accepts: Callable[[Any], bool]) -> Check:
    def check(value: Any, name: str) -> None:
        if not accepts(value):
            raise ValueError(f"{name}: expected {expected}, got {shorten(value)}")

    return check


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = _kind("a string", lambda value: isinstance(value, str))
FLAG = _kind("true or false", lambda value: isinstance(value, bool))
OBJECT = _kind("an object", lambda value: isinstance(value, dict))
TEXT_OR_INTEGER = _kind("a string or an integer", lambda value: isinstance(value, str) or _is_integer(value))
SHA256 = _kind(
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"),
)


def integer(minimum: int | None = None) -> Check:
    """An integer."""
    bound = "" if minimum is None else f" of at least {minimum}"
    return _kind(
        f"an integer{bound}",
        lambda value: _is_integer(value) and (minimum is None or value >= minimum),
    )


def number(minimum: float) -> Check:
    """A finite number."""
    return _kind(
        f"a finite number of at least {minimum:g}",
        lambda value: (
            (_is_integer(value) or isinstance(value, float)) and math.isfinite(value) and value >= minimum
        ),
    )


def list_of(item: Check) -> Check:
    """A list, each item checked."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected a list, got {shorten(value)}")
        for place, each in enumerate(value):
            item(each, f"{name}[{place}]")

    return check


def map_of(item: Check) -> Check:
    """An object of any keys, each value checked."""

    def check(value: Any, name: str) -> None:
        OBJECT(value, name)
        for key, each in value.items():
            item(each, f"{name}[{shorten(key)}]")

    return check


def object_of(fields: Mapping[str, Check]) -> Check:
    """An object with exactly these fields, each checked."""

    def check(value: Any, name: str) -> None:
        OBJECT(value, name)
        missing = sorted(fields.keys() - value.keys())
        if missing:
            raise ValueError(f"{name}: fields are missing: {', '.join(missing)}")
        unknown = sorted(value.keys() - fields.keys())
        if unknown:
            raise ValueError(f"{name}: unknown fields: {', '.join(shorten(each) for each in unknown[:5])}")
        for field, each in fields.items():
            each(value[field], f"{name}: {field}")

    return check


# --------------------------------------------------------------------------------------------- tensors


def load_tensors(content: bytes, where: object) -> dict[str, Tensor]:
    """The tensors of a safetensors file's content.

    Raises:
        ValueError: It is none.
    """
    try:
        return dict(load_safetensors(content))
    except TENSOR_ERRORS as error:
        raise ValueError(f"{where}: not a safetensors file ({shorten(str(error))})") from error
