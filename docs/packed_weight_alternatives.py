"""Compares ways to hold a packed weight in a module. Prints the table of docs/packed_weights.md.

    python docs/packed_weight_alternatives.py      # needs peft and accelerate

Each way is a linear layer of a few lines around the same op. A check is what a tool does with a model, by its own call.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import accelerate
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import int8fx
from int8fx.schemes.quantize import quantize_weight

K = N = 64


def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.int8fx.linear.default(x, codes, scale, 6.0, 1, None, None, bias)


class Int8Parameter(nn.Linear):
    """An int8 Parameter called ``weight``, and a buffer ``weight_scale``, as bitsandbytes and compressed-tensors do."""

    def __init__(self, float_layer: nn.Linear) -> None:
        super().__init__(K, N)
        codes, scale = quantize_weight(float_layer.weight.detach())
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), float_layer.bias
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.weight_scale, self.bias)


class Packed(Tensor):
    """A tensor subclass that holds codes and scale and is registered as the Parameter, as torchao does."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Packed:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner, dtype, size, stride):
        return Packed(inner["codes"], inner["scale"], dtype)

    def dequantize(self) -> Tensor:
        return torch.ops.int8fx.dequantize.default(self.codes, self.scale, dtype=self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.t.default, aten.detach.default, aten.alias.default):
            w = args[0]
            return _Transposed(w) if func is aten.t.default else Packed(w.codes, w.scale, w.dtype)
        if func._schema.arguments[0].alias_info is not None and func._schema.arguments[0].alias_info.is_write:
            value = args[0].dequantize()
            func(value, *args[1:], **(kwargs or {}))
            codes, scale = quantize_weight(value)
            args[0].codes.copy_(codes), args[0].scale.copy_(scale)
            return args[0]
        plain = [a.dequantize() if isinstance(a, Packed) else a for a in args]
        return func(*plain, **(kwargs or {}))


class _Transposed(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, of: Packed) -> _Transposed:
        return Tensor._make_wrapper_subclass(cls, of.shape[::-1], dtype=of.dtype, device=of.device)

    def __init__(self, of: Packed) -> None:
        self.of = of

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            return linear(args[1], args[2].of.codes, args[2].of.scale, args[0])
        return func(*[a.of.dequantize().t() if isinstance(a, _Transposed) else a for a in args], **(kwargs or {}))


class SubclassParameter(nn.Linear):
    def __init__(self, float_layer: nn.Linear) -> None:
        super().__init__(K, N)
        codes, scale = quantize_weight(float_layer.weight.detach())
        self.weight = nn.Parameter(Packed(codes, scale, torch.float32), requires_grad=False)
        self.bias = float_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def state(self) -> dict[str, Tensor]:
        return {"weight_codes": self.weight.codes, "weight_scale": self.weight.scale, "bias": self.bias}


class RenamedBuffers(nn.Linear):
    """Buffers with names of their own, and no attribute ``weight``."""

    def __init__(self, float_layer: nn.Linear) -> None:
        super().__init__(K, N)
        codes, scale = quantize_weight(float_layer.weight.detach())
        del self.weight
        self.bias = float_layer.bias
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_codes, self.weight_scale, self.bias)


WAYS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8 Parameter `weight`": Int8Parameter,
    "subclass as Parameter": SubclassParameter,
    "renamed buffers": RenamedBuffers,
    "int8fx": int8fx.convert,
}


# ---- what tools do: each returns "right", "refused" or "WRONG" ------------------------------------------------------


def verdict(run: Callable[[], bool]) -> str:
    try:
        return "right" if run() else "WRONG"
    except Exception:
        return "refused"


def offloads(make: Callable[[], nn.Module], x: Tensor) -> bool:
    model = nn.Sequential(make())
    y = model(x)
    return torch.equal(accelerate.cpu_offload(model, execution_device=torch.device("cpu"))(x), y)


