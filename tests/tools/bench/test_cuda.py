"""The suites on a GPU, where there is one."""

import csv

import pytest
import torch

from int8fx.tools.bench import command
from int8fx.tools.bench.candidates import FOR_GPU_WEIGHTS, FOR_GPUS
from int8fx.tools.bench.settings import Settings
from int8fx.tools.bench.suites import SUITES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device")


@pytest.mark.parametrize(("suite", "candidates"), [("products", FOR_GPUS), ("weights", FOR_GPU_WEIGHTS)])
def test_a_run_checks_then_times_then_writes(suite, candidates, tmp_path, capsys):
    settings = Settings(
        (suite,), quick=True, rounds=2, output=tmp_path, device="cuda", shapes=((96, 128),), rows=(1, 16)
    )
    assert command.run(settings) == 0
    output = capsys.readouterr().out
    assert "checks of the kernels agree with the reference" in output
    assert "Share of the floor" in output
    with open(tmp_path / "bench-cuda.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["candidate"], row["M"]) for row in rows] == [(c.name, M) for M in ("1", "16") for c in candidates]
    assert all(float(row["peak_ops"]) > 1e12 and float(row["read_bytes_per_s"]) > 1e10 for row in rows)
    assert all(row["best"] or row["note"] for row in rows)


def test_models_run():
    cases = list(SUITES["models"].on_gpu(Settings(quick=True, rounds=1, device="cuda")))
    assert [case.name.split(",")[0] for case in cases] == ["forward"] * 3 + ["decode"] * 2
    assert all(case.measured[case.base].values for case in cases)
