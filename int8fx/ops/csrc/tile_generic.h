// int8 matmul in plain C++, for any CPU. matmul.h requires a `Tile` of each instruction set, which computes
//
//   y[NR, MR] += w[NR, k] @ x[MR, k].T in int32
//
// Rows of x are in the lanes of vectors, and codes of w are broadcast to them. So the weight needs no other order than
// the one it is stored in, [N, K].
//
//   x  [k / KG][MR][KG] of X, of any value where there is no row, zeros where there is no k
//   w  rows of W, STRIDE apart, any finite value where x has zeros: from k to the next multiple of KG
//
// MR, NR   a tile's rows and channels
// PANEL    channels of a task, a multiple of NR and of the lanes of a vector
// BLOCK_M  rows of a task at most, a multiple of MR
// DEPTH    columns of x and of the weight that are multiplied at a time at most, a multiple of 64
// OFFSET   what is added to codes of w: sums of row m are OFFSET * sum_k(x[m, k]) too large
//
// UNIT     channels that a thread takes at least, a multiple of 16
//
// `pack_x` writes x. `run` multiplies the channels of a panel by a tile's first `rows` rows; those after them get any
// sums. It loads w first where `Channels` says so. `Setup` is what a thread holds while it runs tiles. A tile may have
// a `few` for few rows of x, as VnniTile has it; `dot` of lanes.h serves the others. A tile that is IN_PLACE may
// multiply the weight where it is stored, and calls back between its instructions, as AmxTile does.
#pragma once

#include <algorithm>
#include <cstdint>

namespace int8fx {

// Rows this far apart do not compete for the same places of a cache, as rows of 512 or 4096 bytes do.
template <typename W>
constexpr int64_t stride_of(int64_t depth) { return depth + 64 / sizeof(W); }

// `count` channels of a panel.
struct Channels {
  int64_t count;
  bool load;  // whether w is yet to be loaded, from `rows`
  const int8_t* rows;
  int64_t stride;
  const int8_t* ahead;  // rows that are loaded next, which are fetched while w is loaded
  int64_t ahead_stride, ahead_count;
  bool in_place;  // whether w is `rows`, with NR of them for each tile, and a multiple of KG columns

  // Column k of rows n to n + NR
  template <int NR>
  void fetch(int64_t n, int64_t k) const {
    const int8_t* row = ahead + n * ahead_stride + k;
    for (int64_t i = std::min<int64_t>(NR, ahead_count - n); i > 0; --i, row += ahead_stride)
      __builtin_prefetch(row, 0, 2);
  }
};

struct Nothing {
  void operator()() const {}
};

// `run` of a tile that loads w a row at a time, and multiplies NR channels at a time.
template <typename Tile, typename Sums>
inline void run_channels(int64_t k, const Channels& channels, typename Tile::W* w, Sums&& sums) {
  for (int64_t n = 0; n < channels.count; n += Tile::NR) {
    if (channels.load)
      for (int64_t i = n; i < std::min(channels.count, n + Tile::NR); ++i)
        Tile::load_w(channels.rows + i * channels.stride, k, w + i * Tile::STRIDE);
    sums(n, w + n * Tile::STRIDE);
  }
}

// Packs rows of codes, `rows` of MR, as [ceil(k / KG)][MR][KG].
template <int MR, int KG, typename Out>
inline void pack_rows(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, Out* out) {
  const int64_t groups = (k + KG - 1) / KG;
  for (int64_t r = 0; r < MR; ++r)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < KG; ++i) {
        const int64_t at = g * KG + i;
        out[(g * MR + r) * KG + i] = r < rows && at < k ? codes[r * stride + at] : 0;
      }
}

struct GenericTile {
  static constexpr int MR = 16, NR = 4, PANEL = 48, UNIT = 16, KG = 1, BLOCK_M = 96, OFFSET = 0;
  static constexpr int64_t DEPTH = 512, STRIDE = stride_of<int16_t>(DEPTH);
  using X = int16_t;
  using W = int16_t;
  struct Setup {};

  static void pack_x(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, X* out) {
    pack_rows<MR, KG>(codes, stride, rows, k, out);
  }

  static void load_w(const int8_t* w, int64_t k, W* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = w[i];
  }

  static void run(int64_t k, const X* x, const Channels& channels, W* w, int32_t* y, bool first, int64_t) {
    run_channels<GenericTile>(
        k, channels, w, [&](int64_t n, const W* w) { GenericTile::sums(k, x, w, y + n * MR, first); });
  }

 private:
  static void sums(int64_t k, const X* x, const W* w, int32_t* y, bool first) {
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
