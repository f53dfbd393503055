"""Language models: compiled forwards, decode steps with a static cache, eager ``generate()``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoding import StaticDecoder
from .candidates import BFLOAT16, BITSANDBYTES, FLOAT32, FOR_MODELS, INT8FX, Candidate, build_each
from .products import OUTLIERS
from .settings import Settings
from .timing import Case, Measured, Work, interleave, thread_warning

LARGE, SMALL = "an LM of 0.5B parameters", "SmolLM2-135M"
MODELS = (LARGE, SMALL)
TOKENS, QUICK_TOKENS = 512, 64  # of a forward
BATCHES, QUICK_BATCHES = (1, 8), (1,)  # of a decode step
PROMPT, CACHE, NEW_TOKENS = 4, 256, 16  # tokens: before the first step, in the static cache, that generate() makes
QUICK_LAYERS = 2
HEAD_16, HEAD_8 = "lm_head in 16 bits", "lm_head converted"
WITH_LOGITS = (INT8FX.name, FLOAT32.name, BFLOAT16.name)  # whose forward is also timed with every token's logits
GENERATING = (*WITH_LOGITS, BITSANDBYTES.name)  # who is used eagerly

Steps = Iterator[tuple[str, dict[str, Work]]]  # the name of a case, and each candidate's calls


def load(name: str, layers: int | None = None) -> Any:
    """The causal language model ``name`` of `MODELS` in bfloat16 and eval mode.

    `LARGE` has random weights. Six channels of each of its norms are large, as in trained models, so the inputs of its
    linear layers have six outlier columns. `SMALL` is the trained model, or, if cut to ``layers``, built like `LARGE`.

    Raises:
        ModelError: the trained model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    if name not in MODELS:
        raise ValueError(f"no model {name!r}; legal: {', '.join(MODELS)}")
    if name == SMALL and layers is None:
        from ..data.models import load as load_real

        return load_real("smollm2", torch.bfloat16)[0]
    config: Any
    if name == LARGE:
        config = Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=layers or 24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    else:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers or 30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight[torch.linspace(0, config.hidden_size - 1, OUTLIERS).long()] = 12.0
    return model


@dataclass
class ConvertedModel:
    """A model as one candidate runs it.

    decoder: the stack of layers, without its head.
    heads: `HEAD_16` and `HEAD_8` -> the head; the same one twice if the candidate's weights are not int8.
    """

    decoder: Any
    heads: dict[str, Any]
    compiled: bool

    def compile(self, module: Any) -> Any:
        """``module``, a part of this model, compiled if the candidate compiles models."""
        return torch.compile(module, dynamic=False, fullgraph=True) if self.compiled else module


def convert_copy(model: Any, candidate: Candidate) -> ConvertedModel:
    """A copy of ``model`` as ``candidate`` runs it."""
    decoder, head = copy.deepcopy(model.model), copy.deepcopy(model.lm_head)
    converted = candidate.convert(head)
    heads = {HEAD_16: model.lm_head if candidate.int8 else converted, HEAD_8: converted}
    return ConvertedModel(candidate.convert(decoder), heads, candidate.compiles_models)


def models(settings: Settings) -> Iterator[Case]:
    """Each of `MODELS`: forwards of the decoder, and with either head; decode steps; ``generate()``.

    The decoder and the head are compiled separately, so that one compilation of the decoder serves for both heads.
    """
    for title, model in each_model(settings, "models"):
        if isinstance(model, Case):
            yield model
        else:
            yield from compare(settings, model, title, FOR_MODELS)


def each_model(settings: Settings, suite: str) -> Iterator[tuple[str, Any]]:
    """Title and model for each of `MODELS`; if it cannot be loaded, a case that says why instead of the model."""
    from ..data.models import ModelError

    for name in MODELS:
        settings.say(f"{suite}: making {name}")
        model: Any
        try:
            model = load(name, num_layers(settings))
        except ModelError as error:
            reason = str(error).split("\n")[0]
            note = Measured(note=f"not run: {reason}")
            model = Case(suite, "everything", INT8FX.name, {INT8FX.name: note}, subject=name)
        yield title_of(settings, name), model


def num_layers(settings: Settings) -> int | None:
    """How many layers a model is cut to; None: it is not cut."""
    return QUICK_LAYERS if settings.quick else None


def num_tokens(settings: Settings) -> int:
    """Of a forward."""
    return QUICK_TOKENS if settings.quick else TOKENS


def title_of(settings: Settings, name: str) -> str:
    """A model's name, and to how many layers it is cut."""
    layers = num_layers(settings)
    return f"{name}, {layers} layers" if layers else name


