"""State of the random generators of one rank: Python's, NumPy's, PyTorch's CPU and current CUDA device."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch


def get_rng() -> dict[str, Any]:
    """The state of this process' generators as JSON values."""
    version, internal, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), _pack(keys.tobytes()), int(position), int(has_gauss), float(cached)],
        "torch": _pack(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _pack(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def rng_setter(state: dict[str, Any]) -> Callable[[], None]:
    """What puts the generators into a state of :func:`get_rng`.

    Raises ``ValueError``, ``TypeError``, ``LookupError`` or ``RuntimeError`` for anything else; changes nothing then.
    """
    version, internal, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy_keys = numpy.frombuffer(_unpack(keys), dtype=numpy.uint32)
    torch_state = torch.frombuffer(bytearray(_unpack(state["torch"])), dtype=torch.uint8)
    cuda_state = torch.frombuffer(bytearray(_unpack(state["cuda"])), dtype=torch.uint8) if "cuda" in state else None
    python_state, numpy_state = (version, tuple(internal), gauss), (kind, numpy_keys, position, has_gauss, cached)
    random.Random().setstate(python_state)
    numpy.random.RandomState().set_state(numpy_state)
    torch.Generator().set_state(torch_state)

    def apply() -> None:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_state)

    return apply


def derive_rng(states: list[dict[str, Any]], rank: int, world: int) -> None:
    """Seed this rank's generators from the saved ones of another number of ranks: repeatable, different on each rank.

    There is no state to go on with: the streams of N ranks are not those of M.
    """
    text = repr((states[0]["torch"], states[0]["python"], world, rank))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)  # CUDA's too


def _pack(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unpack(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
