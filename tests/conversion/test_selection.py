"""``select`` and ``skip``."""

import pytest
from support import models
from support.conversion import converted_names, reasons
from torch import nn

import int8fx
from int8fx.conversion.packed import PackedModule
from int8fx.conversion.selection import Names

LAYER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ALL = {
    f"model.layers.{i}.{'mlp' if 'gate' in n or 'up' in n or 'down' in n else 'self_attn'}.{n}"
    for i in (0, 1)
    for n in LAYER
}


@pytest.mark.parametrize(
    ("select", "skip", "expected"),
    [
        (None, (), ALL),
        (None, "q_proj", {n for n in ALL if "q_proj" not in n}),
        (None, ["layers.0", "down_proj"], {n for n in ALL if "layers.0" not in n and "down_proj" not in n}),
        (
            None,
            lambda name, module: getattr(module, "out_features", 0) == 136,
            {n for n in ALL if "gate" not in n and "up_proj" not in n},
        ),
        ("q_proj", (), {n for n in ALL if "q_proj" in n}),
        ("model.layers.1.mlp.up_proj", (), {"model.layers.1.mlp.up_proj"}),
        ("model.layers.*.q_proj", (), {n for n in ALL if "q_proj" in n}),
        ("*.layers.?.mlp.[gu]*_proj", (), {n for n in ALL if "gate" in n or "up_proj" in n}),
        ("mlp.down_proj", (), {n for n in ALL if "down_proj" in n}),
        (["q_proj", "k_proj"], "layers.1", {n for n in ALL if "layers.0" in n and ("q_proj" in n or "k_proj" in n)}),
        (("lm_head",), (), {"lm_head"}),
        (["lm_head", "layers"], (), ALL | {"lm_head"}),
        ((p for p in ("q_proj", "lm_head")), (), {n for n in ALL if "q_proj" in n} | {"lm_head"}),
        (lambda name, module: isinstance(module, nn.Linear), (), ALL | {"lm_head"}),
        (lambda name, module: True, "lm_head", ALL),
        (lambda name, module: name.endswith("q_proj") and "0" in name, (), {"model.layers.0.self_attn.q_proj"}),
    ],
)
def test_what_is_converted(select, skip, expected):
    model, _ = models.llama()
    assert converted_names(int8fx.convert(model, select=select, skip=skip)) == expected
    assert {n for n, m in model.named_modules() if isinstance(m, PackedModule)} == expected


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("a.b.c", "b", True),
        ("a.b.c", "a.b", True),
        ("a.b.c", "b.c", True),
        ("a.b.c", "a.c", False),
        ("a.bb.c", "b", False),
        ("a.b.c", "a.*", True),
        ("a.b.c", "*", True),
        ("a.b.c", "b.*", False),
        ("a.b.c", "?.b.c", True),
        ("a.b.c", "A.b.c", False),
        ("a.b1.c", "a.b[0-9].c", True),
        ("", "a", False),
    ],
)
def test_patterns_match_whole_names_or_runs_of_whole_parts(name, pattern, hit):
    assert Names(pattern, "select")(name, nn.Linear(1, 1)) is hit


@pytest.mark.parametrize("argument", ["select", "skip"])
@pytest.mark.parametrize(
    ("typo", "close"),
    [
        ("model.layers.0.self_attn.q_prj", "model.layers.0.self_attn.q_proj"),
        ("lm_heads", "lm_head"),
        ("model.layer.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("q_prj", "q_proj"),
        ("mpl.up_proj", "mlp.up_proj"),
    ],
)
def test_a_typing_error_raises_and_names_what_is_close(argument, typo, close):
    model, _ = models.llama()
    with pytest.raises(ValueError, match=f"{argument}: '{typo}' matches no layer of this model; close: .*{close}"):
        int8fx.convert(model, **{argument: ["up_proj", typo]})
    assert not converted_names(model)


def test_nothing_close():
    model, _ = models.llama()
    with pytest.raises(ValueError, match=r"select: '@@@@' matches no layer of this model$"):
        int8fx.convert(model, select="@@@@")


@pytest.mark.parametrize("selection", [[3], [None], [["q_proj"]], ["q_proj", b"k_proj"]])
@pytest.mark.parametrize("argument", ["select", "skip"])
def test_patterns_are_strings(selection, argument):
    model, _ = models.llama()
    with pytest.raises(TypeError, match=f"{argument} takes name patterns or a function"):
        int8fx.convert(model, **{argument: selection})
    assert not converted_names(model)


@pytest.mark.parametrize("argument", ["select", "skip"])
def test_a_selection_of_another_kind_is_a_type_error(argument):
    model, _ = models.llama()
    with pytest.raises(TypeError, match=f"{argument} takes name patterns or a function"):
        int8fx.convert(model, **{argument: 3})


def test_a_function_that_raises_leaves_the_model():
    model, _ = models.llama()

    def broken(name, module):
        raise KeyError(name)

    with pytest.raises(KeyError):
        int8fx.convert(model, select=broken)
    assert not converted_names(model)


def test_an_empty_selection_converts_nothing_and_says_so():
    model, _ = models.llama()
    with pytest.warns(UserWarning, match=r"no layer was converted; int8fx.summary\(model\) says why"):
        assert int8fx.convert(model, select=[]) is model
    assert not converted_names(model)
    assert {reasons(model)[name] for name in ALL} == {"not selected"}


def test_reasons():
    model, _ = models.llama()
    int8fx.convert(model, skip="q_proj")
    left = reasons(model)
    assert left["model.layers.0.self_attn.q_proj"] == "skipped"
    assert left["lm_head"] == "the output embeddings: left in 16 bits unless selected"
    assert left["model.embed_tokens"] == "an embedding: rows are looked up, no matmul"


def test_parameters_of_other_names_are_selected_by_them():
    model, _ = models.bare_products()
    int8fx.convert(model, select=["linear", "einsum*"], skip="einsum_t")
    assert converted_names(model) == {"linear", "einsum", "einsum_experts", "einsum_experts_t"}
    model, _ = models.transformer()
    int8fx.convert(model, select="self_attn.in_proj_weight", skip="decoder")
    assert converted_names(model) == {f"encoder.layers.{i}.self_attn.in_proj_weight" for i in (0, 1)}


def test_a_shared_module_may_be_called_by_any_of_its_names():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(8, 8)})
    assert converted_names(int8fx.convert(model, select="second")) == {"first"}
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(8, 8)})
    assert converted_names(int8fx.convert(model, skip="second")) == {"other"}
