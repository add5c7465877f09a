"""No rank hangs: deaths, exceptions, different programs and early ends become one named error on every other rank.

Real gloo processes; times are shortened (``TIMEOUT``), and every test bounds them by the shortened ones.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dscompile.errors import RankError
from dscompile.runtime.agree import signature
from dscompile.runtime.judge import EXIT_CODE
from dscompile.runtime.watch import Watch, is_connection_error
from dscompile.torch_compat import default_store
from tests.ranks import Outcome, StoreHost, rank_outcomes, run_ranks

TIMEOUT = 6.0
INTERVAL = 0.2
FORWARD = signature(["all_gather dp wte.weight fp32[64]", "all_gather dp h.0.weight fp32[64]"])
BACKWARD = signature(["all_gather dp h.0.weight fp32[64]", "reduce dp wte.weight fp32[64]"])
OTHER = signature(["all_gather dp wte.weight fp32[64]", "all_gather dp h.1.weight fp32[64]"])


def begin(rank: int, world: int, timeout: float = TIMEOUT) -> Watch:
    return Watch.start(default_store(), rank, world, timeout=timeout, interval=INTERVAL)


def step(watch: Watch, index: int) -> None:
    """Two programs with two collectives each, as a training step has them."""
    for name, program in (("forward", FORWARD), ("backward", BACKWARD)):
        with watch.call(program, f"step {index} {name}"):
            for line in program.texts:
                watch.at(line.split()[2])
                dist.all_reduce(torch.ones(4096))


def die_after(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def assert_named(outcome: Outcome, kind: str, ranks: tuple[int, ...], *texts: str, within: float = TIMEOUT) -> None:
    """A rank ended with the named error, in time after it noticed nothing (starting up takes a few seconds)."""
    assert isinstance(outcome.error, RankError), f"rank {outcome.rank}: {outcome.trace}\n{outcome.stderr}"
    assert (outcome.error.kind, outcome.error.ranks) == (kind, ranks), str(outcome.error)
    for text in texts:
        assert text in str(outcome.error)
    assert not outcome.timed_out
    took = float(outcome.stderr.rpartition("took ")[2].split()[0])
    assert took < within, f"{took} s after the last step that worked"


def timed_steps(watch: Watch, first: int = 0) -> None:
    """Steps without end; what ends them is reported with the time since the last whole one."""
    last = time.monotonic()
    try:
        for index in range(first, sys.maxsize):
            step(watch, index)
            last = time.monotonic()
    finally:
        sys.stderr.write(f"took {time.monotonic() - last:.2f} s\n")


def killed(rank: int, world: int, victim: int, seconds: float) -> None:
    with begin(rank, world) as watch:
        step(watch, 0)
        if rank == victim:
            die_after(seconds)
        timed_steps(watch, 1)


def check_kill(world: int, victim: int, seconds: float, store: StoreHost = "parent") -> None:
    outcomes = rank_outcomes(killed, world, victim, seconds, timeout=40, store=store)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    for outcome in outcomes:
        if outcome.rank != victim:
            last = f"rank {victim}, at its last beat"
            mine = f"rank {outcome.rank} (this one) is in call "
            assert_named(outcome, "died", (victim,), f"rank {victim} has died", "is gone", last, mine, "weight")


@pytest.mark.parametrize(("victim", "seconds"), [(1, 0.5), (0, 0.73)])
def test_kill_9_of_one_of_two(victim: int, seconds: float) -> None:
    check_kill(2, victim, seconds)


def test_kill_9_of_one_of_three() -> None:
    check_kill(3, 1, 0.4)


@pytest.mark.parametrize("world", [2, 3])
def test_kill_9_of_the_stores_host(world: int) -> None:
    check_kill(world, 0, 0.6, store="rank0")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kill_9_at_ten_random_points(seed: int) -> None:
    draw = random.Random(seed)
    check_kill(2, draw.randrange(2), draw.uniform(0.0, 2.0), store=draw.choice(["parent", "rank0"]))


def killed_while_others_are_busy(rank: int, world: int) -> None:
    """The survivor is in no collective when the other dies: nothing but the watch can tell it before the next one."""
    with begin(rank, world) as watch:
        step(watch, 0)
        if rank == 1:
            time.sleep(2 * INTERVAL)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
        sys.stderr.write("took 0 s\n")
        watch.enter(FORWARD, "step 1 forward")


def test_death_between_programs() -> None:
    survivor = rank_outcomes(killed_while_others_are_busy, 2)[0]
    assert_named(survivor, "died", (1,), "rank 1, at its last beat", "after call 2 (step 0 backward) at wte.weight")


def raises(rank: int, world: int, linger: float) -> None:
    watch = begin(rank, world)
    step(watch, 0)
    if rank == 1:
        try:
            with watch.call(FORWARD, "step 1 forward"):
                watch.at("h.3.attn")
                raise KeyError("planted")
        finally:
            time.sleep(linger)  # the process, and so gloo's connections, stay
    try:
        timed_steps(watch, 1)
    finally:
        watch.stop()


@pytest.mark.parametrize("world", [2, 3])
def test_rank_that_raises(world: int) -> None:
    outcomes = rank_outcomes(raises, world, 4.0, timeout=40)
    assert isinstance(outcomes[1].error, KeyError)
    assert max(outcomes, key=lambda o: o.seconds).rank == 1, "the others ended because it did"
    for outcome in (outcomes[0], *outcomes[2:]):
        here = f"rank {outcome.rank} (this one) is in call 3 (step 1 forward) at wte.weight"
        there = "rank 1 was in call 3 (step 1 forward) at h.3.attn"
        assert_named(outcome, "raised", (1,), "rank 1 raised KeyError: 'planted'", there, here)


def barrier_outside_programs(rank: int, world: int) -> str:
    with begin(rank, world) as watch:
        step(watch, 0)
        if rank == 1:
            watch.failed(OSError("disk full"))
            time.sleep(4)
            return ""
        try:
            dist.barrier()
        except RuntimeError as error:
            return str(watch.explain(error))
        return "the barrier returned"


def test_blocked_outside_programs() -> None:
    text = run_ranks(barrier_outside_programs, 2)[0]
    assert text.startswith("rank 1 raised OSError: disk full\n  rank 1 was after call 2 (step 0 backward)")
    assert "rank 0 (this one) is after call 2 (step 0 backward) at wte.weight" in text


def differs(rank: int, world: int, odd: int) -> None:
    with begin(rank, world) as watch:
        step(watch, 0)
        began = time.monotonic()
        try:
            if rank != odd:
                with watch.call(FORWARD, "step 1 forward"):
                    watch.at("wte.weight")
                    dist.all_reduce(torch.ones(4096))
            else:
                with watch.call(OTHER, "step 1 eval"):
                    watch.at("h.1.weight")
                    dist.recv(torch.ones(8), src=(odd + 1) % world, tag=7)
        finally:
            sys.stderr.write(f"took {time.monotonic() - began:.2f} s\n")


@pytest.mark.parametrize("world", [2, 3])
def test_different_programs(world: int) -> None:
    for outcome in rank_outcomes(differs, world, world - 1, timeout=40):
        error = outcome.error
        assert isinstance(error, RankError), outcome.trace + outcome.stderr
        assert world - 1 in error.ranks
        a, b = error.ranks
        labels = {world - 1: "'step 1 eval'"}
        texts = [f"rank {r} runs {labels.get(r, repr('step 1 forward'))}" for r in (a, b)]
        lines = {world - 1: OTHER.texts[1]}
        texts += [f"rank {r}: {lines.get(r, FORWARD.texts[1])}" for r in (a, b)]
        places = {world - 1: "in call 3 (step 1 eval) at h.1.weight"}
        texts += [f"rank {r} is {places.get(r, 'in call 3 (step 1 forward) at wte.weight')}" for r in (a, b)]
        assert_named(outcome, "differs", (a, b), "at call 3", "collective 2 (of 2 and 2)", *texts)


def unequal_lengths(rank: int, world: int) -> None:
    with begin(rank, world) as watch:
        for index in range(3):
            step(watch, index)
        if rank == 1:
            watch.stop()
            time.sleep(5)  # alive, so gloo does not notice
            return
        timed_steps(watch, 3)


def test_rank_that_ends_early() -> None:
    zero, one = rank_outcomes(unequal_lengths, 2, timeout=40)
    assert_named(zero, "left", (1,), "rank 1 has left, without an error, after call 6", "in call 7 (step 3 forward)")
    assert one.ok


def ends_while_others_work(rank: int, world: int) -> str:
    with begin(rank, world, timeout=2.0) as watch:
        step(watch, 0)
        if rank == 0:
            time.sleep(4)
            with watch.call("", "evaluation without collectives"):
                pass
        return "done"


def test_rank_that_is_done_alarms_nobody() -> None:
    outcomes = rank_outcomes(ends_while_others_work, 2)
    assert [o.value for o in outcomes] == ["done", "done"]
    assert [o.stderr for o in outcomes] == ["", ""]


def last_call_is_longer(rank: int, world: int) -> str:
    """Rank 0, whose process serves the store, is done; rank 1 still computes in the same call."""
    with begin(rank, world, timeout=9.0) as watch:
        step(watch, 0)
        with watch.call(FORWARD, "step 1 forward"):
            dist.all_reduce(torch.ones(4096))
            time.sleep(2.0 * rank)
        with watch.call("", "save"):
            pass
    return "done"


def test_store_outlives_the_rank_that_serves_it() -> None:
    outcomes = rank_outcomes(last_call_is_longer, 2, store="rank0")
    assert [(o.value, o.stderr) for o in outcomes] == [("done", ""), ("done", "")]
    assert outcomes[0].seconds > 2.0


@pytest.mark.parametrize("store", ["parent", "rank0"])
def test_goodbye_with_every_rank_at_once(store: StoreHost) -> None:
    outcomes = rank_outcomes(two_starts, 3, store=store)
    assert [o.value for o in outcomes] == [[]] * 3
    assert [o.stderr for o in outcomes] == [""] * 3


def two_starts(rank: int, world: int) -> list[str]:
    """Start is idempotent, stop leaves no thread, and a second start hears nothing of the first."""
    watch = begin(rank, world)
    assert begin(rank, world) is watch
    step(watch, 0)
    watch.stop()
    watch.stop()
    with begin(rank, world) as again:
        assert again is not watch
        step(again, 0)
    dist.barrier()
    return [t.name for t in threading.enumerate() if "watch" in t.name]


def busy(rank: int, world: int) -> tuple[float, float]:
    """Rank 1 sorts for three timeouts; one sort holds the interpreter lock for longer than the limit on silence."""
    timeout = 2.0
    longest = 0.0
    with begin(rank, world, timeout) as watch:
        step(watch, 0)
        began = time.monotonic()
        if rank == 1:
            values = [random.random() for _ in range(2_000_000)]
            while longest <= timeout / 2:  # on a fast machine, until one sort is long enough
                values += values
                before = time.monotonic()
                sorted(values)
                longest = time.monotonic() - before
            while time.monotonic() - began < 3 * timeout:
                before = time.monotonic()
                sorted(values)
                longest = max(longest, time.monotonic() - before)
        step(watch, 1)
        return longest, time.monotonic() - began


def test_long_work_raises_no_alarm() -> None:
    (_, waited), (longest, _) = run_ranks(busy, 2)
    assert waited > 6.0
    assert longest > 2.0 / 2, "the sorts were too short to test anything"


def frozen(rank: int, world: int) -> None:
    with Watch.start(default_store(), rank, world, timeout=0.6, interval=0.1) as watch:
        step(watch, 0)
        if rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        timed_steps(watch, 1)


def test_stopped_process_counts_as_frozen() -> None:
    zero, one = rank_outcomes(frozen, 2, timeout=40, grace=1)
    assert_named(zero, "frozen", (1,), "exists but has not run", within=10.0)
    assert one.timed_out


def blocked_for_good(rank: int, world: int) -> None:
    with begin(rank, world, timeout=3.0) as watch:
        step(watch, 0)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with watch.call(FORWARD, "step 1 forward"):
            watch.at("wte.weight")
            time.sleep(60)  # C code that no cut connection wakes


def test_last_resort() -> None:
    zero, _ = rank_outcomes(blocked_for_good, 2, timeout=30)
    assert zero.exitcode == EXIT_CODE
    assert zero.seconds < 12
    assert "RankError: rank 1 has died" in zero.stderr
    assert "rank 0 (this one) is in call 3 (step 1 forward) at wte.weight" in zero.stderr
    assert "blocked_for_good" in zero.stderr, "the stacks of all threads"


def lonely(rank: int, world: int) -> str:
    """A collective that fails although every rank is alive and agrees."""
    with begin(rank, world, timeout=2.0) as watch:
        step(watch, 0)
        time.sleep(3 * INTERVAL)
        if rank == 1:
            time.sleep(5)
            return ""
        error = watch.explain(RuntimeError("gloo: planted"))
        return f"{error.kind}: {error}"


def test_connection_error_without_evidence() -> None:
    text = rank_outcomes(lonely, 2)[0].value
    assert text.startswith("unknown: a collective failed on rank 0, and no rank said why: gloo: planted")
    assert "rank 1, at its last beat" in text


SCRIPT = """
import sys, torch.distributed as dist
from dscompile.runtime.watch import Watch
rank, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
watch = Watch.start(store, rank, 2, timeout=6.0, interval=0.2)
watch.enter("abc", "step 0")
watch.leave()
if how == "raise" and rank == 1:
    raise LookupError("planted")
