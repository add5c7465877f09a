// fp32 matrix products. Interface: dscompile/codegen/cpu/gemm_kernel.py.
#include "gemm_int8.h"

// Whether there are tiles: compiled in, and allowed by the system.
extern "C" int gemm_has_tiles() {
#ifdef HAVE_AMX
  return amx_allowed();
#else
  return 0;
#endif
}

// 0; 1: no memory; 2: the operands need fp32's range; 3: no tiles. If not 0, C holds nothing of use.
extern "C" int gemm_f32(const void* problem) {
#ifdef HAVE_AMX
  return gemm_amx(*static_cast<const Gemm*>(problem));
#else
  (void)problem;
  return 3;
#endif
}

// Whether there are tiles of 8-bit integers.
extern "C" int gemm_has_int8() {
#ifdef HAVE_AMX_INT8
  return amx_allowed();
#else
  return 0;
#endif
}

// As gemm_f32, by products of integers; 4: their error would be too large for these operands.
extern "C" int gemm_f32_int8(void* problem) {
#ifdef HAVE_AMX_INT8
  return int8::gemm_int8(*static_cast<Gemm*>(problem));
#else
  (void)problem;
  return 3;
#endif
}
