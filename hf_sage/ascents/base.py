"""What every ascent is: a rule that turns parameters and their mean gradient into a perturbation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hf_sage.rules import Rule, Step


class Ascent(Rule, ABC):
    """A rule for the perturbation ε of the ascent step."""

    rho: float
    """Perturbation radius ρ ≥ 0. At ρ = 0 the rule perturbs nothing, and the second pass is left out."""

    @abstractmethod
    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε.

        Args:
            parameters: The parameters θ.
            gradients: The mean gradient ḡ, a tensor of the same shape for each parameter. Its scale must not matter,
                or be divided by ``step.gradient_scale``.
                Under FSDP both are DTensors, which stand for whole tensors in elementwise rules, sums and `norms`; a
                rule that mixes the entries of one needs it `whole`, and returns its `like_shard`.
            step: The step, for rules that have a memory or take further passes.

        Returns:
            ε, a tensor for each parameter, in fp32 where the parameter has less, and in memory of its own: the step
            keeps the parameters in it while they are perturbed.
        """

    def group_weights(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The weights of the groups' gradients in the gradient that ε is computed from.

        Args:
            losses: The mean loss of each group, shape ``(K,)``, fp64.
            weights: Their share of the batch, w_k, summing to one.

        Returns:
            By default ``weights``: ε is computed from the gradient of the batch.
        """
        return weights

    def looks_back(self, number: int) -> bool:
        """Whether the rule wants to see the batch again after the update of this number has moved θ."""
        return False

    def look_back(self, parameters: Sequence[Tensor], step: Step) -> None:
        """Called where `looks_back` says so, after the optimizer's step.

        Args:
            parameters: The parameters, moved.
            step: The step, with the same batch's passes at the new θ, and with the facts of the update to add to.
        """


def check_radius(rho: float) -> None:
    """Raises a ValueError unless ρ is a finite number, 0 or more."""
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number, 0 or more; got {rho!r}. 0 switches the perturbation off.")