def compare(settings: Settings, model: Any, title: str, candidates: Sequence[Candidate]) -> Iterator[Case]:
    """The cases of one ``model`` with all of ``candidates``; the first one is the base."""

    def build(candidate: Candidate) -> ConvertedModel:
        settings.say(f"models: {title}: {candidate.name}")
        return convert_copy(model, candidate)

    converted, absent = build_each(candidates, build)
    on_cpu = settings.device == "cpu"
    groups = [forwards(converted, num_tokens(settings), WITH_LOGITS if on_cpu else converted)]
    groups += [decodes(converted, batch) for batch in (QUICK_BATCHES if settings.quick else BATCHES)]
    if on_cpu:
        groups.append(generations(converted, model))
    for group in groups:
        torch._dynamo.reset()
        for name, work in group:
            settings.say(f"models: {title}: {name}")
            with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
                measured = interleave(work if on_cpu else _waiting(work), settings.max_rounds)
            if on_cpu and (warning := thread_warning(measured, settings.num_threads)):
                settings.say(warning)
            measured = measured | absent
            ordered = {c.name: measured[c.name] for c in candidates if c.name in measured}
            yield Case("models", name, candidates[0].name, ordered, subject=title, threads=settings.num_threads)


def _waiting(work: Mapping[str, Work]) -> dict[str, Work]:
    """``work`` whose calls end when the GPU has done what they launched."""

    def run(call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize()

    return {label: [lambda call=call: run(call) for call in calls] for label, calls in work.items()}  # type: ignore[misc]


def forwards(converted: dict[str, ConvertedModel], tokens: int, with_logits: Collection[str]) -> Steps:
    """A forward of ``[1, tokens]``: the decoder; then, of ``with_logits`` only, every token's logits by either head."""
    vocabulary = min(model.decoder.config.vocab_size for model in converted.values())
    ids = torch.randint(0, vocabulary, (1, tokens))
    decoders = {label: model.compile(model.decoder) for label, model in converted.items()}

    def hidden(label: str) -> Tensor:
        return decoders[label](input_ids=ids, use_cache=False).last_hidden_state

    yield f"forward, {tokens} tokens", {label: [lambda label=label: hidden(label)] for label in converted}  # type: ignore[misc]
    for kind in (HEAD_16, HEAD_8):
        heads = {label: model.compile(model.heads[kind]) for label, model in converted.items() if label in with_logits}
        yield (
            f"forward, {kind}",
            {label: [lambda label=label, head=head: head(hidden(label))] for label, head in heads.items()},  # type: ignore[misc]
        )


def decodes(converted: dict[str, ConvertedModel], batch: int) -> Steps:
    """A step of one token for each of ``batch`` sequences, with a static cache, and its logits by either head."""
    steps = {label: decode_step(model, batch) for label, model in converted.items()}
    for kind in (HEAD_16, HEAD_8):
        heads = {label: model.compile(model.heads[kind]) for label, model in converted.items()}
        yield (
            f"decode, batch {batch}, {kind}",
            {
                label: [lambda step=steps[label], head=head: head(step())]  # type: ignore[misc]
                for label, head in heads.items()
            },
        )


def decode_step(model: ConvertedModel, batch: int, max_tokens: int = CACHE) -> Callable[[], Tensor]:
    """A function that decodes one token for each of ``batch`` sequences and returns hidden states ``[batch, 1, D]``.

    After ``max_tokens`` tokens the cache is full, and the next call begins with the prompt again.
    """
    prompt, token = (torch.ones(batch, n, dtype=torch.long) for n in (PROMPT, 1))
    decoder = StaticDecoder(model.decoder, model.compile(model.decoder), prompt, max_tokens - PROMPT)
    return lambda: decoder(token).last_hidden_state


def generations(converted: dict[str, ConvertedModel], model: Any) -> Steps:
    """``generate()`` as users call it: eager, greedy, lm_head in 16 bits; of `GENERATING`."""
    prompt = torch.randint(0, model.config.vocab_size, (1, 16))

    def generate(twin: Any) -> Callable[[], object]:
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        return lambda: twin.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)

    work: dict[str, Work] = {}
    for label in GENERATING:
        if label in converted:
            twin = copy.copy(model)
            parts = {"model": converted[label].decoder, "lm_head": converted[label].heads[HEAD_16]}
            twin._modules = {**model._modules, **parts}
            work[label] = [generate(twin)]
    yield f"generate(), {NEW_TOKENS} tokens, eager", work
