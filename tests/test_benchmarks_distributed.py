"""The instruments of ``benchmarks.distributed``: that they measure what they say. No test here asserts a speed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks import distributed, memory, wire
from benchmarks.distributed_tables import loss_difference, ratios, summarise
from benchmarks.peers_distributed import VARIANTS, RankSpec
from benchmarks.ranks import RankFailedError, run_ranks

ROOT = Path(distributed.__file__).resolve().parent.parent
MIB = 1 << 20
TINY = RankSpec(variant="ddp", model="gpt-500k", layers=1, batch=2, warm_up=1, steps=2)
PARAMETERS = 512 * 128 * 2 + 64 * 128 + (12 * 128 * 128 + 13 * 128) + 2 * 128
"""Of gpt-500k with one layer, by hand: embedding and head, positions, block, last norm."""

needs_namespace = pytest.mark.skipif(wire.private_prefix() is None, reason="no network namespace may be made here")


def test_variants_take_turns_from_both_ends() -> None:
    assert [distributed.turn("abc", index) for index in range(4)] == [list(o) for o in ("abc", "acb", "cab", "cba")]


def test_ideal_state_is_that_of_the_paper() -> None:
    def ideal(variant: str, ranks: int = 2) -> float:
        return replace(TINY, variant=variant, ranks=ranks).ideal_state / PARAMETERS

    assert ideal("ddp") == ideal("zero0") == 12
    assert ideal("ds_z1") == ideal("zero2") == 4 + 4
    assert ideal("fsdp2") == ideal("zero3_all") == 6
    assert ideal("zero3", ranks=4) == 3


def test_same_gemm_changes_the_peers_only() -> None:
    precisions = {name: RankSpec(name, gemm="same").precision for name in VARIANTS}
    assert {name for name, precision in precisions.items() if precision == "highest"} == {
        "zero0", "zero1", "zero2", "zero3_none", "zero3", "zero3_all",
    }  # fmt: skip
    assert {RankSpec(name, gemm="user").precision for name in VARIANTS} == {"highest"}


def test_live_bytes_sees_through_a_wrapper_tensor() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = memory.live_bytes()
        sharded = DTensor.from_local(torch.zeros(MIB, dtype=torch.uint8), init_device_mesh("cpu", (1,)), [Shard(0)])
        assert memory.live_bytes() - before == pytest.approx(MIB, abs=4096)
        del sharded
    finally:
        dist.destroy_process_group()


LOOPBACK = """
import socket, threading
from benchmarks import wire
wire.raise_loopback()
server = socket.create_server(("127.0.0.1", 0))
before = wire.transmitted()
client = socket.create_connection(server.getsockname())
accepted, _ = server.accept()
sender = threading.Thread(target=client.sendall, args=(bytes({size}),))
sender.start()
received = 0
while received < {size}:
    received += len(accepted.recv(1 << 20))
