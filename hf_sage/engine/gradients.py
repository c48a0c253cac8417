"""Group gradients by one forward and backward pass over the rows of each group.

K passes over B/K rows cost what one pass over B rows costs, and their sum *is* the gradient of the batch: no extra pass
is needed for the mean. The price is one copy of the gradient a group while S is computed, shared among the ranks if
there are several. A network that mixes the rows of a batch (BatchNorm) sees each group by itself; both passes of the
step do, so that they differ by ε alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sage.agreement import gradient_agreement
from hf_sage.engine.distributed import Gradients, Reduction
from hf_sage.engine.randomness import RandomState

Backward = Callable[[Tensor], None]
Weigh = Callable[[Tensor, Tensor], Tensor]
"""The weights of the groups' gradients from their mean losses and their shares of the batch, each of shape (K,)."""


@dataclass(frozen=True)
class Part:
    """Rows of one group in one micro-batch.

    Attributes:
        group: The group's name; any value that can be a dictionary key.
        weight: The rows' share of the whole batch, over all micro-batches and ranks: the weights of a step sum to one
            (to the number of ranks on each, on average, where gradients are averaged over ranks).
        loss: Computes the rows' share of the batch's loss, ``weight`` × their mean loss. It is called once in each
            pass and must not change its inputs.
        labels: The rows' class indices, for objectives of the features before the classifier.
    """

    group: Hashable
    weight: float
    loss: Callable[[], Tensor]
    labels: Tensor | None = None


@dataclass
class CleanPass:
    """What the first pass found at θ.

    Attributes:
        loss: The batch's loss, detached.
        gradient: ḡ = Σ_k w_k g_k for each parameter; ``None`` where no group has a gradient.
        agreement: S over the groups, 1 for one group, NaN where they have no gradients of their own.
        group_losses: For each group the sum of its parts' losses and the sum of their weights.
        parts: What a second pass over the same rows goes through.
        random_states: The state of the random generators before each part, if they were asked for.
        ascent_gradient: What the ascent starts from, where that is not ``gradient``.
    """

    loss: Tensor
    gradient: Gradients
    agreement: Tensor
    group_losses: dict[Hashable, tuple[Tensor, float]]
    parts: Sequence[Part]
    random_states: list[RandomState]
    ascent_gradient: Gradients | None = None


def gradient_of(
    parameters: Sequence[Tensor],
    parts: Iterable[Part],
    backward: Backward,
    replay: Sequence[RandomState] | None = None,
    record: list[RandomState] | None = None,
) -> tuple[Gradients, Tensor]:
    """The gradient and the value of the parts' summed loss.

    Args:
        parameters: The parameters; their ``.grad`` is left as it was.
        parts: What to sum over.
        backward: Backpropagates a loss into ``.grad``, e.g. ``torch.Tensor.backward`` or ``accelerator.backward``.
        replay: States of the random generators to start each part from.
        record: A list that takes the states each part started from.

    Returns:
        The gradients, ``None`` where a parameter has none, and the detached loss, 0 for no parts.
    """
    kept = [p.grad for p in parameters]
    total = torch.zeros((), device=parameters[0].device)
    for p in parameters:
        p.grad = None
    try:
        for i, part in enumerate(parts):
            if replay is not None:
                replay[i].restore()
            if record is not None:
                record.append(RandomState.capture())
            loss = part.loss()
            backward(loss)
            total = total + loss.detach()
        return [p.grad for p in parameters], total
    finally:
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient


def clean_pass(
    parameters: Sequence[Tensor],
    parts: Sequence[Part],
    backward: Backward,
    *,
    groups: Sequence[Hashable] | None = None,
    reduce: Reduction | None = None,
    record_randomness: bool = False,
    weigh: Weigh | None = None,
    weigh_ascent: Weigh | None = None,
    replay: Sequence[RandomState] | None = None,
    see_gram: Callable[[Tensor], object] | None = None,
) -> CleanPass:
    """Phases 1 and 2 of Algorithm 1: group gradients, mean gradient and agreement at θ.

    Args:
        parameters: The trainable parameters.
        parts: The batch, in parts of one group each.
        backward: See `gradient_of`.
        groups: The groups present in the batch on any rank, in the order that all ranks go through them; by default
            those of ``parts``.
        reduce: What to make of the ranks' gradients; by default each rank keeps its own.
        record_randomness: Whether to keep the random states, for a second pass with the same dropout masks.
        weigh: Weights of the groups' gradients in the gradient; by default their shares of the batch.
        weigh_ascent: The same in the gradient that the ascent starts from.
        replay: See `gradient_of`.
        see_gram: Is shown the Gram matrix of the groups' w_k g_k, where there are several.

    Returns:
        The `CleanPass`; the memory of all group gradients but the mean's is free again.
    """
    if groups is None:
        groups = list(dict.fromkeys(part.group for part in parts))
    reduce = reduce or Reduction()
    record: list[RandomState] | None = [] if record_randomness else None
    keep = reduce.scatter if len(groups) > 1 else reduce  # one group is the mean already, and is compared to none
    pieces: list[Gradients] = []
    losses: dict[Hashable, tuple[Tensor, float]] = {}
    parts = [part for group in groups for part in parts if part.group == group]
    states = list(replay or [])
    for group in groups:
        own = [part for part in parts if part.group == group]
        own_states, states = states[: len(own)], states[len(own) :]
        gradient, loss = gradient_of(parameters, own, backward, replay=own_states or None, record=record)
        pieces.append(keep(gradient, parameters))
        gradient.clear()  # the pieces may be less
        losses[group] = (loss, sum(part.weight for part in own))
    total = torch.stack([loss for loss, _ in losses.values()]).sum()
    if len(groups) == 1:
        return CleanPass(total, pieces[0], torch.ones_like(total, dtype=torch.float64), losses, parts, record or [])
    # S is made of cosines: w_k g_k serves as well as g_k.
    gram = reduce.gram(pieces)
    if see_gram is not None:
        see_gram(gram)
    agreement = gradient_agreement(gram)
    ascent_gradient = None
    if weigh_ascent is not None:
        scales = _scales(losses, reduce, weigh_ascent)
        copies = [[g if g is None else g * scale for g in piece] for piece, scale in zip(pieces, scales, strict=True)]
        ascent_gradient = reduce.gather(_sum(copies), parameters)
    if weigh is not None:
        for piece, scale in zip(pieces, _scales(losses, reduce, weigh), strict=True):
            for g in piece:
                if g is not None:
                    g.mul_(scale)
    gradient = reduce.gather(_sum(pieces), parameters)
    return CleanPass(total, gradient, agreement, losses, parts, record or [], ascent_gradient)


def _scales(losses: Mapping[Hashable, tuple[Tensor, float]], reduce: Reduction, weigh: Weigh) -> list[float]:
    """What each w_k g_k is to be multiplied by for weights other than w_k."""
    own = torch.stack([torch.stack([loss.double(), loss.new_tensor(w).double()]) for loss, w in losses.values()])
    total, weight = reduce.total(own).unbind(1)
    shares = weight / weight.sum()
    return (weigh(total / weight, shares) / shares).nan_to_num(0.0).tolist()


def _sum(gradients: list[Gradients]) -> Gradients:
    """Σ_k over groups, in the memory of the first that has a gradient."""
    mean = gradients[0]
    for other in gradients[1:]:
        for i, g in enumerate(other):
            if g is not None:
                held = mean[i]
                mean[i] = g if held is None else held.add_(g)
        other.clear()
    return mean
