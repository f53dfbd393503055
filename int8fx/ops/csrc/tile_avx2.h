// int8 matmul with AVX2: codes are widened to int16, and vpmaddwd multiplies and adds pairs of them.
//
// vpmaddubsw takes int8 directly, but saturates: 2 * 127 * 255 > 2**15. vpmaddwd is exact.
//
//   x: 16 rows               w: 6 channels
//   [k / 2][16][2] int16     [6][STRIDE] int16, each pair is broadcast to all rows
#pragma once

#include <immintrin.h>

#include <cstring>

#include "tile_generic.h"

namespace int8fx {

struct Avx2Tile {
  static constexpr int MR = 16, NR = 6, PANEL = 48, UNIT = 16, KG = 2, BLOCK_M = 128, OFFSET = 0;
  static constexpr int64_t DEPTH = 512, STRIDE = stride_of<int16_t>(DEPTH);
  using X = int16_t;
  using W = int16_t;
  struct Setup {};

  static void pack_x(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, X* out) {
    int64_t done = 0;
    if (rows == MR)
      for (; done + 16 <= k; done += 16)
        for (int half = 0; half < 2; ++half)
          transpose_8x16(codes + half * 8 * stride + done, stride, out + done * MR + half * 16);
    if (done < k) pack_rows<MR, KG>(codes + done, stride, rows, k - done, out + done * MR);
  }

  static void load_w(const int8_t* w, int64_t k, W* out) {
    int64_t i = 0;
    for (; i + 16 <= k; i += 16)
      _mm256_storeu_si256((__m256i*)(out + i), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + i))));
    for (; i < k; ++i) out[i] = w[i];
    if (k % KG != 0) out[k] = 0;
  }

  static void run(int64_t k, const X* x, const Channels& channels, W* w, int32_t* y, bool first, int64_t rows) {
    run_channels<Avx2Tile>(k, channels, w, [&](int64_t n, const W* w) {
      if (rows <= MR / 2)
        sums<1>(k, x, w, y + n * MR, first, channels, n);
      else
        sums<2>(k, x, w, y + n * MR, first, channels, n);
    });
  }

 private:
  template <int VECTORS>
  static void sums(
      int64_t k, const X* x, const W* w, int32_t* y, bool first, const Channels& channels, int64_t channel) {
    __m256i sums[NR][VECTORS];
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v)
        sums[n][v] = first ? _mm256_setzero_si256() : _mm256_loadu_si256((const __m256i*)(y + n * MR + v * 8));
    for (int64_t i0 = 0; i0 < k; i0 += 64) {
      if (channels.load) channels.fetch<NR>(channel, i0);
      for (int64_t i = i0; i < std::min(k, i0 + 64); i += KG, x += MR * KG) {
        __m256i rows[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) rows[v] = _mm256_loadu_si256((const __m256i*)(x + v * 16));
#pragma GCC unroll 6
        for (int n = 0; n < NR; ++n) {
          int32_t pair;
          std::memcpy(&pair, w + n * STRIDE + i, sizeof pair);
          const __m256i codes = _mm256_set1_epi32(pair);
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v)
            sums[n][v] = _mm256_add_epi32(sums[n][v], _mm256_madd_epi16(codes, rows[v]));
        }
      }
    }
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) _mm256_storeu_si256((__m256i*)(y + n * MR + v * 8), sums[n][v]);
  }

  // 8 rows x 16 codes -> 8 k pairs x 8 rows of int16 pairs, 64 bytes apart: an 8 x 8 transpose of pairs.
  static void transpose_8x16(const int8_t* codes, int64_t stride, int16_t* out) {
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(codes + i * stride)));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_si256((__m256i*)(out + i * 32), _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
      _mm256_storeu_si256((__m256i*)(out + (i + 4) * 32), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
  }
};

}  // namespace int8fx
