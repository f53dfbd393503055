"""accelerate's hooks and loaders over packed models: the bits stay, and codes stay int8."""

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import compute_module_sizes, infer_auto_device_map, load_checkpoint_in_model
from safetensors.torch import save_file
from support import models
from support.conversion import SCHEMES, packed_modules
from torch import Tensor, nn

import int8fx
from int8fx.conversion.packed import tensors_of


def outputs(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        y = model(**inputs)
    return y if isinstance(y, Tensor) else y[0]


def to_file(model: nn.Module, folder) -> str:
    path = str(folder / "model.safetensors")
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path)
    return path


WAYS = {
    "dispatch_model": lambda m, d: accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True),
    "cpu_offload": lambda m, d: accelerate.cpu_offload(m, execution_device="cpu"),
    "cpu_offload of buffers": lambda m, d: accelerate.cpu_offload(m, execution_device="cpu", offload_buffers=True),
    "disk_offload": lambda m, d: accelerate.disk_offload(m, str(d), execution_device="cpu"),
    "load_checkpoint_in_model": lambda m, d: load_checkpoint_in_model(m, to_file(m, d)),
    "with a device map": lambda m, d: load_checkpoint_in_model(m, to_file(m, d), device_map={"": "cpu"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("scheme", ["llm_int8", "rotated columns"])
def test_outputs_stay_bit_by_bit(way, name, scheme, tmp_path):
    model, inputs = models.ALL[name]()
    inputs.pop("use_cache", None)
    y = outputs(int8fx.convert(model.eval(), SCHEMES[scheme]), inputs)
    WAYS[way](model, tmp_path)
    for module in packed_modules(model):
        assert {tensors_of(module, weight).codes.dtype for weight in module.packed_weights} == {torch.int8}
    assert torch.equal(outputs(model, inputs), y)
    remove_hook_from_submodules(model)
    assert torch.equal(outputs(model, inputs), y)


def test_a_model_that_was_made_empty_loads_and_is_dispatched(tmp_path):
    source = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    inputs = {"input": torch.randn(5, 16)}
    y = outputs(int8fx.convert(source), inputs)
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    int8fx.convert(model)
    accelerate.load_checkpoint_and_dispatch(model, to_file(source, tmp_path), device_map={"": "cpu"})
    assert torch.equal(outputs(model, inputs), y)


def test_attention_whose_output_layer_is_offloaded_is_an_error():
    """Its forward reads the weight of another module, whose hook does not run: torch's own attention fails too."""
    model, inputs = models.transformer()
    int8fx.convert(model.eval())
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="x is on cpu and weight on meta; legal: one device"):
        outputs(model, inputs)


def test_sizes_and_device_maps():
    model, _ = models.llama()
    int8fx.convert(model)
    size = sum(t.nbytes for t in model.state_dict().values())
    assert abs(compute_module_sizes(model)[""] - size) < 0.01 * size
    places = infer_auto_device_map(model, max_memory={"cpu": size // 2, "disk": 10 * size})
    assert set(places.values()) == {"cpu", "disk"}


def test_prepare():
    model, inputs = models.llama()
    inputs.pop("use_cache")
    y = outputs(int8fx.convert(model.eval()), inputs)
    assert torch.equal(outputs(accelerate.Accelerator(cpu=True).prepare(model), inputs), y)
