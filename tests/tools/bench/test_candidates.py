"""int8fx and the other libraries compute the same layer."""

import pytest
import torch

from int8fx.tools.bench import candidates
from int8fx.tools.bench.candidates import (
    FOR_DECODING,
    FOR_ENCODERS,
    FOR_GPU_WEIGHTS,
    FOR_GPUS,
    FOR_LAYERS,
    FOR_MODELS,
    FOR_OUTLIERS,
    FOR_OVERHEAD,
    FOR_WEIGHTS,
    ONNXRUNTIME,
    TORCHAO_INT4,
    Candidate,
)
from int8fx.tools.bench.timing import Measured
from int8fx.tools.machine import missing

N, K = 96, 128
ON_CPUS = (*FOR_LAYERS, *FOR_OVERHEAD, *FOR_GPUS, *FOR_WEIGHTS, *FOR_GPU_WEIGHTS)
EACH = {candidate.name: candidate for candidate in ON_CPUS if candidate is not TORCHAO_INT4}
INT4 = {name for name in EACH if any(word in name for word in ("int4", "nf4", "fp4", "NBits"))}


@pytest.mark.parametrize(("width", "count"), [(4096, 6), (64, 6), (64, 64), (4, 6)], ids=lambda value: f"{value}")
def test_inputs_have_the_outlier_columns_they_say(width, count):
    x = candidates.inputs(3, width, count)
    beyond = x.abs() >= 6
    assert beyond.all(0).sum() == beyond.any(0).sum() == min(count, width)
    assert x.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if EACH[name].frozen else []) for name in EACH]
)
def test_candidates_compute_the_layer(name):
    candidate = EACH[name]
    if reason := missing(*candidate.needs):
        pytest.skip(reason)
    layer, x = candidates.linear(N, K), candidates.inputs(8, K, 6)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        [built] = candidate.layers([layer])
        result = built(candidate.input(x))
    y = torch.as_tensor(result[0] if isinstance(result, list) else result).double()
    error = (y - expected).norm() / expected.norm()
    assert error < (0.2 if candidate is ONNXRUNTIME or name in INT4 else 0.04)  # ONNXRUNTIME saturates without VNNI
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "table",
    [
        FOR_LAYERS,
        FOR_MODELS,
        FOR_OUTLIERS,
        FOR_ENCODERS,
        FOR_GPUS,
        FOR_OVERHEAD,
        FOR_WEIGHTS,
        FOR_GPU_WEIGHTS,
        FOR_DECODING,
    ],
)
def test_labels_are_unique_in_a_table(table):
    assert len({candidate.name for candidate in table}) == len(table)


def test_who_cannot_run_is_noted_and_threads_are_restored():
    def fails(module):
        torch.set_num_threads(torch.get_num_threads() + 1)
        raise RuntimeError("cannot build\nbecause")

    def sets_threads(module):
        torch.set_num_threads(torch.get_num_threads() + 1)
        return module

    contenders = (
        Candidate("absent", fails, needs=("no_such_package",)),
        Candidate("bad", fails),
        Candidate("good", sets_threads),
    )
    before = torch.get_num_threads()
    built, absent = candidates.build_each(contenders, lambda candidate: candidate.layers([candidates.linear(2, 2)]))
    assert torch.get_num_threads() == before
    assert list(built) == ["good"]
    assert absent == {
        "absent": Measured(note="not installed: no_such_package"),
        "bad": Measured(note="failed: RuntimeError: cannot build"),
    }


def test_a_frozen_layer_is_compiled_under_freezing_and_settings_are_restored():
    from torch._inductor import config

    seen: list[bool] = []
    call = candidates._freezing(lambda x: seen.append(config.freezing) or x)
    before = config.freezing
    with torch.no_grad():
        for rows in (2, 2, 3):
            call(torch.ones(rows, K))
    assert seen == [True, before, True]  # once for each shape
    assert config.freezing == before
