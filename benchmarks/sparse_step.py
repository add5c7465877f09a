"""A long-sequence training step: ``python -m benchmarks.sparse_step`` sets block-sparse attention against dense.

One unchanged GPT, batch 1. Dense: eager PyTorch and Inductor with ``scaled_dot_product_attention``, and dscompile
without the option. Sparse: dscompile with a BigBird layout through the rewrite pass. Steps (forward, backward, AdamW)
are interleaved in one process; every side has the same threads, malloc and GEMM settings, printed first. The sparse
model is another model (it sees fewer keys): the losses are printed and are not expected to agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.measure import Sample, interleave, paired_ratio, summary, timed
from benchmarks.results import save, table
from dscompile.report import REPORTS
from dscompile.sparse_section import from_config
from dscompile.tools.gpt import GPT, GPTConfig

SPARSE = "sparse"


def section(block: int) -> dict[str, Any]:
    """A causal BigBird layout: three local, one global and two random blocks a row."""
    return {"mode": "bigbird", "block": block, "num_random_blocks": 2, "attention": "unidirectional"}


def steps(config: GPTConfig, block: int, names: list[str]) -> dict[str, Callable[[int], dict[str, Sample]]]:
    """One training step of each variant, on the same tokens."""
    options = {
        "dscompile": {"cache": False, "summary": False},
        SPARSE: {"cache": False, "summary": False, "sparse_attention": section(block)},
    }
    ids = torch.randint(0, config.vocab, (1, config.context + 1), generator=torch.Generator().manual_seed(0))

    def one(name: str) -> Callable[[int], dict[str, Sample]]:
        torch.manual_seed(0)
        model = GPT(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        run: Callable[..., Any] = model
        if name == "inductor":
            run = torch.compile(model)
        elif name != "eager":
            run = torch.compile(model, backend="dscompile", options=options[name])

        def step() -> None:
            run(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return lambda _: {"step": timed(step)}

    return {name: one(name) for name in names}


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_step", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; on a busy machine 1, and read CPU s")
    parser.add_argument("--variants", nargs="+", default=["eager", "inductor", "dscompile", SPARSE])
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    config = GPTConfig(256, given.layers, given.width, given.heads, given.tokens)
    layout = from_config(section(given.block), given.heads).make_layout(given.tokens)
    density = layout.double().mean().item()
    calls = steps(config, given.block, [n for n in given.variants if n != SPARSE] + [SPARSE])
    interleave(calls, 1)
    fallbacks = [reason for report in REPORTS.all() for reason in report.fallbacks]
    samples = interleave(calls, given.rounds)
    wall = {name: [s.wall for s in parts["step"]] for name, parts in samples.items()}
    cpu = {name: [s.cpu for s in parts["step"]] for name, parts in samples.items()}
    ratios = {name: paired_ratio(values, wall[SPARSE]) for name, values in wall.items()}
    work = {name: paired_ratio(values, cpu[SPARSE]) for name, values in cpu.items()}
    result = {
        "machine": described,
        "config": vars(given),
        "layout": {**section(given.block), "density": density, "of_causal": 2 * density},
        "fallbacks": fallbacks,
        "seconds": {name: summary(values) for name, values in wall.items()},
        "cpu_seconds": {name: summary(values) for name, values in cpu.items()},
        "this_over_sparse": ratios,
        "this_over_sparse_cpu": work,
    }
    print(f"layout: {section(given.block)}, density {density:.2%} ({2 * density:.2%} of causal)")
    print(f"fallbacks: {fallbacks or 'none'}")
    rows = [
        [
            *(n, summary(v)["median"], min(v), f"{ratios[n]['of_medians']:.2f}", f"{ratios[n]['min']:.2f}"),
            *(summary(cpu[n])["median"], f"{work[n]['of_medians']:.2f}"),
        ]
        for n, v in wall.items()
    ]
    header = ["step", "wall s", "min s", "over sparse", "worst round", "CPU s", "over sparse"]
    print(table(f"{given.tokens} tokens, {given.layers} layers of {given.width}", header, rows))
    path = save("sparse_step", result)
    print(f"\n{path}")
    return path


if __name__ == "__main__":
    main()
