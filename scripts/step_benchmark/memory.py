"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak, beyond those that were there before.

    Attributes:
        total: Everything.
        outside_graph: Without the tensors that autograd saves for the backward pass; ``None`` where they cannot be
            told apart (on a GPU).
    """

    total: int
    outside_graph: int | None


def peak_of(work: Callable[[], object], device: torch.device) -> Peak:
    """Runs the work and returns its peak: that of the allocator on a GPU, that of the tensors alive on a CPU."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return Peak(torch.cuda.max_memory_allocated(device) - before, None)
    with AliveBytes() as alive, torch.autograd.graph.saved_tensors_hooks(alive.saved_by_autograd, lambda t: t):
        work()
    return Peak(alive.peak, alive.peak_outside_graph)


class AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make while they live; a storage with several views counts once.

    Attributes:
        peak: The most bytes alive at a time.
        peak_outside_graph: The same without storages that autograd has saved for the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.peak_outside_graph = 0
        self._alive = 0
        self._saved = 0
        self._bytes: dict[int, int] = {}
        self._saved_storages: set[int] = set()
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operation and watches the storages it makes; those of its inputs are known or were there before."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._watch(leaf, is_new=False)
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf, is_new=True)
        return result

    def saved_by_autograd(self, tensor: Tensor) -> Tensor:
        """Notes that a tensor is kept for the backward pass; a pack hook."""
        self._watch(tensor, is_new=False)
        key = tensor.untyped_storage()._cdata
        if key not in self._saved_storages:
            self._saved_storages.add(key)
            self._saved += self._bytes[key]
        return tensor

    def _watch(self, tensor: Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes() if is_new else 0
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._alive += self._bytes[key]
        self.peak = max(self.peak, self._alive)
        self.peak_outside_graph = max(self.peak_outside_graph, self._alive - self._saved)

    def _forget(self, key: int) -> None:
        size = self._bytes.pop(key)
        del self._watched[key]
        self._alive -= size
        if key in self._saved_storages:
            self._saved_storages.remove(key)
            self._saved -= size
