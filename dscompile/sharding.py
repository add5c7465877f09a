"""What a frame with sharded parameters knows beside its graph: placements, process groups, and the user's ZeRO choice.

The proof takes the arguments of every marker at their word; :meth:`Sharding.check` compares them with where the
parameters really are, so that a wrong dimension, group or size cannot be "proved".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dscompile.comm import UNSHARD, Group
from dscompile.config import Config
from dscompile.errors import ShardingError, VerifyError
from dscompile.graph import InputKind, StepGraph
from dscompile.params import FrameInputs
from dscompile.placement import ShardSpec, config_of, spec_of
from dscompile.source import describe
from dscompile.torch_compat import group_backend, process_group


@dataclass(frozen=True)
class Sharding:
    """Placements of one frame's parameters by FQN, and the groups they are sharded over."""

    specs: Mapping[str, ShardSpec] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    config: Config | None = None

    @staticmethod
    def of(inputs: FrameInputs, example_inputs: Sequence[Any]) -> Sharding:
        """Read the placements off a frame's real parameters.

        Raises:
            ShardingError: a trainable parameter that is plain among sharded ones.
        """
        specs: dict[str, ShardSpec] = {}
        plain: list[str] = []
        devices: dict[str, torch.device] = {}
        for known, value in zip(inputs.inputs, example_inputs, strict=True):
            spec = spec_of(value) if isinstance(value, torch.Tensor) else None
            if spec is not None:
                specs[known.fqn] = spec
                devices[spec.group] = value.device
            elif isinstance(value, nn.Parameter) and value.requires_grad:
                plain.append(known.fqn)
        if specs and plain:
            raise ShardingError(
                f"parameter {plain[0]!r} is not sharded although {next(iter(specs))!r} is, so its gradient would not "
                f"be reduced over ranks ({len(plain)} such parameters). It was added after distribute(): call "
                "distribute(model) again."
            )
        groups = {
            spec.group: _group(spec.group, spec.world, devices[spec.group]) for spec in specs.values() if spec.world > 1
        }
        found = config_of(v for v in example_inputs if isinstance(v, torch.Tensor)) if specs else None
        return Sharding(specs, groups, found)

    @property
    def stage(self) -> int | None:
        """The ZeRO stage of the parameters, None if none is sharded."""
        return max((spec.stage for spec in self.specs.values()), default=None)

    def key(self) -> str:
        """What a compiled program depends on, as text: placements, and this process's rank in each group."""
        ranks = sorted((group.name, group.size, group.rank, group.backend) for group in self.groups.values())
        return repr((sorted(self.specs.items()), ranks)) if self.specs else ""

    def check(self, graph: StepGraph) -> None:
        """Compare every ``unshard`` marker of a traced graph with the placement of the parameter it reads.

        Raises:
            VerifyError: rule ``placement``, naming the parameter and the two placements.
        """
        names = {i.name: i.fqn for i in graph.inputs if i.kind is InputKind.PARAMETER}
        for node in graph.graph.find_nodes(op="call_function", target=UNSHARD):
            source = node.args[0]
            while source.op == "call_function" and source.all_input_nodes:  # DTensor leaves views of the local tensor
                source = source.all_input_nodes[0]
            spec = self.specs.get(names.get(source.name, ""))
            if spec is None:
                continue
            arguments: tuple[Any, ...] = (*node.args[3:], *(None,) * (10 - len(node.args)))
            found = (*arguments[:-1], None if arguments[-1] is None else tuple(arguments[-1]))
            placed = (spec.dim, spec.size, spec.world, spec.group, spec.dtype, spec.wire, spec.tile_argument)
            if found != placed:
                raise VerifyError(
                    f"rule placement: %{node.name} gathers {spec.fqn!r} as (dim, size, world, group, dtype, wire, "
                    f"tile) {found}, but it is placed as {placed}.\n  {describe(node)}"
                )


def _group(name: str, size: int, device: torch.device) -> Group:
    return Group(name, size, dist.get_rank(process_group(name)), group_backend(name, device))
