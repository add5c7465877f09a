"""Whole steps in the compile cache: one file an entry, called after its own digest, in a folder called after its key.

AOTAutograd's cache takes what AOTAutograd compiles; the step entries compile a joint graph that never becomes a pair
of functions, so its programs are kept here, beside AOTAutograd's and with its key (:mod:`dscompile.cache_compat`).
Files are written under a temporary name and renamed. They are read as AOTAutograd reads its own, with ``pickle``, but
never before their content gave the digest that they are called after; one that does not is removed and counted.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import fx

from dscompile import cache
from dscompile.backend import Frame
from dscompile.cache_compat import captured_key, guards_hold, guards_of
from dscompile.graph import StepGraph
from dscompile.inductor_compat import NotCacheable, cache_directory, our_cache_key
from dscompile.runtime.code import ProgramCode, loading_into
from dscompile.text import print_graph, side_table
from dscompile.text_parse import parse_graph
from dscompile.torch_compat import no_modes

log = logging.getLogger("dscompile")

T = TypeVar("T")

FOLDER = "dscompile_steps"
"""Where the entries lie, in the cache directory. :mod:`dscompile.cache_files` looks after these files too."""


@dataclass(frozen=True, slots=True)
class GraphText:
    """A graph as its canonical text, and the constants that the text leaves out, compressed."""

    data: bytes

    @staticmethod
    def of(graph: StepGraph) -> GraphText:
        """Print a graph."""
        parts = print_graph(graph), side_table(graph)["constants"]
        return GraphText(zlib.compress(pickle.dumps(parts), 1))

    def graph(self) -> StepGraph:
        """Read it back."""
        text, constants = pickle.loads(zlib.decompress(self.data))
        return parse_graph(text, "a program from the cache", constants)


@dataclass(frozen=True)
class Kept(Generic[T]):
    """One entry.

    Attributes:
        code: the program, with its report and the verdict of its proof.
        guards: what sizes must obey (:func:`~dscompile.cache_compat.guards_of`).
        text: the joint graph that it was compiled from, after the passes.
        more: what the entry's owner needs to run the program.
    """

    code: ProgramCode
    guards: str
    text: GraphText
    more: T


class StepCache:
    """The entries under one key.

    Attributes:
        removed: how many entries were found damaged, and removed, by :meth:`find`.
    """

    def __init__(self, key: str) -> None:
        """Look at nothing yet."""
        self.folder = Path(cache_directory()) / FOLDER / key
        self.removed = 0

    @property
    def note(self) -> str:
        """What a report says of :attr:`removed`; "" if nothing was."""
        return f"{self.removed} damaged program(s) removed from the compile cache" if self.removed else ""

    def find(self, inputs: Sequence[Any]) -> Kept[Any] | None:
        """The first entry whose guards hold for ``inputs``, with its program loaded and reported; None without one."""
        try:
            paths = sorted(p for p in self.folder.iterdir() if not p.name.startswith("."))
        except OSError:
            return None
        for path in paths:
            kept = self._read(path)
            if kept is None or not guards_hold(kept.guards, inputs):
                continue
            try:
                kept.code.post_compile(None, None, None)
            except Exception:  # it was logged; a library that the program needs may be gone
                self._remove(path)
                continue
            return kept
        return None

    def _read(self, path: Path) -> Kept[Any] | None:
        """An entry, or None if it is damaged."""
        try:
            content = path.read_bytes()
        except OSError:  # another process removed it
            return None
        kept = None
        if hashlib.sha256(content).hexdigest() == path.name:
            with contextlib.suppress(Exception):  # pickle may raise anything
                kept = pickle.loads(content)
        if not isinstance(kept, Kept):
            log.warning("%s: removed a damaged program from the compile cache; it is compiled again", path)
            self._remove(path)
            return None
        return kept

    def _remove(self, path: Path) -> None:
        self.removed += 1
        with contextlib.suppress(OSError):
            path.unlink()

    def store(self, code: ProgramCode, graph: StepGraph, inputs: Sequence[Any], more: Any) -> str:
        """Keep a program for other processes; returns why it could not be, or ""."""
        bare = copy.copy(code)
        lasting = [reason for reason in code.report.fallbacks if reason != self.note]
        bare.report = replace(code.report, fallbacks=lasting)
        try:
            bare.prepare_for_serialization()
            with no_modes():
                content = pickle.dumps(Kept(bare, guards_of(inputs), GraphText.of(graph), more))
        except NotCacheable as error:
            return str(error)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            return f"it cannot be written to a file: {error}"
        name = hashlib.sha256(content).hexdigest()
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            log.warning("%s: cannot write: %s. The program is not kept.", self.folder, error.strerror or error)
            return f"{self.folder}: cannot write: {error.strerror or error}"
        return ""


@dataclass(frozen=True)
class Found:
    """What the cache has of a step that is being compiled.

    Attributes:
        kept: the entry, with its program loaded and reported; None if it must be compiled.
        entries: where to keep it then; None if it cannot be kept.
        inputs: the step's real inputs.
    """

    kept: Kept[Any] | None
    entries: StepCache | None
    inputs: Sequence[Any]

    def store(self, code: ProgramCode, graph: StepGraph, more: Any) -> None:
        """Keep a program that was compiled for want of an entry; its report says why, if it cannot be."""
        if self.entries is not None:
            code.report.not_kept = self.entries.store(code, graph, self.inputs, more)


@contextlib.contextmanager
def caching(frame: Frame) -> Iterator[None]:
    """While a step is looked up and compiled: the configuration of PyTorch's caches, and where loaded programs go."""
    on = frame.config.cache
    with (
        our_cache_key(cache.key(frame.config, frame.sharding.key()), regions=on, programs=on),
        loading_into(frame.name, frame.writer),
    ):
        yield


def look_up(frame: Frame, gm: fx.GraphModule, inputs: Sequence[Any], names: Callable[[], Sequence[str]]) -> Found:
    """The cached program of a captured step; inside :func:`caching`.

    Args:
        frame: is told what was damaged, and why nothing can be kept.
        gm: the captured graph.
        inputs: its real inputs, or what they come from.
        names: says where each of the graph's inputs comes from; may raise :class:`NotCacheable`.
    """
    if not frame.config.cache:
        return Found(None, None, inputs)
    try:
        key = captured_key(gm, inputs, [*names(), repr(frame.inputs)])
    except NotCacheable as error:
        frame.not_kept = str(error)
        return Found(None, None, inputs)
    entries = StepCache(key)
    kept = entries.find(inputs)
    if entries.note:
        frame.notes.append(entries.note)
    return Found(kept, entries, inputs)
