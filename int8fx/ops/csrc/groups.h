// y = epilogue(x @ weight.T + x_columns @ columns_weight.T), weight of any format: codes of 8 or 4 bits, in groups of
// columns that have a scale and perhaps a zero point each. ../../schemes/formats.py describes the formats.
#pragma once

#include <cmath>
#include <string_view>
#include <vector>

#include "epilogue.h"
#include "parallel.h"

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

struct GroupWeight {
  const uint8_t* codes;  // [N, K] int8, or [N, ceil(K / 2)] of 4 bits, the first of two in the upper half
  const float* levels;  // of codes of 4 bits; null for those of 8
  Floats scale;  // [N, G], or nothing if there are scale_codes
  const uint8_t* scale_codes;  // [N, G]: scale = scale_range[n, 0] + scale_codes[n, g] * scale_range[n, 1]
  const float* scale_range;  // [N, 2]
  const uint8_t* zero_point;  // [N, G], int8 for codes of 8 bits; null for symmetric codes
  int64_t N, K, group_size, G;

  int64_t row_bytes() const { return levels ? (K + 1) / 2 : K; }

  // The scales of row n.
  template <typename T>
  void load_scales(int64_t n, T* to) const {
    if (scale_codes == nullptr) return load_any(scale, n * G, G, G, to);
    const double lowest = scale_range[2 * n], step = scale_range[2 * n + 1];  // a product is exact
    for (int64_t g = 0; g < G; ++g) to[g] = T(lowest + double(scale_codes[n * G + g]) * step);
  }

  // Row n as `quantize.dequantize` has it before the rotation: row[k] = (level - zero_point) * scale.
  template <typename T>
  void decode(int64_t n, T* scales, T* row) const {
    load_scales(n, scales);
    const uint8_t* from = codes + n * row_bytes();
    for (int64_t g = 0; g < G; ++g) {
      const int64_t begin = g * group_size, end = std::min(K, begin + group_size);
      if (levels == nullptr) {
        const T zero = zero_point ? T(int8_t(zero_point[n * G + g])) : T(0);
        for (int64_t k = begin; k < end; ++k) row[k] = (T(int8_t(from[k])) - zero) * scales[g];
        continue;
      }
      T values[16];
      for (int i = 0; i < 16; ++i)
        values[i] = (zero_point ? T(i) - T(zero_point[n * G + g]) : T(levels[i])) * scales[g];
      for (int64_t k = begin; k < end; ++k) row[k] = values[k % 2 ? from[k / 2] & 15 : from[k / 2] >> 4];
    }
  }
};

template <typename scalar_t>
struct GroupProduct {
  using T = compute_t<scalar_t>;

  const T* x;  // [M, K], as it is multiplied: quantised and dequantised, or as it was
  const T* unquantised;  // [M, columns] of x
  GroupWeight weight;
  int64_t columns;
  Floats columns_weight;  // [N, columns]
  Epilogue epilogue;
  scalar_t* y;  // [M, N]
  int64_t M;

  void run() const {
    constexpr int64_t WIDTH = 16;
    const int64_t N = weight.N, K = weight.K;
    if (M == 0 || N == 0) return;
    parallel_for((N + WIDTH - 1) / WIDTH, grain_of(M * K * WIDTH), [&](int64_t begin, int64_t end) {
      std::vector<T> rows(WIDTH * K), scales(weight.G), of_columns(WIDTH * columns);
      T bias[WIDTH] = {}, sums[WIDTH];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t n0 = block * WIDTH, count = std::min(WIDTH, N - n0);
        if (epilogue.bias.data) load_any(epilogue.bias, n0, count, WIDTH, bias);
        for (int64_t n = 0; n < count; ++n) weight.decode(n0 + n, scales.data(), rows.data() + n * K);
        if (columns > 0) load_any(columns_weight, n0 * columns, count * columns, count * columns, of_columns.data());
        for (int64_t m = 0; m < M; ++m) {
          for (int64_t n = 0; n < WIDTH; ++n)
            sums[n] = n >= count ? T(0) : dot(x + m * K, rows.data() + n * K, K) +
                dot(unquantised + m * columns, of_columns.data() + n * columns, columns) + bias[n];
          epilogue.store(sums, m, n0, count, WIDTH, N, y);
        }
      }
    });
  }

 private:
  static T dot(const T* a, const T* b, int64_t size) {
    using Vec = at::vec::Vectorized<T>;
    constexpr int64_t L = Vec::size();
    Vec sums(T(0));
    int64_t i = 0;
    for (; i + L <= size; i += L) sums = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sums);
    T lanes[L], sum = 0;
    sums.store(lanes);
    for (const T lane : lanes) sum += lane;
    for (; i < size; ++i) sum += a[i] * b[i];
    return sum;
  }
};

}  // namespace int8fx
