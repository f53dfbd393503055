"""Language models: compiled forwards, decode steps with a static cache, eager ``generate()``. A text encoder."""

from __future__ import annotations

import copy
import ctypes
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decoding import StaticDecoder
from ..machine import missing
from ..metrics import cosine_distance
from .candidates import (
    BFLOAT16,
    BFLOAT16_FROZEN,
    BITSANDBYTES,
    FLOAT32,
    FOR_DECODING,
    FOR_ENCODERS,
    FOR_MODELS,
    FOR_OUTLIERS,
    INT8FX,
    TORCHAO_FROZEN,
    ZENTORCH,
    Candidate,
    build_each,
    random_columns,
)
from .products import OUTLIERS
from .settings import Settings
from .timing import Case, Measured, Work, failure, interleave

LARGE, SMALL, ENCODER = "an LM of 0.5B parameters", "SmolLM2-135M", "all-MiniLM-L6-v2"
OUTLYING = f"{LARGE}, 9 % outlier columns"
SHARE = 0.09  # of the columns of each input in OUTLYING, as on text in a trained LM of this size
TRAINED = {SMALL: "smollm2", ENCODER: "minilm"}  # their names in `data.models`
LMS = {LARGE: FOR_MODELS, OUTLYING: FOR_OUTLIERS, SMALL: FOR_MODELS}  # and who is timed
TOKENS, QUICK_TOKENS = 512, 64  # of a forward
SENTENCES, QUICK_SENTENCES = ((32, 128), (1, 22)), ((2, 22),)  # texts and their tokens, of the encoder's forward
BATCHES, QUICK_BATCHES = (1, 8), (1,)  # of a decode step
PROMPT, CACHE, NEW_TOKENS = 4, 256, 16  # tokens: before the first step, in the static cache, that generate() makes
QUICK_LAYERS = 2
COMPARED = 128  # rows of a result whose cosine to float32 is computed, at most
HEAD_16, HEAD_8 = "lm_head in 16 bits", "lm_head converted"
WITH_LOGITS = tuple(  # whose forward is also timed with every token's logits
    candidate.name for candidate in (INT8FX, FLOAT32, BFLOAT16, BFLOAT16_FROZEN, TORCHAO_FROZEN, ZENTORCH)
)
GGUF_TYPES = ("Q8_0", "Q4_0")
GENERATING = tuple(candidate.name for candidate in (INT8FX, FLOAT32, BFLOAT16, BITSANDBYTES))  # who is used eagerly

Steps = Iterator[tuple[str, dict[str, Work]]]  # the name of a case, and each candidate's calls


@dataclass(frozen=True)
class Subject:
    """A model in bfloat16, and what it reads: ``ids [rows, width]``, of real text if the model is trained."""

    title: str
    model: Any
    ids: Tensor


def load(name: str, layers: int | None = None) -> tuple[Any, Any]:
    """The model ``name`` in bfloat16 and eval mode, and its tokenizer; None if its weights are random.

    Six channels of each norm of `LARGE` are large, as in trained models, so the inputs of its linear layers have six
    outlier columns; `OUTLYING` has `SHARE` of them in each (`plant_outliers`). `SMALL` and `ENCODER` are the trained
    models, or, if cut to ``layers``, random ones of their sizes.

    Raises:
        ModelError: the trained model cannot be loaded.
    """
    import transformers

    if name not in (*LMS, ENCODER):
        raise ValueError(f"no model {name!r}; legal: {', '.join((*LMS, ENCODER))}")
    if name in TRAINED and layers is None:
        from ..data.models import load as load_trained

        return load_trained(TRAINED[name], torch.bfloat16)[:2]
    config: Any
    if name == ENCODER:
        config = transformers.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=layers or 6, num_attention_heads=12
        )
        return transformers.AutoModel.from_config(config, dtype=torch.bfloat16).eval(), None
    if name == SMALL:
        config = transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers or 30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    else:
        config = transformers.Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=layers or 24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                _enlarge(module.weight, round(SHARE * config.hidden_size) if name == OUTLYING else OUTLIERS, 12.0)
        if name == OUTLYING:
            plant_outliers(model)
    return model, None


