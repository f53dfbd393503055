"""The bench: what it computes from times, what it calls and in which order. Nothing depends on how long it takes."""

from __future__ import annotations

import csv
import math
import time
from functools import partial
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from support import tiny_models

from int8fx import is_packed
from int8fx.tools import cli
from int8fx.tools.bench import candidates, command, machine, memory, models, plots, products, profile, report, timing
from int8fx.tools.bench.candidates import BITSANDBYTES, CANDIDATES, INT8FX, ONNXRUNTIME, Candidate
from int8fx.tools.bench.command import Options
from int8fx.tools.bench.machine import Limits
from int8fx.tools.bench.products import Settings
from int8fx.tools.bench.timing import Case, Measured, interleave
from int8fx.tools.data.models import ModelError

SHAPE = (96, 64)
OURS = tuple(c for c in CANDIDATES if not c.needs)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """A slice is a call, two weights are beyond the cache; compile caches are fresh, threads as many as before."""
    monkeypatch.setattr(timing, "SLICE", 0)
    monkeypatch.setattr(products, "last_level_cache", lambda: 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch._dynamo.reset()


@pytest.fixture
def clock(monkeypatch):
    """Time stands still, except for what calls add to it."""

    class Clock:
        now = 0.0

        def call(self, seconds):
            def run():
                self.now += seconds

            return run

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def settings(**changed) -> Settings:
    return Settings(Limits(1, reason="not asked for"), rounds=2, shapes=(SHAPE,), rows=(2, 8), **changed)


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_begin_in_turn(monkeypatch):
    monkeypatch.setattr(timing, "WARM", 0)
    order: list[str] = []
    found = interleave({label: [lambda label=label: order.append(label)] for label in "abc"}, 3)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"  # twice each to warm up
    assert [len(m.values) for m in found.values()] == [3, 3, 3]


def test_calls_take_turns_so_that_weights_are_cold(monkeypatch):
    monkeypatch.setattr(timing, "WARM", 0)
    order: list[int] = []
    interleave({"a": [lambda i=i: order.append(i) for i in range(5)]}, 6)
    assert order == [0, 1, 2, 3, 4, 0, 1, 2]


def test_values_are_seconds_a_call(clock, monkeypatch):
    monkeypatch.setattr(timing, "SLICE", 1.0)
    calls: list[float] = []

    def call():
        calls.append(clock.now)
        clock.now += 0.25

    found = interleave({"a": [call]}, 3)["a"]
    assert found.values == [0.25] * 3
    assert len(calls) == 2 + 3 * 4
    assert all(b - a == 0.25 for a, b in pairwise(calls))


def test_short_calls_are_warm(clock):
    calls: list[float] = []
    interleave({"a": [lambda: calls.append(clock.now)]}, 3)
    assert len(calls) == 2 + 3 * 2


def test_a_slow_candidate_gets_fewer_rounds_and_a_note(clock):
    seconds = {"slowest": 40.0, "slow": 3.0, "fast": 0.5}
    found = interleave({label: [clock.call(s)] for label, s in seconds.items()}, 10)
    assert {label: m.values for label, m in found.items()} == {"slowest": [40.0], "slow": [3.0] * 2, "fast": [0.5] * 10}
    assert found["slowest"].note == "1 of 10 rounds: 40.0 s a call"
    assert found["slow"].note == "2 of 10 rounds: 3.0 s a call"
    assert found["fast"].note == ""


def test_a_candidate_that_fails_is_noted_and_the_others_go_on():
    def fails():
        raise RuntimeError("no kernel\nand a long explanation")

    found = interleave({"bad": [fails], "good": [lambda: None]}, 2)
    assert found["bad"] == Measured(note="failed: RuntimeError: no kernel")
    assert len(found["good"].values) == 2


def test_ratios_and_shares_are_the_formulas():
    measured = {"a": Measured([2.0, 4.0, 3.0]), "b": Measured([4.0, 12.0, 6.0]), "none": Measured(note="not installed")}
    case = Case(
        "products", "x", "a", measured, M=3, N=5, K=7, peak=Measured([10.0, 420.0]), reads=Measured([35.0, 7.0])
    )
    assert case.ratio("b") == 2.0
    assert case.median_ratio("b") == 2.0
    assert case.share_of_peak("a") == pytest.approx(2 * 3 * 5 * 7 / 2.0 / 420.0)
    assert case.share_of_reads("b") == pytest.approx(5 * 7 / 4.0 / 35.0)
    assert math.isnan(case.ratio("none"))
    assert math.isnan(case.ratio("unheard of"))
    assert math.isnan(Case("models", "x", "a", measured).share_of_peak("a"))
    assert plots.intensity(case) == pytest.approx(2 * 3 * 5 * 7 / (5 * 7 + 2 * 3 * 7 + 2 * 3 * 5))


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_limits_are_measured_beside_other_work():
    limits = machine.limits(1, buffer=1 << 20)
    assert limits.instruction in ("tdpbssd", "vpdpbusd", "vpmaddwd", "the compiler's own")
    found = interleave({"x": [lambda: None], **limits.work()}, 3)
    peak, reads = limits.rates(found)
    assert list(found) == ["x"]
    assert len(peak.values) == len(reads.values) == 3
    assert 1e8 < peak.best < 1e15
    assert 1e6 < reads.best < 1e13


def test_the_library_sums_what_it_reads():
    limits = machine.limits(1, buffer=1 << 12)
    assert limits.library is not None
    assert limits.buffer is not None
    words = torch.arange(512)
    assert limits.library.read_words(words.data_ptr(), 512, 1) == words.sum().item()


def test_limits_without_a_compiler_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "missing-compiler")
    limits = machine.limits(1)
    assert limits.reason == "no C++ compiler: missing-compiler not found"
    assert limits.work() == {}
    assert limits.rates({"x": Measured([1.0])})[0] == Measured(note=limits.reason)


