"""The ascent of Align-SAM: up on the training batch, down on an auxiliary one that was drawn independently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.ascents.adaptive import AdaptiveAscent
from hf_sage.ascents.base import Ascent, check_radius
from hf_sage.ascents.l2 import L2Ascent
from hf_sage.rules import Need, Passes, Step
from hf_sage.vectors import cosine, reciprocal_or_zero


@dataclass(frozen=True)
class AlignAscent(Ascent):
    """ε = ρ(λ g_t/‖g_t‖ − g̃_a/‖g̃_a‖), g̃_a = ∇L_a(θ + ρ g_a/‖g_a‖) (Align-SAM, under review; Algorithm 1).

    The text around eq. 5 divides the second term by ‖g_a‖ too; this is Algorithm 1. ‖ε‖ is between ρ(λ − 1) and
    ρ(λ + 1). Align-ASAM is not written out in the paper: here each of the three normalised gradients is replaced by
    ASAM's T²g/‖Tg‖.

    Logged, as the paper defines them (Appendix A.3): ``cosine_before``, the cosine of ∇L_t(θ) and ∇L_a(θ̃ᵃ), in every
    update for nothing; ``cosine_after``, the same on the same two batches after the update; and ``cosine_change``,
    (after − before)/after. The latter two take a pass over the batch and two over the auxiliary one.

    Attributes:
        rho: Radius ρ ≥ 0, default 0.05 (the paper's for CIFAR-10 and fine-tuning; Align-ASAM 0.5).
        trade_off: λ > 0, default 2 (the paper's).
        eta: ASAM's η, for Align-ASAM; ``None`` is Align-SAM.
        look_back_interval: In every so-manieth update the cosine is taken again after it; 0 is never.
    """

    rho: float = 0.05
    trade_off: float = 2.0
    eta: float | None = None
    look_back_interval: int = 100
    needs: ClassVar[frozenset[Need]] = frozenset({"auxiliary"})

    def __post_init__(self) -> None:
        check_radius(self.rho)
        if not 0 < self.trade_off < math.inf:
            raise ValueError(f"trade_off must be a finite number above 0; got {self.trade_off!r}. The paper uses 2.")
        if self.look_back_interval < 0:
            raise ValueError(
                f"look_back_interval must be a whole number, 0 (never) or more; got {self.look_back_interval}."
            )
        self._base()  # refuses a bad η

    @property
    def passes(self) -> float:
        """Those of looking back."""
        return self._looks

    @property
    def auxiliary_passes(self) -> float:
        """Two, and those of looking back."""
        return 2 + 2 * self._looks

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Step | None = None
    ) -> list[Tensor]:
        """Computes ε; see `Ascent`."""
        step, base = step or Step(), self._base()
        auxiliary = self._perturbed_auxiliary(parameters, step.passes)
        step.facts["cosine_before"] = cosine(gradients, auxiliary)
        up, down = base(parameters, gradients), base(parameters, auxiliary)
        return [u.mul_(self.trade_off).sub_(d) for u, d in zip(up, down, strict=True)]

    def looks_back(self, number: int) -> bool:
        """In every so-manieth update."""
        return self.look_back_interval > 0 and number % self.look_back_interval == 0

    def look_back(self, parameters: Sequence[Tensor], step: Step) -> None:
        """Takes the cosine again."""
        auxiliary = self._perturbed_auxiliary(parameters, step.passes)
        after = cosine(step.passes.gradient_at(None), auxiliary)
        change = (after - step.facts["cosine_before"]) * reciprocal_or_zero(after.abs()) * after.sign()
        step.facts |= {"cosine_after": after, "cosine_change": change}

    @property
    def _looks(self) -> float:
        return 1 / self.look_back_interval if self.look_back_interval else 0.0

    def _base(self) -> Ascent:
        return L2Ascent(self.rho) if self.eta is None else AdaptiveAscent(self.rho, self.eta)

    def _perturbed_auxiliary(self, parameters: Sequence[Tensor], passes: Passes) -> list[Tensor]:
        """g̃_a: the auxiliary gradient at its own ascent."""
        return passes.auxiliary_gradient_at(self._base()(parameters, passes.auxiliary_gradient_at(None)))
