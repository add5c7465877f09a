"""One measurement in a fresh process: ``python -m benchmarks.worker TASK SPEC`` prints one line of JSON.

``compile`` times the first forward + backward, imports of the compiler included, as a user waits for it. ``memory``
measures the steady-state step, where no other variant's weights and no compiler garbage share the process's
high-water mark.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import memory
from benchmarks.shares import time_shares
from benchmarks.variants import Spec, Trainer
from dscompile.runtime.pool import POOL

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3


def compile_task(spec: Spec) -> dict[str, Any]:
    """Seconds of the first step (wall; CPU of this process and its finished children), and our report if it is ours."""
    trainer = Trainer(spec)
    ids = trainer.batch(0)
    wall, cpu = time.perf_counter(), _cpu()
    trainer.forward_backward(ids)
    seconds = {"wall": time.perf_counter() - wall, "cpu": _cpu() - cpu}
    trainer.update()
    steady = time.perf_counter()
    trainer.forward_backward(trainer.batch(1))
    return {**seconds, "second_step_wall": time.perf_counter() - steady, **_report(spec)}


def memory_task(spec: Spec) -> dict[str, Any]:
    """Peaks of forward + backward above the step's start, and what is held between steps beside the training state."""
    trainer = Trainer(spec)
    for step in range(WARM_UP):
        trainer.forward_backward(trainer.batch(step))
        trainer.update()
    ids = trainer.batch(WARM_UP)
    held = memory.live_bytes() - trainer.state_bytes() - ids.untyped_storage().nbytes() - POOL.use().used
    POOL.release_idle()
    resident = memory.resident_peak(lambda: trainer.forward_backward(ids))
    trainer.update()
    allocated = memory.allocation_peak(lambda: trainer.forward_backward(ids))
    arena = POOL.use().owned
    difference = abs(resident - allocated - arena) / max(resident, allocated + arena)
    return {
        "allocation_peak": allocated,
        "arena": arena,
        "resident_peak": resident,
        "held_between_steps": held,
        "total": allocated + arena + held,
        "difference": difference,
        "agree": difference <= memory.AGREE,
    }


def shares_task(spec: Spec) -> dict[str, Any]:
    """Shares of a steady forward + backward by kind of kernel; for ours also how much of it is compiled."""
    trainer = Trainer(spec)
    for step in range(WARM_UP):
        trainer.forward_backward(trainer.batch(step))
        trainer.update()
    ids = trainer.batch(WARM_UP)
    return {"time": time_shares(lambda: trainer.forward_backward(ids)), **_report(spec)}


def in_fresh_process(task: str, spec: Spec, cache: Path | None = None) -> dict[str, Any]:
    """Run a task in a new interpreter; both compilers keep their caches under ``cache`` (an empty folder if None)."""
    with tempfile.TemporaryDirectory(prefix="dscompile-bench-") as empty:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker", task, spec.to_json()],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or empty)},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"benchmarks.worker {task} {spec} failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _report(spec: Spec) -> dict[str, Any]:
    """Regions in the programs, regions compiled for them, and seconds by stage, summed over the graphs."""
    if spec.variant != "dscompile":
        return {}
    from dscompile import last_report

    reports = last_report()
    stages: dict[str, float] = {}
    for report in reports:
        stages.update(report.seconds)  # passes and checks are the frame's: both graphs of a frame repeat them
    return {
        "regions": sum(r.facts["regions"] for r in reports),
        "compiled_regions": sum(r.facts["compiled_regions"] for r in reports),
        "aten_regions": sum(r.facts["aten_regions"] for r in reports),
        "bytes_compiled": sum(r.facts["bytes_compiled"] for r in reports) / sum(r.facts["bytes"] for r in reports),
        "fallbacks": [reason for r in reports for reason in r.fallbacks],
        "cached": all(r.cached for r in reports),
        "gemm": reports[-1].gemm,
        "verdict": reports[-1].verdict,
        "stages": stages,
    }


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    """Entry of the fresh process."""
    task, text = sys.argv[1:]
    tasks = {"compile": compile_task, "memory": memory_task, "shares": shares_task}
    print(json.dumps(tasks[task](Spec.from_json(text))))


if __name__ == "__main__":
    main()
