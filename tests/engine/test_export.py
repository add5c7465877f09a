"""One file out of a checkpoint, and weights from one file into a model."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import dscompile
from dscompile.engine.checkpoint import save_checkpoint
from dscompile.engine.export import export_safetensors, load_weights
from dscompile.errors import CheckpointError
from dscompile.tools.cli import run as command
from tests.engine.checkpoint_runs import Net, Run
from tests.ranks import run_ranks

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


def save_and_tell(rank: int, world: int, stage: int, folder: str) -> dict[str, torch.Tensor]:
    run = Run(stage)
    run.train(2)
    run.save(folder)
    return {k: v for k, v in run.values().items() if " " not in k}


@pytest.mark.parametrize("stage", [0, 3])
def test_exports_what_safetensors_own_package_reads(tmp_path: Path, stage: int) -> None:
    expected = run_ranks(save_and_tell, 2, stage, str(tmp_path / "run"))[0]
    file = tmp_path / "model.safetensors"
    assert command(["export", str(tmp_path / "run"), str(file)]) == 0
    found = load_file(file)
    assert found.keys() == expected.keys() - {"head.weight"}
    assert all(torch.equal(found[k], expected[k]) for k in found)
    model = Net()
    load_model(model, file)  # which knows the other names of ties
    assert torch.equal(model.head.weight, expected["embedding.weight"])
    assert model.head.weight is model.embedding.weight
    assert {p.name for p in tmp_path.iterdir()} == {"run", "model.safetensors"}


def test_every_dtype_survives(tmp_path: Path) -> None:
    model = nn.Module()
    for number, dtype in enumerate(DTYPES):
        value = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
        model.register_buffer(f"b{number}", value)
    model.register_buffer("scalar", torch.tensor(3.5))
    model.register_buffer("empty", torch.empty(0, 4))
    save_checkpoint(tmp_path, "a", model=model)
    size = export_safetensors(tmp_path, "a", tmp_path / "f.safetensors")
    assert size == (tmp_path / "f.safetensors").stat().st_size
    found = load_file(tmp_path / "f.safetensors")
    for name, value in model.state_dict().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_a_damaged_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "a", model=nn.Linear(3, 3))
    data = tmp_path / "a" / "rank_00000.bin"
    data.write_bytes(bytes(len(data.read_bytes())))
    file = tmp_path / "f.safetensors"
    file.write_text("old")
    with pytest.raises(CheckpointError, match="the file is damaged"):
        export_safetensors(tmp_path, None, file)
    assert file.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "latest", "f.safetensors"}
    assert command(["export", str(tmp_path / "nowhere"), str(file)]) == 2


# -- import ----------------------------------------------------------------------------------------------------------


def imported(rank: int, world: int, stage: int, path: str, key: str | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = dscompile.distribute(Net(), config={"zero": {"stage": stage}})
    load_weights(model, path, key=key)
    values = model.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values.items()}


def files(folder: Path) -> list[tuple[Path, str | None, dict[str, torch.Tensor]]]:
    torch.manual_seed(3)
    source = Net()
    source.seen += 5
    state = {k: v.clone() for k, v in source.state_dict().items()}
    save_model(source, str(folder / "a.safetensors"))
    save_file({f"_orig_mod.{k}": v for k, v in state.items()}, folder / "b.safetensors")
    torch.save(state, folder / "c.pt")
    torch.save({"module": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, folder / "d.bin")
    keys = {"d.bin": "module"}
    return [(p, keys.get(p.name), state) for p in sorted(folder.iterdir())]


@pytest.mark.parametrize(("stage", "world"), [(3, 3), (1, 2), (0, 1)])
def test_weights_of_other_programs_fill_a_distributed_model(tmp_path: Path, stage: int, world: int) -> None:
    for path, key, expected in files(tmp_path)[: 4 if stage == 3 else 2]:
        found = run_ranks(imported, world, stage, str(path), key)[world - 1]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected), path


def biggest(rank: int, world: int, path: str) -> int:
    """Elements of the largest tensor that is made while loading."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "empty" in str(func):
                sizes.append(out.nbytes)
            return out

    model = dscompile.distribute(nn.Linear(64, 128, bias=False), config={"zero": {"stage": 3}})
    with Watch():
        load_weights(model, path)
    return max(sizes)


def test_no_rank_reads_more_than_its_rows(tmp_path: Path) -> None:
    save_file(nn.Linear(64, 128, bias=False).state_dict(), tmp_path / "f.safetensors")
    assert run_ranks(biggest, 4, str(tmp_path / "f.safetensors")) == [4 * 64 * 128 // 4] * 4


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['BOMB']}",)


def refused(rank: int, world: int, path: str) -> tuple[str, bool]:
    torch.manual_seed(0)
    model = dscompile.distribute(nn.Linear(4, 3), config={"zero": {"stage": 3}})
    before = [p.to_local().clone() for p in model.parameters()]
    with pytest.raises(CheckpointError) as found:
        load_weights(model, path)
    return str(found.value), all(torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters(), strict=True))


def test_files_that_do_not_fit_change_nothing_on_any_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    good = nn.Linear(4, 3).state_dict()
    save_file(good, tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    cases: dict[str, tuple[bytes | None, str]] = {
        "none.safetensors": (None, "cannot read"),
        "none.pt": (None, "cannot read"),
        "cut.safetensors": (data[:-1], "no whole safetensors file"),
        "head.safetensors": (data[:20], "no whole safetensors file"),
        "tiny.safetensors": (b"\0" * 4, "no whole safetensors file"),
        "huge.safetensors": (b"\xff" * 64, "no whole safetensors file"),
        "out.safetensors": (data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'), "no whole safetensors file"),
        "text.pt": (b"hello", "PyTorch cannot read it"),
        "bomb.pt": (pickle.dumps(Bomb()), "PyTorch cannot read it"),
    }
    for name, (content, _) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    torch.save({"model": good, "step": 4}, tmp_path / "nested.pt")
    cases["nested.pt"] = (None, "it holds 'model', 'step'")
    save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    cases["shape.safetensors"] = (None, "weight is [3, 4] here and [3, 5] there")
    save_file({**good, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    cases["more.safetensors"] = (None, "more [1] is only in the file")
    save_file({"weight": good["weight"].long(), "bias": good["bias"]}, tmp_path / "kind.safetensors")
    cases["kind.safetensors"] = (None, "weight: is torch.int64 in the file and torch.float32 in the model")
    for (name, (_, text)), results in zip(
        cases.items(), run_ranks(refuse_all, 2, str(tmp_path), list(cases))[0], strict=True
    ):
        assert text in results[0], name
        assert name in results[0] or "weight: is" in results[0]
        assert results[1], name
    assert not (tmp_path / "exploded").exists()


def refuse_all(rank: int, world: int, folder: str, names: list[str]) -> list[tuple[str, bool]]:
    return [refused(rank, world, f"{folder}/{name}") for name in names]


def test_weights_are_converted_to_the_models_dtype(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, tmp_path / "f.safetensors")
    other = nn.Linear(4, 3)
    load_weights(other, tmp_path / "f.safetensors")
    assert torch.equal(other.weight, model.weight.bfloat16().float())
    header = json.loads((tmp_path / "f.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert {v["dtype"] for v in header.values()} == {"BF16"}
