"""The time of a forward by kind of kernel."""

from dataclasses import replace

import pytest
import torch
from support import tiny_models
from transformers import LlamaForCausalLM

from int8fx.tools.bench import profile
from int8fx.tools.bench.candidates import BFLOAT16_EAGER, INT8FX


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("int8fx::quantize_rowwise", "quantisation"),
        ("int8fx::linear_quantized", "linears"),
        ("mkldnn::_linear_pointwise", "linears"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("graph_0_cpp_fused__to_copy_add_mean_mul_pow_rsqrt_5", "norms"),
        ("graph_0_cpp_fused_cat_neg_slice_transpose_view_1", "fused by Inductor"),
        ("aten::view", "other kernels"),
    ],
)
def test_kernels_have_a_kind(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_a_profile_adds_up():
    model = LlamaForCausalLM(tiny_models.lm_config(tie_word_embeddings=False)).bfloat16().eval()
    contenders = (replace(INT8FX, compiles_models=False), BFLOAT16_EAGER)
    by_kind = {c.name: profile.forwards_by_kind(model, c, torch.ones(1, 16, dtype=torch.long)) for c in contenders}
    cases = list(profile.cases(by_kind, "tiny", 1))
    assert [case.name for case in cases] == [*profile.KINDS, profile.TOTAL]
    for candidate in contenders:
        values = [case.measured[candidate.name].values for case in cases]
        assert all(len(rounds) == profile.ROUNDS for rounds in values)
        assert all(sum(of_round[:-1]) == pytest.approx(of_round[-1]) for of_round in zip(*values, strict=True))
    by_name = {case.name: case for case in cases}
    assert all(min(by_name["linears"].measured[c.name].values) > 0 for c in contenders)
    assert max(by_name["quantisation"].measured[BFLOAT16_EAGER.name].values) == 0
