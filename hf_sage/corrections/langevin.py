"""The noise of stochastic gradient Langevin dynamics: isotropic and of constant temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sage.corrections.base import Correction, Descent
from hf_sage.corrections.noise import add_noise


@dataclass(frozen=True)
class LangevinNoise(Correction):
    """g ← g + √(2T/η) ξ with ξ ~ N(0, I) and η the learning rate (Welling and Teh 2011, eq. 4; SGLD).

    Under SGD the update is θ ← θ − ηg + √(2ηT) ξ, which samples from exp(−ℓ/T); under other optimizers it is noise of
    constant size. It is added after clipping. Nothing is added while η is zero.

    Attributes:
        temperature: T ≥ 0 in units of the loss, default 1e-12. T = 1/rows samples from the posterior, with noise far
            larger than fine-tuning stands. No source gives a value for it: 1e-12 adds 2e-4 to each entry at a learning
            rate of 5e-5, the size of the entries of a gradient of norm 2 in 10⁸ parameters.
    """

    temperature: float = 1e-12
    after_clipping: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number, 0 or more; got {self.temperature!r}.")

    @property
    def is_null(self) -> bool:
        """Whether the temperature is zero."""
        return self.temperature == 0

    def __call__(self, gradients: Sequence[Tensor], descent: Descent) -> dict[str, Tensor]:
        """Adds the noise in place; see `Correction`."""
        rate = descent.step.learning_rate
        if rate > 0 and not self.is_null:
            add_noise(gradients, math.sqrt(2 * self.temperature / rate), descent.step.seed)
        return {}
