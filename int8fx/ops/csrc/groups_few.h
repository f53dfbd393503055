// Few rows of x by a weight in groups. x is not quantised: sums run along K, in float, over the codes as they are stored.
//
// 64 bytes of codes at a time are 16 lanes of 32 bits. Instructions look up or convert a piece of the lanes, one or two codes
// of each, so each code stays in its lane (or in its 16 bytes), and a lane is in one group. Its sum is multiplied by the
// group's scale once per 64 bytes. x is reordered instead of the weight.
#pragma once

#include <bit>
#include <cstring>

#include "group_weight.h"
#include "lanes.h"

namespace int8fx {

typedef float Floats16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Codes16 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t Words32 __attribute__((vector_size(64), aligned(2), may_alias));

// table[indices % 16]
inline Floats16 look_up(Floats16 table, Codes16 indices) {
#ifdef __AVX512F__
  return (Floats16)_mm512_permutexvar_ps((__m512i)indices, (__m512)table);
#else
  Floats16 values;
  for (int i = 0; i < 16; ++i) values[i] = table[indices[i] % 16];
  return values;
#endif
}

// table[indices % 32]
inline Words32 look_up(Words32 table, Words32 indices) {
#ifdef __AVX512BW__
  return (Words32)_mm512_permutexvar_epi16((__m512i)indices, (__m512i)table);
#else
  Words32 values;
  for (int i = 0; i < 32; ++i) values[i] = table[indices[i] % 32];
  return values;
#endif
}

// Codes of BITS times floats. `at(k)` is where a row of x has column k of a block, and `piece` the values of piece i.
template <int BITS, bool ASYMMETRIC>
struct FloatPieces {
  using Row = float;
  using Values = Floats16;
  using State = Codes16;
  static constexpr int COUNT = 32 / BITS;

  Floats16 table;  // of codes of 4 bits

  explicit FloatPieces(const float* levels) : table{} {
    for (int i = 0; i < 16; ++i) table[i] = ASYMMETRIC || BITS == 8 ? i : levels[i];
  }

  static int at(int k) { return (BITS == 4 ? k % COUNT ^ 1 : k % COUNT) * 16 + k / COUNT; }  // a first code is above
  static float zero(int zero_point) { return zero_point; }
  State start(Codes16 codes) const { return codes; }

  Floats16 piece(State codes, int i, Floats16 zeros) const {
    typedef int32_t Signed __attribute__((vector_size(64)));
    Floats16 values;
    if constexpr (BITS == 4)
      values = look_up(table, codes >> (4 * i));
    else
      values = __builtin_convertvector((Signed)(codes << (24 - 8 * i)) >> 24, Floats16);
    return ASYMMETRIC ? values - zeros : values;
  }

  static Floats16 dot(Floats16 sum, const float* x, Floats16 values) { return sum + *(const Floats16*)x * values; }
};

// Codes of 4 bits times bfloat16 x, by AVX512-BF16. Their levels are multiples of a unit that are bfloat16 values.
template <int BITS, bool ASYMMETRIC>
struct Bfloat16Pieces {
  static_assert(BITS == 4);
  using Row = uint16_t;
  using Values = Words32;
  using State = Words32;
  static constexpr int COUNT = 4;

  Words32 table;  // by the last 5 bits of an index: a code below any bit, or code - zero_point + 15

  explicit Bfloat16Pieces(const Steps& steps) : table{} {
    for (int i = 0; i < 32; ++i)
      table[i] = bits_of(!ASYMMETRIC ? steps.values[i % 16] : i < 31 ? i - 15 : -MAX_ZERO_POINT);
  }

  static int at(int k) { return (k % COUNT ^ 1) * 32 + k / COUNT; }
  static float zero(int zero_point) { return std::bit_cast<float>((15 - zero_point & 31) * 0x10001); }
  State start(Codes16 codes) const { return (Words32)codes; }

  Words32 piece(State codes, int i, Floats16 zeros) const {
    const Words32 shifted = codes >> (4 * i);
    return look_up(table, ASYMMETRIC ? (shifted & 15) + (Words32)zeros : shifted);
  }

  // sum[i] + x[2 * i] * values[2 * i] + x[2 * i + 1] * values[2 * i + 1]
  static Floats16 dot(Floats16 sum, const uint16_t* x, Words32 values) {
#ifdef __AVX512BF16__
    return (Floats16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)values);
#else
    const auto value = [](uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); };
    for (int i = 0; i < 32; ++i) sum[i / 2] += value(x[i]) * value(values[i]);
    return sum;
#endif
  }
};

