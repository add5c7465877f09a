"""A fresh group of ranks for one measurement, as ``torchrun`` would start it, but in a private network.

:func:`run_ranks` starts ``python -m benchmarks.ranks SPEC FOLDER`` in a network namespace of its own; that process
brings ``lo`` up and starts one ``python -m benchmarks.rank`` for each rank. A rank that fails ends the others at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.wire import raise_loopback

if TYPE_CHECKING:
    from benchmarks.peers_distributed import RankSpec

ROOT = Path(__file__).resolve().parent.parent
TAIL = 4000
"""Characters of a failed rank's output that its error shows."""


class RankFailedError(RuntimeError):
    """A rank failed or took too long; the message holds the end of its output."""


def run_ranks(
    spec: RankSpec, python: str, cache: Path, prefix: list[str] | None, timeout: float
) -> list[dict[str, Any]]:
    """Measure ``spec`` in fresh processes; one result for each rank.

    Args:
        spec: what to measure.
        python: the interpreter of the ranks.
        cache: where compilers keep what they compile.
        prefix: in front of the command, a private network (:func:`benchmarks.wire.private_prefix`).
        timeout: seconds until everything is ended.

    Raises:
        RankFailedError: with the end of the first failed rank's output.
    """
    with tempfile.TemporaryDirectory(prefix="dscompile-ranks-") as folder:
        command = [*(prefix or []), sys.executable, "-m", "benchmarks.ranks", spec.to_json(), python, folder]
        environment = {**os.environ, **rank_environment(spec.ranks), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        group = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, error = group.communicate(timeout=timeout)
        except BaseException as reason:
            os.killpg(group.pid, signal.SIGKILL)
            group.communicate()
            if isinstance(reason, subprocess.TimeoutExpired):
                raise RankFailedError(f"not done after {timeout:.0f} s\n{_outputs(Path(folder))}") from None
            raise
        if group.returncode:
            raise RankFailedError(error[-TAIL:])
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(spec.ranks)]


def rank_environment(ranks: int) -> dict[str, str]:
    """What every rank of every variant runs under, beside what the caller set."""
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "DS_ACCELERATOR": "cpu",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _outputs(folder: Path) -> str:
    return "\n".join(f"-- {p.stem}:\n{p.read_text()[-TAIL:]}" for p in sorted(folder.glob("*.log")))


def _start(rank: int, python: str, spec: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    with (folder / f"rank{rank}.log").open("wb") as log:
        command = [python, "-m", "benchmarks.rank", spec, str(folder / f"{rank}.json")]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def main() -> int:
    """Entry of the process inside the private network: start the ranks, wait, and end all if one fails."""
    spec, python, name = sys.argv[1:]
    folder = Path(name)
    if json.loads(spec)["private_network"]:
        raise_loopback()
    port = _free_port()
    ranks = [_start(rank, python, spec, folder, port) for rank in range(int(os.environ["WORLD_SIZE"]))]
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.1)
    failed = [index for index, rank in enumerate(ranks) if rank.poll()]
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    for index in failed:
        sys.stderr.write(f"rank {index} failed:\n{(folder / f'rank{index}.log').read_text()[-TAIL:]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
