"""The schemes that `int8fx.convert` takes: their arguments, what they need, and their text form."""

import math
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.helpers import groupings

from int8fx.conversion.format import same_arithmetic
from int8fx.schemes import LLMInt8, Rotated, llm_int8, parse_scheme, plain, rotated, stored_text, weight_only
from int8fx.schemes.quantize import MAX_THRESHOLD

thresholds = st.one_of(st.none(), st.just(math.inf), st.floats(0, MAX_THRESHOLD), st.integers(0, 100))
shares = st.floats(0, 1, exclude_max=True)
schemes = st.one_of(
    st.builds(llm_int8, thresholds, shares),
    st.builds(llm_int8, thresholds),
    st.builds(
        rotated,
        st.integers(0, 14).map(lambda n: 2**n),
        shares,
        st.sampled_from(("nearest", "gptq")),
        st.sampled_from(("regular", "sylvester")),
    ),
    st.sampled_from((llm_int8(), weight_only(), plain(), rotated())),
    st.builds(
        lambda grouping, compute: weight_only(
            grouping.format,
            -1 if grouping.size is None else grouping.size,
            grouping.asymmetric,
            str(grouping.scale_dtype).removeprefix("torch."),
            grouping.double_quant,
            compute,
        ),
        groupings(),
        st.sampled_from(("fp32", "int8")),
    ),
)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_the_default_threshold_is_the_papers():
    assert llm_int8() == LLMInt8(6.0, 0.0) == llm_int8(threshold=6)
    assert isinstance(llm_int8(6).threshold, float)


def test_plain_and_weight_only_are_llm_int8_at_its_limits():
    assert plain() == llm_int8(None) == llm_int8(math.inf) == LLMInt8(math.inf)
    assert plain().threshold is None
    assert same_arithmetic(weight_only(), llm_int8(0))
    assert not same_arithmetic(weight_only(), weight_only("int4_clip"))
    assert llm_int8(MAX_THRESHOLD).threshold == MAX_THRESHOLD


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int4"}, "dtype must be one of int8, int4_clip, .*found 'int4'"),
        ({"dtype": ["int8"]}, "dtype must be one of"),
        ({"group_size": 0}, "group_size must be -1 or 1 to .*found 0"),
        ({"group_size": -2}, "group_size must be"),
        ({"group_size": True}, "group_size must be"),
        ({"group_size": 32.0}, "group_size must be"),
        ({"scale_dtype": "float64"}, "scale_dtype must be one of float32, bfloat16, float16"),
        ({"compute": "bf16"}, "compute must be one of fp32, int8"),
        ({"dtype": "nf4", "asymmetric": True}, "asymmetric weights are int8 or int4_clip"),
        ({"dtype": "int4_fullrange", "asymmetric": True}, "asymmetric weights are int8 or int4_clip"),
        ({"asymmetric": 1}, "asymmetric must be True or False"),
        ({"double_quant": True}, "double_quant quantises the scales of groups; group_size is -1"),
        ({"double_quant": True, "group_size": 8, "scale_dtype": "float16"}, "found scale_dtype 'float16' beside it"),
    ],
)
def test_illegal_weight_only(arguments, message):
    with pytest.raises(ValueError, match=message):
        weight_only(**arguments)


def test_the_defaults_of_rotated():
    assert rotated() == Rotated(256, 0.01, "nearest", "regular")
    assert rotated() == rotated(block=256, columns=0.01, rounding="nearest", hadamard="regular")
    assert rotated(columns=0) == rotated(columns=0.0)
    assert rotated().threshold is None


BAD_THRESHOLDS = [-1.0, -math.inf, math.nan, 2 * MAX_THRESHOLD, 10**400, "6", "inf", True, False]


@pytest.mark.parametrize("threshold", [*BAD_THRESHOLDS, torch.tensor(6.0), torch.tensor(math.inf), torch.ones(2)])
def test_a_threshold_that_is_no_number_from_0_up_is_refused(threshold):
    for make in (llm_int8, LLMInt8):
        with pytest.raises(ValueError, match="threshold must be a number >= 0 that float32 holds"):
            make(threshold)


