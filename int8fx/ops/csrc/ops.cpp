// The CPU kernels of the int8fx ops; schemas and fakes are in ops.py, which also words the refusals.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/topk.h>
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

bool weight_is_legal(const Tensor& x, const Tensor& weight, const Tensor& scale, const MaybeTensor& bias) {
  const auto channels = weight.sizes().slice(0, std::max<int64_t>(weight.dim() - 1, 0));
  return is_float(x) && x.dim() > 0 && weight.scalar_type() == at::kChar && weight.dim() >= 2 && is_float(scale) &&
      scale.sizes() == channels && weight.size(-1) <= MAX_K && x.size(-1) == weight.size(-1) &&
      (!bias.has_value() || (is_float(*bias) && bias->sizes() == channels));
}

// Columns that every call keeps, and a rotation of the rest; of any call, `top` more columns.
struct Rotation {
  int64_t block;
  MaybeTensor columns, columns_weight;
  int64_t top;
};

bool columns_are_legal(const Rotation& r, int64_t K) {
  if (r.block < 1 || (r.block & (r.block - 1)) != 0 || r.top < 0) return false;
  if (!r.columns.has_value()) return true;
  if (r.columns->scalar_type() != at::kLong || r.columns->dim() != 1) return false;
  const Tensor columns = r.columns->contiguous();
  for (int64_t i = 0; i < columns.numel(); ++i) {
    const int64_t k = columns.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(0 <= k && k < K, "int8fx: columns has ", k, "; legal: 0 to K - 1 for K = ", K);
  }
  return true;
}

