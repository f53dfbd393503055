"""The command ``int8fx``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, llm_int8
from ..calibration.equalize import ALGORITHMS
from ..calibration.plan import SCHEMES as PLAN_SCHEMES
from ..schemes import Scheme, of_bits, parse_scheme
from ..schemes.quantize import DEFAULT_THRESHOLD
from .bench.settings import Settings
from .bench.suites import SUITES

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .inspection import Inspection

PROMPT = "Photosynthesis is the process by which"
DEMO_NEEDS = ("accelerate", "gguf", "platformdirs", "transformers")
CONVERT_NEEDS = ("safetensors", "transformers")
EVAL_NEEDS = ("platformdirs", "transformers")
BENCH_NEEDS = (*DEMO_NEEDS, "matplotlib", "numpy", "rich")
SCHEMES = ("llm_int8", "weight_only", "plain", "rotated", "rotated(columns=0)")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "int8fx", description="8-bit linear layers for PyTorch models: measure, inspect, compare."
    )
    parser.add_argument("--version", action="version", version=f"int8fx {__version__}")
    commands = parser.add_subparsers(dest="command")
    _add_demo(commands)
    _add_convert(commands)
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
        if not str(error).startswith("int8fx."):  # int8fx explains what it refuses; any other error is a bug
            raise
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"int8fx {args.command}: interrupted", file=sys.stderr)
        return 130


def _lacks(command: str, extra: str, needs: tuple[str, ...]) -> bool:
    """Whether a package is missing. Prints which, and how to install it."""
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        print(f'int8fx {command} needs {", ".join(missing)}: pip install "int8fx[{extra}]"', file=sys.stderr)
    return bool(missing)


# ---- demo -----------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="convert a real model to int8, compile it, and compare it with float32 and bfloat16",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", default="smollm2", help="smollm2, minilm, a directory, or a name of the hub")
    demo.add_argument(
        "--scheme-threshold",
        type=float,
        default=DEFAULT_THRESHOLD,
        help="llm_int8 computes input columns with values of at least this size in 16 bits",
    )
    demo.add_argument("--prompt", default=PROMPT, help="the text to continue")
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


# ---- convert --------------------------------------------------------------------------------------------------------


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="quantise a transformers model in a folder, or take over its GPTQ, AWQ or GGUF weights, and write it to "
        "another folder",
        description="Codes of GPTQ, AWQ and GGUF (Q4_0, Q8_0) are taken over as they are. Exit code 0: DST is "
        "complete. 1: refused, and DST is what it was. 2: wrong options.",
    )
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="the folder of a float, GPTQ or AWQ model, or a GGUF file"
    )
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    scheme = parser.add_mutually_exclusive_group()
    scheme.add_argument(
        "--scheme", help="as in Python: rotated, llm_int8(threshold=5); by default llm_int8 for a float model"
    )
    scheme.add_argument("--bits", type=int, choices=(4, 8), help="of the weights, in place of a scheme")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PATTERN", help="layers that stay in 16 bits")
    parser.add_argument("--select", nargs="+", metavar="PATTERN", help="the layers to convert")
    parser.add_argument(
        "--compute", choices=("fp32", "int8"), help="how to multiply by codes of GPTQ, AWQ or GGUF; by default fp32"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of what is not packed; by default that of SRC, float32 for a GGUF file",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of the largest file; by default 5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--json", action="store_true", help="print what DST holds as JSON")
    parser.set_defaults(run=_convert, error=parser.error)


def _convert(args: argparse.Namespace) -> int:
    try:
        scheme = of_bits(args.bits) if args.bits is not None else args.scheme and parse_scheme(args.scheme)
    except ValueError as error:
        args.error(str(error))
    if _lacks("convert", "transformers", CONVERT_NEEDS):
        return 1
    import torch

    from ..integrations.transformers import Int8FxConfig
    from .checkpoint import CheckpointError, convert_checkpoint, read_contents

    def note(text: str) -> None:
        print(f"int8fx convert: {text}", file=sys.stderr)

    try:
        config = Int8FxConfig(scheme, args.skip, args.select) if scheme or args.skip or args.select else None
        convert_checkpoint(
            args.source,
            args.target,
            config,
            compute=args.compute,
            dtype=getattr(torch, args.dtype) if args.dtype else "auto",
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            note=note,
        )
        contents = read_contents(args.target)
    except (CheckpointError, OSError) as error:
        note(str(error))
        return 1
    print(contents.to_json() if args.json else contents)
    return 0


# ---- eval, inspect --------------------------------------------------------------------------------------------------


def _add_measured(parser: argparse.ArgumentParser, windows: int, width: int) -> None:
    parser.add_argument("--model", default="smollm2", help="smollm2, minilm, a directory, or a name of the hub")
    parser.add_argument(
        "--scheme",
        action="append",
        metavar="SCHEME",
        help=f"as in Python: rotated(block=64, columns=0.01); may be repeated (default: {', '.join(SCHEMES)})",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="pydoc (Python's documentation) or a text file; may be repeated; calibration uses the last tenth of each "
        "(default: pydoc)",
    )
    parser.add_argument("--windows", type=int, default=windows, help=f"how many windows of text (default: {windows})")
    parser.add_argument("--width", type=int, default=width, help=f"tokens in a window (default: {width})")
    parser.add_argument(
        "--calibration", type=int, default=8, help="windows of text to calibrate with; 0: none (default: 8)"
    )
    parser.add_argument("--json", type=Path, help="a file to write every figure to; - for stdout, with a checkpoint")
    parser.add_argument("--png", type=Path, help="a file to draw a picture to")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval", help="compare a model's outputs under several schemes with its float32 outputs"
    )
    _add_measured(parser, 16, 256)
    parser.add_argument(
        "--plan",
        action="append",
        type=float,
        default=[],
        metavar="SIZE",
        help="also compare a plan (int8fx.plan): a scheme for each layer, chosen by the calibration windows, within "
        "SIZE times the bytes of all layers in the smallest of its schemes; may be repeated",
    )
    parser.add_argument(
        "--among",
        action="append",
        metavar="SCHEME",
        help=f"a scheme that plans choose from; may be repeated (default: {', '.join(map(str, PLAN_SCHEMES))})",
    )
    parser.add_argument(
        "--equalize",
        action="append",
        choices=ALGORITHMS,
        default=[],
        help="also compare each scheme that int8fx.equalize takes, on a model that it scaled by this algorithm; may be "
        "repeated",
    )
    parser.set_defaults(run=_eval, error=parser.error)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what an int8 checkpoint holds; or show each layer's outliers and its error under each scheme",
        description="With CHECKPOINT: reads the headers of its files. Without: measures --model. Exit code 0: done. 1: "
        "the checkpoint or model cannot be read. 2: wrong options.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a checkpoint's folder or safetensors file")
    _add_measured(parser, 2, 256)
    parser.add_argument(
        "--threshold",
        type=float,
        default=DEFAULT_THRESHOLD,
        help=f"size from which on a value is an outlier (default: {DEFAULT_THRESHOLD})",
    )
    parser.set_defaults(run=_inspect, error=parser.error)


@dataclass
class _Loaded:
    """The inputs of `eval` and `inspect`: a model, its kind, windows to measure and to calibrate on, the schemes."""

    model: Any
    kind: str
    samples: list[dict[str, Any]]
    calibration: list[dict[str, Any]]
    schemes: dict[str, Scheme]


def _eval(args: argparse.Namespace) -> int:
    for size in args.plan:
        if not size >= 1 or not isfinite(size) or not args.calibration:
            args.error(f"--plan is {size:g} with {args.calibration} windows to calibrate; legal: 1 or more, of each")
    if args.among and not args.plan:
        args.error("--among has no --plan; legal: both")
    try:
        among = [parse_scheme(text) for text in args.among or []] or PLAN_SCHEMES
    except ValueError as error:
        args.error(str(error))
    loaded = _load(args)
    if loaded is None:
        return 1
    from .evaluate import evaluate
    from .plots import draw_evaluation

    progress = sys.stderr.isatty()
    schemes = {**loaded.schemes, **_plans(loaded, args.plan, among, progress)}
    options: dict[str, Any] = {
        "calibration": loaded.calibration,
        "equalize_by": args.equalize,
        "name": args.model,
        "progress": progress,
    }
    evaluation = evaluate(loaded.model, loaded.kind, loaded.samples, schemes, **options)
    return _finish(args, evaluation, draw_evaluation)


def _plans(loaded: _Loaded, sizes: list[float], among: Iterable[Scheme], progress: bool) -> dict[str, Any]:
    """A plan for each size, all from the same measurements."""
    if not sizes:
        return {}
    from ..calibration.plan import plan

    smallest = plan(loaded.model, loaded.calibration, max_kl=float("inf"), schemes=among, progress=progress)
    plans = {f"plan {size:g}": smallest.within(budget_bytes=int(size * smallest.smallest)) for size in sizes}
    for label, chosen in plans.items():
        print(f"{label}: {chosen.summary()}")
    return plans


def _inspect(args: argparse.Namespace) -> int:
    if args.checkpoint is not None:
        return _inspect_checkpoint(args)
    if not args.threshold >= 0:
        args.error(f"--threshold is {args.threshold:g}; legal: 0 or more")
    loaded = _load(args)
    if loaded is None:
        return 1
    from ..calibration.calibrate import calibrate
    from .inspection import inspect
    from .plots import draw_inspection

    progress, calibration = sys.stderr.isatty(), None
    if loaded.calibration:
        moments = any(scheme.needs_moments for scheme in loaded.schemes.values())
        calibration = calibrate(loaded.model, loaded.calibration, moments=moments, progress=progress)
    options: dict[str, Any] = {"calibration": calibration, "threshold": args.threshold, "progress": progress}
    inspection = inspect(loaded.model, loaded.samples, loaded.schemes, **options)
    return _finish(args, inspection, draw_inspection)


def _inspect_checkpoint(args: argparse.Namespace) -> int:
    if _lacks("inspect", "transformers", CONVERT_NEEDS[:1]):
        return 1
    from .checkpoint import CheckpointError, read_contents

    try:
        contents = read_contents(args.checkpoint)
    except CheckpointError as error:
        print(f"int8fx inspect: {error}", file=sys.stderr)
        return 1
    if args.json is None:
        print(contents)
    elif str(args.json) == "-":
        print(contents.to_json())
    else:
        args.json.write_text(contents.to_json() + "\n")
    return 0


def _load(args: argparse.Namespace) -> _Loaded | None:
    """Loads what the options name. Prints the error and returns None if that fails."""
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
    if _lacks(args.command, "eval", (*EVAL_NEEDS, "matplotlib") if args.png else EVAL_NEEDS):
        return None
    from .data.models import ModelError, load
    from .data.texts import TextError, windows

    try:
        model, tokenizer, kind = load(args.model)
        limit = getattr(model.config, "max_position_embeddings", args.width)
        if args.width > limit:
            raise TextError(f"--width is {args.width}; {args.model!r} reads {limit} tokens at most")
        texts = windows(tokenizer, args.text or ["pydoc"], args.windows, args.width, args.calibration)
    except (ModelError, TextError) as error:
        print(f"int8fx {args.command}: {error}", file=sys.stderr)
        return None
    samples, calibration = ([{"input_ids": row[None]} for row in ids] for ids in texts)
    return _Loaded(model, kind, samples, calibration, schemes)


def _finish(args: argparse.Namespace, report: Evaluation | Inspection, draw: Callable[[Any, Path], None]) -> int:
    """Prints ``report``; writes it and draws it to the files that the options name."""
    from .machine import machine

    report.about = {"machine": machine(), "command": args.typed}
    print(f"{report.about['machine']}\n{report}")
    if args.json:
        args.json.write_text(json.dumps(report, default=vars, indent=1) + "\n")
    if args.png:
        draw(report, args.png)
    return 0


# ---- bench ----------------------------------------------------------------------------------------------------------


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="time int8fx, other libraries and the limits of this machine",
        description="Without a suite, all of them run. Best and median of interleaved rounds; tables, CSV, PNG plots.",
    )
    for name, suite in SUITES.items():
        text = suite.help.replace("%", "%%")  # argparse fills in what follows a percent sign
        parser.add_argument(f"--{name}", action="append_const", dest="suites", const=name, help=text)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, models of two layers")
    parser.add_argument(
        "--rounds", type=int, help="at most this many rounds for each case (default: 10; 3 with --quick)"
    )
    parser.add_argument("--threads", type=int, help="number of threads for all candidates (default: torch's)")
    parser.add_argument(
        "--output", type=Path, default=Path("int8fx-bench"), help="directory for CSV and plots (default: int8fx-bench)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda (or ROCm): checks the Triton kernels, then times layers and models (default: cpu)",
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
    parser = commands.add_parser(
        "build", help="compile the CPU kernels ahead of time, and print the path of the library"
    )
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> int:
    from ..ops import native

    try:
        print(native.build(native.instruction_set()))
    except (ImportError, RuntimeError, OSError) as error:
        print(f"int8fx build: {error}", file=sys.stderr)
        return 1
    return 0