@pytest.mark.parametrize("make", [lambda share: llm_int8(columns=share), lambda share: rotated(columns=share)])
@pytest.mark.parametrize("share", [-0.1, 1, 1.5, math.nan, math.inf, None, True, "dynamic", "0.1", torch.tensor(0.1)])
def test_columns_that_are_no_share_are_refused(make, share):
    with pytest.raises(ValueError, match=r"columns must be a share of the input columns, 0 <= columns < 1, found "):
        make(share)


@pytest.mark.parametrize("block", [0, -2, 3, 96, 2**70, 64.0, True, None, "64"])
def test_a_block_that_is_no_power_of_two_is_refused(block):
    with pytest.raises(ValueError, match="block must be a power of two up to 133,144, found "):
        rotated(block)


@pytest.mark.parametrize("rounding", ["up", None, "", 1])
def test_other_roundings_are_named(rounding):
    with pytest.raises(ValueError, match=f"rounding must be one of nearest, gptq, found {rounding!r}"):
        rotated(rounding=rounding)


@given(schemes)
def test_schemes_are_values(scheme):
    twin = type(scheme)(**{name: getattr(scheme, name) for name in scheme.__dataclass_fields__})
    assert twin == scheme
    assert hash(twin) == hash(scheme)
    with pytest.raises(AttributeError):
        scheme.columns = 0.5


# ---- what a scheme needs ---------------------------------------------------------------------------------------------


@given(shares, st.integers(0, 10_000))
def test_a_share_of_columns_is_rounded_and_at_least_one(share, K):
    for scheme in (llm_int8(columns=share), rotated(columns=share)):
        count = scheme.static_columns(K)
        assert isinstance(count, int)
        assert 0 <= count <= K
        assert count == (min(K, max(1, round(share * K))) if share else 0)
        assert scheme.needs_columns is (share > 0)


def test_what_schemes_are_to_the_ops_and_to_calibrate():
    facts = {
        str(scheme): (scheme.threshold, scheme.rotation, scheme.rounding, scheme.needs_columns, scheme.needs_moments)
        for scheme in (llm_int8(), llm_int8(3, 0.1), plain(), rotated(), rotated(32, 0), rotated(rounding="gptq"))
    }
    assert facts == {
        "llm_int8": (6.0, 1, "nearest", False, False),
        "llm_int8(threshold=3.0, columns=0.1)": (3.0, 1, "nearest", True, False),
        "plain": (None, 1, "nearest", False, False),
        "rotated": (None, -256, "nearest", True, False),
        "rotated(block=32, columns=0.0)": (None, -32, "nearest", False, False),
        "rotated(rounding='gptq')": (None, -256, "gptq", True, True),
    }
    assert rotated(1).rotation == rotated(1, hadamard="sylvester").rotation == 1
    assert rotated(64, hadamard="sylvester").rotation == 64


# ---- text ------------------------------------------------------------------------------------------------------------


