"""Counting without memory that is shared: a histogram of few bins as comparisons that are added up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BINS = 64
"""Most bins: every element is compared with each."""


def histc(x: Tensor, bins: int = 100, low: float = 0, high: float = 0) -> Any:
    """``histc`` between two given numbers, by PyTorch's rule for GPUs: the last bin holds its upper end.

    The counts are exact up to 2**24, as PyTorch's own in fp32 are.
    """
    whole = x.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)
    if low >= high or bins > BINS or not whole or x.numel() == 0:
        return NotImplemented
    flat = x.reshape(-1, 1).float()
    at = ((flat - low) * bins / (high - low)).floor()
    at = torch.where(at == bins, bins - 1.0, at)
    hit = (at == torch.arange(bins, device=x.device)) & (flat >= low) & (flat <= high)
    return hit.float().sum(0).to(x.dtype)
