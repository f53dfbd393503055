// int8 matmul in plain C++, for any CPU. product.h requires a `Tile` of each instruction set, which computes
//
//   y[MR, NR] += x[MR, k] @ w[NR, k].T in int32, over groups of KG neighbouring k, of operands packed as
//   x  [k / KG][MR][KG]  of X: code ^ FLIP, 0 ^ FLIP where there is no k
//   w  [k / KG][NR][KG]  of W: code, 0 where there is no channel or no k; `panel_size(k)` of them
//
// in a thread that holds a `Setup`. A panel of w is packed again for every BLOCK_M rows. A tile may have a `few` for few
// rows of x, as VnniTile has it; `dot` of lanes.h serves the others.
#pragma once

#include <cstdint>

namespace int8fx {

// Packs rows of codes, `rows` of R, as [ceil(k / KG)][R][KG].
template <int R, int KG, typename Out>
inline void pack_rows(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, Out* out, int flip = 0) {
  const int64_t groups = (k + KG - 1) / KG;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < KG; ++i) {
        const int64_t at = g * KG + i;
        const int code = r < rows && at < k ? codes[r * stride + at] : 0;
        out[(g * R + r) * KG + i] = static_cast<Out>(code ^ flip);
      }
}

struct GenericTile {
  static constexpr int MR = 4, NR = 16, KG = 1, FLIP = 0, BLOCK_M = 96;
  using X = int16_t;
  using W = int16_t;
  struct Setup {};

  static constexpr int64_t panel_size(int64_t k) { return k * NR; }

  static void pack_w(const int8_t* w, int64_t stride, int64_t n, int64_t k, W* out) {
    pack_rows<NR, KG>(w, stride, n, k, out);
  }

  static void run(int64_t groups, const X* x, const W* w, int32_t* y, bool first) {
    int32_t sums[MR][NR];
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NR; ++n) sums[m][n] = first ? 0 : y[m * NR + n];
    for (int64_t g = 0; g < groups; ++g, x += MR, w += NR)
      for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NR; ++n) sums[m][n] += int32_t(x[m]) * int32_t(w[n]);
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NR; ++n) y[m * NR + n] = sums[m][n];
  }
};

}  // namespace int8fx
