"""A run's artifact: one directory that holds what the compiler did, readable without the process that wrote it.

::

    DIR/manifest.json             versions, configuration, command line; each graph's passes with seconds and verdict
    DIR/GRAPH/00-traced.txt       the traced graph's canonical text, and 00-traced.json, its side table
    DIR/GRAPH/01-canonicalise.txt the text after the first pass, and so on
    DIR/GRAPH/forward.py          the final programs

Every file is written under a temporary name and renamed, so a crash leaves whole files only; the manifest is rewritten
after every step, so it names exactly the files that exist.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import dscompile
from dscompile.config import Config
from dscompile.errors import RunError
from dscompile.graph import StepGraph
from dscompile.manager import PassRecord
from dscompile.text import print_graph, side_table, text_digest

MANIFEST = "manifest.json"


class Artifact:
    """Writes one run's artifact to ``directory``.

    Several may write to one directory in one process (each compiled graph makes its own): they share the manifest; one
    that another run left is replaced.

    Raises:
        RunError: the directory cannot be created or written, or the disk is full (also from every later write).
    """

    def __init__(self, directory: str | Path, config: Config | None = None, *, pipeline: str | None = None) -> None:
        """Create the directory and the manifest; ``pipeline`` defaults to the configuration's."""
        self.directory = Path(directory)
        self._graphs: dict[str, dict[str, Any]] = {}
        self._run = {"pid": os.getpid(), "host": platform.node(), "argv": list(sys.argv)}
        self._head = {
            "version": 1,
            "dscompile": dscompile.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "run": self._run,
            "config": None if config is None else config.model_dump(),
            "config_digest": None if config is None else config.digest(),
            "pipeline": pipeline if pipeline is not None or config is None else config.pipeline,
        }
        self.write_manifest()

    def graph(self, name: str) -> GraphWriter:
        """A writer for one compiled graph; a name that this run used before (a recompilation) gets a number."""
        stem = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).lstrip(".") or "graph"
        taken = {**self._written_graphs(), **self._graphs}
        unique, count = stem, 1
        while unique in taken:
            count += 1
            unique = f"{stem}-{count}"
        self._graphs[unique] = entry = {
            "name": name,
            "complete": False,
            "cached": False,
            "steps": [],
            "programs": [],
        }
        self.write_manifest()
        return GraphWriter(self, unique, entry)

    def write_manifest(self) -> None:
        """Write ``manifest.json`` as it stands, with the graphs that others of this run have written."""
        self.write(MANIFEST, _json({**self._head, "graphs": {**self._written_graphs(), **self._graphs}}))

    def _written_graphs(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.directory / MANIFEST).read_text())
        except (OSError, ValueError):
            return {}
        same = isinstance(manifest, dict) and manifest.get("run") == self._run
        return dict(manifest.get("graphs", {})) if same else {}

    def write(self, relative: str, content: str) -> None:
        """Write one file of the artifact as a whole, or raise :class:`RunError` naming its path."""
        write_whole(self.directory / relative, content, hint="Choose another directory (option 'dump') or make room.")


@dataclass(frozen=True, slots=True)
class Recording:
    """One graph's steps as they were written, compressed: a program loaded from the cache writes them again."""

    data: bytes

    @classmethod
    def of(cls, steps: list[dict[str, Any]]) -> Recording:
        """Pack steps: each has ``name``, ``text``, ``table`` and ``facts``."""
        return cls(zlib.compress(json.dumps(steps).encode()))

    def steps(self) -> list[dict[str, Any]]:
        """Unpack them."""
        return list(json.loads(zlib.decompress(self.data)))


