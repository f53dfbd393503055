// Calls that need no gradient pass by the autograd formulas, which are Python functions (../__init__.py): under
// torch.no_grad that saves 10 us a call.
//
// torch's stable ABI has no such call, so this library is for the one version of torch that it is compiled with. Without
// it the formulas run, with the same results.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

namespace int8fx {
namespace {

bool requires_grad(const c10::IValue& argument) { return argument.isTensor() && argument.toTensor().requires_grad(); }

void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto below = keys & c10::after_autograd_keyset;
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (at::GradMode::is_enabled() && std::any_of(arguments.begin(), arguments.end(), requires_grad))
    return op.redispatchBoxed(below.add(c10::DispatchKey::AutogradOther), stack);  // the formula, for all devices
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(below, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(int8fx, AutogradCPU, m) {
  for (const char* name : {"linear", "linear_quantized", "quantize_rowwise", "grouped_linear"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

}  // namespace int8fx
