"""Every example runs, and the README shows what they print."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(path: Path) -> str:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "show_rewrite"}


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem != "show_rewrite"], ids=lambda p: p.stem)
def test_example_runs(path):
    assert run(path)


def test_the_readme_shows_the_rewrite_as_it_is_printed():
    printed = run(ROOT / "examples" / "show_rewrite.py").strip()
    assert printed in (ROOT / "README.md").read_text()
