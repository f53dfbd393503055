// int8 matmul with AMX: one tdpbssd multiplies 16 rows of 64 codes by 16 channels of 64 codes.
//
//   tiles 0..3  sums: rows 0-15 and 16-31 x channels 0-15 and 16-31, int32
//   tiles 4, 5  x: [16 rows][64 codes]
//   tiles 6, 7  w: [16 groups of k][16 channels][4 codes]
//
//   w panel: 32 channels                  x panel: 32 rows
//   [k / 64][16][32][4] int8              [k / 64][32][64] int8
//
// Packing a panel costs half as much as multiplying it by 96 rows, so blocks are taller than for other tiles.
// Without the instructions the same code runs on arrays. That is slow, and lets other CPUs test it.
#pragma once

#include <cstdint>
#include <cstring>

#include "tile_generic.h"
#include "tile_vnni.h"

#ifdef __AMX_INT8__
#include <immintrin.h>
// Macros, since the number of a tile must be a literal: it is part of the instruction.
#define INT8FX_TILE_ZERO(t) _tile_zero(t)
#define INT8FX_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define INT8FX_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define INT8FX_TILE_DOT(sums, x, w) _tile_dpbssd(sums, x, w)
#else
#define INT8FX_TILE_ZERO(t) AmxTile::arrays[t].zero()
#define INT8FX_TILE_LOAD(t, from, stride) AmxTile::arrays[t].load(from, stride)
#define INT8FX_TILE_STORE(t, to, stride) AmxTile::arrays[t].store(to, stride)
#define INT8FX_TILE_DOT(sums, x, w) AmxTile::arrays[sums].dot(AmxTile::arrays[x], AmxTile::arrays[w])
#endif

namespace int8fx {

struct AmxTile {
  static constexpr int MR = 32, NR = 32, KG = 64, FLIP = 0, BLOCK_M = 512;
  using X = int8_t;
  using W = int8_t;

#ifdef __AMX_INT8__
  // Sets the shape of this thread's tiles, and releases them: other libraries set other shapes.
  struct Setup {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Setup() {
      const Shapes shapes;
      _tile_loadconfig(&shapes);
    }
    Setup(const Setup&) = delete;
    ~Setup() { _tile_release(); }
  };
#else
  struct Setup {};
#endif

  static constexpr int64_t panel_size(int64_t k) { return (k + KG - 1) / KG * KG * NR; }

  static void pack_w(const int8_t* w, int64_t stride, int64_t n, int64_t k, W* out) {
    int64_t done = 0;
    if (n == NR)
      for (; done + KG <= k; done += KG)
        for (int half = 0; half < 2; ++half)
          VnniTile::transpose_16x64(w + half * 16 * stride + done, stride, out + done * NR + half * 64);
    std::memset(out + done * NR, 0, panel_size(k) - done * NR);
    if (done < k) pack_rows<NR, 4>(w + done, stride, n, k - done, out + done * NR);
  }

  static void run(int64_t groups, const X* x, const W* w, int32_t* y, bool first) {
    if (first) {
      INT8FX_TILE_ZERO(0);
      INT8FX_TILE_ZERO(1);
      INT8FX_TILE_ZERO(2);
      INT8FX_TILE_ZERO(3);
    } else {
      INT8FX_TILE_LOAD(0, y, NR * 4);
      INT8FX_TILE_LOAD(1, y + 16, NR * 4);
      INT8FX_TILE_LOAD(2, y + 16 * NR, NR * 4);
      INT8FX_TILE_LOAD(3, y + 16 * NR + 16, NR * 4);
    }
    for (int64_t g = 0; g < groups; ++g, x += MR * KG, w += NR * KG) {
      INT8FX_TILE_LOAD(4, x, KG);
      INT8FX_TILE_LOAD(6, w, NR * 4);
      INT8FX_TILE_DOT(0, 4, 6);
      INT8FX_TILE_LOAD(7, w + 64, NR * 4);
      INT8FX_TILE_DOT(1, 4, 7);
      INT8FX_TILE_LOAD(5, x + 16 * KG, KG);
      INT8FX_TILE_DOT(2, 5, 6);
      INT8FX_TILE_DOT(3, 5, 7);
    }
    INT8FX_TILE_STORE(0, y, NR * 4);
    INT8FX_TILE_STORE(1, y + 16, NR * 4);
    INT8FX_TILE_STORE(2, y + 16 * NR, NR * 4);
    INT8FX_TILE_STORE(3, y + 16 * NR + 16, NR * 4);
  }

#ifndef __AMX_INT8__
 private:
  // A tile register, and the instructions on it.
  struct Array {
    int8_t bytes[16][64];

    void zero() { std::memset(bytes, 0, sizeof bytes); }
    void load(const void* from, int64_t stride) {
      for (int row = 0; row < 16; ++row) std::memcpy(bytes[row], (const int8_t*)from + row * stride, 64);
    }
    void store(void* to, int64_t stride) const {
      for (int row = 0; row < 16; ++row) std::memcpy((int8_t*)to + row * stride, bytes[row], 64);
    }
    void dot(const Array& x, const Array& w) {
      for (int m = 0; m < 16; ++m) {
        int32_t sums[16];
        std::memcpy(sums, bytes[m], 64);
        for (int k = 0; k < 64; ++k)
          for (int n = 0; n < 16; ++n) sums[n] += int32_t(x.bytes[m][k]) * int32_t(w.bytes[k / 4][n * 4 + k % 4]);
        std::memcpy(bytes[m], sums, 64);
      }
    }
  };
  static inline thread_local Array arrays[8];
#endif
};

}  // namespace int8fx

#undef INT8FX_TILE_ZERO
#undef INT8FX_TILE_LOAD
#undef INT8FX_TILE_STORE
#undef INT8FX_TILE_DOT
