// Activations to int8: the outlier columns, a scale per row and the codes. schemes/quantize.py specifies them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
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

// Whether columns at distance h differ in the lower bit of a base-4 digit, and not in the upper bit.
constexpr bool is_lower(int64_t h) { return (h & 0x5555555555555555) != 0; }

// The sign in the butterfly of columns j and j ^ h. Two steps of a regular matrix, over the bits of a base-4 digit,
// multiply by [[1, 1, 1, -1], [1, -1, 1, 1], [1, 1, -1, 1], [-1, 1, 1, 1]]; its signs are 1, -1, -1, 1 by the digit.
template <bool REGULAR>
constexpr int sign(int64_t j, int64_t h) {
  const int64_t lower = is_lower(h) ? h : h / 2;
  const bool negative = REGULAR ? ((j & lower) != 0) != ((j & (2 * lower)) != 0) : (j & h) != 0;
  return negative ? -1 : 1;
}

// Column j after the step at distance h: of x[j] and its partner x[j ^ h].
template <bool REGULAR, typename V, typename S>
inline V butterfly(const V& x, const V& partner, int64_t h, const S& signs) {
  return REGULAR && is_lower(h) ? x + partner * signs : partner + x * signs;
}

// Vector i of v after the step at distance h.
template <bool REGULAR, int h, int i, typename T, size_t... lane>
inline typename Lanes<T>::V step(const typename Lanes<T>::V* v, std::index_sequence<lane...>) {
  constexpr int L = sizeof...(lane);
  constexpr typename Lanes<T>::V signs = {T(sign<REGULAR>(i * L + lane, h))...};
  if constexpr (h < L)
    return butterfly<REGULAR>(v[i], __builtin_shufflevector(v[i], v[i], int(lane ^ h)...), h, signs);
  else
    return butterfly<REGULAR>(v[i], v[i ^ (h / L)], h, signs);
}

// The steps at distances h to n / 2. The last one is Sylvester's if it has no other bit of a digit.
template <bool REGULAR, int h, int n, typename T, size_t... i>
inline void steps(typename Lanes<T>::V* v, std::index_sequence<i...> vectors) {
  if constexpr (h < n) {
    constexpr std::make_index_sequence<Lanes<T>::N> lanes;
    constexpr bool regular = REGULAR && !(is_lower(h) && 2 * h == n);
    const typename Lanes<T>::V after[] = {step<regular, h, int(i), T>(v, lanes)...};
    ((v[i] = after[i]), ...);
    steps<REGULAR, 2 * h, n, T>(v, vectors);
  }
}

// n columns in registers, after the steps at distances below n, times norm.
template <bool REGULAR, int n, typename T>
inline void rotate_in_registers(T* columns, T norm) {
  constexpr int L = Lanes<T>::N, VECTORS = n / L;
  using V = typename Lanes<T>::V;
  V v[VECTORS];
#pragma GCC unroll 32
  for (int i = 0; i < VECTORS; ++i) v[i] = *(const V*)(columns + i * L);
  steps<REGULAR, 1, n, T>(v, std::make_index_sequence<VECTORS>());
#pragma GCC unroll 32
  for (int i = 0; i < VECTORS; ++i) *(V*)(columns + i * L) = v[i] * norm;
}

