"""A process of its own: our kernels and TorchInductor's Triton kernels for the same graphs; nothing is compiled or run.

``python -m tests.kernels.count_kernels CASE...`` prints for each how many kernels and bytes. A case is a model of
``tests.models.zoo`` (forward and backward of one step, each as one region), or ``library/NAME``: a function of the
kernel library at 8192 x 1024 in bf16. Inductor's scheduler and code generator run as on a GPU of compute capability
9.0, for which Triton is given a driver that knows its target and nothing else.
"""

from __future__ import annotations

import json
import operator
import sys
import traceback
from typing import Any

import torch
from torch import fx
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dscompile.codegen.decompositions import decompositions
from dscompile.codegen.regions import cut, region_module
from dscompile.codegen.tile.trace import decomposed
from dscompile.codegen.triton_backend.assemble import Assembled, assemble
from dscompile.codegen.triton_backend.library import entries, example
from dscompile.config import Config
from dscompile.inductor_compat import triton_kernels
from dscompile.split import split
from dscompile.torch_compat import tensor_bytes
from tests.build import trace
from tests.models.zoo import ZOO

MATRIX = ("mm", "convolution", "scaled_dot_product")
"""Operators that both leave to libraries."""
SIZES = {"rotary": (1024, 64)} | {f"cross_entropy{end}": (1024, 50304) for end in ("", "_backward", "_both")}


class AbsentGpu:
    """What Inductor asks Triton about the GPU while it generates code."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def halves(name: str) -> dict[str, fx.GraphModule]:
    """Forward and backward of one training step of a model, without dropout."""
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval()
    labels = inputs.pop("labels")
    if name == "t5":
        inputs["decoder_input_ids"] = labels
    names = list(inputs)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        logits = model(**dict(zip(names, values, strict=True))).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    joint = trace(loss, *inputs.values())
    parts = split(joint)
    found = {"forward": parts.forward, "backward": parts.backward}
    whole = Config(regions="whole")
    return {half: region_module(cut(graph, whole)[0]) for half, graph in found.items()}


def library(name: str) -> fx.GraphModule:
    arguments = example(name, torch.bfloat16, *SIZES.get(name, (8192, 1024)))
    function = entries()[name].function

    def run(*values: Any) -> tuple[Any, ...]:
        found = function(*values)
        return found if isinstance(found, tuple) else (found,)

    joint = trace(run, *(torch.empty_like(a, device="cpu") for a in arguments))
    (region,) = cut(joint, Config(regions="whole"))
    return region_module(region)


def ideal(module: fx.GraphModule) -> int:
    """Bytes of the graph's inputs and outputs, once each."""
    outputs: Any = module.graph.output_node().args[0]
    ends = {*module.graph.find_nodes(op="placeholder"), *(n for n in outputs if isinstance(n, fx.Node))}
    return sum(tensor_bytes(n.meta["val"]) for n in ends)


def figures(module: fx.GraphModule) -> dict[str, Any]:
    ours: Assembled = assemble(decomposed(module), "kernel")
    theirs = triton_kernels(module, decompositions())
    left = [n for n in ours.fused.order if isinstance(n, fx.Node) and n.target is not operator.getitem]
    alone = [str(n.target) for n in left if not any(m in str(n.target) for m in MATRIX)]
    return {
        "ours": len(ours.kernels), "fills": ours.fills, "alone": alone, "inductor": theirs.kernels,
        "their alone": [e for e in theirs.others if not any(m in e for m in MATRIX)],
        "bytes": ours.bytes, "inductor bytes": theirs.bytes, "graph ideal": ideal(module),
    }  # fmt: skip


def run(case: str) -> dict[str, Any]:
    kind, _, name = case.partition("/")
    if kind == "library":
        return {"": figures(library(name))}
    return {half: figures(module) for half, module in halves(case).items()}


def main(cases: list[str]) -> None:
    driver.set_active(AbsentGpu())
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case] = run(case)
        except Exception:
            results[case] = traceback.format_exc(limit=-5)
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
