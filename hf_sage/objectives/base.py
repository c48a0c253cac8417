"""What every objective is: what is descended in place of the mean of the batch's losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.rules import Need, Rule, Step


class Objective(Rule):
    """A function of the groups that is descended in place of Σ_k w_k ℓ_k."""


class GroupWeights(Objective, ABC):
    """An objective of the groups' mean losses alone: its gradient is a weighted sum of theirs.

    The weights are taken from the losses of the whole batch over all ranks and micro-batches, so that the gradient is
    exact however the batch is cut.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"groups"})

    @abstractmethod
    def __call__(self, losses: Tensor, weights: Tensor, step: Step) -> Tensor:
        """The derivative of the objective by each group's mean loss.

        Args:
            losses: ℓ_k, the mean loss of each group of the batch, shape ``(K,)``, fp64.
            weights: w_k, their share of the batch, summing to one.
            step: The step. A pass at θ + ε finds the memory as the clean pass found it; what it writes is forgotten.

        Returns:
            ∂/∂ℓ_k, shape ``(K,)``; ``weights`` is the mean of the batch's losses.
        """


@dataclass
class Rows:
    """The rows of one group, over all micro-batches and ranks.

    Attributes:
        features: What goes into the classifier, of shape ``(n, d)``.
        labels: Class indices of shape ``(n,)``.
    """

    features: Tensor
    labels: Tensor


class FeatureObjective(Objective, ABC):
    """An objective of the features before the classifier, of which it sees those of the whole batch at once.

    Attributes:
        replaces_loss: Whether it stands in place of the mean loss; if not it is added to it.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "features"})
    replaces_loss: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, groups: Mapping[str, Rows], head: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """The objective, 0-dimensional, as a differentiable function of the features and of the classifier's weights.

        Args:
            groups: The rows of each group.
            head: The classifier: features of shape ``(n, d)`` to logits of shape ``(n, classes)``.
            step: The step. A pass at θ + ε finds the memory as the clean pass found it; what it writes is forgotten.
        """


def annealed(penalty: float, warmup: int, step: Step) -> float:
    """The weight of a penalty that sets in after some updates and is 1 before them, as in DomainBed."""
    return penalty if step.number >= warmup else 1.0
