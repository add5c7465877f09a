"""Dense and causal attention on CPU: our kernel or PyTorch's, whichever a measurement on this machine favours.
And which block-sparse or Evoformer attention has no kernel on its device.

PyTorch's operator and ours take and return the same values in the same layouts, so each direction is chosen by itself.
Only the order of sums differs; the kernel's error against fp64 is that of PyTorch's (``tests/codegen``).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.attention_gathered import Blocks
from dscompile.attention_ops import COMPILED, HEAD_STEP, no_gpu_kernel, no_kernel
from dscompile.codegen.cpu.builder import attention_kernels
from dscompile.config import Config
from dscompile.effects import argument
from dscompile.evoformer import no_evoformer_kernel
from dscompile.torch_compat import OpOverload, free_symbol_names, no_autocast, no_modes

aten = torch.ops.aten
ours = torch.ops.dscompile

FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SPARSE = (ours.block_sparse_attention.default, ours.block_sparse_attention_backward.default)
EVOFORMER = (ours.evoformer_attention.default, ours.evoformer_attention_backward.default)

BLOCK = 64
"""Queries and keys that dense attention computes at once; measured best of 32, 64 and 128."""

SHORTEST = 128
"""Below this sequence length nothing is measured: both take microseconds, and calling them takes as long."""

LONGEST = 2048
"""Longer sequences are measured at this length: the ratio no longer changes."""

GAIN = 1.1
"""How much faster the kernel must be for ``auto`` to choose it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether our kernel runs one attention node, and why."""

    kernel: bool
    reason: str


def choose_attention(module: fx.GraphModule, config: Config) -> tuple[list[str], list[str]]:
    """Replace PyTorch's dense attention in a region's module by ours where that is chosen.

    Returns:
        What was chosen for each node, and why; and the attention of ours that has no compiled kernel, and why.
    """
    choices: list[str] = []
    missing: list[str] = []
    for node in list(module.graph.nodes):
        if node.target in (FORWARD, BACKWARD):
            choice = _choice(node, config.attention)
            choices.append(f"{_describe(node)}: {'our kernel' if choice.kernel else 'PyTorch'} ({choice.reason})")
            if choice.kernel:
                _replace(node)
        elif node.target in SPARSE and (reason := _no_kernel(node)):
            missing.append(f"{_describe(node)}: gathered attention ({reason})")
        elif node.target in EVOFORMER and (reason := _no_evoformer(node)):
            missing.append(f"Evoformer {_describe(node)}: in pieces of PyTorch's operators ({reason})")
    module.recompile()
    return choices, missing


def _first(node: fx.Node) -> int:
    """Position of ``q`` among the arguments: a backward has the output's gradient in front."""
    return int(node.target in (BACKWARD, SPARSE[1], EVOFORMER[1]))


def _query(node: fx.Node) -> Tensor:
    value: Tensor = argument(node, _first(node), "query").meta["val"]
    return value


def _no_kernel(node: fx.Node) -> str:
    """Why a block-sparse attention of ours runs gathered on its device; "" if it has a kernel."""
    values: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    q, k = values[_first(node) : _first(node) + 2]
    if q.device.type == "cpu":
        return no_kernel(q.dtype)
    return no_gpu_kernel(q, k, Blocks(*values[-8:]))


def _no_evoformer(node: fx.Node) -> str:
    """Why an Evoformer attention on a GPU has no kernel; "" if it has one, and on CPUs, where pieces are the way."""
    values: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    q, mask, pair = (values[_first(node) + i] for i in (0, 3, 4))
    return "" if q.device.type == "cpu" else no_evoformer_kernel(q, mask, pair)


def _scale(node: fx.Node) -> float:
    """What scores are multiplied with; PyTorch's default is ``size ** -0.5``."""
    given: Any = node.kwargs.get("scale")
    return float(_query(node).shape[-1] ** -0.5 if given is None else given)


