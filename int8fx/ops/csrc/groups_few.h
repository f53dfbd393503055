// Few rows of x by a weight in groups. x is not quantised: sums run along K, in float, over the codes as they are stored.
//
// 64 bytes of codes at a time are 16 lanes of 32 bits. Bits i * BITS and on of all lanes are piece i: 16 codes, which one
// instruction looks up in a table of 16 levels (vpermps), or converts. So each four bytes stay in their lane, and a lane is
// in one group. Its sum is multiplied by the group's scale once per 64 bytes. x is reordered instead of the weight.
#pragma once

#include <cstring>

#include "group_weight.h"
#include "lanes.h"

namespace int8fx {

typedef float Lanes16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Codes16 __attribute__((vector_size(64), aligned(1), may_alias));

// table[indices % 16]
inline Lanes16 look_up(Lanes16 table, Codes16 indices) {
#ifdef __AVX512F__
  return (Lanes16)_mm512_permutexvar_ps((__m512i)indices, (__m512)table);
#else
  Lanes16 values;
  for (int i = 0; i < 16; ++i) values[i] = table[indices[i] % 16];
  return values;
#endif
}

template <int BITS>
struct FewGroups {
  static constexpr int BYTES = 64, PIECES = 32 / BITS, BLOCK = 16 * PIECES;  // BLOCK: the columns of BYTES
  static constexpr int64_t WIDTH = 16;  // channels that a thread takes at a time

  // Whether each four bytes are in one group.
  static bool serves(const GroupWeight& weight) {
    const int64_t bits = weight.group_size * BITS;
    return weight.G == 1 || bits == 128 || bits == 256 || bits % 512 == 0;
  }

  static int64_t padded(int64_t K) { return (K + BLOCK - 1) / BLOCK * BLOCK; }

  // A row of x, in the order of pieces. `out` holds zeros.
  static void order(const float* row, int64_t K, float* out) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t piece = BITS == 4 ? k % PIECES ^ 1 : k % PIECES;  // the first of two codes is in the upper half
      out[k / BLOCK * BLOCK + piece * 16 + k % BLOCK / PIECES] = row[k];
    }
  }

  // sums[r][n] = sum_k(x[r, k] * w[n0 + n, k]) for n < count; x [ROWS, padded(K)] as `order` writes it.
  template <int ROWS>
  static void multiply(const GroupWeight& weight, const float* x, int64_t n0, int64_t count, float* scales,
                       float (&sums)[ROWS][WIDTH]) {
    if (weight.zero_point)
      multiply<ROWS, true>(weight, x, n0, count, scales, sums);
    else
      multiply<ROWS, false>(weight, x, n0, count, scales, sums);
  }

  // Of floats that `multiply` wants for scales.
  static int64_t scratch_size(const GroupWeight& weight) { return 2 * WIDTH * (weight.G + 16); }

 private:
  template <int ROWS, bool ASYMMETRIC>
  static void multiply(const GroupWeight& weight, const float* x, int64_t n0, int64_t count, float* scales,
                       float (&sums)[ROWS][WIDTH]) {
    constexpr int64_t AT_ONCE = 4096 / ROWS / BLOCK;  // blocks of x that the first-level cache holds
    const int64_t K = weight.K, G = weight.G, stride = padded(K), row_bytes = weight.row_bytes();
    const int64_t blocks = stride / BLOCK, whole = row_bytes / BYTES, in_group = std::max<int64_t>(1, weight.group_size / BLOCK);
    const int64_t in_block = G == 1 ? 1 : std::max<int64_t>(1, BLOCK / weight.group_size);
    float* zeros = scales + WIDTH * (G + 16);
    for (int64_t n = 0; n < count; ++n) {
      weight.load_scales(n0 + n, scales + n * (G + 16));
      if (ASYMMETRIC)
        for (int64_t g = 0; g < G; ++g) zeros[n * (G + 16) + g] = weight.zero_point_at(n0 + n, g);
    }
    Codes16 group_of_lane;
    for (int i = 0; i < 16; ++i) group_of_lane[i] = i * in_block / 16;
    Lanes16 table;
    for (int i = 0; i < 16; ++i) table[i] = BITS == 8 ? 0 : ASYMMETRIC ? i : weight.levels[i];

    Lanes16 totals[ROWS][WIDTH] = {};
    for (int64_t begin = 0; begin < blocks; begin += AT_ONCE)
      for (int64_t n = 0; n < count; n += 4) {
        const uint8_t* w[4];
        int64_t scales_at[4];
        for (int64_t c = 0; c < 4; ++c) {
          const int64_t channel = std::min(n + c, count - 1);
          w[c] = weight.codes + (n0 + channel) * row_bytes;
          scales_at[c] = channel * (G + 16);
        }
        Lanes16 part[ROWS][4];
        for (int r = 0; r < ROWS; ++r)
          for (int c = 0; c < 4; ++c) part[r][c] = totals[r][n + c];
        for (int64_t block = begin; block < std::min(blocks, begin + AT_ONCE); ++block) {
          Codes16 codes[4];
          if (block < whole)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
              fetch(reinterpret_cast<const int8_t*>(w[c]) + block * BYTES + WIDTH * row_bytes);
              codes[c] = *(const Codes16*)(w[c] + block * BYTES);
            }
          else
            for (int c = 0; c < 4; ++c) {
              codes[c] = Codes16{};
              std::memcpy(&codes[c], w[c] + block * BYTES, row_bytes - block * BYTES);
            }
          const int64_t g = G == 1 ? 0 : in_block > 1 ? block * in_block : block / in_group;
          Lanes16 zero[4] = {};
          if (ASYMMETRIC)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) zero[c] = look_up(*(const Lanes16*)(zeros + scales_at[c] + g), group_of_lane);
          Lanes16 here[ROWS][4] = {};
          const float* rows = x + block * BLOCK;
#pragma GCC unroll 8
          for (int piece = 0; piece < PIECES; ++piece)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
              Lanes16 values;
              if constexpr (BITS == 4)
                values = look_up(table, codes[c] >> (4 * piece));
              else
                values = signed_byte(codes[c], piece);
              if (ASYMMETRIC) values -= zero[c];
#pragma GCC unroll 4
              for (int r = 0; r < ROWS; ++r) here[r][c] += *(const Lanes16*)(rows + r * stride + piece * 16) * values;
            }
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            const Lanes16 scale = look_up(*(const Lanes16*)(scales + scales_at[c] + g), group_of_lane);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) part[r][c] += here[r][c] * scale;
          }
        }
        for (int r = 0; r < ROWS; ++r)
          for (int c = 0; c < 4; ++c) totals[r][n + c] = part[r][c];
      }
    for (int r = 0; r < ROWS; ++r) *(Lanes16*)sums[r] = sum_lanes(totals[r]);
  }

  static Lanes16 signed_byte(Codes16 codes, int i) {
    typedef int32_t Signed __attribute__((vector_size(64)));
    return __builtin_convertvector((Signed)(codes << (24 - 8 * i)) >> 24, Lanes16);
  }
};

}  // namespace int8fx
