"""Layers whose backward pass gives the ordinary gradient of their input, and of their parameters that of each group.

Each takes an ``anchor`` that requires a gradient and gets none, so that the backward pass comes by also where the input
requires none, and takes its parameters detached, so that nobody but the collector is told of their gradients.
"""

# ruff: noqa: D102, ARG004 - forward and backward, and what they are given, are torch's

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from hf_sage.engine.joint.collector import Collector, GroupRows, Leaf, Share, ready

Context = Any
"""What torch keeps of a function between the passes."""


class Linear(Function):
    """``x @ weight.T + bias``, or ``x @ weight + bias`` if ``transposed``.

    The groups' gradients of the weight take no more products than their sum does.
    """

    @staticmethod
    def forward(
        ctx: Context,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_weight: Leaf | None,
        of_bias: Leaf | None,
        transposed: bool,
        collector: Collector,
    ) -> Tensor:
        ctx.of_weight, ctx.of_bias, ctx.transposed, ctx.collector = of_weight, of_bias, transposed, collector
        ctx.save_for_backward(x if of_weight else None, weight if ctx.needs_input_grad[1] else None)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        if ctx.of_weight:
            x = x.reshape(-1, x.shape[-1])
            share = products(x, dy, ctx.collector.rows) if ctx.transposed else products(dy, x, ctx.collector.rows)
            ctx.collector.add(ctx.of_weight, share)
        if ctx.of_bias:
            ctx.collector.add(ctx.of_bias, ready(ctx.collector.rows.sums(dy)))
        dx = None
        if weight is not None:
            dx = (dy @ (weight.t() if ctx.transposed else weight)).view(*shape[:-1], -1)
        return None, dx, None, None, None, None, None, None


class Convolution(Function):
    """A convolution of any dimension."""

    @staticmethod
    def forward(
        ctx: Context,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_weight: Leaf | None,
        of_bias: Leaf | None,
        shape: tuple[Any, ...],
        collector: Collector,
    ) -> Tensor:
        ctx.of_weight, ctx.of_bias, ctx.shape, ctx.collector = of_weight, of_bias, shape, collector
        ctx.save_for_backward(x, weight)
        stride, padding, dilation, groups = shape
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = ctx.collector.rows
        stride, padding, dilation, groups = ctx.shape

        def gradient(x: Tensor, dy: Tensor, weight: Tensor, wanted: int) -> Tensor:
            mask = [wanted == i for i in range(3)]
            found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
            )
            return found[wanted]

        def share(start: int, stop: int, out: Tensor) -> Tensor:
            channels = slice(start, stop) if groups == 1 else slice(None)
            for own, a, b in zip(out, rows.split(x), rows.split(dy), strict=True):
                found = gradient(a, b[:, channels], weight[channels], 1)
                own.copy_((found if groups == 1 else found[start:stop]).flatten(1))
            return out

        if ctx.of_weight:
            kernel = tuple(weight.shape[2:])
            is_product = stride == kernel and groups == 1 and not any(padding) and set(dilation) == {1}
            ctx.collector.add(ctx.of_weight, products(_columns(dy), _patches(x, kernel), rows) if is_product else share)
        if ctx.of_bias:
            ctx.collector.add(ctx.of_bias, ready(rows.sums(dy.flatten(2).sum(2))))
        dx = gradient(x, dy, weight, 0) if ctx.needs_input_grad[1] else None
        return None, dx, None, None, None, None, None, None


class Embedding(Function):
    """Rows of a table."""

    @staticmethod
    def forward(
        ctx: Context,
        anchor: Tensor,
        indices: Tensor,
        weight: Tensor,
        padding_index: int | None,
        leaf: Leaf,
        collector: Collector,
    ) -> Tensor:
        ctx.padding_index, ctx.leaf, ctx.collector, ctx.length = padding_index, leaf, collector, len(weight)
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Any:
        (indices,), rows = ctx.saved_tensors, ctx.collector.rows
        parts = []
        for own, g in zip(rows.split(indices), rows.split(dy), strict=True):
            sorted_, order = own.reshape(-1).sort()
            counts = torch.bincount(sorted_, minlength=ctx.length)
            if ctx.padding_index is not None:
                g = g.masked_fill((own == ctx.padding_index).unsqueeze(-1), 0)
            parts.append((sorted_, order, [0, *counts.cumsum(0).tolist()], g.reshape(-1, g.shape[-1])))

        def share(start: int, stop: int, out: Tensor) -> Tensor:
            for table, (sorted_, order, first, g) in zip(out.zero_(), parts, strict=True):
                found = slice(first[start], first[stop])
                table.index_add_(0, sorted_[found] - start, g[order[found]])
            return out

        ctx.collector.add(ctx.leaf, share)
        return None, None, None, None, None, None


