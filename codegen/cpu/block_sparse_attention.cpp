// Block-sparse attention on CPU, forward and backward. Interface: dscompile/codegen/cpu/kernels.py.
#include "attention_amx_backward.h"
#include "attention_vector.h"

namespace {

template <typename T>
int forward(const Problem& p, const View& q, const View& k, const View& v, const View& out, float* lse, bool tiles) {
  const int64_t rows = (p.seq_q + p.block - 1) / p.block, columns = (p.seq_k + p.block - 1) / p.block;
  if (!valid(p.row_ptr, p.col_idx, p.nnz, p.layout_heads, rows, columns)) return 2;
#ifdef HAVE_AMX
  if (tiles) return forward_amx<T>(p, q, k, v, out, lse);
#endif
  (void)tiles;
  return forward_vector<T>(p, q, k, v, out, lse);
}

template <typename T>
int backward(const Problem& p, const View& grad, const View& q, const View& k, const View& v, const View& out,
             const float* lse, const View& dq, const View& dk, const View& dv, bool tiles) {
  const int64_t rows = (p.seq_k + p.block - 1) / p.block, columns = (p.seq_q + p.block - 1) / p.block;
  if (!valid(p.t_row_ptr, p.t_col_idx, p.t_nnz, p.layout_heads, rows, columns)) return 2;
#ifdef HAVE_AMX
  if (tiles) return backward_amx<T>(p, grad, q, k, v, out, lse, dq, dk, dv);
#endif
  (void)tiles;
  return backward_vector<T>(p, grad, q, k, v, out, lse, dq, dk, dv);
}

}  // namespace

// Whether AMX tiles may be used: compiled in, and allowed by the system.
extern "C" int attention_has_tiles() {
#ifdef HAVE_AMX
  return amx_allowed();
#else
  return 0;
#endif
}

// Whether there are entries for fp16: the compiler has the type.
extern "C" int attention_has_fp16() {
#ifdef HAVE_FP16
  return 1;
#else
  return 0;
#endif
}

// Each returns 0; 1 if there was no memory for scratch; 2 for an invalid layout. `tiles`: on AMX tiles; needs attention_has_tiles().
#define ENTRIES(name, type)                                                                                            \
  extern "C" int attention_forward_##name(const Problem* p, const View* q, const View* k, const View* v,               \
                                          const View* out, float* lse, int tiles) {                                    \
    return forward<type>(*p, *q, *k, *v, *out, lse, tiles);                                                            \
  }                                                                                                                    \
  extern "C" int attention_backward_##name(const Problem* p, const View* grad, const View* q, const View* k,           \
                                           const View* v, const View* out, const float* lse, const View* dq,           \
                                           const View* dk, const View* dv, int tiles) {                                \
    return backward<type>(*p, *grad, *q, *k, *v, *out, lse, *dq, *dk, *dv, tiles);                                     \
  }

ENTRIES(f32, float)
ENTRIES(bf16, bf16)
#ifdef HAVE_FP16
ENTRIES(f16, fp16)
#endif