@given(schemes)
def test_text_is_read_back(scheme):
    again = parse_scheme(str(scheme))
    assert again == scheme
    assert str(again) == str(scheme)
    assert parse_scheme(stored_text(scheme), stored=True) == scheme


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (llm_int8(), "llm_int8"),
        (llm_int8(3), "llm_int8(threshold=3.0)"),
        (llm_int8(columns=0.02), "llm_int8(columns=0.02)"),
        (llm_int8(None, 0.5), "llm_int8(threshold=None, columns=0.5)"),
        (llm_int8(0), "llm_int8(threshold=0.0)"),
        (weight_only(), "weight_only"),
        (
            weight_only("fp4_e2m1_bnb", 64, double_quant=True),
            "weight_only(dtype='fp4_e2m1_bnb', group_size=64, double_quant=True)",
        ),
        (llm_int8(math.inf), "plain"),
        (rotated(), "rotated"),
        (rotated(columns=0), "rotated(columns=0.0)"),
        (rotated(16, 0.05, "gptq"), "rotated(block=16, columns=0.05, rounding='gptq')"),
        (rotated(64, hadamard="sylvester"), "rotated(block=64, hadamard='sylvester')"),
        (llm_int8(np.float64(3)), "llm_int8(threshold=3.0)"),
    ],
)
def test_the_text_of_a_scheme(scheme, text):
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("rotated", rotated(64, hadamard="sylvester")),
        ("rotated(block=16, columns=0.05)", rotated(16, 0.05, hadamard="sylvester")),
        ("rotated(columns=0.0, rounding='gptq')", rotated(64, 0, "gptq", "sylvester")),
        ("rotated(block=256, hadamard='regular')", rotated()),
        ("rotated(hadamard='regular')", rotated(64)),
        ("llm_int8(threshold=3.0)", llm_int8(3)),
    ],
)
def test_text_in_files(text, scheme):
    """Files name what differs from Sylvester's matrices of 64 columns, whatever the default is."""
    assert stored_text(scheme) == text
    assert parse_scheme(text, stored=True) == scheme


@pytest.mark.parametrize("text", ["rotated(32, block=16)", "rotated(1, 0, 'nearest', 'regular', 5)", "rotated(a=1)"])
def test_other_text_in_files_is_refused(text):
    with pytest.raises(ValueError, match="legal: "):
        parse_scheme(text, stored=True)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        (" llm_int8( inf )", plain()),
        ("llm_int8(None)", plain()),
        ("llm_int8(1e999)", plain()),
        ("llm_int8(3, columns=0.01)", llm_int8(3, 0.01)),
        ("plain()", plain()),
        ("weight_only()", weight_only()),
        ("rotated(16, rounding='gptq')", rotated(16, rounding="gptq")),
        ("rotated(block=32,\n columns=0)", rotated(32, 0)),
        ("llm_int8(1e1,1.E-3)", llm_int8(10, 0.001)),
        ("llm_int8(1_0.,5e-1)", llm_int8(10, 0.5)),
        ('weight_only("fp4_e2m1", 64, scale_dtype="bfloat16")', weight_only("fp4_e2m1", 64, scale_dtype="bfloat16")),
    ],
)
def test_text_that_people_write(text, scheme):
    assert parse_scheme(text) == scheme


@given(
    st.lists(
        st.sampled_from(
            ("1", "0x1", ".", "e5", "if", "or", "in", "for", "j", "_", " ", "'", '"', "\\", "d", "f'{", "}'")
        )
    )
    .map("".join)
    .map("llm_int8({})".format)
)
@example(r"llm_int8('\d')")
@example(r"llm_int8(b'\d')")
@example("llm_int8(1if 1else 2)")
@example("llm_int8(0x1for x in y)")
@example("llm_int8(1.or 2)")
@example("llm_int8(1jin y)")
@example("llm_int8(f'{1or 2}')")
def test_text_that_python_warns_of_is_refused_without_a_warning(text):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with suppress(ValueError):
            parse_scheme(text)
    assert not warned


@pytest.mark.parametrize(
    "text",
    [
        "int4", "", "6.0", "llm_int8(", "llm_int8(6, 0, 1)", "llm_int8(threshold=-1)", "llm_int8(nan)",
        "llm_int8(-inf)",
        "llm_int8(True)", "llm_int8(keep=0.1)", "rotated(budget=0)", "rotated(3)", "rotated(columns='dynamic')",
        "rotated(columns=None)", "plain(6)", "llm_int8(*[6])", "llm_int8(**{'threshold': 6})", "llm_int8; plain",
        "__import__('os').getcwd()", "schemes.llm_int8()", "llm_int8()()", "llm_int8\0", 6.0, None,
    ],
)  # fmt: skip
def test_other_text_is_refused_and_named(text):
    with pytest.raises(ValueError, match=r"legal: llm_int8\(threshold=6, columns=0\), rotated\(\.\.\.\)") as refused:
        parse_scheme(text)
    assert f"scheme {text!r}: " in str(refused.value)
