// A vector of T as the compiler's own type: it has +, * and [], and is one register.
#pragma once

#include <ATen/cpu/vec/vec.h>

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

// GCC 12 makes a scalar load of each lane out of that.
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

}  // namespace int8fx
