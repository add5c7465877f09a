"""The vocabulary of the table of DeepSpeed's keys: what a key may hold, and what becomes of it here.

The tables themselves are data: :mod:`dscompile.engine.keys_training`, :mod:`dscompile.engine.keys_zero` and
:mod:`dscompile.engine.keys_features`. Names and defaults are those of DeepSpeed's configuration page and, where the two
differ, of its code (release 0.19.8); the texts are ours.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final


class Unset(enum.Enum):
    """A key without a default: DeepSpeed requires it, or does not say."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "unset"


UNSET: Final = Unset.UNSET


class State(enum.Enum):
    """What happens to a key's value."""

    ACTED = "acted on"
    """It changes what the engine does; it shows in :class:`~dscompile.engine.ds_config.EngineConfig`."""
    ACCEPTED = "accepted"
    """Any valid value is taken, and recorded with the reason why it changes nothing."""
    REFUSED = "refused"
    """Only the default is taken; anything else is an error that names the key and the reason."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value: its name in messages, and a function that returns the value or raises ``ValueError``."""

    name: str
    read: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of DeepSpeed's configuration.

    Attributes:
        path: the dotted path from the top of the file.
        kind: what it may hold; a None is taken where the default is None.
        default: DeepSpeed's default.
        example: a valid value that is not the default (tests set each key to it).
        state: what becomes of the value.
        why: what it does here, or why it changes nothing, or why it is refused and what to do instead.
        auto: what the value ``"auto"`` of Hugging Face's files means, or UNSET where it is refused.
    """

    path: str
    kind: Kind
    default: Any
    example: Any
    state: State
    why: str
    auto: Any = UNSET

    @property
    def section(self) -> str:
        """The path without its last part; empty for a key at the top."""
        return self.path.rpartition(".")[0]


# -- kinds -------------------------------------------------------------------------------------------------------------


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError("expected an integer")
    return int(number)  # 5e8 is how DeepSpeed's files write an integer


def _in_range(read: Callable[[Any], Any], low: float | None, high: float | None) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        number = read(value)
        if low is not None and number < low:
            raise ValueError(f"must be at least {low:g}")
        if high is not None and number > high:
            raise ValueError(f"must be at most {high:g}")
        return number

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("expected a list")
    return list(value)


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("expected an object")
    return dict(value)


BOOLEAN = Kind("boolean", _boolean)
TEXT = Kind("text", _text)
LIST = Kind("list", _list)
TABLE = Kind("object", _table)
ANY = Kind("any", lambda value: value)
DEGREE = Kind("integer", lambda value: 0 if value == 1 else _in_range(_integer, 0, None)(value))
"""Ranks of a kind of parallelism; 0 and 1 both mean none."""


def integer(low: int | None = None, high: int | None = None) -> Kind:
    """Integers from ``low`` to ``high``, also written as ``5e8``."""
    return Kind("integer", _in_range(_integer, low, high))


def number(low: float | None = None, high: float | None = None) -> Kind:
    """Finite numbers from ``low`` to ``high``."""
    return Kind("number", _in_range(_number, low, high))


def choice(*options: str) -> Kind:
    """One of some words, in any case."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in options:
            raise ValueError(f"expected one of {', '.join(options)}")
        return value.lower()

    return Kind(" or ".join(options), read)


_DTYPES: Final[Mapping[str, str]] = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}


def _dtype(value: Any) -> str:
    name = value.lower().removeprefix("torch.") if isinstance(value, str) else ""
    if name not in _DTYPES:
        raise ValueError("expected fp32, fp16 or bf16")
    return _DTYPES[name]


DTYPE = Kind("fp32, fp16 or bf16", _dtype)


# -- rows of the tables ------------------------------------------------------------------------------------------------


def acted(path: str, kind: Kind, default: Any, example: Any, what: str, *, auto: Any = UNSET) -> Key:
    """A key that the engine acts on; ``what`` says how."""
    return Key(path, kind, default, example, State.ACTED, what, auto)


def accepted(path: str, kind: Kind, default: Any, example: Any, why: str) -> Key:
    """A key any of whose values changes nothing here; ``why`` says why."""
    return Key(path, kind, default, example, State.ACCEPTED, why)


def refused(path: str, kind: Kind, default: Any, example: Any, why: str) -> Key:
    """A key of which only the default is taken; ``why`` says what is missing and what to do."""
    return Key(path, kind, default, example, State.REFUSED, why)


def missing_feature(section: str, why: str, *names: str, gate: str = "enabled") -> tuple[Key, ...]:
    """A section whose feature is missing: its switch ``gate`` is refused, its other keys mean nothing while it is off.

    ``names`` are those other keys; what they hold is DeepSpeed's business and is not checked.
    """
    off = "read only while the section is on, which is refused"
    switch = refused(f"{section}.{gate}", BOOLEAN, False, True, why)
    return switch, *(Key(f"{section}.{name}", ANY, UNSET, 1, State.REFUSED, off) for name in names)
