"""A process of its own: whole models, forward and backward, every region through our kernels in the interpreter.

``NAME-dynamic`` compiles a module of ``interpret_region`` once with symbolic sizes and runs it at several.

The regions are told that they are on a GPU, and that Inductor would move more bytes; prints how far loss and gradients
are from eager, over the largest gradient, and how many regions and kernels ran.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dscompile.backend import dscompile
from dscompile.codegen import gpu, lower
from tests.kernels.interpret import main
from tests.kernels.interpret_region import MODELS, SIZES
from tests.models.zoo import ZOO


def step(model: Any, call: Any, inputs: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    out = call(**inputs)
    loss = out.loss if getattr(out, "loss", None) is not None else out[0].square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@contextlib.contextmanager
def on_kernels() -> Iterator[list[gpu.Choice]]:
    """Every region is told that it is on a GPU; gives what was chosen."""
    choices: list[gpu.Choice] = []

    def choose(module: Any, key: str) -> gpu.Choice:
        choices.append(gpu_choose(module, key))
        return choices[-1]

    gpu_choose = gpu.choose
    with (
        mock.patch.object(lower, "on_gpu", return_value=True),
        mock.patch.object(lower, "choose", choose),
        mock.patch.object(gpu, "fuse", return_value=SimpleNamespace(bytes=1 << 60)),
    ):
        yield choices


OPTIONS = {"cache": False, "summary": False}


def run_dynamic(name: str) -> dict[str, Any]:
    """The error at each size, and how often it was compiled."""
    torch.manual_seed(0)
    model = MODELS[name](24)
    errors = {}
    with on_kernels() as choices:
        compiled = torch.compile(model, backend=dscompile, options=OPTIONS, dynamic=True)
        for batch, seq in SIZES[:3]:
            x = torch.randn(batch, seq, 24)
            wanted, found = (step(model, lambda x, call=call: (call(x),), {"x": x}) for call in (model, compiled))
            errors[f"{batch} x {seq}"] = max(
                float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)
            )
    not_ours = [c.why for c in choices if c.assembled is None]
    return {"errors": errors, "choices": len(choices), "not ours": not_ours}


def run(name: str) -> dict[str, Any]:
    if name.endswith("-dynamic"):
        return run_dynamic(name.removesuffix("-dynamic"))
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval()  # no dropout: eager draws other numbers
    wanted = step(model, model, inputs)
    with on_kernels() as choices:
        compiled = torch.compile(model, backend=dscompile, options=OPTIONS)
        found = step(model, compiled, inputs)
    largest = max(float(g.abs().max()) for g in wanted[1:])
    errors = [(f - w).abs().max() / (w.abs().max() + 1e-4 * largest) for f, w in zip(found, wanted, strict=True)]
    return {
        "error": max(map(float, errors)),
        "not ours": [c.why for c in choices if c.assembled is None],
        "kernels": sum(len(c.assembled.kernels) for c in choices if c.assembled is not None),
    }


if __name__ == "__main__":
    main(sys.argv[1:], run)
