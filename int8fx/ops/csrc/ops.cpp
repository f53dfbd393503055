// The CPU kernels of the int8fx ops. Schemas are in ../schemas.py, fakes in ../__init__.py, error messages in
// ../checks.py. The library also serves processes without Python's int8fx, such as those that run an AOTInductor package.
//
// It calls torch by its stable ABI only, so it serves every build of the version of torch that it is compiled with, and of
// later ones.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "groups.h"
#include "product.h"

namespace int8fx {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr char LINEAR[] = "int8fx::linear", LINEAR_QUANTIZED[] = "int8fx::linear_quantized",
               QUANTIZE_ROWWISE[] = "int8fx::quantize_rowwise", GROUPED_LINEAR[] = "int8fx::grouped_linear",
               DEQUANTIZE[] = "int8fx::dequantize";

// torch's codes of dtypes. Tensor::scalar_type() is much slower: it asks for one code after the other.
const int32_t BFLOAT16 = aoti_torch_dtype_bfloat16(), HALF = aoti_torch_dtype_float16(),
              FLOAT = aoti_torch_dtype_float32(), DOUBLE = aoti_torch_dtype_float64(), INT8 = aoti_torch_dtype_int8(),
              UINT8 = aoti_torch_dtype_uint8(), INT32 = aoti_torch_dtype_int32(), INT64 = aoti_torch_dtype_int64(),
              BOOL = aoti_torch_dtype_bool();

int32_t dtype(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

bool is_float(int32_t dtype) { return dtype == BFLOAT16 || dtype == HALF || dtype == FLOAT || dtype == DOUBLE; }

bool is_float(const Tensor& t) { return is_float(dtype(t)); }

int32_t compute_dtype(const Tensor& t) { return dtype(t) == DOUBLE ? DOUBLE : FLOAT; }

// Whether the levels of a format of 4 bits are its codes.
bool is_integer_format(std::string_view format) {
  const float* levels = levels_of(format);
  return levels != nullptr && levels[1] - levels[0] == 1 && levels[15] - levels[0] == 15;
}

bool is_integer(const Tensor& t) { return dtype(t) == INT32 || dtype(t) == INT64; }

constexpr int64_t MAX_K = std::numeric_limits<int32_t>::max() / (INT8_MAX_CODE * INT8_MAX_CODE);

// A str of a schema. (torch's own conversion of it leaks.)
struct Word {
  std::string text;
};
using MaybeWord = std::optional<Word>;

// A packed weight as the ops take it; schemes/weight.py describes the fields.
struct Int8Weight {
  const Tensor &codes, &scale;
  std::optional<double> threshold;
  int64_t block;
  const MaybeTensor &columns, &columns_weight;
  const MaybeWord& format;
  std::optional<int64_t> group_size, in_features;
  const MaybeTensor &zero_point, &scale_range;

  int64_t N() const { return codes.size(-2); }
  int64_t K() const { return in_features.value_or(codes.size(-1)); }
  int64_t groups() const { return group_size ? std::max<int64_t>(1, (K() + *group_size - 1) / *group_size) : 1; }
  bool is_plain() const {
    return !format && !group_size && !in_features && !zero_point.has_value() && !scale_range.has_value();
  }
};

int64_t multiply(Sizes sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

int64_t count_rows(const Tensor& x) { return multiply(x.sizes().slice(0, x.dim() - 1)); }

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device = aoti_torch_device_type_cpu()) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  AtenTensorHandle t;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device, 0, &t));
  return Tensor(t);
}

// ---- which arguments are legal ---------------------------------------------------------------------------------------

bool quantisation_is_legal(std::optional<double> threshold, int64_t block, const MaybeTensor& columns, int64_t K) {
  if (threshold.has_value() && !(0 <= *threshold && *threshold <= std::numeric_limits<float>::max())) return false;
  if (block == -1 || block < -MAX_K || block > MAX_K || (block != 1 && threshold.has_value())) return false;
  const int64_t size = std::abs(block);
  if (size == 0 || (size & (size - 1)) != 0) return false;
  if (!columns.has_value()) return true;
  if (dtype(*columns) != INT64 || columns->dim() != 1) return false;
  const Tensor indices = dense(*columns);
  const auto* values = static_cast<const int64_t*>(indices.const_data_ptr());
  std::vector<bool> seen(K);
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t k = values[i];
    if (k < 0 || k >= K)
      throw std::out_of_range(
          "int8fx: columns has " + std::to_string(k) + "; legal: 0 to K - 1 for K = " + std::to_string(K));
    if (seen[k])
      throw std::out_of_range("int8fx: columns has " + std::to_string(k) + " twice; legal: different columns");
    seen[k] = true;
  }
  return true;
}

