// The CPU kernels of the int8fx ops. Schemas are in ../schemas.py, fakes in ../__init__.py, error messages in
// ../checks.py. The library also serves processes without Python's int8fx, such as those that run an AOTInductor package.
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
               QUANTIZE_ROWWISE[] = "int8fx::quantize_rowwise", GROUPED_LINEAR[] = "int8fx::grouped_linear",
               DEQUANTIZE[] = "int8fx::dequantize";

bool is_float(at::ScalarType dtype) {
  return dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat || dtype == at::kDouble;
}

bool is_float(const Tensor& t) { return is_float(t.scalar_type()); }

at::ScalarType compute_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

at::ScalarType compute_dtype(const Tensor& x) { return compute_dtype(x.scalar_type()); }

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
  if (block == -1 || block < -MAX_K || block > MAX_K || (block != 1 && threshold.has_value())) return false;
  const int64_t size = std::abs(block);
  if (size == 0 || (size & (size - 1)) != 0) return false;
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

at::IntArrayRef channels_of(const Tensor& codes) { return codes.sizes().slice(0, codes.dim() - 1); }

bool weight_is_legal(const Int8Weight& weight) {
  const Tensor& codes = weight.codes;
  if (!(codes.scalar_type() == at::kChar && codes.dim() >= 1 && is_float(weight.scale) &&
        weight.scale.sizes() == channels_of(codes) && codes.size(-1) <= MAX_K))
    return false;
  if (!quantisation_is_legal(weight.threshold, weight.block, weight.columns, codes.size(-1)) ||
      weight.columns.has_value() != weight.columns_weight.has_value())
    return false;
  if (!weight.columns.has_value()) return true;
  at::DimVector shape(codes.sizes().begin(), codes.sizes().end());
  shape.back() = weight.columns->size(0);
  return is_float(*weight.columns_weight) && weight.columns_weight->sizes() == at::IntArrayRef(shape);
}

bool product_is_legal(const Tensor& x, const Int8Weight& weight, const MaybeTensor& bias) {
  return is_float(x) && x.dim() > 0 && weight_is_legal(weight) && weight.codes.dim() >= 2 &&
      x.size(-1) == weight.codes.size(-1) &&
      (!bias.has_value() || (is_float(*bias) && bias->sizes() == channels_of(weight.codes)));
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

// `Epilogue` with the tensors that own its values.
struct EpilogueTensors {
  Tensor bias;  // [N] or undefined
  Activation activation;
  Tensor other;  // [M, N] or undefined
  Binary binary;
};

std::optional<EpilogueTensors> epilogue_of(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::string_view activation,
    const MaybeTensor& other, std::string_view binary) {
  const auto a = activation_of(activation);
  const auto b = binary_of(binary);
  if (!a || !b || (*b == Binary::none) != !other.has_value()) return std::nullopt;
  if (other.has_value() && !(is_float(*other) && other->sizes() == at::IntArrayRef(shape_of_y(x, weight))))
    return std::nullopt;
  return EpilogueTensors{
      bias.has_value() ? bias->contiguous() : Tensor(), *a, other.has_value() ? other->contiguous() : Tensor(), *b};
}

std::string described(const Tensor& t) { return c10::str(t.scalar_type(), " ", t.sizes()); }
std::string described(const MaybeTensor& t) { return t.has_value() ? described(*t) : "None"; }
std::string described(std::optional<double> value) { return value.has_value() ? c10::str(*value) : "None"; }
template <typename T>
std::string described(const T& value) { return c10::str(value); }

// Calls the op's fake with the illegal arguments: it raises the error. Without Python's int8fx there is no fake.
template <typename... Args>
[[noreturn]] void refuse(const char* name, Args&&... args) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  if (op.hasKernelForDispatchKey(c10::DispatchKey::Meta)) {
    torch::jit::Stack stack;
    (stack.emplace_back(args), ...);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
    TORCH_CHECK(false, name, ": the kernel refuses arguments that the fake accepts");
  }
  std::string found;
  size_t i = 0;
  ((found += c10::str(i ? ", " : "", op.schema().arguments()[i].name(), " = ", described(args)), ++i), ...);
  TORCH_CHECK(false, name, ": illegal arguments: ", found, "; after `import int8fx` the error says which one and why");
}

int64_t count_rows(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)); }

Tensor rows_of(const Tensor& x) { return x.reshape({count_rows(x), x.size(-1)}).contiguous(); }

