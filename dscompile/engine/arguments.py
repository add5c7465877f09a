"""Keyword arguments that come from a configuration file, checked against the callable that will get them.

A wrong key or value is the user's mistake in a file, so the error names the key, the nearest valid one and the owner,
not a constructor's traceback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from dscompile.errors import ConfigError, nearest

T = TypeVar("T")


def accepted(call: Callable[..., Any], given_by_us: int = 1) -> list[str]:
    """Names of the keyword arguments of ``call`` after the first ``given_by_us`` ones (parameters, an optimizer)."""
    return list(inspect.signature(call).parameters)[given_by_us:]


def check_keys(owner: str, keys: Iterable[str], valid: Collection[str]) -> None:
    """Raise :class:`ConfigError` for the first key that ``owner`` does not have."""
    for key in keys:
        if key not in valid:
            raise ConfigError(
                f"{owner}: unknown parameter {key!r}.{nearest(key, valid)} Valid ones: {', '.join(sorted(valid))}."
            )


def find_name(what: str, name: str, known: Iterable[str]) -> str:
    """The name in ``known`` that is ``name`` but for case.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{what}: the type must be a string, got {type(name).__name__} {name!r}.")
    spelt = {one.lower(): one for one in known}
    found = spelt.get(name.lower())
    if found is None:
        near = nearest(name.lower(), spelt)
        for low, one in spelt.items():
            near = near.replace(f"'{low}'", f"'{one}'")
        raise ConfigError(f"unknown {what} {name!r}.{near} Known: {', '.join(sorted(spelt.values(), key=str.lower))}.")
    return found


def build(owner: str, make: Callable[[], T], arguments: Mapping[str, Any]) -> T:
    """What ``make`` returns; its ``TypeError`` or ``ValueError`` about a value becomes a :class:`ConfigError`."""
    try:
        return make()
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{owner}: {error} (parameters given: {dict(arguments)!r}).") from error
