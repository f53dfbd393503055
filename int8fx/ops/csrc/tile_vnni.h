// int8 matmul with AVX512-VNNI: vpdpbusd multiplies four unsigned by four signed bytes and adds them to an int32.
//
// The unsigned operand is w + 128 (the code with its sign bit flipped), so a row's sums are 128 * sum_k(x) too large. int32
// wraps around, so only the final sums must fit.
//
//   x: 32 rows              w: a panel's channels
//   [k / 4][32][4] int8     [48][STRIDE] uint8, each four are broadcast to all rows
//
// 32 rows are two vectors, by 12 channels. 16 rows are one by 24 channels, 8 rows half a vector by 24 channels. All codes of
// a group of channels are loaded while the first rows are multiplied, 64 columns at a time.
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
  static constexpr int MR = 32, NR = 24, PANEL = 48, UNIT = 16, KG = 4, BLOCK_M = 256, OFFSET = 128;
  static constexpr int64_t DEPTH = 2048, STRIDE = stride_of<int8_t>(DEPTH);
  using X = int8_t;
  using W = uint8_t;
  struct Setup {};
  typedef int32_t Vector __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint8_t Bytes __attribute__((vector_size(64), may_alias));
  typedef int8_t Codes __attribute__((vector_size(64), may_alias));
  typedef int32_t HalfVector __attribute__((vector_size(32), aligned(4), may_alias));

  // As [ceil(k / 64) * 16][MR][4]; whole 16 rows.
  static void pack_x(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, X* out) {
    alignas(64) static constexpr int8_t NONE[64] = {};
    for (int64_t m = 0; m < rows; m += 16)
      for (int64_t at = 0; at < k; at += 64) {
        Vector fours[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          fours[i] = Vector{};
          if (k - at >= 64)
            std::memcpy(&fours[i], m + i < rows ? codes + (m + i) * stride + at : NONE, 64);
          else if (m + i < rows)
            std::memcpy(&fours[i], codes + (m + i) * stride + at, k - at);
        }
        transpose(fours);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) std::memcpy(out + ((at / 4 + i) * MR + m) * 4, &fours[i], 64);
      }
  }

  static void run(int64_t k, const X* x, const Channels& channels, W* w, int32_t* y, bool first, int64_t rows) {
    if (rows > 24) return panel<Vector, 2, 12>(k, x, channels, w, y, first);
    if (rows <= 8) return panel<HalfVector, 1, 24>(k, x, channels, w, y, first);
    panel<Vector, 1, 24>(k, x, channels, w, y, first);
    if (rows <= 16) return;
    Channels loaded = channels;
    loaded.load = false;
    panel<HalfVector, 1, 24>(k, x + 16 * KG, loaded, w, y + 16, first);
  }

  // Few rows: sums along K of the weight as it is stored, FEW_CHANNELS at a time. A vector of x is 16 columns of four rows, and
  // 16 codes of w are broadcast to it. Here the unsigned operand is x + 128, so a channel's sums are 128 * sum_k(w) too large.
  //
  //   y[c * MR + r] = sum_k(x[r, k] * w[c][k])
  static constexpr int FEW_AT_ONCE = 16, FEW_CHANNELS = 4;

  // Up to FEW_AT_ONCE rows of codes as [ceil(k / 64) * 4][QUADS][4][16], QUADS = ceil(rows / 4); row r is in quad r % QUADS.
  static void pack_few(const int8_t* codes, int64_t K, int64_t rows, uint8_t* out) {
    const int64_t quads = (rows + 3) / 4, step = quads * 64;
    std::memset(out, 0x80, (K + 63) / 64 * 4 * step);
    for (int64_t r = 0; r < rows; ++r, codes += K) {
      uint8_t* to = out + r % quads * 64 + r / quads * 16;
      int64_t k = 0;
      for (; k + 16 <= K; k += 16, to += step) {
        Bytes16 sixteen;
        std::memcpy(&sixteen, codes + k, 16);
        sixteen ^= Bytes16{} + uint8_t(0x80);
        std::memcpy(to, &sixteen, 16);
      }
      for (int64_t i = 0; k + i < K; ++i) to[i] = uint8_t(codes[k + i]) ^ 0x80;
    }
  }

  // `fetches`: whether these are the first rows that are multiplied by these channels.
  static void few(int64_t rows, const uint8_t* x, int64_t K, const int8_t* const (&w)[FEW_CHANNELS], bool fetches,
                  int32_t* y) {
    switch ((rows + 3) / 4) {
      case 1: return few<1>(x, K, w, fetches, y);
      case 2: return few<2>(x, K, w, fetches, y);
      case 3: return few<3>(x, K, w, fetches, y);
      default: return few<4>(x, K, w, fetches, y);
    }
  }

 private:
  typedef uint8_t Bytes16 __attribute__((vector_size(16)));

  template <int QUADS>
  static void few(const uint8_t* x, int64_t K, const int8_t* const (&w)[FEW_CHANNELS], bool fetches, int32_t* y) {
    Vector sums[FEW_CHANNELS][4] = {}, w_sums[FEW_CHANNELS] = {};
    const int64_t ahead = 16 * K;
    const auto step = [&](const int8_t* w0, const int8_t* w1, const int8_t* w2, const int8_t* w3)
                          __attribute__((always_inline)) {
      const int8_t* const at[FEW_CHANNELS] = {w0, w1, w2, w3};
#pragma GCC unroll 4
      for (int c = 0; c < FEW_CHANNELS; ++c)
        w_sums[c] = dot(w_sums[c], (Vector)(Bytes{} + uint8_t(1)), (Vector)load(at[c]));
#pragma GCC unroll 4
      for (int i = 0; i < 64; i += 16, x += QUADS * 64)
#pragma GCC unroll 4
        for (int c = 0; c < FEW_CHANNELS; ++c) {
          const Vector sixteen = broadcast(at[c] + i);
#pragma GCC unroll 4
          for (int q = 0; q < QUADS; ++q) sums[c][q] = dot(sums[c][q], *(const Vector*)(x + q * 64), sixteen);
        }
    };
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
      if (fetches)
#pragma GCC unroll 4
        for (int c = 0; c < FEW_CHANNELS; ++c) fetch(w[c] + k + ahead);
      step(w[0] + k, w[1] + k, w[2] + k, w[3] + k);
    }
    if (k < K) {
      int8_t rest[FEW_CHANNELS][64] = {};
      for (int c = 0; c < FEW_CHANNELS; ++c) std::memcpy(rest[c], w[c] + k, K - k);
      step(rest[0], rest[1], rest[2], rest[3]);
    }
    // lane 4 * l + q of `all` is the sum of the four lanes l of quad q; the same of w_sums: of one channel in each lane
    Vector w_quads = sum_fours(w_sums[0], w_sums[1], w_sums[2], w_sums[3]);
    w_quads += __builtin_shufflevector(w_quads, w_quads, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    w_quads += __builtin_shufflevector(w_quads, w_quads, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#pragma GCC unroll 4
    for (int c = 0; c < FEW_CHANNELS; ++c) {
      Vector all = sum_fours(sums[c][0], sums[c][1], sums[c][2], sums[c][3]);
      if (QUADS == 1) all = __builtin_shufflevector(all, all, 0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
      if (QUADS == 2) all = __builtin_shufflevector(all, all, 0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0);
      if (QUADS == 3) all = __builtin_shufflevector(all, all, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 0, 0, 0, 0);
      *(Vector*)(y + c * MR) = all - 128 * w_quads[c];
    }
  }

  // Lanes 4 * l to 4 * l + 3 are the sums of the same lanes of a, b, c and d.
  static inline Vector sum_fours(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = low(a, b) + high(a, b), cd = low(c, d) + high(c, d);
    typedef int64_t Pairs __attribute__((vector_size(64), may_alias));
    const Pairs p = (Pairs)ab, q = (Pairs)cd;
    return (Vector)__builtin_shufflevector(p, q, 0, 8, 2, 10, 4, 12, 6, 14) +
        (Vector)__builtin_shufflevector(p, q, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  static inline Vector low(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  }
  static inline Vector high(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }

  // 16 codes, four times
  static inline Vector broadcast(const int8_t* codes) {
#ifdef __AVX512F__
    return (Vector)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes));
#else
    Vector v;
    for (int i = 0; i < 4; ++i) std::memcpy((char*)&v + i * 16, codes, 16);
    return v;
#endif
  }

  template <typename V, int VECTORS, int AT_ONCE>
  static void panel(int64_t k, const X* x, const Channels& channels, W* w, int32_t* y, bool first) {
    for (int64_t n = 0; n < channels.count; n += AT_ONCE)
      if (channels.load)
        sums<V, VECTORS, AT_ONCE, true>(k, x, channels, n, w + n * STRIDE, y + n * MR, first);
      else
        sums<V, VECTORS, AT_ONCE, false>(k, x, channels, n, w + n * STRIDE, y + n * MR, first);
  }

  // Of channels n on.
  template <typename V, int VECTORS, int AT_ONCE, bool LOADS>
  static void sums(int64_t k, const X* x, const Channels& channels, int64_t n, W* w, int32_t* y, bool first) {
    constexpr int L = sizeof(V) / 4;
    V sums[AT_ONCE][VECTORS];
#pragma GCC unroll 24
    for (int c = 0; c < AT_ONCE; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[c][v] = first ? V{} : *(const V*)(y + c * MR + v * L);
    for (int64_t i0 = 0; i0 < k; i0 += 64) {
      if (LOADS) {
        channels.fetch<AT_ONCE>(n, i0);
        load_w(channels.rows + n * channels.stride + i0, channels.stride,
               std::min<int64_t>(AT_ONCE, channels.count - n), k - i0, w + i0);
      }
      for (int64_t i = i0; i < std::min(k, i0 + 64); i += KG, x += MR * KG) {
        V rows[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) rows[v] = *(const V*)(x + v * L * KG);
#pragma GCC unroll 24
        for (int c = 0; c < AT_ONCE; ++c) {
          int32_t four;
          std::memcpy(&four, w + c * STRIDE + i, sizeof four);
          const V all = V{} + four;
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) sums[c][v] = dot(sums[c][v], all, rows[v]);
        }
      }
    }
#pragma GCC unroll 24
    for (int c = 0; c < AT_ONCE; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) *(V*)(y + c * MR + v * L) = sums[c][v];
  }

  // Up to 64 columns of channels.
  static inline void load_w(const int8_t* from, int64_t stride, int64_t channels, int64_t k, W* out) {
    const Bytes flip = Bytes{} + uint8_t(0x80);
    for (; channels > 0; --channels, from += stride, out += STRIDE) {
      Bytes codes = {};
      if (k >= 64)
        std::memcpy(&codes, from, 64);
      else
        std::memcpy(&codes, from, k);
      codes ^= flip;
      std::memcpy(out, &codes, 64);
    }
  }

  static inline Codes load(const int8_t* codes) {
    Codes v;
    std::memcpy(&v, codes, sizeof v);
    return v;
  }

 protected:
  // sum[i] += sum_j(u[4 * i + j] * s[4 * i + j]), the bytes of u unsigned and those of s signed
  template <typename V>
  static inline V dot(V sum, V u, V s) {
#ifdef __AVX512VNNI__
    if constexpr (sizeof(V) == 64)
      return (V)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
    else
      return (V)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)u, (__m256i)s);
#else
    uint8_t unsigned_bytes[sizeof(V)];
    int8_t signed_bytes[sizeof(V)];
    std::memcpy(unsigned_bytes, &u, sizeof u);
    std::memcpy(signed_bytes, &s, sizeof s);
    for (size_t i = 0; i < sizeof(V); ++i) sum[i / 4] += int32_t(unsigned_bytes[i]) * int32_t(signed_bytes[i]);
    return sum;
#endif
  }
};

}  // namespace int8fx