def test_cold_weights_do_not_fit_the_cache():
    assert products.weights_beyond_cache(4096, 4096, 32 << 20) == 3
    assert products.weights_beyond_cache(576, 576, 32 << 20) * 576 * 576 >= 1.5 * (32 << 20)
    assert products.weights_beyond_cache(11008, 4096, 1 << 20) == 2
    assert machine.last_level_cache() >= 1 << 18


def test_missing_packages_are_named():
    assert machine.missing("torch") == ""
    assert machine.missing("torch", "no_such_package", "nor_this") == "not installed: no_such_package, nor_this"


# ---- candidates ------------------------------------------------------------------------------------------------------


def test_inputs_have_the_outlier_columns_they_say():
    for K, count in ((4096, 6), (64, 6), (64, 64), (4, 6)):
        x = candidates.inputs(3, K, count)
        beyond = x.abs() >= 6
        assert beyond.all(0).sum() == beyond.any(0).sum() == min(count, K)
        assert x.dtype == torch.bfloat16


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_candidates_compute_the_layer(candidate):
    if reason := candidate.missing():
        pytest.skip(reason)
    layer, x = candidates.linear(*SHAPE), candidates.inputs(8, SHAPE[1], 6)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        [built] = candidates.build(candidate, [layer])
        found = built(candidate.prepare(x))
    y = torch.as_tensor(found[0] if isinstance(found, list) else found).double()
    error = (y - expected).norm() / expected.norm()
    assert error < (0.2 if candidate.name == ONNXRUNTIME else 0.04)  # which saturates without VNNI
    assert layer.weight.dtype == torch.bfloat16


# ---- suites ----------------------------------------------------------------------------------------------------------


def test_every_candidate_is_in_every_case_of_the_products(monkeypatch):
    def broken(layer):
        raise RuntimeError("cannot build")

    absent, bad = Candidate("absent", broken, needs=("no_such_package",)), Candidate("bad", broken)
    monkeypatch.setattr(products, "CANDIDATES", (*OURS, absent, bad))
    cases = list(products.products(settings()))
    assert [(c.M, c.N, c.K) for c in cases] == [(2, *SHAPE), (8, *SHAPE)]
    for case in cases:
        assert list(case.measured) == [*(c.name for c in OURS), "absent", "bad"]
        assert case.measured["absent"] == Measured(note="not installed: no_such_package")
        assert case.measured["bad"].note == "failed: RuntimeError: cannot build"
        assert all(len(case.measured[c.name].values) == 2 for c in OURS)
        assert case.ratio(INT8FX) == 1


def test_outliers_and_overhead():
    for case in products.outliers(settings()):
        assert case.base in case.measured
        assert len(case.measured) == 5
        assert not [m.note for m in case.measured.values() if m.note]
    for case in products.overhead(settings()):
        assert (case.N, case.K, case.base) == (64, 64, "F.linear")
        assert len(case.measured) == 4
        assert case.base in case.measured


def test_every_scheme_is_timed():
    cases = list(products.schemes(settings()))
    assert [(c.M, c.N, c.K) for c in cases] == [(2, *SHAPE), (8, *SHAPE)]
    for case in cases:
        assert list(case.measured) == list(products.SCHEMES)
        assert case.base in case.measured
        assert not [m.note for m in case.measured.values() if m.note]


