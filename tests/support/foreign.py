"""Quantised layers in the layouts of other libraries, written value by value from their documents."""

from __future__ import annotations

from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor


class Groups(NamedTuple):
    """A layer: codes ``[N, K]`` and zero points ``[N, G]`` below ``2**bits``, scales ``[N, G]``, size of a group."""

    codes: np.ndarray
    zero_point: np.ndarray
    scale: np.ndarray
    bits: int
    size: int

    def weight(self) -> np.ndarray:
        """``[N, K]`` float32, exact: the product of a small integer and a float16."""
        group = np.arange(self.codes.shape[1]) // self.size
        steps = self.codes.astype(np.int64) - self.zero_point.astype(np.int64)[:, group]
        return steps.astype(np.float32) * self.scale.astype(np.float32)[:, group]


def groups(
    rng: np.random.Generator, N: int, K: int, size: int, bits: int = 4, *, symmetric: bool = False, lowest: int = 1
) -> Groups:
    """A random layer; zero points from ``lowest``."""
    G, count = -(-K // size), 2**bits
    zero = np.full((N, G), count // 2) if symmetric else rng.integers(lowest, count, (N, G))
    scale = (rng.uniform(0.5, 2, (N, G)) / 64).astype(np.float16)
    return Groups(rng.integers(0, count, (N, K)), zero, scale, bits, size)


def _words(values: np.ndarray, bits: int, order: tuple[int, ...]) -> np.ndarray:
    """``[R, C]`` as int32 ``[R, C * bits / 32]``; of a word, the j-th lowest value is that of column ``order[j]``."""
    R, C = values.shape
    count = 32 // bits
    words = np.zeros((R, C // count), dtype=np.uint32)
    for c in range(C // count):
        for j in range(count):
            words[:, c] |= values[:, c * count + order[j]].astype(np.uint32) << np.uint32(bits * j)
    return words.view(np.int32)


def gptq(prefix: str, layer: Groups, *, v2: bool = False) -> dict[str, Tensor]:
    """AutoGPTQ's tensors, as ``QuantLinear.pack`` of its ``qlinear_cuda_old.py`` makes them."""
    order = tuple(range(32 // layer.bits))
    stored = layer.zero_point - (0 if v2 else 1)
    return _tensors(prefix, {
        "qweight": _words(layer.codes, layer.bits, order).T,
        "qzeros": _words(stored.T, layer.bits, order),
        "scales": layer.scale.T,
        "g_idx": (np.arange(layer.codes.shape[1]) // layer.size).astype(np.int32),
    })  # fmt: skip


def awq(prefix: str, layer: Groups) -> dict[str, Tensor]:
    """AutoAWQ's tensors, as ``WQLinear_GEMM.from_linear`` makes them."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return _tensors(prefix, {
        "qweight": _words(layer.codes.T, 4, order),
        "qzeros": _words(layer.zero_point.T, 4, order),
        "scales": layer.scale.T,
    })  # fmt: skip


def _tensors(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def random_blocks(rng: np.random.Generator, kind: str, N: int, K: int) -> np.ndarray:
    """Rows of any blocks of a type whose first two bytes are a finite float16 scale."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (N, K // block, size), dtype=np.uint8)
    scale = (rng.normal(size=(N, K // block)) / 64).astype(np.float16)
    scale[rng.random(scale.shape) < 0.1] = 0
    blocks[..., :2] = scale[..., None].view(np.uint8)
    return blocks.reshape(N, -1)


def write_gguf(
    path: Any, model: Any, kinds: dict[str, str], *, raw: dict[str, np.ndarray] | None = None, **metadata: int
) -> None:
    """Writes a Llama of transformers as llama.cpp's converter does.

    Args:
        kinds: part of the name of matrices -> their type; F32 for the others.
        raw: name of a tensor -> its rows of blocks, in place of the quantised weight.
        metadata: name, with _ for ``.`` -> value, in addition.
    """

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, value in metadata.items():
        writer.add_uint32(key.replace("_", "."), value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in state.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(key, try_suffixes=(".weight",))
        data = tensor.float().numpy()
        for part, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
            if part in target:  # the two halves of each head's rows are interleaved
                data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        data = np.ascontiguousarray(data)
        kind = next((kind for part, kind in kinds.items() if part in target and data.ndim == 2), "F32")
        type = gguf.GGMLQuantizationType[kind]
        rows = (raw or {}).get(target)
        writer.add_tensor(target, gguf.quants.quantize(data, type) if rows is None else rows, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
