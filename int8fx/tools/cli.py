"""The command ``int8fx``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from .. import __version__, llm_int8
from ..schemes import Scheme, parse_scheme
from .bench.settings import Settings
from .bench.suites import SUITES

PROMPT = "Photosynthesis is the process by which"
DEMO_NEEDS = ("accelerate", "gguf", "platformdirs", "rich", "transformers")
BENCH_NEEDS = (*DEMO_NEEDS, "matplotlib", "numpy")
MODEL_NEEDS = ("platformdirs", "transformers")
SCHEMES = ("llm_int8", "llm_int8(0)", "llm_int8(inf)", "rotated", "rotated(budget=0)")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser("int8fx", description="LLM.int8() as a rewrite of FX graphs.")
    parser.add_argument("--version", action="version", version=f"int8fx {__version__}")
    commands = parser.add_subparsers(dest="command")
    _add_demo(commands)
    _add_eval(commands)
    _add_inspect(commands)
    _add_bench(commands)
    _add_build(commands)
    args = parser.parse_args(argv)
    args.typed = shlex.join(["int8fx", *(sys.argv[1:] if argv is None else argv)])
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except ValueError as error:
        if not str(error).startswith("int8fx."):  # what int8fx refuses is explained; anything else is a bug
            raise
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"int8fx {args.command}: interrupted", file=sys.stderr)
        return 130


def _lacks(command: str, extra: str, needs: tuple[str, ...]) -> bool:
    """Whether a package is missing; says which, and how to get it."""
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        print(f'int8fx {command} needs {", ".join(missing)}: pip install "int8fx[{extra}]"', file=sys.stderr)
    return bool(missing)


# ---- demo -----------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="convert a real model to int8, compile it, and compare it with its 16-bit self",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", default="smollm2", help="smollm2, minilm, a directory, or a name of the hub")
    demo.add_argument(
        "--scheme-threshold", type=float, default=6.0, help="input columns from this size on stay in 16 bits"
    )
    demo.add_argument("--prompt", default=PROMPT, help="what to continue")
    demo.add_argument("--tokens", type=int, default=32, help="how many tokens to generate")
    demo.add_argument("--quick", action="store_true", help="shorter text, fewer rounds, less to compile")
    demo.set_defaults(run=_demo, error=demo.error)


def _demo(args: argparse.Namespace) -> int:
    if args.tokens < 4:
        args.error(f"--tokens is {args.tokens}; legal: 4 or more")
    if not args.prompt:
        args.error("--prompt is empty")
    try:
        llm_int8(args.scheme_threshold)
    except ValueError as error:
        args.error(str(error))
    if _lacks("demo", "demo", DEMO_NEEDS):
        return 1
    from .data.models import ModelError
    from .demo import Demo

    try:
        Demo(args.model, args.scheme_threshold, args.prompt, args.tokens, args.quick).run()
    except ModelError as error:
        print(f"int8fx demo: {error}", file=sys.stderr)
        return 1
    return 0


# ---- eval, inspect --------------------------------------------------------------------------------------------------


def _add_measured(parser: argparse.ArgumentParser, windows: int, width: int) -> None:
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, minilm, whisper, a directory, or a name of the hub"
    )
    parser.add_argument(
        "--scheme",
        action="append",
        metavar="SCHEME",
        help=f"as in Python: rotated(block=64, budget=0.01); may be repeated (default: {', '.join(SCHEMES)})",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="pydoc (Python's documentation) or a text file; may be repeated; the last tenth of each calibrates "
        "(default: pydoc)",
    )
    parser.add_argument(
        "--audio",
        nargs="+",
        default=[],
        metavar="FILE",
        help="WAV files, for speech models in place of text; the last tenth of them, at least one, calibrates",
    )
    parser.add_argument("--windows", type=int, default=windows, help=f"how many windows to read (default: {windows})")
    parser.add_argument("--width", type=int, default=width, help=f"tokens in a window (default: {width})")
    parser.add_argument("--calibration", type=int, default=8, help="windows to calibrate with; 0: none (default: 8)")
    parser.add_argument("--json", type=Path, help="a file to write every figure to")
    parser.add_argument("--png", type=Path, help="a file to draw a picture in")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("eval", help="compare a model's outputs under several schemes with its own in float32")
    _add_measured(parser, 16, 256)
    parser.add_argument(
        "--plan",
        action="append",
        type=float,
        default=[],
        metavar="SIZE",
        help="beside the schemes, one chosen for each layer (int8fx.plan) by the calibration windows, in SIZE times "
        "the bytes of all layers in int8; may be repeated",
    )
    parser.set_defaults(run=_eval, error=parser.error)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect", help="show each layer's outliers, what is kept in 16 bits and where, and its error under each scheme"
    )
    _add_measured(parser, 2, 256)
    parser.add_argument("--threshold", type=float, default=6.0, help="from which size on a value is an outlier")
    parser.set_defaults(run=_inspect, error=parser.error)


@dataclass
class _Loaded:
    """A model, its kind, arguments for it to measure on and to calibrate on, how it writes words, the schemes."""

    model: Any
    kind: str
    samples: list[dict[str, Any]]
    calibration: list[dict[str, Any]]
    decode: Callable[[Any], str]
    schemes: dict[str, Scheme]


def _eval(args: argparse.Namespace) -> int:
    for size in args.plan:
        if not size >= 1 or not isfinite(size) or not args.calibration:
            args.error(f"--plan is {size:g} with {args.calibration} windows to calibrate; legal: 1 or more, of each")
    loaded = _load(args)
    if loaded is None:
        return 1
    from ..calibration.plan import Plan
    from .evaluate import evaluate

    show = sys.stderr.isatty()
    schemes: dict[str, Scheme | Plan] = dict(loaded.schemes)
    if args.plan:
        schemes |= _plans(loaded, args.plan, show)
    options = {"calibration": loaded.calibration, "decode": loaded.decode, "name": args.model, "progress": show}
    found = evaluate(loaded.model, loaded.kind, loaded.samples, schemes, **options)
    return _show(args, found, "draw_evaluation")


def _plans(loaded: _Loaded, sizes: list[float], show: bool) -> dict[str, Any]:
    """A plan for each size, measured once."""
    from ..calibration.plan import plan

    least = plan(loaded.model, loaded.calibration, max_kl=float("inf"), progress=show)
    plans = {f"plan {size:g}": least.within(budget_bytes=int(size * least.smallest)) for size in sizes}
    for label, found in plans.items():
        print(f"{label}: {found.summary()}")
    return plans


def _inspect(args: argparse.Namespace) -> int:
    if not args.threshold >= 0:
        args.error(f"--threshold is {args.threshold:g}; legal: 0 or more")
    loaded = _load(args)
    if loaded is None:
        return 1
    from ..calibration.calibrate import calibrate
    from .inspection import inspect

    show = sys.stderr.isatty()
    moments = need_moments(loaded.schemes.values())
    known = calibrate(loaded.model, loaded.calibration, moments=moments, progress=show) if loaded.calibration else None
    options = {"calibration": known, "threshold": args.threshold, "progress": show}
    found = inspect(loaded.model, loaded.samples, loaded.schemes, **options)
    return _show(args, found, "draw_inspection")


def _load(args: argparse.Namespace) -> _Loaded | None:
    """What the options name; None if there is an error, which is printed."""
    for name, least in (("windows", 2), ("width", 2), ("calibration", 0)):
        if getattr(args, name) < least:
            args.error(f"--{name} is {getattr(args, name)}; legal: {least} or more")
    for path in (args.json, args.png):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            args.error(f"{path} cannot be written: {reason}")
    try:
        schemes = {text: parse_scheme(text) for text in args.scheme or SCHEMES}
    except ValueError as error:
        args.error(str(error))
    if _lacks(args.command, "eval", (*MODEL_NEEDS, "matplotlib") if args.png else MODEL_NEEDS):
        return None
    from .data.audio import clips
    from .data.models import ModelError, load
    from .data.texts import TextError, windows

    try:
        model, tokenizer, kind = load(args.model)
        if (kind == "speech") != bool(args.audio) or (args.audio and args.text):
            legal = "--audio FILE ..., no --text" if kind == "speech" else "--text FILE, no --audio"
            raise TextError(f"{args.model!r} is a model of kind {kind}; legal: {legal}")
        limit = getattr(model.config, "max_position_embeddings", args.width)
        if kind != "speech" and args.width > limit:
            raise TextError(f"--width is {args.width}; {args.model!r} reads {limit} tokens at most")
        if kind == "speech":
            read, apart = clips(model, tokenizer.features, args.audio, args.calibration)
            tokenizer = tokenizer.tokenizer
        else:
            texts = windows(tokenizer, args.text or ["pydoc"], args.windows, args.width, args.calibration)
            read, apart = ([{"input_ids": ids} for ids in found.split(1) if len(ids)] for found in texts)
    except (ModelError, TextError) as error:
        print(f"int8fx {args.command}: {error}", file=sys.stderr)
        return None
    return _Loaded(model, kind, read, apart, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), schemes)


def _show(args: argparse.Namespace, found: Any, draw: str) -> int:
    """Prints what was found, and writes and draws it where that is asked for."""
    from .machine import machine

    found.about = {"machine": machine(), "command": args.typed}
    print(f"{found.about['machine']}\n{found}")
    if args.json:
        args.json.write_text(found.to_json() + "\n")
    if args.png:
        from . import plots

        getattr(plots, draw)(found, args.png)
    return 0


# ---- bench ----------------------------------------------------------------------------------------------------------


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure int8fx against its peers and against this machine's limits",
        description="Without a suite, all of them run. Best and median of interleaved rounds; tables, CSV, PNG plots.",
    )
    for name, suite in SUITES.items():
        parser.add_argument(f"--{name}", action="append_const", dest="suites", const=name, help=suite.help)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, models of two layers")
    parser.add_argument("--rounds", type=int, help="of each case, at most (10; 3 with --quick)")
    parser.add_argument("--threads", type=int, help="of torch and its peers (torch's default)")
    parser.add_argument("--output", type=Path, default=Path("int8fx-bench"), help="directory for CSV and plots")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda (or ROCm): checks the Triton kernels, then times products and models (default: cpu)",
    )
    parser.set_defaults(run=_bench, error=parser.error)


def _bench(args: argparse.Namespace) -> int:
    for name, value in (("rounds", args.rounds), ("threads", args.threads)):
        if value is not None and value < 1:
            args.error(f"--{name} is {value}; legal: 1 or more")
    if args.device != "cpu" and args.threads is not None:
        args.error(f"--threads is {args.threads} with --device {args.device}; legal: with cpu")
    if _lacks("bench", "bench", BENCH_NEEDS):
        return 1
    from .bench.command import run

    try:
        suites = tuple(args.suites or ())
        return run(Settings(suites, args.quick, args.rounds, args.threads, args.output, args.device))
    except OSError as error:
        print(f"int8fx bench: {error}", file=sys.stderr)
        return 1


# ---- build ----------------------------------------------------------------------------------------------------------


def _add_build(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("build", help="compile the CPU kernels now instead of at their first use")
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> int:
    from ..ops import native

    try:
        print(native.build(native.instruction_set()))
    except (ImportError, RuntimeError, OSError) as error:
        print(f"int8fx build: {error}", file=sys.stderr)
        return 1
    return 0
