"""Node-aware differences of two graph texts: lines are matched by the node they define, not by their position.

A line diff of two graphs shows a changed operand as an unrelated pair of lines and may take quadratic time. Here each
line has a key (the node's name, the symbol's name, ``out``), so a changed node is one ``-``/``+`` pair, a moved one
says so, and the cost is that of sorting.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass

_KEY = re.compile(r"(?:in )?(%\w+)|(symbol \w+|unused .*|out\b|dscompile graph)", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Entry:
    mark: str
    line: str
    old: int
    new: int


def diff_text(before: str, after: str, *, names: tuple[str, str] = ("before", "after"), context: int = 2) -> str:
    """A unified, node-aware diff of two canonical texts; empty if they are equal.

    Marks: ``-`` removed or old, ``+`` added or new, ``>`` moved without change (shown at its new place). Each hunk's
    header gives the first line number of both sides. The last line counts the changes.
    """
    if before == after:
        return ""
    entries, counts = _entries(_lines(before), _lines(after))
    if not any(e.mark != " " for e in entries):
        return ""
    hunks = _hunks(entries, context)
    summary = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    return "\n".join([f"--- {names[0]}", f"+++ {names[1]}", *hunks, f"# {summary}", ""])


def _lines(text: str) -> dict[str, tuple[int, str]]:
    """Key -> (line number from 1, line), in order; comments and empty lines are left out."""
    found: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _KEY.match(line)
        key = (match.group(1) or match.group(2)) if match else line
        while key in found:  # not a well-formed graph: keep every line apart
            key += "'"
        found[key] = number, line
    return found


def _entries(old: dict[str, tuple[int, str]], new: dict[str, tuple[int, str]]) -> tuple[list[_Entry], dict[str, int]]:
    still = _in_order([old[key][0] for key in new if key in old])
    counts = {"added": 0, "removed": 0, "changed": 0, "moved": 0}
    removed = [key for key in old if key not in new]
    entries: list[_Entry] = []
    gone = 0

    def flush(before: int) -> None:
        """Show the removed lines that stood above old line ``before``."""
        nonlocal gone
        while gone < len(removed) and old[removed[gone]][0] < before:
            number, line = old[removed[gone]]
            entries.append(_Entry("-", line, number, entries[-1].new if entries else 1))
            counts["removed"] += 1
            gone += 1

    for key, (number, line) in new.items():
        if key not in old:
            entries.append(_Entry("+", line, entries[-1].old if entries else 1, number))
            counts["added"] += 1
            continue
        old_number, old_line = old[key]
        if old_number in still:
            flush(old_number)
        if old_line != line:
            entries += [_Entry("-", old_line, old_number, number), _Entry("+", line, old_number, number)]
            counts["changed"] += 1
        else:
            moved = old_number not in still
            entries.append(_Entry(">" if moved else " ", line, old_number, number))
            counts["moved"] += moved
    flush(1 << 62)
    return entries, counts


def _in_order(numbers: list[int]) -> set[int]:
    """A longest increasing subsequence: the lines that did not move."""
    tails: list[int] = []
    tail_at: list[int] = []
    previous = [-1] * len(numbers)
    for i, number in enumerate(numbers):
        place = bisect_left(tails, number)
        previous[i] = tail_at[place - 1] if place else -1
        if place == len(tails):
            tails.append(number)
            tail_at.append(i)
        else:
            tails[place], tail_at[place] = number, i
    kept: set[int] = set()
    i = tail_at[-1] if tail_at else -1
    while i >= 0:
        kept.add(numbers[i])
        i = previous[i]
    return kept


def _hunks(entries: list[_Entry], context: int) -> list[str]:
    """The changed entries with ``context`` unchanged ones around them, under a header for each separate run."""
    shown: set[int] = set()
    for i, entry in enumerate(entries):
        if entry.mark != " ":
            shown.update(range(max(0, i - context), min(len(entries), i + context + 1)))
    lines: list[str] = []
    last = -2
    for i in sorted(shown):
        if i != last + 1:
            lines.append(f"@@ -{entries[i].old} +{entries[i].new} @@")
        lines.append(f"{entries[i].mark} {entries[i].line}")
        last = i
    return lines
