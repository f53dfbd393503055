"""lm-evaluation-harness: `HFLM` scores and generates with converted models and with int8 checkpoints."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from support import models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

import int8fx

lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

TEXTS = [("the cat", " sat on"), ("a dog sat on the mat", " and"), ("a", " mat")]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A float llama with a tokenizer of words."""
    model, _ = models.llama()
    words = sorted({word for pair in TEXTS for text in pair for word in text.split()})
    tokenizer = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(["<s>", *words])}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "unk_token": "<s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "float")
    model.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def converted(folder) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return int8fx.convert(model, int8fx.rotated()), transformers.AutoTokenizer.from_pretrained(folder)


def harness(pretrained, **options):
    pretrained = str(pretrained) if isinstance(pretrained, Path) else pretrained
    return huggingface.HFLM(pretrained=pretrained, device="cpu", batch_size=2, **options)


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def scores(model) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", TEXTS))


def test_a_converted_model_and_its_checkpoint_score_the_same_and_close_to_the_float_model(folder, converted, tmp_path):
    model, tokenizer = converted
    floats = scores(harness(folder))
    in_memory = scores(harness(model, tokenizer=tokenizer))
    assert in_memory != floats
    for (value, greedy), (expected, expected_greedy) in zip(in_memory, floats, strict=True):
        assert value == pytest.approx(expected, rel=0.02)
        assert type(greedy) is type(expected_greedy)
    model.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    loaded = harness(tmp_path / "int8")
    assert int8fx.is_packed(loaded.model)
    assert scores(loaded) == in_memory
    half = harness(tmp_path / "int8", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert [value for value, _ in scores(half)] == pytest.approx([value for value, _ in in_memory], rel=0.05)


def test_generation_and_rolling_likelihood(converted):
    model, tokenizer = converted
    wrapped = harness(model, tokenizer=tokenizer)
    options = {"until": ["."], "max_gen_toks": 4}
    (text,) = wrapped.generate_until(requests("generate_until", [("the cat", options)]))
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    (value,) = wrapped.loglikelihood_rolling(requests("loglikelihood_rolling", [("the cat sat",)]))
    assert value < 0


@pytest.mark.slow
def test_simple_evaluate_on_a_local_task(folder, converted, tmp_path):
    pytest.importorskip("datasets")
    from lm_eval.tasks import TaskManager

    rows = [{"text": text, "choices": [right, " dog"], "label": 0} for text, right in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML
    model, tokenizer = converted
    model.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    options = {
        "tasks": ["tiny"],
        "task_manager": TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        "bootstrap_iters": 0,
    }
    in_memory = lm_eval.simple_evaluate(model=harness(model, tokenizer=tokenizer), **options)
    args = f"pretrained={tmp_path / 'int8'}"
    loaded = lm_eval.simple_evaluate(model="hf", model_args=args, device="cpu", batch_size=2, **options)
    assert loaded["results"] == in_memory["results"]
    values = [[sample["resps"] for sample in result["samples"]["tiny"]] for result in (loaded, in_memory)]
    assert values[0] == values[1]
    assert len(values[0]) == len(TEXTS)
    count = transformers.AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert loaded["config"]["model_num_parameters"] == count
