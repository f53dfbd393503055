// int8 matmul with AVX2: codes are widened to int16, and vpmaddwd multiplies and adds pairs of them.
//
// vpmaddubsw takes int8 directly, but saturates: 2 * 127 * 255 > 2**15. vpmaddwd is exact.
//
//   w panel: 16 channels          x panel: 6 rows
//   [k / 2][16][2] int16          [k / 2][6][2] int16
//   each 32 bytes are one k pair  each pair is broadcast to
//   of 8 channels                 all channels
#pragma once

#include <immintrin.h>

#include "tile_generic.h"

namespace int8fx {

struct Avx2Tile {
  static constexpr int MR = 6, NR = 16, KG = 2, FLIP = 0, BLOCK_M = 96;
  using X = int16_t;
  using W = int16_t;
  struct Setup {};

  static constexpr int64_t panel_size(int64_t k) { return (k + 1) / 2 * 2 * NR; }

  static void pack_w(const int8_t* w, int64_t stride, int64_t n, int64_t k, W* out) {
    int64_t done = 0;
    if (n == NR)
      for (; done + 16 <= k; done += 16)
        for (int half = 0; half < 2; ++half)
          transpose_8x16(w + half * 8 * stride + done, stride, out + done * NR + half * 16);
    if (done < k) pack_rows<NR, KG>(w + done, stride, n, k - done, out + done * NR);
  }

  static void run(int64_t groups, const X* x, const W* w, int32_t* y, bool first) {
    __m256i sums[MR][2];
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n)
        sums[m][n] = first ? _mm256_setzero_si256() : _mm256_loadu_si256((const __m256i*)(y + m * NR + n * 8));
    for (int64_t g = 0; g < groups; ++g, x += MR * KG, w += NR * KG) {
      const __m256i w0 = _mm256_loadu_si256((const __m256i*)w), w1 = _mm256_loadu_si256((const __m256i*)(w + 16));
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) {
        int32_t pair;
        __builtin_memcpy(&pair, x + m * KG, sizeof pair);
        const __m256i xm = _mm256_set1_epi32(pair);
        sums[m][0] = _mm256_add_epi32(sums[m][0], _mm256_madd_epi16(xm, w0));
        sums[m][1] = _mm256_add_epi32(sums[m][1], _mm256_madd_epi16(xm, w1));
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) _mm256_storeu_si256((__m256i*)(y + m * NR + n * 8), sums[m][n]);
  }

 private:
  // 8 channels x 16 codes -> 8 k pairs x 8 channels of int16 pairs, 64 bytes apart: an 8 x 8 transpose of pairs.
  static void transpose_8x16(const int8_t* w, int64_t stride, int16_t* out) {
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + i * stride)));
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
