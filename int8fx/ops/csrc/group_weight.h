// A weight of any format: codes of 8 or 4 bits, in groups of columns that have a scale and perhaps a zero point each.
// ../../schemes/formats.py describes the formats.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>

#include "epilogue.h"

#ifndef INT8FX_LEVELS
#error "INT8FX_LEVELS is {name, level of code 0, ...}, ...: native.py takes it from formats.py"
#endif

namespace int8fx {

struct Levels {
  std::string_view format;
  float values[16];  // of codes of 4 bits
};

// The levels of the format, less the zero point of symmetric codes; null if there is no such format of 4 bits.
inline const float* levels_of(std::string_view format) {
  static constexpr Levels FORMATS[] = {INT8FX_LEVELS};
  for (const Levels& levels : FORMATS)
    if (levels.format == format) return levels.values;
  return nullptr;
}

// Levels as integer multiples of a unit: level = value * unit, but for a rounding each of the level and of the unit.
struct Steps {
  float unit = 1;
  int values[16] = {};

  // None if there are no such integers of 8 bits and a sign.
  static std::optional<Steps> of(const float* levels) {
    Steps steps{std::numeric_limits<float>::infinity()};
    for (int i = 0; i < 16; ++i)
      if (levels[i] != 0) steps.unit = std::min(steps.unit, std::abs(levels[i]));
    for (int i = 0; i < 16; ++i) {
      const float value = std::nearbyint(levels[i] / steps.unit);
      if (std::abs(value) > 255 ||
          std::abs(value * steps.unit - levels[i]) > std::numeric_limits<float>::epsilon() / 2 * std::abs(levels[i]))
        return std::nullopt;
      steps.values[i] = static_cast<int>(value);
    }
    return steps;
  }

  // The nearest multiples of 1 / 127: each level is off by at most 1 / 254.
  static Steps nearest(const float* levels) {
    Steps steps{1.0f / INT8_MAX_CODE};
    for (int i = 0; i < 16; ++i) steps.values[i] = static_cast<int>(std::nearbyint(levels[i] * INT8_MAX_CODE));
    return steps;
  }

  // Whether value = code + values[0].
  bool are_codes() const { return unit == 1 && values[15] - values[0] == 15; }

  bool are_int8() const {
    return std::all_of(values, values + 16, [](int value) { return std::abs(value) <= INT8_MAX_CODE; });
  }
};

constexpr int MAX_ZERO_POINT = 16;  // of codes of 4 bits in integers of 5 bits and a sign

// The bits of a bfloat16 value: an integer below 256.
inline uint16_t bits_of(int value) {
  const float f = value;
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits >> 16;
}

// to[i] = table[codes[i]] of codes below 16
template <typename T>
inline void look_up(const T* table, const uint8_t* codes, int64_t n, T* to) {
  int64_t i = 0;
#ifdef __AVX512BW__
  if constexpr (std::is_same_v<T, float>) {
    const __m512 all = _mm512_loadu_ps(table);
    for (; i + 16 <= n; i += 16) {
      const __m512i indices = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
      _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(indices, all));
    }
  } else if constexpr (std::is_same_v<T, uint16_t>) {
    const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)table));
    for (; i + 32 <= n; i += 32) {
      const __m512i indices = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + i)));
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(indices, all));
    }
  } else if constexpr (std::is_same_v<T, int8_t>) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
    for (; i + 64 <= n; i += 64) _mm512_storeu_si512(to + i, _mm512_shuffle_epi8(all, _mm512_loadu_si512(codes + i)));
  }
#endif
  for (; i < n; ++i) to[i] = table[codes[i]];
}

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

struct GroupWeight {
  const uint8_t* codes;  // [N, K] int8, or [N, ceil(K / 2)] of 4 bits, the first of two in the upper half
  const float* levels;  // of codes of 4 bits; null for those of 8
  Floats scale;  // [N, G], or nothing if there are scale_codes
  const uint8_t* scale_codes;  // [N, G]: scale = scale_range[n, 0] + scale_codes[n, g] * scale_range[n, 1]
  const float* scale_range;  // [N, 2]
  const uint8_t* zero_point;  // [N, G], int8 for codes of 8 bits; null for symmetric codes
  int64_t N, K, group_size, G;

  int64_t row_bytes() const { return levels ? (K + 1) / 2 : K; }

  // Of asymmetric codes, at n * G + g.
  int zero_point_at(int64_t at) const { return levels ? int(zero_point[at]) : int(int8_t(zero_point[at])); }

  // Whether levels are integers of 5 bits and a sign, less any zero point.
  bool has_small_zero_points() const {
    if (zero_point == nullptr || levels == nullptr) return true;
    return *std::max_element(zero_point, zero_point + N * G) <= MAX_ZERO_POINT;
  }

