"""Every error a user can meet: each says what happened, where, and what to do about it.

``assert`` guards our own invariants; the classes below are for people. All derive from :class:`DscompileError`, so one
``except`` catches them, and each is also the built-in exception a caller would expect (``ValueError`` for bad input).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DscompileError(Exception):
    """Base of every error that dscompile raises on purpose."""


class ConfigError(DscompileError, ValueError):
    """A configuration key or value that cannot be used; names the key, the nearest valid one, and the file."""


class TextError(DscompileError, ValueError):
    """A text graph that does not parse; carries the 1-based ``line`` and ``column`` of the first fault."""

    def __init__(self, message: str, *, line: int, column: int, path: str = "<text>") -> None:
        super().__init__(f"{path}:{line}:{column}: {message}")
        self.line = line
        self.column = column
        self.path = path


class PipelineError(DscompileError, ValueError):
    """A pipeline string that names no registered pass, a wrong option, or an order that breaks a contract."""


class UnsupportedError(DscompileError, NotImplementedError):
    """A model, device or feature that this version refuses; says which and what to do instead."""


class VerifyError(DscompileError, AssertionError):
    """A pass broke a rule of :mod:`dscompile.verify` or changed the meaning (:mod:`dscompile.equivalence`)."""


class ShardingError(DscompileError, RuntimeError):
    """A sharded parameter used in a way that would lose a write, a gradient or a shard; names it and the remedy."""


class RunError(DscompileError, RuntimeError):
    """A training run that cannot go on (unwritable directory, damaged checkpoint, disk full, NaN loss)."""


class RankError(DscompileError, RuntimeError):
    """Ranks cannot go on together: one died, raised, left, or runs a different program. Raised on every other rank.

    ``kind`` is ``"died"``, ``"raised"``, ``"differs"``, ``"left"``, ``"frozen"``, ``"store"`` or ``"unknown"``;
    ``ranks`` are the ranks it is about; the message holds their positions and this rank's.
    """

    def __init__(self, message: str, *, kind: str = "unknown", ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.ranks = ranks

    def __reduce__(self) -> tuple[object, ...]:  # exceptions pickle by their positional arguments
        return _rank_error, (self.args[0], self.kind, self.ranks)


def _rank_error(message: str, kind: str, ranks: tuple[int, ...]) -> RankError:
    return RankError(message, kind=kind, ranks=ranks)


class CheckpointError(DscompileError, RuntimeError):
    """A checkpoint that cannot be written, found, trusted or fitted to this model. Raised on every rank alike."""


class DeferredError(DscompileError, RuntimeError):
    """A tensor of :func:`dscompile.deferred_init` was used for its values before ``materialise`` gave it any."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate nearest to ``word``, or an empty string."""
    match = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
