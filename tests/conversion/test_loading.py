"""Hostile checkpoints: a load is refused with a word and changes nothing, or gives exactly what was saved.

``python tests/conversion/test_loading.py 10000`` makes so many hostile files and prints what became of them.
``HYPOTHESIS_PROFILE=thorough pytest tests/conversion/test_loading.py`` makes over 10,000 of them too.
"""

from __future__ import annotations

import copy
import json
import random
import struct
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # of tests/support

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from support.conversion import SCHEMES
from torch import Tensor, nn

import int8fx
from int8fx.conversion.format import FORMAT, VERSION, format_tensor, read_scheme
from int8fx.conversion.packed import PackedModule
from int8fx.integrations.checksums import KEY, checksums
from int8fx.integrations.stored import open_file, read_tensor
from int8fx.schemes import parse_scheme
from int8fx.schemes.weight import CODES, COLUMNS, COLUMNS_WEIGHT, SCALE

DATA = Path(__file__).parents[1] / "data"
NAMES = {scheme: SCHEMES[scheme] for scheme in ("llm_int8", "rotated columns")}
MANY = settings(max_examples=13 * settings().max_examples)  # 104 in the fast lane, 19,500 in the thorough one


def model_of(scheme: int8fx.Scheme, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(40, 24), "norm": nn.LayerNorm(24), "b": nn.Linear(24, 8, bias=False)})
    return int8fx.convert(model, scheme)


