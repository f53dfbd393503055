"""The command ``int8fx``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

from . import __version__, llm_int8

PROMPT = "Photosynthesis is the process by which"
DEMO_NEEDS = ("accelerate", "gguf", "platformdirs", "rich", "transformers")


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
    commands.add_parser("build", help="compile the CPU kernels now instead of at their first use")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "build":
        return build()
    if args.tokens < 4:
        demo.error(f"--tokens is {args.tokens}; legal: 4 or more")
    if not args.prompt:
        demo.error("--prompt is empty")
    try:
        llm_int8(args.scheme_threshold)
    except ValueError as error:
        demo.error(str(error))
    missing = [name for name in DEMO_NEEDS if find_spec(name) is None]
    if missing:
        print(f'int8fx demo needs {", ".join(missing)}: pip install "int8fx[demo]"', file=sys.stderr)
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


def build() -> int:
    """Compiles the CPU kernels; returns the exit code."""
    from . import native

    try:
        print(native.build(native.instruction_set()))
    except (ImportError, RuntimeError, OSError) as error:
        print(f"int8fx build: {error}", file=sys.stderr)
        return 1
    return 0
