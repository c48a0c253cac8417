"""Every method by name, with hyperparameters under which a short training shows what it does."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "sage": {"rho": 0.02, "gamma": 1e-3},
    "sage_no_polar": {"rho": 0.02, "gamma": 1e-3},
    "sage_no_scale": {"rho": 0.02, "gamma": 1e-3},
    "sage_no_noise": {"rho": 0.02},
    "gga_l": {"gamma": 1e-2},
    "sgld": {"temperature": 1e-6},
    "look_sam": {"interval": 2},
    "x_sam": {"interval": 2, "alpha": 0.8},
    "eigen_sam": {"interval": 2, "alpha": 0.8},
    "align_sam": {"look_back_interval": 2},
    "align_asam": {"look_back_interval": 2},
    "irm": {"warmup": 0},
    "vrex": {"warmup": 0},
    "fishr": {"warmup": 0},
    "dann": {"width": 8, "discriminator_learning_rate": 0.01},
    "cdann": {"width": 8, "discriminator_learning_rate": 0.01},
    "gga": {"noise": 1e-3, "proposals": 3, "begin": 1, "end": 3},
}
"""Radii and noise that a test sees in the weights, intervals that end within it; for the others their defaults."""


def options(name: str, **more: Any) -> dict[str, Any]:
    return {"method": name, "method_options": OPTIONS.get(name, {}) | more}