if how == "raise":
    import time
    while True:
        watch.enter("abc", "step 1")
        watch.leave()
        time.sleep(0.1)
"""


def interpreters(how: str) -> list[subprocess.CompletedProcess[str]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    root = Path(__file__).resolve().parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(store.port), how],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = []
    for process in running:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


def test_interpreter_exits_cleanly_without_stop() -> None:
    assert [(p.returncode, p.stderr) for p in interpreters("end")] == [(0, ""), (0, "")]


def test_uncaught_exception_outside_programs_is_told() -> None:
    zero, one = interpreters("raise")
    assert "LookupError: planted" in one.stderr
    assert "RankError: rank 1 raised LookupError: planted" in zero.stderr


def test_one_rank_alone_is_not_watched() -> None:
    before = threading.active_count()
    with Watch.start(dist.HashStore(), 0, 1, name="alone") as watch:
        with watch.call(FORWARD, "step 0"):
            watch.at("wte.weight")
        assert threading.active_count() == before


def test_connection_errors_are_told_from_others() -> None:
    inner = RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    outer = ValueError("wrapped")
    outer.__cause__ = inner
    assert all(map(is_connection_error, [inner, outer, dist.DistNetworkError("x"), RankError("x")]))
    assert not any(map(is_connection_error, [RuntimeError("shape mismatch"), KeyError("gloo"), MemoryError()]))
