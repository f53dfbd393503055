// The 16-bit part of a linear layer: tiles as in tile_generic.h, over columns that are multiplied in floating point.
//
//   y[NR, MR] += w[NR, k] @ x[MR, k].T
//
//   x  [k / KG][MR][KG] of X, zeros from k to the next multiple of STEP
//   w  NR rows of W, STRIDE apart
//
// A weight is either int8 codes, to be scaled after the sum, or floats.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "epilogue.h"
#include "lanes.h"
#include "tile_generic.h"

namespace int8fx {

constexpr int64_t FLOAT_DEPTH = 512;  // columns at a time

constexpr int largest_divisor(int n, int at_most) {
  while (n % at_most != 0) --at_most;
  return at_most;
}

// Sums in T by multiply-adds.
template <typename T, int MR_, int PANEL>
struct FloatTile {
  static constexpr int MR = MR_, L = Lanes<T>::N, VECTORS = MR / L, KG = 1, STEP = 1;
  static constexpr int NR = largest_divisor(PANEL, std::max(1, (VECTOR_BYTES == 64 ? 24 : 12) / VECTORS));
  using X = T;
  using W = T;
  static constexpr int64_t STRIDE = stride_of<W>(FLOAT_DEPTH);
  using V = typename Lanes<T>::V;

  template <typename scalar_t>
  static X as_x(scalar_t value) { return static_cast<X>(value); }

  static void load_codes(const int8_t* codes, int64_t k, W* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = static_cast<T>(codes[i]);
  }

  static void load_floats(const Floats& weight, int64_t at, int64_t k, W* out) { load_any(weight, at, k, k, out); }

  static void run(int64_t k, const X* x, const W* w, T* y, bool first, bool half) {
    if constexpr (VECTORS % 2 == 0)
      if (half) return sums<VECTORS / 2>(k, x, w, y, first);
    sums<VECTORS>(k, x, w, y, first);
  }

 private:
  template <int COUNT>
  static void sums(int64_t k, const X* x, const W* w, T* y, bool first) {
    V sums[NR][COUNT];
#pragma GCC unroll 16
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 8
      for (int v = 0; v < COUNT; ++v) sums[n][v] = first ? V{} : *(const V*)(y + n * MR + v * L);
    for (int64_t i = 0; i < k; ++i, x += MR)
#pragma GCC unroll 16
      for (int n = 0; n < NR; ++n)
#pragma GCC unroll 8
        for (int v = 0; v < COUNT; ++v) sums[n][v] += *(const V*)(x + v * L) * w[n * STRIDE + i];
#pragma GCC unroll 16
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 8
      for (int v = 0; v < COUNT; ++v) *(V*)(y + n * MR + v * L) = sums[n][v];
  }
};

constexpr uint16_t bfloat16_bits(int8_t code) { return std::bit_cast<uint32_t>(static_cast<float>(code)) >> 16; }

struct alignas(64) CodesInBfloat16 {  // the bytes of 0 to 127
  uint8_t low[128], high[128];

  constexpr CodesInBfloat16() : low(), high() {
    for (int i = 0; i < 128; ++i) low[i] = bfloat16_bits(i) & 0xff, high[i] = bfloat16_bits(i) >> 8;
  }
};
constexpr CodesInBfloat16 CODES_IN_BFLOAT16;

// bfloat16 by AVX512-BF16: vdpbf16ps multiplies pairs and adds them to a float32. Products are exact: int8 codes are
// bfloat16 values. Without the instruction, `dot` is a loop.
template <int MR_, int PANEL>
struct Bfloat16Tile {
  static_assert(MR_ == 32);
  static constexpr int MR = MR_, NR = largest_divisor(PANEL, 12), KG = 2, STEP = 2;
  using X = uint16_t;  // bits
  using W = uint16_t;
  static constexpr int64_t STRIDE = stride_of<W>(FLOAT_DEPTH);
  typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
  typedef int32_t Pairs __attribute__((vector_size(64)));
  typedef uint16_t Bits __attribute__((vector_size(64), aligned(2), may_alias));

  static X as_x(c10::BFloat16 value) { return value.x; }

  // Reads and writes up to 15 more.
  static void load_codes(const int8_t* codes, int64_t k, W* out) {
    for (int64_t i = 0; i < k; i += 16) {
#ifdef __AVX512BF16__
      const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + i))));
      _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(values));
#else
      for (int64_t j = i; j < i + 16; ++j) out[j] = bfloat16_bits(codes[j]);
