"""The vocabulary of the text format: how operators, dtypes, numbers, strings and nested arguments are spelt.

The reader (:mod:`dscompile.text_parse`) uses the same tables, so that a word cannot be printed that cannot be read.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.graph import GraphInput, GraphKind, InputKind, NodeInfo, Phase, Role
from dscompile.text_symbols import expr_of, expr_text
from dscompile.torch_compat import FakeTensor, HigherOrderOperator, OpOverload, no_modes

VERSION = 1
HEADER = f"dscompile graph v{VERSION}"

INLINE_CONSTANT = 32
"""Constants of at most this many elements are written into the text; larger ones as a digest (data: side table)."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for a value that is no tensor or number (a generator, a process group): only its type's name is kept."""

    type_name: str


_SHORT_DTYPES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint64": "u64",
    "uint32": "u32",
    "uint16": "u16",
    "uint8": "u8",
    "complex128": "c128",
    "complex64": "c64",
    "complex32": "c32",
}


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _SHORT_DTYPES.get(name, name)


DTYPES: dict[str, torch.dtype] = {_dtype_name(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

WORDS: dict[str, Any] = {
    **DTYPES,
    **{
        str(v).removeprefix("torch."): v
        for v in vars(torch).values()
        if isinstance(v, (torch.layout, torch.memory_format))
    },
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
}
"""What ``!word`` means: dtypes, layouts, memory formats, and the floats that have no literal."""
_WORD_OF = {value: word for word, value in WORDS.items() if not isinstance(value, float)}

PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in operator.__all__},
    **{f"math.{name}": f for name, f in vars(math).items() if callable(f) and not name.startswith("_")},
    **{f"torch.{name}": f for name, f in vars(torch).items() if name.lstrip("_").startswith("sym_") and callable(f)},
    **{f"builtins.{name}": getattr(builtins, name) for name in ("abs", "max", "min", "round", "int", "float", "bool")},
}
"""Functions on symbolic sizes (and ``getitem``) that appear in graphs beside operators."""
_PYTHON_NAMES = {id(function): name for name, function in reversed(PYTHON_FUNCTIONS.items())}

PLAIN_NAME = re.compile(r"\w[\w.$-]*", re.ASCII)
KEYWORDS = frozenset({"why", "trainable"})


def name_text(name: str) -> str:
    """A fully qualified name or similar: bare if it is plain, else a quoted string."""
    return name if PLAIN_NAME.fullmatch(name) and name not in KEYWORDS else json.dumps(name)


def target_text(node: fx.Node) -> str:
    """The callee of a node; callees that text cannot rebuild print as ``higher_order.*`` or ``!lost("...")``."""
    target = node.target
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    python = _PYTHON_NAMES.get(id(target))
    if python is not None:
        return python
    name = target if isinstance(target, str) else getattr(target, "__qualname__", type(target).__name__)
    return f"!lost({json.dumps(f'{node.op} {name}')})"


def value_text(value: Any) -> str:
    """An argument: nodes, numbers (``1``, ``1.0`` and ``True`` stay apart), strings, containers, torch's enums."""
    kind = type(value)
    if isinstance(value, fx.Node):
        return "%" + value.name
    if value is None or kind is bool or kind is int:
        return str(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else "!" + repr(value)
    if kind is str:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, tuple) and (kind is tuple or kind is torch.Size):
        return f"({', '.join(map(value_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{value_text(k)}: {value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({value_text(value.start)}, {value_text(value.stop)}, {value_text(value.step)})"
    return _rare_text(value)


def _rare_text(value: Any) -> str:
    if isinstance(value, complex):
        return f"!complex({value_text(value.real)}, {value_text(value.imag)})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return "!" + _WORD_OF[value]
    if isinstance(value, torch.device):
        return f"@{value}"
    if value is Ellipsis:
        return "..."
    symbolic = symbolic_text(value)
    if symbolic is not None:
        return symbolic
    return f"!lost({json.dumps(type(value).__name__)})"


def symbolic_text(value: Any) -> str | None:
    """``SymInt(s0)``, ``SymFloat(...)``, ``SymBool(...)``, or None for anything else."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__}({expr_text(expr_of(value))})"
    return None


def extent(size: tuple[Any, ...], stride: tuple[Any, ...], offset: Any) -> Any:
    """Elements of storage that a strided tensor reaches, counted from the storage's start; 0 for an empty tensor."""
    if any(n == 0 for n in size):
        return 0
    return offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def input_info(what: GraphInput, kind: GraphKind) -> NodeInfo:
    """The meaning that an input has unless its line says otherwise."""
    late = what.kind is InputKind.TANGENT or kind is GraphKind.BACKWARD
    return NodeInfo(Role.INPUT, Phase.BACKWARD if late else Phase.FORWARD, what.fqn)


def output_info(kind: GraphKind) -> NodeInfo:
    """The meaning that the output node has unless its line says otherwise."""
    late = kind in (GraphKind.JOINT, GraphKind.BACKWARD)
    return NodeInfo(Role.OUTPUT, Phase.BACKWARD if late else Phase.FORWARD)


def constant_text(value: Any) -> str:
    """The data of a ``get_attr`` constant: its elements, its digest if it is large, or ``fake`` if there is no data."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
        return f"!lost({json.dumps(type(value).__name__)})"
    if isinstance(value, FakeTensor) or value.device.type == "meta":
        return "fake"
    if value.numel() > INLINE_CONSTANT or not can_inline(value.dtype):
        return "sha256:" + constant_digest(value)
    with no_modes():  # dumps are written while AOTAutograd traces with fake tensors
        data = value.detach().cpu().flatten()
        return value_text((data.float() if is_float8(value.dtype) else data).tolist())


def can_inline(dtype: torch.dtype) -> bool:
    """Whether elements of ``dtype`` have exact literals."""
    return dtype in _INLINE_DTYPES or is_float8(dtype)


_INLINE_DTYPES = frozenset([*(DTYPES[name] for name in _SHORT_DTYPES.values()), torch.bool])


def is_float8(dtype: torch.dtype) -> bool:
    """Whether a dtype is an 8-bit float, whose elements are written as the equal float32."""
    return dtype.is_floating_point and dtype.itemsize == 1


def constant_bytes(value: torch.Tensor) -> bytes:
    """The elements in row-major order, as the machine holds them."""
    with no_modes():
        return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def constant_digest(value: torch.Tensor) -> str:
    """SHA-256 of the elements in row-major order."""
    return hashlib.sha256(constant_bytes(value)).hexdigest()
