// fp32 matrix products. Interface: dscompile/codegen/cpu/gemm_kernel.py.
#include "gemm_amx.h"

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
