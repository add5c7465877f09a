"""``trunc_normal_`` without its four copies: the same bits as PyTorch's loop, in one tensor's memory and scratch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from dscompile.deferred import deferred_init, materialise
from dscompile.deferred_rejection import truncated_normal_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 17, 63, 64, 65, 79, 80, 127, 1000])
def test_pieces_have_the_values_of_the_whole(size: int, dtype: torch.dtype) -> None:
    """Bounds of half a deviation each side: several rounds of rejection."""
    want = nn.init.trunc_normal_(
        torch.empty(size, dtype=dtype), 0.1, 1.0, -0.5, 0.7, generator=torch.Generator().manual_seed(3)
    )
    lo, hi = (torch.tensor(bound, dtype=dtype).item() for bound in (-0.5, 0.7))
    ours = torch.Generator().manual_seed(3)
    got = truncated_normal_(torch.empty(size, dtype=dtype), 0.1, 1.0, lo, hi, generator=ours, piece=32)
    assert torch.equal(got, want)


def _model() -> nn.Module:
    model = nn.Module()
    for name, (shape, options) in {
        "usual": ((40, 30), {"std": 0.02}),
        "often": ((40, 30), {"a": -0.5, "b": 0.5}),
        "seldom": ((40, 30), {"a": 0.9, "b": 1.1}),
        "small": ((3, 3), {"a": -0.5, "b": 0.5}),
    }.items():
        weight = nn.Parameter(torch.empty(shape))
        nn.init.trunc_normal_(weight, **options)
        model.register_parameter(name, weight)
    view = torch.empty(30, 40).t()
    nn.init.trunc_normal_(view, a=-0.5, b=0.5)
    model.register_buffer("strided", view)
    model.register_buffer("after", torch.rand(5))
    return model


def test_deferred_values_and_generator() -> None:
    torch.manual_seed(0)
    want = _model()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with deferred_init():
        model = _model()
    assert torch.equal(torch.get_rng_state(), state)
    materialise(model)
    for (name, ours), theirs in zip(model.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


_MEASURE = """
import torch
from torch import nn
from dscompile.deferred import deferred_init, materialise

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, a=-1.5, b=1.5)

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def place(name, full, is_parameter):
    return nn.Parameter(full.detach()[: full.shape[0] // 8].clone())

def build(width):
    with deferred_init():
        model = Net(width)
    return materialise(model, place), model

build(64)  # what is loaded once
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
before = memory("VmRSS")
report, model = build(2048)
print(memory("VmHWM") - before, sum(p.numel() * 4 for p in model.parameters()), report.largest_bytes)
"""


def test_peak_of_the_largest_tensor() -> None:
    """At most the shards and twice the largest parameter, by the kernel's own count. Blocks are mapped singly."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    used, kept, largest = map(int, done.stdout.split())
    assert largest == 2048 * 2048 * 4
    assert used <= kept + 2 * largest
