"""Whether ε survives the precision in which the passes read the weights, and passes that read them in fp32.

A matrix product in bf16 sees bf16(θ + ε) − bf16(θ) where ε was meant. Once ε is much smaller than the distance between
neighbouring numbers of that type, what is left is rounding: a few entries that jump by the whole distance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sage.engine.batchnorm import frozen_running_statistics
from hf_sage.engine.gradients import Backward, Part, gradient_of
from hf_sage.engine.randomness import RandomState
from hf_sage.engine.step import all_finite, trainable

Precision: TypeAlias = torch.dtype | Literal["tf32"]
"""The type in which a weight is read; ``"tf32"`` is fp32 with 10 bits of mantissa, as tensor cores read it."""

HALF = (torch.bfloat16, torch.float16)
"""The types of less than fp32 that weights are kept in."""

SAMPLE = 2**18
"""Entries to look at: a share of 2% is then known to 0.03%, and the cost does not grow with the model."""


@dataclass(frozen=True)
class Realised:
    """What is left of ε after the cast.

    Attributes:
        survival: The share of the entries with ε ≠ 0 for which cast(θ + ε) ≠ cast(θ); 1 where ε is zero everywhere.
        fidelity: The cosine between cast(θ + ε) − cast(θ) and ε. It weighs an entry by its size, which the share does
            not: 1 is the ε that was wanted, 0.7 as much rounding as ε, 0 nothing of it. 1 where ε is zero everywhere.
    """

    survival: float
    fidelity: float


def perturbation_survival(parameters: Sequence[Tensor], epsilon: Sequence[Tensor], dtype: Precision) -> float:
    """The share of the perturbed entries that are another number after the cast to ``dtype``; see `Realised`."""
    return realised_perturbation(parameters, epsilon, [dtype] * len(parameters)).survival


def realised_perturbation(
    parameters: Sequence[Tensor], epsilon: Sequence[Tensor], precisions: Sequence[Precision], scale: float = 1.0
) -> Realised:
    """Measures what forward passes in some precision see of ε, on about `SAMPLE` entries spread evenly.

    Args:
        parameters: θ. Its sum with ε is stored in its own type before it is read, as the step does it.
        epsilon: ε, a tensor of the same shape for each.
        precisions: The precision each parameter is read in.
        scale: Multiplies ε, to learn what another radius would leave.

    Returns:
        What is left of ε, over all tensors together.
    """
    # An odd stride walks through all columns of a matrix whose width is a power of two.
    stride = sum(p.numel() for p in parameters) // SAMPLE | 1
    alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for p, e, precision in zip(parameters, epsilon, precisions, strict=True):
        alike[p.device, p.dtype, precision].append((_own(p).reshape(-1)[::stride], _own(e).reshape(-1)[::stride]))
    sums = torch.zeros(5, dtype=torch.float64)
    for (_, dtype, precision), pairs in alike.items():
        theta, wanted = (torch.cat(column).cpu() for column in zip(*pairs, strict=True))
        wanted = wanted * scale
        moved = (theta + wanted).to(dtype)
        found, wanted = _read(moved, precision).double() - _read(theta, precision).double(), wanted.double()
        survived = ((found != 0) & (wanted != 0)).double()
        perturbed = (wanted != 0).double()
        sums += torch.stack([x.sum() for x in (survived, perturbed, found * wanted, found**2, wanted**2)])
    survivors, perturbed_entries, product, square, wanted_square = sums.tolist()
    if not perturbed_entries:
        return Realised(1.0, 1.0)
    cosine = product / (square * wanted_square) ** 0.5 if square else 0.0
    return Realised(survivors / perturbed_entries, min(cosine, 1.0))


def read_precision(parameter: Tensor, autocast: torch.dtype | None = None) -> Precision:
    """The precision in which a forward pass reads a parameter.

    Args:
        parameter: The parameter.
        autocast: The type that automatic mixed precision casts to, if it is on. Everything is taken to be cast;
            normalisation layers, a thousandth of the entries, in truth are not.
    """
    if autocast is not None and parameter.dtype != torch.float64:
        return autocast
    if parameter.is_cuda and parameter.dtype == torch.float32 and parameter.dim() >= 2:
        matmul, *convolution = _tf32_switches()
        if (matmul if parameter.dim() == 2 else convolution[0]).is_on():
            return "tf32"
    return parameter.dtype


@contextmanager
def full_precision(model: nn.Module, device_type: str) -> Iterator[None]:
    """Passes of ``model`` read its weights in fp32: no autocast around them, no TF32.

    accelerate casts inside the forward pass, where no context from outside reaches; the forward that it keeps as
    ``_original_forward`` takes the place of its own for the length of the block.

    Raises:
        ValueError: If a trainable weight is kept in less than fp32: its sum with ε is rounded before any pass reads it.
    """
    if low := {str(p.dtype) for p in trainable(model) if p.dtype in HALF}:
        raise ValueError(
            f"Passes in fp32 cannot help weights that are {' and '.join(sorted(low))} themselves: θ + ε is rounded as "
            "it is stored. Load the model in fp32 (dtype=torch.float32); with bf16=True or fp16=True evaluation still "
            "runs in that. Or leave full_precision_passes out and raise rho."
        )
    casting, plain = model.forward, vars(model).get("_original_forward")
    switches = [switch for switch in _tf32_switches() if switch.is_on()]
    try:
        if plain is not None:
            model.forward = plain
        for switch in switches:
            switch.set(on=False)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if plain is not None:
            model.forward = casting
        for switch in switches:
            switch.set(on=True)


def groups_at_fault(model: nn.Module, parts: Sequence[Part], backward: Backward) -> list[Hashable]:
    """The groups whose loss or gradient is not finite.

    Each is gone through once more, because the step has only the sum of their gradients left.

    Args:
        model: The network; it, ``.grad`` and the random generators are left as they were.
        parts: The batch, in parts of one group each. The group ``None`` is none.
        backward: Backpropagates a loss into ``.grad``.
    """
    state, found = RandomState.capture(), []
    with frozen_running_statistics(model):
        for group in dict.fromkeys(part.group for part in parts if part.group is not None):
            gradient, loss = gradient_of(trainable(model), [p for p in parts if p.group == group], backward)
            if not all_finite([loss, *(_own(g) for g in gradient if g is not None)]):
                found.append(group)
    state.restore()
    return found


@dataclass(frozen=True)
class _Switch:
    """One of torch's switches for TF32."""

    backend: Any

    def is_on(self) -> bool:
        return bool(self.backend.fp32_precision == "tf32")

    def set(self, *, on: bool) -> None:
        self.backend.fp32_precision = "tf32" if on else "ieee"


def _tf32_switches() -> list[_Switch]:
    """The switches for matrix products, convolutions and the rest; CUDA rounds convolutions unless told otherwise."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    return [_Switch(backend) for backend in (cuda.matmul, cudnn.conv, cudnn.rnn)]


def _own(t: Tensor) -> Tensor:
    """What this rank holds of a tensor: under FSDP a shard, which no other rank is asked for here."""
    return (t.to_local() if isinstance(t, DTensor) else t).detach()


def _read(x: Tensor, precision: Precision) -> Tensor:
    if isinstance(precision, torch.dtype):
        return x.to(precision)
    # To the nearest number with 10 bits of mantissa: half of the last bit that stays is added, the 13 lower are cut.
    return ((x.float().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
