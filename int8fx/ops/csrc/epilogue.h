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

template <typename T, typename scalar_t>
inline void round(const T* from, scalar_t* to, int64_t n) {
  at::vec::convert(from, to, n);
}

// To the nearest, ties to even; NaN as c10 has it.
inline void round(const float* from, c10::BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
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

  // Rounds what follows from `v`, the sums with the bias: `width` (a multiple of the vector's) values of row m from channel
  // n on, of which `count` exist.
  template <typename scalar_t, typename T>
  void store(T* v, int64_t m, int64_t n, int64_t count, int64_t width, int64_t N, scalar_t* y) const {
    using Vec = at::vec::Vectorized<T>;
    if (activation != Activation::none)
      for (int64_t i = 0; i < width; i += Vec::size()) activate(activation, Vec::loadu(v + i)).store(v + i);
    if (binary != Binary::none) {
      T operand[64];
      load_any(other, m * N + n, count, width, operand);
      for (int64_t i = 0; i < width; ++i) v[i] = binary == Binary::add ? v[i] + operand[i] : v[i] * operand[i];
    }
    round(v, y + m * N + n, count);
  }
};

}  // namespace int8fx
