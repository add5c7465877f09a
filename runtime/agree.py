"""Do all ranks run the same program? Signatures of the collectives, and what differs when they are not equal.

A program's *logical text* is one line for each collective in execution order: what it does, on which axis, for which
parameter, in global shapes. Ranks whose local shards are uneven, or who compiled their code differently, have equal
texts, and may go on; ranks with different texts would wait for each other for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

DIGITS = 16
"""Hexadecimal digits of a signature: 64 bits."""


class Signature(str):
    """The short hash of a program's collectives; it carries the lines it was made of, so that they can be published."""

    __slots__ = ("texts",)
    texts: tuple[str, ...]


def signature(texts: Iterable[str]) -> Signature:
    """The first 16 hexadecimal digits of the SHA-256 of the lines, in order; ``""`` where there are none.

    Args:
        texts: one line for each collective, with everything the ranks must agree on (operator, axis, global shape and
            dtype, FQN) and nothing that may differ between them (local sizes, rank, addresses).

    A program with the empty signature meets no other rank, so only some ranks may run it.
    """
    lines = tuple(texts)
    digest = hashlib.sha256("\0".join(lines).encode()).hexdigest()[:DIGITS] if lines else ""
    result = Signature(digest)
    result.texts = lines
    return result


def compare(mine: Sequence[str], theirs: Sequence[str], *, names: tuple[str, str] = ("mine", "theirs")) -> str:
    """What differs between two lists of collectives: the first difference with both lines; ``""`` if they are equal.

    Args:
        mine: lines as :func:`signature` takes them.
        theirs: the other side's.
        names: how the message calls the two sides, for example ``("rank 0", "rank 1")``.
    """
    if tuple(mine) == tuple(theirs):
        return ""
    common = min(len(mine), len(theirs))
    at = next((i for i in range(common) if mine[i] != theirs[i]), common)
    width = max(map(len, names))
    lines = [f"the first difference is collective {at + 1} (of {len(mine)} and {len(theirs)}):"]
    for name, side in zip(names, (mine, theirs), strict=True):
        lines.append(f"  {name:<{width}}: {side[at] if at < len(side) else '(no more collectives)'}")
    lines.append(f"  {_relation(mine, theirs, at, names)}")
    if at:
        lines.append(f"  the one before it, on both: {mine[at - 1]}")
    return "\n".join(lines)


def _relation(mine: Sequence[str], theirs: Sequence[str], at: int, names: tuple[str, str]) -> str:
    if sorted(mine) == sorted(theirs):
        return "both have the same collectives in another order"
    if tuple(mine[at + 1 :]) == tuple(theirs[at:]):
        return f"the rest is equal: {names[0]} has one collective more"
    if tuple(mine[at:]) == tuple(theirs[at + 1 :]):
        return f"the rest is equal: {names[1]} has one collective more"
    if tuple(mine[at + 1 :]) == tuple(theirs[at + 1 :]):
        return "the rest is equal"
    differing = sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs))
    return f"{differing} collectives differ"