Sizes channels_of(const Tensor& codes) { return codes.sizes().slice(0, codes.dim() - 1); }

// Whether t is [*leading, last].
bool has_sizes(const Tensor& t, Sizes leading, int64_t last) {
  const Sizes sizes = t.sizes();
  return sizes.size() == leading.size() + 1 && sizes.slice(0, leading.size()).equals(leading) && sizes.back() == last;
}

// Whether format, group size, in_features, scale, zero point and scale range fit the codes and each other.
bool groups_are_legal(const Int8Weight& weight) {
  const Tensor& codes = weight.codes;
  const bool has_fours = weight.format && weight.format->text != "int8";
  if (has_fours ? levels_of(weight.format->text) == nullptr || dtype(codes) != UINT8 : dtype(codes) != INT8) return false;
  if (has_fours != weight.in_features.has_value() || weight.K() < 0 ||
      codes.size(-1) != (has_fours ? (weight.K() + 1) / 2 : weight.K()))
    return false;
  if (weight.group_size && (*weight.group_size < 1 || *weight.group_size > MAX_K)) return false;
  const Sizes channels = channels_of(codes);
  const auto has_shape = [&](const Tensor& t) {
    return weight.group_size ? has_sizes(t, channels, weight.groups()) : t.sizes().equals(channels);
  };
  if (!has_shape(weight.scale)) return false;
  if (weight.zero_point.has_value() &&
      !(has_shape(*weight.zero_point) && dtype(*weight.zero_point) == dtype(codes) &&
        (!has_fours || is_integer_format(weight.format->text))))
    return false;
  if (!weight.scale_range.has_value()) return is_float(weight.scale);
  return dtype(weight.scale) == UINT8 && dtype(*weight.scale_range) == FLOAT &&
      has_sizes(*weight.scale_range, channels, 2);
}

bool weight_is_legal(const Int8Weight& weight) {
  const Tensor& codes = weight.codes;
  if (codes.dim() < 1 || weight.K() > MAX_K) return false;
  if (weight.is_plain() ? !(dtype(codes) == INT8 && is_float(weight.scale) &&
                            weight.scale.sizes().equals(channels_of(codes)))
                        : !groups_are_legal(weight))
    return false;
  if (!quantisation_is_legal(weight.threshold, weight.block, weight.columns, weight.K()) ||
      weight.columns.has_value() != weight.columns_weight.has_value())
    return false;
  return !weight.columns.has_value() ||
      (is_float(*weight.columns_weight) &&
       has_sizes(*weight.columns_weight, channels_of(codes), weight.columns->size(0)));
}

