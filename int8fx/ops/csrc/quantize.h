// Activations to int8: the outlier columns, a scale per row and the codes. schemes/quantize.py specifies them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace int8fx {

constexpr int INT8_MAX_CODE = 127;

// The type of scales and sums: double for float64 tensors, float for all others.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
using bits_t = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

// abs(x) as an integer. Integers have the order of the values; NaN is above infinity.
template <typename T>
inline bits_t<T> abs_bits(T x) {
  bits_t<T> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & std::numeric_limits<bits_t<T>>::max();
}

template <typename scalar_t, typename T>
inline void load(const scalar_t* __restrict from, T* __restrict to, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<scalar_t, c10::Half> && std::is_same_v<T, float>) {
    using Vec = at::vec::Vectorized<float>;
    for (; i + Vec::size() <= n; i += Vec::size()) {
      Vec v;
      at::vec::load_fp32_from_fp16(from + i, v);
      v.store(to + i);
    }
  }
  for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// marks[k] |= abs(row[k]) >= threshold, false for NaN.
template <typename T>
inline void mark_row(const T* __restrict row, int64_t K, T threshold, bits_t<T>* __restrict marks) {
  const auto least = abs_bits(threshold), most = abs_bits(std::numeric_limits<T>::infinity());
  for (int64_t k = 0; k < K; ++k) {
    const auto bits = abs_bits(row[k]);
    marks[k] |= bits_t<T>(bits >= least) & bits_t<T>(bits <= most);
  }
}

// The least value of a 16-bit dtype whose absolute value is not below `threshold`, as bits; above infinity if none is.
template <typename scalar_t>
inline uint16_t least_bits(float threshold) {
  uint16_t below = 0, least = scalar_t(std::numeric_limits<float>::infinity()).x + 1;
  while (below < least) {
    const uint16_t middle = (below + least) / 2;
    if (static_cast<float>(scalar_t(middle, scalar_t::from_bits())) >= threshold)
      least = middle;
    else
      below = middle + 1;
  }
  return least;
}

// `mark_row` of a row of a 16-bit dtype, whose bits as integers have the order of the values.
template <typename scalar_t>
inline void mark_bits(const scalar_t* __restrict row, int64_t K, uint16_t least, uint16_t* __restrict marks) {
  const uint16_t infinity = scalar_t(std::numeric_limits<float>::infinity()).x, range = infinity - least;
  if (least > infinity) return;
  const auto* __restrict bits = reinterpret_cast<const uint16_t*>(row);
  for (int64_t k = 0; k < K; ++k) {
    const uint16_t above = uint16_t((bits[k] & 0x7fff) - least);
    marks[k] |= uint16_t(above <= range ? 0xffff : 0);
  }
}

// mask[k] |= any_m(abs(x[m, k]) >= threshold).
template <typename scalar_t>
void mark_outliers(const scalar_t* x, int64_t M, int64_t K, double threshold, bool* mask) {
  using T = compute_t<scalar_t>;
  std::mutex merging;
  parallel_for(M, std::max<int64_t>(1, 65536 / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    if constexpr (sizeof(scalar_t) == 2) {
      const uint16_t least = least_bits<scalar_t>(static_cast<float>(threshold));
      std::vector<uint16_t> marks(K, 0);
      for (int64_t m = begin; m < end; ++m) mark_bits(x + m * K, K, least, marks.data());
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t k = 0; k < K; ++k) mask[k] |= marks[k] != 0;
    } else {
      std::vector<bits_t<T>> marks(K, 0);
      for (int64_t m = begin; m < end; ++m) mark_row(x + m * K, K, static_cast<T>(threshold), marks.data());
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t k = 0; k < K; ++k) mask[k] |= marks[k] != 0;
    }
  });
}

// One step of the butterflies inside a vector: (a, b) -> (a + b, a - b) for all lanes h apart.
template <int h, typename T, size_t... I>
inline typename Lanes<T>::V butterfly(const typename Lanes<T>::V& v, std::index_sequence<I...>) {
  constexpr typename Lanes<T>::V signs = {((I & h) ? T(-1) : T(1))...};
  return __builtin_shufflevector(v, v, int(I ^ h)...) + v * signs;
}

