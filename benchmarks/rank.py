"""One rank: ``python -m benchmarks.rank SPEC FILE`` trains some steps and writes what it measured as JSON.

The order is: imports (and the compiler's start), resident memory, model, first step, warm-up, the timed window, the
bytes held, and last one step under the profiler. Everything but the profile is measured on every rank.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import memory
from benchmarks.measure import Sample, timed
from benchmarks.peers_distributed import RankSpec, Step, build, load
from benchmarks.variants import token_ids
from benchmarks.wire import transmitted


class Rank:
    """The part of one process in a measurement."""

    def __init__(self, spec: RankSpec, rank: int) -> None:
        self.spec = spec
        self.rank = rank
        self.done = 0
        self.losses: list[float] = []

    def train(self, step: Step) -> Sample:
        """Take the next step on this rank's rows of its batch, and keep the loss."""
        rows = self.spec.batch // self.spec.ranks
        ids = token_ids(self.spec, self.done)[self.rank * rows : (self.rank + 1) * rows]
        losses: list[torch.Tensor] = []
        sample = timed(lambda: losses.append(step(ids[:, :-1], ids[:, 1:])))
        self.losses.append(losses[0].item())
        self.done += 1
        return sample

    def measure(self) -> dict[str, Any]:
        """Do everything, in the order of the module's text."""
        spec = self.spec
        torch.set_num_threads(1)
        start = timed(lambda: load(spec))
        imported = memory.resident()
        if spec.contestant.kind == "deepspeed":
            _join_deepspeed()
        else:
            dist.init_process_group("gloo")
        steps: list[Step] = []
        setup = timed(lambda: steps.append(build(spec)))
        step = steps[0]
        first = self.train(step)
        for _ in range(spec.warm_up - 1):
            self.train(step)
        gc.collect()
        window: dict[str, int] = {}
        with self._wire(window):
            memory.reset_resident_peak()
            samples = [self.train(step) for _ in range(spec.steps)]
            high = memory.resident_high()
        held = memory.live_bytes()
        leased, arena = self._arena()
        result = {
            "wall": [s.wall for s in samples],
            "cpu": [s.cpu for s in samples],
            "wire": window["bytes"] / spec.steps / spec.ranks if spec.private_network else None,
            "held": held - leased,
            "arena": arena,
            "resident_above_imports": high - imported,
            "resident_at_imports": imported,
            "compiler_start": start.wall,
            "setup": setup.wall,
            "first_step": first.wall,
            "first_step_cpu": first.cpu,
            "version": _version(spec),
            **self._compiled(),
        }
        result["peak"] = self._peak(step) + arena
        return {**result, "losses": self.losses}

    @contextmanager
    def _wire(self, window: dict[str, int]) -> Iterator[None]:
        """Count what ``lo`` transmits inside; no rank sends before all have entered, nor after the first has left."""
        dist.barrier()
        before = transmitted()
        dist.barrier()
        yield
        dist.barrier()
        window["bytes"] = transmitted() - before
        dist.barrier()

    def _arena(self) -> tuple[int, int]:
        """Bytes of dscompile's arena for values inside a step: leased now (live, so counted as such), and owned."""
        if self.spec.contestant.kind != "ours":
            return 0, 0
        from dscompile.runtime.pool import POOL

        use = POOL.use()
        return use.used, use.owned

    def _compiled(self) -> dict[str, Any]:
        """How our graphs were checked, whether they came from the cache, and every fallback."""
        if self.spec.contestant.kind != "ours":
            return {"fallbacks": []}
        from dscompile import last_report

        reports = last_report()
        return {
            "fallbacks": [reason for report in reports for reason in report.fallbacks],
            "verdicts": sorted({report.verdict for report in reports}),
            "cached": [report.cached for report in reports],
            "gemm": reports[-1].gemm,
        }

    def _peak(self, step: Step) -> int:
        """The allocator's peak of one step above its start, on rank 0; the others take the step with it."""
        if self.rank:
            self.train(step)
            return 0
        return memory.allocation_peak(lambda: self.train(step))


def _join_deepspeed() -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")


def _version(spec: RankSpec) -> str:
    if spec.contestant.kind == "deepspeed":
        return f"deepspeed {importlib.metadata.version('deepspeed')}, torch {torch.__version__}"
    return f"torch {torch.__version__}"


def main() -> None:
    """Entry of a rank; ``RANK`` and the rest of torchrun's variables are set."""
    text, path = sys.argv[1:]
    rank = Rank(RankSpec.from_json(text), int(os.environ["RANK"]))
    start = time.perf_counter()
    result = rank.measure()
    Path(path).write_text(json.dumps({**result, "seconds": time.perf_counter() - start}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