def saved(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


SAVED = {name: saved(model_of(scheme)) for name, scheme in NAMES.items()}
OTHERS = {name: model_of(scheme, seed=1) for name, scheme in NAMES.items()}


def differing(model: nn.Module, expected: dict[str, Tensor]) -> list[str]:
    """The names of tensors that have not the bits that are expected."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    return [k for k, v in state.items() if not same_bits(v, expected[k])]


def same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def assert_refused(model: nn.Module, state: Any, says: str, **how: bool) -> None:
    """Loading ``state`` raises with the words ``says``, and changes nothing."""
    before = saved(model)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state, **how)
    assert "Error(s) in loading state_dict for" in str(error.value)
    assert says in str(error.value)
    assert differing(model, before) == []


def load_hostile(model: nn.Module, state: dict[str, Any], expected: dict[str, Tensor], **how: bool) -> str:
    """Loads ``state``; it must be refused and change nothing, or give ``expected``. Returns which."""
    before, refused = saved(model), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict(state, **how)
    except RuntimeError as error:
        refused = str(error)
    assert refused is None or "Error(s) in loading state_dict for" in refused
    given = {*state, *(key + CODES for key in state)}  # version 1 calls codes as the weight
    assert differing(model, before if refused else before | {k: expected[k] for k in before if k in given}) == []
    return "refused by int8fx" if refused else "loaded as saved"


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _set(value):
    def change(tensor: Tensor, at: int) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[at % tensor.numel()] = value
        return tensor

    return change


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _format(**content: Any) -> Tensor:
    return _text(json.dumps({"format": "int8fx", "version": VERSION, "scheme": "plain", **content}))


OTHER = {
    "list": lambda t, at: t.tolist(), "none": lambda t, at: None, "int": lambda t, at: at, "text": lambda t, at: "x",
    "dict": lambda t, at: {"x": t}, "numpy": lambda t, at: t.numpy(), "bool": lambda t, at: t.bool(),
    "int32": lambda t, at: t.int(), "complex": lambda t, at: t.to(torch.complex64), "empty": lambda t, at: t[:0],
    "scalar": lambda t, at: t.sum(), "longer": lambda t, at: torch.cat([t, t]), "shorter": lambda t, at: t[1:],
    "deeper": lambda t, at: t[None], "sparse": lambda t, at: t.float().to_sparse(),
    "sparse rows": lambda t, at: t.reshape(1, -1).to_sparse_csr(), "meta": lambda t, at: t.to("meta"),
    "nested": lambda t, at: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t, at: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "quantized": lambda t, at: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
}  # fmt: skip
EQUAL = {"strided": lambda t, at: torch.stack([t, t], -1)[..., 0], "copied": lambda t, at: t.clone()}
DOUBLE = {"float64": lambda t, at: t.double()}
SCHEME_TEXTS = [
    "__import__('os').getcwd()", "eval('1')", "llm_int8(9**9**9)", "(" * 900, "-" * 900 + "1", "1" + "+1" * 400,
    "not " * 200 + "1", "a" + ".b" * 400, f"llm_int8({'9' * 900})", "\ud800", "\0", "llm_int8(1e999)", "plain()()",
    "rotated(block=-64)", "rotated(columns=1j)", "rotated(**{})", "", " ", "f'{1}'", "lambda: 1", "[rotated]",
]  # fmt: skip
CHANGES = {
    CODES: {**OTHER, **EQUAL, **DOUBLE, "-128": _set(-128), "uint8": lambda t, at: t.view(torch.uint8)},
    SCALE: {**OTHER, **EQUAL, **DOUBLE, "nan": _set(float("nan")), "inf": _set(float("inf")), "0": _set(0.0),
            "negative": _set(-1.0), "too large": _set(3e38), "float16": lambda t, at: t.half()},
    COLUMNS: {**OTHER, **EQUAL, **DOUBLE, "beyond": _set(40), "negative": _set(-1), "huge": _set(2**62),
              "twice": lambda t, at: t.new_full(t.shape, 3) if len(t) > 1 else t},
    COLUMNS_WEIGHT: {**OTHER, **EQUAL, "nan": _set(float("nan")), "inf": _set(float("inf")),
                     "float8": lambda t, at: t.to(torch.float8_e4m3fn)},
    FORMAT: {**OTHER, **EQUAL, **DOUBLE, "bytes": _set(0), "not text": _set(255), "no json": lambda t, at: t[:-1],
             "deep": lambda t, at: _text("[" * 1000), "long": lambda t, at: _text("x" * 100_000),
             "newer": lambda t, at: _format(version=VERSION + 1), "older": lambda t, at: _format(version=1),
             "another format": lambda t, at: _format(format="gptq"), "2.0": lambda t, at: _format(version=2.0),
             "types": lambda t, at: _format(version="2", scheme=7), "bool": lambda t, at: _format(version=True),
             "code": lambda t, at: _format(scheme=SCHEME_TEXTS[at % len(SCHEME_TEXTS)]),
             "another scheme": lambda t, at: format_tensor(int8fx.rotated(4, columns=0.5))},
}  # fmt: skip


@MANY
@given(st.data())
def test_a_damaged_tensor_is_refused_and_nothing_is_changed(data):
    name = data.draw(st.sampled_from(list(NAMES)))
    state: dict[str, Any] = {k: v.clone() for k, v in SAVED[name].items()}
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3, unique=True)):
        changes = CHANGES.get(key.removeprefix("a.weight").removeprefix("b.weight"), OTHER | EQUAL)
        how = data.draw(st.sampled_from(sorted(changes)))
        state[key] = changes[how](state[key], data.draw(st.integers(0, 999)))
    arguments = {"strict": data.draw(st.booleans()), "assign": data.draw(st.booleans())}
    load_hostile(copy.deepcopy(OTHERS[name]), state, SAVED[name], **arguments)


@pytest.mark.parametrize("scheme", NAMES)
def test_every_change_of_a_packed_tensor_is_refused(scheme):
    """Without `EQUAL` ones: the property above must not be kept by loading everything."""
    for suffix, changes in CHANGES.items():
        key = f"a.weight{suffix}"
        for what in [w for w in changes if key in SAVED[scheme] and w not in {*EQUAL, "twice"}]:
            state = SAVED[scheme] | {key: changes[what](SAVED[scheme][key], 5)}
            for how in ({}, {"strict": False}, {"assign": True}):
                assert_refused(copy.deepcopy(OTHERS[scheme]), state, '"a.weight', **how)


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("key", ["norm.weight", "a.bias"])
def test_every_change_of_a_float_tensor_is_refused(scheme, key):
    for what in OTHER:
        state = SAVED[scheme] | {key: OTHER[what](SAVED[scheme][key], 5)}
        assert_refused(copy.deepcopy(OTHERS[scheme]), state, key)
        assert_refused(copy.deepcopy(OTHERS[scheme]), state, key, strict=False)


@MANY
@given(st.data())
def test_missing_and_renamed_tensors_are_refused_and_nothing_is_changed(data):
    name = data.draw(st.sampled_from(list(NAMES)))
    state = dict(SAVED[name])
    removed = data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3, unique=True))
    for key in removed:
        tensor = state.pop(key)
        if data.draw(st.booleans()):
            names = [key + "_", "../" + key, "/" + key, key.upper(), "weight", "a.", "", ".", "a.weight.codes", "c.x"]
            state[data.draw(st.sampled_from(names))] = tensor
    assert_refused(copy.deepcopy(OTHERS[name]), state, "")
    model = copy.deepcopy(OTHERS[name])
    parts = {w: [k in state for k in SAVED[name] if k.startswith(w)] for w in ("a.weight", "b.weight")}
    if any(any(there) and not all(there) for there in parts.values()):
        assert_refused(model, state, "is packed, and a part of it is missing", strict=False)
    else:
        load_hostile(model, state, SAVED[name], strict=False)


def test_keys_that_are_no_text_are_refused():
    for key in (5, None, ("a.weight_codes",), b"a.weight_codes"):
        assert_refused(OTHERS["llm_int8"], {**SAVED["llm_int8"], key: torch.ones(1)}, f"a key is {key!r}; legal: text")


@pytest.mark.parametrize("key", ["a.weight", "b.weight"])
def test_a_float_weight_beside_its_codes_is_refused_and_a_guard_is_not(key):
    model, state = copy.deepcopy(OTHERS["llm_int8"]), dict(SAVED["llm_int8"])
    weight = torch.ones(SAVED["llm_int8"][key + CODES].shape)
    assert_refused(model, {**state, key: weight}, f'"{key}" and "{key}_codes" are both there')
    assert_refused(model, {**state, key: weight.to(torch.int8)}, f'"{key}" and "{key}_codes" are both there')
    model.load_state_dict({**state, key: torch.zeros(1, dtype=torch.uint8)})
    assert differing(model, SAVED["llm_int8"]) == []


def test_codes_for_a_layer_that_is_float_are_refused():
    """A file of version 1 of a model in which more layers were converted."""
    model = int8fx.convert(nn.ModuleDict({"a": nn.Linear(40, 24), "b": nn.Linear(40, 24)}), skip="b")
    state = {"b.weight": torch.ones(24, 40, dtype=torch.int8), "b.weight_scale": torch.ones(24)}
    says = "wrong dtype for b.weight: found torch.int8; legal: torch.float32"
    assert_refused(model, {**model.state_dict(), **state}, 'Unexpected key(s) in state_dict: "b.weight_scale"')
    assert_refused(model, state, says, strict=False)


def test_codes_of_a_layer_that_is_float_here_are_refused_by_name():
    model = int8fx.convert(nn.ModuleDict({"a": nn.Linear(40, 24), "b": nn.Linear(40, 24)}), skip="b")
    state = int8fx.convert(nn.ModuleDict({"a": nn.Linear(40, 24), "b": nn.Linear(40, 24)})).state_dict()
    assert_refused(model, state, '"b.weight" is float in this model, found its int8 codes', strict=False)
    floats = {k: v for k, v in state.items() if not k.startswith("b.")}
    assert model.load_state_dict(floats, strict=False).missing_keys == ["b.weight", "b.bias"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("ours", SCHEMES)
@pytest.mark.parametrize("theirs", SCHEMES)
def test_tensors_of_another_scheme_are_refused(theirs, ours, assign, strict):
    model, state = model_of(SCHEMES[ours], seed=1), saved(model_of(SCHEMES[theirs]))
    if theirs == ours:
        model.load_state_dict(state, assign=assign, strict=strict)
        assert differing(model, state) == []
    else:
        assert_refused(model, state, '"a.weight', assign=assign, strict=strict)


@pytest.mark.parametrize("change", ["without", "of more"])
def test_a_number_of_columns_that_the_format_does_not_say_is_refused(change):
    """Tools fill in what a file lacks from the model: ``torch.distributed.checkpoint`` does."""
    share = {"without": 0.0, "of more": 0.1}[change]
    model, state = model_of(int8fx.rotated(16, columns=0.05)), saved(model_of(int8fx.rotated(16, columns=share)))
    filled = saved(model) | {k: v for k, v in state.items() if k.endswith(FORMAT)}
    scheme = f"rotated(block=16, columns={share})"
    says = f'"a.weight" has 2 unquantised columns; legal: {int(share * 40)}, as its format is {scheme} and K is 40'
    assert_refused(model, filled, says, strict=False)


# ---- files -----------------------------------------------------------------------------------------------------------

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", "", None, 5]
WAYS = ["truncate", "append", "length", "header byte", "body byte", "offsets", "dtype", "shape", "swap", "rename",
        "drop", "add", "metadata", "header"]  # fmt: skip
HEADERS = [b"", b"{", b"[]", b"null", b"{}" * 2, b"[" * 5000, b"\xff" * 9, b'{"a": 1}', b'{"__metadata__": []}',
           b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}']  # fmt: skip


def hostile_file(draw: random.Random, name: str, with_checksums: bool) -> tuple[str, bytes]:
    """A file of ``SAVED[name]`` that was damaged, and how."""
    metadata = {"format": "pt"} | (checksums(SAVED[name]) if with_checksums else {})
    raw, way = save(SAVED[name], metadata=metadata), draw.choice(WAYS)
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    key, other = draw.sample(sorted(header.keys() - {"__metadata__"}), 2)
    entry = header[key]
    if way == "truncate":
        return way, raw[: draw.randrange(len(raw))]
    if way == "append":
        return way, raw + draw.randbytes(draw.randint(1, 64))
    if way == "length":
        length = draw.choice([draw.randrange(2**64), size + draw.randint(-3, 3), 0, 2**63, 10**8 + 1])
        return way, struct.pack("<Q", length) + raw[8:]
    if way in ("header byte", "body byte"):
        at = draw.randrange(8, 8 + size) if way == "header byte" else draw.randrange(8 + size, len(raw))
        return way, raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]
    if way == "header":
        text = draw.choice(HEADERS)
        return way, struct.pack("<Q", len(text)) + text + body
    if way == "offsets":
        start, end = entry["data_offsets"]
        by = draw.choice([1, -1, 4, 2**32, 2**63, -(2**40)])
        entry["data_offsets"] = draw.choice(
            [
                [start + by, end + by],
                [start, end + by],
                [end, start],
                header[other]["data_offsets"],
                [start],
                None,
                ["0", "1"],
            ]
        )
    elif way == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif way == "shape":
        shape = entry["shape"]
        entry["shape"] = draw.choice(
            [
                shape[::-1],
                [*shape, 1],
                shape[1:],
                [2**40, 2**40],
                [-1],
                [0],
                None,
                "x",
                [1.5],
                [shape[0] * 2, *shape[1:]],
            ]
        )
    elif way == "swap":
        header[key], header[other] = header[other], entry
    elif way == "rename":
        header[draw.choice(["../" + key, "/etc/passwd", key + "\0", key.upper(), "", "a.weight", other + "_"])] = (
            header.pop(key)
        )
    elif way == "drop":
        del header[key]
    elif way == "add":
        header["a.weight_extra"] = entry
    else:
        others = [{KEY: text} for text in ("{", "{}", "[]", "5", "[" * 5000, '{"a.weight_codes": 5}')]
        header["__metadata__"] = draw.choice(
            [{"format": 5}, [], "x", {"format": None}, {"": ""}, {"format": "tf"}, *others]
        )
    text = json.dumps(header).encode()
    return way, struct.pack("<Q", len(text)) + text + body


def load_file_of(draw: random.Random) -> str:
    """Loads a hostile file into a model; returns what became of it. Raises if it was what must not be."""
    name, with_checksums = draw.choice(list(NAMES)), draw.random() < 0.5
    way, raw = hostile_file(draw, name, with_checksums)
    how = {"strict": draw.random() < 0.5, "assign": draw.random() < 0.5}
    try:
        state = read_file(raw)
    except (SafetensorError, RuntimeError, KeyError, OverflowError, MemoryError, TypeError, AttributeError):
        return "refused by safetensors"
    except ValueError as error:
        return "refused by its checksums" if KEY in str(error) else "refused by safetensors"
    expected, told = SAVED[name], True
    if not with_checksums and way in ("swap", "body byte"):
        other = {k: state[k] for k in expected if not same_bits(state[k], expected[k])}
        told = not other or any(t.shape != expected[k].shape or t.dtype != expected[k].dtype for k, t in other.items())
        expected = expected | other
    outcome = load_hostile(copy.deepcopy(OTHERS[name]), state, expected, **how)
    return outcome if told or outcome != "loaded as saved" else f"not told, without checksums: {way}"


def read_file(raw: bytes) -> dict[str, Tensor]:
    """The tensors of a file, read as `from_pretrained` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(raw)
        opened = open_file(path)
        return {key: read_tensor(opened, key).clone() for key in opened.keys()}  # noqa: SIM118  not a dict


@MANY
@given(st.randoms(use_true_random=False))
def test_a_damaged_file_is_refused_or_gives_what_was_saved(draw):
    load_file_of(draw)


def fuzz(count: int) -> Counter[str]:
    """What became of ``count`` hostile files."""
    return Counter(load_file_of(random.Random(seed)) for seed in range(count))


def test_the_files_are_of_all_kinds():
    counts = fuzz(150)
    assert counts["refused by safetensors"] > 20
    assert counts["refused by int8fx"] > 10
    assert counts["refused by its checksums"] > 10
    assert counts["loaded as saved"] > 1
    print(dict(counts))


def test_a_file_with_checksums_in_which_a_bit_is_flipped_or_tensors_are_swapped_is_refused():
    """Also if all values are legal: the property above must not be kept by files without checksums."""
    for state in SAVED.values():
        metadata = checksums(state)
        assert read_file(save(state, metadata=metadata)).keys() == state.keys()
        for key, tensor in state.items():
            flipped = tensor.clone()
            flipped.view(-1).view(torch.uint8)[-1] ^= 1
            equal = [k for k, t in state.items() if t.shape == tensor.shape and t.dtype == tensor.dtype]
            swaps = [{key: state[k], k: tensor} for k in equal if not same_bits(state[k], tensor)]
            for damage in ({key: flipped}, {key + "_": tensor.clone()}, *swaps):
                with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* has the checksum") as error:
                    read_file(save(state | damage, metadata=metadata))
                assert any(f"tensor {k!r}" in str(error.value) for k in damage)
                assert read_file(save(state | damage)).keys() == (state | damage).keys()


# ---- text of schemes -------------------------------------------------------------------------------------------------


@MANY
@given(st.text(max_size=300) | st.text("llm_int8rotated(=,.0169)-+*[]{}'\"ejf", max_size=300))
def test_text_is_a_scheme_or_a_value_error(text):
    try:
        scheme = parse_scheme(text)
    except ValueError:
        return
    assert parse_scheme(str(scheme)) == scheme


LONG_TEXTS = ["-" * 100_000 + "1", "1" + "+1" * 50_000, "(" * 100_000]


@pytest.mark.parametrize("text", [*SCHEME_TEXTS, *LONG_TEXTS], ids=lambda text: repr(text[:20]))
def test_hostile_text_of_a_scheme_is_refused(text):
    if text not in ("llm_int8(1e999)", "rotated(**{})"):
        with pytest.raises(ValueError, match="legal: llm_int8") as error:
            parse_scheme(text)
        assert len(str(error.value)) < 600


# ---- parts of models -------------------------------------------------------------------------------------------------


def test_only_some_layers_load_if_not_strict():
    for scheme in NAMES:
        for assign in (False, True):
            model = copy.deepcopy(OTHERS[scheme])
            before, state = saved(model), {k: v.clone() for k, v in SAVED[scheme].items() if k.startswith("a.weight")}
            result = model.load_state_dict(state, strict=False, assign=assign)
            assert set(result.missing_keys) == SAVED[scheme].keys() - state.keys()
            assert differing(model, before | state) == []
            assert_refused(model, state, 'Missing key(s) in state_dict: "a.bias", "norm.weight"')


def test_a_packed_layer_that_is_loaded_alone_is_checked():
    for scheme in NAMES:
        model = copy.deepcopy(OTHERS[scheme])
        state = {k.removeprefix("a."): v for k, v in SAVED[scheme].items() if k.startswith("a.")}
        for key in (f"weight{part}" for part in (CODES, SCALE, COLUMNS, COLUMNS_WEIGHT) if f"weight{part}" in state):
            for strict in (False, True):
                assert_refused(model["a"], {key: state[key]}, "a part of it is missing", strict=strict)
        model["a"].load_state_dict(state)
        assert differing(model["a"], state) == []


def test_weights_in_a_model_that_was_not_converted_as_a_whole_are_checked():
    """Every packed weight of the load is checked before the first is changed; float tensors before it may be."""
    for scheme in NAMES:
        inner = nn.Sequential(copy.deepcopy(OTHERS[scheme]), copy.deepcopy(OTHERS[scheme]))
        for model in (inner, nn.Sequential(inner), nn.ModuleList([inner[0]["a"], inner[1]["a"]])):
            state = {k: v.clone() for k, v in model.state_dict().items()}
            last = [k for k in state if k.endswith(SCALE)][-1]
            before = saved(model)
            for k in [k for k in state if k.endswith(CODES)]:
                state[k] = -state[k]
            state[last] = -state[last]
            with pytest.raises(RuntimeError, match="NaN, inf, zero or negative"):
                model.load_state_dict(state)
            first = [k for k in differing(model, before) if not k.startswith(last.partition(".")[0])]
            assert not any(k.endswith(SCALE) for k in first)
            assert differing(model, before) == [] or model is inner or isinstance(model, nn.Sequential)


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(24, 40), "h": nn.Linear(40, 24, bias=False)})
    model["h"].weight = model["e"].weight
    return int8fx.convert(model, int8fx.rotated(8, columns=0.05), select=["*"])