  // The scales of rows n to n + count: [count, G].
  template <typename T>
  void load_scales(int64_t n, int64_t count, T* to) const {
    if (scale_codes == nullptr) return load_any(scale, n * G, count * G, count * G, to);
    for (const int64_t end = n + count; n < end; ++n, to += G) {
      const double lowest = scale_range[2 * n], step = scale_range[2 * n + 1];  // a product is exact
      for (int64_t g = 0; g < G; ++g) to[g] = T(lowest + double(scale_codes[n * G + g]) * step);
    }
  }

  // Fetches the scales and zero points of `count` rows, which need not exist.
  void fetch_scales(int64_t n, int64_t count) const {
    const auto fetch_bytes = [&](const void* values, int64_t size) {
      if (values == nullptr) return;
      const auto* from = static_cast<const int8_t*>(values) + n * G * size;
      for (int64_t i = 0; i < count * G * size; i += 64) fetch(from + i);
    };
    fetch_bytes(scale_codes, 1);
    fetch_bytes(zero_point, 1);
    fetch_bytes(scale.data, size_of(scale.dtype));
  }

  // Row n as `quantize.dequantize` has it before the rotation: out[i] = (level - zero_point) * scale in columns k + i.
  template <typename T>
  void decode(int64_t n, int64_t k, int64_t count, const T* scales, T* out) const {
    in_pieces(k, count, [&](int64_t at, int64_t g, int64_t size) {
      T* to = out + (at - k);
      if (levels == nullptr) {
        const auto* from = reinterpret_cast<const int8_t*>(codes) + n * K + at;
        const T zero = zero_point ? T(zero_point_at(n * G + g)) : T(0), scale = scales[g];
        for (int64_t i = 0; i < size; ++i) to[i] = (T(from[i]) - zero) * scale;
        return;
      }
      uint8_t unpacked[PIECE];
      unpack(n, at, size, unpacked);
      T values[16];
      for (int i = 0; i < 16; ++i) values[i] = (zero_point ? T(i - zero_point_at(n * G + g)) : T(levels[i])) * scales[g];
      look_up(values, unpacked, size, to);
    });
  }

  // Columns k to k + count of row n as integers of 8 bits: w = (integer - zero(n, g)) * unit * scale.
  void load_integers(int64_t n, int64_t k, int64_t count, const Steps& steps, int8_t* out) const {
    if (levels == nullptr) return (void)std::memcpy(out, codes + n * K + k, count);
    auto* unpacked = reinterpret_cast<uint8_t*>(out);
    unpack(n, k, count, unpacked);
    if (steps.are_codes()) return;
    int8_t table[16];
    std::copy_n(steps.values, 16, table);
    look_up(table, unpacked, count, out);
  }

  // The zero of symmetric codes as integers.
  int common_zero(const Steps& steps) const { return steps.are_codes() ? -steps.values[0] : 0; }

  // The same as bits of bfloat16: w = value * unit * scale.
  void load_bits(int64_t n, int64_t k, int64_t count, const Steps& steps, uint16_t* out) const {
    in_pieces(k, count, [&](int64_t at, int64_t g, int64_t size) {
      const int zero = zero_point ? zero_point_at(n * G + g) : 0;
      uint16_t* to = out + (at - k);
      if (levels == nullptr) {
        const auto* from = reinterpret_cast<const int8_t*>(codes) + n * K + at;
        for (int64_t i = 0; i < size; ++i) to[i] = bits_of(from[i] - zero);
        return;
      }
      uint8_t unpacked[PIECE];
      unpack(n, at, size, unpacked);
      uint16_t table[16];
      for (int i = 0; i < 16; ++i) table[i] = bits_of(zero_point ? i - zero : steps.values[i]);
      look_up(table, unpacked, size, to);
    });
  }

 private:
  static constexpr int64_t PIECE = 512;

  // f(first column, group, columns) of pieces that are in one group each.
  template <typename F>
  void in_pieces(int64_t k, int64_t count, const F& f) const {
    for (const int64_t end = k + count; k < end;) {
      const int64_t g = k / group_size, size = std::min({end - k, (g + 1) * group_size - k, PIECE});
      f(k, g, size);
      k += size;
    }
  }

  // Codes of 4 bits, one a byte.
  void unpack(int64_t n, int64_t k, int64_t count, uint8_t* out) const {
    const uint8_t* __restrict from = codes + n * row_bytes() + k / 2;
    if (k % 2 != 0 && count > 0) *out++ = *from++ & 15, --count;
    uint8_t* __restrict to = out;
    for (int64_t i = 0; i < count / 2; ++i) to[2 * i] = from[i] >> 4, to[2 * i + 1] = from[i] & 15;
    if (count % 2 != 0) to[count - 1] = from[count / 2] >> 4;
  }
};

}  // namespace int8fx
