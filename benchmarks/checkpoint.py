"""What a save costs training: ``python -m benchmarks.checkpoint``, or under ``torchrun --nproc-per-node N -m``.

Each round trains three blocks of steps: without a save, with an asynchronous one at its beginning (the block goes on
until the save has ended), and times a synchronous save. *Blocked* is the time in which training stands still: in the
call, and in ``optimizer.step()`` until all values are copied. *Slowed* is all the time a block took longer than its
steps alone, which includes what copying and writing take from training in cores and memory bandwidth. *Copied at once*
is what blocking would be if the call copied everything before it returned.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import dscompile
from benchmarks import machine
from benchmarks.results import save, table
from dscompile.engine.checkpoint import SaveHandle, save_checkpoint

WIDTH = 2048


class Trainer:
    """A stack of square layers under AdamW: twelve bytes of state a parameter."""

    def __init__(self, megabytes: int, rows: int) -> None:
        torch.manual_seed(0)
        layers = max(round(megabytes * 1e6 / (12 * WIDTH * WIDTH)), 1)
        self.model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])
        if dist.is_initialized():
            dscompile.distribute(self.model, config={"zero": {"stage": 1}})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.x = torch.randn(rows, WIDTH)
        self.bytes = 12 * layers * WIDTH * WIDTH

    def step(self) -> None:
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: str, tag: str, *, asynchronous: bool) -> SaveHandle:
        return save_checkpoint(folder, tag, model=self.model, optimizer=self.optimizer, asynchronous=asynchronous)


def one_round(trainer: Trainer, folder: str, number: int) -> dict[str, float]:
    """Seconds of each part of one round."""
    start = time.perf_counter()
    handle = trainer.save(folder, f"a{number}", asynchronous=True)
    call = time.perf_counter() - start
    steps = 0
    while not handle.done() or steps < 2:
        trainer.step()
        steps += 1
        if dist.is_initialized():  # all ranks take equally many
            ended = torch.tensor(int(handle.done()))
            dist.all_reduce(ended, dist.ReduceOp.MIN)
            if ended and steps >= 2:
                break
            if not ended and handle.done():
                continue
    handle.wait()
    with_save = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    without = time.perf_counter() - start
    start = time.perf_counter()
    trainer.save(folder, f"s{number}", asynchronous=False)
    synchronous = time.perf_counter() - start
    start = time.perf_counter()
    second = trainer.save(folder, f"c{number}", asynchronous=True)
    second.wait_staged()
    at_once = time.perf_counter() - start
    second.wait()
    for path in Path(folder).glob(f"?{number}"):
        shutil.rmtree(path, ignore_errors=True)
    return {
        "synchronous": synchronous,
        "call": call,
        "blocked": handle.blocked_seconds,
        "slowed": with_save - without,
        "at_once": at_once,
        "step": without / steps,
        "steps": steps,
    }


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400, help="of state, over all ranks")
    parser.add_argument("--rows", type=int, default=512, help="of a batch: how long a step takes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    described = machine.describe()
    trainer = Trainer(given.megabytes, given.rows)
    folder = tempfile.mkdtemp(dir=given.folder)
    if dist.is_initialized():
        shared = [folder]
        dist.broadcast_object_list(shared)
        folder = shared[0]
    try:
        for _ in range(2):
            trainer.step()
        first = one_round(trainer, folder, 0)  # makes the host buffer
        rounds = [one_round(trainer, folder, number) for number in range(1, given.rounds + 1)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    middle = {key: statistics.median(r[key] for r in rounds) for key in first}
    result = {"machine": described, "bytes": trainer.bytes, "first": first, "rounds": rounds, "median": middle}
    share = {key: f"{100 * middle[key] / middle['synchronous']:.1f} %" for key in middle}
    rows = [[key, f"{first[key]:.3f}", f"{middle[key]:.3f}", share[key]] for key in middle if key != "steps"]
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("\n".join(machine.lines(described)))
        print(f"{trainer.bytes / 1e6:.0f} MB of state, {middle['steps']:.0f} steps while an asynchronous save goes on")
        print(table("a save", ["seconds", "first save", "median", "of synchronous"], rows))
    if dist.is_initialized():
        dist.destroy_process_group()
    return save("checkpoint", result)


if __name__ == "__main__":
    main()
