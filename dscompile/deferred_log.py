"""The log of a deferred construction: what was written to each storage, and how to compute any storage from it.

The log knows storages, not tensors: an operand is a :class:`Ref`, a strided window on a :class:`Cell`. Views therefore
need no entry, and ``.data``, ``set_`` and ties need no rule. A random operation stores the state its generator had, so
each storage is computed by itself, from the operations it depends on and no others, in any order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dscompile.deferred_rejection import TRUNCATED
from dscompile.errors import UnsupportedError
from dscompile.torch_compat import OpOverload, pytree

ALL = 1 << 62
"""A time after every logged operation."""

WORTH_RETURNING = 1 << 20
"""Bytes of a freed storage from which the allocator is asked to return memory to the system."""


@dataclass(eq=False, slots=True)
class Cell:
    """One storage of the construction.

    ``writes`` are the operations that created or changed it, oldest first; ``given`` holds the bytes of a tensor that
    came from outside with its values; ``read`` says that an operation on other storages read it since it was last
    written whole. ``anchor`` is the fake storage, kept so that its identity is not given to another.
    """

    device: torch.device
    nbytes: int
    anchor: object
    given: torch.UntypedStorage | None = None
    writes: list[Op] = field(default_factory=list)
    read: bool = False


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor as a window on a cell: sizes, strides and offset in elements of ``dtype``; the lazy bits."""

    cell: Cell
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool = False
    neg: bool = False

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The real tensor: this window on ``storage``."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        tensor = tensor.conj() if self.conj else tensor
        return torch.ops.aten._neg_view.default(tensor) if self.neg else tensor

    def whole(self) -> bool:
        """Whether the window covers every byte of its cell exactly once."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.offset == 0 and expected * self.dtype.itemsize == self.cell.nbytes


@dataclass(frozen=True, slots=True)
class Draw:
    """The generator of a random operation: its device, its state before it ran, and where it stands in ``leaves``."""

    device: torch.device
    state: torch.Tensor
    leaf: int | None


@dataclass(eq=False, slots=True)
class Op:
    """One logged call: ``func(*args, **kwargs)`` as ``spec`` over ``leaves``, tensors replaced by their :class:`Ref`.

    ``reads``: cells whose content before the call matters; ``writes``: cells it changes or creates; ``overwrites``:
    the one it rewrites whole; ``creates``: (position among the outputs, window) of each output with a storage of its
    own. ``dtype`` is the default dtype at the time.
    """

    seq: int
    func: OpOverload
    spec: Any
    leaves: tuple[Any, ...]
    reads: tuple[Cell, ...]
    writes: tuple[Cell, ...]
    overwrites: Ref | None
    creates: tuple[tuple[int, Ref], ...]
    draw: Draw | None
    dtype: torch.dtype
    where: str


@dataclass(slots=True)
class _Kept:
    storage: torch.UntypedStorage
    version: int
    """``seq`` of the last write that it holds; -1 for what was given from outside."""


Env = dict[Cell, _Kept]


class Log:
    """The operations of one construction, and an evaluator over them.

    ``peak`` is the most bytes of real storages that were alive at once for an evaluation (results, intermediates and
    the cache; not scratch inside a kernel); ``largest`` the largest storage of the construction; ``replayed`` counts
    the operations that were run to get values.
    """

    def __init__(self) -> None:
        self.length = 0
        self.replayed = 0
        self.peak = 0
        self.largest = 0
        self._cache: Env = {}
        self._steering = 0

    def add(self, op: Op) -> None:
        """Append ``op``; forget what it makes unreachable."""
        self.length += 1
        for cell in op.reads:
            cell.read |= any(written is not cell for written in op.writes)
        whole = op.overwrites
        for cell in op.writes:
            self.largest = max(self.largest, cell.nbytes)
            if whole is not None and cell is whole.cell and not cell.read:
                cell.writes.clear()
            cell.writes.append(op)

    def value(self, cell: Cell) -> tuple[torch.UntypedStorage, int]:
        """The final content of ``cell`` as a new storage, and the most bytes that computing it held at once."""
        before, self.peak = self.peak, 0
        kept = self._evaluate([cell], ALL, {}, ends=True)[cell]
        peak, self.peak = self.peak, max(before, self.peak)
        return (kept.storage.clone() if kept.storage is cell.given else kept.storage), peak

    def now(self, cells: Iterable[Cell], seq: int) -> dict[Cell, torch.UntypedStorage]:
        """The content of ``cells`` just before ``seq``, to be read only; recent values stay in a cache."""
        wanted = list(cells)
        self._cache, cache = {}, self._cache
        env = self._evaluate(wanted, seq, cache, ends=False)
        self._cache = env
        found = {cell: env[cell].storage for cell in wanted}
        self._trim(0)
        return found

    def run_now(self, op: Op) -> list[Any]:
        """Run ``op`` for real at its place in the construction, with the live generator; its flat outputs."""
        self._trim(sum(ref.cell.nbytes for _, ref in op.creates) + (op.overwrites.cell.nbytes if op.overwrites else 0))
        self._cache, cache = {}, self._cache
        env = self._evaluate(list(op.reads), op.seq, cache, ends=False)
        outputs = self._run(op, env, live=True)
        self._cache = env
        self._trim(0)
        return outputs

    def forget(self) -> None:
        """Drop every cached value."""
        self._cache = {}

    def _room(self) -> int:
        """Bytes that values kept for later may take: twice the largest storage, or what a rejection loop works on.

        Such a loop (``trunc_normal_`` with bounds that keep few values) itself holds four tensors of its argument's
        size, and with less it would be run again from its start for every ``mask.any()``.
        """
        return max(2 * self.largest, 4 * self._steering)

    def _trim(self, incoming: int) -> None:
        """Evict the values that were used least recently until the others and ``incoming`` bytes fit."""
        room = self._room() - incoming
        held = sum(kept.storage.nbytes() for kept in self._cache.values())
        for cell in list(self._cache):
            if held <= room:
                break
            held -= self._cache.pop(cell).storage.nbytes()
            if cell.nbytes >= WORTH_RETURNING:
                return_memory()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, wanted: Sequence[Cell], before: int, cache: Env, *, ends: bool) -> Env:
        """Compute ``wanted`` as they stood before ``before``, from ``cache``, which is used up.

        With ``ends``, each intermediate is freed at its last use; without, only for lack of room.
        """
        plan = _slice(wanted, before, cache)
        env = cache
        if not ends and not any(_is_settled(cell) for op in plan for cell in op.reads):
            self._steering = max([self._steering, *(cell.nbytes for op in plan for cell in (*op.reads, *op.writes))])
        last = {cell: position for position, op in enumerate(plan) for cell in (*op.reads, *op.writes)}
        modes = _States()
        try:
            for position, op in enumerate(plan):
                self._run(op, env, live=False, modes=modes)
                done = [cell for cell in env if last.get(cell, -1) <= position and cell not in wanted]
                held = sum(kept.storage.nbytes() for kept in env.values())
                for cell in done:
                    if ends or held > self._room():
                        held -= env.pop(cell).storage.nbytes()
        finally:
            modes.restore()
        for cell in wanted:
            if cell not in env:
                env[cell] = _initial(cell)
        self._note(env)
        return env

    def _run(self, op: Op, env: Env, *, live: bool, modes: _States | None = None) -> list[Any]:
        """Run one operation on the storages of ``env``, and leave what it wrote there."""
        for cell in op.reads:
            env[cell] = env.pop(cell) if cell in env else _initial(cell)
        for cell in op.writes:
            kept = env.get(cell)
            if kept is not None and kept.storage is cell.given:
                kept.storage = kept.storage.clone()
        if op.overwrites is not None and op.overwrites.cell not in env:
            cell = op.overwrites.cell
            env[cell] = _Kept(torch.UntypedStorage(cell.nbytes, device=cell.device), -1)
        leaves = [leaf.on(env[leaf.cell].storage) if isinstance(leaf, Ref) else leaf for leaf in op.leaves]
        if not live and modes is not None:
            modes.enter(op, leaves)
        args, kwargs = pytree.tree_unflatten(leaves, op.spec)
        with torch.no_grad():
            outputs = pytree.tree_leaves(op.func(*args, **kwargs))
        for position, ref in op.creates:
            _check(op, outputs[position], ref)
            env[ref.cell] = _Kept(outputs[position].untyped_storage(), op.seq)
        for cell in op.writes:
            if cell in env:
                env[cell].version = op.seq
        self.replayed += 1
        self._note(env)
        return outputs

    def _note(self, env: Env) -> None:
        self.peak = max(
            self.peak, sum(kept.storage.nbytes() for cell, kept in env.items() if kept.storage is not cell.given)
        )


def _is_settled(cell: Cell) -> bool:
    """Whether a rejection loop that asks about ``cell`` will find nothing to reject, and so not come back."""
    return bool(cell.writes) and cell.writes[-1].func is TRUNCATED


def _initial(cell: Cell) -> _Kept:
    """A cell before its first write: what was given, or memory nobody has written to."""
    storage = cell.given if cell.given is not None else torch.UntypedStorage(cell.nbytes, device=cell.device)
    return _Kept(storage, -1)


def _slice(wanted: Sequence[Cell], before: int, cache: Env) -> list[Op]:
    """The operations that ``wanted`` depend on, in order. Drops from ``cache`` what is too new for one of them."""
    needed: dict[int, Op] = {}
    oldest: dict[Cell, int] = {}
    stack = [(cell, before) for cell in wanted]
    while stack:
        cell, time = stack.pop()
        op = next((op for op in reversed(cell.writes) if op.seq < time), None)
        version = op.seq if op is not None else -1
        oldest[cell] = min(version, oldest.get(cell, ALL))
        if op is None or op.seq in needed or (cell in cache and cache[cell].version == version):
            continue
        needed[op.seq] = op
        stack += [(read, op.seq) for read in op.reads]
    too_new = [cell for cell, version in oldest.items() if cell in cache and version < cache[cell].version]
    if too_new:
        for cell in too_new:
            del cache[cell]
        return _slice(wanted, before, cache)
    return [needed[seq] for seq in sorted(needed)]


def _check(op: Op, output: torch.Tensor, ref: Ref) -> None:
    """A fake kernel that promised another layout than the real one would make every later window wrong."""
    real = (output.dtype, tuple(output.shape), tuple(output.stride()), output.storage_offset())
    if real != (ref.dtype, ref.size, ref.stride, ref.offset):
        raise UnsupportedError(
            f"deferred_init: {op.func} at {op.where} gave (dtype, shape, strides, offset) {real}, but its fake kernel "
            f"promised {(ref.dtype, ref.size, ref.stride, ref.offset)}. Build this model without deferred_init."
        )


def return_memory() -> None:
    """Give freed memory back to the system, as glibc keeps blocks of up to 32 MB (no other C library needs it)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _States:
    """The generators and the default dtype that a replay sets, and their values before it."""

    def __init__(self) -> None:
        self._dtype = torch.get_default_dtype()
        self._saved: dict[torch.device, torch.Tensor] = {}

    def enter(self, op: Op, leaves: list[Any]) -> None:
        """Set what ``op`` saw. An explicit generator is replaced by a fresh one in the recorded state."""
        if torch.get_default_dtype() is not op.dtype:
            torch.set_default_dtype(op.dtype)
        draw = op.draw
        if draw is None:
            return
        if draw.leaf is not None:
            leaves[draw.leaf] = torch.Generator(draw.device)
            leaves[draw.leaf].set_state(draw.state)
            return
        generator = default_generator(draw.device)
        self._saved.setdefault(draw.device, generator.get_state())
        generator.set_state(draw.state)

    def restore(self) -> None:
        """Put everything back."""
        if torch.get_default_dtype() is not self._dtype:
            torch.set_default_dtype(self._dtype)
        for device, state in self._saved.items():
            default_generator(device).set_state(state)


def default_generator(device: torch.device) -> torch.Generator:
    """The global generator of ``device``. Raises :class:`UnsupportedError` for other devices than CPU and CUDA."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        generator: torch.Generator = torch.cuda.default_generators[index]
        return generator
    raise UnsupportedError(
        f"deferred_init: random numbers on {device.type!r} are not supported. Build on the CPU, or without it."
    )
