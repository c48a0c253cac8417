"""One update, read top to bottom like Algorithm 1 of the SAGE paper; the optimizer's own step follows it unchanged.

report = two_pass_step(model, parts, method, step=step)  # leaves the perturbed gradient in .grad
torch.nn.utils.clip_grad_norm_(...)              # if wanted
descend(model, method, report, step)             # corrections, e.g. the noise
optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from hf_sage.corrections import Correction, Descent
from hf_sage.engine.batch import Batch, FurtherPasses
from hf_sage.engine.batchnorm import frozen_running_statistics
from hf_sage.engine.distributed import Gradients, Reduction
from hf_sage.engine.features import FeatureTap
from hf_sage.engine.gradients import Backward, CleanPass, Part
from hf_sage.engine.joint import Joint
from hf_sage.engine.perturbation import perturbed
from hf_sage.engine.sharding import MeanByFSDP, check_same_passes, is_sharded, reshard, resharded
from hf_sage.methods import Method
from hf_sage.rules import Memory, Step
from hf_sage.vectors import norm, norms


@dataclass(frozen=True)
class StepReport:
    """What one step found.

    Attributes:
        loss: Clean loss, at θ.
        perturbed_loss: Loss at θ + ε, or ``None`` where nothing was perturbed.
        agreement: S, 0-dimensional fp64; NaN where the groups have no gradients of their own.
        perturbation_norm: ‖ε‖₂ over all parameters, or ``None``.
        group_losses: For each group the sum of its losses and of their weights.
        is_finite: Whether the clean gradient and its norm were finite. If not, the perturbation was left out: .grad
            holds the clean gradient as it is, for a GradScaler to see.
        facts: What the ascent and the corrections before clipping have to say for the log.
        look_back: To be called after the optimizer's step where it is not ``None``: what the ascent finds when it looks
            at the batch again at the new θ, for the log.
    """

    loss: Tensor
    perturbed_loss: Tensor | None
    agreement: Tensor
    perturbation_norm: Tensor | None
    group_losses: dict[Hashable, tuple[Tensor, float]]
    is_finite: bool
    facts: dict[str, Tensor] = field(default_factory=dict)
    look_back: Callable[[], dict[str, Tensor]] | None = None

    @classmethod
    def merge(cls, reports: Sequence[StepReport]) -> StepReport:
        """The report of a batch from those of its chunks, each with its own ε: losses add up, S and ‖ε‖ average.

        Several chunks are not looked back at.
        """
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
            facts={name: torch.stack([r.facts[name] for r in reports]).mean() for name in reports[0].facts}
            if all(r.facts.keys() == reports[0].facts.keys() for r in reports)
            else {},
            look_back=reports[0].look_back if len(reports) == 1 else None,
        )


def two_pass_step(
    model: nn.Module,
    parts: Sequence[Part],
    method: Method,
    *,
    step: Step | None = None,
    memories: dict[str, Memory] | None = None,
    backward: Backward = torch.Tensor.backward,
    groups: Sequence[Hashable] | None = None,
    reduce: Reduction | None = None,
    same_dropout: bool = False,
    inspect: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
    second_pass: Callable[[], AbstractContextManager[None]] = nullcontext,
    joint: Joint | None = None,
    auxiliary: Sequence[Part] | None = None,
    tap: FeatureTap | None = None,
) -> StepReport:
    """Computes the gradient at θ + ε and adds it to ``.grad``; θ is the same bits afterwards, also if a pass raises.

    Args:
        model: The network; its parameters that require a gradient are θ. Its mode and theirs are left alone.
        parts: The batch, in parts of one group each (of any one group where the method needs none).
        method: What is descended, the ascent, and the corrections that come before clipping; `descend` applies those
            that come after it.
        step: The number of the step, its seed, its learning rate.
        memories: What the method's rules remember from step to step, by the rules' names: pass the same dictionary in
            every step. Methods that remember nothing do without.
        backward: Backpropagates a loss into ``.grad``.
        groups: The groups present on any rank, in an order all ranks share; by default those of ``parts``.
        reduce: Averages gradients over ranks, so that ε and S are those of the whole batch, and so is the gradient
            that is left. ``None``: each rank has its own (local perturbation). Where FSDP has sharded the parameters it
            averages all gradients itself, and this is not used.
        same_dropout: Whether later passes draw the first pass's random numbers.
        inspect: Is shown θ and ε right before one is added to the other; it must change neither.
        parameters: θ, where it is more than the model's own: a loss may have parameters too.
        second_pass: Surrounds every pass but the first.
        joint: The same batch as one, its rows sorted by group: then both passes go through it at once, wherever the
            groups' gradients can be told apart within one pass, see `hf_sage.engine.joint`. Elsewhere nothing changes.
        auxiliary: The auxiliary batch, for ascents that need one.
        tap: Where features are heard, for objectives that need them; by default at a classifier with a usual name.

    Returns:
        A `StepReport`.

    Raises:
        ValueError: If there is no group, or no trainable parameter, or something the method needs is not there; under
            FSDP also if only some parameters are sharded, or if the ranks have parts of different groups.
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
    step = replace(step or Step(), facts={})
    tap = FeatureTap(model) if tap is None and "features" in method.needs else tap
    memories = {} if memories is None else memories
    batch = Batch(
        model,
        parameters,
        parts,
        groups,
        method,
        step,
        memories,
        backward,
        reduce or Reduction(),
        second_pass,
        auxiliary,
        tap,
    )

    # Phases 1 and 2: sub-objective gradients, mean gradient, agreement
    clean = batch.clean_pass(joint, record_randomness=same_dropout)
    is_finite = all_finite([g for g in clean.gradient if g is not None])
    theta = [p for p, g in zip(parameters, clean.gradient, strict=True) if g is not None]
    report = StepReport(clean.loss, None, clean.agreement, None, clean.group_losses, is_finite, step.facts)
    if not is_finite or not theta:
        _accumulate(parameters, clean.gradient)
        return report
    replay = clean.random_states or None
    batch.step = replace(step, passes=FurtherPasses(batch, theta, clean.parts, replay))
    if method.perturbs_in(step.number) and method.ascent is not None and method.ascent.looks_back(step.number):
        report = replace(report, look_back=partial(_look_back, batch, theta))

    gradient = clean.gradient
    if method.ascent is not None and method.perturbs_in(step.number):
        # Phase 3: perturbation, in full precision whatever the passes run in
        with torch.no_grad(), torch.autocast(theta[0].device.type, enabled=False):
            start = clean.gradient if clean.ascent_gradient is None else clean.ascent_gradient
            epsilon = method.ascent([p.detach() for p in theta], _present(start, clean.gradient), batch.at("ascent"))
            length = norm(epsilon)
        if inspect is not None:
            inspect(theta, epsilon)
        if not method.combines:  # their memory is the perturbed gradient's
            start.clear()
            clean.gradient.clear()

        # Phases 4, 5 and 6: ascend, perturbed pass over the same parts, restore
        with resharded(model), perturbed(theta, epsilon), frozen_running_statistics(model), second_pass():
            gradient, loss = batch.gradient(clean.parts, replay)
        report = replace(report, perturbed_loss=loss, perturbation_norm=length)

    if method.combines:
        gradient = _combine(batch, theta, gradient, clean, report)
    _accumulate(parameters, gradient)
    return report


