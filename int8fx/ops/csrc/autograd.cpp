// What lies between a call of an op and its kernel for CPU tensors, in C++ where Python would take longer than a small
// layer: calls that need no gradient pass by the autograd formulas, which are Python functions (../__init__.py), and
// `linear` has its formula here too.
//
// torch's stable ABI has no such calls, so this library is for the one version of torch that it is compiled with. Without
// it the Python formulas run, with the same results.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace int8fx {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeWord = std::optional<std::string_view>;
using MaybeInt = std::optional<int64_t>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether oneDNN multiplies this dtype on this CPU; elsewhere torch's own loops take 30 times as long.
bool has_fast_matmul(at::ScalarType dtype) {
  const auto supported = [](const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op.has_value() && op->typed<bool()>().call();
  };
  static const bool bfloat16 = supported("mkldnn::_is_mkldnn_bf16_supported");
  static const bool half = supported("mkldnn::_is_mkldnn_fp16_supported");
  return dtype == at::kBFloat16 ? bfloat16 : dtype == at::kHalf ? half : true;
}

// grad [..., N] @ W [N, K], as `_times_dequantized` of ../__init__.py.
Tensor times_dequantized(const Tensor& grad, const Tensor& codes, const Tensor& scale, int64_t block,
                         const MaybeTensor& columns, const MaybeTensor& columns_weight) {
  using Dequantize = Tensor(const Tensor&, const Tensor&, std::optional<double>, int64_t, const MaybeTensor&,
                            const MaybeTensor&, MaybeWord, MaybeInt, MaybeInt, const MaybeTensor&,
                            const MaybeTensor&, at::ScalarType);
  static const auto dequantize =
      c10::Dispatcher::singleton().findSchemaOrThrow("int8fx::dequantize", "").typed<Dequantize>();
  const Tensor w = dequantize.call(codes, scale, std::nullopt, block, columns, columns_weight, {}, {}, {}, {}, {},
                                   grad.scalar_type());
  if (has_fast_matmul(grad.scalar_type())) return grad.matmul(w);
  return grad.to(at::kFloat).matmul(w.to(at::kFloat)).to(grad.scalar_type());
}

// `linear` of an int8 weight with one scale per output channel, without activation and other: x gets a gradient through the dequantised weight, and the bias gets one.
struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& codes, const Tensor& scale,
                        std::optional<double> threshold, int64_t block, const MaybeTensor& columns,
                        const MaybeTensor& columns_weight, const MaybeTensor& bias) {
    using Op = Tensor(const Tensor&, const Tensor&, const Tensor&, std::optional<double>, int64_t, const MaybeTensor&,
                      const MaybeTensor&, MaybeWord, MaybeInt, MaybeInt, const MaybeTensor&, const MaybeTensor&,
                      const MaybeTensor&, std::string_view, const MaybeTensor&, std::string_view);
    static const auto linear = c10::Dispatcher::singleton().findSchemaOrThrow("int8fx::linear", "").typed<Op>();
    const at::AutoDispatchBelowAutograd guard;
    const Tensor y = linear.call(x, codes, scale, threshold, block, columns, columns_weight, {}, {}, {}, {}, {}, bias, "none",
                                 {}, "none");
    context->save_for_backward(
        {codes, scale, columns.value_or(Tensor()), columns_weight.value_or(Tensor())});
    context->saved_data["block"] = block;
    context->saved_data["x"] = x.requires_grad();
    if (bias.has_value() && bias->requires_grad()) {
      context->saved_data["bias_dim"] = bias->dim();
      context->saved_data["bias_dtype"] = bias->scalar_type();
    }
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list of_arguments(8);
    Tensor grad = grads[0];
    if (!grad.defined()) return of_arguments;
    auto& data = context->saved_data;
    if (data["x"].toBool()) {
      const auto saved = context->get_saved_variables();
      const auto maybe = [](const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; };
      of_arguments[0] = times_dequantized(grad, saved[0], saved[1], data["block"].toInt(), maybe(saved[2]), maybe(saved[3]));
    }
    if (const auto dim = data.find("bias_dim"); dim != data.end()) {
      std::vector<int64_t> lead;
      for (int64_t i = dim->second.toInt() - 1; i < grad.dim() - 1; ++i) lead.push_back(i);
      of_arguments[7] = (lead.empty() ? grad : grad.sum(lead)).to(data["bias_dtype"].toScalarType());
    }
    return of_arguments;
  }
};

// Whether an argument is an ordinary tensor: no subclass and no mode that traces, and no derivative of torch.func or of
// forward mode, for which the Python formula knows what to do.
bool is_ordinary(const c10::IValue& argument) {
  if (!argument.isTensor() || !argument.toTensor().defined()) return true;
  const Tensor& t = argument.toTensor();
  return !t.key_set().has_any(c10::DispatchKeySet(
             {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::FuncTorchBatched,
              c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize})) &&
      !t._fw_grad(0).defined();
}

bool requires_grad(const c10::IValue& argument) { return argument.isTensor() && argument.toTensor().requires_grad(); }

void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto below = keys & c10::after_autograd_keyset;
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (at::GradMode::is_enabled() && std::any_of(arguments.begin(), arguments.end(), requires_grad)) {
    static const c10::OperatorName LINEAR("int8fx::linear", "");
    const auto is_none = [](const c10::IValue& argument) { return argument.isNone(); };
    const bool is_here = op.operator_name() == LINEAR && arguments[13].toStringRef() == "none" &&
        arguments[14].isNone() && std::all_of(&arguments[7], &arguments[12], is_none) && !keys.has(c10::DispatchKey::Python) &&
        std::all_of(arguments.begin(), arguments.end(), is_ordinary);
    if (!is_here) return op.redispatchBoxed(below.add(c10::DispatchKey::AutogradOther), stack);  // to the Python formula
    const Tensor y = Linear::apply(
        arguments[0].toTensor(), arguments[1].toTensor(), arguments[2].toTensor(), arguments[3].toOptional<double>(),
        arguments[4].toInt(), arguments[5].toOptional<Tensor>(), arguments[6].toOptional<Tensor>(),
        arguments[12].toOptional<Tensor>());
    torch::jit::drop(*stack, op.schema().arguments().size());
    stack->emplace_back(y);
    return;
  }
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(below, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(int8fx, AutogradCPU, m) {
  for (const char* name : {"linear", "linear_quantized", "quantize_rowwise", "grouped_linear"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

}  // namespace int8fx
