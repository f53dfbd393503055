// The 16-bit part of a linear layer: tiles as in tile_generic.h, over columns that are multiplied in floating point.
//
//   y[NR, MR] += w[NR, k] @ x[MR, k].T
//
//   x  [k / KG][MR][KG] of X
//   w  NR rows of W, STRIDE apart
//
// A weight is either int8 codes, to be scaled after the sum, or floats.
#pragma once

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
  static constexpr int MR = MR_, L = Lanes<T>::N, VECTORS = MR / L, KG = 1;
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

// bfloat16 by AVX512-BF16: vdpbf16ps multiplies pairs and adds them to a float32. Products are exact: int8 codes are
// bfloat16 values. Without the instruction, `dot` is a loop.
template <int MR_, int PANEL>
struct Bfloat16Tile {
  static_assert(MR_ == 32);
  static constexpr int MR = MR_, NR = largest_divisor(PANEL, 12), KG = 2;
  using X = uint16_t;  // bits
  using W = uint16_t;
  static constexpr int64_t STRIDE = stride_of<W>(FLOAT_DEPTH);
  typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint16_t Bits __attribute__((vector_size(64), aligned(2), may_alias));

  static X as_x(c10::BFloat16 value) { return value.x; }

  static void load_codes(const int8_t* codes, int64_t k, W* out) {
    for (int64_t i = 0; i < k; ++i) {
      const float value = codes[i];
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      out[i] = bits >> 16;
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

 private:
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
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; ++v) sums[n][v] = dot(sums[n][v], rows[v], pair);
      }
    }
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) *(Vector*)(y + n * MR + v * 16) = sums[n][v];
  }

  // sum[i] += x[2 * i] * w[0] + x[2 * i + 1] * w[1]
  static inline Vector dot(Vector sum, Bits x, int32_t w) {
#ifdef __AVX512BF16__
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(w));
#else
    const auto value = [](uint32_t bits) {
      float f;
      bits <<= 16;
      std::memcpy(&f, &bits, sizeof f);
      return f;
    };
    for (int i = 0; i < 16; ++i)
      sum[i] += value(x[2 * i]) * value(uint32_t(w) & 0xffff) + value(x[2 * i + 1]) * value(uint32_t(w) >> 16);
    return sum;
#endif
  }
};

}  // namespace int8fx
