"""Hostile checkpoints: a load is refused with a word and changes nothing, or gives exactly what was saved.

``HYPOTHESIS_PROFILE=thorough pytest tests/conversion/test_loading.py`` makes over 10,000 of them.
"""

import json
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save
from support.conversion import SCHEMES
from torch import Tensor, nn

import int8fx
from int8fx.conversion.format import FORMAT, VERSION, format_tensor, read_scheme
from int8fx.conversion.packed import PackedModule
from int8fx.schemes.weight import CODES, COLUMNS, COLUMNS_WEIGHT, SCALE

DATA = Path(__file__).parents[1] / "data"
NAMES = {scheme: SCHEMES[scheme] for scheme in ("llm_int8", "rotated columns")}


def model_of(scheme: int8fx.Scheme, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(40, 24), "norm": nn.LayerNorm(24), "b": nn.Linear(24, 8, bias=False)})
    return int8fx.convert(model, scheme)


SAVED = {name: {k: v.clone() for k, v in model_of(scheme).state_dict().items()} for name, scheme in NAMES.items()}
OUTCOMES: Counter[str] = Counter()


def assert_refused_or_equal(model: nn.Module, state, expected: dict[str, Tensor], **settings) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    refused = None
    try:
        model.load_state_dict(state, **settings)
    except RuntimeError as error:
        refused = str(error)
    after, wanted = model.state_dict(), expected if refused is None else before
    assert refused is None or "Error(s) in loading state_dict" in refused
    assert [k for k, v in wanted.items() if not torch.equal(v, after[k])] == []
    OUTCOMES["loaded as saved" if refused is None else "refused"] += 1


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _set(value):
    def change(tensor: Tensor, at: int) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[at % tensor.numel()] = value
        return tensor

    return change


OTHER = {
    "list": lambda t, at: t.tolist(), "none": lambda t, at: None, "int": lambda t, at: at, "text": lambda t, at: "x",
    "float64": lambda t, at: t.double(), "int32": lambda t, at: t.int(), "bool": lambda t, at: t.bool(),
    "complex": lambda t, at: t.to(torch.complex64), "empty": lambda t, at: t[:0], "scalar": lambda t, at: t.sum(),
    "longer": lambda t, at: torch.cat([t, t]), "shorter": lambda t, at: t[1:], "deeper": lambda t, at: t[None],
    "flat": lambda t, at: torch.cat([t.reshape(-1), t.reshape(-1)]), "sparse": lambda t, at: t.float().to_sparse(),
}  # fmt: skip
CHANGES = {
    CODES: {**OTHER, "-128": _set(-128)},
    SCALE: {**OTHER, "nan": _set(float("nan")), "inf": _set(float("inf")), "0": _set(0.0), "negative": _set(-1.0)},
    COLUMNS: {**OTHER, "beyond": _set(40), "negative": _set(-1), "huge": _set(2**62),
              "twice": lambda t, at: t.new_full(t.shape, 3)},
    COLUMNS_WEIGHT: {**OTHER, "nan": _set(float("nan")), "inf": _set(float("inf"))},
    FORMAT: {**OTHER, "bytes": _set(0), "not text": _set(255), "no json": lambda t, at: t[:-1],
             "deep": lambda t, at: _text("[" * 4000), "long": lambda t, at: _text("x" * 100_000),
             "newer": lambda t, at: _text(json.dumps({"format": "int8fx", "version": VERSION + 1, "scheme": "plain"})),
             "other": lambda t, at: _text('{"format": "gptq", "version": 2, "scheme": "plain"}'),
             "types": lambda t, at: _text('{"format": "int8fx", "version": "2", "scheme": 7}'),
             "code": lambda t, at: _scheme("__import__('os').getcwd()"), "call": lambda t, at: _scheme("eval('1')"),
             "power": lambda t, at: _scheme("llm_int8(9**9**9)"), "nested": lambda t, at: _scheme("(" * 900),
             "another scheme": lambda t, at: format_tensor(int8fx.rotated(8, columns=0.5))},
}  # fmt: skip


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _scheme(scheme: str) -> Tensor:
    return _text(json.dumps({"format": "int8fx", "version": VERSION, "scheme": scheme}))


@given(st.data())
def test_a_damaged_tensor_is_refused_and_nothing_is_changed(data):
    name = data.draw(st.sampled_from(list(NAMES)))
    state, expected = dict(SAVED[name]), SAVED[name]
    suffixes = [s for s in CHANGES if f"a.weight{s}" in state]
    for _ in range(data.draw(st.integers(1, 2))):
        suffix = data.draw(st.sampled_from(suffixes))
        key = data.draw(st.sampled_from(["a.weight", "b.weight"])) + suffix
        change = data.draw(st.sampled_from(sorted(CHANGES[suffix])))
        if isinstance(state[key], Tensor) and state[key].numel() > 1 and state[key].layout == torch.strided:
            state[key] = CHANGES[suffix][change](state[key], data.draw(st.integers(0, 999)))
    settings = {"strict": data.draw(st.booleans()), "assign": data.draw(st.booleans())}
    assert_refused_or_equal(model_of(NAMES[name], seed=1), state, expected, **settings)


