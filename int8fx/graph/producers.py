"""Finds by which Parameters input channels of linear weights can be scaled without changing what a graph computes.

The result of a LayerNorm, of a multiplication by a ``[C]`` Parameter or of a linear is divided, channel by channel, if
the Parameters that produce it are. Where all that such a channel reaches are input channels of linear weights, these
can be multiplied by the divisor: the results of these linears stay the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .products import Product, read_product
from .values import value

aten = torch.ops.aten


class Place(NamedTuple):
    """The channels of a Parameter: its name, and the dimension that they are in."""

    parameter: str
    dim: int


class Consumer(NamedTuple):
    """A linear weight that reads channels of a producer.

    weight: its Parameter, and the dimension of its K input channels.
    channels: ``[K]`` int64: the channel of the producer that each input channel reads.
    """

    weight: Place
    channels: Tensor


@dataclass(frozen=True)
class Fold:
    """A producer whose channels can be divided by positive scales where its consumers' weights are multiplied by them.

    producer: the Parameters to divide, for C channels: weight and bias of a norm or of a linear.
    consumers: the weights to multiply, at least one.
    free: ``[C]`` bool: the channels that reach consumers alone. The scale of all others is 1.
    """

    producer: tuple[Place, ...]
    consumers: tuple[Consumer, ...]
    free: Tensor

    @property
    def name(self) -> str:
        return self.producer[0].parameter


class Folds(NamedTuple):
    """folds: in the order of their producers in the graph. reasons: weight of a linear in none of them -> why."""

    folds: list[Fold]
    reasons: dict[str, str]


def find_folds(graph: Graph, parameters: Mapping[str, str]) -> Folds:
    """All folds of ``graph``.

    From the result of each producer on, a tensor that holds the channel of each element follows the operators that
    keep elements apart and are positively homogeneous in them: ``f(x / s) = f(x) / s`` for s > 0. These are views,
    copies, casts between float dtypes, relu, products with other values, and sums over tokens, as that of attention's
    values by its probabilities. A channel that reaches any other operator, a weight that is used twice, or an output of
    the graph is not free: then others still may be, as the values in a matrix of queries, keys and values.

    Args:
        graph: of aten operators with static shapes, as ``torch.export.export`` gives it.
        parameters: placeholder -> name of the Parameter. Others that a node reads count as values.
    """
    return _Finder(graph, parameters).find()


_ASSERTS = {aten._assert_tensor_metadata.default}
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
}  # fmt: skip
_SAME_CHANNELS = _CASTS | {
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.neg.default,
    aten.abs.default, aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default,
}  # fmt: skip
_DROPOUTS = {aten.dropout.default, aten.dropout_.default}
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.movedim.int, aten.movedim.intlist,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int,
}  # fmt: skip
_RESHAPES = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
_MULTIPLICATIONS = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar}
_NORMS: dict[object, tuple[str, ...]] = {
    aten.layer_norm.default: ("input", "normalized_shape", "weight", "bias"),
    aten.rms_norm.default: ("input", "normalized_shape", "weight"),
}
_MATMULS = {aten.matmul.default, aten.bmm.default}

_Channels = Tensor | tuple[Tensor, ...]
"""The channel of each element of a node's result: int32 of its shape, or of each of several results."""


