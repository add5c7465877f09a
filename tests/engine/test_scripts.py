"""Three scripts written for DeepSpeed run with nothing but the import replaced, on two ranks started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).with_name("scripts")
DS_CONFIG = {
    "train_batch_size": 16,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "Adam", "params": {"lr": 0.03, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


def run(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Replace the import, run on two ranks, return what the script wrote."""
    text = (SCRIPTS / f"{name}.py").read_text()
    assert text.count("import deepspeed\n") == 1
    script = folder / f"{name}.py"
    script.write_text(text.replace("import deepspeed\n", "import dscompile as deepspeed\n"))
    result = folder / "result.json"
    environment = {
        **os.environ,
        "RESULT": str(result),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    return dict(json.loads(result.read_text()))


def test_the_plain_loop(tmp_path: Path) -> None:
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps(DS_CONFIG))
    saved = str(tmp_path / "checkpoints")
    result = run("plain_loop", tmp_path, "--deepspeed_config", str(config), "--save", saved, "--epochs", "6")
    assert result["steps"] == result["loaded_steps"] == 24
    assert (result["loaded"], result["epoch"], result["zero"]) == ("epoch5", 5, 2)
    assert result["same"] is True
    assert sum(result["losses"][-4:]) < 0.5 * sum(result["losses"][:4])


def test_accumulation_and_fp16(tmp_path: Path) -> None:
    result = run("accumulation_fp16", tmp_path)
    assert result["accumulation"] == 4
    assert (result["steps"], result["micro_steps"], result["skipped"]) == (15, 60, 0)
    assert result["boundaries"] == [False, False, False, True] * 15
    assert result["scale"] == 2.0**12
    assert result["dtype"] == "torch.float16"
    assert result["sums"][0] == result["sums"][1]
    assert result["rates"][-1] == pytest.approx(0.01)
    assert result["scheduler"] == result["rates"][-1]
    assert sum(result["losses"][-8:]) < 0.8 * sum(result["losses"][:8])


def by_hand() -> tuple[list[float], float]:
    """The third script's training, written in plain PyTorch on one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def micro(count: int) -> Any:
        generator = torch.Generator().manual_seed(5)
        for _ in range(count):
            x = torch.randn(8, 10, generator=generator)
            yield nn.functional.mse_loss(model(x), x[:, :3].sum(1, keepdim=True))

    losses, total = [], 0.0
    for index, loss in enumerate(micro(20)):
        (loss / 2).backward()
        total += loss.item() / 2
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            total = 0.0
    with torch.no_grad():
        return losses, sum(loss.item() for loss in micro(2)) / 2


def test_whole_batches(tmp_path: Path) -> None:
    result = run("whole_batches", tmp_path)
    losses, held_out = by_hand()
    assert result["steps"] == 10
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    assert result["held_out"] == pytest.approx(held_out, rel=1e-5)
    assert result["filled"] == [0.25]