bool product_is_legal(const Tensor& x, const Int8Weight& weight, const MaybeTensor& bias) {
  return is_float(x) && x.dim() > 0 && weight_is_legal(weight) && weight.codes.dim() >= 2 &&
      x.size(-1) == weight.K() && (!bias.has_value() || (is_float(*bias) && bias->sizes().equals(channels_of(weight.codes))));
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

bool epilogue_is_legal(
    const Tensor& x, const Int8Weight& weight, const Word& activation, const MaybeTensor& other, const Word& binary) {
  const auto b = binary_of(binary.text);
  if (!activation_of(activation.text) || !b || (*b == Binary::none) != !other.has_value()) return false;
  return !other.has_value() ||
      (is_float(*other) && has_sizes(*other, x.sizes().slice(0, x.dim() - 1), weight.N()));
}

// ---- refusals --------------------------------------------------------------------------------------------------------

std::string described(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " [";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

std::string described(const MaybeWord& word) { return word ? word->text : "None"; }
std::string described(const Word& word) { return word.text; }
std::string described(ScalarType dtype) { return torch::headeronly::toString(dtype); }
template <typename T>
std::string described(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}
template <typename T>
std::string described(const std::optional<T>& value) { return value.has_value() ? described(*value) : "None"; }

// The argument of a call of the op's fake: tensors without values.
Tensor for_fake(const Tensor& t) {
  return empty({t.sizes().begin(), t.sizes().end()}, dtype(t), aoti_torch_device_type_meta());
}
MaybeTensor for_fake(const MaybeTensor& t) { return t.has_value() ? MaybeTensor(for_fake(*t)) : std::nullopt; }
std::string for_fake(const Word& word) { return word.text; }
std::optional<std::string> for_fake(const MaybeWord& word) {
  return word ? std::optional(word->text) : std::nullopt;
}
template <typename T>
T for_fake(const T& value) { return value; }

// Raises the error that the op's fake raises for the illegal arguments. Without Python's int8fx there is no fake.
template <typename... Args>
[[noreturn]] void refuse(const char* op, std::array<const char*, sizeof...(Args)> names, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(for_fake(args))...};
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) == TORCH_SUCCESS)
    throw std::runtime_error(std::string(op) + ": the kernel refuses arguments that the fake accepts");
  const std::string error = torch_exception_get_what_without_backtrace(), type = "ValueError: ";
  if (error.starts_with(type + op)) throw std::invalid_argument(error.substr(type.size(), error.find("\n\nAt:") - type.size()));
  std::string found;
  size_t i = 0;
  ((found += std::string(i ? ", " : "") + names[i] + " = " + described(args), ++i), ...);
  throw std::runtime_error(
      std::string(op) + ": illegal arguments: " + found + "; after `import int8fx` the error says which one and why");
}

// ---- kernels ---------------------------------------------------------------------------------------------------------

template <typename F>
void dispatch(int32_t dtype, F&& f) {
  if (dtype == BFLOAT16) return f(c10::BFloat16{});
  if (dtype == HALF) return f(c10::Half{});
  if (dtype == FLOAT) return f(float{});
  f(double{});
}

Floats floats_of(const Tensor& t) {
  Floats floats{t.const_data_ptr()};
  dispatch(dtype(t), [&](auto of) { floats.dtype = dtype_of<decltype(of)>(); });
  return floats;
}

Floats operator+(Floats values, int64_t offset) {
  if (values.data == nullptr) return values;
  return {static_cast<const char*>(values.data) + offset * size_of(values.dtype), values.dtype};
}

std::vector<int64_t> values_of(const Tensor& integers) {
  const Tensor t = dense(integers);
  const int64_t n = t.numel();
  if (dtype(t) == INT64) {
    const auto* values = static_cast<const int64_t*>(t.const_data_ptr());
    return {values, values + n};
  }
  const auto* values = static_cast<const int32_t*>(t.const_data_ptr());
  return {values, values + n};
}

template <typename T>
struct Quantized {
  int8_t* codes;  // [M, K]
  T* scale;  // [M]
  bool* mask;  // [K]
};

template <typename scalar_t>
void quantize(const scalar_t* x, int64_t M, int64_t K, std::optional<double> threshold, int64_t block,
              const std::vector<int64_t>& columns, const Quantized<compute_t<scalar_t>>& q) {
  std::fill_n(q.mask, K, false);
  if (threshold.has_value()) mark_outliers(x, M, K, *threshold, q.mask);
  const bool* excluded = q.mask;
  Buffer copy(columns.empty() ? 0 : K);
  if (!columns.empty()) {
    for (const int64_t k : columns) q.mask[k] = false;
    excluded = std::copy_n(q.mask, K, copy.as<bool>()) - K;
    for (const int64_t k : columns) copy.as<bool>()[k] = true;
  }
  const bool any = std::find(excluded, excluded + K, true) != excluded + K;
  quantize_rows(x, M, K, any ? excluded : nullptr, block, q.codes, q.scale);
}

// The weight in groups of expert e. The tensors, which are dense, outlive it.
struct Groups {
  Tensor codes, scale;
  MaybeTensor zero_point, scale_range;
  const float* levels;
  int64_t N, K, group_size, G;