// The steps at distances h to RADIX / 2 * h of a block of n columns, and a product with norm.
template <bool REGULAR, int RADIX, typename T>
inline void rotate_across(T* block, int64_t n, int64_t h, T norm) {
  constexpr int L = Lanes<T>::N;
  using V = typename Lanes<T>::V;
  for (int64_t first = 0; first < n; first += RADIX * h)
    for (int64_t j = first; j < first + h; j += L) {
      V v[RADIX], after[RADIX];
#pragma GCC unroll 4
      for (int r = 0; r < RADIX; ++r) v[r] = *(const V*)(block + j + r * h);
#pragma GCC unroll 2
      for (int d = 1; d < RADIX; d *= 2) {
#pragma GCC unroll 4
        for (int r = 0; r < RADIX; ++r)
          after[r] = butterfly<REGULAR && RADIX == 4>(v[r], v[r ^ d], d, T(sign<REGULAR && RADIX == 4>(r, d)));
#pragma GCC unroll 4
        for (int r = 0; r < RADIX; ++r) v[r] = after[r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < RADIX; ++r) *(V*)(block + j + r * h) = v[r] * norm;
    }
}

// n ** -0.5 of a power of two, without std::pow, which would take as long as a block.
template <typename T>
inline T norm_of(int64_t n) {
  double norm = 1;
  for (; n >= 4; n /= 4) norm /= 2;
  return static_cast<T>(n == 2 ? norm * 0.70710678118654752440 : norm);
}

// A block of n columns, n a power of two.
template <bool REGULAR, typename T>
inline void rotate_block(T* block, int64_t n) {
  const T norm = norm_of<T>(n);
  constexpr int IN_REGISTERS = VECTOR_BYTES / sizeof(T) == 16 ? 256 : 64;  // a power of four
  if (n == 16) return rotate_in_registers<REGULAR, 16>(block, norm);
  if (n == 32) return rotate_in_registers<REGULAR, 32>(block, norm);
  if (n == 64) return rotate_in_registers<REGULAR, 64>(block, norm);
  if (n == IN_REGISTERS) return rotate_in_registers<REGULAR, IN_REGISTERS>(block, norm);
  if (n > 64) {
    int64_t h = n > IN_REGISTERS ? IN_REGISTERS : 64;
    for (int64_t j = 0; j < n; j += h)
      if (h == 64)
        rotate_in_registers<REGULAR, 64>(block + j, T(1));
      else
        rotate_in_registers<REGULAR, IN_REGISTERS>(block + j, T(1));
    for (; 4 * h <= n; h *= 4) rotate_across<REGULAR, 4>(block, n, h, 4 * h == n ? norm : T(1));
    if (2 * h == n) rotate_across<REGULAR, 2>(block, n, h, norm);
    return;
  }
  T after[8];
  for (int64_t h = 1; h < n; h *= 2) {
    const bool regular = REGULAR && !(is_lower(h) && 2 * h == n);
    for (int64_t j = 0; j < n; ++j)
      after[j] = regular ? butterfly<true>(block[j], block[j ^ h], h, T(sign<true>(j, h)))
                         : butterfly<false>(block[j], block[j ^ h], h, T(sign<false>(j, h)));
    std::copy_n(after, n, block);
  }
  for (int64_t j = 0; j < n; ++j) block[j] *= norm;
}

// schemes/rotate.py's `rotate` in place: blocks of abs(block) columns, then smaller powers of two for the remaining ones.
// The same values are added in the same order, so results are equal bit for bit.
template <typename T>
inline void rotate_row(T* row, int64_t K, int64_t block) {
  for (int64_t n = std::abs(block); n > 0; n /= 2)
    for (; n <= K; row += n, K -= n) block < 0 ? rotate_block<true>(row, n) : rotate_block<false>(row, n);
}

// codes[k] = round(row[k] / scale), as a division rounds it. A product with 1 / scale is off by less than `ulps` of it, so
// it rounds to another code only next to a half: these vectors are divided.
inline void round_codes(const float* __restrict row, int64_t K, float scale, int8_t* __restrict codes) {
  constexpr int64_t AT_ONCE = 64;
  const float inverse = 1 / scale, ulps = 4 * std::numeric_limits<float>::epsilon() * INT8_MAX_CODE;
  const auto divide = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      codes[k] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(row[k] / scale)));
  };
  int64_t k = 0;
  if (std::isfinite(inverse) && inverse >= std::numeric_limits<float>::min())
    for (; k + AT_ONCE <= K; k += AT_ONCE) {
      int32_t near = 0;
      for (int64_t i = k; i < k + AT_ONCE; ++i) {
        const float quotient = row[i] * inverse, rounded = std::nearbyint(quotient);
        near |= std::abs(std::abs(quotient - rounded) - 0.5f) <= ulps;
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
      }
      if (near) divide(k, k + AT_ONCE);
    }
  divide(k, K);
}

inline void round_codes(const double* __restrict row, int64_t K, double scale, int8_t* __restrict codes) {
  for (int64_t k = 0; k < K; ++k)
    codes[k] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(row[k] / scale)));
}

// absmax / 127, at least the smallest normal number. NaN and infinities make it NaN.
template <typename T>
inline T scale_of(T absmax) {
  if (!std::isfinite(absmax)) return std::numeric_limits<T>::quiet_NaN();
  const T smallest = std::numeric_limits<float>::min(), scale = absmax / INT8_MAX_CODE;
  return scale < smallest ? smallest : scale;
}

// The scale of a row and its codes.
template <typename T>
inline T quantize_row(const T* __restrict row, int64_t K, int8_t* __restrict codes) {
  bits_t<T> largest = 0;
  for (int64_t k = 0; k < K; ++k) largest = std::max(largest, abs_bits(row[k]));
  T absmax;
  std::memcpy(&absmax, &largest, sizeof absmax);
  const T scale = scale_of(absmax);
  round_codes(row, K, scale, codes);
  return scale;
}