template <int BITS, template <int, bool> typename Pieces>
struct FewGroups {
  using Row = typename Pieces<BITS, false>::Row;
  static constexpr int64_t BYTES = 64, BLOCK = 8 * BYTES / BITS;  // of codes, and their columns
  static constexpr int64_t WIDTH = 16;  // channels that a thread takes at a time

  // Whether each lane is in one group.
  static bool serves(const GroupWeight& weight) {
    const int64_t bits = weight.group_size * BITS;
    return (weight.levels == nullptr) == (BITS == 8) && (weight.G == 1 || bits == 128 || bits == 256 || bits % 512 == 0);
  }

  static int64_t padded(int64_t K) { return (K + BLOCK - 1) / BLOCK * BLOCK; }

  // A row of x, in the order of pieces. `out` holds zeros.
  static void order(const Row* row, int64_t K, Row* out) {
    int at[BLOCK];
    for (int k = 0; k < BLOCK; ++k) at[k] = Pieces<BITS, false>::at(k);
    for (int64_t k = 0; k < K; ++k) out[k / BLOCK * BLOCK + at[k % BLOCK]] = row[k];
  }

  // Of floats.
  static int64_t scratch_size(const GroupWeight& weight) { return 2 * (WIDTH * weight.G + 16); }

  // sums[r][n] = sum_k(x[r, k] * w[n0 + n, k]) / unit for n < count; x [ROWS, padded(K)] as `order` writes it. `scratch`
  // holds zeros or what an earlier call left.
  template <int ROWS, typename Table>
  static void multiply(const GroupWeight& weight, const Table& table, const Row* x, int64_t n0, int64_t count,
                       float* scratch, float (&sums)[ROWS][WIDTH]) {
    if (weight.zero_point)
      multiply<ROWS, true>(weight, Pieces<BITS, true>(table), x, n0, count, scratch, sums);
    else
      multiply<ROWS, false>(weight, Pieces<BITS, false>(table), x, n0, count, scratch, sums);
  }

 private:
  template <int ROWS, bool ASYMMETRIC>
  static void multiply(const GroupWeight& weight, const Pieces<BITS, ASYMMETRIC>& pieces, const Row* x, int64_t n0,
                       int64_t count, float* scales, float (&sums)[ROWS][WIDTH]) {
    constexpr int64_t AT_ONCE = 16384 / sizeof(Row) / ROWS / BLOCK;  // blocks of x that the first-level cache holds
    constexpr int LANES = BYTES / sizeof(Row);
    const int64_t K = weight.K, G = weight.G, stride = padded(K), row_bytes = weight.row_bytes();
    const int64_t blocks = stride / BLOCK, whole = row_bytes / BYTES;
    const int64_t groups = G == 1 ? 1 : std::max<int64_t>(1, BLOCK / weight.group_size);  // of a block
    const int64_t blocks_of_group = G == 1 ? blocks : std::max<int64_t>(1, weight.group_size / BLOCK);
    const int64_t zeros_at = WIDTH * G + 16;
    float* zeros = scales + zeros_at;
    weight.fetch_scales(n0 + WIDTH, WIDTH);
    weight.load_scales(n0, count, scales);
    if (ASYMMETRIC)
      for (int64_t i = 0; i < count * G; ++i) zeros[i] = pieces.zero(weight.zero_point_at(n0 * G + i));
    Codes16 group_of_lane, group_of_last;  // of a block, and of the last one
    for (int64_t i = 0; i < 16; ++i) {
      group_of_lane[i] = i * groups / 16;
      group_of_last[i] = std::min(i * groups / 16, (G - 1) % groups);
    }

    Floats16 totals[ROWS][WIDTH] = {};
    for (int64_t begin = 0; begin < blocks; begin += AT_ONCE)
      for (int64_t n = 0; n < count; n += 4) {
        const uint8_t* w[4];
        const float* scale[4];
        for (int64_t c = 0; c < 4; ++c) {
          const int64_t channel = std::min(n + c, count - 1);
          w[c] = weight.codes + (n0 + channel) * row_bytes;
          scale[c] = scales + channel * G;
        }
        Floats16 part[ROWS][4];
        for (int r = 0; r < ROWS; ++r)
          for (int c = 0; c < 4; ++c) part[r][c] = totals[r][n + c];
        int64_t g = begin / blocks_of_group * groups, left = blocks_of_group - begin % blocks_of_group;
        for (int64_t block = begin; block < std::min(blocks, begin + AT_ONCE); ++block) {
          typename Pieces<BITS, ASYMMETRIC>::State codes[4];
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            const uint8_t* from = w[c] + block * BYTES;
            Codes16 here = {};
            if (block < whole) {
              fetch(reinterpret_cast<const int8_t*>(from) + WIDTH * row_bytes);
              here = *(const Codes16*)from;
            } else
              std::memcpy(&here, from, row_bytes - block * BYTES);
            codes[c] = pieces.start(here);
          }
          const Codes16 lanes = block + 1 < blocks ? group_of_lane : group_of_last;
          Floats16 zero[4] = {}, here[ROWS][4] = {};
          if (ASYMMETRIC)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) zero[c] = look_up(*(const Floats16*)(scale[c] + zeros_at + g), lanes);
          const Row* rows = x + block * BLOCK;
#pragma GCC unroll 8
          for (int i = 0; i < pieces.COUNT; ++i)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
              const auto values = pieces.piece(codes[c], i, zero[c]);
#pragma GCC unroll 4
              for (int r = 0; r < ROWS; ++r) here[r][c] = pieces.dot(here[r][c], rows + r * stride + i * LANES, values);
            }
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            const Floats16 of_lanes = look_up(*(const Floats16*)(scale[c] + g), lanes);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) part[r][c] += here[r][c] * of_lanes;
          }
          if (--left == 0) g += groups, left = blocks_of_group;
        }
        for (int r = 0; r < ROWS; ++r)
          for (int c = 0; c < 4; ++c) totals[r][n + c] = part[r][c];
      }
    for (int r = 0; r < ROWS; ++r) *(Floats16*)sums[r] = sum_lanes(totals[r]);
  }
};

