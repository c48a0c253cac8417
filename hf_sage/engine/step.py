"""One update, read top to bottom like Algorithm 1 of the SAGE paper; the optimizer's own step follows it unchanged.

report = two_pass_step(model, parts, method)     # leaves the perturbed gradient in .grad
torch.nn.utils.clip_grad_norm_(...)              # if wanted
descend(model, method, report, seed)  # corrections, e.g. the noise
optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sage.ascents.base import norms
from hf_sage.corrections import Descent
from hf_sage.engine.batchnorm import frozen_running_statistics
from hf_sage.engine.distributed import Gradients, Reduction
from hf_sage.engine.gradients import Backward, Part, clean_pass, gradient_of
from hf_sage.engine.joint import Joint, joint_clean_pass
from hf_sage.engine.perturbation import perturbed
from hf_sage.engine.sharding import MeanByFSDP, check_same_passes, is_sharded, reshard, resharded
from hf_sage.methods import Method


@dataclass(frozen=True)
class StepReport:
    """What one step found.

    Attributes:
        loss: Clean loss, at θ.
        perturbed_loss: Loss at θ + ε, or ``None`` where nothing was perturbed.
        agreement: S, 0-dimensional fp64.
        perturbation_norm: ‖ε‖₂ over all parameters, or ``None``.
        group_losses: For each group the sum of its losses and of their weights.
        is_finite: Whether the clean gradient and its norm were finite. If not, the perturbation was left out: .grad
            holds the clean gradient as it is, for a GradScaler to see.
    """

    loss: Tensor
    perturbed_loss: Tensor | None
    agreement: Tensor
    perturbation_norm: Tensor | None
    group_losses: dict[Hashable, tuple[Tensor, float]]
    is_finite: bool

    @classmethod
    def merge(cls, reports: Sequence[StepReport]) -> StepReport:
        """The report of a batch from those of its chunks, each with its own ε: losses add up, S and ‖ε‖ average."""
        losses: dict[Hashable, tuple[Tensor, float]] = {}
        for report in reports:
            for group, (loss, weight) in report.group_losses.items():
                before, weight_before = losses.get(group, (torch.zeros_like(loss), 0.0))
                losses[group] = (before + loss, weight_before + weight)
        norms_found = [r.perturbation_norm for r in reports if r.perturbation_norm is not None]
        perturbed_losses = [r.perturbed_loss for r in reports if r.perturbed_loss is not None]
        complete = len(perturbed_losses) == len(reports)
        return cls(
            loss=torch.stack([r.loss for r in reports]).sum(),
            perturbed_loss=torch.stack(perturbed_losses).sum() if complete else None,
            agreement=torch.stack([r.agreement for r in reports]).mean(),
            perturbation_norm=torch.stack(norms_found).mean() if complete else None,
            group_losses=losses,
            is_finite=all(r.is_finite for r in reports),
        )


def two_pass_step(
    model: nn.Module,
    parts: Sequence[Part],
    method: Method,
    *,
    backward: Backward = torch.Tensor.backward,
    groups: Sequence[Hashable] | None = None,
    reduce: Reduction | None = None,
    same_dropout: bool = False,
    inspect: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
    second_pass: Callable[[], AbstractContextManager[None]] = nullcontext,
    joint: Joint | None = None,
) -> StepReport:
    """Computes the gradient at θ + ε and adds it to ``.grad``; θ is the same bits afterwards, also if a pass raises.

    Args:
        model: The network; its parameters that require a gradient are θ. Its mode and theirs are left alone.
        parts: The batch, in parts of one group each (of any one group where the method needs none).
        method: The ascent; its corrections are applied by `descend`.
        backward: Backpropagates a loss into ``.grad``.
        groups: The groups present on any rank, in an order all ranks share; by default those of ``parts``.
        reduce: Averages the clean gradients over ranks, so that ε and S are those of the whole batch. ``None``: each
            rank has its own (local perturbation). The perturbed gradient is the caller's to reduce. Where FSDP has
            sharded the parameters it averages all gradients itself, and this is not used.
        same_dropout: Whether the second pass draws the first pass's random numbers.
        parameters: θ, where it is more than the model's own: a loss may have parameters too.
        second_pass: Surrounds the second pass.
        joint: The same batch as one, its rows sorted by group: then both passes go through it at once, wherever the
            groups' gradients can be told apart within one pass, see `hf_sage.engine.joint`. Elsewhere nothing changes.
        inspect: Is shown θ and ε right before one is added to the other; it must change neither.

    Returns:
        A `StepReport`.

    Raises:
        ValueError: If there is no group, or no trainable parameter; under FSDP also if only some parameters are
            sharded, or if the ranks have parts of different groups.
    """
    reshard(model)
    parameters = trainable(model) if parameters is None else list(parameters)
    if not (parts or groups) or not parameters:
        raise ValueError("A step needs at least one part of a batch and one parameter that requires a gradient.")
    groups = list(dict.fromkeys(part.group for part in parts)) if groups is None else groups
    if strangers := {part.group for part in parts} - set(groups):
        raise ValueError(
            f"Parts of the groups {strangers} are in the batch, but not in groups={list(groups)}. Add them."
        )
    parts = _in_order(parts, groups)
    if is_sharded(parameters):
        check_same_passes([part.group for part in parts])
        reduce = MeanByFSDP()

    # Phases 1 and 2: sub-objective gradients, mean gradient, agreement
    clean = None
    if joint is not None and len(groups) > 1:
        clean = joint_clean_pass(model, parameters, parts, joint, backward, same_dropout, second_pass)
    if clean is None:
        clean = clean_pass(parameters, parts, backward, groups=groups, reduce=reduce, record_randomness=same_dropout)
    is_finite = all_finite([g for g in clean.gradient if g is not None])
    theta = [p for p, g in zip(parameters, clean.gradient, strict=True) if g is not None]
    if not is_finite or method.ascent is None or not method.perturbs or not theta:
        _accumulate(parameters, clean.gradient)
        return StepReport(clean.loss, None, clean.agreement, None, clean.group_losses, is_finite)

    # Phase 3: perturbation, in full precision whatever the passes run in
    with torch.no_grad(), torch.autocast(theta[0].device.type, enabled=False):
        epsilon = method.ascent([p.detach() for p in theta], [g for g in clean.gradient if g is not None])
        norm = torch.linalg.vector_norm(norms(epsilon))
    if inspect is not None:
        inspect(theta, epsilon)
    clean.gradient.clear()  # its memory is the perturbed gradient's

    # Phases 4, 5 and 6: ascend, perturbed pass over the same parts, restore
    with resharded(model), perturbed(theta, epsilon), frozen_running_statistics(model), second_pass():
        gradient, loss = gradient_of(parameters, clean.parts, backward, replay=clean.random_states or None)
    _accumulate(parameters, gradient)
    return StepReport(clean.loss, loss, clean.agreement, norm, clean.group_losses, is_finite)


def descend(
    model: nn.Module,
    method: Method,
    report: StepReport,
    seed: int,
    parameters: Sequence[nn.Parameter] | None = None,
) -> dict[str, Tensor]:
    """Phase 6, second half: applies the method's corrections to the clipped gradient in ``.grad``.

    A gradient that was not finite is left as it is.

    Args:
        model: The network.
        method: Its corrections are applied in order.
        report: What `two_pass_step` returned.
        seed: Seed of this step's random numbers, see `hf_sage.engine.step_seed`.
        parameters: As in `two_pass_step`.

    Returns:
        What the corrections have to say for the log, e.g. ``noise_scale``.
    """
    if not report.is_finite:
        return {}
    parameters = trainable(model) if parameters is None else parameters
    gradients = [p.grad for p in parameters if p.grad is not None]
    facts: dict[str, Tensor] = {}
    with torch.no_grad():
        for correction in method.corrections:
            facts |= correction(gradients, Descent(report.agreement, seed))
    return facts


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, shared ones once."""
    return [p for p in model.parameters() if p.requires_grad]


def _in_order(parts: Sequence[Part], groups: Iterable[Hashable]) -> list[Part]:
    """The parts group by group, as both passes go through them."""
    return [part for group in groups for part in parts if part.group == group]


def _accumulate(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    """Adds to ``.grad`` as a backward pass would."""
    for p, g in zip(parameters, gradients, strict=True):
        if g is not None:
            p.grad = g if p.grad is None else p.grad.add_(g)


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether the norm of every tensor is finite; one synchronisation in all."""
    return not gradients or bool(torch.isfinite(norms(gradients)).all())
