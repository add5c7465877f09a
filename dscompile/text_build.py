"""From the words of a text back to objects: operators, fake tensors that share storage as the text says, constants.

The reader (:mod:`dscompile.text_parse`) finds words and positions; this file knows PyTorch. Every failure is a
:class:`BuildError`, which the reader turns into a :class:`~dscompile.errors.TextError` at the word's position.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from dscompile.errors import nearest
from dscompile.text_symbols import Symbols, expr_of
from dscompile.text_values import DTYPES, PYTHON_FUNCTIONS, constant_digest, extent, is_float8
from dscompile.torch_compat import FakeTensor, FakeTensorMode, OpOverload, OpOverloadPacket, operator_names


class BuildError(ValueError):
    """A word that names nothing, or a value that cannot exist."""


@dataclass(frozen=True, slots=True)
class Schema:
    """How an operator may be called: names of its positional arguments, all names, and those without a default."""

    positional: tuple[str, ...]
    names: frozenset[str]
    required: tuple[str, ...]

    @classmethod
    def of(cls, target: Any) -> Schema | None:
        """The schema of an operator; None for Python functions, which are not checked."""
        if not isinstance(target, OpOverload):
            return None
        arguments = target._schema.arguments
        return cls(
            tuple(a.name for a in arguments if not a.kwarg_only),
            frozenset(a.name for a in arguments),
            tuple(a.name for a in arguments if not a.has_default_value()),
        )


def resolve(name: str) -> Callable[..., Any]:
    """The operator or function that ``name`` spells. Raises :class:`BuildError` with the nearest known name."""
    python = PYTHON_FUNCTIONS.get(name)
    if python is not None:
        return python
    parts = name.split(".")
    if len(parts) < 3:
        raise BuildError(f"unknown operator {name!r}.{nearest(name, [*PYTHON_FUNCTIONS, *operator_names()])}")
    packet_name, overload_name = ".".join(parts[:2]), parts[2]
    packet = getattr(getattr(torch.ops, parts[0], None), parts[1], None)
    overloads = packet.overloads() if isinstance(packet, OpOverloadPacket) else []
    if not overloads:
        raise BuildError(f"unknown operator {packet_name!r}.{nearest(packet_name, operator_names())}")
    if overload_name not in overloads or len(parts) > 3:
        wrong = ".".join(parts[2:])
        raise BuildError(f"operator {packet_name!r} has no overload {wrong!r}.{nearest(wrong, overloads)}")
    overload: Callable[..., Any] = getattr(packet, overload_name)
    return overload


class Builder:
    """Makes the values of one graph under one fresh fake mode and shape environment."""

    def __init__(self, constants: Mapping[str, str]) -> None:
        """``constants`` maps the digests of large constants to their base64 data."""
        self.symbols = Symbols()
        self.mode = FakeTensorMode(shape_env=self.symbols.env, allow_non_fake_inputs=True)
        self.constants = constants
        # The meta tensor inside each fake one: aliases are made of it, without a trip through the fake mode.
        self.metas: dict[int, tuple[FakeTensor, torch.Tensor]] = {}

    def tensor(
        self,
        dtype: torch.dtype,
        size: tuple[Any, ...],
        stride: tuple[Any, ...],
        offset: Any,
        device: str,
        base: FakeTensor | None,
        nbytes: Any,
    ) -> FakeTensor:
        """A fake tensor in the storage of ``base`` if given, else in its own of ``nbytes`` (None: what it needs)."""
        if len(size) != len(stride):
            raise BuildError(f"{len(size)} sizes but {len(stride)} strides")
        # torch checks sizes and devices itself, with many kinds of exception (overflow, negative sizes, bad devices).
        try:
            meta = self._meta(dtype, size, stride, offset, base, nbytes)
            made = FakeTensor(self.mode, meta, torch.device(device))
        except BuildError:
            raise
        except Exception as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise BuildError(f"no such tensor can exist: {first}") from None
        self.metas[id(made)] = made, meta
        return made

    def _meta(
        self, dtype: torch.dtype, size: Any, stride: Any, offset: Any, base: FakeTensor | None, nbytes: Any
    ) -> torch.Tensor:
        static = all(type(n) is int for n in (*size, *stride, offset))
        if base is not None:
            root = self.metas[id(base)][1]
            storage = root.untyped_storage()
            have = storage.nbytes()
            need = extent(size, stride, offset) * dtype.itemsize if static else 0
            if type(have) is int and need > have:
                raise BuildError(f"the tensor reaches {need} bytes into a storage of {have}")
            if dtype == root.dtype:
                return root.as_strided(size, stride, offset)  # a tenth of the cost of set_ with symbolic sizes
        elif nbytes is not None:
            storage = torch.empty(nbytes, dtype=torch.uint8, device="meta").untyped_storage()
            need = extent(size, stride, offset) * dtype.itemsize if static else 0
            if type(nbytes) is int and need > nbytes:
                raise BuildError(f"the tensor needs {need} bytes, its storage has {nbytes}")
        elif static and offset == 0:
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        else:
            groups = [tuple(map(expr_of, group)) for group in (size, stride)]
            count = self.symbols.of_expr(sympy.expand(extent(groups[0], groups[1], expr_of(offset))))
            return torch.empty(count, dtype=dtype, device="meta").as_strided(size, stride, offset)
        meta = torch.empty(0, dtype=dtype, device="meta")
        return meta.set_(storage, offset, size, stride)

    def inline_constant(self, like: Any, elements: list[Any]) -> torch.Tensor:
        """A real tensor with the dtype, shape and strides of ``like`` and the given elements in row-major order."""
        empty = self._empty_constant(like)
        if len(elements) != empty.numel():
            raise BuildError(f"{len(elements)} elements for a constant of {empty.numel()}")
        try:
            data = torch.tensor(elements, dtype=torch.float32 if is_float8(empty.dtype) else empty.dtype)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise BuildError(f"not the elements of a {empty.dtype} constant: {error}") from None
        return empty.copy_(data.view(empty.shape))

    def large_constant(self, like: Any, digest: str) -> torch.Tensor:
        """A real tensor whose bytes the side table holds under ``digest``."""
        encoded = self.constants.get(digest)
        if encoded is None:
            raise BuildError(
                f"the data of constant sha256:{digest[:12]}... is in the side table, which was not given; "
                "keep the .json file beside the .txt file"
            )
        empty = self._empty_constant(like)
        try:
            raw = bytearray(base64.b64decode(encoded, validate=True))
            data = torch.frombuffer(raw, dtype=torch.uint8).view(empty.dtype).view(empty.shape)
        except (binascii.Error, RuntimeError, ValueError) as error:
            raise BuildError(f"the side table's data for this constant does not fit its type: {error}") from None
        result = empty.copy_(data)
        if constant_digest(result) != digest:
            raise BuildError("the side table's data does not have this digest: the file is damaged")
        return result

    def _empty_constant(self, like: Any) -> torch.Tensor:
        if not isinstance(like, FakeTensor) or any(type(n) is not int for n in (*like.shape, *like.stride())):
            raise BuildError("a constant needs a tensor type with fixed sizes")
        if like.numel() > 1 << 28 or like.untyped_storage().nbytes() > 1 << 31:
            raise BuildError("a constant of this size is not plausible")
        device = like.device if like.device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
        return torch.empty_strided(tuple(like.shape), like.stride(), dtype=like.dtype, device=device)


def dtype_of(name: str) -> torch.dtype:
    """The dtype that ``name`` spells. Raises :class:`BuildError` with the nearest known name."""
    dtype = DTYPES.get(name)
    if dtype is None:
        raise BuildError(f"unknown dtype {name!r}.{nearest(name, DTYPES)}")
    return dtype