// Few rows of int8 codes of x by integers of 8 bits, or codes of 4 that are integers, with AVX2. Sums of a group are exact.
//
// vpmaddubsw multiplies 32 unsigned bytes by signed ones, and adds pairs in 16 bits: codes of 4 bits by those of x, or the
// sizes of codes of 8 bits by those of x with the codes' signs. No sum exceeds 16 bits. A block is 32 bytes of the weight.
struct FewCodes {
#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr bool EXISTS = true;
  static constexpr int64_t WIDTH = 16;  // channels that a thread takes at a time

  static bool serves(const GroupWeight& weight, const Steps& steps) {
    return (weight.levels == nullptr || steps.are_codes()) && (weight.G == 1 || weight.group_size % 32 == 0);
  }

  const GroupWeight& weight;
  const int64_t block;  // columns of a block
  const int64_t blocks;
  const int64_t run_blocks;  // of a run, which has one scale, or one for each half of a block
  const int64_t runs;
  std::vector<int8_t> x;  // [rows][blocks * block], in the order that a block of the weight is multiplied in
  std::vector<__m256i> starts;  // [rows][runs]: for each lane of 32 bits, -zero times the sum of its columns of x

  FewCodes(const GroupWeight& weight, const Steps& steps, const int8_t* codes, int64_t rows)
      : weight(weight), block(weight.levels ? 64 : 32),
        blocks((weight.K + block - 1) / block),
        run_blocks(weight.G == 1 ? blocks : has_halves() ? 1 : weight.group_size / block),
        runs(run_blocks ? (blocks + run_blocks - 1) / run_blocks : 0), x(rows * blocks * block), starts(rows * runs) {
    for (int64_t r = 0; r < rows; ++r) {
      const int8_t* from = codes + r * weight.K;
      int8_t* to = x.data() + r * blocks * block;
      for (int64_t k = 0; k < weight.K; ++k) {
        const int64_t i = k % 64;  // of 4 bits, two lanes of 16 first codes, then as many second ones
        to[weight.levels ? k - i + i % 2 * 32 + i / 32 * 16 + i % 32 / 2 : k] = from[k];
      }
      const __m256i ones = _mm256_set1_epi16(1), bytes = _mm256_set1_epi8(1);
      for (int64_t i = 0; i < blocks; ++i)
        for (int64_t part = 0; part < block; part += 32) {
          const __m256i pairs = _mm256_maddubs_epi16(bytes, load(to + i * block + part));
          __m256i& sums = starts[r * runs + i / run_blocks];
          sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, ones));
        }
    }
    const __m256i factor = _mm256_set1_epi32(weight.zero_point ? -1 : -weight.common_zero(steps));
    for (__m256i& sums : starts) sums = _mm256_mullo_epi32(sums, factor);
  }

  // Whether a half of a block may be in another group than the other half.
  bool has_halves() const { return weight.levels && weight.G > 1 && weight.group_size % 64 != 0; }

  // sums[r][n] = sum_k(x[r, k] * w[n0 + n, k]) for n < count. `scales` has room for [WIDTH, G].
  template <int ROWS>
  void multiply(int64_t n0, int64_t count, float* scales, float (&sums)[ROWS][WIDTH]) const {
    weight.fetch_scales(n0 + WIDTH, WIDTH);
    weight.load_scales(n0, count, scales);
    if (weight.zero_point)
      multiply<ROWS, true>(n0, count, scales, sums);
    else
      multiply<ROWS, false>(n0, count, scales, sums);
  }

 private:
  static __m256i load(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }

  static __m256i add(__m256i sums, __m256i pairs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  template <int ROWS, bool ASYMMETRIC>
  void multiply(int64_t n0, int64_t count, const float* scales, float (&sums)[ROWS][WIDTH]) const {
    if (has_halves())
      multiply<ROWS, ASYMMETRIC, 4, true>(n0, count, scales, sums);
    else if (weight.levels)
      multiply<ROWS, ASYMMETRIC, 4, false>(n0, count, scales, sums);
    else
      multiply<ROWS, ASYMMETRIC, 8, false>(n0, count, scales, sums);
  }

  template <int ROWS, bool ASYMMETRIC, int BITS, bool HALVES>
  void multiply(int64_t n0, int64_t count, const float* scales, float (&sums)[ROWS][WIDTH]) const {
    constexpr int CHANNELS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // whose sums are in registers
    const int64_t G = weight.G, row_bytes = weight.row_bytes(), whole = row_bytes / 32;
    const __m256i low = _mm256_set1_epi8(15);
    for (int64_t n = 0; n < count; n += CHANNELS) {
      int64_t channel[CHANNELS];
      const uint8_t* w[CHANNELS];
      __m256 totals[ROWS][CHANNELS] = {};
      for (int c = 0; c < CHANNELS; ++c) {
        channel[c] = std::min(n + c, count - 1);
        w[c] = weight.codes + (n0 + channel[c]) * row_bytes;
      }
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t first = HALVES ? run * 64 / weight.group_size : run;
        const int64_t second = HALVES ? std::min((run * 64 + 32) / weight.group_size, G - 1) : run;
        __m256i part[ROWS][CHANNELS];
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) part[r][c] = starts[r * runs + run];
          if constexpr (ASYMMETRIC) {
            const int64_t at = (n0 + channel[c]) * G;
            const int of_first = weight.zero_point_at(at + first), of_second = weight.zero_point_at(at + second);
            const __m256i zeros = _mm256_setr_m128i(_mm_set1_epi32(of_first), _mm_set1_epi32(of_second));
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) part[r][c] = _mm256_mullo_epi32(zeros, part[r][c]);
          }
        }
        for (int64_t i = run * run_blocks; i < std::min(blocks, (run + 1) * run_blocks); ++i)
