"""`read_usage`: which Parameters of a module are weights of matmuls, in which layout; the module does not change."""

from __future__ import annotations

import collections
import copy
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from support.graphs import random
from torch import nn

from int8fx.conversion import usage
from int8fx.conversion.usage import read_usage


class Module(nn.Module):
    """Parameters w [6, 6] (square: only its use tells which way round it is), e and e2 [3, 6, 6] and b [6]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(random(6, 6))
        self.e = nn.Parameter(random(3, 6, 6))
        self.e2 = nn.Parameter(random(3, 6, 6))
        self.b = nn.Parameter(random(6))
        self.register_buffer("table", random(6, 6))
        self.child = nn.Linear(6, 6)

    def helper(self, x):
        w = self.w
        alias = w
        return x @ alias.t()


def usage_of(forward) -> dict[str, str | None]:
    return read_usage(type("Module", (Module,), {"forward": forward})()).layouts


NK, KN = {"w": "NK"}, {"w": "KN"}
USED = {
    "F.linear": (lambda self, x: F.linear(x, self.w, self.b), NK),
    "F.linear by keyword": (lambda self, x: F.linear(x, bias=self.b, weight=self.w), NK),
    "operator": (lambda self, x: x @ self.w, KN),
    "operator, transposed": (lambda self, x: x @ self.w.t(), NK),
    "operator, on the left": (lambda self, x: self.w @ x, NK),
    "operator, on the left and transposed": (lambda self, x: self.w.T @ x, KN),
    "torch.matmul": (lambda self, x: torch.matmul(x, self.w), KN),
    "method matmul": (lambda self, x: x.matmul(self.w.transpose(0, 1)), NK),
    "torch.mm": (lambda self, x: torch.mm(x, self.w.permute(1, 0)), NK),
    "method mm": (lambda self, x: x.mm(self.w.mT), NK),
    "addmm": (lambda self, x: torch.addmm(self.b, x, self.w), KN),
    "torch.mv": (lambda self, x: torch.mv(self.w, x), NK),
    "bmm": (lambda self, x: torch.bmm(x, self.e), {"e": "KN"}),
    "bmm, transposed": (lambda self, x: torch.bmm(x, self.e.transpose(1, 2)), {"e": "NK"}),
    "baddbmm": (lambda self, x: torch.baddbmm(self.b, x, self.e), {"e": "KN"}),
    "matmul of experts": (lambda self, x: x @ self.e, {"e": "KN"}),
    "einsum nk": (lambda self, x: torch.einsum("bk,nk->bn", x, self.w), NK),
    "einsum kn": (lambda self, x: torch.einsum("bk,kn->bn", x, self.w), KN),
    "einsum of experts": (lambda self, x: torch.einsum("ebk,enk->ebn", x, self.e), {"e": "NK"}),
    "an expert": (lambda self, x: F.linear(x, self.e[1]), {"e": "NK"}),
    "an expert, transposed": (lambda self, x: x @ self.e[-1], {"e": "KN"}),
    "chunks": (lambda self, x: [F.linear(x, part) for part in [self.w.chunk(3)[i] for i in range(3)]], NK),
    "rows": (lambda self, x: F.linear(x, self.w[:3]), NK),
    "a broadcast weight": (lambda self, x: x @ self.w.unsqueeze(0).expand(4, -1, -1), KN),
    "cast to the input's dtype": (lambda self, x: F.linear(x, self.w.to(x.dtype)), NK),
    "twice the same way": (lambda self, x: F.linear(F.linear(x, self.w), self.w), NK),
    "two weights": (lambda self, x: F.linear(x, self.w) @ self.e[0], {"w": "NK", "e": "KN"}),
    "a helper and an alias": (lambda self, x: self.helper(x), NK),
    "a closure": (lambda self, x: (lambda y: F.linear(y, self.w))(x), NK),
    "after a child": (lambda self, x: F.linear(self.child(x).relu(), self.w), NK),
    "elementwise as well": (lambda self, x: F.linear(x, self.w) + self.w.sum(), NK),
    "under no_grad": (lambda self, x: F.linear(x, self.w.detach()), NK),
    "whatever is given": (lambda self, *given: F.linear(given[0], self.w), NK),
    "after a buffer": (lambda self, x: F.linear(x @ self.table, self.w), NK),
}


@pytest.mark.parametrize("name", USED)
def test_product_with_a_parameter(name):
    forward, expected = USED[name]
    assert usage_of(forward) == expected


UNUSED = {
    "not at all": lambda self, x: x,
    "elementwise": lambda self, x: x * self.w + self.e[0],
    "a table of rows": lambda self, ids: F.embedding(ids, self.w),
    "rows by ids": lambda self, ids: self.w[ids],
    "changed first": lambda self, x: F.linear(x, self.w * 2),
    "normalised first": lambda self, x: F.linear(x, F.normalize(self.w)),
    "changed in place": lambda self, x: F.linear(x, self.w.mul_(2)),
    "a product that is scaled": lambda self, x: torch.addmm(self.b, x, self.w, alpha=2),
    "a child's weight": lambda self, x: F.linear(x, self.child.weight),
    "a buffer": lambda self, x: F.linear(x, self.table),
    "a vector": lambda self, x: x @ self.b,
    "experts merged": lambda self, x: F.linear(x, self.e.reshape(18, 6)),
    "experts along the wrong dimension": lambda self, x: torch.bmm(x, self.e.permute(1, 2, 0)),
    "columns": lambda self, x: F.linear(x, self.w[:, :3]),
}


@pytest.mark.parametrize("name", UNUSED)
def test_near_miss_has_no_entry(name):
    assert usage_of(UNUSED[name]) == {}


DIFFERENT = {
    "both ways": lambda self, x: F.linear(x, self.w) @ self.w,
    "both ways, the other first": lambda self, x: F.linear(x @ self.w, self.w),
    "whole and merged": lambda self, x: torch.bmm(x, self.e) + torch.bmm(x, self.e.permute(1, 2, 0)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_parameter_that_is_read_in_different_ways_has_no_layout(name):
    assert list(usage_of(DIFFERENT[name]).values()) == [None]


def _while(self, x):
    while x.sum() > 0:
        x = F.linear(x, self.w)
    return x


def _hit_experts(self, x, ids):
    """As experts of transformers are written."""
    y = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=4).permute(2, 1, 0)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        expert = expert[0]
        if expert == 3:
            continue
        _, token = torch.where(mask[expert])
        gate, up = F.linear(x[token], self.e[expert]).chunk(2, dim=-1)
        y.index_add_(0, token, (gate.relu() * up) @ self.e2[expert])
    return y


def _numbered_experts(self, x, ids):
    if ids.numel() == 0:
        return x
    for expert in ids.unique():
        number = int(expert.item())
        x = self.child(x) if number >= 3 or self.e is None else F.linear(x, self.e[number])
    return x


def _raises(self, x):
    if x.dim() != 3:
        raise ValueError("three dimensions")
    assert x.shape[0] > 1
    return F.linear(x, self.w)


def _early_exits(self, x):
    for limit in range(20):
        if x.sum() > limit:
            return x
    return F.linear(x, self.w)


FOLLOWED = {
    "a condition": (lambda self, x: F.linear(x, self.w) if x.sum() > 0 else x, NK),
    "the other side of a condition": (lambda self, x: x if x.sum() > 0 else F.linear(x, self.w), NK),
    "a condition on a shape": (lambda self, x: F.linear(x, self.w) if x.shape[0] > 1 else x, NK),
    "alike on both sides": (lambda self, x: x @ self.w if x.sum() > 0 else (2 * x) @ self.w, KN),
    "nested conditions": (lambda self, x: (x @ self.w if x.min() > 0 else x) if x.max() > 0 else -x, KN),
    "a loop while a condition holds": (_while, NK),
    "rows": (lambda self, x: [F.linear(row, self.w) for row in x], NK),
    "experts of a Parameter": (lambda self, x: [x @ w for w in self.e], {"e": "KN"}),
    "as many rounds as rows": (lambda self, x: [x[i] @ self.e[i] for i in range(x.shape[0])], {"e": "KN"}),
    "experts that were hit": (_hit_experts, {"e": "NK", "e2": "KN"}),
    "experts by number": (_numbered_experts, {"e": "NK"}),
    "an expert by a symbol": (lambda self, x, i: F.linear(x, self.e[i]), {"e": "NK"}),
    "an expert and a view": (lambda self, x, i: x @ self.e[i, None].mT, {"e": "NK"}),
    "errors on the way": (_raises, NK),
    "a number": (lambda self, x: F.linear(x, self.w) * float(x.sum()), NK),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_control_flow_that_depends_on_tensors_is_followed(name):
    forward, expected = FOLLOWED[name]
    assert usage_of(forward) == expected


NOT_THE_SAME = {
    "each side its own way": (lambda self, x: x @ self.w if x.sum() > 0 else F.linear(x, self.w), {"w": None}),
    "changed on one side": (lambda self, x: x @ self.w if x.sum() > 0 else self.w.zero_(), {}),
    "changed in a loop": (lambda self, x: [self.w.mul_(row) for row in x] and x @ self.w, {}),
    "rows by ids": (lambda self, x, ids: F.linear(x, self.w[ids]), {}),
    "experts of a batch": (lambda self, x, ids: torch.bmm(x, self.e[ids]), {}),
    "behind more conditions than are followed": (_early_exits, {}),
}


@pytest.mark.parametrize("name", NOT_THE_SAME)
def test_near_misses_of_control_flow(name):
    forward, expected = NOT_THE_SAME[name]
    assert usage_of(forward) == expected


def test_many_conditions_are_followed_within_limits():
    runs = []

    def forward(self, x):
        runs.append(1)
        for i in range(10):
            if x.sum() > i:
                x = x + i
        return F.linear(x, self.w)

    assert usage_of(forward) == NK
    assert len(runs) == usage.RUNS


UNTRACEABLE = {
    "an error": lambda self, x: F.linear(x, self.w) + self.no_such_thing,
    "an error on one side": lambda self, x: F.linear(x, self.w) if x.sum() > 0 else self.no_such_thing,
    "an error in torch": lambda self, x: F.linear(x, self.w) + self.get_submodule("none"),
    "a length": lambda self, x: F.linear(x, self.w) * len(x),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_forward_that_cannot_be_traced(name):
    with pytest.raises(ValueError, match="forward cannot be traced"):
        usage_of(UNTRACEABLE[name])


def test_parameters_that_the_forward_does_not_read():
    def forward(self, x):
        return F.linear(x, self.w) if x.sum() > 0 else x + self.b.sum()

    module = type("Module", (Module,), {"forward": forward})()
    assert read_usage(module) == (NK, {"e", "e2"})
    module.e = module.w
    assert read_usage(module) == (NK | {"e": "NK"}, {"e2"})


# ---- reading leaves no trace -----------------------------------------------------------------------------------------


class State:
    """A plain object, as caches are."""

    def __init__(self) -> None:
        self.count, self.seen = 0, []


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def _cached(self, x):
    self.cache = x
    self.steps += 1
    self.new = x


def _containers(self, x):
    self.lists.append(x)
    self.lists[0].append(x)
    self.dicts["x"] = x
    self.dicts["inner"]["x"] = x
    self.dicts["counts"]["x"] += 1
    self.queue.append(x)
    self.ordered.move_to_end("first")
    self.names.add("x")
    self.pair[0].append(x)


def _buffers(self, x):
    self.table.add_(1)
    self.table[0] = 0.0
    self.child.running.mul_(2)
    self.plain.zero_()
    self.table = x
    self.register_buffer("another", torch.zeros(1))


def _children(self, x):
    self.child.cache = x
    self.child.note(x)
    self.children_of["only"].cache = x
    self.add_module("another", nn.ReLU())
    self.child.bias = None


def _objects(self, x):
    self.state.count += 1
    self.state.x = x
    self.state.seen.append(x)
    self.bound(x)


def _random(self, x):
    self.noise = torch.rand(3)


class Noting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.notes = []
        self.register_buffer("running", torch.ones(2))

    def note(self, x) -> None:
        self.notes.append(x)


class Stateful(Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Noting()
        self.cache, self.steps, self.plain = None, 0, torch.ones(3)
        self.lists, self.pair, self.names = [[1], 2], ([1],), {"a"}
        self.dicts = {"inner": {}, "counts": collections.defaultdict(int)}
        self.queue = collections.deque([1], maxlen=3)
        self.ordered = collections.OrderedDict(first=1, second=2)
        self.children_of = nn.ModuleDict({"only": nn.ReLU()})
        self.state = State()
        self.bound = self.bump

    def bump(self, x) -> None:
        self.steps += 1


def snapshot(value, seen: dict | None = None):
    """All that ``value`` consists of, to compare; shared objects by their place."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value), value._version, value.tolist())
    if id(value) in seen:
        return ("again", seen[id(value)])
    if isinstance(value, (nn.Module, State)):
        seen[id(value)] = len(seen)
        return (type(value).__name__, id(value), snapshot(vars(value), seen))
    if isinstance(value, dict):
        return (type(value).__name__, [(k, snapshot(v, seen)) for k, v in value.items()])
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value).__name__, [snapshot(v, seen) for v in value])
    if isinstance(value, types.MethodType):
        return (value.__func__, snapshot(value.__self__, seen))
    return repr(value)


