// int8 matmul with AVX512-VNNI: vpdpbusd multiplies four unsigned by four signed bytes and adds them to an int32.
//
// The unsigned operand is x + 128 (the code with its sign bit flipped), so a channel's sums are 128 * sum_k(w) too large.
// int32 wraps around, so only the final sums must fit.
//
//   x: 32 rows               w: 12 channels
//   [k / 4][32][4] uint8     [12][STRIDE] int8, each four are broadcast to all rows
//
// Without the instruction, `dot` is a loop. That is slow, and lets other CPUs test all else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "tile_generic.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace int8fx {

struct VnniTile {
  static constexpr int MR = 32, NR = 12, PANEL = 48, KG = 4, BLOCK_M = 256, OFFSET = 128;
  static constexpr int64_t DEPTH = 2048, STRIDE = stride_of<int8_t>(DEPTH);
  using X = uint8_t;
  using W = int8_t;
  struct Setup {};
  typedef int32_t Vector __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint8_t Bytes __attribute__((vector_size(64), may_alias));
  typedef int8_t Codes __attribute__((vector_size(64), may_alias));

  static void pack_x(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, X* out) {
    pack_fours(codes, stride, rows, k, 0x80, reinterpret_cast<int8_t*>(out));
  }

  // [MR] rows of codes as [ceil(k / 64) * 16][MR][4], each `^ flip`; whole 16 rows.
  static void pack_fours(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, uint8_t flip, int8_t* out) {
    alignas(64) static constexpr int8_t NONE[64] = {};
    const Bytes flips = Bytes{} + flip;
    for (int64_t m = 0; m < rows; m += 16)
      for (int64_t at = 0; at < k; at += 64) {
        Vector fours[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          Bytes row = {};
          if (k - at >= 64)
            std::memcpy(&row, m + i < rows ? codes + (m + i) * stride + at : NONE, 64);
          else if (m + i < rows)
            std::memcpy(&row, codes + (m + i) * stride + at, k - at);
          fours[i] = (Vector)(row ^ flips);
        }
        transpose(fours);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) std::memcpy(out + ((at / 4 + i) * MR + m) * 4, &fours[i], 64);
      }
  }

  static int32_t load_w(const int8_t* w, int64_t k, W* out) {
    const Bytes ones = Bytes{} + uint8_t(1);
    Vector sums = {};
    for (int64_t i = 0; i < k; i += 64) {
      Codes codes = {};
      if (k - i >= 64)
        std::memcpy(&codes, w + i, 64);
      else
        std::memcpy(&codes, w + i, k - i);
      std::memcpy(out + i, &codes, 64);
      sums = dot(sums, ones, codes);
    }
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += sums[i];
    return OFFSET * sum;
  }

  static void run(int64_t k, const X* x, const W* w, int32_t* y, bool first, bool half, const Ahead& ahead) {
    return half ? sums<1>(k, x, w, y, first, ahead) : sums<2>(k, x, w, y, first, ahead);
  }

  // Few rows: sums along K of the weight as it is stored, four channels at a time. Here the unsigned operand is w + 128,
  // so the sum of row r is 128 * x_sums[r] too large, x_sums[r] = sum_k(x[r, k]).
  //
  //   y[c * MR + r] = sum_k(x[r, k] * w[c][k])
  //
  // `first`: these are the first rows that are multiplied by these channels.
  template <int ROWS>
  static void few(
      const int8_t* x, const int32_t* x_sums, int64_t K, const int8_t* const (&w)[4], int32_t* y, bool first) {
    Vector sums[ROWS][4] = {};
    const Bytes flip = Bytes{} + uint8_t(0x80);
    const int64_t ahead = 16 * K;
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
      Bytes shifted[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        if (first) fetch(w[c] + k + ahead);
        shifted[c] = (Bytes)load(w[c] + k) ^ flip;
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Codes row = load(x + r * K + k);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) sums[r][c] = dot(sums[r][c], shifted[c], row);
      }
    }
    if (k < K)
      for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < 4; ++c) {
          Codes row = {}, channel = {};  // 128 * 0 adds nothing
          std::memcpy(&row, x + r * K + k, K - k);
          std::memcpy(&channel, w[c] + k, K - k);
          sums[r][c] = dot(sums[r][c], (Bytes)channel ^ flip, row);
        }
    Vector all[16] = {};
    std::memcpy(all, sums, sizeof sums);
    const Vector totals = sum_lanes(all);
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) y[c * MR + r] = totals[r * 4 + c] - 128 * x_sums[r];
  }

 private:
  template <int VECTORS>
  static void sums(int64_t k, const X* x, const W* w, int32_t* y, bool first, const Ahead& ahead) {
    Vector sums[NR][VECTORS];
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[n][v] = first ? Vector{} : *(const Vector*)(y + n * MR + v * 16);
    for (int64_t i0 = 0; i0 < k; i0 += 64) {
      ahead.fetch<NR>(i0);
      for (int64_t i = i0; i < std::min(k, i0 + 64); i += KG, x += MR * KG) {
        Bytes rows[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) std::memcpy(&rows[v], x + v * 64, 64);
#pragma GCC unroll 12
        for (int n = 0; n < NR; ++n) {
          int32_t four;
          std::memcpy(&four, w + n * STRIDE + i, sizeof four);
          const Vector all = Vector{} + four;
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) sums[n][v] = dot(sums[n][v], rows[v], (Codes)all);
        }
      }
    }
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) *(Vector*)(y + n * MR + v * 16) = sums[n][v];
  }

  static inline Codes load(const int8_t* codes) {
    Codes v;
    std::memcpy(&v, codes, sizeof v);
    return v;
  }

  // sum[i] += sum_j(u[4 * i + j] * s[4 * i + j])
  static inline Vector dot(Vector sum, Bytes u, Codes s) {
#ifdef __AVX512VNNI__
    return (Vector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#else
    for (int i = 0; i < 64; ++i) sum[i / 4] += int32_t(u[i]) * int32_t(s[i]);
    return sum;
#endif
  }
};

}  // namespace int8fx
