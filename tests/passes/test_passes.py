"""The passes inside Inductor: installed beside those of others, verified, cached, and as ``backend="int8fx"``."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch._inductor.config as config
import torch.nn.functional as F
from support.graphs import INT8_PRODUCTS, PRODUCTS, compiled, count_nodes, ops, random, weight
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.fx import Graph

import int8fx
from int8fx import passes
from int8fx.graph.verify import verify
from int8fx.passes import (
    PASSES,
    Report,
    count_ops,
    fold,
    install,
    installed_passes,
    lower,
    run_passes,
    share,
    uninstall,
)

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _nothing_installed():
    """Every test starts with Inductor's list as it comes, and leaves it so."""
    torch._dynamo.reset()
    counters.clear()
    PASSES.reports.clear()
    with config.patch(joint_custom_pre_pass=None), fresh_cache():
        yield
    torch._dynamo.reset()


class Foreign(CustomGraphPass):
    """A pass of someone else, which notes the int8fx ops and the products that it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, int], int]] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append((count_ops(graph), count_nodes(graph, *PRODUCTS)))

    def uuid(self) -> str:
        return "int8fx's tests"


BEFORE_OURS, AFTER_OURS = ({"dequantize": 1}, 1), ({"linear": 1}, 0)


class Bare(nn.Module):
    """One product with a bare Parameter. Its graph is one kernel call: Inductor has no C++ to write."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(random(24, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def converted() -> tuple[Bare, torch.Tensor, torch.Tensor]:
    """A model, an input, and what the int8 product gives."""
    model, x = int8fx.convert(Bare().eval()), random(5, 24)
    return model, x, ops.linear(x, model._buffers["w"], model._buffers["w_scale"], None, 6.0)


def run(model: nn.Module, *args: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return torch.compile(model, fullgraph=True, **options)(*args)


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


def _state() -> dict:
    import torch._dynamo.config
    import torch._functorch.config

    state = {c.__name__: c.get_config_copy() for c in (config, torch._dynamo.config, torch._functorch.config)}
    del state[config.__name__]["joint_custom_pre_pass"]
    state["torch"] = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
    state["random"] = torch.get_rng_state().tolist()
    return state


def test_nothing_else_of_the_configuration_changes():
    model = Bare()
    before = _state()
    install()
    assert _state() == before
    uninstall()
    int8fx.convert(model)
    assert _state() == before
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
    assert list(PASSES.reports) == [Report(lowered=1, shared=0, folded=0, linears=1, dequantized=0)]
    assert first.seen == [BEFORE_OURS]
    assert last.seen == [AFTER_OURS]


def test_after_uninstall_the_answer_is_that_of_the_dequantised_product():
    model, x, _ = converted()
    uninstall()
    assert torch.allclose(run(model, x), x @ model.w, rtol=0, atol=1e-5)
    assert not PASSES.reports


def test_a_compiled_graph_is_cached(monkeypatch):
    """By Inductor's own cache of graphs; AOTAutograd's, in front of it, is off to see it."""
    model, x, expected = converted()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        found = []
        for uuid in (None, None, "of another version", None):
            torch._dynamo.reset()
            counters.clear()
            with monkeypatch.context() as m:
                if uuid is not None:
                    m.setattr(PASSES, "uuid", lambda uuid=uuid: uuid, raising=True)
                assert torch.equal(run(model, x), expected)
            found.append((counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]))
    hit, miss = (1, 0), (0, 1)
    assert found == [miss, hit, miss, hit]
    assert counters["inductor"]["fxgraph_cache_bypass"] == 0


def test_training_runs_the_passes():
    model, x, expected = converted()
    y = torch.compile(model, fullgraph=True)(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.allclose(x.grad, model.w.sum(-1).expand(5, 24), rtol=0, atol=1e-5)
    assert list(PASSES.reports) == [Report(lowered=1, shared=0, folded=0, linears=1, dequantized=1)]


# ---- backend="int8fx" ------------------------------------------------------------------------------------------------


def test_backend_needs_nothing_installed_and_leaves_the_configuration():
    model, x, expected = converted()
    uninstall()
    before = _state()
    assert "int8fx" in torch._dynamo.list_backends()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*int8fx.*")
        assert torch.equal(run(model, x, backend="int8fx"), expected)
    assert list(PASSES.reports) == [Report(lowered=1, shared=0, folded=0, linears=1, dequantized=0)]
    assert config.joint_custom_pre_pass is None
    assert _state() == before


@pytest.mark.parametrize("installed", [False, True])
def test_backend_runs_the_passes_of_others_and_ours_once(installed):
    foreign = Foreign()
    model, x, expected = converted()
    config.joint_custom_pre_pass = [foreign, PASSES] if installed else foreign
    assert torch.equal(run(model, x, backend="int8fx"), expected)
    assert foreign.seen == [BEFORE_OURS]
    assert len(PASSES.reports) == 1


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max_autotune": True, "epilogue_fusion": False}},
    ],
    ids=["default", "reduce-overhead", "max-autotune", "options"],
)
def test_backend_takes_mode_and_options(how):
    """They are Inductor's: its passes see them, and only while it compiles."""
    seen = []

    def foreign(graph: Graph) -> None:
        seen.append({name: getattr(config, name) for name in wanted})

    wanted = how.get("options") or torch._inductor.list_mode_options(how["mode"])
    before = {name: getattr(config, name) for name in wanted}
    config.joint_custom_pre_pass = foreign
    model, x, expected = converted()
    uninstall()
    assert torch.equal(run(model, x, backend="int8fx", **how), expected)
    assert seen == [wanted]
    assert {name: getattr(config, name) for name in wanted} == before
    assert len(PASSES.reports) == 1