class GraphWriter:
    """Writes one graph's texts in the order of its passes; ``after_pass`` fits ``run_pipeline(on_pass=...)``."""

    def __init__(self, artifact: Artifact, folder: str, entry: dict[str, Any]) -> None:
        """``entry`` is this graph's part of the manifest; it is filled as files are written."""
        self._artifact = artifact
        self._folder = folder
        self._entry = entry
        self._written: list[dict[str, Any]] = []

    @property
    def directory(self) -> Path:
        """Where this graph's files lie."""
        return self._artifact.directory / self._folder

    def traced(self, graph: StepGraph) -> None:
        """Write the graph as it was traced (step 0)."""
        self._restart(cached=False)
        self._step("traced", print_graph(graph), _json(side_table(graph)), {"nodes_after": len(graph.graph.nodes)})

    def after_pass(self, record: PassRecord, graph: StepGraph) -> None:
        """Write the graph after a pass, with the pass's record."""
        self._step(record.name, print_graph(graph), _json(side_table(graph)), json.loads(_json(asdict(record))))

    def recording(self) -> Recording:
        """What was written so far, to keep with the compiled program."""
        return Recording.of(self._written)

    def replay(self, recording: Recording) -> None:
        """Write the steps of an earlier compilation, whose program was loaded from the cache."""
        self._restart(cached=True)
        for step in recording.steps():
            self._step(step["name"], step["text"], step["table"], step["facts"])

    def program(self, name: str, source: str) -> None:
        """Write the final program's Python source as ``NAME.py``."""
        file = f"{self._folder}/{name}.py"
        self._artifact.write(file, source)
        self._entry["programs"].append({"file": file, "digest": text_digest(source)})
        self._artifact.write_manifest()

    def close(self) -> None:
        """Mark the graph complete: its compilation ended without an error."""
        self._entry["complete"] = True
        self._artifact.write_manifest()

    def _restart(self, *, cached: bool) -> None:
        """Begin at step 0, also where a program from the cache turned out not to load and is compiled after all."""
        self._written = []
        self._entry.update({"cached": cached, "steps": [], "programs": []})

    def _step(self, name: str, text: str, table: str, facts: dict[str, Any]) -> None:
        stem = f"{self._folder}/{len(self._entry['steps']):02d}-{name}"
        self._artifact.write(f"{stem}.txt", text)
        self._artifact.write(f"{stem}.json", table)
        self._written.append({"name": name, "text": text, "table": table, "facts": facts})
        self._entry["steps"].append({"file": f"{stem}.txt", "digest": text_digest(text), **facts})
        self._artifact.write_manifest()


def write_whole(path: Path, content: str, *, hint: str) -> None:
    """Write a text file under a temporary name and rename it, making its folder if needed.

    A symbolic link is followed. A device or pipe (``/dev/stdout``) is written to, never renamed over: that would
    replace the device itself.

    Raises:
        RunError: the file cannot be written; names the path, says why, and ends with ``hint``.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if is_special(target):
            with target.open("w", encoding="utf-8") as file:
                file.write(content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot write: {error.strerror or error}. {hint}") from None


def is_special(path: Path) -> bool:
    """Whether ``path`` exists and is neither a regular file nor a folder: a device, pipe or socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def read_text(path: Path) -> str:
    """The content of a text file. Raises :class:`RunError` naming the path if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not a text file: {error.reason} at byte {error.start}.") from None


def read_table(text_path: Path) -> dict[str, Any]:
    """The side table beside a graph's text (``x.txt`` -> ``x.json``), or an empty one if there is none."""
    path = text_path.with_suffix(".json")
    if not path.exists():
        return {"version": 1, "nodes": {}, "constants": {}}
    try:
        table = json.loads(read_text(path))
    except ValueError as error:
        raise RunError(f"{path}: not a side table: {error}.") from None
    if not isinstance(table, dict) or not all(isinstance(table.get(key), dict) for key in ("nodes", "constants")):
        raise RunError(f"{path}: not a side table: expected 'nodes' and 'constants'.")
    return table


def _json(value: Any) -> str:
    """JSON text; what JSON has no word for (a size, a path) is written as its ``str``."""
    return json.dumps(value, indent=1, default=str) + "\n"
