// The CPU kernels of the int8fx ops. Schemas and fakes are in ../__init__.py, error messages in ../checks.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "product.h"

namespace int8fx {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr char LINEAR[] = "int8fx::linear", LINEAR_QUANTIZED[] = "int8fx::linear_quantized",
               QUANTIZE_ROWWISE[] = "int8fx::quantize_rowwise", GROUPED_LINEAR[] = "int8fx::grouped_linear";

// x, bias, other: float16, bfloat16, float32 or float64.
bool is_float(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat || dtype == at::kDouble;
}

at::ScalarType compute_dtype(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

constexpr int64_t MAX_K = std::numeric_limits<int32_t>::max() / (INT8_MAX_CODE * INT8_MAX_CODE);

// A packed weight as the ops take it; schemes/weight.py describes the fields.
struct Int8Weight {
  Tensor codes, scale;
  std::optional<double> threshold;
  int64_t block;
  MaybeTensor columns, columns_weight;

  Int8Weight of_expert(int64_t e) const {
    return {codes.select(0, e), scale.select(0, e), threshold, block, columns,
            columns_weight.has_value() ? MaybeTensor(columns_weight->select(0, e)) : std::nullopt};
  }
};

bool quantisation_is_legal(
    std::optional<double> threshold, int64_t block, const MaybeTensor& columns, int64_t K) {
  if (threshold.has_value() && !(0 <= *threshold && *threshold <= std::numeric_limits<float>::max())) return false;
  if (block < 1 || (block & (block - 1)) != 0 || (block > 1 && threshold.has_value())) return false;
  if (!columns.has_value()) return true;
  if (columns->scalar_type() != at::kLong || columns->dim() != 1) return false;
  const Tensor indices = columns->contiguous();
  std::vector<bool> seen(K);
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t k = indices.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(0 <= k && k < K, "int8fx: columns has ", k, "; legal: 0 to K - 1 for K = ", K);
    TORCH_CHECK_INDEX(!seen[k], "int8fx: columns has ", k, " twice; legal: different columns");
    seen[k] = true;
  }
  return true;
}

bool weight_is_legal(const Tensor& x, const Int8Weight& weight, const MaybeTensor& bias) {
  const Tensor& codes = weight.codes;
  const auto channels = codes.sizes().slice(0, std::max<int64_t>(codes.dim() - 1, 0));
  if (!(is_float(x) && x.dim() > 0 && codes.scalar_type() == at::kChar && codes.dim() >= 2 && is_float(weight.scale) &&
        weight.scale.sizes() == channels && codes.size(-1) <= MAX_K && x.size(-1) == codes.size(-1) &&
        (!bias.has_value() || (is_float(*bias) && bias->sizes() == channels))))
    return false;
  if (!quantisation_is_legal(weight.threshold, weight.block, weight.columns, codes.size(-1)) ||
      weight.columns.has_value() != weight.columns_weight.has_value())
    return false;
  if (!weight.columns.has_value()) return true;
  at::DimVector shape(codes.sizes().begin(), codes.sizes().end());
  shape.back() = weight.columns->size(0);
  return is_float(*weight.columns_weight) && weight.columns_weight->sizes() == at::IntArrayRef(shape);
}

at::DimVector shape_of_y(const Tensor& x, const Tensor& weight) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(-2);
  return shape;
}

std::optional<Activation> activation_of(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  return std::nullopt;
}

std::optional<Binary> binary_of(std::string_view name) {
  if (name == "none") return Binary::none;
  if (name == "add") return Binary::add;
  if (name == "mul") return Binary::mul;
  return std::nullopt;
}

std::optional<Epilogue> epilogue_of(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::string_view activation,
    const MaybeTensor& other, std::string_view binary) {
  const auto a = activation_of(activation);
  const auto b = binary_of(binary);
  if (!a || !b || (*b == Binary::none) != !other.has_value()) return std::nullopt;
  if (other.has_value() && !(is_float(*other) && other->sizes() == at::IntArrayRef(shape_of_y(x, weight))))
    return std::nullopt;
  return Epilogue{
      bias.has_value() ? bias->contiguous() : Tensor(), *a, other.has_value() ? other->contiguous() : Tensor(), *b};
}