bool rotation_is_legal(const Rotation& r, const Tensor& weight) {
  if (!columns_are_legal(r, weight.size(-1)) || r.columns.has_value() != r.columns_weight.has_value()) return false;
  if (!r.columns.has_value()) return true;
  at::DimVector shape(weight.sizes().begin(), weight.sizes().end());
  shape.back() = r.columns->size(0);
  return is_float(*r.columns_weight) && r.columns_weight->sizes() == at::IntArrayRef(shape);
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

// Calls the op's fake with the arguments that the kernel found illegal: it raises the error.
template <typename... Args>
[[noreturn]] void refuse(const char* name, Args&&... args) {
  torch::jit::Stack stack;
  (stack.emplace_back(std::forward<Args>(args)), ...);
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").redispatchBoxed(
      c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  TORCH_CHECK(false, name, ": the kernel refuses arguments that the fake accepts");
}

Tensor rows_of(const Tensor& x) {
  int64_t M = 1;
  for (const auto size : x.sizes().slice(0, x.dim() - 1)) M *= size;
  return x.reshape({M, x.size(-1)}).contiguous();
}

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

// Marks the columns that have the largest absmax, among those that are not kept anyway.
void mark_top(const Tensor& mask, const Tensor& x, const Rotation& rotation) {
  Tensor absmax = at::amax(at::abs(x), {0});
  int64_t free = absmax.numel();
  if (rotation.columns.has_value()) {
    absmax = absmax.index_fill(0, *rotation.columns, -1.0);
    free -= rotation.columns->numel();
  }
  const Tensor largest = std::get<1>(at::topk(absmax, std::min(rotation.top, free)));
  for (const int64_t k : values_of(largest)) mask.mutable_data_ptr<bool>()[k] = true;
}

Quantized quantize(const Tensor& x, double threshold, const Rotation& rotation) {
  const int64_t M = x.size(0), K = x.size(1);
  Quantized q{
      at::empty({M, K}, at::kChar), at::empty({M}, compute_dtype(x)), at::empty({K}, at::kBool)};
  const std::vector<int64_t> columns = values_of(rotation.columns);
  dispatch(x, [&](auto of) {
    using scalar_t = decltype(of);
    const auto* data = x.const_data_ptr<scalar_t>();
    auto* mask = q.mask.mutable_data_ptr<bool>();
    mark_outliers(data, M, K, threshold, mask);
    for (const int64_t k : columns) mask[k] = false;
    if (rotation.top > 0 && M > 0 && K > 0) mark_top(q.mask, x, rotation);
    Tensor kept = q.mask;
    if (!columns.empty()) {
      kept = q.mask.clone();
      for (const int64_t k : columns) kept.mutable_data_ptr<bool>()[k] = true;
    }
    const auto* kept_mask = kept.const_data_ptr<bool>();
    const bool any = std::find(kept_mask, kept_mask + K, true) != kept_mask + K;
    quantize_rows(data, M, K, any ? kept_mask : nullptr, rotation.block, q.codes.mutable_data_ptr<int8_t>(),
                  q.scale.mutable_data_ptr<compute_t<scalar_t>>());
  });
  return q;
}

// x [M, K], weight [N, K], all contiguous; q is not read where the product is streamed.
void product_into(
    const Tensor& y, const Tensor& x, const Quantized& q, const Tensor& weight, const Tensor& scale,
    const Epilogue& epilogue, const Rotation& rotation) {
  dispatch(x, [&](auto of) {
    using scalar_t = decltype(of);
    using P = Product<scalar_t>;
    P p{};
    p.M = x.size(0), p.N = weight.size(0), p.K = x.size(1);
    p.x = x.const_data_ptr<scalar_t>();
    p.block = rotation.block;
    p.columns = values_of(rotation.columns);
    if (rotation.columns_weight.has_value()) p.columns_weight = rotation.columns_weight->contiguous();
    if (!P::streamed(p.M, p.block)) {
      p.codes = q.codes.const_data_ptr<int8_t>();
      p.x_scale = q.scale.const_data_ptr<compute_t<scalar_t>>();
      p.outliers = columns_of(q.mask);
    }
    p.weight = weight.const_data_ptr<int8_t>();
    p.weight_scale = scale;
    p.epilogue = epilogue;
    p.y = y.mutable_data_ptr<scalar_t>();
    p.run();
  });
}

void linear_into(
    const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& scale, double threshold,
    const Epilogue& epilogue, const Rotation& rotation) {
  const bool streamed = Product<float>::streamed(x.size(0), rotation.block);
  product_into(y, x, streamed ? Quantized{} : quantize(x, threshold, rotation), weight, scale, epilogue, rotation);
}

Tensor of_expert(const Tensor& t, int64_t e) { return t.defined() ? t.select(0, e) : t; }

Rotation of_expert(const Rotation& r, int64_t e) {
  return {r.block, r.columns, r.columns_weight.has_value() ? MaybeTensor(r.columns_weight->select(0, e)) : std::nullopt,
          r.top};
}

Tensor linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const MaybeTensor& bias, double threshold,
    std::string_view activation, const MaybeTensor& other, std::string_view binary, int64_t block,
    const MaybeTensor& columns, const MaybeTensor& columns_weight, int64_t top) {
  const Rotation rotation{block, columns, columns_weight, top};
  const bool legal = weight_is_legal(x, weight, weight_scale, bias) && rotation_is_legal(rotation, weight) &&
      (weight.dim() == 2 || (weight.dim() == 3 && x.dim() == 3 && x.size(0) == weight.size(0)));
  const auto epilogue = legal ? epilogue_of(x, weight, bias, activation, other, binary) : std::nullopt;
  if (!epilogue)
    refuse(LINEAR, x, weight, weight_scale, bias, threshold, std::string(activation), other,
           std::string(binary), block, columns, columns_weight, top);
  const Tensor y = at::empty(shape_of_y(x, weight), x.options().memory_format(at::MemoryFormat::Contiguous));
  const Tensor codes = weight.contiguous(), scale = weight_scale.contiguous();
  if (weight.dim() == 2) {
    linear_into(y, rows_of(x), codes, scale, threshold, *epilogue, rotation);
    return y;
  }
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const Epilogue of_e{
        of_expert(epilogue->bias, e), epilogue->activation, of_expert(epilogue->other, e), epilogue->binary};
    linear_into(y[e], rows_of(x[e]), codes[e], scale[e], threshold, of_e, of_expert(rotation, e));
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> quantize_rowwise(
    const Tensor& x, double threshold, int64_t block, const MaybeTensor& columns, int64_t top) {
  const Rotation rotation{block, columns, std::nullopt, top};
  if (!is_float(x) || x.dim() == 0 || !columns_are_legal(rotation, x.size(-1)))
    refuse(QUANTIZE_ROWWISE, x, threshold, block, columns, top);
  const Quantized q = quantize(rows_of(x), threshold, rotation);
  return {q.codes, q.scale, q.mask};
}

Tensor linear_quantized(
    const Tensor& x, const Tensor& codes, const Tensor& x_scale, const Tensor& outlier_mask, const Tensor& weight,
    const Tensor& weight_scale, const MaybeTensor& bias, std::string_view activation, const MaybeTensor& other,
    std::string_view binary, int64_t block, const MaybeTensor& columns, const MaybeTensor& columns_weight) {
  const Rotation rotation{block, columns, columns_weight, 0};
  bool legal = weight_is_legal(x, weight, weight_scale, bias) && weight.dim() == 2 &&
      rotation_is_legal(rotation, weight);
  if (legal) {
    const int64_t K = weight.size(1), M = K == 0 ? codes.size(0) : x.numel() / K;
    legal = codes.scalar_type() == at::kChar && codes.sizes() == at::IntArrayRef({M, K}) &&
        x_scale.scalar_type() == compute_dtype(x) && x_scale.sizes() == at::IntArrayRef({M}) &&
        outlier_mask.scalar_type() == at::kBool && outlier_mask.sizes() == at::IntArrayRef({K});
  }
  const auto epilogue = legal ? epilogue_of(x, weight, bias, activation, other, binary) : std::nullopt;
  if (!epilogue)
    refuse(LINEAR_QUANTIZED, x, codes, x_scale, outlier_mask, weight, weight_scale, bias,
           std::string(activation), other, std::string(binary), block, columns, columns_weight);
  const Tensor y = at::empty(shape_of_y(x, weight), x.options().memory_format(at::MemoryFormat::Contiguous));
  const Quantized q{codes.contiguous(), x_scale.contiguous(), outlier_mask.contiguous()};
  product_into(y, rows_of(x), q, weight.contiguous(), weight_scale.contiguous(), *epilogue, rotation);
  return y;
}

Tensor grouped_linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const MaybeTensor& bias, const Tensor& offsets,
    double threshold, int64_t block, const MaybeTensor& columns, const MaybeTensor& columns_weight, int64_t top) {
  const Rotation rotation{block, columns, columns_weight, top};
  const bool legal = weight_is_legal(x, weight, weight_scale, bias) && weight.dim() == 3 && x.dim() == 2 &&
      rotation_is_legal(rotation, weight) && offsets.dim() == 1 && offsets.size(0) == weight.size(0) &&
      (offsets.scalar_type() == at::kInt || offsets.scalar_type() == at::kLong);
  if (!legal)
    refuse(GROUPED_LINEAR, x, weight, weight_scale, bias, offsets, threshold, block, columns, columns_weight, top);
  const Tensor y = at::zeros({x.size(0), weight.size(1)}, x.options());
  const Tensor rows = x.contiguous(), codes = weight.contiguous(), scale = weight_scale.contiguous();
  const Tensor biases = bias.has_value() ? bias->contiguous() : Tensor();
  const Tensor ends = offsets.to(at::kLong).contiguous();
  int64_t begin = 0;
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const int64_t end = ends.const_data_ptr<int64_t>()[e];
    if (end > begin)
      linear_into(y.slice(0, begin, end), rows.slice(0, begin, end), codes[e], scale[e], threshold,
                  {of_expert(biases, e), Activation::none, Tensor(), Binary::none}, of_expert(rotation, e));
    begin = end;
  }
  return y;
}

// ---- autograd: ops.py has the formulas. Calls that need no gradient do not go there. ----------------------------------

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
    if (at::GradMode::is_enabled() && (requires_grad(args) || ...))  // to what ops.py registered, for all devices
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
