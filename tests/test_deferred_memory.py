"""Deferred construction holds one tensor at a time, and gives each to the caller once."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from dscompile.deferred import deferred_init, is_deferred, materialise
from tests.deferred_models import Built, build, sharing

_MEASURE = """
import sys, torch
from torch import nn
from dscompile.deferred import deferred_init, materialise

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8192, 512)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(512, 8, 2048) for _ in range(int(sys.argv[1])))
        self.head = nn.Linear(512, 8192, bias=False)
        self.head.weight = self.embed.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def place(name, full, is_parameter):
    rows = -(-full.shape[0] // 8)
    return nn.Parameter(full.detach()[:rows].clone())

def build(kind, layers):
    sys.argv[1] = layers
    if kind == "plain":
        return GPT(), None
    with deferred_init():
        model = GPT()
    return model, materialise(model, place)

build("deferred", "0")  # code and buffers that are loaded once
for kind in ("deferred", "plain"):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
    before = memory("VmRSS")
    model, report = build(kind, "7")
    print(memory("VmHWM") - before, sum(p.numel() * 4 for p in model.parameters()))
    if report:
        print(report.peak_bytes, report.largest_bytes)
    del model
"""


def test_peak_memory_of_a_105_mb_model() -> None:
    """The process never holds more than the shards and twice the largest parameter. The kernel's own count.

    Blocks are mapped singly here, so that what is freed is gone; glibc's heap would keep some of it.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEASURE, "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    used, kept, reported, largest, plain, full = map(int, done.stdout.split())
    assert full > 100e6
    assert kept == pytest.approx(full / 8, rel=1e-3)
    assert largest == 8192 * 512 * 4
    assert plain > 0.95 * full  # the measure sees a model that is held
    assert used <= kept + 2 * largest
    assert largest <= reported <= 2 * largest


def test_place_gets_each_tensor_once_and_frees_it() -> None:
    def fill(module: Any) -> None:
        sharing(module)
        module.norm = nn.BatchNorm1d(4)

    torch.manual_seed(3)
    normal = Built(fill)
    torch.manual_seed(3)
    model = build(fill)
    seen: dict[str, torch.Tensor] = {}

    def place(fqn: str, full: torch.Tensor, is_parameter: bool) -> torch.Tensor:
        assert isinstance(full, nn.Parameter) == is_parameter
        seen[fqn] = full.detach().clone()
        half = full.detach()[: (full.shape[0] + 1) // 2].clone() if full.dim() else full.detach().clone()
        return nn.Parameter(half, requires_grad=full.requires_grad) if is_parameter else half

    report = materialise(model, place)
    want = dict([*normal.named_parameters(), *normal.named_buffers()])
    assert list(seen) == list(want)
    assert all(torch.equal(seen[name], want[name]) for name in want)
    assert model.head.weight is model.embed.weight  # type: ignore[union-attr]
    assert model.embed.weight.shape == (4, 4)  # type: ignore[union-attr]
    assert not model.frozen.requires_grad  # type: ignore[union-attr]
    assert not is_deferred(model)
    assert report.given == 1  # num_batches_tracked is a torch.tensor


def test_replaced_tensors_are_replaced_in_lists() -> None:
    with deferred_init():
        model = nn.LSTM(4, 5)
    materialise(model, lambda fqn, full, is_parameter: nn.Parameter(full.detach().clone()))
    assert all(w is getattr(model, n) for w, n in zip(model._flat_weights, model._flat_weights_names, strict=True))