  explicit Groups(const Int8Weight& weight)
      : codes(dense(weight.codes)), scale(dense(weight.scale)),
        zero_point(weight.zero_point.has_value() ? MaybeTensor(dense(*weight.zero_point)) : std::nullopt),
        scale_range(weight.scale_range.has_value() ? MaybeTensor(dense(*weight.scale_range)) : std::nullopt),
        levels(weight.in_features ? levels_of(weight.format->text) : nullptr),
        N(weight.codes.dim() > 1 ? weight.N() : 1), K(weight.K()),
        group_size(weight.group_size.value_or(std::max<int64_t>(1, weight.K()))), G(weight.groups()) {}

  GroupWeight of_expert(int64_t e) const {
    GroupWeight w{static_cast<const uint8_t*>(codes.const_data_ptr()), levels};
    w.N = N, w.K = K, w.group_size = group_size, w.G = G;
    w.codes += e * N * w.row_bytes();
    if (scale_range.has_value()) {
      w.scale_codes = static_cast<const uint8_t*>(scale.const_data_ptr()) + e * N * G;
      w.scale_range = static_cast<const float*>(scale_range->const_data_ptr()) + e * N * 2;
    } else
      w.scale = floats_of(scale) + e * N * G;
    if (zero_point.has_value()) w.zero_point = static_cast<const uint8_t*>(zero_point->const_data_ptr()) + e * N * G;
    return w;
  }
};

// What the products of one call share, and the tensors that own it.
struct Weight {
  Tensor codes, scale;
  std::optional<double> threshold;
  int64_t block, N, K;
  std::vector<int64_t> columns;
  MaybeTensor columns_weight, bias;
  std::optional<Groups> groups;  // of weights of other formats
  Activation activation = Activation::none;

  Weight(const Int8Weight& weight, const MaybeTensor& bias)
      : codes(dense(weight.codes)), scale(dense(weight.scale)), threshold(weight.threshold),
        block(weight.block), N(weight.N()), K(weight.K()) {
    if (weight.columns.has_value()) {
      columns = values_of(*weight.columns);
      columns_weight = dense(*weight.columns_weight);
    }
    if (bias.has_value()) this->bias = dense(*bias);
    if (!weight.is_plain()) groups.emplace(weight);
  }

  // y [M, N] of expert e, from x [M, K] and what was quantised of it, or of x only.
  template <typename scalar_t>
  void multiply(int64_t e, const scalar_t* x, int64_t M, const Quantized<compute_t<scalar_t>>* quantized,
                Floats other, Binary binary, scalar_t* y) const {
    if (groups) {
      GroupProduct<scalar_t> p{};
      p.weight = groups->of_expert(e);
      return run(p, e, x, M, threshold != 0., quantized, other, binary, y);
    }
    Product<scalar_t> p{};
    p.N = N, p.K = K;
    p.rotated = block != 1;
    p.weight = static_cast<const int8_t*>(codes.const_data_ptr()) + e * N * K;
    p.weight_scale = floats_of(scale) + e * N;
    run(p, e, x, M, true, quantized, other, binary, y);
  }

 private:
  // Runs p, a Product or a GroupProduct that has its weight. `quantizes`: whether more than few rows of x are quantised.
  template <typename P, typename scalar_t>
  void run(P& p, int64_t e, const scalar_t* x, int64_t M, bool quantizes,
           const Quantized<compute_t<scalar_t>>* quantized, Floats other, Binary binary, scalar_t* y) const {
    using T = compute_t<scalar_t>;
    p.M = M;
    p.x = x;
    p.columns = columns;
    if (columns_weight.has_value()) p.columns_weight = floats_of(*columns_weight) + e * N * int64_t(columns.size());
    p.weight_only = weight_only(M, block);
    std::optional<Buffer> buffer;
    Quantized<T> q{};
    bool few_codes = false;
    if constexpr (std::is_same_v<P, GroupProduct<scalar_t>>)
      few_codes = p.weight_only && !threshold.has_value() && p.takes_few_codes();
    if (few_codes || (!p.weight_only && quantizes)) {
      if (quantized != nullptr && !few_codes) {  // of few rows `quantize_rowwise` has none for this
        q = *quantized;
      } else {
        buffer.emplace(M * int64_t(sizeof(T)) + M * K + K);
        q.scale = buffer->as<T>();
        q.codes = reinterpret_cast<int8_t*>(q.scale + M);
        q.mask = reinterpret_cast<bool*>(q.codes + M * K);
        quantize(x, M, K, threshold, block, columns, q);
      }
      p.codes = q.codes;
      p.x_scale = q.scale;
      if (threshold.has_value())
        for (int64_t k = 0; k < K; ++k)
          if (q.mask[k]) p.outliers.push_back(k);
    }
    p.epilogue.activation = activation;
    if (bias.has_value()) p.epilogue.bias = floats_of(*bias) + e * N;
    p.epilogue.other = other;
    p.epilogue.binary = binary;
    p.y = y;
    p.run();
  }
};

