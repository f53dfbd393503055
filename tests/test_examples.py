"""Every example runs, and the docs show what they print."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_models import save_lm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(path: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples():
    names = {"quickstart", "show_rewrite", "on_gpu", "inspect_outliers", "lora", "weight_only"}
    assert {path.stem for path in EXAMPLES} == names


@pytest.mark.parametrize("name", ["quickstart", "on_gpu"])
def test_example_runs(name):
    assert run(ROOT / "examples" / f"{name}.py")


def test_outliers_are_inspected_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    assert "layers.0.linear1.weight_columns" in run(ROOT / "examples" / "inspect_outliers.py", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_lora_trains_over_each_base(tmp_path):
    pytest.importorskip("peft")
    model = str(save_lm(tmp_path))
    printed = run(ROOT / "examples" / "lora.py", "--model", model, "--steps", "30", "--tokens", "48", "--held-out", "4")
    rows = [line.split() for line in printed.split("\n") if line.startswith(("bfloat16 ", "llm_int8 ", "rotated "))]
    assert [row[0] for row in rows] == ["bfloat16", "llm_int8", "rotated"]
    for _, before, after, ratio, *_ in rows:
        assert float(after) < float(before)
        assert 0.98 < float(ratio) < 1.02


def test_text_is_generated_from_each_format(tmp_path):
    model = str(save_lm(tmp_path))
    printed = run(ROOT / "examples" / "weight_only.py", "--model", model, "--tokens", "5")
    uses = [line for line in printed.split("\n") if " -> " in line]
    assert len(uses) == 5
    assert all(use in printed for use in ("load_in_4bit", "load_in_8bit", "beam search", "nf4"))


def test_the_docs_show_the_rewrite_as_it_is_printed():
    """docs/passes.md has some lines of the graph before, all of the graph after, and the report."""
    docs = (ROOT / "docs" / "passes.md").read_text()
    before, after = run(ROOT / "examples" / "show_rewrite.py").split("After")
    graph = [line.rstrip() for line in after.split("\n") if line.startswith("    ")]
    report = after.strip().split("\n")[-1]
    shown = [line for line in docs.split("\n") if line.startswith("    ") and "int8fx" in line]
    assert len(shown) > len(graph) == 4
    assert set(shown) <= {line.rstrip() for line in (before + after).split("\n")}
    assert set(graph) <= set(shown)
    assert report in docs
