"""Numbers of 32 and 16 bits in C++ kernels: how they are called, read as fp32, and rounded."""

from __future__ import annotations

import torch

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes as kernels call them."""

NUMBERS = """
#include <cstdint>

struct Bf16 { uint16_t bits; };
struct Fp16 { _Float16 value; };

static inline float read(float x) { return x; }
static inline float read(Bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
static inline float read(Fp16 x) { return float(x.value); }

// Round to nearest, ties to even; NaN stays NaN.
static inline void write(Bf16* to, int64_t i, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to[i].bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
static inline void write(Fp16* to, int64_t i, float x) { to[i].value = _Float16(x); }
"""
"""Types of 16 bits, ``read`` to fp32 and ``write`` from it."""
