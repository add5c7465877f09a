"""What outlives a process or meets other libraries: pickling, checkpoints, optimizers, clipping."""

from __future__ import annotations

import pickle
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

import dscompile
from dscompile.placement import resident_of, spec_of
from tests.distributed.contract import assert_gradients, assert_values, data, full, mean_loss, param, run_checks, seeded
from tests.ranks import run_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = nn.Parameter(torch.randn(5, 5))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.wide = nn.Parameter(torch.randn(9, 9))  # 4 ranks form a grid
        self.third = nn.Linear(5, 5, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).tanh()) * self.scale * self.wide.cos().mean()


def loss(model: nn.Module, rank: int) -> Tensor:
    total: Tensor = model(data((4, 3), rank)).square().mean()
    return total


OPTIMIZERS = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


def check_optimizers_and_clipping(rank: int, world: int) -> None:
    for stage in (0, 1, 3):
        for name, make in OPTIMIZERS.items():
            reference, model = seeded(Net), dscompile.distribute(seeded(Net), config={"zero": {"stage": stage}})
            optimizers = make(model.parameters()), make(reference.parameters())
            for _ in range(2):
                loss(model, rank).backward()
                mean_loss(reference, loss, world).backward()
                ours = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                theirs = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
                torch.testing.assert_close(full(ours), theirs, msg=f"{name}, stage {stage}: clipped norm")
                assert_gradients(model, reference)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                assert_values(model, reference, atol=2e-6)


def check_generate(rank: int, world: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> nn.Module:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()

    reference, model = seeded(make), dscompile.distribute(seeded(make, rank))
    prompt = torch.tensor([[3, 5, 7]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = reference.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), want)
    reads = dscompile.access_count(model)
    assert reads >= 5 * 21  # each forward pass gathers all 21 parameters
    with torch.no_grad(), dscompile.gathered(model):
        assert torch.equal(model.generate(prompt, **options), want)
    assert dscompile.access_count(model) == reads


def check_resident_copy_is_updated_in_place(rank: int, world: int) -> None:
    for stage in (1, 2):
        model = dscompile.distribute(seeded(Net), config={"zero": {"stage": stage}})
        weight = param(model, "second.weight")
        resident, spec = resident_of(weight), spec_of(weight)
        assert torch.equal(resident, seeded(Net).second.weight)
        loss(model, rank).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert torch.equal(spec.shard_of(resident, rank), weight.to_local())
        assert not torch.equal(resident, seeded(Net).second.weight)
        assert resident_of(weight) is resident


def check_not_elementwise_is_refused(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Net))
    loss(model, rank).backward()
    with pytest.raises(dscompile.DscompileError, match="Adafactor does not update element by element"):
        torch.optim.Adafactor(model.parameters()).step()
    replicated = dscompile.distribute(seeded(Net), config={"zero": {"stage": 0}})
    loss(replicated, rank).backward()
    torch.optim.Adafactor(replicated.parameters()).step()


def check_distributed_checkpoint(rank: int, world: int) -> None:
    names: list[str | None] = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(names)
    for stage in (1, 3):
        folder = f"{names[0]}/{stage}"
        models = [dscompile.distribute(seeded(Net, s), config={"zero": {"stage": stage}}) for s in (0, 3)]
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
        loss(models[0], rank).backward()
        optimizers[0].step()
        state = dict(zip(("model", "optimizer"), get_state_dict(models[0], optimizers[0]), strict=True))
        dcp.save(state, checkpoint_id=folder)
        loaded = dict(zip(("model", "optimizer"), get_state_dict(models[1], optimizers[1]), strict=True))
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(models[1], optimizers[1], model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            loss(model, rank).backward()
            optimizer.step()
        for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
            assert torch.equal(full(ours), full(theirs))
        whole = get_model_state_dict(models[0], options=StateDictOptions(full_state_dict=True))
        assert all(type(v) is Tensor for v in whole.values())
        if rank == 0:
            assert whole["second.weight"].shape == (5, 5)


def save_everything(rank: int, world: int, folder: str) -> list[float]:
    for stage in (1, 3):
        model = dscompile.distribute(seeded(Net), config={"zero": {"stage": stage}})
        torch.save(model, f"{folder}/model.{stage}.{rank}")
        torch.save(model.state_dict(), f"{folder}/state.{stage}.{rank}")
        Path(f"{folder}/pickle.{stage}.{rank}").write_bytes(pickle.dumps(model))
        assert spec_of(param(model, "scale")) is not None  # pickling takes nothing away
    return loss(model, rank).tolist()


def load_everything(rank: int, world: int, folder: str) -> None:
    torch.distributed.device_mesh.init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    for stage in (1, 3):
        reference = seeded(Net)
        models = [
            torch.load(f"{folder}/model.{stage}.{rank}", weights_only=False),
            pickle.loads(Path(f"{folder}/pickle.{stage}.{rank}").read_bytes()),
        ]
        for model in models:
            assert_values(model, reference)
            assert spec_of(param(model, "first.weight")).stage == stage
            assert (resident_of(param(model, "first.weight")) is not None) == (stage == 1)
            assert param(model, "second.weight") is model.third._parameters["weight"]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            loss(model, rank).backward()
            optimizer.step()
            dscompile.check_plain(model)
            grads = [full(p.grad) for p in model.parameters()]
        mean_loss(reference, loss, world).backward()
        for grad, p in zip(grads, reference.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad)
        state = torch.load(f"{folder}/state.{stage}.{rank}", weights_only=True)
        fresh = dscompile.distribute(seeded(Net, 9), config={"zero": {"stage": stage}})
        fresh.load_state_dict(state)
        assert_values(fresh, seeded(Net))


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=240)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("row", ROWS)
def test_storage(row: str, world: int) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(world)) if found[row]]
    assert not failed, "\n".join(failed)


def test_pickled_models_work_in_fresh_processes(tmp_path: Path) -> None:
    run_ranks(save_everything, 2, str(tmp_path), timeout=120)
    run_ranks(load_everything, 2, str(tmp_path), timeout=120)
