"""The gradients of groups as one backward pass finds them: a layer at a time, and of each layer a few rows at a time.

Of K gradients only their sum and their inner products are wanted. A layer's K gradients are therefore never kept: some
of their rows are computed for all groups, go into the K × K Gram matrix and into the sum, and make room for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_sage.engine.distributed import Gradients

Share = Callable[[int, int], Tensor]
"""Gives entries ``start`` to ``stop`` of a tensor's first dimension, of its gradient for each group: (K, stop − start, ...)"""

CHUNK = {"cpu": 2**20}
"""Entries that are computed at a time, over all groups: few enough for a processor's cache, enough for long products."""
CHUNK_ELSEWHERE = 2**24


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
        gram: Inner products of the groups' gradients, (K, K) in fp64.
        gradients: The sum over groups for each parameter, ``None`` where there was none.
        sketch: With probes, the inner product of each group's gradient of each parameter with the parameter's probe.
        obstacle: Why what was collected is not to be used, if so.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rows: GroupRows, probe: Callable[[int, Tensor], Tensor] | None = None
    ) -> None:
        self.rows = rows
        k = len(rows.sizes)
        self.gram = torch.zeros(k, k, dtype=torch.float64, device=parameters[0].device)
        self.gradients: Gradients = [None] * len(parameters)
        self.sketch: dict[int, Tensor] = {}
        self.obstacle: str | None = None
        self._probe = probe
        self._leaves = {id(p): Leaf(p, i) for i, p in enumerate(parameters)}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._leaves

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
        if leaf.uses == 0:
            self.obstacle = "a part of the network ran again in the backward pass"
        leaf.uses -= 1
        leaf.shares.append(share)
        if leaf.uses == 0 and leaf.index is not None and not leaf.waits:
            self._take(leaf)

    def finish(self) -> None:
        """Completes what was left for the end: leaves made of others, and uses that the loss did not depend on."""
        derived = [leaf for leaf in self._leaves.values() if leaf.index is None and leaf.shares]
        if derived:
            self._differentiate(derived)
        for leaf in self._leaves.values():
            if leaf.shares:
                self._take(leaf)

    def _differentiate(self, derived: list[Leaf]) -> None:
        """From leaves made of parameters to the parameters: once for each group."""
        stacks = [_sum_of(leaf.shares, 0, _length(leaf.tensor)).unbind(0) for leaf in derived]
        for leaf in derived:
            leaf.shares.clear()
        sources = [leaf for leaf in self._leaves.values() if leaf.index is not None and leaf.waits]
        roots, inputs = [leaf.tensor for leaf in derived], [leaf.tensor for leaf in sources]
        found = [
            torch.autograd.grad(
                roots,
                inputs,
                [g.view_as(root).to(root.dtype) for g, root in zip(own, roots, strict=True)],
                retain_graph=True,
                allow_unused=True,
            )
            for own in zip(*stacks, strict=True)
        ]
        for leaf, column in zip(sources, zip(*found, strict=True), strict=True):
            if column[0] is not None:
                leaf.shares.append(ready(torch.stack([g.reshape(leaf.tensor.shape) for g in column])))

    def _take(self, leaf: Leaf) -> None:
        """Sum and inner products of the gradients of a leaf all of whose uses have come by."""
        p, index, shares = leaf.tensor, leaf.index, leaf.shares
        leaf.shares = []
        length = _length(p)
        if index is None or p.numel() == 0:
            return
        gradient = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        flat = gradient.view(length, -1)
        probe = self._probe(index, p).view(length, -1) if self._probe is not None else None
        width = flat.shape[1] * len(self.rows.sizes)
        step = max(1, CHUNK.get(p.device.type, CHUNK_ELSEWHERE) // width)
        gram = torch.zeros(self.gram.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for start in range(0, length, step):
            stop = min(start + step, length)
            stack = _sum_of(shares, start, stop).to(gram.dtype).reshape(len(self.rows.sizes), -1)
            gram += stack @ stack.mT
            flat[start:stop] = stack.sum(0).view(stop - start, -1)
            if probe is not None:
                found = stack.double() @ probe[start:stop].reshape(-1)
                self.sketch[index] = self.sketch.get(index, 0) + found
        self.gram += gram.to(self.gram)
        self.gradients[index] = gradient


def ready(stack: Tensor) -> Share:
    """The share of gradients that are computed already: (K, ...)."""
    stack = stack.reshape(len(stack), -1, *stack.shape[2:])
    return lambda start, stop: stack[:, start:stop]


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def _sum_of(shares: list[Share], start: int, stop: int) -> Tensor:
    total = shares[0](start, stop)
    for share in shares[1:]:
        total = total + share(start, stop)
    return total
