// What follows the matmul, in the compute dtype, before the result is rounded to y's dtype.
#pragma once

#include "quantize.h"

namespace int8fx {

enum class Activation { none, relu, silu, gelu, gelu_tanh };
enum class Binary { none, add, mul };

template <typename T>
inline at::vec::Vectorized<T> activate(Activation activation, const at::vec::Vectorized<T>& v) {
  using Vec = at::vec::Vectorized<T>;
  const Vec half(T(0.5)), one(T(1));
  switch (activation) {
    case Activation::relu:
      return at::vec::clamp_min(v, Vec(T(0)));
    case Activation::silu:
      return v / (one + v.neg().exp());
    case Activation::gelu:
      return v * half * (one + (v * Vec(T(M_SQRT1_2))).erf());
    case Activation::gelu_tanh: {
      const Vec cube = v * v * v;
      return half * v * (one + (Vec(T(M_SQRT2 * M_2_SQRTPI * 0.5)) * (v + Vec(T(0.044715)) * cube)).tanh());
    }
    default:
      return v;
  }
}

enum class Dtype { bfloat16, half, float32, float64 };

template <typename scalar_t>
constexpr Dtype dtype_of() {
  return std::is_same_v<scalar_t, c10::BFloat16> ? Dtype::bfloat16
      : std::is_same_v<scalar_t, c10::Half>      ? Dtype::half
      : std::is_same_v<scalar_t, float>          ? Dtype::float32
                                                 : Dtype::float64;
}

// Contiguous values of any float dtype, or nothing.
struct Floats {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

// to[i] = values[offset + i] for i < n, 0 for n <= i < width.
template <typename T>
inline void load_any(const Floats& values, int64_t offset, int64_t n, int64_t width, T* to) {
  switch (values.dtype) {
    case Dtype::bfloat16:
      load(static_cast<const c10::BFloat16*>(values.data) + offset, to, n);
      break;
    case Dtype::half:
      load(static_cast<const c10::Half*>(values.data) + offset, to, n);
      break;
    case Dtype::float32:
      load(static_cast<const float*>(values.data) + offset, to, n);
      break;
    default:
      load(static_cast<const double*>(values.data) + offset, to, n);
  }
  for (int64_t i = n; i < width; ++i) to[i] = T(0);
}

// As many values as a vector of T has lanes, in registers: a vector that is stored in parts cannot be loaded before all
// stores up to it are done.
template <typename T>
inline at::vec::Vectorized<T> load_lanes(const Floats& values, int64_t offset) {
  using Vec = at::vec::Vectorized<T>;
  if constexpr (std::is_same_v<T, float>) {
    Vec v;
    switch (values.dtype) {
      case Dtype::bfloat16:
        at::vec::load_fp32_from_bf16(static_cast<const c10::BFloat16*>(values.data) + offset, v);
        return v;
      case Dtype::half:
        at::vec::load_fp32_from_fp16(static_cast<const c10::Half*>(values.data) + offset, v);
        return v;
      case Dtype::float32:
        return Vec::loadu(static_cast<const float*>(values.data) + offset);
      default:
        break;
    }
  }
  T lanes[Vec::size()];
  load_any(values, offset, Vec::size(), Vec::size(), lanes);
  return Vec::loadu(lanes);
}

template <typename T, typename scalar_t>
inline void round(const T* from, scalar_t* to, int64_t n) {
  at::vec::convert(from, to, n);
}

#ifdef __AVX512BF16__
constexpr int NAN_OR_SUBNORMAL = 0x01 | 0x20 | 0x80;  // which the instructions round to others than c10

// Rounds lane m of v(n) to y[m * stride + n], for n < 16 and m < rows. False if it has stored nothing, as there is a
// value that the instructions do not round. If SCALES, of v(n) * scale[n] + bias[n].
//
// Four n at a time, so that GCC keeps all in registers.
template <bool SCALES, typename Values>
[[gnu::always_inline]] inline bool round_transposed(const Values& v, const float* scale, const float* bias,
                                                    c10::BFloat16* y, int64_t stride, int64_t rows) {
  __mmask16 others = 0;
  const auto fours = [&](int n, __m512 (&b)[4]) __attribute__((always_inline)) {
    transpose_four(v(n), v(n + 1), v(n + 2), v(n + 3), b);
    const __m512 scales = SCALES ? _mm512_broadcast_f32x4(_mm_loadu_ps(scale + n)) : __m512{};
    const __m512 biases = SCALES ? _mm512_broadcast_f32x4(_mm_loadu_ps(bias + n)) : __m512{};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (SCALES) b[i] = _mm512_fmadd_ps(b[i], scales, biases);
      others = _kor_mask16(others, _mm512_fpclass_ps_mask(b[i], NAN_OR_SUBNORMAL));
    }
  };
  const auto eights = [&](int n, __m512i (&pairs)[4]) __attribute__((always_inline)) {
    __m512 first[4], last[4];
    fours(n, first);
    fours(n + 4, last);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) pairs[i] = (__m512i)_mm512_cvtne2ps_pbh(last[i], first[i]);
  };
  __m512i low[4], high[4];
  eights(0, low);
  eights(8, high);
  if (others) return false;
  const __m512i first = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13);
  const __m512i last = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i of_rows[2] = {
        _mm512_permutex2var_epi64(low[i], first, high[i]), _mm512_permutex2var_epi64(low[i], last, high[i])};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t m = half * 8 + i;
      if (m < rows) _mm256_storeu_si256((__m256i*)(y + m * stride), _mm512_castsi512_si256(of_rows[half]));
      if (m + 4 < rows)
        _mm256_storeu_si256((__m256i*)(y + (m + 4) * stride), _mm512_extracti64x4_epi64(of_rows[half], 1));
    }
  }
  return true;
}
#endif

// To the nearest, ties to even; NaN as c10 has it.
inline void round(const float* from, c10::BFloat16* to, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(from + i);
    if (_mm512_fpclass_ps_mask(v, NAN_OR_SUBNORMAL)) break;
    _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(v));
  }
#endif
  for (; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i].x = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

struct Epilogue {
  Floats bias;  // [N] or nothing
  Activation activation = Activation::none;
  Floats other;  // [M, N], unless `binary` is none
  Binary binary = Binary::none;

  // Rounds what follows from `v`, the sums with the bias: values of row m from channel n on, of which
  // `count` exist and the others fill a vector.
  template <typename scalar_t, typename T>
  void store(const T* v, int64_t m, int64_t n, int64_t count, int64_t N, scalar_t* y) const {
    using Vec = at::vec::Vectorized<T>;
    constexpr int L = Vec::size();
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      T lanes[L];
      Vec operand;
      if (binary != Binary::none) operand = load_lanes<T>(other, m * N + n + i);
      apply(Vec::loadu(v + i), operand).store(lanes);
      round(lanes, y + m * N + n + i, L);
    }
    for (; i < count; i += L) {
      T lanes[L] = {};
      if (binary != Binary::none) load_any(other, m * N + n + i, count - i, L, lanes);
      apply(Vec::loadu(v + i), Vec::loadu(lanes)).store(lanes);
      round(lanes, y + m * N + n + i, count - i);
    }
  }

 private:
  template <typename Vec>
  Vec apply(const Vec& v, const Vec& operand) const {
    const Vec activated = activate(activation, v);
    switch (binary) {
      case Binary::add:
        return activated + operand;
      case Binary::mul:
        return activated * operand;
      default:
        return activated;
    }
  }
};

}  // namespace int8fx
