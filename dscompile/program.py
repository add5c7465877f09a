"""Program: what a graph becomes, a linear list of steps that prints as the Python that runs.

The printed function *is* the executed one: it takes one list, empties it, calls regions, and drops every value right
after its last use, so memory is freed exactly where the text says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dscompile.section_layout  # noqa: F401  (registers an operator that programs from the cache may call)
from dscompile.errors import VerifyError


@dataclass
class RegionCode:
    """The code behind one structural key.

    Attributes:
        key: structural hash of the region. kind: ``"inductor"`` (compiled), ``"triton"`` (our kernels, on a GPU) or
        ``"aten"`` (PyTorch's own kernels, one call a node). source: Python source of what runs; for ``triton`` and
        ``aten`` it defines ``run(args)``. reference: source of ``run(args)`` with PyTorch's own kernels ("" if it
        cannot be printed): what a check compares to. reason: why the region was not compiled ("" if it was). passing:
        that reason was the machine's state (a full disk), so the program must not be kept. artifact: the compiled
        object, bound again after loading from disk. choice: on a GPU, why our kernels or Inductor's run it. attention:
        on a CPU, which kernel runs each attention and norm gradient, and why. products: the same for fp32 matrix
        products. fallbacks: parts of the region that run slower than they should, and why.
    """

    key: str
    kind: str
    source: str
    reason: str = ""
    reference: str = ""
    passing: bool = False
    artifact: Any = None
    choice: str = ""
    attention: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a program: ``writes = call(reads)``; ``frees`` are dropped before the call if it reads them."""

    text: str
    call: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...]


@dataclass
class Program:
    """A runnable graph.

    Attributes:
        name: what it is, e.g. ``forward``.
        inputs: names bound to the argument list, in order.
        steps: in execution order.
        outputs: Python expressions returned as one tuple.
        calls: which :class:`RegionCode` key each ``region_k`` of the source runs.
        codes: region code by key.
        constants: tensors that the traced graph closed over, by the name the source uses.
        labels: module and user source line of each value that leaves a region.
        facts: figures for reports (nodes, regions, bytes), JSON-able.
    """

    name: str
    inputs: tuple[str, ...]
    steps: list[Step]
    outputs: tuple[str, ...]
    calls: dict[str, str]
    codes: dict[str, RegionCode]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def source(self) -> str:
        """The Python source that the runtime executes."""
        return function_source(self.name, self.inputs, self.steps, self.outputs)


def function_source(name: str, inputs: Sequence[str], steps: Sequence[Step], outputs: Sequence[str]) -> str:
    """Print a boxed function: it takes one list, empties it, runs the steps and returns a tuple."""
    lines = [f"def {name}(args):"]
    if inputs:
        lines.append(f"    {', '.join(inputs)}, = args")
    lines.append("    args.clear()")
    used = {read for step in steps for read in step.reads} | set(outputs)
    unused = [i for i in inputs if i not in used]
    if unused:
        lines.append(f"    del {', '.join(unused)}")
    for step in steps:
        lines += [f"    {line}" for line in step.text.splitlines()]
    lines.append(f"    return ({', '.join(outputs)}{',' if len(outputs) == 1 else ''})")
    return "\n".join(lines) + "\n"


def check_lifetimes(program: Program) -> None:
    """Raise :class:`VerifyError` unless each value is written once, read only while alive, and freed.

    This is the lifetime rule of the last stage: it reads the finished steps, not the planner's own tables.
    """
    alive = set(program.inputs)
    used = {read for step in program.steps for read in step.reads} | set(program.outputs)
    alive &= used
    alive |= set(program.constants)
    freed: set[str] = set()
    for number, step in enumerate(program.steps):
        where = f"program {program.name!r}, step {number} ({step.call})"
        for read in step.reads:
            if read not in alive:
                what = "after it was freed" if read in freed else "before it is written"
                raise VerifyError(f"rule lifetime: {where} reads {read!r} {what}")
        for free in step.frees:
            if free not in alive and free not in step.writes:
                raise VerifyError(f"rule lifetime: {where} frees {free!r}, which is not alive")
        for write in step.writes:
            if write in alive:
                raise VerifyError(f"rule lifetime: {where} writes {write!r} a second time")
        alive |= set(step.writes)
        alive -= set(step.frees)
        freed |= set(step.frees)
    names = {output for output in program.outputs if output.isidentifier() and output not in ("None", "True", "False")}
    for name in sorted(names - alive):
        raise VerifyError(f"rule lifetime: program {program.name!r} returns {name!r}, which is not alive")
    for name in sorted(alive - names - set(program.constants)):
        raise VerifyError(f"rule lifetime: program {program.name!r} never frees {name!r}")
