"""``int8fx bench --device cuda`` without a GPU: the checks in the interpreter, recording and reporting on stand-ins."""

import csv
import math
import time
from contextlib import contextmanager

import pytest
import torch
from int8fx.triton_kernels import configs
from rich.console import Console
from support import interpreter

from int8fx.ops import gpu
from int8fx.tools import cli
from int8fx.tools.bench import check, cuda, models, timing
from int8fx.tools.bench.candidates import BFLOAT16, BITSANDBYTES, INT8FX
from int8fx.tools.bench.command import Options
from int8fx.tools.bench.cuda import Recorded
from int8fx.tools.bench.models import Form

SMALL = {"rows": (1, 3, 65), "sizes": ((17, 70),)}


# ---- the checks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_tile(monkeypatch):
    """A small tile for any shape: the interpreter takes its time for large ones."""
    monkeypatch.setattr(configs, "int8_matmul", lambda *args: (configs.Config(32, 32, 64, 4, 2),))


@pytest.mark.parametrize("dtype", check.DTYPES)
def test_the_kernels_agree_with_the_reference(dtype, monkeypatch, one_tile):
    monkeypatch.setattr(check, "DTYPES", (dtype,))
    made = list(check.checks("cpu", **SMALL))
    assert len(made) == 3 * (14 + len(configs.tiles(dtype, "sm_80", epilogue=False)))
    assert len({found.name for found in made}) == len(made)
    assert [(found.name, found.worst) for found in made if not found.right] == []


def test_a_kernel_that_is_wrong_is_named(monkeypatch, one_tile):
    """One element in a hundred, off by one part in a hundred; a code off by one; NaN."""
    monkeypatch.setattr(check, "DTYPES", (torch.bfloat16,))
    linear, quantize = gpu.linear, gpu.quantize_rowwise

    def wrong_linear(*args):
        y = linear(*args)
        y.view(-1)[::100] *= 1.01 if len(args) < 10 else math.nan
        return y

    def wrong_quantize(*args):
        codes, *rest = quantize(*args)
        codes[0, 0] += 1
        return codes, *rest

    monkeypatch.setattr(gpu, "linear", wrong_linear)
    monkeypatch.setattr(gpu, "quantize_rowwise", wrong_quantize)
    wrong = [found for found in check.checks("cpu", rows=(65,), sizes=((17, 70),)) if not found.right]
    kernels = [found.name.split(":")[0] for found in wrong]
    assert {"quantize_rowwise, threshold 6", "linear, weights only", "linear, threshold 6, columns kept"} <= set(
        kernels
    )
    assert all(found.worst > 1 for found in wrong)


# ---- recording -------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for CUDA graphs: a replay runs what was captured; ``fails`` makes captures fail."""

    class Graph:
        replays = 0
        fails = False

        def replay(self):
            Graph.replays += 1

    @contextmanager
    def capture(graph):
        if Graph.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "_seconds", lambda call: 1e-3)
    return Graph


def test_calls_are_recorded_in_turns_until_a_graph_is_long_enough(graphs, monkeypatch):
    calls = []
    monkeypatch.setattr(cuda, "GRAPH_SECONDS", 5e-3)
    recorded = cuda.record([lambda i=i: calls.append(i) for i in range(2)])
    assert calls == [0, 1, 0, 1, 0, 1, 0]  # once before, five of a millisecond each in the graph
    assert (recorded.calls, recorded.note) == (5, "")
    recorded.run()
    assert (graphs.replays, len(calls)) == (1, 7)


def test_what_cannot_be_captured_is_called_one_by_one(graphs, monkeypatch):
    monkeypatch.setattr(graphs, "fails", True)
    calls = []
    recorded = cuda.record([lambda: calls.append(0)])
    assert recorded.note == "no CUDA graph: operation not permitted when stream is capturing"
    recorded.run()
    assert len(calls) == 1 + recorded.calls


# ---- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert cli.main(["bench", "--device", "cuda", "--output", str(tmp_path)]) == 1
    assert "int8fx bench --device cuda: torch sees no CUDA or ROCm device" in capsys.readouterr().out
    assert cli.main(["bench", "--device", "cuda", "--outliers", "--output", str(tmp_path)]) == 1
    assert "no suite outliers for this device; legal: products, models" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.fixture
