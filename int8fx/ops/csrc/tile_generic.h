// int8 matmul in plain C++, for any CPU. matmul.h requires a `Tile` of each instruction set, which computes
//
//   y[NR, MR] += w[NR, k] @ x[MR, k].T in int32
//
// Rows of x are in the lanes of vectors, and codes of w are broadcast to them. So the weight needs no other order than
// the one it is stored in, [N, K].
//
//   x  [k / KG][MR][KG] of X, of any value where there is no row; its codes of no k are multiplied by zeros of w
//   w  NR rows of W, STRIDE apart, zeros from k to the next multiple of KG
//
// MR, NR   a tile's rows and channels
// PANEL    channels of a task, a multiple of NR and of the lanes of a vector
// BLOCK_M  rows of a task at most, a multiple of MR
// DEPTH    columns of x and of the weight that are multiplied at a time at most, a multiple of 64
// OFFSET   what `pack_x` adds to codes of x
//
// `pack_x` writes x, and `load_w` a row of w, of which it returns OFFSET times the sum: the channel's sums
// will be too large by it. `run` may
// be told to compute the tile's first MR / 2 rows only. While it runs it fetches the rows at `ahead`, K apart.
// `Setup` is what a thread holds while it runs tiles. A tile may have a `few` for few rows of x, as VnniTile has it; `dot`
// of lanes.h serves the others.
#pragma once

#include <cstdint>

namespace int8fx {

// Rows this far apart do not compete for the same places of a cache, as rows of 512 or 4096 bytes do.
template <typename W>
constexpr int64_t stride_of(int64_t depth) { return depth + 64 / sizeof(W); }

struct Ahead {
  const int8_t* rows;  // or null
  int64_t stride;

  // `NR` rows at column k
  template <int NR>
  void fetch(int64_t k) const {
    if (rows != nullptr)
#pragma GCC unroll 16
      for (int n = 0; n < NR; ++n) __builtin_prefetch(rows + n * stride + k, 0, 2);
  }
};

// Packs rows of codes, `rows` of MR, as [ceil(k / KG)][MR][KG].
template <int MR, int KG, typename Out>
inline void pack_rows(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, Out* out, int flip = 0) {
  const int64_t groups = (k + KG - 1) / KG;
  for (int64_t r = 0; r < MR; ++r)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < KG; ++i) {
        const int64_t at = g * KG + i;
        const int code = r < rows && at < k ? codes[r * stride + at] : 0;
        out[(g * MR + r) * KG + i] = static_cast<Out>(code ^ flip);
      }
}

struct GenericTile {
  static constexpr int MR = 16, NR = 4, PANEL = 48, KG = 1, BLOCK_M = 96, OFFSET = 0;
  static constexpr int64_t DEPTH = 512, STRIDE = stride_of<int16_t>(DEPTH);
  using X = int16_t;
  using W = int16_t;
  struct Setup {};

  static void pack_x(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, X* out) {
    pack_rows<MR, KG>(codes, stride, rows, k, out);
  }

  static int32_t load_w(const int8_t* w, int64_t k, W* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = w[i];
    return 0;
  }

  static void run(int64_t k, const X* x, const W* w, int32_t* y, bool first, bool, const Ahead&) {
    int32_t sums[NR][MR];
    for (int n = 0; n < NR; ++n)
      for (int m = 0; m < MR; ++m) sums[n][m] = first ? 0 : y[n * MR + m];
    for (int64_t i = 0; i < k; ++i, x += MR)
      for (int n = 0; n < NR; ++n)
        for (int m = 0; m < MR; ++m) sums[n][m] += int32_t(x[m]) * int32_t(w[n * STRIDE + i]);
    for (int n = 0; n < NR; ++n)
      for (int m = 0; m < MR; ++m) y[n * MR + m] = sums[n][m];
  }
};

}  // namespace int8fx
