// What follows the matmul, in the compute dtype, before the result is rounded to y's dtype.
#pragma once

#include <ATen/core/Tensor.h>

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

// to[i] = t[offset + i] for i < n, 0 for n <= i < width; t of any float dtype.
template <typename T>
inline void load_any(const at::Tensor& t, int64_t offset, int64_t n, int64_t width, T* to) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      load(t.const_data_ptr<c10::BFloat16>() + offset, to, n);
      break;
    case at::kHalf:
      load(t.const_data_ptr<c10::Half>() + offset, to, n);
      break;
    case at::kFloat:
      load(t.const_data_ptr<float>() + offset, to, n);
      break;
    default:
      load(t.const_data_ptr<double>() + offset, to, n);
  }
  for (int64_t i = n; i < width; ++i) to[i] = T(0);
}

struct Epilogue {
  at::Tensor bias;   // [N] or undefined
  Activation activation;
  at::Tensor other;  // [M, N] or undefined
  Binary binary;

  // Rounds `v`, `width` (a multiple of the vector's) values of row m from channel n on, of which `count` exist, to y.
  // `bias_here` holds the bias of these channels.
  template <typename scalar_t, typename T>
  void store(T* v, const T* bias_here, int64_t m, int64_t n, int64_t count, int64_t width, int64_t N,
             scalar_t* y) const {
    using Vec = at::vec::Vectorized<T>;
    for (int64_t i = 0; i < width; i += Vec::size())
      activate(activation, Vec::loadu(v + i) + Vec::loadu(bias_here + i)).store(v + i);
    if (binary != Binary::none) {
      T operand[64];
      load_any(other, m * N + n, count, width, operand);
      for (int64_t i = 0; i < width; ++i) v[i] = binary == Binary::add ? v[i] + operand[i] : v[i] * operand[i];
    }
    at::vec::convert(v, y + m * N + n, count);
  }
};

}  // namespace int8fx