def plant_outliers(model: Any) -> None:
    """Gives the inputs of ``o_proj`` and ``down_proj`` of a `OUTLYING` model `SHARE` of outlier columns.

    The columns come from large values in the bias of ``v_proj`` and from large rows of ``up_proj``. The other weights
    before them are made smaller, so that no other column is an outlier. Tokens stay distinct in all layers, since the
    embedding is made larger and what layers add to it smaller.
    """
    model.model.embed_tokens.weight *= 50
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight *= 0.2
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight *= 0.05
        _enlarge(attention.v_proj.bias, round(SHARE * len(attention.v_proj.bias)), 12.0)
        rows = random_columns(len(mlp.up_proj.weight), round(SHARE * len(mlp.up_proj.weight)))
        mlp.up_proj.weight[rows] *= 60


def _enlarge(values: Tensor, count: int, value: float) -> None:
    values[random_columns(len(values), count)] = value


def read(settings: Settings, model: Any, tokenizer: Any) -> Tensor:
    """``[rows, width]`` token ids: windows of Python's documentation, or random ones if there is no tokenizer."""
    rows, width = max(BATCHES), max(num_tokens(settings), CACHE)
    if not hasattr(model, "lm_head"):
        rows, width = (max(sizes) for sizes in zip(*SENTENCES, strict=True))
    if tokenizer is None:
        return torch.randint(0, model.config.vocab_size, (rows, width))
    from ..data.texts import windows

    return windows(tokenizer, ["pydoc"], rows, width, 0)[0]


@dataclass
class ConvertedModel:
    """A model as one candidate runs it.

    decoder: the stack of layers, without its head; or the whole encoder.
    heads: `HEAD_16` and `HEAD_8` -> the head; the same one twice if the candidate's weights are not int8. Empty if the
        model has none.
    """

    decoder: Any
    heads: dict[str, Any]
    candidate: Candidate

    def compile(self, module: Any) -> Any:
        """``module``, a part of this model, compiled if the candidate compiles models."""
        return self.candidate.compile(module) if self.candidate.compiles_models else module


def convert_copy(model: Any, candidate: Candidate) -> ConvertedModel:
    """A copy of ``model`` as ``candidate`` runs it."""

    def copied(module: Any) -> Any:
        return copy.deepcopy(module).to(candidate.dtype)

    if not hasattr(model, "lm_head"):
        return ConvertedModel(candidate.convert(copied(model)), {}, candidate)
    converted = float_head = candidate.convert(copied(model.lm_head))
    if candidate.int8:
        float_head = model.lm_head if candidate.dtype == torch.bfloat16 else copied(model.lm_head)
    return ConvertedModel(candidate.convert(copied(model.model)), {HEAD_16: float_head, HEAD_8: converted}, candidate)


def models(settings: Settings) -> Iterator[Case]:
    """Each of `LMS`: forwards of the decoder, and with either head; decode steps; ``generate()``. `ENCODER`: forwards.

    The decoder and the head are compiled separately, so that one compilation of the decoder serves for both heads.
    """
    for name, candidates in (*LMS.items(), (ENCODER, FOR_ENCODERS)):
        subject = make(settings, "models", name)
        if isinstance(subject, Case):
            yield subject
        else:
            yield from compare(settings, subject, candidates)


def decoding(settings: Settings) -> Iterator[Case]:
    """A decode step of `SMALL`, head converted, with weights of 8 and 4 bits, and by llama.cpp if it is installed."""
    subject = make(settings, "decoding", SMALL)
    if isinstance(subject, Case):
        yield subject
        return

    def build(candidate: Candidate) -> ConvertedModel:
        settings.say(f"decoding: {candidate.name}")
        return convert_copy(subject.model, candidate)

    converted, absent = build_each(FOR_DECODING, build)
    torch._dynamo.reset()
    for batch in QUICK_BATCHES if settings.quick else BATCHES:
        name, work = list(decodes(converted, subject.ids[:batch]))[-1]
        with ExitStack() as stack:
            others: dict[str, Work] = {}
            if batch == 1 and not settings.quick:
                others, notes = stack.enter_context(llama_cpp_steps(settings, subject.ids[0]))
                absent |= notes
            settings.say(f"decoding: {name}")
            measured = _measure(settings, work | others) | absent
        base = FOR_DECODING[0].name
        yield Case("decoding", name, base, measured, subject=subject.title, threads=settings.num_threads)


