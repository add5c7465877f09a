"""Attention on CPU: ``python -m benchmarks.attention`` sets our kernels against PyTorch's.

``sparse``: a BigBird-like layout (window of 3 blocks, one global row and column, random blocks up to the density asked
for) against dense SDPA, dense attention with its scores in memory, compiled FlexAttention (which has no CPU backward),
and SDPA on gathered key blocks. ``dense``: causal attention without a layout against SDPA. ``long``: the bytes that one
forward and backward takes. Variants take turns; on a loaded machine the least CPU seconds are the figure to compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dscompile.attention_ops  # noqa: F401  (registers the operators)
from benchmarks import machine
from benchmarks.attention_gathered import GatheredSdpa, buckets
from benchmarks.measure import Sample, interleave, summary, timed
from benchmarks.memory import resident_peak
from benchmarks.results import MB, save, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = "ours"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def bigbird(rows: int, density: float) -> Tensor:
    """A layout ``[rows, rows]`` that all heads share, bool."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(rows)
    layout = (index[:, None] - index).abs() <= 1
    layout[0] = layout[:, 0] = True
    random = max(0, round(density * rows) - 6)  # beside window, global column, and the global row's share
    for row in range(1, rows):
        layout[row, torch.randperm(rows, generator=generator)[:random]] = True
    return layout


def csr(layout: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, columns]`` as the operator's pointers and columns."""
    counts = layout.sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])[None].int(), layout.nonzero()[:, 1].int()


def ours(layout: Tensor | None, block: int, *, causal: bool = False) -> Attend:
    """Our operator with a layout, or dense."""
    indices = (None,) * 4 if layout is None else (*csr(layout), *csr(layout.T))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arguments = (*indices, block, causal, None, q.shape[-1] ** -0.5)
        out: Tensor = torch.ops.dscompile.block_sparse_attention.default(q, k, v, *arguments)[0]
        return out

    return attend


def flex(layout: Tensor, block: int) -> Attend:
    """FlexAttention, compiled, with the same blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = layout.sum(1).int()[None, None]
    order = layout.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
    empty = torch.zeros_like(counts), torch.zeros_like(order)
    mask = BlockMask.from_kv_blocks(*empty, counts, order, BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)  # type: ignore[no-any-return]


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention with its scores in memory."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def inputs(batch: int, heads: int, tokens: int, size: int, dtype: torch.dtype, *, grad: bool) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(batch, heads, tokens, size, generator=generator).to(dtype) for _ in range(4)]
    return [x.requires_grad_(grad) for x in made[:3]] + made[3:]


def measure(
    variants: Mapping[str, Attend], tensors: Mapping[str, list[Tensor]], rounds: int, forward_only: frozenset[str]
) -> dict[str, dict[str, list[Sample]]]:
    """Samples of forward, and of forward and backward, of each variant on its tensors."""

    def call(name: str) -> Callable[[int], Mapping[str, Sample]]:
        attend, (q, k, v, grad) = variants[name], tensors[name]

        def run(_: int) -> Mapping[str, Sample]:
            if name in forward_only:
                with torch.no_grad():
                    return {"forward": timed(lambda: attend(q, k, v))}
            kept: list[Tensor] = []
            first = timed(lambda: kept.append(attend(q, k, v)))
            second = timed(lambda: torch.autograd.grad(kept[0], (q, k, v), grad))
            both = Sample(first.wall + second.wall, first.cpu + second.cpu)
            return {"forward": first, "forward+backward": both}

        return run

    calls = {name: call(name) for name in variants}
    interleave(calls, 1)
    return interleave(calls, rounds)


def figures(samples: dict[str, dict[str, list[Sample]]], factor: Mapping[str, float]) -> dict[str, Any]:
    """Seconds of each variant and how many times ours they are; ``factor`` multiplies variants run on fewer heads."""
    result: dict[str, Any] = {}
    for name, parts in samples.items():
        result[name] = {}
        for part, found in parts.items():
            for unit in ("cpu", "wall"):
                times = factor.get(name, 1.0)
                mine = [getattr(s, unit) for s in samples[OURS][part]]
                values = [getattr(s, unit) * times for s in found]
                result[name][f"{part} {unit}"] = {
                    **summary(values),
                    "over_ours_by_least": min(values) / min(mine),
                    "over_ours_by_median": summary(values)["median"] / summary(mine)["median"],
                }
    return result


def rows_of(label: str, result: dict[str, Any]) -> list[list[object]]:
    """One row a variant: least CPU milliseconds and ratios to ours."""
    rows: list[list[object]] = []
    for name, found in result.items():
        row: list[object] = [label, name]
        for part in ("forward", "forward+backward"):
            if f"{part} cpu" not in found:
                row += ["-"] * 4
                continue
            cpu, wall = found[f"{part} cpu"], found[f"{part} wall"]
            row += [f"{cpu['min'] * 1e3:.1f}", f"{cpu['over_ours_by_least']:.2f}"]
            row += [f"{wall['median'] * 1e3:.1f}", f"{wall['over_ours_by_median']:.2f}"]
        rows.append(row)
    return rows


HEADER = ["case", "variant"] + [
    f"{part} {what}" for part in ("f", "f+b") for what in ("CPU ms, least", "/ ours", "wall ms, median", "/ ours")
]


def sparse(given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Block-sparse attention; dense variants do all the work that the layout saves."""
    blocks = given.tokens // given.block
    layout = bigbird(blocks, given.density)
    gathered = buckets(layout)
    variants: dict[str, Attend] = {
        OURS: ours(layout, given.block),
        "SDPA, dense": scaled_dot_product_attention,
        "scores in memory": materialised,
        "SDPA, gathered": lambda q, k, v: GatheredSdpa.apply(q, k, v, gathered, given.block),  # type: ignore[no-untyped-call]
        "FlexAttention": flex(layout, given.block),
    }
    variants = {name: attend for name, attend in variants.items() if name in given.variants.split("; ") or name == OURS}
    shape = (1, given.heads, given.tokens, given.size, DTYPES[dtype])
    tensors = {name: inputs(*shape, grad=name != "FlexAttention") for name in variants}
    if "scores in memory" in variants:  # 6 GB for 8 heads: one head, times the number of heads
        tensors["scores in memory"] = inputs(1, 1, *shape[2:], grad=True)
    samples = measure(variants, tensors, given.rounds, frozenset({"FlexAttention"}))
    result = figures(samples, {"scores in memory": float(given.heads)})
    density = layout.float().mean().item()
    title = f"{dtype}: 1 x {given.heads} x {given.tokens} x {given.size}, block {given.block}, density {density:.3f}"
    print(table(title, HEADER, rows_of(dtype, result)), flush=True)
    return {"density": density, "variants": result}


