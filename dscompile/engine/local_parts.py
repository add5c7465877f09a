"""The local tensors behind a parameter, for optimizers that compute on them: DTensor's dispatch is slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from dscompile.errors import UnsupportedError
from dscompile.torch_compat import local_of


def local_parts(owner: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The local parts of a parameter, its gradient and its states, in that order; plain tensors as they are.

    Writes to them are not counted in the version of a DTensor parameter: call ``increment_version`` after.

    Raises:
        UnsupportedError: a sparse gradient, or one that is not placed as its parameter.
    """
    param, grad = tensors[0], tensors[1]
    if grad.is_sparse:
        raise UnsupportedError(f"{owner}: sparse gradients are not supported; make the embedding with sparse=False.")
    if not isinstance(param, DTensor):
        return tuple(tensors)
    if not isinstance(grad, DTensor) or grad.placements != param.placements:
        raise UnsupportedError(
            f"{owner}: a parameter of shape {tuple(param.shape)} is placed as {param.placements}, its gradient is not."
        )
    return tuple(local_of(cast(DTensor, tensor)) for tensor in tensors)