@pytest.mark.parametrize("change", [_cached, _containers, _buffers, _children, _objects, _random])
def test_the_trace_leaves_the_module_as_it_was(change):
    def forward(self, x):
        change(self, x)
        return F.linear(x, self.w)

    module = type("Stateful", (Stateful,), {"forward": forward})()
    before, random_state = snapshot(module), torch.get_rng_state()
    assert read_usage(module).layouts == NK
    assert snapshot(module) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    twin = copy.deepcopy(module)
    twin(random(2, 6))  # the changes are real: the same forward, called, does change the module
    assert change is _random or snapshot(twin) != snapshot(copy.deepcopy(module))


def test_the_trace_leaves_the_module_as_it_was_if_it_fails():
    def forward(self, x):
        self.lists.append(x)
        return F.linear(x, self.w) * len(x)

    module = type("Stateful", (Stateful,), {"forward": forward})()
    before = snapshot(module)
    with pytest.raises(ValueError, match="cannot be traced"):
        read_usage(module)
    assert snapshot(module) == before


def test_the_twin_is_as_consistent_as_the_module():
    """What is one object in the module is one in its twin; Parameters, and objects it cannot copy, are shared."""

    def forward(self, x):
        assert self.alias is self.lists
        assert self.again is self.child
        assert self.state.owner is self
        assert self.slots is slots
        assert self.kind is torch.float32
        assert self.enumeration is torch.nn.attention.SDPBackend.MATH
        return F.linear(x, self.w)

    module, slots = type("Stateful", (Stateful,), {"forward": forward})(), Slots()
    module.alias, module.again, module.state.owner = module.lists, module.child, module
    module.slots, module.kind, module.enumeration = slots, torch.float32, torch.nn.attention.SDPBackend.MATH
    assert read_usage(module).layouts == NK