@pytest.mark.parametrize("part", [CODES, SCALE, COLUMNS, COLUMNS_WEIGHT])
def test_a_tied_weight_with_two_values_is_refused(part):
    model = tied()
    state = saved(model)
    state[f"h.weight{part}"] = (state[f"h.weight{part}"] + 1) % 40
    for how in ({}, {"strict": False}, {"assign": True}):
        assert_refused(model, state, f'"e.weight{part}" and "h.weight{part}" differ', **how)
    one = {k: v for k, v in saved(model).items() if not k.endswith((CODES, SCALE, COLUMNS_WEIGHT)) or k[0] == "h"}
    model.load_state_dict(one, strict=False)


def test_a_tensor_for_a_buffer_of_one_number_may_have_a_dimension():
    model = int8fx.convert(nn.Sequential(nn.Linear(40, 24), nn.BatchNorm1d(24)))
    state = saved(model)
    state["1.num_batches_tracked"] = torch.tensor([7])
    model.load_state_dict(state)
    assert model[1].num_batches_tracked == 7
    state["1.running_mean"] = torch.ones(23)
    assert_refused(model, state, "size mismatch for 1.running_mean: found (23,); legal: (24,)")
    del state["1.running_mean"]
    assert_refused(model, state, 'Missing key(s) in state_dict: "1.running_mean"')


