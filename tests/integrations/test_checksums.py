"""Checksums are those of the bytes in the file, and each file that int8fx has written has one for each tensor."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from support import models

import int8fx
from int8fx.integrations.checksums import KEY, WANTED, adds_checksums, check_file, checksum, checksums

DTYPES = [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.float64]


def read_header(raw: bytes) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def assert_as_documented(raw: bytes) -> None:
    header, data = read_header(raw)
    expected = json.loads(header.pop("__metadata__")[KEY])
    assert expected == {k: f"{zlib.crc32(data[slice(*entry['data_offsets'])]):08x}" for k, entry in header.items()}


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans(), st.integers(0, 99))
def test_a_checksum_is_that_of_the_bytes_in_the_file(dtype, shape, strided, seed):
    torch.manual_seed(seed)
    tensor = torch.randint(0, 100, (*shape, 2)).to(dtype)
    tensor = tensor[..., 1] if strided else tensor
    before = tensor.clone()
    assert_as_documented(save({"t": tensor.contiguous()}, metadata=checksums({"t": tensor})))
    assert torch.equal(tensor, before)


def test_every_bit_counts():
    data = torch.arange(100, dtype=torch.uint8)
    flipped = [data ^ (torch.arange(100) == at).to(torch.uint8) * (1 << bit) for at in range(100) for bit in range(8)]
    assert len({checksum(tensor) for tensor in (data, *flipped)}) == 801


def in_attention(name: str, _) -> bool:
    return "att" in name.lower()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "t5", "vit"])
def test_files_of_transformers_have_the_checksums_of_their_tensors(name, tmp_path):
    """By their final names: of experts that transformers splits when it saves, and in each of several files."""
    model, _ = models.ALL[name]()
    int8fx.convert(model, select=in_attention).save_pretrained(tmp_path, max_shard_size="60KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert_as_documented(file.read_bytes())
        check_file(file)


def test_float_models_are_saved_without_checksums(tmp_path):
    models.llama()[0].save_pretrained(tmp_path)
    assert KEY not in read_header((tmp_path / "model.safetensors").read_bytes())[0]["__metadata__"]


def test_checksums_are_written_if_they_are_wanted_and_files_are_reproducible(tmp_path):
    tensors, write = {"t\n\x7f\u00e9\u2028": torch.ones(3), "s": torch.ones(2)}, adds_checksums(save_file)
    for metadata in ({"format": "pt"}, {KEY: "{}"}, None):
        write(tensors, tmp_path / "m", metadata=metadata)
        assert read_header((tmp_path / "m").read_bytes())[0].get("__metadata__") == metadata
    others = {name: name for name in "zyxwvu"}
    files = set()
    for _ in range(5):
        write(tensors, tmp_path / "m", metadata={"format": "pt", **others, **WANTED})
        files.add((tmp_path / "m").read_bytes())
        check_file(tmp_path / "m")
    [raw] = files
    assert_as_documented(raw)
    expected = dict(sorted({"format": "pt", **others, **checksums(tensors)}.items()))
    assert list(read_header(raw)[0]["__metadata__"].items()) == list(expected.items())
    assert load_file(tmp_path / "m").keys() == tensors.keys()


def test_what_is_said_of_a_file(tmp_path):
    file: Path = tmp_path / "m.safetensors"
    metadata = checksums({"a": torch.ones(3), "b": torch.zeros(3), "elsewhere": torch.ones(1)})
    save_file({"a": torch.ones(3), "b": torch.zeros(3)}, file, metadata=metadata)
    check_file(file)
    for tensors, name in (
        ({"a": torch.zeros(3), "b": torch.ones(3)}, "a"),
        ({"b": -torch.zeros(3)}, "b"),
        ({"a": torch.ones(3), "c": torch.ones(3)}, "c"),
    ):
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(ValueError, match=f"int8fx: {file}: tensor '{name}' has the checksum '.*', and not"):
            check_file(file)
        for none in ({}, None, WANTED):
            save_file(tensors, file, metadata=none)
            check_file(file)
    for text in ("{", "[]", "5", "[" * 100_000):
        save_file({"a": torch.ones(3)}, file, metadata={KEY: text})
        with pytest.raises(ValueError, match=f"{file}: the entry 'int8fx_checksums' of its header cannot be read"):
            check_file(file)
