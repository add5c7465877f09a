"""Planned graphs without processes: a fake process group of any size, and a compilation that stops after the split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import dscompile
from dscompile.backend import Frame
from dscompile.comm import LAUNCHES, UNSHARD, moved_elements
from dscompile.graph import Phase, StepGraph, info
from dscompile.params import frame_inputs
from dscompile.sharding import Sharding
from dscompile.torch_compat import aot_autograd


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """Make this process one rank of ``size``; collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.compiler.reset()


class Plan(Frame):
    """A frame that keeps its joint graph; its halves run as they are."""

    joint: StepGraph

    def run_passes(self, graph: StepGraph) -> None:
        super().run_passes(graph)
        self.joint = graph


def plan(
    model: nn.Module,
    *args: Any,
    library: str = "gloo",
    pipeline: str = "default",
    precision: dict[str, Any] | None = None,
    **zero: Any,
) -> Plan:
    """Shard ``model`` over the current (fake) world and plan one training step of it, as for the given library."""
    dscompile.distribute(model, config={"zero": zero, "pipeline": pipeline, "precision": precision or {}})
    return plan_distributed(model, *args, library=library)


def plan_distributed(model: nn.Module, *args: Any, library: str = "gloo") -> Plan:
    """Plan one training step of a sharded model, as for the given library."""
    plans: list[Plan] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        inputs = frame_inputs(gm, example_inputs)
        sharding = Sharding.of(inputs, example_inputs)
        assert sharding.config is not None
        groups = {name: replace(group, backend=library) for name, group in sharding.groups.items()}
        sharding = replace(sharding, groups=groups)
        frame = Plan(sharding.config, inputs, "planned", sharding)
        plans.append(frame)
        keep = lambda module, _: module  # noqa: E731
        return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=frame.partition)(gm, example_inputs)

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(*args).sum().backward()
    (found,) = plans
    return found


def launches(graph: StepGraph, phase: Phase | None = None) -> list[fx.Node]:
    """The collectives of a graph in program order."""
    return [n for n in graph.nodes if n.target in LAUNCHES and (phase is None or info(n).phase is phase)]


def moved(graph: StepGraph) -> float:
    """Elements that one rank transmits in a step, by the ring algorithms' count."""
    total = 0.0
    for node in launches(graph):
        elements, ranks = moved_elements(node)
        total += elements * (ranks - 1) / ranks
    return total


def markers(graph: StepGraph) -> int:
    """Markers left."""
    return len(graph.graph.find_nodes(op="call_function", target=UNSHARD))
