"""``int8fx bench``: what it runs, prints and writes."""

import os

import pytest
import torch

from int8fx.tools import cli
from int8fx.tools.bench import command, products
from int8fx.tools.bench.candidates import INT8FX
from int8fx.tools.bench.settings import Settings
from int8fx.tools.bench.suites import SUITES
from int8fx.tools.bench.timing import Case, Measured


@pytest.fixture
def measure_instead(monkeypatch):
    """Replaces what the products suite measures."""

    def replace(measure):
        monkeypatch.setitem(SUITES, "products", SUITES["products"]._replace(on_cpu=measure))

    return replace


@pytest.mark.slow
def test_a_run_prints_tables_and_writes_files(tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    settings = Settings(("products", "outliers"), quick=True, rounds=2, output=output, shapes=((96, 64),), rows=(8,))
    assert command.run(settings) == 0
    text = capsys.readouterr().out
    assert SUITES["products"].title in text
    assert SUITES["outliers"].title in text
    assert SUITES["overhead"].title not in text
    assert sorted(path.name for path in output.iterdir()) == ["bench.csv", "roofline.png", "time_against_m.png"]


def test_an_interrupted_run_writes_what_it_has(measure_instead, tmp_path, capsys):
    def interrupted(settings):
        yield from products.compare(settings, "products", 96, 64, (8,), (INT8FX,))
        raise KeyboardInterrupt

    measure_instead(interrupted)
    assert cli.main(["bench", "--products", "--quick", "--rounds", "1", "--output", str(tmp_path)]) == 130
    assert (tmp_path / "bench.csv").exists()
    assert capsys.readouterr().err.endswith("int8fx bench: interrupted\n")


def test_a_failure_of_int8fx_is_the_exit_code(measure_instead, tmp_path, capsys):
    name = INT8FX.name
    failed = Case("products", "x", name, {name: Measured(note="failed: ValueError: wrong")}, 1, 1, 1)
    measure_instead(lambda settings: iter([failed]))
    assert command.run(Settings(("products",), output=tmp_path)) == 1
    assert "failed: ValueError: wrong" in capsys.readouterr().out


def test_threads_are_set_and_restored(measure_instead, tmp_path, capsys):
    before = torch.get_num_threads()
    threads = []
    measure_instead(lambda settings: iter(threads.append((torch.get_num_threads(), settings.num_threads)) or ()))
    assert command.run(Settings(("products",), threads=before + 1, output=tmp_path)) == 0
    assert threads == [(before + 1, before + 1)]
    assert torch.get_num_threads() == before
    assert ("OMP_PROC_BIND" in capsys.readouterr().out) == (not os.environ.get("OMP_PROC_BIND"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert cli.main(["bench", "--device", "cuda", "--output", str(tmp_path)]) == 1
    assert "int8fx bench --device cuda: torch sees no CUDA or ROCm device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_suite_that_the_device_lacks_is_refused(tmp_path, capsys):
    assert cli.main(["bench", "--device", "cuda", "--outliers", "--output", str(tmp_path)]) == 1
    assert "no suite outliers for this device; legal: products, weights, models" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; legal: 1 or more"),
        (["--threads", "-1"], "--threads is -1; legal: 1 or more"),
        (["--device", "cuda", "--threads", "2"], "--threads is 2 with --device cuda; legal: with cpu"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_bench_needs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == 'int8fx bench needs matplotlib: pip install "int8fx[bench]"\n'