def test_control_flow_on_configuration_and_buffers_is_followed():
    def forward(self, x):
        if self.training:
            raise AssertionError
        if self.flag.item():
            return F.linear(x, self.w)
        return x @ self.w

    module = type("Module", (Module,), {"forward": forward})().eval()
    for flag, expected in ((True, NK), (False, KN)):
        module.register_buffer("flag", torch.tensor(flag))
        assert read_usage(module).layouts == expected


def test_a_parameter_under_two_names():
    module = type("Module", (Module,), {"forward": lambda self, x: F.linear(x, self.second)})()
    module.second = module.w
    assert read_usage(module).layouts == {"w": "NK", "second": "NK"}
    module = type("Module", (Module,), {"forward": lambda self, x: F.linear(x, self.second) @ self.w})()
    module.second = module.w
    assert read_usage(module).layouts == {"w": None, "second": None}


def test_a_parameter_that_is_none():
    module = type("Module", (Module,), {"forward": lambda self, x: F.linear(x, self.w, self.bias)})()
    module.register_parameter("bias", None)
    assert read_usage(module).layouts == NK


def test_children_are_what_they_are_and_do_not_run():
    def forward(self, x):
        for layer in self.layers:
            assert isinstance(layer, nn.ReLU)
            x = layer(x)
        return F.linear(self.many["one"](x), self.w) if isinstance(self.child, nn.Linear) else x

    module = type("Module", (Module,), {"forward": forward})()
    module.layers = nn.Sequential(nn.ReLU(), nn.ReLU())
    module.many = nn.ModuleDict({"one": nn.ReLU()})
    for child in module.modules():
        child.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    assert read_usage(module).layouts == NK
    module.many["one"] = torch.jit.script(nn.ReLU())
    assert read_usage(module).layouts == NK


