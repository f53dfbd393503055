// A vector of T of the compiler's vector types: it has +, * and [], and is one register.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace int8fx {

constexpr int VECTOR_BYTES = at::vec::Vectorized<int8_t>::size();

template <typename T>
struct Lanes {
  static constexpr int N = VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
};

// Lanes<T>::N codes as T.
template <typename T>
inline typename Lanes<T>::V widen(const int8_t* codes) {
  typename Lanes<T>::V v;
  for (int i = 0; i < Lanes<T>::N; ++i) v[i] = codes[i];
  return v;
}

// GCC 12 compiles that loop to a scalar load of each lane.
#if defined(__AVX512F__)
template <>
inline Lanes<float>::V widen<float>(const int8_t* codes) {
  return (Lanes<float>::V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
}
#elif defined(__AVX2__)
template <>
inline Lanes<float>::V widen<float>(const int8_t* codes) {
  return (Lanes<float>::V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes)));
}
#endif

// Lanes<T>::N differences of int32, as T; b is nullptr for zeros.
template <typename T>
inline typename Lanes<T>::V convert_difference(const int32_t* a, const int32_t* b) {
  typedef uint32_t Unsigned __attribute__((vector_size(Lanes<T>::N * 4), aligned(4), may_alias));  // they wrap around
  typedef int32_t Signed __attribute__((vector_size(Lanes<T>::N * 4), aligned(4), may_alias));
  if (b == nullptr) return __builtin_convertvector(*(const Signed*)a, typename Lanes<T>::V);
  return __builtin_convertvector((Signed)(*(const Unsigned*)a - *(const Unsigned*)b), typename Lanes<T>::V);
}

// The lanes of a and b in turn, from the first half or from the second.
template <bool SECOND, typename V, int... I>
inline V interleave(const V& a, const V& b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I), FROM = SECOND ? L / 2 : 0;
  return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * L)...);
}

#ifdef __AVX512F__
// Lanes 4 * l to 4 * l + 3 of b[i] become lane 4 * l + i of each vector.
template <typename V>
[[gnu::always_inline]] inline void transpose_four(V v0, V v1, V v2, V v3, __m512 (&b)[4]) {
  const __m512d low01 = (__m512d)_mm512_unpacklo_ps((__m512)v0, (__m512)v1);
  const __m512d high01 = (__m512d)_mm512_unpackhi_ps((__m512)v0, (__m512)v1);
  const __m512d low23 = (__m512d)_mm512_unpacklo_ps((__m512)v2, (__m512)v3);
  const __m512d high23 = (__m512d)_mm512_unpackhi_ps((__m512)v2, (__m512)v3);
  b[0] = (__m512)_mm512_unpacklo_pd(low01, low23);
  b[1] = (__m512)_mm512_unpackhi_pd(low01, low23);
  b[2] = (__m512)_mm512_unpacklo_pd(high01, high23);
  b[3] = (__m512)_mm512_unpackhi_pd(high01, high23);
}
#endif

// An L x L transpose, L a power of two: rounds that interleave row i with row i + L / 2. Of 16 x 16 lanes of four
// bytes, with AVX512, rounds inside 16 bytes first: those instructions need no indices in registers.
template <typename V, int L>
inline void transpose(V (&rows)[L]) {
#ifdef __AVX512F__
  if constexpr (L == 16 && sizeof(V) == 64) {
    __m512 b[4][4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g)
      transpose_four(rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3], b[g]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 even0 = _mm512_shuffle_f32x4(b[0][i], b[1][i], 0x88);
      const __m512 odd0 = _mm512_shuffle_f32x4(b[0][i], b[1][i], 0xdd);
      const __m512 even1 = _mm512_shuffle_f32x4(b[2][i], b[3][i], 0x88);
      const __m512 odd1 = _mm512_shuffle_f32x4(b[2][i], b[3][i], 0xdd);
      rows[i] = (V)_mm512_shuffle_f32x4(even0, even1, 0x88);
      rows[i + 4] = (V)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
      rows[i + 8] = (V)_mm512_shuffle_f32x4(even0, even1, 0xdd);
      rows[i + 12] = (V)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
    return;
  }
#endif
  constexpr std::make_integer_sequence<int, L> lanes;
  V other[L];
  V *from = rows, *to = other;
#pragma GCC unroll 5
  for (int n = 1; n < L; n *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      to[2 * i] = interleave<false>(from[i], from[i + L / 2], lanes);
      to[2 * i + 1] = interleave<true>(from[i], from[i + L / 2], lanes);
    }
    std::swap(from, to);
  }
  if (from != rows)
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = other[i];
}

// Into the second-level cache: fetching into the first takes the buffers that its misses need. One row of [4096, 4096]
// on one core of an AMD EPYC (Zen 4), 16 to 64 KiB ahead: 21 GB/s, 17 into the first-level cache, 19 without fetching.
inline void fetch(const int8_t* codes) { __builtin_prefetch(codes, 0, 2); }

// Lane i is the sum of the lanes of v[i]. Each round adds neighbouring lanes of all vectors, and halves their number.
template <typename V>
inline V sum_lanes(V (&v)[16]) {
#pragma GCC unroll 4
  for (int n = 8; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
          __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return v[0];
}

inline int32_t sum_codes(const int8_t* codes, int64_t K) {
  int32_t sum = 0;
  int64_t k = 0;
#ifdef __AVX512VNNI__
  __m512i sums = _mm512_setzero_si512();
  for (; k + 64 <= K; k += 64) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(codes + k));
  sum = _mm512_reduce_add_epi32(sums);
#endif
  for (; k < K; ++k) sum += codes[k];
  return sum;
}

// Fetches 2 KiB ahead. Hardware prefetchers stop at the end of a page, and a row of the weight is often one page.
inline void prefetch(const int8_t* codes) { __builtin_prefetch(codes + 2048); }

// sums[r] = sum_k(x[r, k] * w[k]) in int32.
template <int ROWS>
inline void dot(const int16_t* x, int64_t K, const int8_t* w, int32_t* sums) {
  int64_t k = 0;
  int32_t totals[ROWS] = {};
#ifdef __AVX2__
  __m256i parts[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) parts[r] = _mm256_setzero_si256();
  for (; k + 16 <= K; k += 16) {
    if (k % 64 == 0) prefetch(w + k);
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + k)));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      parts[r] = _mm256_add_epi32(
          parts[r], _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i*)(x + r * K + k))));
  }
  for (int r = 0; r < ROWS; ++r) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, parts[r]);
    for (const int32_t lane : lanes) totals[r] += lane;
  }
#endif
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t i = k; i < K; ++i) totals[r] += int32_t(x[r * K + i]) * int32_t(w[i]);
    sums[r] = totals[r];
  }
}

}  // namespace int8fx
