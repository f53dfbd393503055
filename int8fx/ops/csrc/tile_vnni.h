// int8 matmul with AVX512-VNNI: vpdpbusd multiplies four unsigned by four signed bytes and adds them to an int32.
//
// The unsigned operand is x + 128 (the code with its sign bit flipped), so a channel's sum is 128 * sum_k(w) too large.
// A panel of w therefore begins with -128 * sum_k(w), and sums begin with that. int32 wraps around, so only the final
// sums must fit.
//
//   w panel: 32 channels                   x panel: 12 rows
//   [32] int32, then [k / 4][32][4] int8   [k / 4][12][4] uint8, each four broadcast to all channels
//
// Without the instruction, `dot` is a loop. That is slow, and lets other CPUs test all else.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "tile_generic.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace int8fx {

// BLOCK_M: transposing a panel of w took 21 % of a matmul with blocks of 96 rows. 512 rows of [4096, 4096] reach 818
// GOP/s with 768 and 717 with 96, 512 rows of [4864, 896] 844 and 684 (one core of an AMD EPYC, Zen 5).
struct VnniTile {
  static constexpr int MR = 12, NR = 32, KG = 4, FLIP = 0x80, BLOCK_M = 768;
  using X = uint8_t;
  using W = int8_t;
  struct Setup {};
  typedef int32_t Vector __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint8_t Bytes __attribute__((vector_size(64), may_alias));
  typedef int8_t Codes __attribute__((vector_size(64), may_alias));

  static constexpr int64_t panel_size(int64_t k) { return NR * 4 + (k + KG - 1) / KG * KG * NR; }

  static void pack_w(const int8_t* w, int64_t stride, int64_t n, int64_t k, W* out) {
    int8_t* panel = out + NR * 4;
    int64_t done = 0;
    if (n == NR)
      for (; done + 64 <= k; done += 64)
        for (int half = 0; half < 2; ++half)
          transpose_16x64(w + half * 16 * stride + done, stride, panel + done * NR + half * 64);
    if (done < k) pack_rows<NR, KG>(w + done, stride, n, k - done, panel + done * NR);
    Vector sums[2] = {};
    const Bytes ones = Bytes{} + uint8_t(1);
    for (int64_t g = 0; g < (k + KG - 1) / KG; ++g)
      for (int half = 0; half < 2; ++half) sums[half] = dot(sums[half], ones, load(panel + (g * 2 + half) * 64));
    for (int half = 0; half < 2; ++half) {
      sums[half] = sums[half] * -128;
      std::memcpy(out + half * 64, &sums[half], 64);
    }
  }

  static void run(int64_t groups, const X* x, const W* w, int32_t* y, bool first) {
    Vector start[2], sums[MR][2];
    std::memcpy(start, w, sizeof start);
    w += sizeof start;
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        sums[m][half] = first ? start[half] : start[half] + *(const Vector*)(y + m * NR + half * 16);
    for (int64_t g = 0; g < groups; ++g, x += MR * KG, w += NR * KG)
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        int32_t four;
        std::memcpy(&four, x + m * KG, sizeof four);
        const Vector all = Vector{} + four;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) sums[m][half] = dot(sums[m][half], (Bytes)all, load(w + half * 64));
      }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) *(Vector*)(y + m * NR + half * 16) = sums[m][half];
  }

  // 16 channels x 64 codes -> 16 groups of k x 16 channels x 4 codes, 128 bytes apart: a 16 x 16 transpose of int32, by
  // four rounds that interleave row i with row i + 8.
  static void transpose_16x64(const int8_t* w, int64_t stride, int8_t* out) {
    Vector a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) std::memcpy(&a[i], w + i * stride, 64);
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
      Vector* from = round % 2 == 0 ? a : b;
      Vector* to = round % 2 == 0 ? b : a;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        to[2 * i] = __builtin_shufflevector(
            from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        to[2 * i + 1] = __builtin_shufflevector(
            from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) std::memcpy(out + i * 128, &a[i], 64);
  }

  // Few rows: sums along K of the weight as it is stored, four channels at a time. Here the unsigned operand is w + 128,
  // so the sum of row r is 128 * x_sums[r] too large, x_sums[r] = sum_k(x[r, k]).
  //
  //   y[r * stride + c] = sum_k(x[r, k] * w[c][k])
  template <int ROWS>
  static void few(const int8_t* x, const int32_t* x_sums, int64_t K, const int8_t* const (&w)[4], int32_t* y,
                  int64_t stride) {
    Vector sums[ROWS][4] = {};
    const Bytes flip = Bytes{} + uint8_t(0x80);
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
      Bytes shifted[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        prefetch(w[c] + k);
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
    const Vector totals = sum_each(all);
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) y[r * stride + c] = totals[r * 4 + c] - 128 * x_sums[r];
  }

 private:
  // Lane i is the sum of the lanes of v[i]. Each round adds neighbouring lanes of all vectors, and halves their number.
  static inline Vector sum_each(Vector (&v)[16]) {
#pragma GCC unroll 4
    for (int n = 8; n > 0; n /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i)
        v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
            __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return v[0];
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
