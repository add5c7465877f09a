"""Lets ``transformers.Trainer(torch_compile_backend="dscompile")`` name this backend, with no import of ours.

Hugging Face's accelerate, under the Trainer, takes only the backend names of an enumeration of its own. PyTorch calls
:func:`register` whenever it is imported, through its entry point group ``torch.backends``; accelerate may be imported
later, and is then taught the one name through ``Enum._missing_``, the standard library's hook for values that an
enumeration does not list. Names that accelerate has, and its error for unknown ones, stay as they are.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "accelerate.utils.dataclasses"
_NAME = "DSCOMPILE"


def register() -> None:
    """Teach accelerate the name now, or as soon as it is imported. Calling it again changes nothing."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _teach(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, once, the way everybody else would, and looks at it after it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module through its own loader, which stays the one that the module shows."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        _teach(module)


def _teach(module: ModuleType) -> None:
    names = getattr(module, "DynamoBackend", None)
    if not isinstance(names, type) or not issubclass(names, Enum) or _NAME in names.__members__:
        return  # an accelerate without the enumeration, or one that knows the name
    if "_missing_" not in vars(names):
        names._missing_ = classmethod(_missing)  # type: ignore[assignment]


def _missing(names: Any, value: object) -> Any:
    """The member for our name, made like those of a string enumeration; None for others: the usual ``ValueError``."""
    if value != _NAME:
        return None
    member = str.__new__(names, _NAME)
    member._name_ = member._value_ = _NAME
    return member
