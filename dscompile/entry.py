"""What happens when a compiled frame with sharded parameters is called, before its program runs.

Dynamo's guards see the tensors that graphs read, not the DTensors behind them, and a compiled program does not run the
kernels of the markers that were traced into it. What those would notice is looked after here, once a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dscompile.errors import ShardingError
from dscompile.ops import is_offered, take
from dscompile.placement import mark_of
from dscompile.slots import slot_of


def watched(compiled: Callable[..., Any], example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """``compiled`` with the checks that its inputs need; itself if they need none."""
    tensors = [(i, value) for i, value in enumerate(example_inputs) if isinstance(value, Tensor)]
    windows = [i for i, value in tensors if is_offered(value)]
    shards = [i for i, value in tensors if mark_of(value) is not None]
    if not windows and not shards:
        return compiled

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            _check_thawed([args[i] for i in shards])
        for index in windows:
            take(args[index])
        return compiled(*args)

    return run


def _check_thawed(shards: Sequence[Tensor]) -> None:
    """Renew what was frozen or thawed since its graph was traced, so that the next call traces it again.

    A frozen parameter's gradient is dropped meanwhile. A thawed one would get none, so this call is refused.

    Raises:
        ShardingError: on every rank, as all of them thawed it. The next call finds the parameters up to date.
    """
    stale = [slot for slot in map(slot_of, shards) if slot is not None and slot.stale]
    if not stale:
        return
    thawed = [slot.spec.fqn for slot in stale if slot.param.requires_grad]
    for slot in stale:
        slot.renew()
    if thawed:
        raise ShardingError(
            f"{thawed[0]} was unfrozen after the model was compiled ({len(thawed)} parameter(s)), which a compiled "
            "program cannot notice by itself. It is up to date now: call the model again. "
            "module.requires_grad_(True), rather than the parameter's own requires_grad, needs no second call."
        )