#ifdef __AVX512BW__
// `quantize_row` of a row of bfloat16, without a copy of it: the bits are the upper half of a float's. keeps[k] is 0xffff, or 0
// where a zero is to be quantised. AVX512 rounds and narrows in one instruction each.
inline float quantize_bits(const uint16_t* row, int64_t K, const uint16_t* keeps, int8_t* codes) {
  constexpr int64_t AT_ONCE = 64;
  const auto exists = [&](int64_t k) { return K - k >= 32 ? ~__mmask32(0) : (__mmask32(1) << (K - k)) - 1; };
  const auto load = [&](int64_t k) {
    const __m512i kept = _mm512_maskz_loadu_epi16(exists(k), keeps + k);
    return _mm512_and_si512(kept, _mm512_maskz_loadu_epi16(exists(k), row + k));
  };
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 32)
    most = _mm512_max_epu16(most, _mm512_and_si512(load(k), _mm512_set1_epi16(0x7fff)));
  const __m512i even = _mm512_slli_epi32(most, 16), odd = _mm512_and_si512(most, _mm512_set1_epi32(0xffff0000));
  const float scale = scale_of(std::bit_cast<float>(_mm512_reduce_max_epi32(_mm512_max_epi32(even, odd))));
  const float inverse = 1 / scale, ulps = 4 * std::numeric_limits<float>::epsilon() * INT8_MAX_CODE;
  const __m512 inverses = _mm512_set1_ps(inverse), half = _mm512_set1_ps(0.5f - ulps);
  const bool multiplies = std::isfinite(inverse) && inverse >= std::numeric_limits<float>::min();
  for (int64_t k = 0; k < K; k += AT_ONCE) {
    const __m512i bits[2] = {load(k), K - k > 32 ? load(k + 32) : _mm512_setzero_si512()};
    __m512 values[4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits[i]));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits[i], 1));
      values[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
      values[2 * i + 1] = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
    }
    __mmask16 near = multiplies ? 0 : 1;
    __m512 quotients[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      quotients[i] = _mm512_mul_ps(values[i], inverses);
      const __m512 rounded = _mm512_roundscale_ps(quotients[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      near |= _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_sub_ps(quotients[i], rounded)), half, _CMP_GE_OQ);
    }
    if (near)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) quotients[i] = _mm512_div_ps(values[i], _mm512_set1_ps(scale));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t left = K - k - i * 16;
      const __mmask16 here = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
      _mm512_mask_cvtepi32_storeu_epi8(codes + k + i * 16, here, _mm512_cvtps_epi32(quotients[i]));
    }
  }
  return scale;
}
#endif

template <typename T>
inline void clear(T* __restrict row, int64_t K, const uint8_t* __restrict mask) {
  for (int64_t k = 0; k < K; ++k) row[k] = mask[k] ? T(0) : row[k];
}

// scale[m] = max(abs(z[m, k])) / 127 and codes[m, k] = round(z[m, k] / scale[m]), where z is x with zeros in the columns
// of `mask` (nullptr: none), rotated (`rotate_row`; 1: not rotated).
template <typename scalar_t>
void quantize_rows(
    const scalar_t* x, int64_t M, int64_t K, const bool* mask, int64_t block, int8_t* codes,
    compute_t<scalar_t>* scale) {
  using T = compute_t<scalar_t>;
  parallel_for(M, std::max<int64_t>(1, 32768 / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
#ifdef __AVX512BW__
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>)
      if (block == 1) {
        std::vector<uint16_t> keeps(K, 0xffff);
        if (mask != nullptr)
          for (int64_t k = 0; k < K; ++k) keeps[k] = mask[k] ? 0 : 0xffff;
        for (int64_t m = begin; m < end; ++m)
          scale[m] = quantize_bits(reinterpret_cast<const uint16_t*>(x) + m * K, K, keeps.data(), codes + m * K);
        return;
      }
#endif
    std::vector<T> row(K);
    for (int64_t m = begin; m < end; ++m) {
      load(x + m * K, row.data(), K);
      if (mask != nullptr) clear(row.data(), K, reinterpret_cast<const uint8_t*>(mask));
      if (block != 1) rotate_row(row.data(), K, block);
      scale[m] = quantize_row(row.data(), K, codes + m * K);
    }
  });
}

}  // namespace int8fx