def test_backend_refuses_an_unknown_option():
    model, x, _ = converted()
    with pytest.raises(Exception, match="no_such_option"):
        run(model, x, backend="int8fx", options={"no_such_option": 1})


def test_backend_warns_about_a_model_that_is_not_converted():
    with pytest.warns(UserWarning, match=r"int8fx: no packed weight.*int8fx\.convert"):
        run(Bare().eval(), random(5, 24), backend="int8fx")


# ---- one run over one graph ------------------------------------------------------------------------------------------


def gated_mlp(x, residual, gate, up, down):
    w, v, u = (ops.dequantize(*packed, x.dtype) for packed in (gate, up, down))
    return residual + F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), u)


def mlp_arguments() -> list:
    packed = [tuple(weight(20, 24, seed=1)), tuple(weight(20, 24, seed=2)), tuple(weight(24, 20, seed=3))]
    return [random(2, 5, 24), random(2, 5, 24, seed=4), *packed]


def test_report():
    reports = []
    args = mlp_arguments()
    f, backend = compiled(gated_mlp, lambda graph: reports.append(run_passes(graph)) or 0)
    y = f(*args)
    assert reports == [Report(lowered=3, shared=1, folded=3, linears=3, dequantized=0)]
    (after,) = backend.after
    assert count_ops(after) == {"quantize_rowwise": 1, "linear_quantized": 2, "linear": 1}
    x, residual, gate, up, down = args
    g = ops.linear(x, *gate, None, 6.0, "silu", ops.linear(x, *up, None, 6.0), "mul")
    assert torch.equal(y, ops.linear(g, *down, None, 6.0, "none", residual, "add"))


def test_a_graph_without_our_ops_is_left_alone():
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.mm.default, (x, x)))
    before = str(graph)
    PASSES(graph)
    assert str(graph) == before
    assert not PASSES.reports


def test_every_run_is_reported_and_logged(caplog):
    graph = Graph()
    codes, scale = graph.placeholder("codes"), graph.placeholder("scale")
    graph.output(graph.call_function(ops.dequantize.default, (codes, scale, torch.float32)))
    with caplog.at_level(logging.INFO, logger="int8fx"):
        PASSES(graph)
    report = Report(lowered=0, shared=0, folded=0, linears=0, dequantized=1)
    assert list(PASSES.reports) == [report]
    assert str(report) in caplog.text


def test_reports_are_bounded():
    assert PASSES.reports.maxlen == 1024


# ---- the key of the cache --------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the passes' folder, which `PASSES` takes for its own."""
    folder = Path(passes.__file__).parent
    for path in folder.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(passes, "__file__", str(tmp_path / "__init__.py"))
    passes._source_hash.cache_clear()
    yield tmp_path
    passes._source_hash.cache_clear()


def test_uuid_is_that_of_the_sources(sources):
    copied = PASSES.uuid()
    passes._source_hash.cache_clear()
    assert PASSES.uuid() == copied == passes.Int8fxPasses().uuid()
    assert isinstance(copied, str)


@pytest.mark.parametrize("name", ["__init__", "fold", "lower", "products", "share", "verify"])
def test_uuid_changes_with_every_source(sources, name):
    before = PASSES.uuid()
    with (sources / f"{name}.py").open("a") as file:
        file.write("# edited\n")
    passes._source_hash.cache_clear()
    assert PASSES.uuid() != before


def test_every_replaced_node_is_verified(monkeypatch):
    verified: dict[str, list[str]] = {}
    for name in ("lower", "share", "fold"):
        seen = verified[name] = []

        def note(old, new, seen=seen):
            seen.append(old.name)
            verify(old, new)

        monkeypatch.setattr(sys.modules[f"int8fx.passes.{name}"], "verify", note)
    replaced = []

    def watched(rewrite):
        def run(graph: Graph) -> int:
            before = {node.name for node in graph.nodes}
            count = rewrite(graph)
            replaced.append(before - {node.name for node in graph.nodes})
            return count

        return run

    f, backend = compiled(gated_mlp, *map(watched, (lower, share, fold)))
    f(*mlp_arguments())
    assert backend.counts == [(3, 1, 3)]
    assert {name: len(seen) for name, seen in verified.items()} == {"lower": 3, "share": 2, "fold": 3}
    for seen, gone in zip(verified.values(), replaced, strict=True):
        assert set(seen) <= gone


@pytest.mark.parametrize("name", ["lower", "share", "fold"])
def test_a_wrong_rewrite_is_stopped(monkeypatch, name):
    """Each pass, if it built a product of another dtype."""
    module = sys.modules[f"int8fx.passes.{name}"]
    function = "emit" if name == "lower" else "call"
    build = getattr(module, function)

    def wrong(*args, **kwargs):
        node = build(*args, **kwargs)
        if node.target in INT8_PRODUCTS:
            node.meta["val"] = node.meta["val"].double()
        return node

    monkeypatch.setattr(module, function, wrong)
    f, _ = compiled(gated_mlp, lower, share, fold)
    x, residual, *packed = mlp_arguments()
    with pytest.raises(Exception, match=r"int8fx: %linear\w* : .* in the place of"):
        f(x[0], residual[0], *packed)
