"""The passes inside Inductor: installed next to those of others, run once, cached until a source changes."""

from __future__ import annotations

import ast
import copy
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch._inductor.config as config
from support.graphs import aten, ops
from support.helpers import unit_roundoff
from support.installed import AFTER_OURS, BEFORE_OURS, REPORT, Bare, Foreign, converted, run, state
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import int8fx
from int8fx.passes import Report, inductor
from int8fx.passes.inductor import PASSES, install, installed_passes, uninstall

pytestmark = pytest.mark.usefixtures("nothing_installed")


# ---- install and uninstall -------------------------------------------------------------------------------------------


def test_install_twice_is_once():
    install()
    install()
    assert config.joint_custom_pre_pass == installed_passes() == [PASSES]
    uninstall()
    assert config.joint_custom_pre_pass is None


@pytest.mark.parametrize("form", ["one", "a list", "a tuple"])
def test_a_foreign_pass_stays_in_front(form):
    foreign = Foreign()
    present = {"one": foreign, "a list": [foreign], "a tuple": (foreign,)}[form]
    config.joint_custom_pre_pass = present
    install()
    install()
    assert installed_passes() == [foreign, PASSES]
    uninstall()
    uninstall()
    assert installed_passes() == [foreign]


def test_uninstall_keeps_what_came_later():
    install()
    foreign = Foreign()
    config.joint_custom_pre_pass = [*config.joint_custom_pre_pass, foreign]
    uninstall()
    assert installed_passes() == [foreign]


def test_uninstall_without_install_touches_nothing():
    present = (Foreign(),)
    config.joint_custom_pre_pass = present
    uninstall()
    assert config.joint_custom_pre_pass is present


def test_the_list_of_others_is_not_changed_in_place():
    present = [Foreign()]
    config.joint_custom_pre_pass = present
    install()
    assert len(present) == 1


def test_inductor_takes_the_passes_for_its_own_kind():
    install()
    assert isinstance(PASSES, CustomGraphPass)
    assert not isinstance(object(), CustomGraphPass)


def test_nothing_else_of_the_configuration_changes():
    model = Bare()
    before = state()
    install()
    assert state() == before
    uninstall()
    int8fx.convert(model)
    assert state() == before
    assert installed_passes() == [PASSES]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_of_the_configuration_holds_the_same_passes(copied):
    assert copied(PASSES) is PASSES
    install()
    config.load_config(config.get_config_copy())
    install()
    assert installed_passes() == [PASSES]


# ---- inside Inductor -------------------------------------------------------------------------------------------------


def test_plain_compile_runs_the_passes_between_those_of_others():
    first, last = Foreign(), Foreign()
    config.joint_custom_pre_pass = first
    model, x, expected = converted()
    config.joint_custom_pre_pass = [*config.joint_custom_pre_pass, last]
    assert torch.equal(run(model, x), expected)
    assert int8fx.reports() == [REPORT]
    assert first.seen == [BEFORE_OURS]
    assert last.seen == [AFTER_OURS]


def assert_sums(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """y is ``a @ b``, float32 sums in any order."""
    a, b = a.detach().double(), b.detach().double()
    budget = a.shape[-1] * unit_roundoff(torch.float32) * (a.abs() @ b.abs())
    assert ((y.double() - a @ b).abs() <= budget).all()


def test_after_uninstall_the_answer_is_that_of_the_dequantised_matmul():
    model, x, _ = converted()
    uninstall()
    assert_sums(run(model, x), x, model.dequantize("w"))
    assert not int8fx.reports()


def test_a_compiled_graph_is_cached(monkeypatch):
    """By Inductor's own cache of graphs; AOTAutograd's, in front of it, is off to see it."""
    model, x, expected = converted()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        hits_and_misses = []
        for uuid in (None, None, "of another version", None):
            torch._dynamo.reset()
            counters.clear()
            with monkeypatch.context() as m:
                if uuid is not None:
                    m.setattr(PASSES, "uuid", lambda uuid=uuid: uuid, raising=True)
                assert torch.equal(run(model, x), expected)
            hits_and_misses.append(tuple(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss")))
    hit, miss = (1, 0), (0, 1)
    assert hits_and_misses == [miss, hit, miss, hit]
    assert counters["inductor"]["fxgraph_cache_bypass"] == 0


def test_training_runs_the_passes():
    model, x, expected = converted()
    y = torch.compile(model, fullgraph=True)(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected)
    assert_sums(x.grad, torch.ones_like(y), model.w.T)
    assert int8fx.reports() == [Report(lowered=1, shared=0, folded=0, linears=1, dequantized=1)]


# ---- a call of the object ------------------------------------------------------------------------------------------


def test_a_graph_without_our_ops_is_left_alone():
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.mm.default, (x, x)))
    before = str(graph)
    PASSES(graph)
    assert str(graph) == before
    assert not int8fx.reports()


def test_every_run_is_reported_and_logged(caplog):
    graph = Graph()
    codes, scale = graph.placeholder("codes"), graph.placeholder("scale")
    graph.output(graph.call_function(ops.dequantize.default, (codes, scale), {"dtype": torch.float32}))
    with caplog.at_level(logging.INFO, logger="int8fx"):
        PASSES(graph)
    report = Report(lowered=0, shared=0, folded=0, linears=0, dequantized=1)
    assert int8fx.reports() == [report]
    assert str(report) in caplog.text


def test_reports_are_bounded():
    assert PASSES.reports.maxlen == 1024


# ---- the key of the cache --------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's Python files, which the passes take for their own."""
    root = Path(int8fx.__file__).parent
    for path in root.rglob("*.py"):
        copied = tmp_path / path.relative_to(root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    monkeypatch.setattr(inductor, "__file__", str(tmp_path / "passes" / "inductor.py"))
    inductor._source_hash.cache_clear()
    yield tmp_path
    inductor._source_hash.cache_clear()


def uuid() -> object:
    inductor._source_hash.cache_clear()
    return PASSES.uuid()


def test_uuid_is_that_of_the_sources(package):
    copied = uuid()
    assert isinstance(copied, str)
    assert uuid() == copied == inductor.Int8fxPasses().uuid()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "__file__", str(Path(int8fx.__file__).parent / "passes" / "inductor.py"))
        assert uuid() == copied


@pytest.mark.parametrize(
    "name",
    [
        *(f"passes/{name}" for name in ("__init__", "lower", "share", "fold")),
        *(f"graph/{name}" for name in ("views", "weights", "products", "emit", "verify", "values")),
        "ops/__init__",
        "ops/rows",
        "schemes/weight",
    ],
)
def test_uuid_changes_with_every_source_of_a_rewrite(package, name):
    before = uuid()
    with (package / f"{name}.py").open("a") as file:
        file.write("# edited\n")
    assert uuid() != before


def test_what_the_passes_import_of_int8fx_is_a_source():
    sources = inductor.sources()
    for path in sources:
        if path.parent.name in ("graph", "passes"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module != "imports":  # no rewrite
                    module = path.parents[1].joinpath(*str(node.module).split("."))
                    assert {module.with_suffix(".py"), module / "__init__.py"} & set(sources), (path, node.module)