def forms(monkeypatch):
    """Eager forms only, and one that is not installed."""
    eager = [Form(f.name, f.convert, compiled=False, converts_head=f.converts_head) for f in cuda.FORMS[:3]]
    absent = Form(BITSANDBYTES, lambda model: model, compiled=False, needs=("no_such_package",))
    monkeypatch.setattr(cuda, "FORMS", (*eager, absent))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.fixture
def gpu_of_paper(monkeypatch, forms, one_tile, tmp_path):
    """The CPU stands in for a GPU whose clock moves by what each form is said to take."""
    seconds = {INT8FX: 1e-3, cuda.ROTATED: 2e-3, BFLOAT16: 4e-3, cuda.READS: 1e-2, cuda.PEAK: 1e-2}
    now = 0.0
    recorded = []

    def record(calls):
        name = list(seconds)[len(recorded) % len(seconds)]
        recorded.append(name)
        calls[0]()

        def run():
            nonlocal now
            now += 10 * seconds[name]

        return Recorded(run, 10)

    class Properties:
        L2_cache_size = 1

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(timing, "SLICE", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of paper")
    monkeypatch.setattr(cuda, "record", record)
    monkeypatch.setattr(cuda, "READ_BYTES", 4096)
    monkeypatch.setattr(cuda, "PEAK_SIDE", 32)
    monkeypatch.setattr(cuda, "QUICK_SHAPES", ((96, 64),))
    monkeypatch.setattr(cuda, "QUICK_ROWS", (1, 16))
    monkeypatch.setattr(check, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(cuda, "checks", lambda device: check.checks(device, rows=(5,), sizes=((33, 100),)))
    return tmp_path


def test_the_command_checks_then_times_then_writes(gpu_of_paper, capsys):
    options = Options(("products",), quick=True, rounds=2, output=gpu_of_paper, device="cuda")
    assert cuda.run(options, Console(width=150, highlight=False, markup=False), "cpu") == 0
    output = capsys.readouterr().out
    assert "a GPU of paper, sm_80" in output
    assert "18 of 18 checks of the kernels agree with the reference" in output
    with open(gpu_of_paper / "bench-cuda.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["candidate"], row["M"]) for row in rows[:4]] == [
        (INT8FX, "1"), (cuda.ROTATED, "1"), (BFLOAT16, "1"), (BITSANDBYTES, "1"),
    ]  # fmt: skip
    ours, rotated, plain, absent = rows[:4]
    assert (ours["best"], rotated["ratio"], plain["ratio"]) == ("0.001", "2", "4")
    assert absent["note"] == "not installed: no_such_package"
    assert (ours["machine"], ours["isa"]) == ("a GPU of paper", "sm_80")
    assert "triton 3" in ours["versions"]
    reads, peak = 4096 / 1e-2, 2 * 32**3 / 1e-2
    assert float(ours["read_bytes_per_s"]) == pytest.approx(reads)
    assert float(ours["peak_ops"]) == pytest.approx(peak, rel=1e-5)
    floor = max(96 * 64 / reads, 2 * 96 * 64 / peak)  # of one row
    (line,) = [line for line in output.splitlines() if "[96, 64], M = 1 " in line]
    assert f"{floor * 1e6:.3g}" in line
    assert f"{floor / 1e-3:.0%}" in line


def test_nothing_is_timed_if_a_kernel_is_wrong(gpu_of_paper, capsys, monkeypatch):
    monkeypatch.setattr(cuda, "checks", lambda device: [check.Check("linear, somewhere", 3.0)])
    monkeypatch.setattr(cuda, "record", lambda calls: pytest.fail("timed"))
    assert cuda.run(Options(quick=True, output=gpu_of_paper, device="cuda"), Console(width=150), "cpu") == 1
    output = capsys.readouterr().out
    assert "wrong: linear, somewhere: 3 times the error that is legal" in output
    assert "nothing is timed" in output
    assert not list(gpu_of_paper.iterdir())


def test_whole_models_are_converted_in_every_form(forms, one_tile, monkeypatch):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def load(name, layers):
        config = Qwen2Config(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        return Qwen2ForCausalLM(config).bfloat16().eval()

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "TOKENS", 8)
    with interpreter.cpu_tensors_on_triton():
        cases = list(cuda.whole_models(cuda.Settings(1, quick=True, device="cpu")))
    assert [case.name.split(",")[0] for case in cases] == ["forward"] * 3 + ["decode"] * 2
    for case in cases:
        assert [name for name, found in case.measured.items() if found.values] == [INT8FX, cuda.ROTATED, BFLOAT16]
        assert case.measured[BITSANDBYTES].note == "not installed: no_such_package"
