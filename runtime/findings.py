"""What a rank found wrong with another, in words; and the error that its main thread raises for it."""

from __future__ import annotations

from dscompile.errors import RankError
from dscompile.runtime.agree import compare
from dscompile.runtime.board import Board, Call, Finding, Record
from dscompile.runtime.liveness import Peer

HINTS = {
    "died": "Look at the log of {ranks}, and on its machine for the out-of-memory killer (dmesg).",
    "raised": "The log of {ranks} has the traceback; the other ranks only ended with it.",
    "differs": "Every rank must run the same sequence of programs: look for a branch, a shape or a data length that "
    "depends on the rank.",
    "left": "Every rank must run the same number of steps: look at the lengths of the data on {ranks} and on this one.",
    "frozen": "Look whether {ranks} is stopped (SIGSTOP, a debugger) or sits in one long C call.",
    "store": "The process that served it (rank 0, or torchrun's agent) has probably ended: look at its log.",
}


def error_of(finding: Finding, rank: int, position: str) -> RankError:
    """The error for this rank's main thread: the finding, where this rank is, and what to look at."""
    hint = HINTS[finding.kind].format(ranks=" and ".join(f"rank {r}" for r in finding.ranks))
    text = f"{finding.text}\n  rank {rank} (this one) is {position}\n  {hint}"
    return RankError(text, kind=finding.kind, ranks=finding.ranks)


def raised(record: Record) -> Finding:
    """A rank's own exception."""
    text = f"rank {record.rank} raised {record.error}\n  rank {record.rank} was {record.position()}"
    return Finding("raised", (record.rank,), text)


def left(record: Record) -> Finding:
    """A rank said goodbye and another still needs it."""
    text = f"rank {record.rank} has left, without an error, {record.position()}"
    return Finding("left", (record.rank,), text)


def frozen(peer: Peer, record: Record) -> Finding:
    """A rank's process exists but its heartbeats have long stopped."""
    text = f"rank {peer.rank} is frozen: {record.process} exists but has not run for {peer.silent:.0f} s"
    return Finding("frozen", (peer.rank,), f"{text}\n  {peer.last_seen()}")


def gone(peer: Peer, record: Record, lost: BaseException | None) -> Finding:
    """A rank's process is gone. ``lost``: why the store is, too."""
    if peer.probed:
        text = f"rank {peer.rank} has died: {record.process} is gone"
    else:
        text = f"rank {peer.rank} has died or cannot be reached: {record.process} was silent for {peer.silent:.0f} s"
    if lost is not None:
        text += f", and so is the store ({first_line(lost)})"
    return Finding("died", (peer.rank,), f"{text}\n  {peer.last_seen()}")


def store_lost(lost: BaseException) -> Finding:
    """Nothing can be learned of the others any more, and this rank makes no progress."""
    return Finding("store", (), f"the store that the ranks watch each other through is lost: {first_line(lost)}")


def differs(mine: Record, theirs: Record, common: list[tuple[Call, Call]], board: Board) -> Finding:
    """Two ranks ran different programs. ``common``: calls with equal numbers (mine, theirs), oldest first."""
    a, b = next(((a, b) for a, b in common if a.signature != b.signature), common[0])
    names = (f"rank {mine.rank}", f"rank {theirs.rank}")
    if a.signature == b.signature:
        lines = [f"{names[0]} and {names[1]} have run different programs before call {a.number}"]
    else:
        lines = [f"{names[0]} and {names[1]} run different programs at call {a.number}:"]
        lines += [f"  {name} runs {c.label!r} (signature {c.signature})" for name, c in zip(names, (a, b), strict=True)]
        listings = board.texts(a.signature), board.texts(b.signature)
        if listings[0] is not None and listings[1] is not None:
            lines += [f"  {line}" for line in compare(listings[0], listings[1], names=names).splitlines()]
    lines += [f"  {name} is {record.position()}" for name, record in zip(names, (mine, theirs), strict=True)]
    return Finding("differs", (mine.rank, theirs.rank), "\n".join(lines))


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