template <typename F>
void dispatch(at::ScalarType dtype, F&& f) {
  switch (dtype) {
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
  dispatch(x.scalar_type(), [&](auto of) {
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

Floats floats_of(const Tensor& t) {
  if (!t.defined()) return {};
  const auto dtype = t.scalar_type() == at::kBFloat16 ? Dtype::bfloat16
      : t.scalar_type() == at::kHalf                  ? Dtype::half
      : t.scalar_type() == at::kFloat                 ? Dtype::float32
                                                      : Dtype::float64;
  return {t.const_data_ptr(), dtype};
}

// x [M, K], codes [N, K], all contiguous; q is not read if x is not quantised.
void product_into(
    const Tensor& y, const Tensor& x, const Quantized& q, const Int8Weight& weight, const EpilogueTensors& epilogue) {
  const Tensor columns_weight = weight.columns_weight.has_value() ? weight.columns_weight->contiguous() : Tensor();
  dispatch(x.scalar_type(), [&](auto of) {
    using scalar_t = decltype(of);
    using P = Product<scalar_t>;
    P p{};
    p.M = x.size(0), p.N = weight.codes.size(0), p.K = x.size(1);
    p.x = x.const_data_ptr<scalar_t>();
    p.columns = values_of(weight.columns);
    p.rotated = weight.block != 1;
    p.columns_weight = floats_of(columns_weight);
    p.weight_only = weight_only(p.M, weight.block);
    if (!p.weight_only) {
      p.codes = q.codes.const_data_ptr<int8_t>();
      p.x_scale = q.scale.const_data_ptr<compute_t<scalar_t>>();
      if (weight.threshold.has_value()) p.outliers = columns_of(q.mask);
    }
    p.weight = weight.codes.const_data_ptr<int8_t>();
    p.weight_scale = floats_of(weight.scale);
    p.epilogue = {floats_of(epilogue.bias), epilogue.activation, floats_of(epilogue.other), epilogue.binary};
    p.y = y.mutable_data_ptr<scalar_t>();
    p.run();
  });
}

void linear_into(const Tensor& y, const Tensor& x, const Int8Weight& weight, const EpilogueTensors& epilogue) {
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
  const bool legal = product_is_legal(x, weight, bias) &&
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
    const EpilogueTensors of_e{
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
  bool legal = product_is_legal(x, weight, bias) && codes.dim() == 2;
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
  const bool legal = product_is_legal(x, weight, bias) && codes.dim() == 3 && x.dim() == 2 && offsets.dim() == 1 &&
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

// schemes/quantize.py's `dequantize`, bit for bit.
Tensor dequantize(
    const Tensor& codes, const Tensor& scale, std::optional<double> threshold, int64_t block,
    const MaybeTensor& columns, const MaybeTensor& columns_weight, at::ScalarType dtype) {
  if (!is_float(dtype) || !weight_is_legal({codes, scale, threshold, block, columns, columns_weight}))
    refuse(DEQUANTIZE, codes, scale, threshold, block, columns, columns_weight, dtype);
  const Tensor w = at::empty(codes.sizes(), dtype), rows = codes.contiguous();
  const Tensor scales = scale.to(compute_dtype(dtype)).contiguous();
  const Tensor floats = columns.has_value() ? columns_weight->to(compute_dtype(dtype)).contiguous() : Tensor();
  const std::vector<int64_t> indices = values_of(columns);
  const int64_t K = codes.size(-1), C = static_cast<int64_t>(indices.size());
  dispatch(dtype, [&](auto of) {
    using scalar_t = decltype(of);
    using T = compute_t<scalar_t>;
    const int8_t* from = rows.const_data_ptr<int8_t>();
    const T* row_scale = scales.const_data_ptr<T>();
    const T* kept = C ? floats.const_data_ptr<T>() : nullptr;
    scalar_t* to = w.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, scales.numel(), std::max<int64_t>(1, 32768 / std::max<int64_t>(K, 1)),
                     [&](int64_t begin, int64_t end) {
      std::vector<T> row(K);
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t k = 0; k < K; ++k) row[k] = static_cast<T>(from[n * K + k]) * row_scale[n];
        if (block != 1) rotate_row(row.data(), K, block);
        for (int64_t c = 0; c < C; ++c) row[indices[c]] = kept[n * C + c];
        for (int64_t k = 0; k < K; ++k) to[n * K + k] = static_cast<scalar_t>(row[k]);
      }
    });
  });
  return w;
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

// Static initialisation runs in the order of this file: schemas first.
TORCH_LIBRARY_FRAGMENT(int8fx, m) {
  for (const std::string schema : {INT8FX_SCHEMAS})
    if (!c10::Dispatcher::singleton().findSchema({"int8fx::" + schema.substr(0, schema.find('(')), ""}))
      m.def(torch::schema(schema.c_str()));
}

TORCH_LIBRARY_IMPL(int8fx, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_quantized", linear_quantized);
  m.impl("quantize_rowwise", quantize_rowwise);
  m.impl("grouped_linear", grouped_linear);
  m.impl("dequantize", dequantize);
}

TORCH_LIBRARY_IMPL(int8fx, AutogradCPU, m) {
  m.impl("linear", autograd<LINEAR>(linear));
  m.impl("linear_quantized", autograd<LINEAR_QUANTIZED>(linear_quantized));
  m.impl("quantize_rowwise", autograd<QUANTIZE_ROWWISE>(quantize_rowwise));
  m.impl("grouped_linear", autograd<GROUPED_LINEAR>(grouped_linear));
}

}  // namespace int8fx
