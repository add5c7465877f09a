"""The communication vocabulary of the graph: which operators gather, reduce, wait, and fill or empty flat buffers.

Everything that asks "is this node communication?" asks here: roles, regions, the proof, the verifier and the passes.
``unshard`` and ``reduce_grad`` are the *markers* that a sharded model is traced with (:mod:`dscompile.ops`); passes
lower them to PyTorch's functional collectives around the buffer operators of :mod:`dscompile.bucket_ops`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed  # registers the functional collectives
from torch import fx

import dscompile.bucket_ops
import dscompile.ops  # noqa: F401  (both register operators)
from dscompile.graph import Role

c10d = torch.ops._c10d_functional
ours = torch.ops.dscompile

UNSHARD = ours.unshard.default
REDUCE_GRAD = ours.reduce_grad.default
WAIT = c10d.wait_tensor.default
REFRESH = ours.refresh.default
START_REFRESH = ours.start_refresh.default

ROLES: Mapping[Any, Role] = MappingProxyType(
    {
        UNSHARD: Role.GATHER,
        REDUCE_GRAD: Role.REDUCE,
        c10d.all_gather_into_tensor.default: Role.GATHER,
        c10d.all_to_all_single.default: Role.REDUCE,
        c10d.reduce_scatter_tensor.default: Role.REDUCE,
        c10d.all_reduce.default: Role.REDUCE,
        WAIT: Role.WAIT,
        REFRESH: Role.GATHER,
        START_REFRESH: Role.GATHER,
        ours.pack_shards.default: Role.PACK,
        ours.pack_grads.default: Role.PACK,
        ours.unpack_params.default: Role.UNPACK,
        ours.unpack_shards.default: Role.UNPACK,
        ours.sum_ranks.default: Role.UNPACK,
    }
)
"""Role of every communication operator."""

LAUNCHES = frozenset(
    {
        c10d.all_gather_into_tensor.default,
        c10d.all_to_all_single.default,
        c10d.reduce_scatter_tensor.default,
        c10d.all_reduce.default,
    }
)
"""Collectives that only start: their result may be read through ``wait_tensor`` alone."""


@dataclass(frozen=True, slots=True)
class Group:
    """One process group: its logical name, how many ranks it has, which one this process is, and its backend."""

    name: str
    size: int
    rank: int = 0
    backend: str = "gloo"


def comm_role(node: fx.Node) -> Role | None:
    """The communication role of a node, or None. Taking one result of an unpacked bucket is part of unpacking."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return ROLES.get(node.args[0].target)
    return ROLES.get(node.target)


def moved_elements(node: fx.Node) -> tuple[int, int]:
    """(elements in the payload of a collective, ranks); a rank transmits ``(ranks - 1) / ranks`` of an all-gather's
    output and of a reduction's input, and twice that for an all-reduce.

    Source: the ring algorithms' cost, Rajbhandari et al., ZeRO (2020), section 7.
    """
    target, args = node.target, node.args
    if target is c10d.all_gather_into_tensor.default:
        return node.meta["val"].numel(), int(args[1])  # type: ignore[arg-type]
    if target is c10d.all_to_all_single.default:
        return node.meta["val"].numel(), len(args[1])  # type: ignore[arg-type]
    if target is c10d.reduce_scatter_tensor.default:
        return node.args[0].meta["val"].numel(), int(args[2])  # type: ignore[arg-type,union-attr]
    raise KeyError(target)
