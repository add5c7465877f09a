"""What happens when a compiled frame with sharded parameters is called, before its program runs.

Dynamo's guards see the tensors that graphs read, not the DTensors behind them, and a compiled program does not run the
kernels of the markers that were traced into it. What those would notice is looked after here, once a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dscompile.ops import is_offered, take


def watched(compiled: Callable[..., Any], example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """``compiled`` with the checks that its inputs need; itself if they need none."""
    windows = [i for i, value in enumerate(example_inputs) if isinstance(value, Tensor) and is_offered(value)]
    if not windows:
        return compiled

    def run(*args: Any) -> Any:
        for index in windows:
            take(args[index])
        return compiled(*args)

    return run