// Calls the op's fake with the illegal arguments: it raises the error.
template <typename... Args>
[[noreturn]] void refuse(const char* name, Args&&... args) {
  torch::jit::Stack stack;
  (stack.emplace_back(std::forward<Args>(args)), ...);
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").redispatchBoxed(
      c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  TORCH_CHECK(false, name, ": the kernel refuses arguments that the fake accepts");
}

int64_t count_rows(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)); }

Tensor rows_of(const Tensor& x) { return x.reshape({count_rows(x), x.size(-1)}).contiguous(); }

template <typename F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return f(c10::BFloat16{});
    case at::kHalf: return f(c10::Half{});
    case at::kFloat: return f(float{});
    default: return f(double{});
  }
}

std::vector<int64_t> values_of(const MaybeTensor& columns) {
  if (!columns.has_value()) return {};
  const Tensor values = columns->contiguous();
  const int64_t* begin = values.const_data_ptr<int64_t>();
  return {begin, begin + values.numel()};
}

std::vector<int64_t> columns_of(const Tensor& mask) {
  std::vector<int64_t> columns;
  const bool* marked = mask.const_data_ptr<bool>();
  for (int64_t k = 0; k < mask.numel(); ++k)
    if (marked[k]) columns.push_back(k);
  return columns;
}

struct Quantized {
  Tensor codes, scale, mask;
};

Quantized empty_quantized(const Tensor& x) {
  const int64_t M = x.size(0), K = x.size(1);
  return {at::empty({M, K}, at::kChar), at::empty({M}, compute_dtype(x)), at::empty({K}, at::kBool)};
}

Quantized quantize(const Tensor& x, std::optional<double> threshold, int64_t block, const MaybeTensor& columns) {
  const int64_t M = x.size(0), K = x.size(1);
  Quantized q = empty_quantized(x);
  const std::vector<int64_t> indices = values_of(columns);
  dispatch(x, [&](auto of) {
    using scalar_t = decltype(of);
    const auto* data = x.const_data_ptr<scalar_t>();
    auto* mask = q.mask.mutable_data_ptr<bool>();
    std::fill_n(mask, K, false);  // not memset: mask is null for K = 0
    if (threshold.has_value()) mark_outliers(data, M, K, *threshold, mask);
    for (const int64_t k : indices) mask[k] = false;
    Tensor excluded = q.mask;
    if (!indices.empty()) {
      excluded = q.mask.clone();
      for (const int64_t k : indices) excluded.mutable_data_ptr<bool>()[k] = true;
    }
    const auto* excluded_mask = excluded.const_data_ptr<bool>();
    const bool any = std::find(excluded_mask, excluded_mask + K, true) != excluded_mask + K;
    quantize_rows(data, M, K, any ? excluded_mask : nullptr, block, q.codes.mutable_data_ptr<int8_t>(),
                  q.scale.mutable_data_ptr<compute_t<scalar_t>>());
  });
  return q;
}

// x [M, K], codes [N, K], all contiguous; q is not read if x is not quantised.
void product_into(
    const Tensor& y, const Tensor& x, const Quantized& q, const Int8Weight& weight, const Epilogue& epilogue) {
  dispatch(x, [&](auto of) {
    using scalar_t = decltype(of);
    using P = Product<scalar_t>;
    P p{};
    p.M = x.size(0), p.N = weight.codes.size(0), p.K = x.size(1);
    p.x = x.const_data_ptr<scalar_t>();
    p.columns = values_of(weight.columns);
    if (weight.columns_weight.has_value()) p.columns_weight = weight.columns_weight->contiguous();
    p.weight_only = weight_only(p.M, weight.block);
    if (!p.weight_only) {
      p.codes = q.codes.const_data_ptr<int8_t>();
      p.x_scale = q.scale.const_data_ptr<compute_t<scalar_t>>();
      if (weight.threshold.has_value()) p.outliers = columns_of(q.mask);
    }
    p.weight = weight.codes.const_data_ptr<int8_t>();
    p.weight_scale = weight.scale;
    p.epilogue = epilogue;
    p.y = y.mutable_data_ptr<scalar_t>();
    p.run();
  });
}

