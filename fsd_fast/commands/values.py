"""What values a flag takes: the types read off its annotation, its choices and its range.

A value comes as text from the command line or as a JSON value from a file. Both end in ``FlagType.check``, so that
``--bf16 maybe`` and ``"bf16": "false"`` are refused by the same rule.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

_INTEGER_LIMIT = 2**63 - 1
_TRUE = ("true", "yes", "y", "t", "1")
_FALSE = ("false", "no", "n", "f", "0")
_LONGEST_SHOWN = 60
_MOST_LISTED = 15
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "text",
    "list": "a list of texts",
    "object": "a JSON object",
}


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes.

    Args:
        minimum: The least number.
        maximum: The greatest number.
        above: Every number is greater than this one.
        below: Every number is less than this one.
        also: Numbers outside of the bounds that have a meaning of their own, such as -1 for "not given".
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        """Whether the number is in the range."""
        return number in self.also or (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Name the range for a message, as in "-1 or at least 1"."""
        bounds = [
            f"{word} {_number(bound)}"
            for word, bound in (
                ("at least", self.minimum),
                ("above", self.above),
                ("at most", self.maximum),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " or ".join([*map(_number, self.also), " and ".join(bounds)])


@dataclass(frozen=True)
class FlagType:
    """The values of one flag.

    Args:
        kinds: Names of the accepted JSON types: "bool", "int", "float", "text", "list", "object".
        choices: The texts that are accepted; None accepts every text.
        optional: Whether null is accepted.
        numbers: The accepted numbers.
    """

    kinds: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    optional: bool = False
    numbers: Range = Range()

    @classmethod
    def of(
        cls, annotation: Any, numbers: Range | None = None, choices: tuple[str, ...] | None = None
    ) -> FlagType:
        """Read the type off a dataclass field's resolved annotation.

        An enumeration stands for the texts of its members, beside ``str`` as well as alone. Types that neither a
        command line nor JSON can hold are left out.
        """
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        members = typing.get_args(annotation) if union else (annotation,)
        kinds: list[str] = []
        for member in members:
            origin = typing.get_origin(member) or member
            if origin is Literal:
                choices = choices or tuple(value for value in typing.get_args(member) if value is not False)
                kinds.append("bool" if False in typing.get_args(member) else "text")
            elif isinstance(origin, type) and issubclass(origin, Enum):
                choices = choices or tuple(str(value.value) for value in origin)
                kinds.append("text")
            elif origin is list and typing.get_args(member) == (str,):
                kinds.append("list")
            elif origin in (bool, int, float, str, dict):
                kinds.append({str: "text", dict: "object"}.get(origin, origin.__name__))
        return cls(tuple(dict.fromkeys(kinds)), choices or None, type(None) in members, numbers or Range())

    @property
    def takes_several(self) -> bool:
        """Whether a command line may give several texts, as in ``--report_to tensorboard wandb``."""
        return "list" in self.kinds

    def from_text(self, words: list[str]) -> Any:
        """Turn the words behind a flag into a value of one of its kinds.

        Args:
            words: One word, or several where ``takes_several``.

        Returns:
            A JSON value; ``check`` has yet to accept it.
        """
        if self.takes_several:
            return words if len(words) > 1 or "text" not in self.kinds else words[0]
        [word] = words
        if self.choices and word in self.choices:
            return word
        if "bool" in self.kinds and word.lower() in (*_TRUE, *_FALSE):
            return word.lower() in _TRUE
        for kind, convert in (("int", int), ("float", float)):
            if kind in self.kinds:
                try:
                    return convert(word)
                except ValueError:
                    continue
        if "object" in self.kinds and word.startswith("{"):
            try:
                return json.loads(word)
            except (ValueError, RecursionError):
                return word
        return word

    def check(self, value: Any) -> Any:
        """Check a JSON value and return it; whole numbers become floats where a float is wanted.

        Raises:
            ValueError: The value is of another type, no choice or out of range. The message says what was
                expected and what came; the caller names the flag.
        """
        if value is None and self.optional:
            return None
        kind = self._kind_of(value)
        if kind is None:
            raise ValueError(f"expected {self._expected()}, got {shown(value)}")
        if kind == "float":
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
            if not math.isfinite(value):
                raise ValueError(f"expected a finite number, got {shown(value)}")
        if kind == "int" and abs(value) > _INTEGER_LIMIT:
            raise ValueError(f"expected a whole number of 64 bits, got {shown(value)}")
        if kind in ("int", "float") and value not in self.numbers:
            raise ValueError(f"expected {self.numbers}, got {shown(value)}")
        for text in [value] if kind == "text" else value if kind == "list" else []:
            self._check_text(text)
        return value

    def _kind_of(self, value: Any) -> str | None:
        if isinstance(value, bool):
            found = "bool"
        elif isinstance(value, int):
            found = "int" if "int" in self.kinds else "float"
        elif isinstance(value, list):
            found = "list" if all(isinstance(entry, str) for entry in value) else "list of other things"
        else:
            found = {float: "float", str: "text", dict: "object"}.get(type(value), "nothing")
        return found if found in self.kinds else None

    def _expected(self, text: str = "") -> str:
        choices = ", ".join(filter(None, self.choices or ()))
        if self.choices and len(self.choices) > _MOST_LISTED:
            near = difflib.get_close_matches(text, self.choices, n=3, cutoff=0.5)
            choices = f"{len(self.choices)} names{', such as ' if near else ''}{', '.join(near)}"
        words = [
            f"one of {choices}" if kind == "text" and self.choices else _WORDS[kind] for kind in self.kinds
        ]
        return " or ".join(words) or "no value that text can hold"

    def _check_text(self, text: str) -> None:
        if self.choices and text not in self.choices:
            raise ValueError(f"expected {self._expected(text)}, got {shown(text)}")
        if not text.strip() and not self.choices:
            raise ValueError(f"expected {self._expected(text)}, got {shown(text)}")
        if "\0" in text or _is_broken(text):
            raise ValueError(f"expected UTF-8 text without NUL, got {shown(text)}")


def _number(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def shown(value: Any) -> str:
    """Show a JSON value in a message, cut where it is long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out a number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
