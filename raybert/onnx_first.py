"""What only the first token needs: the last layer of a classifier, for one row in place of all.

A head that reads [CLS] leaves every other token of the last layer unused but for its keys and
values. Picking the first token is moved up from the head through everything that treats tokens
alone, and through attention to its queries. The logits are the same; of a model of L layers about
1 / L of the work is gone, for teachers and students alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.fx import Graph, Node

KEPT_ATTENTION = "raybert.kept_attention.default"

IN_ARGUMENT_ONE = {
    "aten.linear.default",
    "aten.layer_norm.default",
    "aten.gelu.default",
    "aten.relu.default",
    "aten.sigmoid.default",
    "aten.silu.default",
    "aten.tanh.default",
    "aten.dropout.default",
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.alias.default",
    "aten.round.default",
    "aten.clamp.default",
    "aten.clamp.Tensor",
    "aten.to.dtype",
    "raybert.linear_int8.default",
    "raybert.on_grid.default",
    "raybert.norm_int8.default",
    "raybert.kept_feed_forward.default",
    KEPT_ATTENTION,  # its queries'
}
"""Operators that make each token of their first argument's same token."""

ELEMENTWISE = {
    "aten.add.Tensor",
    "aten.mul.Tensor",
    "aten.div.Tensor",
    "aten.addcmul.default",
    "aten.where.ScalarOther",
}
"""Operators on several values, token by token."""

SHIFTS = {"aten.add.Tensor", "aten.maximum.default"}

SPLITS = {"aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default"}

VIEWS = {"aten.view.default", "aten.reshape.default"}

COPIES = {"aten.contiguous.default", "aten.clone.default"}

ATTENTION = "aten.scaled_dot_product_attention.default"
PRODUCTS = {"aten.matmul.default", "raybert.product_int8.default"}
TURN = "aten.transpose.int"


def keep_first(graph: Graph) -> None:
    """Where only the first token of [B, T, X] is picked, compute no other.

    Args:
        graph: as `torch.export` traced it; changed in place.
    """
    mover = _Mover(graph)
    for node in list(graph.nodes):
        if _picks(node):
            source = _tokens(node.args[0])
            if source.meta["val"].dim() == 3:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(mover.first(source))
    # Dropout counts as impure, and does nothing here.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