def test_scaling_varies_one_size_at_a_time(monkeypatch):
    monkeypatch.setattr(products, "_case", lambda settings, case, work: case)
    cases = list(products.scaling(settings(quick=True, threads=2)))
    assert {case.name for case in cases} >= {"against M", "against N, M = 1", "against K, M = 1"}
    for case in cases:
        assert case.measured == {}
    assert torch.get_num_threads() == 1


@pytest.fixture
def tiny_lm(monkeypatch):
    """Stands in for every model; compiled without Inductor."""
    from transformers import LlamaForCausalLM

    config = tiny_models.lm_config(tie_word_embeddings=False)
    monkeypatch.setattr(models, "load", lambda name, layers: LlamaForCausalLM(config).bfloat16().eval())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(models, "CACHE", 7)
    monkeypatch.setattr(models, "NEW_TOKENS", 3)
    monkeypatch.setattr(models, "MODELS", ("tiny",))


def test_models_in_every_form_run_every_case(tiny_lm, monkeypatch):
    absent = models.Form("absent", lambda model: model, needs=("no_such_package",))
    forms = [form for form in models.FORMS if not models.missing(*form.needs)]
    monkeypatch.setattr(models, "FORMS", (*forms, absent))
    cases = list(models.models(settings(quick=True)))
    headed = [f"forward, {models.HEAD_16}", f"forward, {models.HEAD_8}"]
    names = ["forward, 64 tokens", *headed]
    names += [f"decode, batch 1, {models.HEAD_16}", f"decode, batch 1, {models.HEAD_8}", "generate(), 3 tokens, eager"]
    assert [case.name for case in cases] == names
    for case in cases:
        assert case.subject == "tiny, 2 layers"
        assert case.measured.pop("absent") == Measured(note="not installed: no_such_package")
        if case.name in headed:
            assert list(case.measured) == list(models.HEADED)
        assert not [m.note for m in case.measured.values() if m.note]
        assert all(len(m.values) == 2 for m in case.measured.values())
        assert case.ratio(INT8FX) == 1
        expected = [form.name for form in forms if form.compiled or form.name == BITSANDBYTES or case != cases[-1]]
        assert list(case.measured)[:1] == expected[:1]


def test_both_batches_decode_in_a_full_run(tiny_lm, monkeypatch):
    monkeypatch.setattr(models, "FORMS", [form for form in models.FORMS if form.name == INT8FX])
    monkeypatch.setattr(models, "TOKENS", 8)
    names = [case.name for case in models.models(settings())]
    assert [name for name in names if name.startswith("decode")] == [
        f"decode, batch {batch}, {head}" for batch in (1, 8) for head in (models.HEAD_16, models.HEAD_8)
    ]


def test_a_decode_step_begins_anew_when_the_cache_is_full(tiny_lm):
    contender = models.contend(models.load("", 2), models.FORMS[0])
    contender.compiled = False
    torch.manual_seed(0)
    with torch.no_grad():
        step = models.decode_step(contender, 2)
        found = [step() for _ in range(2 * (models.CACHE - models.PROMPT))]
    assert found[0].shape == (2, 1, 64)
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


def test_forms_convert_copies(tiny_lm):
    model = models.load("", 2)
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    for form in models.FORMS:
        if not models.missing(*form.needs):
            contender = models.contend(model, form)
            assert (contender.heads[models.HEAD_16] is contender.heads[models.HEAD_8]) == (not form.converts_head)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    ours = models.contend(model, models.FORMS[0])
    assert is_packed(ours.decoder.layers[0].mlp.down_proj)
    assert is_packed(ours.heads[models.HEAD_8])
    assert not is_packed(ours.heads[models.HEAD_16])


def test_random_models_have_the_outliers_of_trained_ones():
    from int8fx.tools.bench.models import SMALL, load

    torch.manual_seed(0)
    model = load(SMALL, 1)
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.randint(0, 49152, (1, 64)))
    outliers = (seen[0].flatten(0, -2).abs() >= 6).any(0)
    assert outliers.sum() == products.OUTLIERS


