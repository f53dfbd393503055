"""accelerate's hooks and loaders over packed models: the bits stay, and codes stay int8."""

import copy

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


@pytest.mark.parametrize("empty", [False, True])
def test_codes_on_disk_need_their_buffers_there_too(empty, tmp_path):
    """accelerate does not load the buffers of a module on disk unless it offloads them."""
    source, _ = models.llama(seed=9)
    source, (model, inputs) = int8fx.convert(source.eval()), models.llama()
    inputs.pop("use_cache")
    model = int8fx.convert(model.to("meta") if empty else model)
    if empty:
        model.model.rotary_emb = source.model.rotary_emb  # its buffers are in no file
    layers = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    how = {"device_map": layers | {"model.rotary_emb": "cpu"}, "offload_folder": str(tmp_path / "offload")}
    file = to_file(source, tmp_path)
    with pytest.raises(
        TypeError, match=r"'model.layers.0.*' from disk, but not its scales.*legal: offload_buffers=True"
    ):
        accelerate.load_checkpoint_and_dispatch(copy.deepcopy(model), file, **how)
    model = accelerate.load_checkpoint_and_dispatch(model, file, **how, offload_buffers=True)
    assert torch.equal(outputs(model.eval(), inputs), outputs(source, inputs))


def loaded_and_run(model: nn.Module, file: str, device_map: dict | None, x: Tensor) -> Tensor:
    load_checkpoint_in_model(model, file, device_map=device_map)
    return model(x)


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
@pytest.mark.parametrize("theirs", SCHEMES)
def test_a_checkpoint_of_another_scheme_is_never_read_as_ours(theirs, device_map, tmp_path):
    x = torch.randn(5, 40)
    source = int8fx.convert(nn.Sequential(nn.Linear(40, 8)), SCHEMES[theirs])
    file = to_file(source, tmp_path)
    for ours in SCHEMES:
        model = int8fx.convert(nn.Sequential(nn.Linear(40, 8)), SCHEMES[ours])
        if ours == theirs:
            assert torch.equal(loaded_and_run(model, file, device_map, x), source(x))
        else:
            with pytest.raises((RuntimeError, ValueError), match=r"weight|int8fx: '0'"):
                loaded_and_run(model, file, device_map, x)


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