@given(st.data())
def test_a_missing_or_renamed_part_is_refused(data):
    name = data.draw(st.sampled_from(list(NAMES)))
    state = dict(SAVED[name])
    parts = [k for k in state if k.startswith(("a.weight_", "b.weight_")) and not k.endswith(FORMAT)]
    for key in data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2, unique=True)):
        tensor = state.pop(key)
        if data.draw(st.booleans()):
            state[data.draw(st.sampled_from([key + "_", "../" + key, "/" + key, key.upper(), "weight"]))] = tensor
    model = model_of(NAMES[name], seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="loading state_dict"):
        model.load_state_dict(state)
    after = model.state_dict()
    whole = [w for w in ("a.weight", "b.weight") if all(k in state for k in SAVED[name] if k.startswith(w + "_"))]
    if len(whole) < 2 and any(k in state for k in parts if not k.startswith(tuple(w + "_" for w in whole))):
        assert [k for k, v in before.items() if not torch.equal(v, after[k])] == []


# ---- files -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_damaged_file_is_refused_or_gives_what_was_saved(data):
    name = data.draw(st.sampled_from(list(NAMES)))
    raw = save(SAVED[name])
    size = struct.unpack("<Q", raw[:8])[0]
    how = data.draw(st.sampled_from(["truncate", "header", "length", "offsets", "dtype", "shape", "names", "append"]))
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    key = data.draw(st.sampled_from(sorted(k for k in header if k.startswith(("a.weight", "b.weight")))))
    if how == "truncate":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    elif how == "append":
        raw += bytes(data.draw(st.integers(1, 64)))
    elif how == "length":
        raw = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + raw[8:]
    elif how == "header":
        at = data.draw(st.integers(8, 7 + size))
        raw = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    else:
        if how == "offsets":
            header[key]["data_offsets"] = data.draw(st.lists(st.integers(0, 2**63), min_size=2, max_size=2))
        elif how == "dtype":
            header[key]["dtype"] = data.draw(st.sampled_from(["F64", "F32", "I8", "U8", "BF16", "I64", "X", "BOOL"]))
        elif how == "shape":
            header[key]["shape"] = data.draw(st.lists(st.integers(0, 2**40), max_size=4))
        else:
            other = data.draw(st.sampled_from(sorted(k for k in header if k != key)))
            if header[other] == header[key] or header[other]["shape"] == header[key]["shape"]:
                return  # the same kind of tensor under another name cannot be told from it
            header[key], header[other] = header[other], header[key]
        text = json.dumps(header).encode()
        raw = struct.pack("<Q", len(text)) + text + body
    try:
        state = load(raw)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OverflowError, MemoryError, TypeError):
        OUTCOMES["refused by safetensors"] += 1
        return
    model = model_of(NAMES[name], seed=1)
    if state.keys() != SAVED[name].keys():  # a renamed tensor: torch names it after it has loaded the others
        with pytest.raises(RuntimeError, match="loading state_dict"):
            model.load_state_dict(state)
        return
    assert_refused_or_equal(model, state, SAVED[name] if how != "header" else state)


def test_what_became_of_them():
    """Printed with ``-rP``."""
    print(dict(OUTCOMES))


# ---- versions --------------------------------------------------------------------------------------------------------


def first_version(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as version 1 had it: the codes under the float weight's name, and no format."""
    state = {key: tensor for key, tensor in state.items() if not key.endswith(FORMAT)}
    return {key.removesuffix(CODES): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("assign", [False, True])
def test_the_first_version_loads(scheme, assign):
    model = model_of(NAMES[scheme], seed=1)
    model.load_state_dict(first_version(SAVED[scheme]), assign=assign)
    assert all(torch.equal(tensor, SAVED[scheme][key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_each_version_load(version):
    """The files were written by ``python tests/data/write.py``, the first one by int8fx 0.1."""
    from safetensors.torch import load_file

    model = model_of(NAMES["rotated columns"], seed=1)
    model.load_state_dict(load_file(DATA / f"version{version}.safetensors"))
    x = torch.linspace(-1, 1, 80).view(2, 40)
    with torch.no_grad():
        y = model["b"](model["norm"](model["a"](x)))
    expected = json.loads((DATA / f"version{version}.json").read_text())
    assert torch.allclose(y, torch.tensor(expected), atol=1e-5)


def test_schemes_of_other_arithmetic_are_refused_and_others_are_adopted():
    schemes = [int8fx.llm_int8(), int8fx.llm_int8(5.0), int8fx.plain(), int8fx.weight_only(), int8fx.rotated(8, 0),
               int8fx.rotated(16, 0), int8fx.rotated(1, 0)]  # fmt: skip
    for saved in schemes:
        for wanted in schemes:
            model = model_of(wanted, seed=1)
            state = model_of(saved).state_dict()
            if (saved.threshold, saved.block) == (wanted.threshold, wanted.block):
                model.load_state_dict(state)
            else:
                with pytest.raises(RuntimeError) as error:
                    model.load_state_dict(state)
                assert f'"a.weight" was quantised by {saved}, and this layer by {wanted}' in str(error.value)
    model = model_of(int8fx.rotated(8, columns=0.05))
    model.load_state_dict(model_of(int8fx.rotated(8, columns=0.06)).state_dict())
    assert {row.scheme for row in int8fx.summary(model).converted} == {"rotated(block=8, columns=0.06)"}
    assert {read_scheme(m._buffers["weight_format"]) for m in model.modules() if isinstance(m, PackedModule)} == {
        int8fx.rotated(8, columns=0.06)
    }


@pytest.mark.parametrize("scheme", ["llm_int8", "rotated columns", "rotated"])
def test_the_documented_reader_reads_a_weight(scheme):
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)  # the page's own code
    for K in (40, 64, 7):
        torch.manual_seed(0)
        layer = int8fx.convert(nn.Linear(K, 24), SCHEMES[scheme])
        read = names["read_weight"](layer.state_dict(), "weight", SCHEMES[scheme].block)
        assert torch.allclose(read, layer.dequantize(), atol=1e-6)
