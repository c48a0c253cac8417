"""Methods: an ascent, a chain of corrections, an objective and a hook under a name.

A method of one's own needs no registration: build a `Method` and pass it as ``SAGEConfig(method=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hf_sage.ascents import Ascent, BiasRadius, L2Ascent, SpectralAscent
from hf_sage.corrections import AgreementNoise, Correction
from hf_sage.hooks import WeightHook
from hf_sage.objectives import FeatureObjective, Objective
from hf_sage.polar import PolarPreset
from hf_sage.rules import Need, Rule

__all__ = ["METHODS", "Method", "erm", "sage", "sam"]


@dataclass(frozen=True)
class Method:
    """A rule for one update: what is descended, where the second gradient is taken, and what is done to it.

    Attributes:
        name: What tables and logs call it.
        ascent: Rule for ε, or ``None`` for no second pass.
        corrections: Rules applied to the gradient, in order.
        objective: What is descended in place of the mean loss of the batch; ``None`` is that.
        hook: A rule that moves the weights before the update or in place of it.
        ascent_interval: The second pass is taken in every so-manieth update, beginning with the first.

    Raises:
        ValueError: If the parts do not go together.
    """

    name: str
    ascent: Ascent | None = None
    corrections: tuple[Correction, ...] = ()
    objective: Objective | None = None
    hook: WeightHook | None = None
    ascent_interval: int = 1

    def __post_init__(self) -> None:
        if self.ascent_interval < 1:
            raise ValueError(f"ascent_interval must be a whole number, 1 or more; got {self.ascent_interval}.")
        others = [rule for rule in (self.ascent, *self.corrections) if rule is not None and "groups" in rule.needs]
        if isinstance(self.objective, FeatureObjective) and others:
            raise ValueError(
                f"{type(self.objective).__name__} ties the groups' losses together, so the groups have no gradients of "
                f"their own, which {type(others[0]).__name__} needs. Combine it with rules that do not need groups."
            )

    @property
    def rules(self) -> dict[str, Rule]:
        """The rules by the name that their memories are saved under."""
        return dict(self._rules())

    def _rules(self) -> Iterator[tuple[str, Rule]]:
        for name, rule in (("objective", self.objective), ("hook", self.hook), ("ascent", self.ascent)):
            if rule is not None:
                yield name, rule
        for i, correction in enumerate(self.corrections):
            yield f"correction {i}", correction

    @property
    def needs(self) -> frozenset[Need]:
        """What the rules cannot do without."""
        return frozenset[Need]().union(*(rule.needs for rule in self.rules.values()))

    @property
    def perturbs(self) -> bool:
        """Whether second passes at θ + ε are due."""
        return self.ascent is not None and self.ascent.rho > 0

    def perturbs_in(self, number: int) -> bool:
        """Whether a second pass is due in the update of this number, counted from 0."""
        return self.perturbs and number % self.ascent_interval == 0

    @property
    def needs_groups(self) -> bool:
        """Whether the gradient or the loss of each group is needed."""
        return "groups" in self.needs

    @property
    def combines(self) -> bool:
        """Whether a correction combines the clean gradient with the perturbed one."""
        return any(not correction.after_clipping for correction in self.corrections)

    @property
    def is_plain(self) -> bool:
        """Whether the update is that of the base optimizer alone (law 1)."""
        changes = [self.objective, self.hook, *(c for c in self.corrections if not c.is_null)]
        return not self.perturbs and all(rule is None for rule in changes)

    @property
    def passes(self) -> float:
        """Forward and backward passes over the batch a step, on average; ERM's is 1."""
        own = 0.0 if self.hook is not None and self.hook.replaces_update else 1.0
        own += 1 / self.ascent_interval if self.perturbs else 0.0
        return own + sum(rule.passes for rule in self.rules.values())

    @property
    def auxiliary_passes(self) -> float:
        """Forward and backward passes over the auxiliary batch a step, on average."""
        return sum(rule.auxiliary_passes for rule in self.rules.values())


def erm() -> Method:
    """Empirical risk minimisation: the base optimizer and nothing else."""
    return Method("erm")


def sam(rho: float = 0.05) -> Method:
    """Sharpness-aware minimisation (Foret et al. 2021); ρ = 0.05 is its paper's default."""
    return Method("sam", L2Ascent(rho))


def sage(
    rho: float = 1e-6,
    gamma: float = 1e-6,
    *,
    polar: PolarPreset = "auto",
    polar_steps: int = 5,
    bias_radius: BiasRadius = "fixed",
    weight_scale: bool = True,
) -> Method:
    """SAGE (Ballas and Diou 2026): spectral ascent, and noise that grows with the groups' disagreement.

    The defaults ρ = γ = 1e-6 are the paper's for fine-tuning CLIP (Appendix E.1); smaller networks trained from scratch
    want a ρ several orders larger.
    """
    ascent = SpectralAscent(rho, polar, polar_steps, bias_radius, weight_scale)
    return Method("sage", ascent, (AgreementNoise(gamma),))


METHODS: dict[str, Callable[..., Method]] = {"sage": sage, "sam": sam, "erm": erm}
"""The methods that ``SAGEConfig(method="...")`` knows by name."""