def test_a_child_s_parameters_are_not_written_to():
    def forward(self, x):
        self.child.weight.data.zero_()
        with torch.no_grad():
            self.child.bias.add_(1)
        return F.linear(self.child(x), self.w)

    module = type("Module", (Module,), {"forward": forward})()
    before = snapshot(module)
    assert read_usage(module).layouts == NK
    assert snapshot(module) == before


def test_objects_that_cannot_be_copied_are_shared():
    module = type("Module", (Module,), {"forward": lambda self, x: F.linear(x, self.w)})()
    module.lock, module.generator, module.stream = threading.Lock(), torch.Generator(), sys.stdout
    module.rows = (row for row in range(3))
    assert read_usage(module).layouts == NK


def test_other_threads_are_not_disturbed():
    """``torch.fx.Tracer`` would have them record what they do."""
    entered, finished = threading.Event(), threading.Event()

    def forward(self, x):
        entered.set()
        assert finished.wait(60)
        return F.linear(x, self.w)

    module, other = type("Module", (Module,), {"forward": forward})(), nn.Linear(6, 6)
    usages: list = []
    reading = threading.Thread(target=lambda: usages.append(read_usage(module).layouts))
    reading.start()
    assert entered.wait(60)
    y = other(random(2, 6))
    finished.set()
    reading.join()
    assert type(y) is torch.Tensor
    assert usages == [NK]
