"""Reading a DeepSpeed configuration, and checking it against the table of keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from dscompile.engine.keys import UNSET, Key, State
from dscompile.engine.keys_features import FEATURES
from dscompile.engine.keys_training import TRAINING
from dscompile.engine.keys_zero import ZERO
from dscompile.errors import ConfigError, nearest

KEYS: Final[Mapping[str, Key]] = MappingProxyType({key.path: key for key in (*TRAINING, *ZERO, *FEATURES)})
"""Every key of DeepSpeed's configuration, in the order of its page."""

OURS: Final = "dscompile"
"""The section with this compiler's own options: the fields of :class:`dscompile.config.Config`."""

_GATES: Final[Mapping[str, tuple[str, Any]]] = MappingProxyType(
    {
        **{key.section: (key.path, False) for key in KEYS.values() if key.path.endswith(".enabled")},
        "zero_optimization.offload_param": ("zero_optimization.offload_param.device", "none"),
        "zero_optimization.offload_optimizer": ("zero_optimization.offload_optimizer.device", "none"),
        "tensor_parallel": ("tensor_parallel.autotp_size", 0),
        **{
            key.section.rpartition(".")[0]: (key.path, False)
            for key in KEYS.values()
            if key.path.endswith(".shared_parameters.enabled")
        },
    }
)
"""Section -> the key that turns it on, and the value with which it is off."""

_ON_CPU: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "zero_optimization.offload_param.device": "cpu",
        "zero_optimization.offload_optimizer.device": "cpu",
        "zero_optimization.cpu_offload": True,
        "zero_optimization.cpu_offload_param": True,
        "activation_checkpointing.cpu_checkpointing": True,
    }
)
"""What asks for host memory, where everything lies when training runs on the CPU."""

_ALIASES: Final[Mapping[str, str]] = MappingProxyType({"bfloat16": "bf16"})

_SECTIONS: Final = frozenset(
    section
    for key in KEYS.values()
    for depth in range(1, key.path.count(".") + 1)
    for section in [".".join(key.path.split(".")[:depth])]
)


@dataclass(frozen=True)
class Accepted:
    """A value that was given, is not the default, and changes nothing."""

    key: str
    value: Any
    why: str


def read(source: Mapping[str, Any] | str | Path) -> tuple[str, dict[str, Any]]:
    """A configuration's origin, for messages, and its content.

    Raises:
        ConfigError: no file, not JSON, no object, or a key that stands twice.
    """
    if isinstance(source, Mapping):
        return "config", dict(source)
    if isinstance(source, str) and source.lstrip().startswith("{"):
        where, text = "config", source
    elif isinstance(source, (str, Path)):
        where = str(source)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{where}: cannot read the configuration: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: not a JSON text file: {error.reason} at byte {error.start}.") from None
    else:
        kind = type(source).__name__
        raise ConfigError(f"config: expected a mapping, a file's path or JSON text, got {kind} {source!r}.")
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(where, pairs))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}.") from None
    except RecursionError:
        raise ConfigError(f"{where}: not a configuration: objects are nested too deeply.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return where, value


def _unique(where: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{where}: key {twice!r} stands twice in one object; remove one of them.")
    return table


# -- checking against the table ----------------------------------------------------------------------------------------


def flatten(where: str, given: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Every given key by its path. Raises for unknown keys and for sections that are no objects."""
    found: dict[str, Any] = {}
    for given_name, value in given.items():
        name = given_name if section else _ALIASES.get(given_name, given_name)
        path = f"{section}.{name}" if section else str(name)
        if str(name) != str(given_name) and name in given:
            raise ConfigError(f"{where}: {path} is given under two names, also {given_name}; remove one of them.")
        if path in KEYS:
            found[path] = value
        elif path in _SECTIONS:
            if path == "zero_optimization" and isinstance(value, bool):
                value = {"stage": int(value)}  # the oldest form of the section
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {path}: expected an object of options, got {value!r}.")
            found |= flatten(where, value, path)
        elif path != OURS:
            prefix = f"{section}." if section else ""
            known = sorted({p[len(prefix) :].split(".")[0] for p in KEYS if p.startswith(prefix)})
            names = [*known, OURS] if not section else known
            place = f" in section {section!r}" if section else ""
            raise ConfigError(
                f"{where}: unknown key {str(name)!r}{place}.{nearest(str(name), names)} "
                "'dscompile config-keys' lists every key."
            )
    return found


def _value(where: str, key: Key, value: Any) -> Any:
    """A given value as the key's kind. Raises if it is none."""
    if value == "auto" and not (key.default == "auto" or isinstance(key.default, str)):
        if key.auto is UNSET:
            raise ConfigError(
                f"{where}: {key.path} = 'auto': Hugging Face's Trainer fills it in from its own arguments; write the "
                "value."
            )
        return key.auto
    if value is None and key.default is None:
        return None
    try:
        return key.kind.read(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {key.path} = {value!r}: {error}.") from None


def check(where: str, given: Mapping[str, Any], device: str) -> tuple[dict[str, Any], tuple[Accepted, ...]]:
    """Every key's value, defaults included, and what was accepted without effect.

    Raises:
        ConfigError: an unknown key, a wrong value, or one that is refused.
    """
    flat = flatten(where, given)
    values = {path: key.default for path, key in KEYS.items()}
    explicit = {path: _value(where, KEYS[path], value) for path, value in flat.items()}
    values |= explicit
    notes: list[Accepted] = []
    switches = {gate for gate, _ in _GATES.values()}
    for path, value in sorted(explicit.items(), key=lambda item: item[0] not in switches):
        key = KEYS[path]
        if value == key.default:
            continue
        off = _switched_off(path, values, device)
        if off is not None:
            values[path] = key.default
            notes.append(Accepted(path, value, off))
        elif path in _ON_CPU and device == "cpu" and value == _ON_CPU[path]:
            notes.append(Accepted(path, value, "training runs on the CPU, where everything is in host memory"))
        elif key.state is State.REFUSED:
            raise ConfigError(f"{where}: {path} = {value!r} is refused: {key.why}.")
        elif key.state is State.ACCEPTED:
            notes.append(Accepted(path, value, key.why))
    return values, tuple(notes)


def _switched_off(path: str, values: Mapping[str, Any], device: str) -> str | None:
    """Why a key means nothing, if the section around it is off."""
    section = KEYS[path].section
    while section:
        if section in _GATES:
            gate, off = _GATES[section]
            if path != gate and not _serves_elsewhere(path, values):
                if values[gate] == off:
                    return f"{gate} is {json.dumps(off)}"
                if gate in _ON_CPU and device == "cpu" and values[gate] == _ON_CPU[gate]:
                    return "training runs on the CPU, where everything is in host memory"
        section = section.rpartition(".")[0]
    return None


def _serves_elsewhere(path: str, values: Mapping[str, Any]) -> bool:
    """The options of fp16's loss scale also serve fp16 autocast."""
    return path.startswith("fp16.") and values["torch_autocast.enabled"] and values["torch_autocast.dtype"] == "fp16"