#pragma GCC unroll 4
          for (int c = 0; c < CHANNELS; ++c) {
            const uint8_t* from = w[c] + i * 32;
            __m256i codes;
            if (i < whole) {
              fetch(reinterpret_cast<const int8_t*>(from) + CHANNELS * row_bytes);
              codes = load(from);
            } else {
              alignas(32) uint8_t last[32] = {};
              std::memcpy(last, from, row_bytes - i * 32);
              codes = load(last);
            }
            if constexpr (BITS == 4) {
              const __m256i second_codes = _mm256_and_si256(codes, low);
              const __m256i first_codes = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
#pragma GCC unroll 4
              for (int r = 0; r < ROWS; ++r) {
                const int8_t* row = x.data() + (r * blocks + i) * 64;
                part[r][c] = add(part[r][c], _mm256_add_epi16(_mm256_maddubs_epi16(first_codes, load(row)),
                                                              _mm256_maddubs_epi16(second_codes, load(row + 32))));
              }
            } else {
              const __m256i sizes = _mm256_abs_epi8(codes);
#pragma GCC unroll 4
              for (int r = 0; r < ROWS; ++r) {
                const __m256i row = load(x.data() + (r * blocks + i) * 32);
                part[r][c] = add(part[r][c], _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(row, codes)));
              }
            }
          }
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) {
          const float* scale = scales + channel[c] * G;
          const __m256 both = HALVES ? _mm256_setr_m128(_mm_set1_ps(scale[first]), _mm_set1_ps(scale[second]))
                                     : _mm256_set1_ps(scale[first]);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) totals[r][c] += _mm256_cvtepi32_ps(part[r][c]) * both;
        }
      }
      for (int c = 0; c < CHANNELS; ++c)
        for (int r = 0; r < ROWS; ++r) {
          float sum = 0;
          for (int lane = 0; lane < 8; ++lane) sum += totals[r][c][lane];
          sums[r][channel[c]] = sum;
        }
    }
  }
#else
  static constexpr bool EXISTS = false;
#endif
};

}  // namespace int8fx