class _Finder:
    def __init__(self, graph: Graph, parameters: Mapping[str, str]) -> None:
        self.graph = graph
        self.names = {n: parameters[n.name] for n in graph.find_nodes(op="placeholder") if n.name in parameters}
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.products = {
            node: product
            for node in graph.nodes
            if (product := read_product(node, self._shape_of)) is not None and _is_linear(product)
        }

    def _shape_of(self, node: Node) -> torch.Size | None:
        return value(node).shape if node in self.names else None

    def find(self) -> Folds:
        folds, reasons = [], {}
        for product in self.products.values():
            source = product.x
            while source.target in (*_SAME_CHANNELS, *_DROPOUTS, *_VIEWS) and isinstance(source.args[0], Node):
                source = source.args[0]
            reasons[self.names[product.w.source]] = f"its input comes from {_operator(source)}"
        for node in self.graph.nodes:
            producer = self._producer(node)
            if producer is not None:
                fold, why = self._follow(node, producer)
                if any(bool(fold.free[c.channels].any()) for c in fold.consumers):
                    folds.append(fold)
                elif fold.consumers:
                    for consumer in fold.consumers:
                        reasons[consumer.weight.parameter] = f"{fold.name} scales its input, and that of {why} too"
        for fold in folds:
            for consumer in fold.consumers:
                reasons.pop(consumer.weight.parameter, None)
        return Folds(folds, reasons)

    # ---- producers ---------------------------------------------------------------------------------------------------

    def _producer(self, node: Node) -> tuple[Place, ...] | None:
        """The Parameters by which the last dimension of the result of ``node`` is scaled."""
        output = value(node)
        if node.op != "call_function" or not isinstance(output, Tensor) or not output.dim():
            return None
        places: list[Place] = []
        vectors = _vectors(node)
        if node in self.products:
            product = self.products[node]
            if not _used_once(product.w.source, node):
                return None
            places, vectors = [Place(self.names[product.w.source], product.n)], [product.bias]
        elif node.target is aten.mul.Tensor:
            vectors = [a for a in node.args if self._before_casts(a) in self.names][:1]
        for vector in vectors:
            parameter = self._before_casts(vector)
            if parameter is None:  # a norm or a linear without it
                continue
            if parameter not in self.names or not _used_once(parameter, node):
                return None
            if value(parameter).shape != output.shape[-1:]:
                return None
            places.append(Place(self.names[parameter], 0))
        return tuple(places) or None

    def _before_casts(self, node: object) -> Any:
        while isinstance(node, Node) and node.target in _CASTS and _is_float(node):
            node = node.args[0]
        return node

    # ---- following channels ------------------------------------------------------------------------------------------

    def _follow(self, node: Node, producer: tuple[Place, ...]) -> tuple[Fold, str]:
        """The fold of a producer, and the first operator that keeps channels from being free."""
        shape = value(node).shape
        free = torch.ones(shape[-1], dtype=torch.bool)
        reached = torch.zeros_like(free)
        channels: dict[Node, _Channels] = {node: torch.arange(shape[-1], dtype=torch.int32).expand(shape)}
        consumers, why = [], ""
        ahead = [(self.order[user], user) for user in node.users]
        seen = set(node.users)
        heapq.heapify(ahead)
        while ahead:
            _, user = heapq.heappop(ahead)
            if user.target in _ASSERTS:
                continue
            consumer = self._consumer(user, channels)
            if consumer is not None:
                consumers.append(consumer)
                reached[consumer.channels] = True
                continue
            sources = [source for source in user.all_input_nodes if source in channels]
            followed, result = _channels_after(user, channels, sources)
            for source in sources:
                if source not in followed:
                    free &= _others(channels[source], free)
            if followed != sources:
                why = why or _operator(user)
            if result is None:
                continue
            channels[user] = result
            for later in user.users.keys() - seen:
                seen.add(later)
                heapq.heappush(ahead, (self.order[later], later))
        return Fold(producer, tuple(consumers), free & reached), why

    def _consumer(self, node: Node, channels: Mapping[Node, _Channels]) -> Consumer | None:
        product = self.products.get(node)
        if product is None or [source for source in node.all_input_nodes if source in channels] != [product.x]:
            return None
        of_x = channels[product.x]
        assert isinstance(of_x, Tensor)
        rows = of_x.flatten(0, -2) if of_x.dim() > 1 else of_x[None]
        if list(node.args).count(product.x) != 1 or not _used_once(product.w.source, node):
            return None
        if not of_x.numel() or not _is_constant(of_x, range(of_x.dim() - 1)):
            return None
        return Consumer(Place(self.names[product.w.source], product.k), rows[0].long())


def _vectors(node: Node) -> list[Any]:
    """Weight and bias of a norm that has a weight."""
    names = _NORMS.get(node.target, ())
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [given.get(name) for name in names[2:]] if given.get("weight") is not None else []


def _is_linear(product: Product) -> bool:
    """Whether it is ``y [..., N] = x [..., K]`` times a whole matrix."""
    w = product.w
    return product.form == "right" and w.rank == 2 and set(w.dims) == {0, 1} and not w.selections


def _used_once(source: Node, node: Node) -> bool:
    """Whether ``node`` reads ``source``, by views and casts of it or not, as one argument, and nothing else does."""
    while True:
        users = [user for user in source.users if user.target not in _ASSERTS]
        if len(users) != 1:
            return False
        if users[0] is node:
            return [*node.args, *node.kwargs.values()].count(source) == 1
        source = users[0]


def _operator(node: Node) -> str:
    """What a message calls ``node``."""
    if node.op == "output":
        return "the model's output"
    name = getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0] if node.op == "call_function" else f"the model's input {node.name}"


def _is_float(node: Node) -> bool:
    result = value(node)
    tensors = result if isinstance(result, (list, tuple)) else (result,)
    return all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)


def _channels_after(
    node: Node, channels: Mapping[Node, _Channels], sources: list[Node]
) -> tuple[list[Node], _Channels | None]:
    """Of ``sources``, all arguments of ``node`` that have channels, those in which it is homogeneous; its channels.

    None and no sources if there are none. The channels of the other sources are not free, so they are constant here.
    """
    rule = _RULES.get(node.target)
    if rule is _attention:
        sources = [source for source in sources if source is node.args[2]]
    if rule is None or not sources or not _is_float(node):
        return [], None
    result = rule(node, channels, sources)
    return ([], None) if result is None else (sources, result)