// A block of n = 64 in registers.
template <typename T>
inline void rotate_64(T* block) {
  constexpr int L = Lanes<T>::N, VECTORS = 64 / L;
  using V = typename Lanes<T>::V;
  constexpr std::make_index_sequence<L> lanes;
  V v[VECTORS];
#pragma GCC unroll 32
  for (int i = 0; i < VECTORS; ++i) {
    v[i] = *(const V*)(block + i * L);
    v[i] = butterfly<1, T>(v[i], lanes);
    if constexpr (L > 2) v[i] = butterfly<2, T>(v[i], lanes);
    if constexpr (L > 4) v[i] = butterfly<4, T>(v[i], lanes);
    if constexpr (L > 8) v[i] = butterfly<8, T>(v[i], lanes);
  }
#pragma GCC unroll 8
  for (int h = 1; h < VECTORS; h *= 2)
#pragma GCC unroll 32
    for (int i = 0; i < VECTORS; ++i)
      if ((i & h) == 0) {
        const V a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
#pragma GCC unroll 32
  for (int i = 0; i < VECTORS; ++i) *(V*)(block + i * L) = v[i] * T(0.125);
}

// schemes/rotate.py's `rotate` in place: blocks of `block` columns, then smaller powers of two for the remaining columns.
// Sums have the order of that function, so results are equal bit for bit.
template <typename T>
inline void rotate_row(T* row, int64_t K, int64_t block) {
  for (int64_t n = block; n > 0; n /= 2) {
    const T norm = static_cast<T>(std::pow(static_cast<double>(n), -0.5));
    for (; n <= K; row += n, K -= n) {
      if (n == 64) {
        rotate_64(row);
        continue;
      }
      for (int64_t h = 1; h < n; h *= 2)
        for (int64_t i = 0; i < n; i += 2 * h)
          for (int64_t j = i; j < i + h; ++j) {
            const T a = row[j], b = row[j + h];
            row[j] = a + b;
            row[j + h] = a - b;
          }
      for (int64_t j = 0; j < n; ++j) row[j] *= norm;
    }
  }
}

// The scale of a row and its codes. NaN and infinities make the scale NaN.
template <typename T>
inline T quantize_row(const T* __restrict row, int64_t K, int8_t* __restrict codes) {
  bits_t<T> largest = 0;
  for (int64_t k = 0; k < K; ++k) largest = std::max(largest, abs_bits(row[k]));
  T absmax;
  std::memcpy(&absmax, &largest, sizeof absmax);
  if (!std::isfinite(absmax)) absmax = std::numeric_limits<T>::quiet_NaN();
  const T smallest = std::numeric_limits<float>::min(), scale = absmax / INT8_MAX_CODE;
  const T s = scale < smallest ? smallest : scale;
  for (int64_t k = 0; k < K; ++k) codes[k] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(row[k] / s)));
  return s;
}

template <typename T>
inline void clear(T* __restrict row, int64_t K, const uint8_t* __restrict mask) {
  for (int64_t k = 0; k < K; ++k) row[k] = mask[k] ? T(0) : row[k];
}

// scale[m] = max(abs(z[m, k])) / 127 and codes[m, k] = round(z[m, k] / scale[m]), where z is x with zeros in the columns
// of `mask` (nullptr: none), rotated in blocks of `block` (1: not rotated).
template <typename scalar_t>
void quantize_rows(
    const scalar_t* x, int64_t M, int64_t K, const bool* mask, int64_t block, int8_t* codes,
    compute_t<scalar_t>* scale) {
  using T = compute_t<scalar_t>;
  parallel_for(M, std::max<int64_t>(1, 32768 / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    std::vector<T> row(K);
    for (int64_t m = begin; m < end; ++m) {
      load(x + m * K, row.data(), K);
      if (mask != nullptr) clear(row.data(), K, reinterpret_cast<const uint8_t*>(mask));
      if (block > 1) rotate_row(row.data(), K, block);
      scale[m] = quantize_row(row.data(), K, codes + m * K);
    }
  });
}

}  // namespace int8fx