class Resized(nn.Module):
    """Takes a table of any size, and is called something else in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Parameter(torch.zeros(4)), nn.Linear(40, 24)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "table"] = state_dict.pop(prefix + "old_table")[:4]
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_what_a_module_changes_before_it_loads_is_left_to_it():
    model = int8fx.convert(nn.Sequential(nn.Linear(40, 40), Resized()), int8fx.rotated(8, columns=0.05))
    state = saved(model)
    state["1.old_table"] = torch.cat([state.pop("1.table") + 3, torch.ones(2)])
    model.load_state_dict(state)
    assert model[1].table.tolist() == [3, 3, 3, 3]
    before = saved(model[1].linear)
    state["1.linear.weight_scale"] = -state["1.linear.weight_scale"]
    with pytest.raises(RuntimeError, match="NaN, inf, zero or negative"):
        model.load_state_dict(state)
    assert differing(model[1].linear, before) == []


def test_hooks_that_rename_keep_their_tensors_checked():
    def rename(module, state_dict, prefix, *_):
        for key in [key for key in state_dict if "old" in key]:
            state_dict[key.replace("old", "linear")] = state_dict.pop(key)

    model = int8fx.convert(nn.ModuleDict({"linear": nn.Linear(40, 24)}), int8fx.rotated(8, columns=0.05))
    model.register_load_state_dict_pre_hook(rename)
    before, state = saved(model), {k.replace("linear", "old"): v for k, v in saved(model).items()}
    model.load_state_dict(state)
    state["old.weight_columns"] = state["old.weight_columns"] + 40
    with pytest.raises(RuntimeError, match="is out of range"):
        model.load_state_dict(state)
    assert differing(model, before) == []


def test_a_module_without_shapes_yet_is_left_to_torch():
    model = int8fx.convert(nn.ModuleDict({"a": nn.Linear(40, 24)}))
    model["lazy"] = nn.LazyLinear(3)
    model.load_state_dict(
        {**model["a"].state_dict(prefix="a."), "lazy.weight": torch.ones(3, 4), "lazy.bias": torch.ones(3)}
    )
    assert model["lazy"].weight.shape == (3, 4)


@pytest.mark.parametrize("version", [1, 2])
def test_a_float_module_does_not_take_packed_tensors(version):
    for scheme in NAMES:
        state = SAVED[scheme] if version == 2 else {k: v for k, v in SAVED[scheme].items() if not k.endswith(FORMAT)}
        model = nn.ModuleDict({"a": nn.Linear(40, 24), "norm": nn.LayerNorm(24), "b": nn.Linear(24, 8, bias=False)})
        weights = {k: v.clone() for k, v in model.state_dict().items() if k in ("a.weight", "b.weight")}
        with pytest.raises(RuntimeError, match=r'Missing key.*"a\.weight"'):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False).missing_keys == ["a.weight", "b.weight"]
        assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.norm = (
            nn.Parameter(torch.randn(40, 24)),
            nn.Parameter(torch.randn(8, 24)),
            nn.LayerNorm(24),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ self.w) @ self.v.T


@pytest.mark.parametrize(
    "capture", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, (torch.ones(3, 40),)).module()]
)
def test_graph_modules_are_checked(capture):
    scheme = int8fx.rotated(8, columns=0.05, hadamard="sylvester")  # as version 1 has it
    torch.manual_seed(0)
    state = saved(int8fx.convert(capture(Bare()), scheme))
    torch.manual_seed(1)
    model = int8fx.convert(capture(Bare()), scheme)
    assert {"w_codes", "v_codes", "w_format"} <= state.keys()
    for suffix, changes in CHANGES.items():
        for what in [w for w in changes if w not in {*EQUAL, "twice"}]:
            unfit = state | {f"w{suffix}": changes[what](state[f"w{suffix}"], 5)}
            assert_refused(model, unfit, '"w')
            assert_refused(model, unfit, '"w', strict=False)
    assert_refused(model, state | {"norm.weight": torch.ones(5)}, "size mismatch for norm.weight")
    assert_refused(
        model, {k: v for k, v in state.items() if k != "norm.weight"}, 'Missing key(s) in state_dict: "norm.weight"'
    )
    assert_refused(model, state | {"x": torch.ones(5)}, 'Unexpected key(s) in state_dict: "x"')
    first = {k.removesuffix(CODES): v for k, v in state.items() if not k.endswith(FORMAT)}
    for loaded in (state, first):
        other = copy.deepcopy(model)
        other.load_state_dict(loaded)
        assert differing(other, state) == []


@pytest.mark.parametrize("assign", [False, True])
def test_columns_may_be_in_any_order_and_tensors_in_any_strides(assign):
    torch.manual_seed(0)
    scheme, x = int8fx.rotated(8, columns=0.2), torch.randn(6, 40)
    model = int8fx.convert(nn.Linear(40, 24), scheme)
    state, y = saved(model), model(x)
    order = torch.randperm(len(state["weight_columns"]))
    state["weight_columns"], state["weight_columns_weight"] = (
        state["weight_columns"][order],
        state["weight_columns_weight"][:, order],
    )
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in state.items()}
    strided["weight_codes"] = state["weight_codes"].T.contiguous().T
    for loaded in (state, strided):
        other = int8fx.convert(nn.Linear(40, 24), scheme)
        other.load_state_dict(loaded, assign=assign)
        for rows in (x, x[:1]):
            assert torch.allclose(other(rows), model(rows), atol=1e-5)
        assert torch.allclose(other.dequantize(), model.dequantize())
    assert y.shape == (6, 24)


# ---- versions --------------------------------------------------------------------------------------------------------


def first_version(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as version 1 had it: the codes under the float weight's name, and no format."""
    state = {key: tensor for key, tensor in state.items() if not key.endswith(FORMAT)}
    return {key.removesuffix(CODES): tensor for key, tensor in state.items()}


