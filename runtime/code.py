"""ProgramCode: a Program in the form that AOTAutograd calls, caches on disk and loads again.

AOTAutograd stores whatever its compilers return if it is an ``OutputCode``. A cache hit in a later process then skips
tracing, passes and compilation altogether and loads the recorded verdict with the program.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dscompile.config import Config
from dscompile.inductor_compat import NotCacheable, OutputCode, unloaded
from dscompile.program import Program
from dscompile.report import GraphReport, announce
from dscompile.runtime.execute import bind
from dscompile.runtime.gemm import GemmChoice, with_gemm
from dscompile.runtime.guarded import guarded, nowhere, watch_of
from dscompile.runtime.pool import wanted
from dscompile.runtime.sanitize import Boxed

if TYPE_CHECKING:
    from dscompile.artifact import GraphWriter, Recording

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Destination:
    """The frame that is being compiled here and now: what a program that another process compiled cannot know."""

    name: str
    writer: GraphWriter | None


_DESTINATION: ContextVar[Destination | None] = ContextVar("dscompile_destination", default=None)


@contextmanager
def loading_into(name: str, writer: GraphWriter | None) -> Iterator[None]:
    """Programs that AOTAutograd loads from its cache in this block belong to graph ``name`` and dump to ``writer``."""
    token = _DESTINATION.set(Destination(name, writer))
    try:
        yield
    finally:
        _DESTINATION.reset(token)


@dataclass
class ProgramCode(OutputCode):
    """A compiled program with its report. ``_boxed_call`` tells AOTAutograd to hand over one list of arguments.

    Attributes:
        last: no other program of its frame follows it. recording: the texts that its compilation dumped, if it did.
        not_cacheable: why the program must not be stored ("" if it may be).
    """

    program: Program
    report: GraphReport
    config: Config
    last: bool = True
    recording: Recording | None = None
    not_cacheable: str = ""
    run: Boxed | None = None

    def __post_init__(self) -> None:
        self._boxed_call = True

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run the program; ``inputs`` must be a list, and is emptied."""
        assert self.run is not None, "call load() first"
        return self.run(inputs)  # type: ignore[arg-type]

    def load(self) -> ProgramCode:
        """Bind the source to its regions in this process."""
        collectives: list[str] = self.program.facts.get("collectives", [])
        watch = watch_of(collectives[0].split()[1], self.config.rank_timeout) if collectives else None
        run = bind(
            self.program,
            reuse_buffers=wanted(self.config.buffers),
            sanitize=self.config.sanitize,
            at=watch.at if watch is not None else nowhere,
        )
        if watch is not None:
            run = guarded(run, watch, collectives, f"{self.report.graph} {self.report.kind}")
        self.run = with_gemm(run, GemmChoice.of(self.config.gemm))
        return self

    def prepare_for_serialization(self) -> None:
        """Drop what belongs to this process; called on a copy just before it is pickled.

        Raises:
            NotCacheable: AOTAutograd then leaves the program out of its cache; the next start compiles again.
        """
        if any(code.passing for code in self.program.codes.values()):
            raise NotCacheable("a region could not be compiled for a reason that may pass")
        if self.not_cacheable:
            raise NotCacheable(self.not_cacheable)
        self.run = None
        codes = {
            key: replace(code, artifact=unloaded(code.artifact)) if code.artifact is not None else code
            for key, code in self.program.codes.items()
        }
        self.program = replace(self.program, codes=codes)

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """Called by AOTAutograd after a cache hit."""
        try:
            self.load()
        except Exception as error:  # AOTAutograd compiles again, and would say nothing
            log.warning("a program in the compile cache cannot be loaded (%s); it is compiled again", error)
            raise
        self.report.cached = True
        if (found := _DESTINATION.get()) is not None:
            self.report.graph = found.name
            self.dump(found.writer)
        announce(self.report)

    def dump(self, writer: GraphWriter | None) -> None:
        """Write the program, after the texts that led to it where they were recorded, and nowhere if no dump is on."""
        if writer is None:
            return
        if self.report.cached and self.recording is not None:
            writer.replay(self.recording)
        writer.program(self.report.kind, self.program.source())
        if self.last:
            writer.close()

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """No Triton kernels are bundled on CPU."""