_Rule = Callable[[Node, Mapping[Node, _Channels], list[Node]], _Channels | None]


def _same(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    return channels[sources[0]] if sources == [node.args[0]] else None


def _dropout(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    return channels[sources[0]] if node.args[2] is False else None


def _view(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    """The operator itself, called with channels in place of values."""
    if node.all_input_nodes != [node.args[0]]:
        return None
    op: Any = node.target
    op = _RESHAPES.get(op, op)  # channels may have other strides
    result = op(channels[sources[0]], *node.args[1:], **node.kwargs)
    return _expanded(result) if isinstance(result, Tensor) else tuple(map(_expanded, result))


def _getitem(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    return channels[sources[0]][node.args[1]]  # type: ignore[index]  # a result of several


def _multiplied(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    """Products with values that do not depend on a free channel: such a channel would be in ``channels``."""
    others = [a for a in node.args if a is not sources[0]]
    first = node.args[0] is sources[0]
    if len(sources) != 1 or len(others) != 1 or node.kwargs:
        return None
    if not first and node.target is not aten.mul.Tensor:  # written to the other operand, or a divisor
        return None
    return _broadcast(channels[sources[0]], node)


def _matmul(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    """The operand that has channels sums over one that it has not, along a dimension of one channel."""
    left, right = node.args
    if len(sources) != 1 or left is right or min(value(a).dim() for a in (left, right)) < 2:
        return None
    return _summed(channels[sources[0]], -1 if left is sources[0] else -2, node)


def _attention(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    """``probabilities @ value`` is linear in the values."""
    if list(node.args).count(node.args[2]) != 1:  # they are queries or keys too
        return None
    of_values = channels[sources[0]]
    assert isinstance(of_values, Tensor)
    if node.kwargs.get("enable_gqa", False):
        of_values = of_values.repeat_interleave(value(node).shape[-3] // of_values.shape[-3], -3)
    return _summed(of_values, -2, node)


def _cat(node: Node, channels: Mapping[Node, _Channels], sources: list[Node]) -> _Channels | None:
    """Of tensors that have channels, and of empty ones."""
    parts: Any = node.args[0]
    tensors = [t for t in parts if value(t).numel()]
    if not tensors or not all(t in channels for t in tensors):
        return None
    of_parts: Any = [channels[t] for t in tensors]
    return _expanded(torch.cat(of_parts, *node.args[1:]))  # type: ignore[arg-type]  # the dimension


def _summed(of_operand: _Channels, dim: int, node: Node) -> Tensor | None:
    assert isinstance(of_operand, Tensor)
    return _broadcast(of_operand.narrow(dim, 0, 1), node) if _is_constant(of_operand, (dim,)) else None


def _broadcast(of_operand: _Channels, node: Node) -> Tensor | None:
    assert isinstance(of_operand, Tensor)
    return of_operand.expand(value(node).shape)


_RULES: dict[object, _Rule] = {
    **dict.fromkeys(_SAME_CHANNELS, _same),
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_MULTIPLICATIONS | _DIVISIONS, _multiplied),
    **dict.fromkeys(_MATMULS, _matmul),
    aten.scaled_dot_product_attention.default: _attention,
    aten.cat.default: _cat,
    getitem: _getitem,
}
"""Operator -> the rule for it. All others are not homogeneous, or not known."""


# ---- channels of elements --------------------------------------------------------------------------------------------


def _distinct(t: Tensor) -> Tensor:
    """``t`` with size 1 in each dimension that it is constant in. Expanded dimensions cost nothing."""
    for dim in range(t.dim()):
        if t.shape[dim] > 1 and t.stride(dim) == 0:
            t = t.narrow(dim, 0, 1)
    for dim in range(t.dim()):
        first = t.narrow(dim, 0, min(1, t.shape[dim]))
        if t.shape[dim] > 1 and torch.equal(first.expand(t.shape), t):
            t = first
    return t


def _expanded(t: Tensor) -> Tensor:
    """``t`` in little memory."""
    return _distinct(t).clone().expand(t.shape) if t.numel() else t


def _is_constant(t: Tensor, dims: Any) -> bool:
    distinct = _distinct(t)
    return all(distinct.shape[dim] == 1 for dim in dims)


def _others(of_value: _Channels, free: Tensor) -> Tensor:
    """``[C]`` bool: the channels that are not in ``of_value``; none if it has no elements to tell."""
    result = torch.ones_like(free)
    for t in of_value if isinstance(of_value, tuple) else (of_value,):
        if not t.numel():
            return torch.zeros_like(free)
        result[_distinct(t).flatten().long()] = False
    return result
