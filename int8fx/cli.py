"""The command ``int8fx``."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import __version__, llm_int8
from .schemes import Scheme, parse_scheme

PROMPT = "Photosynthesis is the process by which"
DEMO_NEEDS = ("accelerate", "gguf", "platformdirs", "rich", "transformers")
BENCH_NEEDS = (*DEMO_NEEDS, "matplotlib", "numpy")
MODEL_NEEDS = ("platformdirs", "transformers")
SCHEMES = ("llm_int8", "llm_int8(0)", "llm_int8(inf)", "rotated", "rotated(budget=0)")
SUITES = {
    "products": "single products, against every peer that is installed and the machine's own limits",
    "outliers": "what outlier columns cost",
    "schemes": "what rotation and kept columns cost",
    "overhead": "what a call costs beyond F.linear",
    "scaling": "time against M, N, K and threads",
    "models": "language models: forwards, decoding, generate()",
    "profile": "their forwards by kind of kernel",
    "memory": "bytes of a converted model, peak of a forward",
}


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
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
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
    from .demo import Demo
    from .models import ModelError

    try:
        Demo(args.model, args.scheme_threshold, args.prompt, args.tokens, args.quick).run()
    except ModelError as error:
        print(f"int8fx demo: {error}", file=sys.stderr)
        return 1
    return 0


# ---- eval -----------------------------------------------------------------------------------------------------------


def _add_measured(parser: argparse.ArgumentParser, windows: int, width: int) -> None:
    parser.add_argument("--model", default="smollm2", help="smollm2, minilm, a directory, or a name of the hub")
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
    parser.add_argument("--windows", type=int, default=windows, help=f"how many windows to read (default: {windows})")
    parser.add_argument("--width", type=int, default=width, help=f"tokens in a window (default: {width})")
    parser.add_argument("--calibration", type=int, default=8, help="windows to calibrate with; 0: none (default: 8)")
    parser.add_argument("--json", type=Path, help="a file to write every figure to")
    parser.add_argument("--png", type=Path, help="a file to draw a picture in")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("eval", help="compare a model's outputs under several schemes with its own in float32")
    _add_measured(parser, 16, 256)
    parser.set_defaults(run=_eval, error=parser.error)


def _schemes(args: argparse.Namespace) -> dict[str, Scheme]:
    for name, least in (("windows", 2), ("width", 2), ("calibration", 0)):
        if getattr(args, name) < least:
            args.error(f"--{name} is {getattr(args, name)}; legal: {least} or more")
    try:
        return {text: parse_scheme(text) for text in args.scheme or SCHEMES}
    except ValueError as error:
        args.error(str(error))
        raise


def _eval(args: argparse.Namespace) -> int:
    schemes = _schemes(args)
    loaded = _load(args)
    if loaded is None:
        return 1
    from .evaluate import evaluate

    model, kind, read, calibration = loaded
    show = sys.stderr.isatty()
    found = evaluate(model, kind, read, schemes, calibration=calibration, name=args.model, progress=show)
    found.about = _about(args)
    print(f"{found.about['machine']}\n{found}")
    if args.json:
        args.json.write_text(found.to_json() + "\n")
    if args.png:
        from .plots import draw_evaluation

        draw_evaluation(found, args.png)
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, str, Any, Any] | None:
    """The model, its kind, windows to measure and windows to calibrate; None if there is an error, which is printed."""
    if _lacks(args.command, "eval", (*MODEL_NEEDS, "matplotlib") if args.png else MODEL_NEEDS):
        return None
    from .models import ModelError, load
    from .texts import TextError, windows

    try:
        model, tokenizer, kind = load(args.model)
        read, apart = windows(tokenizer, args.text or ["pydoc"], args.windows, args.width, args.calibration)
    except (ModelError, TextError) as error:
        print(f"int8fx {args.command}: {error}", file=sys.stderr)
        return None
    return model, kind, read, apart if len(apart) else None


def _about(args: argparse.Namespace) -> dict[str, str]:
    """What a measurement needs to be repeated."""
    from .machine import machine

    keys = ("model", "windows", "width", "calibration")
    parts = ["int8fx", args.command, *(part for key in keys for part in (f"--{key}", str(getattr(args, key))))]
    parts += [part for text in args.text or () for part in ("--text", text)]
    parts += [part for text in args.scheme or () for part in ("--scheme", text)]
    return {"machine": machine(), "command": shlex.join(parts)}


# ---- inspect --------------------------------------------------------------------------------------------------------


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect", help="show each layer's outliers, what is kept in 16 bits and where, and its error under each scheme"
    )
    _add_measured(parser, 2, 256)
    parser.add_argument("--threshold", type=float, default=6.0, help="from which size on a value is an outlier")
    parser.set_defaults(run=_inspect, error=parser.error)


def _inspect(args: argparse.Namespace) -> int:
    schemes = _schemes(args)
    loaded = _load(args)
    if loaded is None:
        return 1
    from .calibrate import calibrate
    from .inspection import inspect

    model, _, read, apart = loaded
    show = sys.stderr.isatty()
    calibration = None if apart is None else calibrate(model, apart.split(1), progress=show)
    options = {"calibration": calibration, "threshold": args.threshold, "progress": show}
    found = inspect(model, read.split(1), schemes, **options)
    found.about = _about(args)
    print(f"{found.about['machine']}\n{found}")
    if args.json:
        args.json.write_text(found.to_json() + "\n")
    if args.png:
        from .plots import draw_inspection

        draw_inspection(found, args.png)
    return 0


# ---- bench ----------------------------------------------------------------------------------------------------------


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure int8fx against its peers and against this machine's limits",
        description="Without a suite, all of them run. Best and median of interleaved rounds; tables, CSV, PNG plots.",
    )
    for name, what in SUITES.items():
        parser.add_argument(f"--{name}", action="append_const", dest="suites", const=name, help=what)
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
    if _lacks("bench", "bench", BENCH_NEEDS):
        return 1
    from .bench.command import Options, run

    try:
        suites = tuple(args.suites or ())
        return run(Options(suites, args.quick, args.rounds, args.threads, args.output, args.device))
    except OSError as error:
        print(f"int8fx bench: {error}", file=sys.stderr)
        return 1


# ---- build ----------------------------------------------------------------------------------------------------------


def _add_build(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("build", help="compile the CPU kernels now instead of at their first use")
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> int:
    from . import native

    try:
        print(native.build(native.instruction_set()))
    except (ImportError, RuntimeError, OSError) as error:
        print(f"int8fx build: {error}", file=sys.stderr)
        return 1
    return 0
