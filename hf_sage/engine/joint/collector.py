"""The gradients of groups as one backward pass finds them: a layer at a time, and of each layer a few rows at a time.

Of K gradients only their sum and their inner products are wanted. A layer's K gradients are therefore never kept: some
of their rows are computed for all groups, go into the K × K Gram matrix and into the sum, and make room for the next.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_sage.engine.distributed import Gradients

Share = Callable[[int, int, Tensor], Tensor]
"""The gradients of each group, of entries ``start`` to ``stop`` of a tensor's first dimension: (K, stop − start, other
entries). They may be written into the tensor given, which has this shape."""

CHUNK = {"cpu": 2**21}
"""Entries that are computed at a time, over all groups: few enough for a processor's cache, enough for a product."""
CHUNK_ELSEWHERE = 2**24

SMALL = 2**15
"""Gradients of no more entries, over all groups, are taken together: biases and norms, of which there are many."""
MANY = 2**20
"""No more than as many entries at a time."""


@dataclass(frozen=True)
class GroupRows:
    """Which rows of a batch belong to which group: the groups' rows lie one after the other.

    Attributes:
        names: The groups.
        sizes: The number of rows of each.
    """

    names: tuple[Hashable, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """The number of rows of the batch."""
        return sum(self.sizes)

    def fit(self, x: Tensor) -> bool:
        """Whether the first dimension of ``x`` may be that of rows, or of as many things for each row."""
        return x.dim() > 0 and x.shape[0] > 0 and x.shape[0] % self.total == 0

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The part of each group."""
        each = x.shape[0] // self.total
        return torch.split(x, [n * each for n in self.sizes])

    def sums(self, x: Tensor) -> Tensor:
        """The sum over each group's part: (K, ...)."""
        if len(set(self.sizes)) == 1:
            return x.reshape(len(self.sizes), -1, *x.shape[1:]).sum(1)
        return torch.stack([part.sum(0) for part in self.split(x)])


@dataclass
class Leaf:
    """A tensor that rows meet: a parameter, or what was made of parameters alone.

    Attributes:
        tensor: The tensor as the model knows it.
        index: Which parameter it is; ``None`` if it was made of some.
        uses: How often the forward pass used it and the backward pass has not yet come by.
        shares: The gradients of each use so far.
        waits: Whether something was made of it, so that its gradients are complete only in the end.
    """

    tensor: Tensor
    index: int | None
    uses: int = 0
    shares: list[Share] = field(default_factory=list)
    waits: bool = False


class Collector:
    """Takes in the groups' gradients of each layer and keeps their Gram matrix and their sum.

    Attributes:
        gradients: The sum over groups for each parameter, ``None`` where there was none.
        sketch: With probes, the inner product of each group's gradient of each parameter with the parameter's probe.
        obstacle: Why what was collected is not to be used, if so.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rows: GroupRows, probe: Callable[[int, Tensor], Tensor] | None = None
    ) -> None:
        self.rows = rows
        self.gradients: Gradients = [None] * len(parameters)
        self.sketch: dict[int, Tensor] = {}
        self.obstacle: str | None = None
        self._probe = probe
        self._parameters = parameters
        self._products: list[Tensor] = []
        self._small: list[tuple[int, Tensor]] = []
        self._room: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._leaves = {id(p): Leaf(p, i) for i, p in enumerate(parameters)}

    @property
    def gram(self) -> Tensor:
        """Inner products of the groups' gradients, (K, K) in fp64."""
        first = self._parameters[0].device
        return torch.stack([product.to(first) for product in self._products]).double().sum(0)

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._leaves

    def has_any(self, values: Iterable[Any]) -> bool:
        """Whether there is a leaf among some values, or in a list among them."""
        for v in values:  # noqa: SIM110 - called for every function of torch, and faster than any()
            if id(v) in self._leaves or (type(v) in (list, tuple) and self.has_any(v)):
                return True
        return False

    def leaf(self, tensor: Tensor) -> Leaf:
        """The leaf that a tensor is."""
        return self._leaves[id(tensor)]

    def derive(self, made: Sequence[Tensor], of: Sequence[Tensor]) -> None:
        """Takes note of tensors that were made of leaves alone; they are leaves themselves."""
        for tensor in of:
            self.leaf(tensor).waits = True
        for tensor in made:
            self._leaves[id(tensor)] = Leaf(tensor, None)

    def add(self, leaf: Leaf, share: Share) -> None:
        """Takes in the gradients of one use of a leaf."""
        if torch.is_grad_enabled():
            self.obstacle = "a gradient that is differentiated itself"
            return
        if leaf.uses == 0:
            self.obstacle = "a part of the network that ran again in the backward pass"
        leaf.uses -= 1
        leaf.shares.append(share)
        if leaf.uses == 0 and leaf.index is not None and not leaf.waits:
            self._take(leaf)

    @torch.no_grad()
    def finish(self) -> None:
        """Completes what was left for the end: leaves made of others, and uses that the loss did not depend on."""
        derived = [leaf for leaf in self._leaves.values() if leaf.index is None and leaf.shares]
        if derived:
            self._differentiate(derived)
        for leaf in self._leaves.values():
            if leaf.shares:
                self._take(leaf)
        self._take_small()
        self._room.clear()

    def _differentiate(self, derived: list[Leaf]) -> None:
        """From leaves made of parameters to the parameters: once for each group."""
        k = len(self.rows.sizes)
        stacks = [self._stack(leaf, 0, _length(leaf.tensor)).view(k, *leaf.tensor.shape).clone() for leaf in derived]
        for leaf in derived:
            leaf.shares.clear()
        sources = [leaf for leaf in self._leaves.values() if leaf.index is not None and leaf.waits]
        roots, inputs = [leaf.tensor for leaf in derived], [leaf.tensor for leaf in sources]
        found = [
            torch.autograd.grad(roots, inputs, own, retain_graph=True, allow_unused=True)
            for own in zip(*stacks, strict=True)
        ]
        for leaf, column in zip(sources, zip(*found, strict=True), strict=True):
            if column[0] is not None:
                leaf.shares.append(ready(torch.stack(column)))

    def _take(self, leaf: Leaf) -> None:
        """Sum and inner products of the gradients of a leaf all of whose uses have come by."""
        p, index, length, k = leaf.tensor, leaf.index, _length(leaf.tensor), len(self.rows.sizes)
        assert index is not None
        if k * p.numel() <= SMALL and len(leaf.shares) == 1 and self._probe is None:
            stack = leaf.shares.pop()(0, length, p.new_empty(k, length, p.numel() // length))
            self._small.append((index, stack.reshape(k, -1)))
            if len(self._small) * SMALL >= MANY:
                self._take_small()
            return
        gradient = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        flat = gradient.view(length, -1)
        step = max(1, CHUNK.get(p.device.type, CHUNK_ELSEWHERE) // (k * flat.shape[1]))
        probe = self._probe(index, p).view(length, -1) if self._probe is not None else None
        for start in range(0, length, step):
            stop = min(start + step, length)
            stack = self._stack(leaf, start, stop)
            torch.sum(stack, 0, out=flat[start:stop])
            rows = self._multiply(stack)
            if probe is not None:
                self.sketch[index] = self.sketch.get(index, 0) + rows.double() @ probe[start:stop].reshape(-1)
        self.gradients[index] = gradient
        leaf.shares.clear()

    def _take_small(self) -> None:
        """Small gradients together."""
        by_kind: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = defaultdict(list)
        for index, stack in self._small:
            by_kind[stack.dtype, stack.device].append((index, stack))
        self._small.clear()
        for small in by_kind.values():
            stack = torch.cat([stack for _, stack in small], 1)
            self._multiply(stack)
            sums = torch.split(stack.sum(0), [stack.shape[1] for _, stack in small])
            for (index, _), gradient in zip(small, sums, strict=True):
                self.gradients[index] = gradient.view(self._parameters[index].shape)

    def _multiply(self, stack: Tensor) -> Tensor:
        """Adds to the inner products; returns the K rows that were multiplied."""
        rows = stack.view(len(stack), -1).to(torch.promote_types(stack.dtype, torch.float32))
        self._products.append(rows @ rows.mT)
        return rows

    def _stack(self, leaf: Leaf, start: int, stop: int) -> Tensor:
        """The gradients of each group, over all uses, of some entries of a leaf; the next call may write over them."""
        p, k = leaf.tensor, len(self.rows.sizes)
        shape = min(len(leaf.shares), 2), k, stop - start, p.numel() // _length(p)
        size = math.prod(shape)
        room = self._room.get((p.device, p.dtype))
        if room is None or room.numel() < size:
            room = self._room[p.device, p.dtype] = torch.empty(size, dtype=p.dtype, device=p.device)
        total, *other = room[:size].view(shape)
        total = leaf.shares[0](start, stop, total)
        for share in leaf.shares[1:]:
            total = total + share(start, stop, other[0])
        return total


def ready(stack: Tensor) -> Share:
    """The share of gradients that are computed already: (K, ...)."""
    length = stack.shape[1] if stack.dim() > 1 else 1
    entries = stack.reshape(len(stack), length, -1)
    return lambda start, stop, _: entries[:, start:stop]


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1
