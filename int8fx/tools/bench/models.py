"""Whole language models: compiled forwards, decode steps with a static cache, eager ``generate()``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import int8fx

from .candidates import BFLOAT16, BITSANDBYTES, FLOAT32, INT8FX, bitsandbytes_linear, torchao_quantize
from .machine import missing
from .products import OUTLIERS, Settings
from .timing import Case, Measured, Work, interleave

LARGE, SMALL = "an LM of 0.5B parameters", "SmolLM2-135M"
MODELS = (LARGE, SMALL)
TOKENS, QUICK_TOKENS = 512, 64  # of a forward
BATCHES = (1, 8)  # of a decode step
PROMPT, CACHE, NEW_TOKENS = 4, 256, 16  # tokens: before the first step, in the static cache, that generate() makes
QUICK_LAYERS = 2
HEAD_16, HEAD_8 = "lm_head in 16 bits", "lm_head converted"
HEADED = (INT8FX, FLOAT32, BFLOAT16)  # whose forward is also timed with the logits of every token


def load(name: str, layers: int | None = None) -> Any:
    """The causal language model ``name`` of `MODELS` in bfloat16 and eval mode.

    The large one has random weights, in which six channels of every norm are large, as in trained models: the inputs of
    its products have six outlier columns. So has the small one if it is cut to ``layers``; whole, it is the real one.

    Raises:
        ModelError: the small one cannot be had.
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
class Contender:
    """A model in one of its forms.

    decoder: the stack of layers, without its head.
    heads: `HEAD_16` and `HEAD_8` -> the head; the same one twice where 16 bits are all there is.
    """

    decoder: Any
    heads: dict[str, Any]
    compiled: bool

    def compile(self, module: Any) -> Any:
        return torch.compile(module, dynamic=False, fullgraph=True) if self.compiled else module


@dataclass(frozen=True)
class Form:
    """How to turn a bfloat16 part of a model, the decoder or the head, into a contender's; in place."""

    name: str
    convert: Callable[[Any], Any]
    compiled: bool = True
    converts_head: bool = True
    needs: tuple[str, ...] = ()


def _bitsandbytes(model: Any) -> Any:
    if isinstance(model, nn.Linear):
        return bitsandbytes_linear(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, bitsandbytes_linear(module))
    return model


def _torchao(weight_only: bool) -> Callable[[Any], Any]:
    return lambda model: torchao_quantize(nn.Sequential(model), weight_only)[0]  # type: ignore[index]


PEERS = (
    Form(BITSANDBYTES, _bitsandbytes, compiled=False, needs=("bitsandbytes",)),
    Form("torchao dynamic", _torchao(weight_only=False), needs=("torchao",)),
    Form("torchao weight-only", _torchao(weight_only=True), needs=("torchao",)),
)
FORMS = (
    Form(INT8FX, int8fx.convert),
    Form(FLOAT32, lambda model: model.float(), converts_head=False),
    Form(BFLOAT16, lambda model: model, converts_head=False),
    Form("bfloat16, eager", lambda model: model, compiled=False, converts_head=False),
    *PEERS,
)


def contend(model: Any, form: Form) -> Contender:
    """A copy of ``model`` in ``form``."""
    decoder, head = copy.deepcopy(model.model), copy.deepcopy(model.lm_head)
    if not form.converts_head:
        head = form.convert(head)
        return Contender(form.convert(decoder), {HEAD_16: head, HEAD_8: head}, form.compiled)
    return Contender(form.convert(decoder), {HEAD_16: model.lm_head, HEAD_8: form.convert(head)}, form.compiled)


def models(settings: Settings) -> Iterator[Case]:
    """Each of `MODELS`: the forward of the decoder, with either head; decode steps; ``generate()``.

    The decoder and the head are compiled apart, so that one compilation of the decoder serves for both heads.
    """
    for title, model in each_model(settings, "models"):
        if isinstance(model, Case):
            yield model
        else:
            yield from compare(settings, model, title)


def each_model(settings: Settings, suite: str) -> Iterator[tuple[str, Any]]:
    """Title and model for each of `MODELS`, cut if quick; a case that says why in place of what cannot be had."""
    from ..data.models import ModelError

    layers = QUICK_LAYERS if settings.quick else None
    for name in MODELS:
        settings.say(f"{suite}: making {name}")
        try:
            model = load(name, layers)
        except ModelError as error:
            reason = str(error).split("\n")[0]
            model = Case(suite, "everything", INT8FX, {INT8FX: Measured(note=f"not run: {reason}")}, subject=name)
        yield f"{name}, {layers} layers" if layers else name, model