def test_a_model_that_cannot_be_had_is_listed(monkeypatch):
    def load(name, layers):
        raise ModelError("no network\nadvice")

    monkeypatch.setattr(models, "load", load)
    for suite in (models.models, profile.profile):
        cases = list(suite(settings()))
        assert [case.subject for case in cases] == list(models.MODELS)
        assert all(case.measured[INT8FX].note == "not run: no network" for case in cases)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("int8fx::quantize_rowwise", "quantisation"),
        ("int8fx::linear_quantized", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("graph_0_cpp_fused__to_copy_add_mean_mul_pow_rsqrt_5", "norms"),
        ("graph_0_cpp_fused_cat_neg_slice_transpose_view_1", "fused by Inductor"),
        ("aten::view", "the rest"),
    ],
)
def test_kernels_have_a_kind(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_a_profile_adds_up(tiny_lm):
    cases = list(profile.profile(settings(quick=True)))
    assert [case.name for case in cases] == [*profile.KINDS, profile.WHOLE]
    for form in profile.PROFILED:
        parts = [case.measured[form].values for case in cases]
        assert all(len(values) == 3 for values in parts)
        assert all(sum(round_[:-1]) == pytest.approx(round_[-1]) for round_ in zip(*parts, strict=True))
    products_, quantisation = (
        next(case for case in cases if case.name == kind) for kind in ("products", "quantisation")
    )
    assert all(min(products_.measured[form].values) > 0 for form in profile.PROFILED)
    assert max(quantisation.measured[models.BFLOAT16].values) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_converted_model(monkeypatch, tied):
    """Counted by hand, in this process; the peak is only there."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_models.lm_config(tie_word_embeddings=tied)).bfloat16().eval()
    linears = [m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    unique = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    expected = sum(unique.values()) - sum(N * K - 4 * N for N, K in linears)
    monkeypatch.setattr(memory, "load", lambda name, layers: model)
    found = memory.main("", None, 8, True, 1)
    assert found[memory.IDEAL] == expected
    assert found[memory.BYTES] <= 1.02 * expected
    assert found[memory.PEAK] > 0


def test_memory_is_measured_in_processes_of_their_own(monkeypatch, capsys):
    def measure(name, layers, tokens, convert, threads):
        if name == models.LARGE:
            return {"note": "failed: MemoryError"}
        return {memory.BYTES: 60.0, memory.LIVE: 65.0, memory.PEAK: 90.0} | ({memory.IDEAL: 50.0} if convert else {})

    monkeypatch.setattr(memory, "measure", measure)
    cases = list(memory.memory(settings(quick=True)))
    assert [case.subject for case in cases] == [f"{name}, 2 layers" for name in models.MODELS for _ in range(3)]
    assert cases[0].measured[INT8FX].note == "failed: MemoryError"
    assert [case.ratio(INT8FX) for case in cases[3:]] == [1.2, 1.3, 1.0]
    report.show(Console(width=200), cases)
    assert "1.200x" in capsys.readouterr().out


def test_a_process_reports_its_memory():
    found = memory.measure(models.SMALL, 1, 8, True, 1)
    assert set(found) == {memory.IDEAL, memory.BYTES, memory.LIVE, memory.PEAK}
    assert found[memory.BYTES] < found[memory.PEAK]
    failed = memory.measure("no such model", 1, 8, True, 1)
    assert failed == {"note": f"failed: ValueError: no model 'no such model'; legal: {', '.join(models.MODELS)}"}


# ---- report ----------------------------------------------------------------------------------------------------------


def case(suite: str, M: int | None = 4, **changed) -> Case:
    measured = {INT8FX: Measured([0.5, 0.7]), BITSANDBYTES: Measured(note="not installed: bitsandbytes")}
    measured["slow"] = Measured([2.5], "1 of 2 rounds: 2.5 s a call")
    sizes = {"N": 96, "K": 64} if M else {}
    limits = {"peak": Measured([1e6, 2e6]), "reads": Measured([1e5, 2e5])}
    return Case(suite, "[96, 64]", INT8FX, measured, M, **sizes, **limits | changed)


def test_csv_has_a_row_for_each_candidate(tmp_path):
    known = machine.describe(2)
    report.write_csv(tmp_path / "bench.csv", [case("products"), case("models", None)], known)
    with open(tmp_path / "bench.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert tuple(rows[0]) == report.COLUMNS
    ours, absent, slow = rows[:3]
    assert all(ours[name] for name in ("date", "machine", "isa", "threads", "versions", "python"))
    assert "torch 2" in ours["versions"]
    assert (ours["best"], ours["median"], ours["ratio"], ours["rounds"]) == ("0.5", "0.6", "1", "2")
    assert (ours["M"], ours["N"], ours["K"], ours["peak_ops"]) == ("4", "96", "64", "2e+06")
    assert float(ours["share_of_peak"]) == pytest.approx(2 * 4 * 96 * 64 / 0.5 / 2e6)
    assert (absent["best"], absent["ratio"], absent["note"]) == ("", "", "not installed: bitsandbytes")
    assert (slow["ratio"], slow["note"]) == ("5", "1 of 2 rounds: 2.5 s a call")
    assert rows[3]["M"] == rows[3]["share_of_peak"] == ""


def test_tables_name_who_is_missing_and_who_is_slow(capsys):
    console = Console(width=130, highlight=False, markup=False)
    report.show(console, [case("products"), case("products", 16, reads=Measured(note="no compiler"))])
    output = capsys.readouterr().out
    assert "bitsandbytes: not installed: bitsandbytes\n" in output
    assert "slow: 1 of 2 rounds: 2.5 s a call" in output
    assert "limits were not measured: no compiler (M = 16)" in output
    assert "2500  5.00x*" in output
    assert "of it, int8fx" in output


@pytest.mark.parametrize("suite", list(report.TITLES))
def test_every_suite_has_a_table(suite, capsys):
    report.show(Console(width=130), [case(suite)])
    assert report.TITLES[suite] in capsys.readouterr().out


def test_plots_are_drawn(tmp_path):
    scaling = [case("scaling", M) for M in (1, 2)] + [case("scaling", M) for M in (1, 2)]
    for c, name in zip(scaling, ["against M"] * 2 + ["against threads, M = 1"] * 2, strict=True):
        c.name = name
    drawn = plots.draw([case("products"), case("products", 16), *scaling], tmp_path, "a machine")
    assert sorted(path.name for path in drawn) == ["roofline.png", "scaling.png", "time_against_m.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots.draw([case("models", None)], tmp_path, "") == []
    unlimited = case("products", peak=Measured(note="no compiler"))
    assert [path.name for path in plots.draw([unlimited], tmp_path, "")] == ["time_against_m.png"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The products suite on one small shape with int8fx, float32 and bfloat16; the machine's limits from 1 MiB."""
    monkeypatch.setattr(products, "CANDIDATES", OURS)
    monkeypatch.setattr(products, "QUICK_SHAPES", (SHAPE,))
    monkeypatch.setattr(products, "QUICK_ROWS", (1, 8))
    monkeypatch.setattr(command, "limits", lambda threads: machine.limits(threads, buffer=1 << 20))


def test_a_whole_run(tiny, tmp_path, capsys):
    arguments = ["bench", "--products", "--outliers", "--quick", "--rounds", "2", "--threads", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path / "new" / "folder")]) == 0
    output = capsys.readouterr().out
    assert report.TITLES["products"] in output
    assert report.TITLES["outliers"] in output
    assert report.TITLES["overhead"] not in output
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["bench.csv", "roofline.png", "time_against_m.png"]