def merges(make: Callable[[], nn.Module], x: Tensor, **settings) -> bool:
    model = nn.Sequential(make())
    model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False, r=8, **settings)).eval()
    y, merged = model(x), model.merge_and_unload()
    return bool((merged(x) - y).norm() < 0.03 * y.norm())


def stays_out_of_a_float_layer(make: Callable[[], nn.Module], x: Tensor) -> bool:
    layer, floats = make(), nn.Linear(K, N)
    before = floats.weight.detach().clone()
    floats.load_state_dict(layer.state() if hasattr(layer, "state") else layer.state_dict(), strict=False)
    return torch.equal(floats.weight, before)


def counts(make: Callable[[], nn.Module], x: Tensor) -> bool:
    return sum(p.numel() for p in make().parameters()) == K * N + N


def saves_plain_tensors(make: Callable[[], nn.Module], x: Tensor) -> bool:
    return all(type(t) in (Tensor, nn.Parameter) for t in make().state_dict().values())


def serves_code_that_reads_weight(make: Callable[[], nn.Module], x: Tensor) -> bool:
    layer = make()
    y = x.to(layer.weight.dtype) @ layer.weight.T + layer.bias
    return bool((y - layer(x)).norm() < 0.03 * y.norm())


def lands_a_write(make: Callable[[], nn.Module], x: Tensor) -> bool:
    layer = make()
    y = layer(x) - layer.bias
    with torch.no_grad():
        layer.weight.data.mul_(2)
    return bool((layer(x) - layer.bias - 2 * y).norm() < 0.05 * y.norm())


CHECKS: dict[str, Callable[[Callable[[], nn.Module], Tensor], bool]] = {
    "accelerate.cpu_offload": offloads,
    "PEFT: LoRA merge_and_unload": merges,
    "PEFT: DoRA merge_and_unload": lambda make, x: merges(make, x, use_dora=True),
    "float layer, load_state_dict(strict=False)": stays_out_of_a_float_layer,
    "parameters() counts the weight": counts,
    "state_dict() holds plain tensors": saves_plain_tensors,
    "x.to(layer.weight.dtype) @ layer.weight.T": serves_code_that_reads_weight,
    "layer.weight.data.mul_(2)": lands_a_write,
}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    floats, x = nn.Linear(K, N), torch.randn(16, K)
    rows = {
        name: [verdict(lambda do=check, way=way: do(lambda: way(copy.deepcopy(floats)), x)) for way in WAYS.values()]
        for name, check in CHECKS.items()
    }
    models = [nn.Linear(K, N), *(way(copy.deepcopy(floats)) for way in WAYS.values())]
    with torch.no_grad():
        times = [statistics.median(t) for t in eager_times(models, x[:1])]
        rows["eager call, 1 row, of nn.Linear's time"] = [f"{t / times[0]:.2f}" for t in times[1:]]
        rows["torch.compile of 12 layers, s"] = [f"{compile_time(way):.2f}" for way in WAYS.values()]
    print("|", *(f"| {way}" for way in WAYS), "|")
    print("|---" * (len(WAYS) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name}", *(f"| {cell}" for cell in cells), "|")
    print(f"\nLines of the packed weight in int8fx: {lines_of_code()}. torch {torch.__version__}", file=sys.stderr)


def eager_times(models: list[nn.Module], x: Tensor, rounds: int = 40, calls: int = 100) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):  # interleaved: the machine's speed changes
        for model, into in zip(models, times, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                model(x)
            into.append(time.perf_counter() - start)
    return times


def compile_time(way: Callable[[nn.Linear], nn.Module]) -> float:
    torch._dynamo.reset()
    model = nn.Sequential(*(way(nn.Linear(K, N)) for _ in range(12)))
    start = time.perf_counter()
    torch.compile(model, backend="aot_eager")(torch.randn(16, K))
    return time.perf_counter() - start


def lines_of_code() -> int:
    folder = "/".join(int8fx.__file__.split("/")[:-1]) + "/conversion/"
    return sum(len(open(folder + name).read().splitlines()) for name in ("packed.py", "view.py", "format.py"))


if __name__ == "__main__":
    main()
