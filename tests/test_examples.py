"""Every example runs, and the README shows what they print."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_models import save_encoder, save_lm

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ALONE = {path.stem for path in EXAMPLES} - {"show_rewrite", "explore_schemes"}


def run(path: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "show_rewrite"}


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem in ALONE], ids=lambda p: p.stem)
def test_example_runs(path):
    assert run(path)


@pytest.mark.parametrize("save", [save_lm, save_encoder])
def test_the_exploration_runs_on_any_model(save, tmp_path):
    lines = run(ROOT / "examples" / "explore_schemes.py", str(save(tmp_path / "model"))).strip().split("\n")
    assert "1.000 [1.000, 1.000]" in lines[0]
    assert len(lines) == 11


def test_the_readme_shows_the_rewrite_as_it_is_printed():
    printed = run(ROOT / "examples" / "show_rewrite.py").strip()
    assert printed in (ROOT / "README.md").read_text()
