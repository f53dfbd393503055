"""More than one process: DDP, FSDP1 and FSDP2 over a packed model give one process's outputs and gradients."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
    import copy, json, sys
    import torch, torch.distributed as dist
    from torch import nn
    from support import models
    import int8fx

    rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, inputs = models.llama()
    int8fx.convert(model, int8fx.rotated(16, columns=0.05))

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a = base, nn.Linear(base.in_features, 4, bias=False)
            self.b = nn.Linear(4, base.out_features)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    torch.manual_seed(1)
    for p in model.parameters():
        p.requires_grad = False
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    one = copy.deepcopy(model)
    ids = inputs["input_ids"]

    def loss_of(m):
        return m(input_ids=ids, use_cache=False).logits.square().mean()

    expected = one(input_ids=ids, use_cache=False).logits
    loss_of(one).backward()
    gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    out = {}

    def full(t):
        return t.full_tensor() if hasattr(t, "full_tensor") else t

    if kind == "ddp":
        from torch.nn.parallel import DistributedDataParallel
        wrapped = DistributedDataParallel(model)
        sent = []
        broadcast = dist._broadcast_coalesced
        def watched(group, tensors, *args):
            sent.extend(tensors)
            return broadcast(group, tensors, *args)
        dist._broadcast_coalesced = watched
        out["buffers"] = sum(b.nbytes for b in model.buffers())
        out["codes"] = sum(p.nbytes for p in model.parameters() if p.dtype == torch.int8)
    elif kind == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        mixed = MixedPrecision(buffer_dtype=torch.bfloat16) if kind == "fsdp1 buffer_dtype" else None
        original = kind != "fsdp1 flat"
        if not original:
            for p in model.parameters():
                p.requires_grad = p.is_floating_point()  # a flat parameter trains as a whole
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=original, mixed_precision=mixed, device_id=torch.device("cpu"),
        )
    y = wrapped(input_ids=ids, use_cache=False).logits
    out["error"] = float((y - expected).norm() / expected.norm())
    if kind == "ddp":
        out["sent"] = sum(t.nbytes for t in sent)
    from int8fx.conversion import contents
    read, digest = [], contents.digest
    contents.digest = lambda t: read.append(t.dtype) or digest(t)
    loss_of(wrapped).backward()
    out["codes read again"] = read.count(torch.int8)
    if kind != "fsdp1 flat":
        square = torch.zeros(())
        for p in wrapped.parameters():
            if p.grad is not None:
                local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                square += local.square().sum()
        if kind != "ddp":
            dist.all_reduce(square)
        out["gradient"] = float(square / sum(g.square().sum() for g in gradients.values()))
    out["codes among buffers"] = sum(n.endswith("_codes") for n, _ in wrapped.named_buffers())
    out["scales"] = sorted({str(b.dtype) for n, b in wrapped.named_buffers() if n.endswith("_scale")})
    str(int8fx.summary(wrapped))
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    state = get_model_state_dict(wrapped)
    out["codes in the state"] = sum(k.endswith("weight_codes") for k in state)
    scales = {k: t for k, t in one.state_dict().items() if k.endswith("_scale")}
    out["changed scales"] = [k for k, t in scales.items() if not torch.equal(full(state[k]), t)]
    wrapped.load_state_dict(wrapped.state_dict())
    again = wrapped(input_ids=ids, use_cache=False).logits
    out["changed outputs"] = not torch.equal(again, y)
    if rank == 0:
        print(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()
"""


def run(kind: str, folder: Path) -> dict:
    tests = str(Path(__file__).parents[1])
    script = f"import sys; sys.path.insert(0, {tests!r})\n" + textwrap.dedent(SCRIPT)
    commands = [[sys.executable, "-c", script, str(rank), str(folder), kind] for rank in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    outputs = [process.communicate(timeout=180) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp1 flat", "fsdp2"])
def test_outputs_and_gradients_are_those_of_one_process(kind, tmp_path):
    out = run(kind, tmp_path)
    assert out["error"] == 0
    assert out["scales"] == ["torch.float32"]
    assert out["codes in the state"] == 14
    assert out["changed scales"] == []
    assert not out["changed outputs"]
    assert out["codes read again"] == 0
    assert out["codes among buffers"] == (14 if "fsdp1" in kind else 0)  # FSDP1 broadcasts buffers
    if kind != "fsdp1 flat":
        assert abs(out["gradient"] - 1) < 1e-5
    if kind == "ddp":  # no step sends codes; scales, columns and formats are buffers
        assert out["sent"] <= out["buffers"] < out["codes"]


def test_fsdp1_casts_other_buffers_and_not_scales(tmp_path):
    out = run("fsdp1 buffer_dtype", tmp_path)
    assert 0 < out["error"] < 0.02  # the rotary embedding's frequencies are cast
    assert out["scales"] == ["torch.float32"]
    assert out["changed scales"] == []
    assert not out["changed outputs"]
