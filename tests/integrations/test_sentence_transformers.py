"""sentence-transformers: converted models encode, and come back with the same embeddings bit by bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.conversion import flip_last_bit
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import int8fx
from int8fx.tools.cli import main

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["the cat sat on the mat", "a dog", "the mat sat on a cat and a dog"]
SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated(16, columns=0.05)}


def write_bert(folder: Path, cls=transformers.BertModel, **settings) -> Path:
    """A tiny BERT with a tokenizer of words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in TEXTS for word in text.split()})]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    pair = "[CLS] $A [SEP] $B [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    cls(transformers.BertConfig(vocab_size=len(words), **sizes, **settings)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A float model with mean pooling, a dense layer and normalisation."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    transformer = Transformer(str(write_bert(tmp_path / "bert")))
    model = sentence_transformers.SentenceTransformer(
        modules=[transformer, Pooling(64), Dense(64, 32), Normalize()], device="cpu"
    )
    model.save(str(tmp_path / "float"))
    return tmp_path / "float"


def load(folder: Path, **options):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", **options)


def assert_round_trip(model, folder: Path) -> None:
    expected = model.encode(TEXTS)
    model.save(str(folder))
    again = load(folder)
    assert int8fx.is_packed(again)
    assert (again.encode(TEXTS) == expected).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("part", ["model", "module", "transformers model"])
def test_a_converted_model_comes_back(part, scheme, folder, tmp_path):
    model = load(folder)
    floats = model.encode(TEXTS)
    if part == "model":
        int8fx.convert(model, SCHEMES[scheme])
    else:
        int8fx.convert(model[0] if part == "module" else model[0].auto_model, SCHEMES[scheme])
    assert int8fx.is_packed(model[2]) == (part == "model")
    assert ((model.encode(TEXTS) * floats).sum(1) > 0.99).all()
    assert_round_trip(model, tmp_path / "int8")


def test_it_is_quantised_while_it_loads(folder, tmp_path):
    model = load(folder, model_kwargs={"quantization_config": int8fx.Int8FxConfig("rotated")})
    expected = load(folder)
    int8fx.convert(expected[0], int8fx.rotated())
    assert (model.encode(TEXTS) == expected.encode(TEXTS)).all()
    assert_round_trip(model, tmp_path / "int8")


def test_the_command_writes_a_folder_that_loads(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "int8"), "--scheme", "rotated"]) == 0
    model = load(folder)
    int8fx.convert(model[0], int8fx.rotated())
    again = load(tmp_path / "int8")
    assert len(again) == 4
    assert int8fx.is_packed(again[0])
    assert (again.encode(TEXTS) == model.encode(TEXTS)).all()


def test_a_damaged_dense_layer_is_refused_by_name(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    int8fx.convert(model := load(folder))
    model.save(str(tmp_path / "int8"))
    file = tmp_path / "int8" / "2_Dense" / "model.safetensors"
    state = load_file(file)
    save_file({key: t for key, t in state.items() if not key.endswith("_scale")}, file)
    with pytest.raises(RuntimeError, match=r"linear.weight.* a part of it is missing: linear.weight_scale"):
        load(tmp_path / "int8")
    save_file(state | {"linear.weight_format": state["linear.weight_format"] * 0}, file)
    with pytest.raises(ValueError, match=r"linear.weight_format.*found a text that is not int8fx's"):
        load(tmp_path / "int8")
    model.save(str(tmp_path / "again"))
    flip_last_bit(file := tmp_path / "again" / "2_Dense" / "model.safetensors", "linear.weight_codes")
    with pytest.raises(ValueError, match=f"{file}: tensor 'linear.weight_codes' has the checksum"):
        load(tmp_path / "again")


def test_a_cross_encoder_comes_back(tmp_path):
    source = write_bert(tmp_path / "float", transformers.BertForSequenceClassification, num_labels=1)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2])]
    model = sentence_transformers.CrossEncoder(str(source), device="cpu")
    int8fx.convert(model)
    scores = model.predict(pairs)
    model.save(str(tmp_path / "int8"))
    again = sentence_transformers.CrossEncoder(str(tmp_path / "int8"), device="cpu")
    assert int8fx.is_packed(again)
    assert (again.predict(pairs) == scores).all()


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 2])
def test_without_int8fx_loading_is_an_error(part, folder, tmp_path):
    model = load(folder)
    int8fx.convert(model[part])
    model.save(str(tmp_path / "int8"))
    script = "import sys; from sentence_transformers import SentenceTransformer; SentenceTransformer(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "int8"], capture_output=True, text=True)
    assert done.returncode
    assert ("ignore_mismatched_sizes" if part == 0 else 'Missing key(s) in state_dict: "linear.weight"') in done.stderr