SYLVESTER = int8fx.rotated(16, columns=0.05, hadamard="sylvester")


@pytest.mark.parametrize("scheme", [int8fx.llm_int8(), SYLVESTER], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_the_first_version_loads(scheme, assign):
    saved = model_of(scheme).state_dict()
    model = model_of(scheme, seed=1)
    model.load_state_dict(first_version(saved), assign=assign)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())


def test_the_first_version_does_not_load_into_regular_blocks():
    """It had Sylvester's matrices only, and does not say so."""
    says = (
        '"a.weight" is of format version 1, which has no regular Hadamard matrices, and this layer has: it is '
        "rotated(block=16, columns=0.05); legal: rotated(block, hadamard='sylvester')"
    )
    assert_refused(copy.deepcopy(OTHERS["rotated columns"]), first_version(SAVED["rotated columns"]), says)


FILES = {"version1": SYLVESTER, "version2": SYLVESTER, "regular": int8fx.rotated(16, columns=0.05)}


@pytest.mark.parametrize("name", FILES)
def test_files_of_each_version_load(name):
    """The files were written by ``python tests/data/write.py``, the first one by int8fx 0.1."""
    model, state = model_of(FILES[name], seed=1), load_file(DATA / f"{name}.safetensors")
    model.load_state_dict(state)
    x = torch.linspace(-1, 1, 80).view(2, 40)
    with torch.no_grad():
        y = model["b"](model["norm"](model["a"](x)))
    expected = json.loads((DATA / f"{name}.json").read_text())
    assert torch.allclose(y, torch.tensor(expected), atol=1e-5)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items() if name != "version1")