#endif
    }
    if (k % 2 != 0) out[k] = 0;
  }

  static void load_floats(const Floats& weight, int64_t at, int64_t k, W* out) {
    std::memcpy(out, static_cast<const W*>(weight.data) + at, k * sizeof(W));
    if (k % 2 != 0) out[k] = 0;
  }

  static void run(int64_t k, const X* x, const W* w, float* y, bool first, bool half) {
    return half ? sums<1>(k, x, w, y, first) : sums<2>(k, x, w, y, first);
  }

  // Up to four rows, with the weight as it is stored, four channels at a time. The sum of sums[r][c] is, as
  // `total_few` adds it up,
  //
  //   sum_k(x[r, k] * w[c][k])
  //
  // x is as `order_few` writes it, `x_stride` apart. Fetches the weight `ahead`.
  template <int ROWS>
  static void few(
      const X* x, int64_t x_stride, int64_t K, const int8_t* const (&w)[4], int64_t ahead, Vector (&sums)[ROWS][4]) {
    const Widen widen;
    Vector part_sums[ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) part_sums[r][c] = sums[r][c];
    const auto step = [&](int64_t k, const int8_t* w0, const int8_t* w1, const int8_t* w2, const int8_t* w3)
                          __attribute__((always_inline)) {
      Bits values[4][2];
      widen(w0, values[0]);
      widen(w1, values[1]);
      widen(w2, values[2]);
      widen(w3, values[3]);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Bits row = *(const Bits*)(x + r * x_stride + k + half * 32);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) part_sums[r][c] = dot(part_sums[r][c], row, values[c][half]);
        }
    };
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) fetch(w[c] + k + ahead);
      step(k, w[0] + k, w[1] + k, w[2] + k, w[3] + k);
    }
    if (k < K) {
      int8_t rest[4][64] = {};
      for (int c = 0; c < 4; ++c) std::memcpy(rest[c], w[c] + k, K - k);
      step(k, rest[0], rest[1], rest[2], rest[3]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = part_sums[r][c];
  }

  // y[r * stride + c]
  template <int ROWS>
  static void total_few(const Vector (&sums)[ROWS][4], float* y, int64_t stride) {
    Vector all[16] = {};
    std::memcpy(all, sums, sizeof sums);
    const Vector totals = sum_lanes(all);
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 4; ++c) y[r * stride + c] = totals[r * 4 + c];
  }

  // A row for `few`: each 64 columns in the order of `Widen`. `out` holds zeros.
  static void order_few(const X* row, int64_t K, X* out) {
    for (int64_t k = 0; k < K; ++k) out[k / 64 * 64 + k % 16 / 8 * 32 + k % 64 / 16 * 8 + k % 8] = row[k];
  }

 private:
  // 64 codes: of each 16 the first 8, then of each 16 the last 8.
  struct Widen {
#ifdef __AVX512VBMI__
    const __m512i low[2] = {_mm512_load_si512(CODES_IN_BFLOAT16.low), _mm512_load_si512(CODES_IN_BFLOAT16.low + 64)};
    const __m512i high[2] = {_mm512_load_si512(CODES_IN_BFLOAT16.high), _mm512_load_si512(CODES_IN_BFLOAT16.high + 64)};

    inline void operator()(const int8_t* codes, Bits (&out)[2]) const {
      const __m512i code = _mm512_loadu_si512(codes), magnitude = _mm512_abs_epi8(code), sign = _mm512_set1_epi8(-128);
      const __m512i first = _mm512_permutex2var_epi8(low[0], magnitude, low[1]);
      const __m512i second = _mm512_or_si512(
          _mm512_permutex2var_epi8(high[0], magnitude, high[1]), _mm512_and_si512(code, sign));
      out[0] = (Bits)_mm512_unpacklo_epi8(first, second);
      out[1] = (Bits)_mm512_unpackhi_epi8(first, second);
    }
#else
    void operator()(const int8_t* codes, Bits (&out)[2]) const {
      for (int i = 0; i < 64; ++i) out[i % 16 / 8][i / 16 * 8 + i % 8] = bfloat16_bits(codes[i]);
    }
#endif
  };

  template <int COUNT>
  static void sums(int64_t k, const X* x, const W* w, float* y, bool first) {
    Vector sums[NR][COUNT];
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) sums[n][v] = first ? Vector{} : *(const Vector*)(y + n * MR + v * 16);
    for (int64_t i = 0; i < k; i += KG, x += MR * KG) {
      Bits rows[COUNT];
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) std::memcpy(&rows[v], x + v * 32, 64);
#pragma GCC unroll 12
      for (int n = 0; n < NR; ++n) {
        int32_t pair;
        std::memcpy(&pair, w + n * STRIDE + i, sizeof pair);
        const Bits all = (Bits)(Pairs{} + pair);
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; ++v) sums[n][v] = dot(sums[n][v], rows[v], all);
      }
    }
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) *(Vector*)(y + n * MR + v * 16) = sums[n][v];
  }

  // sum[i] += x[2 * i] * w[2 * i] + x[2 * i + 1] * w[2 * i + 1]
  static inline Vector dot(Vector sum, Bits x, Bits w) {
#ifdef __AVX512BF16__
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
    const auto value = [](uint32_t bits) {
      float f;
      bits <<= 16;
      std::memcpy(&f, &bits, sizeof f);
      return f;
    };
    for (int i = 0; i < 16; ++i)
      sum[i] += value(x[2 * i]) * value(w[2 * i]) + value(x[2 * i + 1]) * value(w[2 * i + 1]);
    return sum;
#endif
  }
};

}  // namespace int8fx
