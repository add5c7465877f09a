"""Programs with collectives run under the watch: no rank waits for ever for one that died, raised or went astray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from dscompile.runtime.agree import signature
from dscompile.runtime.sanitize import Boxed
from dscompile.runtime.watch import Watch
from dscompile.torch_compat import default_store, process_group


def watch_of(group: str, timeout: float) -> Watch | None:
    """The watch over a process group; None if there is nobody to watch, or if it only pretends (the fake backend)."""
    if timeout <= 0 or not dist.is_initialized():
        return None
    ranks = dist.get_process_group_ranks(process_group(group))
    if len(ranks) == 1 or dist.get_backend(process_group(group)) == "fake":
        return None
    # Subgroups of one mesh axis share a logical name but not their ranks; users know these by their global numbers.
    name = f"{group}:{ranks[0]}"
    return Watch.start(default_store(), dist.get_rank(), len(ranks), timeout=timeout, name=name, ranks=ranks)


def guarded(run: Boxed, watch: Watch, collectives: Sequence[str], label: str) -> Boxed:
    """``run`` as a call that the other ranks of ``watch`` can follow; ``collectives`` is equal on every rank."""
    agreed = signature(collectives)

    def call(args: list[Any]) -> Any:
        with watch.call(agreed, label):
            return run(args)

    return call


def nowhere(place: str) -> None:
    """Stands for ``Watch.at`` where nobody watches."""