def _combine(
    batch: Batch, theta: Sequence[Tensor], gradient: Gradients, clean: CleanPass, report: StepReport
) -> Gradients:
    """Phase 6, first half: what the corrections before clipping make of the clean and the perturbed gradient."""
    is_perturbed = report.perturbed_loss is not None
    final = _present(gradient, clean.gradient)
    if not is_perturbed:
        final = [g.clone() for g in final]
    descent = Descent(
        clean.agreement, batch.step, [p.detach() for p in theta], _present(clean.gradient, clean.gradient), is_perturbed
    )
    with torch.no_grad():
        for name, rule in batch.method.rules.items():
            if not isinstance(rule, Correction) or rule.after_clipping:
                continue
            if is_perturbed or not rule.needs_perturbation:
                report.facts.update(rule(final, replace(descent, step=batch.at(name))))
    by_parameter = {id(p): g for p, g in zip(theta, final, strict=True)}
    return [by_parameter.get(id(p)) for p in batch.parameters]


def _look_back(batch: Batch, theta: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the ascent finds once θ has moved, beside what it found before."""
    step = replace(batch.at("ascent"), facts=dict(batch.step.facts))
    assert batch.method.ascent is not None
    with torch.no_grad(), torch.autocast(theta[0].device.type, enabled=False):
        batch.method.ascent.look_back([p.detach() for p in theta], step)
    return {name: value for name, value in step.facts.items() if name not in batch.step.facts}


def descend(
    model: nn.Module,
    method: Method,
    report: StepReport,
    step: Step,
    parameters: Sequence[nn.Parameter] | None = None,
) -> dict[str, Tensor]:
    """Phase 6, second half: applies to the clipped gradient in ``.grad`` the corrections that come after clipping.

    A gradient that was not finite is left as it is.

    Args:
        model: The network.
        method: Its corrections are applied in order.
        report: What `two_pass_step` returned.
        step: The step that `two_pass_step` was given.
        parameters: As in `two_pass_step`.

    Returns:
        What the corrections have to say for the log, e.g. ``noise_scale``.
    """
    if not report.is_finite:
        return {}
    parameters = trainable(model) if parameters is None else parameters
    with_gradient = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in with_gradient if p.grad is not None]
    facts = dict(report.facts)
    with torch.no_grad():
        for correction in method.corrections:
            if correction.after_clipping:
                facts |= correction(gradients, Descent(report.agreement, step, with_gradient))
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


def _present(gradients: Gradients, like: Gradients) -> list[Tensor]:
    """The gradients of the parameters that have one in ``like``."""
    return [torch.zeros_like(g) if h is None else h for h, g in zip(gradients, like, strict=True) if g is not None]