@contextmanager
def llama_cpp_steps(settings: Settings, ids: Tensor) -> Iterator[tuple[dict[str, Work], dict[str, Measured]]]:
    """Steps of one token by llama.cpp, of SmolLM2 in formats of GGUF; and a note if they cannot run.

    The files are made by llama.cpp from the Q4_1 file of `data.models`. It quantises the head too.
    """
    if reason := missing("llama_cpp"):
        yield {}, {f"llama.cpp {name}": Measured(note=reason) for name in GGUF_TYPES}
        return
    import llama_cpp

    from ..data.models import ModelError, fetch_gguf

    def step(llama: Any, tokens: Iterator[int]) -> None:
        if llama.n_tokens == CACHE:
            llama.reset()
        llama.eval([next(tokens)])

    llama_cpp.llama_log_set(_log_of_llama_cpp(), None)
    work: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = fetch_gguf(Path(folder))
        except ModelError as error:
            yield {}, {f"llama.cpp {name}": Measured(note=failure(error)) for name in GGUF_TYPES}
            return
        for name in GGUF_TYPES:
            settings.say(f"decoding: llama.cpp {name}")
            target, options = Path(folder, f"{name}.gguf"), llama_cpp.llama_model_quantize_default_params()
            options.ftype, options.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), True
            llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
            llama = llama_cpp.Llama(
                str(target),
                n_ctx=CACHE,
                n_threads=settings.num_threads,
                n_threads_batch=settings.num_threads,
                verbose=False,
            )
            work[f"llama.cpp {name}"] = [partial(step, llama, cycle(ids.tolist()))]
        yield work, {}


@cache
def _log_of_llama_cpp() -> Any:
    """A log that drops what it gets; cached, since llama.cpp calls it until the process ends."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def make(settings: Settings, suite: str, name: str) -> Subject | Case:
    """The model ``name`` and what it reads; if it cannot be loaded, a case of ``suite`` that says why."""
    from ..data.models import ModelError

    settings.say(f"{suite}: making {name}")
    try:
        model, tokenizer = load(name, num_layers(settings))
    except ModelError as error:
        reason = str(error).split("\n")[0]
        note = Measured(note=f"not run: {reason}")
        return Case(suite, "everything", INT8FX.name, {INT8FX.name: note}, subject=name)
    return Subject(title_of(settings, name), model, read(settings, model, tokenizer))


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


def compare(settings: Settings, subject: Subject, candidates: Sequence[Candidate]) -> Iterator[Case]:
    """The cases of one model with all of ``candidates``; the first one is the base."""

    def build(candidate: Candidate) -> ConvertedModel:
        settings.say(f"models: {subject.title}: {candidate.name}")
        return convert_copy(subject.model, candidate)

    converted, absent = build_each(candidates, build)
    for group in _groups(settings, subject, converted):
        torch._dynamo.reset()
        for name, work in group:
            settings.say(f"models: {subject.title}: {name}")
            measured = _measure(settings, work) | absent
            ordered = {c.name: measured[c.name] for c in candidates if c.name in measured}
            threads = settings.num_threads
            yield Case("models", name, candidates[0].name, ordered, subject=subject.title, threads=threads)


def _groups(settings: Settings, subject: Subject, converted: dict[str, ConvertedModel]) -> Iterator[Steps]:
    """The cases, in groups that share compiled graphs."""
    ids, on_cpu = subject.ids, settings.device == "cpu"
    if not hasattr(subject.model, "lm_head"):
        for rows, width in QUICK_SENTENCES if settings.quick else SENTENCES:
            yield forwards(converted, ids[:rows, :width].contiguous(), ())
        return
    one = ids[:1, : num_tokens(settings)].contiguous()
    yield forwards(converted, one, WITH_LOGITS if on_cpu else converted)
    for batch in QUICK_BATCHES if settings.quick else BATCHES:
        yield decodes(converted, ids[:batch])
    if on_cpu:
        yield generations(converted, subject)


def _measure(settings: Settings, work: dict[str, Work]) -> dict[str, Measured]:
    """``work`` in interleaved rounds, and the cosine of its results to float32's."""
    on_cpu = settings.device == "cpu"
    outputs: dict[str, Tensor] = {}

    def keep(label: str, result: object) -> None:
        if isinstance(result, Tensor) and result.is_floating_point():
            rows = result.flatten(0, -2)
            outputs[label] = rows[:: math.ceil(len(rows) / COMPARED)].to(torch.float32, copy=True)

    threads = settings.num_threads if on_cpu else None
    with torch.no_grad():
        measured = interleave(work if on_cpu else _waiting(work), settings.max_rounds, threads, keep)
    if (reference := outputs.get(FLOAT32.name)) is not None:
        for label, y in outputs.items():
            measured[label].cosine = 1 - cosine_distance(reference, y).mean().item()
    return measured


