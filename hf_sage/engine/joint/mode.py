"""The forward pass over all groups' rows at once, in which functions of parameters are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_sage.engine.joint.collector import Collector, GroupRows, Leaf
from hf_sage.engine.joint.losses import GroupLosses
from hf_sage.engine.joint.rules import RULES


class JointMode(TorchFunctionMode):
    """While it is entered, functions of torch called with a collector's leaves follow the rules of `rules`.

    A function without a rule runs as ever. If it was called with leaves alone, what it returns is a leaf, too; if with
    rows as well, the pass has met an obstacle: it goes on and is of no use.

    Attributes:
        collector: What it finds.
        losses: The groups' losses.
        anchor: See `layers`.
        signature: How leaves were met, one call after the other; sizes are no part of it.
    """

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self.collector = collector
        self.losses = GroupLosses(collector.rows)
        self.anchor = torch.zeros((), requires_grad=True)
        self.signature: list[tuple[Any, ...]] = []

    @property
    def rows(self) -> GroupRows:
        """The groups' rows."""
        return self.collector.rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.collector.has_any((*args, *kwargs.values())):
            if func is F.batch_norm and _argument(args, kwargs, 5, "training", False):
                self._meet("batch normalisation, which mixes the groups")
            return self.losses(func, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        shared = [t for t in tensors if t in self.collector]
        if torch.is_autocast_enabled(shared[0].device.type):
            self._meet("autocast")
        rule = RULES.get(func)
        if rule is not None:
            found = rule(self, *args, **kwargs)
            if found is not None:
                self._sign(func, shared, "rows")
                return found
        found = func(*args, **kwargs)
        made = [t for t in _tensors((found,)) if t.requires_grad and t not in self.collector]
        if made:
            if all(t in self.collector for t in tensors if t.requires_grad):
                self.collector.derive(made, shared)
                self._sign(func, shared, "shared")
            else:
                self._meet(f"{getattr(func, '__name__', func)} of parameters and rows")
        return found

    def is_rows(self, x: Tensor) -> bool:
        """Whether a tensor has rows of the batch for its first dimension."""
        return x not in self.collector and self.rows.fit(x)

    def are_shared(self, *parameters: Tensor | None) -> bool:
        """Whether these are leaves, or require no gradient."""
        return all(p is None or not p.requires_grad or p in self.collector for p in parameters)

    def use(self, p: Tensor | None) -> Leaf | None:
        """The leaf that ``p`` is, if it is one, which is about to be used."""
        if p is None or p not in self.collector:
            return None
        leaf = self.collector.leaf(p)
        leaf.uses += 1
        return leaf

    def _sign(self, func: Any, shared: list[Tensor], role: str) -> None:
        self.signature.append((func, *(self.collector.leaf(t).index for t in shared), role))

    def _meet(self, obstacle: str) -> None:
        self.collector.obstacle = self.collector.obstacle or obstacle


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)
