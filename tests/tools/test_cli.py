"""The command line: exit codes, and errors in a line instead of a traceback."""

from __future__ import annotations

import pytest

from int8fx import __version__
from int8fx.tools import cli, demo
from int8fx.tools.data.models import ModelError


def test_without_arguments_it_prints_help(capsys):
    assert cli.main([]) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "convert", "eval", "inspect", "bench", "build"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"int8fx {command}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"int8fx {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme-threshold", "-1"], "threshold must be a number >= 0"),
        (["--scheme-threshold", "six"], "invalid float value"),
        (["--tokens", "3"], "--tokens is 3; legal: 4 or more"),
        (["--prompt", ""], "--prompt is empty"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_explained(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_what_the_demo_needs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("platformdirs", "gguf") else object())
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == 'int8fx demo needs gguf, platformdirs: pip install "int8fx[demo]"\n'


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ModelError("cannot load 'x'"), 1, "int8fx demo: cannot load 'x'\n"),
        (KeyboardInterrupt(), 130, "int8fx demo: interrupted\n"),
    ],
)
def test_errors_of_the_demo_end_in_a_line(error, code, said, monkeypatch, capsys):
    def run(self):
        raise error

    monkeypatch.setattr(demo.Demo, "run", run)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == said


def test_the_options_reach_the_demo(monkeypatch):
    monkeypatch.setattr(demo.Demo, "run", lambda self: seen.append(self))
    seen: list[demo.Demo] = []
    options = ["--model", "m", "--scheme-threshold", "3", "--prompt", "p", "--tokens", "9", "--quick"]
    assert cli.main(["demo", *options]) == 0
    (run,) = seen
    assert (run.name, run.threshold, run.prompt, run.tokens, run.quick) == ("m", 3.0, "p", 9, True)