template <typename T>
const T* data_of(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

std::vector<int64_t> sizes_of_y(const Tensor& x, const Int8Weight& weight) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.N();
  return sizes;
}

Tensor linear(
    const Tensor& x, const Tensor& codes, const Tensor& scale, std::optional<double> threshold, int64_t block,
    const MaybeTensor& columns, const MaybeTensor& columns_weight, const MaybeWord& format,
    std::optional<int64_t> group_size, std::optional<int64_t> in_features, const MaybeTensor& zero_point,
    const MaybeTensor& scale_range, const MaybeTensor& bias, const Word& activation,
    const MaybeTensor& other, const Word& binary) {
  const Int8Weight weight{codes, scale, threshold, block, columns, columns_weight,
                          format, group_size, in_features, zero_point, scale_range};
  if (!(product_is_legal(x, weight, bias) &&
        (codes.dim() == 2 || (codes.dim() == 3 && x.dim() == 3 && x.size(0) == codes.size(0))) &&
        epilogue_is_legal(x, weight, activation, other, binary)))
    refuse(LINEAR, {"x", "weight", "weight_scale", "threshold", "block", "columns", "columns_weight", "format", "group_size", "in_features",
                    "zero_point", "scale_range", "bias",
                    "activation", "other", "binary"},
           x, codes, scale, threshold, block, columns, columns_weight, format, group_size, in_features, zero_point,
           scale_range, bias, activation, other, binary);
  const Tensor y = empty(sizes_of_y(x, weight), dtype(x)), rows = dense(x);
  const MaybeTensor operand = other.has_value() ? MaybeTensor(dense(*other)) : std::nullopt;
  Weight packed(weight, bias);
  packed.activation = *activation_of(activation.text);
  const int64_t experts = codes.dim() == 3 ? codes.size(0) : 1, M = experts ? count_rows(x) / experts : 0;
  dispatch(dtype(x), [&](auto of) {
    using scalar_t = decltype(of);
    for (int64_t e = 0; e < experts; ++e)
      packed.multiply(e, data_of<scalar_t>(rows) + e * M * packed.K, M, nullptr,
                      operand.has_value() ? floats_of(*operand) + e * M * packed.N : Floats{}, *binary_of(binary.text),
                      static_cast<scalar_t*>(y.mutable_data_ptr()) + e * M * packed.N);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> quantize_rowwise(
    const Tensor& x, std::optional<double> threshold, int64_t block, const MaybeTensor& columns, bool for_linear) {
  if (!is_float(x) || x.dim() == 0 || !quantisation_is_legal(threshold, block, columns, x.size(-1)))
    refuse(QUANTIZE_ROWWISE, {"x", "threshold", "block", "columns", "for_linear"}, x, threshold, block, columns,
           for_linear);
  const int64_t M = count_rows(x), K = x.size(-1);
  const Tensor rows = dense(x), codes = empty({M, K}, INT8),
               scale = empty({M}, compute_dtype(x)), mask = empty({K}, BOOL);
  if (for_linear && weight_only(M, block)) return {codes, scale, mask};  // linear_quantized does not read them
  dispatch(dtype(x), [&](auto of) {
    using scalar_t = decltype(of);
    const Quantized<compute_t<scalar_t>> q{
        static_cast<int8_t*>(codes.mutable_data_ptr()), static_cast<compute_t<scalar_t>*>(scale.mutable_data_ptr()),
        static_cast<bool*>(mask.mutable_data_ptr())};
    quantize(data_of<scalar_t>(rows), M, K, threshold, block,
             columns.has_value() ? values_of(*columns) : std::vector<int64_t>(), q);
  });
  return {codes, scale, mask};
}

Tensor linear_quantized(
    const Tensor& x, const Tensor& x_codes, const Tensor& x_scale, const Tensor& outlier_mask, const Tensor& codes,
    const Tensor& scale, std::optional<double> threshold, int64_t block, const MaybeTensor& columns, const MaybeTensor& columns_weight, const MaybeWord& format,
    std::optional<int64_t> group_size, std::optional<int64_t> in_features, const MaybeTensor& zero_point,
    const MaybeTensor& scale_range, const MaybeTensor& bias, const Word& activation, const MaybeTensor& other,
    const Word& binary) {
  const Int8Weight weight{codes, scale, threshold, block, columns, columns_weight,
                          format, group_size, in_features, zero_point, scale_range};
  bool legal = product_is_legal(x, weight, bias) && codes.dim() == 2 &&
      epilogue_is_legal(x, weight, activation, other, binary);
  const int64_t M = legal ? count_rows(x) : 0;
  if (legal)
    legal = dtype(x_codes) == INT8 && x_codes.sizes().equals({M, weight.K()}) &&
        dtype(x_scale) == compute_dtype(x) && x_scale.sizes().equals({M}) &&
        dtype(outlier_mask) == BOOL && outlier_mask.sizes().equals({weight.K()});
  if (!legal)
    refuse(LINEAR_QUANTIZED, {"x", "codes", "x_scale", "outlier_mask", "weight", "weight_scale", "threshold", "block",
                              "columns", "columns_weight", "format", "group_size", "in_features",
                    "zero_point", "scale_range", "bias", "activation", "other", "binary"},
           x, x_codes, x_scale, outlier_mask, codes, scale, threshold, block, columns, columns_weight, format, group_size, in_features, zero_point,
           scale_range, bias, activation,
           other, binary);
  const Tensor y = empty(sizes_of_y(x, weight), dtype(x)), rows = dense(x), q_codes = dense(x_codes),
               q_scale = dense(x_scale), q_mask = dense(outlier_mask);
  const MaybeTensor operand = other.has_value() ? MaybeTensor(dense(*other)) : std::nullopt;
  Weight packed(weight, bias);
  packed.activation = *activation_of(activation.text);
  dispatch(dtype(x), [&](auto of) {
    using scalar_t = decltype(of);
    const Quantized<compute_t<scalar_t>> q{  // which are read only
        static_cast<int8_t*>(q_codes.data_ptr()), static_cast<compute_t<scalar_t>*>(q_scale.data_ptr()),
        static_cast<bool*>(q_mask.data_ptr())};
    packed.multiply(0, data_of<scalar_t>(rows), M, &q, operand.has_value() ? floats_of(*operand) : Floats{},
                    *binary_of(binary.text), static_cast<scalar_t*>(y.mutable_data_ptr()));
  });
  return y;
}

Tensor grouped_linear(
    const Tensor& x, const Tensor& offsets, const Tensor& codes, const Tensor& scale, std::optional<double> threshold,
    int64_t block, const MaybeTensor& columns, const MaybeTensor& columns_weight, const MaybeWord& format,
    std::optional<int64_t> group_size, std::optional<int64_t> in_features, const MaybeTensor& zero_point,
    const MaybeTensor& scale_range, const MaybeTensor& bias) {
  const Int8Weight weight{codes, scale, threshold, block, columns, columns_weight,
                          format, group_size, in_features, zero_point, scale_range};
  if (!(product_is_legal(x, weight, bias) && codes.dim() == 3 && x.dim() == 2 && offsets.dim() == 1 &&
        offsets.size(0) == codes.size(0) && is_integer(offsets)))
    refuse(GROUPED_LINEAR, {"x", "offsets", "weight", "weight_scale", "threshold", "block", "columns",
                            "columns_weight", "format", "group_size", "in_features",
                    "zero_point", "scale_range", "bias"},
           x, offsets, codes, scale, threshold, block, columns, columns_weight, format, group_size, in_features,
           zero_point, scale_range, bias);
  const Tensor y = empty(sizes_of_y(x, weight), dtype(x)), rows = dense(x);
  const Weight packed(weight, bias);
  const std::vector<int64_t> ends = values_of(offsets);
  const int64_t S = x.size(0), N = packed.N;
  dispatch(dtype(x), [&](auto of) {
    using scalar_t = decltype(of);
    auto* to = static_cast<scalar_t*>(y.mutable_data_ptr());
    int64_t begin = 0;
    for (size_t e = 0; e < ends.size(); ++e) {
      const int64_t end = std::min(ends[e], S);
      if (end > begin)
        packed.multiply(e, data_of<scalar_t>(rows) + begin * packed.K, end - begin, nullptr, {}, Binary::none,
                        to + begin * N);
      begin = std::max(begin, end);
    }
    std::fill_n(to + begin * N, (S - begin) * N, scalar_t(0));  // rows of no expert
  });
  return y;
}

// schemes/quantize.py's `dequantize`, bit for bit.
Tensor dequantize(
    const Tensor& codes, const Tensor& scale, std::optional<double> threshold, int64_t block,
    const MaybeTensor& columns, const MaybeTensor& columns_weight, const MaybeWord& format,
    std::optional<int64_t> group_size, std::optional<int64_t> in_features, const MaybeTensor& zero_point,
    const MaybeTensor& scale_range, ScalarType scalar_type) {
  const int32_t dtype = code_of(scalar_type);
  const Int8Weight weight{codes, scale, threshold, block, columns, columns_weight,
                          format, group_size, in_features, zero_point, scale_range};
  if (!is_float(dtype) || !weight_is_legal(weight))
    refuse(DEQUANTIZE, {"weight", "weight_scale", "threshold", "block", "columns", "columns_weight", "format",
                        "group_size", "in_features", "zero_point", "scale_range", "dtype"}, codes,
           scale, threshold, block, columns, columns_weight, format, group_size, in_features, zero_point,
           scale_range, scalar_type);
  std::vector<int64_t> sizes(codes.sizes().begin(), codes.sizes().end());
  sizes.back() = weight.K();
  const Tensor w = empty(sizes, dtype);
  const Groups groups(weight);
  const MaybeTensor floats = columns.has_value() ? MaybeTensor(dense(*columns_weight)) : std::nullopt;
  const std::vector<int64_t> indices = columns.has_value() ? values_of(*columns) : std::vector<int64_t>();
  const int64_t N = multiply(channels_of(codes)), K = weight.K(), C = indices.size();
  dispatch(dtype, [&](auto of) {
    using scalar_t = decltype(of);
    using T = compute_t<scalar_t>;
    const GroupWeight all = groups.of_expert(0);  // its rows are those of all experts
    auto* to = static_cast<scalar_t*>(w.mutable_data_ptr());
    parallel_for(N, std::max<int64_t>(1, 32768 / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
      std::vector<T> row(K), kept(C), scales(groups.G);
      for (int64_t n = begin; n < end; ++n) {
        all.load_scales(n, 1, scales.data());
        all.decode(n, 0, K, scales.data(), row.data());
        if (block != 1) rotate_row(row.data(), K, block);
        if (C > 0) load_any(floats_of(*floats), n * C, C, C, kept.data());
        for (int64_t c = 0; c < C; ++c) row[indices[c]] = kept[c];
        for (int64_t k = 0; k < K; ++k) to[n * K + k] = static_cast<scalar_t>(row[k]);
      }
    });
  });
  return w;
}

}  // namespace
}  // namespace int8fx

template <>
struct torch::stable::detail::ToImpl<int8fx::Word> {
  static int8fx::Word call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    int8fx::Word word{{data, length}};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return word;
  }
};

// Static initialisation runs in the order of this file: schemas first. torch refuses those that Python has defined.
static const bool defined = [] {
  TorchLibraryHandle library;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_fragment("int8fx", __FILE__, __LINE__, &library));
  for (const char* schema : {INT8FX_SCHEMAS}) (void)aoti_torch_library_def(library, schema);
  return true;
}();

STABLE_TORCH_LIBRARY_IMPL(int8fx, CPU, m) {
  m.impl("linear", TORCH_BOX(&int8fx::linear));
  m.impl("linear_quantized", TORCH_BOX(&int8fx::linear_quantized));
  m.impl("quantize_rowwise", TORCH_BOX(&int8fx::quantize_rowwise));
  m.impl("grouped_linear", TORCH_BOX(&int8fx::grouped_linear));
  m.impl("dequantize", TORCH_BOX(&int8fx::dequantize));
}