def test_an_interrupted_run_keeps_what_it_has(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(settings):
        yield from products.products(settings)
        raise KeyboardInterrupt

    monkeypatch.setitem(command.SUITES, "products", interrupted)
    assert cli.main(["bench", "--products", "--quick", "--rounds", "1", "--output", str(tmp_path)]) == 130
    assert (tmp_path / "bench.csv").exists()
    assert capsys.readouterr().err.endswith("int8fx bench: interrupted\n")


def test_a_failure_of_int8fx_is_the_exit_code(tmp_path, monkeypatch, capsys):
    failed = Case("products", "x", INT8FX, {INT8FX: Measured(note="failed: ValueError: wrong")}, 1, 1, 1)
    monkeypatch.setitem(command.SUITES, "products", lambda settings: iter([failed]))
    assert command.run(Options(("products",), output=tmp_path)) == 1
    assert "failed: ValueError: wrong" in capsys.readouterr().out


def test_threads_are_put_back(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setitem(command.SUITES, "products", lambda settings: iter(seen.append(torch.get_num_threads()) or ()))
    assert command.run(Options(("products",), threads=2, output=tmp_path)) == 0
    assert (seen, torch.get_num_threads()) == ([2], 1)
    assert ("OMP_PROC_BIND" in capsys.readouterr().out) == (not __import__("os").environ.get("OMP_PROC_BIND"))


def test_all_suites_of_the_command_line_exist():
    assert list(cli.SUITES) == list(command.SUITES)
    assert set(cli.SUITES) <= set(report.TITLES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds is 0; legal: 1 or more"),
        (["--threads", "-1"], "--threads is -1; legal: 1 or more"),
        (["--device", "cuda", "--threads", "2"], "--threads is 2 with --device cuda; legal: with cpu"),
    ],
)
def test_wrong_arguments_are_explained(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_what_the_bench_needs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == 'int8fx bench needs matplotlib: pip install "int8fx[bench]"\n'