class _Mover:
    """Values' first tokens, made once each.

    Attributes:
        whole: values that keys and values of some layer, or the outputs, are made of, so that all
            tokens are there.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: dict[Node, Node] = {}
        self.whole: set[Node] = set()
        for node in graph.nodes:
            if str(node.target) == ATTENTION:
                self._need(node.args[1:3])
            elif str(node.target) == KEPT_ATTENTION or (
                str(node.target) in PRODUCTS and node.meta["val"].dim() == 4
            ):
                self._need(node.args[1:2])
            elif node.op == "output":
                self._need(node.all_input_nodes)

    def _need(self, values: Iterable[object]) -> None:
        waiting = [_tokens(value) for value in values]
        while waiting:
            node = waiting.pop()
            if node not in self.whole and not _picks(node):
                self.whole.add(node)
                waiting += node.all_input_nodes

    def first(self, value: Node) -> Node:
        """The first token [B, X] of a value [B, T, X]."""
        if value not in self.made:
            moved = None if value in self.whole else self._moved(value)
            self.made[value] = moved or self._picked(value)
        return self.made[value]

    def _picked(self, value: Node) -> Node:
        target = torch.ops.aten.select.int
        return self._call(target, (value, 1, 0), value.meta["val"].select(1, 0))

    def _call(self, target: Any, args: tuple, val: Any, kwargs: Any = None) -> Node:
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta["val"] = val
        return node

    def _moved(self, value: Node) -> Node | None:
        """The same made of first tokens; nothing where tokens are not treated alone."""
        kind, args = str(value.target), value.args
        if kind in IN_ARGUMENT_ONE:
            if kind == "raybert.linear_int8.default" and args[3] is None:
                return None  # its scale is of all tokens
            args = (self.first(_tokens(args[0])), *args[1:])
        elif kind in ELEMENTWISE and all(_alike(arg, value) for arg in args):
            args = tuple(self.first(_tokens(arg)) if _rank(arg) == 3 else arg for arg in args)
        elif "getitem" in kind:
            return self._part(value)
        elif kind in VIEWS:
            return self._attended(value)
        else:
            return None
        return self._call(value.target, args, value.meta["val"].select(1, 0), dict(value.kwargs))

    def _part(self, value: Node) -> Node | None:
        """A part of what was split along its last axis."""
        source, place = cast("tuple[Any, Any]", value.args)
        split = _tokens(source)
        if split in self.whole or str(split.target) not in SPLITS:
            return None
        whole, sizes, *where = cast("tuple[Any, ...]", split.args)
        if (where[0] if where else split.kwargs.get("dim", 0)) not in (-1, 2):
            return None
        if split not in self.made:
            parts = [part.select(1, 0) for part in split.meta["val"]]
            first = self.first(_tokens(whole))
            self.made[split] = self._call(split.target, (first, sizes, -1), parts)
        picked = (self.made[split], place)
        return self._call(value.target, picked, value.meta["val"].select(1, 0))

    def _attended(self, value: Node) -> Node | None:
        """The joined context of attention whose queries are the first token's alone."""
        turned = _behind(value.args[0])
        if str(turned.target) != TURN or turned.args[1:] != (1, 2):
            return None
        attention = _behind(turned.args[0])
        if str(attention.target) in PRODUCTS:
            return self._joined(value, turned, self._row(attention))
        if str(attention.target) != ATTENTION:
            return None
        queries = self._row(_tokens(attention.args[0]))
        if queries is None:
            return None
        context = self._call(
            attention.target,
            (queries, *attention.args[1:]),
            attention.meta["val"].select(2, 0).unsqueeze(2),
            dict(attention.kwargs),
        )
        return self._joined(value, turned, context)

    def _joined(self, value: Node, turned: Node, context: Node | None) -> Node | None:
        """The heads' contexts [B, A, 1, D] side by side, [B, H]."""
        if context is None:
            return None
        back = self._call(turned.target, (context, 1, 2), context.meta["val"].transpose(1, 2))
        return self._call(value.target, (back, []), value.meta["val"].select(1, 0))

    def _row(self, node: Node) -> Node | None:
        """The first token [B, A, 1, X] of a value [B, A, T, X], made of first tokens."""
        kind, args = str(node.target), node.args
        if kind == TURN:
            apart = _behind(args[0])
            if str(apart.target) not in VIEWS or _rank(apart.args[0]) != 3:
                return None
            one = apart.meta["val"].select(1, 0).unsqueeze(1)  # [B, 1, A, D]
            heads = self._call(apart.target, (self.first(_tokens(apart.args[0])), []), one)
            return self._call(node.target, (heads, 1, 2), one.transpose(1, 2))
        shifted = kind in SHIFTS and _rank(args[1]) == 1  # by a vector, the same for every token
        if kind not in PRODUCTS and kind not in IN_ARGUMENT_ONE and not shifted:
            return None
        if node not in self.made:
            source = self._row(_tokens(args[0]))
            if source is None:
                return None
            one = node.meta["val"].select(2, 0).unsqueeze(2)
            self.made[node] = self._call(node.target, (source, *args[1:]), one, dict(node.kwargs))
        return self.made[node]


def _picks(node: Node) -> bool:
    """Whether it is the first token of a value."""
    return str(node.target) == "aten.select.int" and node.args[1:] == (1, 0)


def _tokens(value: object) -> Node:
    assert isinstance(value, Node)
    return value


def _rank(value: object) -> int:
    """Axes of a traced tensor; of a number, none."""
    return value.meta["val"].dim() if isinstance(value, Node) else 0


def _alike(arg: object, value: Node) -> bool:
    """Whether an operand is of the same tokens, or the same for all of them."""
    if _rank(arg) <= 1:
        return True
    own, whole = _tokens(arg).meta["val"].shape, value.meta["val"].shape
    same = own[:-1] == whole[:-1] and own[-1] in (1, whole[-1])
    return same or own == (whole[0], 1, whole[2])


def _behind(value: object) -> Node:
    """What a value is a copy of."""
    node = _tokens(value)
    while str(node.target) in COPIES:
        node = _tokens(node.args[0])
    return node
