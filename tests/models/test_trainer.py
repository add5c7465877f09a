"""``transformers.Trainer`` with nothing changed but the backend's name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dscompile.accelerate_name import register

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 3


def _train(folder: Path, **settings: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and the trained parameters."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(64, (12,), generator=generator) for _ in range(4)] * STEPS
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        **settings,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_trainer_trains_as_in_eager(tmp_path: Path) -> None:
    register()  # PyTorch does so where dscompile is installed; a checkout has no entry points
    torch._dynamo.reset()
    eager, expected = _train(tmp_path / "eager")
    torch._dynamo.utils.counters.clear()
    compiled, found = _train(tmp_path / "compiled", torch_compile=True, torch_compile_backend="dscompile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled
    assert len(eager) == len(compiled) == STEPS
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0.0)  # Trainer rounds to four digits
    assert eager[-1] < eager[0]
    for name, parameter in expected.items():
        error = (found[name] - parameter).norm() / parameter.norm()
        assert error < 1e-3, f"{name} differs by {error:.2g}"  # Adam divides by gradients that may be near zero


def test_accelerate_takes_the_name_without_an_import_of_ours(tmp_path: Path) -> None:
    """As installed: PyTorch finds the entry point, accelerate is imported later and knows the name."""
    info = tmp_path / "dscompile_probe-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dscompile-probe\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nprobe = dscompile.accelerate_name:register\n")
    program = """
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
assert TorchDynamoPlugin(backend="dscompile").to_kwargs()["backend"] == "dscompile"
assert DynamoBackend("DSCOMPILE") != DynamoBackend.NO
assert "INDUCTOR" in DynamoBackend and "NONSENSE" not in DynamoBackend
import accelerate.utils.dataclasses as module
assert type(module.__spec__.loader).__module__ == "_frozen_importlib_external"
assert "dscompile.backend" not in __import__("sys").modules
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