class LayerNorm(Function):
    """A normalisation over the last dimensions."""

    @staticmethod
    def forward(
        ctx: Context,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        of_weight: Leaf | None,
        of_bias: Leaf | None,
        shape: list[int],
        eps: float,
        collector: Collector,
    ) -> Tensor:
        ctx.of_weight, ctx.of_bias, ctx.shape, ctx.collector = of_weight, of_bias, shape, collector
        y, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Any:
        x, mean, scale, weight, bias = ctx.saved_tensors
        mask = [ctx.needs_input_grad[1], ctx.of_weight is not None, ctx.of_bias is not None]
        parts = zip(*(ctx.collector.rows.split(t) for t in (dy, x, mean, scale)), strict=True)
        found = [
            torch.ops.aten.native_layer_norm_backward(g, own, ctx.shape, m, s, weight, bias, mask)
            for g, own, m, s in parts
        ]
        of_x, of_weight, of_bias = zip(*found, strict=True)
        if ctx.of_weight:
            ctx.collector.add(ctx.of_weight, ready(torch.stack(of_weight)))
        if ctx.of_bias:
            ctx.collector.add(ctx.of_bias, ready(torch.stack(of_bias)))
        return None, torch.cat(of_x) if mask[0] else None, *[None] * 7


class Rowwise(Function):
    """Any function that treats each row by itself, as a normalisation over features does; it is cheap to run again."""

    @staticmethod
    def forward(
        ctx: Context,
        anchor: Tensor,
        x: Tensor,
        function: Callable[..., Tensor],
        leaves: tuple[Leaf | None, ...],
        collector: Collector,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.function, ctx.leaves, ctx.collector = function, leaves, collector
        ctx.save_for_backward(x, *parameters)
        return function(x, *parameters)

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        rows, wants_dx = ctx.collector.rows, ctx.needs_input_grad[1]
        of_x: list[Tensor] = []
        of_parameters: list[tuple[Tensor, ...]] = []
        for own, g in zip(rows.split(x), rows.split(dy), strict=True):
            with torch.enable_grad():
                own = own.detach().requires_grad_(wants_dx)
                given = [
                    p if leaf is None else p.detach().requires_grad_()
                    for p, leaf in zip(parameters, ctx.leaves, strict=True)
                ]
                y = ctx.function(own, *given)
            wanted = [own] * wants_dx + [p for p, leaf in zip(given, ctx.leaves, strict=True) if leaf]
            found = torch.autograd.grad(y, wanted, g)
            of_x += found[:wants_dx]
            of_parameters.append(found[wants_dx:])
        leaves = [leaf for leaf in ctx.leaves if leaf]
        for leaf, column in zip(leaves, zip(*of_parameters, strict=True), strict=True):
            ctx.collector.add(leaf, ready(torch.stack(column)))
        return None, torch.cat(of_x) if of_x else None, None, None, None, *[None] * len(parameters)


class Lift(Function):
    """A parameter repeated for every row: what follows then is an ordinary function of rows."""

    @staticmethod
    def forward(
        ctx: Context, anchor: Tensor, p: Tensor, shape: tuple[int, ...], leaf: Leaf, collector: Collector
    ) -> Tensor:
        ctx.leaf, ctx.collector, ctx.shape = leaf, collector, p.shape
        return p.expand(shape)

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Any:
        shape = (1,) * (dy.dim() - len(ctx.shape)) + tuple(ctx.shape)
        sums = [part.sum_to_size(shape) for part in ctx.collector.rows.split(dy)]
        ctx.collector.add(ctx.leaf, ready(torch.stack(sums).view(len(sums), *ctx.shape)))
        return None, None, None, None, None


def products(left: Tensor, right: Tensor, rows: GroupRows) -> Share:
    """The share of each group's ``left.T @ right``, of matrices with a multiple of the batch's rows."""
    if len(set(rows.sizes)) == 1:
        lefts, rights = (m.view(len(rows.sizes), -1, m.shape[1]) for m in (left, right))

        def share(start: int, stop: int, out: Tensor) -> Tensor:
            return torch.bmm(lefts[:, :, start:stop].mT, rights, out=out)

    else:
        pairs = list(zip(rows.split(left), rows.split(right), strict=True))

        def share(start: int, stop: int, out: Tensor) -> Tensor:
            for own, (a, b) in zip(out, pairs, strict=True):
                torch.mm(a[:, start:stop].mT, b, out=own)
            return out

    return share


def _columns(dy: Tensor) -> Tensor:
    """Channels last, a row for each place."""
    return dy.flatten(2).mT.reshape(-1, dy.shape[1])


def _patches(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The patches that a kernel as large as its stride sees: a row for each, in the order of the kernel's entries."""
    for i, size in enumerate(kernel):  # (B, C, H, W) -> (B, C, h, kh, w, kw); what is left over at the edge is not seen
        d = 2 + 2 * i
        whole = x.shape[d] // size * size
        x = x.narrow(d, 0, whole).reshape(*x.shape[:d], -1, size, *x.shape[d + 1 :])
    n = len(kernel)
    places, entries = [2 + 2 * i for i in range(n)], [3 + 2 * i for i in range(n)]
    x = x.permute(0, *places, 1, *entries)
    return x.reshape(-1, x.shape[1 + n :].numel())