void linear_into(const Tensor& y, const Tensor& x, const Int8Weight& weight, const Epilogue& epilogue) {
  Quantized q;
  if (!weight_only(x.size(0), weight.block)) q = quantize(x, weight.threshold, weight.block, weight.columns);
  product_into(y, x, q, weight, epilogue);
}

Int8Weight contiguous(Int8Weight weight) {
  weight.codes = weight.codes.contiguous();
  weight.scale = weight.scale.contiguous();
  return weight;
}

Tensor of_expert(const Tensor& t, int64_t e) { return t.defined() ? t.select(0, e) : t; }

Tensor linear(
    const Tensor& x, const Tensor& codes, const Tensor& scale, std::optional<double> threshold, int64_t block,
    const MaybeTensor& columns, const MaybeTensor& columns_weight, const MaybeTensor& bias,
    std::string_view activation, const MaybeTensor& other, std::string_view binary) {
  Int8Weight weight{codes, scale, threshold, block, columns, columns_weight};
  const bool legal = weight_is_legal(x, weight, bias) &&
      (codes.dim() == 2 || (codes.dim() == 3 && x.dim() == 3 && x.size(0) == codes.size(0)));
  const auto epilogue = legal ? epilogue_of(x, codes, bias, activation, other, binary) : std::nullopt;
  if (!epilogue)
    refuse(LINEAR, x, codes, scale, threshold, block, columns, columns_weight, bias, std::string(activation), other,
           std::string(binary));
  const Tensor y = at::empty(shape_of_y(x, codes), x.options().memory_format(at::MemoryFormat::Contiguous));
  weight = contiguous(weight);
  if (codes.dim() == 2) {
    linear_into(y, rows_of(x), weight, *epilogue);
    return y;
  }
  for (int64_t e = 0; e < codes.size(0); ++e) {
    const Epilogue of_e{
        of_expert(epilogue->bias, e), epilogue->activation, of_expert(epilogue->other, e), epilogue->binary};
    linear_into(y[e], rows_of(x[e]), weight.of_expert(e), of_e);
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> quantize_rowwise(
    const Tensor& x, std::optional<double> threshold, int64_t block, const MaybeTensor& columns, bool for_linear) {
  if (!is_float(x) || x.dim() == 0 || !quantisation_is_legal(threshold, block, columns, x.size(-1)))
    refuse(QUANTIZE_ROWWISE, x, threshold, block, columns, for_linear);
  const Tensor rows = rows_of(x);
  const bool is_read = !(for_linear && weight_only(rows.size(0), block));  // by linear_quantized
  const Quantized q = is_read ? quantize(rows, threshold, block, columns) : empty_quantized(rows);
  return {q.codes, q.scale, q.mask};
}

Tensor linear_quantized(
    const Tensor& x, const Tensor& x_codes, const Tensor& x_scale, const Tensor& outlier_mask, const Tensor& codes,
    const Tensor& scale, std::optional<double> threshold, int64_t block, const MaybeTensor& columns,
    const MaybeTensor& columns_weight, const MaybeTensor& bias, std::string_view activation, const MaybeTensor& other,
    std::string_view binary) {
  const Int8Weight weight{codes, scale, threshold, block, columns, columns_weight};
  bool legal = weight_is_legal(x, weight, bias) && codes.dim() == 2;
  if (legal) {
    const int64_t K = codes.size(1), M = count_rows(x);
    legal = x_codes.scalar_type() == at::kChar && x_codes.sizes() == at::IntArrayRef({M, K}) &&
        x_scale.scalar_type() == compute_dtype(x) && x_scale.sizes() == at::IntArrayRef({M}) &&
        outlier_mask.scalar_type() == at::kBool && outlier_mask.sizes() == at::IntArrayRef({K});
  }
  const auto epilogue = legal ? epilogue_of(x, codes, bias, activation, other, binary) : std::nullopt;
  if (!epilogue)
    refuse(LINEAR_QUANTIZED, x, x_codes, x_scale, outlier_mask, codes, scale, threshold, block, columns,
           columns_weight, bias, std::string(activation), other, std::string(binary));
  const Tensor y = at::empty(shape_of_y(x, codes), x.options().memory_format(at::MemoryFormat::Contiguous));
  const Quantized q{x_codes.contiguous(), x_scale.contiguous(), outlier_mask.contiguous()};
  product_into(y, rows_of(x), q, contiguous(weight), *epilogue);
  return y;
}

Tensor grouped_linear(
    const Tensor& x, const Tensor& offsets, const Tensor& codes, const Tensor& scale, std::optional<double> threshold,
    int64_t block, const MaybeTensor& columns, const MaybeTensor& columns_weight, const MaybeTensor& bias) {
  Int8Weight weight{codes, scale, threshold, block, columns, columns_weight};
  const bool legal = weight_is_legal(x, weight, bias) && codes.dim() == 3 && x.dim() == 2 && offsets.dim() == 1 &&
      offsets.size(0) == codes.size(0) && (offsets.scalar_type() == at::kInt || offsets.scalar_type() == at::kLong);
  if (!legal) refuse(GROUPED_LINEAR, x, offsets, codes, scale, threshold, block, columns, columns_weight, bias);
  const Tensor y = at::zeros({x.size(0), codes.size(1)}, x.options());
  const Tensor rows = x.contiguous();
  weight = contiguous(weight);
  const Tensor biases = bias.has_value() ? bias->contiguous() : Tensor();
  const Tensor ends = offsets.to(at::kLong).contiguous();
  int64_t begin = 0;
  for (int64_t e = 0; e < codes.size(0); ++e) {
    const int64_t end = ends.const_data_ptr<int64_t>()[e];
    if (end > begin)
      linear_into(y.slice(0, begin, end), rows.slice(0, begin, end), weight.of_expert(e),
                  {of_expert(biases, e), Activation::none, Tensor(), Binary::none});
    begin = std::max(begin, end);
  }
  return y;
}

// ---- autograd: the formulas are in ../__init__.py. Calls that need no gradient do not reach them. --------------------

template <typename T>
bool requires_grad(const T&) { return false; }
bool requires_grad(const Tensor& t) { return t.requires_grad(); }
bool requires_grad(const MaybeTensor& t) { return t.has_value() && t->requires_grad(); }

template <const char* NAME, typename Signature>
struct Autograd;

template <const char* NAME, typename Result, typename... Args>
struct Autograd<NAME, Result(Args...)> {
  static Result run(c10::DispatchKeySet keys, Args... args) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(NAME, "").typed<Result(Args...)>();
    const auto below = keys & c10::after_autograd_keyset;
    if (at::GradMode::is_enabled() && (requires_grad(args) || ...))  // to the formula in ../__init__.py, for all devices
      return op.redispatch(below.add(c10::DispatchKey::AutogradOther), args...);
    const at::AutoDispatchBelowAutograd guard;
    return op.redispatch(below, args...);
  }
};

template <const char* NAME, typename Result, typename... Args>
auto* autograd(Result (*)(Args...)) {
  return &Autograd<NAME, Result(Args...)>::run;
}

}  // namespace

TORCH_LIBRARY_IMPL(int8fx, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_quantized", linear_quantized);
  m.impl("quantize_rowwise", quantize_rowwise);
  m.impl("grouped_linear", grouped_linear);
}

TORCH_LIBRARY_IMPL(int8fx, AutogradCPU, m) {
  m.impl("linear", autograd<LINEAR>(linear));
  m.impl("linear_quantized", autograd<LINEAR_QUANTIZED>(linear_quantized));
  m.impl("quantize_rowwise", autograd<QUANTIZE_ROWWISE>(quantize_rowwise));
  m.impl("grouped_linear", autograd<GROUPED_LINEAR>(grouped_linear));
}

}  // namespace int8fx