def compare(settings: Settings, model: Any, title: str) -> Iterator[Case]:
    """The cases of one model."""
    contenders: dict[str, Contender] = {}
    absent: dict[str, Measured] = {}
    for form in FORMS:
        if reason := missing(*form.needs):
            absent[form.name] = Measured(note=reason)
            continue
        settings.say(f"models: {title}: {form.name}")
        try:
            contenders[form.name] = contend(model, form)
        except Exception as error:  # whatever a peer may raise
            absent[form.name] = Measured(note=f"failed: {type(error).__name__}: {error}"[:200])
    tokens = QUICK_TOKENS if settings.quick else TOKENS
    batches = BATCHES[:1] if settings.quick else BATCHES
    groups = [forwards(contenders, tokens, HEADED), *(decodes(contenders, batch) for batch in batches)]
    for group in (*groups, generations(contenders, model)):
        torch._dynamo.reset()
        for name, work in group:
            settings.say(f"models: {title}: {name}")
            with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
                found = interleave(work, settings.rounds)
            order = {form.name: (found | absent)[form.name] for form in FORMS if form.name in found | absent}
            yield Case("models", name, INT8FX, order, subject=title, threads=settings.threads)


def forwards(
    contenders: dict[str, Contender], tokens: int, headed: Collection[str]
) -> Iterator[tuple[str, dict[str, Work]]]:
    """A forward of ``[1, tokens]``: the decoder; of ``headed``, also with the logits of every token by either head."""
    vocabulary = min(c.decoder.config.vocab_size for c in contenders.values())
    ids = torch.randint(0, vocabulary, (1, tokens))
    decoders = {label: c.compile(c.decoder) for label, c in contenders.items()}

    def hidden(label: str) -> Tensor:
        return decoders[label](input_ids=ids, use_cache=False).last_hidden_state

    yield f"forward, {tokens} tokens", {label: [lambda label=label: hidden(label)] for label in contenders}  # type: ignore[misc]
    for kind in (HEAD_16, HEAD_8):
        heads = {label: c.compile(c.heads[kind]) for label, c in contenders.items() if label in headed}
        yield (
            f"forward, {kind}",
            {label: [lambda label=label, head=head: head(hidden(label))] for label, head in heads.items()},  # type: ignore[misc]
        )


def decodes(contenders: dict[str, Contender], batch: int) -> Iterator[tuple[str, dict[str, Work]]]:
    """A step of one token for each of ``batch`` sequences, with a static cache, and its logits by either head."""
    steps = {label: decode_step(c, batch) for label, c in contenders.items()}
    for kind in (HEAD_16, HEAD_8):
        heads = {label: c.compile(c.heads[kind]) for label, c in contenders.items()}
        yield (
            f"decode, batch {batch}, {kind}",
            {
                label: [lambda step=steps[label], head=head: head(step())]  # type: ignore[misc]
                for label, head in heads.items()
            },
        )


def decode_step(contender: Contender, batch: int) -> Callable[[], Tensor]:
    """A call is a step; when the cache is full, it begins anew."""
    from transformers import StaticCache

    cache: Any = None
    left = 0
    compiled = contender.compile(contender.decoder)

    def step() -> Tensor:
        nonlocal cache, left
        if left == 0:
            if cache is None:
                cache = StaticCache(config=contender.decoder.config, max_cache_len=CACHE)
            else:
                cache.reset()
            contender.decoder(input_ids=torch.ones(batch, PROMPT, dtype=torch.long), past_key_values=cache)
            left = CACHE - PROMPT
        left -= 1
        return compiled(input_ids=torch.ones(batch, 1, dtype=torch.long), past_key_values=cache).last_hidden_state

    return step


def generations(contenders: dict[str, Contender], model: Any) -> Iterator[tuple[str, dict[str, Work]]]:
    """``generate()`` as users call it: eager, greedy, lm_head in 16 bits. Not for what is meant to be compiled only."""
    prompt = torch.randint(0, model.config.vocab_size, (1, 16))

    def generate(whole: Any) -> Callable[[], object]:
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        return lambda: whole.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)

    work: dict[str, Work] = {}
    for label in (INT8FX, FLOAT32, BFLOAT16, BITSANDBYTES):
        if label in contenders:
            whole = copy.copy(model)
            parts = {"model": contenders[label].decoder, "lm_head": contenders[label].heads[HEAD_16]}
            whole._modules = {**model._modules, **parts}
            work[label] = [generate(whole)]
    yield f"generate(), {NEW_TOKENS} tokens, eager", work
