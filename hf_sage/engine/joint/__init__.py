"""The clean pass over all groups at once, at the cost of an ordinary one; see `joint_clean_pass`.

One forward pass over the batch, its rows sorted by group, and one backward pass. The gradient of a weight is a product
over rows, dYᵀX, so that those of the groups are products over the groups' rows and cost together what the whole one
costs. The functions by which parameters meet rows are known by rule; where a network has others, or lets the groups'
rows influence one another, there is one pass a group instead, as in `hf_sage.engine.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from hf_sage.agreement import gradient_agreement
from hf_sage.engine.gradients import Backward, CleanPass, Part
from hf_sage.engine.joint.trial import Joint, Verdict, run, tried

__all__ = ["Joint", "Verdict", "joint_clean_pass"]


def joint_clean_pass(
    model: nn.Module,
    parameters: Sequence[Tensor],
    parts: Sequence[Part],
    joint: Joint,
    backward: Backward,
    record_randomness: bool = False,
    unnoticed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> CleanPass | None:
    """Phases 1 and 2 of Algorithm 1 in one forward and backward pass, or ``None`` where that is not the same.

    In memory it takes what such a pass takes, however many groups there are. The first time, the trial takes twice the
    pass's time again, and one copy of the parameters more.

    Args:
        model: The network.
        parameters: The trainable parameters.
        parts: The batch, in parts of one group each; they decide whether the joint pass is right.
        joint: The same batch as one.
        backward: See `gradient_of`.
        record_randomness: See `clean_pass`.
        unnoticed: Surrounds passes that nobody is to notice.

    Returns:
        The `CleanPass`, or ``None`` with everything as it was but for what ``joint.verdict`` remembers.
    """
    verdict = joint.verdict
    if verdict.obstacle is None and not verdict.proven:
        tried(model, parameters, parts, joint, backward, unnoticed)
    if verdict.obstacle is not None or not verdict.proven:
        return None
    buffers = [b for m in model.modules() if m.training for b in m.buffers(recurse=False)]
    before = [b.clone() for b in buffers]
    found = run(parameters, joint, backward)
    if found.obstacle is None and found.signature not in verdict.proven:
        tried(model, parameters, parts, joint, backward, unnoticed)
        if found.signature not in verdict.proven:
            verdict.obstacle = verdict.obstacle or "parameters that are used otherwise in some steps than in others"
    verdict.obstacle = verdict.obstacle or found.obstacle
    if verdict.obstacle is not None:
        found.random_states[0].restore()
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return None
    assert found.shares is not None
    losses: dict[Hashable, tuple[Tensor, float]] = {
        group: (share, sum(part.weight for part in parts if part.group == group))
        for (group, _), share in zip(joint.rows, found.shares, strict=True)
    }
    return CleanPass(
        found.loss,
        found.collector.gradients,
        gradient_agreement(found.collector.gram),
        losses,
        [Part(None, 1.0, joint.loss)],
        found.random_states if record_randomness else [],
    )