def _describe(node: fx.Node) -> str:
    q = _query(node)
    kind = "backward" if _first(node) else "forward"
    return f"attention {kind} {list(q.shape)} {str(q.dtype).removeprefix('torch.')}"


def _choice(node: fx.Node, option: str) -> Choice:
    if option == "aten":
        return Choice(False, "attention='aten'")
    q, k, v = (argument(node, _first(node) + i, "").meta["val"] for i in range(3))
    after = 3 + 3 * _first(node)
    if argument(node, after, "dropout_p", 0.0) != 0.0:
        return Choice(False, "it drops out")
    if node.kwargs.get("attn_mask") is not None:
        return Choice(False, "it has a mask")
    if free_symbol_names((q, k, v)):
        return Choice(False, "its shape is symbolic")
    scale = _scale(node)
    if q.dtype not in COMPILED or q.shape[-1] % HEAD_STEP or v.shape != k.shape or not scale > 0:
        return Choice(False, "a dtype, head size or scale that the kernel does not take")
    if reason := no_kernel(q.dtype):
        return Choice(False, reason)
    if option == "kernel":
        return Choice(True, "attention='kernel'")
    if min(q.shape[2], k.shape[2]) < SHORTEST:
        return Choice(False, f"shorter than {SHORTEST}")
    causal = bool(argument(node, after + 1, "is_causal", False))
    heads = min(q.shape[0] * q.shape[1], 2 * torch.get_num_threads())
    rows, columns = min(q.shape[2], LONGEST), min(k.shape[2], LONGEST)
    gain = _gains(q.dtype, heads, rows, columns, q.shape[3], causal, torch.get_num_threads())[_first(node)]
    return Choice(gain >= GAIN, f"the kernel runs at {gain:.2f} x PyTorch's speed")


def _replace(node: fx.Node) -> None:
    """Put our operator in the place of PyTorch's."""
    backward = node.target is BACKWARD
    operands = list(node.args[: 6 if backward else 3])
    after = len(operands)
    causal = bool(argument(node, after + 1, "is_causal", False))
    target: OpOverload = (
        ours.block_sparse_attention_backward.default if backward else ours.block_sparse_attention.default
    )
    with node.graph.inserting_before(node):
        arguments = (*operands, None, None, None, None, BLOCK, causal, None, _scale(node))
        new = node.graph.call_function(target, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


@functools.cache
def _gains(
    dtype: torch.dtype, heads: int, rows: int, columns: int, size: int, causal: bool, threads: int
) -> tuple[float, float]:
    """The kernel's speed over PyTorch's, forward and backward; ``threads`` is part of what was measured."""
    kernels = attention_kernels().kernels
    assert kernels is not None, "no_kernel() said there is one"
    generator = torch.Generator().manual_seed(0)
    blocks = Blocks(None, None, None, None, BLOCK, causal, None, size**-0.5)
    with no_modes(), torch.no_grad(), no_autocast():
        q, k, v, grad = (
            torch.randn(1, n, heads, size, generator=generator).transpose(1, 2).to(dtype)
            for n in (rows, columns, columns, rows)
        )
        out, lse = FORWARD(q, k, v, 0.0, causal)
        forward = gain(lambda: FORWARD(q, k, v, 0.0, causal), lambda: kernels.forward(q, k, v, blocks))
        backward = gain(
            lambda: BACKWARD(grad, q, k, v, out, lse, 0.0, causal),
            lambda: kernels.backward(grad, q, k, v, out, lse, blocks),
        )
    return forward, backward


def gain(theirs: Callable[[], Any], mine: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Their least seconds over ours, of five interleaved rounds after one to warm up."""

    def seconds(call: Callable[[], Any]) -> float:
        start = clock()
        call()
        return clock() - start

    rounds = [(seconds(theirs), seconds(mine)) for _ in range(6)][1:]
    return min(a for a, _ in rounds) / min(b for _, b in rounds)
