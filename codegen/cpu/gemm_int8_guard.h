// How much a product of gemm_int8.h errs: predicted from its operands' scales and digits, and held against its result.
//
// The prediction takes digits of different operands as independent. What fp32 errs is not computed but measured once
// (dscompile/codegen/cpu/gemm_sites.py), over the norm of results; here it is transferred to other operands.
#pragma once
#include "gemm_int8_pack.h"

#ifdef HAVE_AMX_INT8
namespace {
namespace int8 {

// What a thread knows of C's rows (and then of its columns), all over the norms of operands: squares of the error that is
// predicted, of the norm that is expected if signs are random, and if all elements were as large as the largest; how many
// products of an element's sum are not 0; squares of results, rows' in 16 parts.
struct Guard {
  struct Side {
    double *error, *norm, *most;
    float *live, *square;
  } row, column;

  static int64_t words(const Gemm& g) { return (7 + SIDE) * round_up(g.m, 32) + 8 * round_up(g.n, 32); }
  Guard(const Gemm& g, uint32_t* memory) {
    const int64_t m = round_up(g.m, 32), n = round_up(g.n, 32);
    double* doubles = reinterpret_cast<double*>(memory);
    float* floats = reinterpret_cast<float*>(doubles + 3 * (m + n));
    row = {doubles, doubles + m, doubles + 2 * m, floats, floats + m};
    doubles += 3 * m, floats += (1 + SIDE) * m;
    column = {doubles, doubles + n, doubles + 2 * n, floats, floats + n};
  }

  // Adds what rows [i, i + rows) and columns [j, j + columns) give, held from `of_row` and `of_column` on. The error of a
  // sum is that of digits' products that are left out, and of its elements' rounding.
  void expect(const Packed& a, const Packed& b, int64_t of_row, int64_t rows, int64_t of_column, int64_t columns,
              int64_t i, int64_t j, bool eight) {
    constexpr double rounding = 1.0 / 12, largest = 127.0 * 65536 * 127.0 * 65536;
    const double third_second = eight ? 0 : 65536;
    for (int64_t part = 0; part < a.parts; part++) {
      const Scales x = a.scales_of(part, of_row), y = b.scales_of(part, of_column);
      const double deep = double(a.depth_of(part));
      const auto add = [&](const Scales& mine, const float* weight, int64_t count, const Scales& theirs,
                           const float* their_weight, int64_t others, const Side& to, int64_t at) {
        double energy = 0, second = 0, third = 0, live = 0, all = 0;
        for (int64_t n = 0; n < others; n++) {
          const double unit = theirs.unit[n] * double(their_weight[n]) * double(their_weight[n]);
          energy += unit * double(theirs.energy[n]), live += unit * double(theirs.live[n]);
          second += unit * double(theirs.second[n]), third += unit * double(theirs.third[n]);
          all += double(theirs.live[n]);
        }
        for (int64_t n = 0; n < count; n++) {
          const double unit = mine.unit[n] * double(weight[n]) * double(weight[n]) / deep, own = double(mine.energy[n]);
          const double my_second = double(mine.second[n]), my_third = double(mine.third[n]), alive = double(mine.live[n]);
          to.error[at + n] += unit * (third_second * (my_second * third + my_third * second) + my_third * third +
                                      rounding * (alive * energy + own * live));
          to.norm[at + n] += unit * own * energy;
          to.most[at + n] += unit * deep * largest * energy;
          to.live[at + n] += float(alive * all / deep);
        }
      };
      add(x, a.weights + of_row, rows, y, b.weights + of_column, columns, row, i);
      add(y, b.weights + of_column, columns, x, a.weights + of_row, rows, column, j);
    }
  }
};

// Looks at this thread's part of the rows and columns: names those whose predicted error is beyond the limit, and counts
// them. fp32's own error is proportional to the norm of the result, less so where terms cancel (measured: MKL); and to the
// root of the number of products that are not 0. Where few elements are much larger than the others, it depends on where
// they stand and can be small: these are judged as if it were. Columns whose terms cancel may err by twice as much:
// they are small beside the rest of every row, whose norm is what is promised.
inline void look(const Gemm& g, uint32_t* memory, int64_t thread, int64_t threads, int64_t (&beyond)[2], double& worst) {
  const int64_t counts[] = {g.m, g.n}, parts[] = {SIDE, 1};
  for (int side = 0; side < 2; side++)
    for (int64_t n = counts[side] * thread / threads; n < counts[side] * (thread + 1) / threads; n++) {
      double error = 0, norm = 0, most = 0, square = 0, live = 0;
      for (int64_t t = 0; t < threads; t++) {
        const Guard guard(g, memory + t * Guard::words(g));
        const Guard::Side& of = side ? guard.column : guard.row;
        error += of.error[n], norm += of.norm[n], most += of.most[n], live += double(of.live[n]);
        for (int64_t p = 0; p < parts[side]; p++) square += double(of.square[n * parts[side] + p]);
      }
      constexpr double joins = 0x1p-48;  // what rounding errs when sums are joined
      constexpr double unequal = 36;  // squares of the largest element over the mean square: normal numbers have 10 to 20
      double counted = square * live / double(counts[1 - side] * g.k);
      if (square < norm) counted *= std::min(std::sqrt(norm / square), side ? 1.6 : 1.5);
      if (most > unequal * norm) counted *= unequal * norm / most;
      if (side && square < 0.8 * norm) counted *= 4;
      if (error > 0) error += joins * square;
      const bool fits = error == 0 || error <= g.limit * g.limit * counted;
      g.beyond[side * g.m + n] = !fits;
      beyond[side] += !fits;
      if (error > 0) worst = std::max(worst, counted > 0 ? std::sqrt(error / counted) : INFINITY);
    }
}

}  // namespace int8
}  // namespace
#endif