def dense(given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Causal attention without a layout."""
    result: dict[str, Any] = {}
    rows: list[list[object]] = []
    for tokens in (256, 512, 1024, 2048):
        tensors = inputs(4, given.heads, tokens, given.size, DTYPES[dtype], grad=True)
        variants: dict[str, Attend] = {
            OURS: ours(None, 64, causal=True),
            "SDPA": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        samples = measure(variants, dict.fromkeys(variants, tensors), 2 * given.rounds, frozenset())
        result[str(tokens)] = figures(samples, {})
        rows += rows_of(f"4 x {tokens}", result[str(tokens)])
    print(table(f"{dtype}, causal, {given.heads} heads of {given.size}", HEADER, rows), flush=True)
    return result


def long(given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Peak resident bytes of forward and backward, above the inputs, at 1 % density."""
    tokens = given.long_tokens
    layout = bigbird(tokens // given.block, 0.01)
    attend = ours(layout, given.block)
    q, k, v, grad = inputs(1, given.heads, tokens, given.size, DTYPES[dtype], grad=True)
    ours(None, given.block)(*(x[:, :, : given.block] for x in (q, k, v)))  # what is loaded once is not a step's memory
    result: dict[str, Any] = {"density": layout.float().mean().item()}

    def step() -> None:
        out = attend(q, k, v)
        torch.autograd.grad(out, (q, k, v), grad)

    sample: list[Sample] = []
    result["peak"] = resident_peak(lambda: sample.append(timed(step)))
    result["wall"] = sample[0].wall
    print(
        f"\n{dtype}: {tokens} tokens, {given.heads} heads of {given.size}, density {result['density']:.4f}: forward "
        f"and backward take {result['peak'] / MB:.0f} MB ({result['peak'] / 2**20:.0f} MiB) above the inputs, with "
        f"output and gradients, and {result['wall']:.2f} s",
        flush=True,
    )
    return result


def main(arguments: list[str] | None = None) -> Path:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--long-tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--variants", default="SDPA, dense; scores in memory; SDPA, gathered; FlexAttention")
    parser.add_argument("--parts", default="sparse,dense,long")
    given = parser.parse_args(arguments)
    described = machine.describe()
    print("\n".join(machine.lines(described)), flush=True)
    result: dict[str, Any] = {"machine": described, "arguments": vars(given)}
    parts = {"sparse": sparse, "dense": dense, "long": long}
    for part in given.parts.split(","):
        result[part] = {dtype: parts[part](given, dtype) for dtype in given.dtypes.split(",")}
    result["load_after"] = machine.describe()["load_1_5_15_min"]
    path = save("attention", result)
    print(f"\nload after: {result['load_after']}\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