def _waiting(work: Mapping[str, Work]) -> dict[str, Work]:
    """``work`` whose calls end when the GPU has done what they launched."""

    def run(call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize()

    return {label: [lambda call=call: run(call) for call in calls] for label, calls in work.items()}  # type: ignore[misc]


def forwards(converted: dict[str, ConvertedModel], ids: Tensor, with_logits: Collection[str]) -> Steps:
    """A forward of ``ids``: the decoder or encoder; then, of ``with_logits``, every token's logits by either head."""
    batch, width = ids.shape
    decoders = {label: model.compile(model.decoder) for label, model in converted.items()}
    cache = {label: {"use_cache": False} if model.heads else {} for label, model in converted.items()}

    def hidden(label: str) -> Tensor:
        return decoders[label](input_ids=ids, **cache[label]).last_hidden_state

    name = f"forward, {width} tokens" if batch == 1 else f"forward, {batch} x {width} tokens"
    yield name, {label: [lambda label=label: hidden(label)] for label in converted}  # type: ignore[misc]
    for kind in (HEAD_16, HEAD_8) if with_logits else ():
        heads = {label: model.compile(model.heads[kind]) for label, model in converted.items() if label in with_logits}
        yield (
            f"forward, {kind}",
            {label: [lambda label=label, head=head: head(hidden(label))] for label, head in heads.items()},  # type: ignore[misc]
        )


def decodes(converted: dict[str, ConvertedModel], ids: Tensor) -> Steps:
    """A step of one token for each row of ``ids``, with a static cache, and its logits by either head."""
    steps = {label: DecodeStep(model, ids) for label, model in converted.items()}
    for kind in (HEAD_16, HEAD_8):
        heads = {label: model.compile(model.heads[kind]) for label, model in converted.items()}
        for step in steps.values():
            step.restart()  # so that all candidates read the same token in their first call
        yield (
            f"decode, batch {len(ids)}, {kind}",
            {
                label: [lambda step=steps[label], head=head: head(step())]  # type: ignore[misc]
                for label, head in heads.items()
            },
        )


class DecodeStep:
    """Reads the next token of each row of ``ids`` in each call, and returns hidden states ``[batch, 1, D]``.

    After ``max_tokens`` tokens the cache is full, and the next call begins with the prompt again.
    """

    def __init__(self, model: ConvertedModel, ids: Tensor, max_tokens: int = CACHE) -> None:
        widths = [PROMPT, *[1] * (max_tokens - PROMPT)]
        prompt, *self.tokens = (part.contiguous() for part in ids[:, :max_tokens].split(widths, 1))
        self.decoder = StaticDecoder(model.decoder, model.compile(model.decoder), prompt, len(self.tokens))
        self.restart()

    def restart(self) -> None:
        """Makes the next call begin with the prompt."""
        self.decoder.free, self.following = 0, cycle(self.tokens)

    def __call__(self) -> Tensor:
        return self.decoder(next(self.following)).last_hidden_state


def generations(converted: dict[str, ConvertedModel], subject: Subject) -> Steps:
    """``generate()`` as users call it: eager, greedy, lm_head in 16 bits; of `GENERATING`."""
    prompt, model = subject.ids[:1, :16].contiguous(), subject.model

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
