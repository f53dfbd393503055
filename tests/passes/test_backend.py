"""``torch.compile(backend="int8fx")``: the passes, without a change of Inductor's configuration."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._inductor.config as config
from support import models
from support.compiled import without_cpp
from support.graphs import random
from support.installed import BEFORE_OURS, REPORT, Bare, Foreign, converted, run, state
from torch.fx import Graph

import int8fx
from int8fx.passes.inductor import PASSES, uninstall

pytestmark = pytest.mark.usefixtures("nothing_installed")


def test_backend_needs_nothing_installed_and_leaves_the_configuration():
    model, x, expected = converted()
    uninstall()
    before = state()
    assert "int8fx" in torch._dynamo.list_backends()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*int8fx.*")
        assert torch.equal(run(model, x, backend="int8fx"), expected)
    assert int8fx.reports() == [REPORT]
    assert config.joint_custom_pre_pass is None
    assert state() == before


@pytest.mark.parametrize("installed", [False, True])
def test_backend_runs_the_passes_of_others_and_ours_once(installed):
    foreign = Foreign()
    model, x, expected = converted()
    config.joint_custom_pre_pass = [foreign, PASSES] if installed else foreign
    assert torch.equal(run(model, x, backend="int8fx"), expected)
    assert foreign.seen == [BEFORE_OURS]
    assert len(int8fx.reports()) == 1


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
    assert len(int8fx.reports()) == 1


def test_backend_refuses_an_unknown_option():
    model, x, _ = converted()
    with pytest.raises(Exception, match="no_such_option"):
        run(model, x, backend="int8fx", options={"no_such_option": 1})


def test_backend_warns_about_a_model_that_is_not_converted():
    with pytest.warns(UserWarning, match=r"int8fx: no packed weight.*int8fx\.convert"):
        run(Bare().eval(), random(5, 24), backend="int8fx")


@pytest.mark.slow
def test_every_kind_of_matmul_with_a_bare_parameter_is_lowered():
    model, inputs = models.bare_products()
    int8fx.convert(model)
    uninstall()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=without_cpp)(**inputs)
        assert not int8fx.reports()
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True, backend="int8fx")(**inputs)
    [report] = int8fx.reports()
    assert (report.lowered, report.linears, report.dequantized) == (len(model.OPERANDS), len(model.OPERANDS), 0)