sender.join()
print(wire.transmitted() - before)
"""


@needs_namespace
def test_wire_bytes_are_those_sent_in_the_private_network() -> None:
    size = 32 * MIB
    command = [*(wire.private_prefix() or ()), sys.executable, "-c", LOOPBACK.format(size=size)]
    counted = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert size < counted < 1.02 * size  # headers and acknowledgements


@needs_namespace
def test_a_private_network_does_not_see_the_outside() -> None:
    before = wire.transmitted()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        sender = threading.Thread(target=client.sendall, args=(bytes(MIB),))
        sender.start()
        accepted.recv(MIB, socket.MSG_WAITALL)
        sender.join()
        accepted.close()
    assert wire.transmitted() - before > MIB  # the outer counter sees it
    inside = "from benchmarks import wire; print(wire.transmitted())"
    command = [*(wire.private_prefix() or ()), sys.executable, "-c", inside]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "0\n"


def test_a_failing_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    broken = replace(TINY, model="no-such-model")
    with pytest.raises(RankFailedError, match=r"(?s)rank [01] failed:.*no-such-model"):
        run_ranks(broken, sys.executable, tmp_path, None, timeout=120)


def test_ranks_that_take_too_long_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="not done after 1 s"):
        run_ranks(TINY, sys.executable, tmp_path, None, timeout=1)


def one_rank(walls: list[float], **others: Any) -> dict[str, Any]:
    rank: dict[str, Any] = {"wall": walls, "cpu": walls, "wire": 8.0, "held": 6, "arena": 1, "peak": 3}
    rank |= {"resident_above_imports": 9, "compiler_start": 1.0, "first_step": 2.0, "losses": [3.0, 2.0, 1.0]}
    return {**rank, "fallbacks": [], "version": "torch", **others}


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    spec = replace(TINY, steps=3, private_network=True)
    cold = [one_rank([1.0, 5.0, 2.0], first_step=9.0, resident_above_imports=90), one_rank([4.0, 1.0, 3.0], peak=7)]
    warm = [one_rank([1.0, 1.0, 1.0]), one_rank([2.0, 2.0, 2.0], losses=[5.0, 4.0, 3.0])]
    found = summarise(spec, [cold, warm])
    assert found["wall"] == [4.0, 2.0]
    assert found["cpu"] == [2.5, 1.5]
    assert (found["first_step_cold"], found["first_step_warm"]) == (10.0, 3.0)
    assert found["resident"] == 9  # the cold round's compiler garbage is no steady state
    assert (found["peak"], found["state"], found["wire"]) == (5.0, 6, 8.0)
    assert found["losses"] == [3.0, 2.0, 1.0]


def test_ours_is_compared_with_its_stage_and_with_ddp() -> None:
    one = {"wall": [1.0], "cpu": [1.0], "wire": 2.0, "state": 3.0, "peak": 4.0, "resident": 5.0}
    found = ratios({name: dict(one) for name in ("eager", "ddp", "fsdp2", "ds_z1", "zero1", "zero3")})
    pairs = [(row["ours"], row["theirs"]) for row in found]
    assert pairs == [("zero1", "ddp"), ("zero1", "ds_z1"), ("zero3", "ddp"), ("zero3", "fsdp2")]
    half = ratios({"ddp": one, "zero1": {**one, "wire": 1.0, "wall": [0.25]}})[0]
    assert (half["wire"], half["state"], half["wall"]["median"]) == (0.5, 1.0, 0.25)


def test_loss_difference_is_relative_and_of_the_worst_step() -> None:
    assert loss_difference([2.0, 5.0], [2.0, 4.0]) == 0.25


def test_ours_beside_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.results.FOLDER", tmp_path)
    size = "--model gpt-500k --layers 1 --batch 2 --rounds 1 --steps 2 --warm-up 1"
    variants = ("--variants", "ddp,zero3_none,ds_z1", "--options", '{"regions": "aten"}')
    path = distributed.main([*size.split(), *variants])
    result = json.loads(path.read_text())
    assert result["skipped"] == {"ds_z1": "no --deepspeed-python"}
    assert "skipped: ds_z1" in capsys.readouterr().out
    ddp, ours = result["summary"]["ddp"], result["summary"]["zero3_none"]
    assert len(ours["losses"]) == 3
    assert loss_difference(ours["losses"], ddp["losses"]) < 1e-5
    assert ddp["state"] == pytest.approx(12 * PARAMETERS, rel=0.02)
    assert ours["state"] == pytest.approx(6 * PARAMETERS, rel=0.02)
    if wire.private_prefix() is None:
        assert ddp["wire"] is None
        return
    assert ddp["wire"] == pytest.approx(4 * PARAMETERS, rel=0.05)  # an all-reduce
    again = PARAMETERS - 512 * 128 - 64 * 128  # backward reads no embedding
    assert ours["wire"] == pytest.approx(2 * (2 * PARAMETERS + again), rel=0.05)  # gathers and a true reduce-scatter
