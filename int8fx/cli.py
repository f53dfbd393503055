"""The command ``int8fx``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from . import __version__, llm_int8

PROMPT = "Photosynthesis is the process by which"
DEMO_NEEDS = ("accelerate", "gguf", "platformdirs", "rich", "transformers")
BENCH_NEEDS = (*DEMO_NEEDS, "matplotlib", "numpy")
SUITES = {
    "products": "single products, against every peer that is installed and the machine's own limits",
    "outliers": "what outlier columns cost",
    "overhead": "what a call costs beyond F.linear",
    "scaling": "time against M, N, K and threads",
    "models": "language models: forwards, decoding, generate()",
    "memory": "bytes of a converted model, peak of a forward",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser("int8fx", description="LLM.int8() as a rewrite of FX graphs.")
    parser.add_argument("--version", action="version", version=f"int8fx {__version__}")
    commands = parser.add_subparsers(dest="command")
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
    bench = commands.add_parser(
        "bench",
        help="measure int8fx against its peers and against this machine's limits",
        description="Without a suite, all of them run. Best and median of interleaved rounds; tables, CSV, PNG plots.",
    )
    for name, what in SUITES.items():
        bench.add_argument(f"--{name}", action="append_const", dest="suites", const=name, help=what)
    bench.add_argument("--quick", action="store_true", help="fewer sizes and rounds, models of two layers")
    bench.add_argument("--rounds", type=int, help="of each case, at most (10; 3 with --quick)")
    bench.add_argument("--threads", type=int, help="of torch and its peers (torch's default)")
    bench.add_argument("--output", type=Path, default=Path("int8fx-bench"), help="directory for CSV and plots")
    commands.add_parser("build", help="compile the CPU kernels now instead of at their first use")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "build":
        return build()
    if args.command == "bench":
        for name, value in (("rounds", args.rounds), ("threads", args.threads)):
            if value is not None and value < 1:
                bench.error(f"--{name} is {value}; legal: 1 or more")
        return run_bench(args)
    if args.tokens < 4:
        demo.error(f"--tokens is {args.tokens}; legal: 4 or more")
    if not args.prompt:
        demo.error("--prompt is empty")
    try:
        llm_int8(args.scheme_threshold)
    except ValueError as error:
        demo.error(str(error))
    if lacks("demo", DEMO_NEEDS):
        return 1
    from .demo import Demo
    from .models import ModelError

    try:
        Demo(args.model, args.scheme_threshold, args.prompt, args.tokens, args.quick).run()
    except ModelError as error:
        print(f"int8fx demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("int8fx demo: interrupted", file=sys.stderr)
        return 130
    return 0


def lacks(command: str, needs: tuple[str, ...]) -> bool:
    """Whether a package that ``command`` needs is not installed; says which, and how to install them."""
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        print(f'int8fx {command} needs {", ".join(missing)}: pip install "int8fx[{command}]"', file=sys.stderr)
    return bool(missing)


def run_bench(args: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    if lacks("bench", BENCH_NEEDS):
        return 1
    from .bench.command import Options, run

    try:
        return run(Options(tuple(args.suites or ()), args.quick, args.rounds, args.threads, args.output))
    except KeyboardInterrupt:
        print("int8fx bench: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"int8fx bench: {error}", file=sys.stderr)
        return 1


def build() -> int:
    """Compiles the CPU kernels; returns the exit code."""
    from . import native

    try:
        print(native.build(native.instruction_set()))
    except (ImportError, RuntimeError, OSError) as error:
        print(f"int8fx build: {error}", file=sys.stderr)
        return 1
    return 0