@pytest.mark.parametrize(("name", "other"), [("version2", "regular"), ("regular", "version2")])
def test_files_of_another_kind_of_blocks_are_refused(name, other):
    says = f'"a.weight" was quantised by {FILES[name]}, and this layer by {FILES[other]}'
    assert_refused(model_of(FILES[other]), load_file(DATA / f"{name}.safetensors"), says)


def test_schemes_of_other_arithmetic_are_refused_and_others_are_adopted():
    schemes = [int8fx.llm_int8(), int8fx.llm_int8(5.0), int8fx.plain(), int8fx.weight_only(), int8fx.rotated(8, 0),
               int8fx.rotated(16, 0), int8fx.rotated(1, 0), int8fx.rotated(16, 0, hadamard="sylvester")]  # fmt: skip
    for saved in schemes:
        for wanted in schemes:
            model = model_of(wanted, seed=1)
            state = model_of(saved).state_dict()
            if (saved.threshold, saved.rotation) == (wanted.threshold, wanted.rotation):
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


@pytest.mark.parametrize("scheme", [int8fx.llm_int8(), *FILES.values(), int8fx.rotated(columns=0)], ids=str)
def test_the_documented_reader_reads_a_weight(scheme):
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)  # the page's own code
    for K in (40, 64, 7):
        torch.manual_seed(0)
        layer = int8fx.convert(nn.Linear(K, 24), scheme)
        read = names["read_weight"](layer.state_dict(), "weight", abs(scheme.rotation), scheme.rotation < 0)
        assert torch.allclose(read, layer.dequantize(), atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_a_newer_version_is_refused_with_a_word(strict):
    state = SAVED["llm_int8"] | {"a.weight_format": _format(version=3)}
    says = '"a.weight_format": found version 3, of a newer int8fx; this one reads up to 2: update it'
    assert_refused(copy.deepcopy(OTHERS["llm_int8"]), state, says, strict=strict)


if __name__ == "__main__":
    for outcome, number in fuzz(int(sys.argv[1])).most_common():
        print(f"{number:>7,}  {outcome}")
