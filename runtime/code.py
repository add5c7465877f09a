"""ProgramCode: a Program in the form that AOTAutograd calls, caches on disk and loads again.

AOTAutograd stores whatever its compilers return if it is an ``OutputCode``. A cache hit in a later process then skips
tracing, passes and compilation altogether and loads the recorded verdict with the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dscompile.config import Config
from dscompile.program import Program
from dscompile.report import GraphReport, announce
from dscompile.runtime.execute import bind
from dscompile.runtime.gemm import GemmChoice, with_gemm
from dscompile.runtime.sanitize import Boxed
from dscompile.torch_compat import NotCacheable, OutputCode, unloaded


@dataclass
class ProgramCode(OutputCode):
    """A compiled program with its report. ``_boxed_call`` tells AOTAutograd to hand over one list of arguments.

    ``not_cacheable`` says why the program must not be stored ("" if it may be).
    """

    program: Program
    report: GraphReport
    config: Config
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
        run = bind(self.program, reuse_buffers=self.config.buffers == "on", sanitize=self.config.sanitize)
        self.run = with_gemm(run, GemmChoice.of(self.config.gemm))
        return self

    def prepare_for_serialization(self) -> None:
        """Drop what belongs to this process; called on a copy just before it is pickled.

        Raises:
            NotCacheable: AOTAutograd then leaves the program out of its cache; the next start compiles again.
        """
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
        self.load()
        self.report.cached = True
        announce(self.report)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """No Triton kernels are bundled on CPU."""
