"""Settings of published protocols as plain data: every value and its source are in ``presets/*.yaml``."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

PRESETS = ("paper", "domainbed")
"""``paper``: the SAGE paper's Table 1 with CLIP ViT-B/16; ``domainbed``: DomainBed's defaults with a ResNet-50."""


def preset(name: str, dataset: str) -> dict[str, Any]:
    """The settings of a published protocol for one dataset.

    Args:
        name: ``"paper"`` or ``"domainbed"``.
        dataset: Name of a dataset; one the protocol has no values of its own for gets those of the others.

    Returns:
        A new dictionary. ``model``, ``head`` and ``prompt`` are for `hf_sage.models.image_classifier`;
        ``rows_per_domain``, ``steps``, ``evaluate_every``, ``transform``, ``test_convention``, ``selection`` and
        ``seeds`` for the benchmark; all else are fields of `hf_sage.SAGEConfig`. Of these ``rho`` and ``gamma`` are
        SAGE's (``None``: the method's own default), the others every method's.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}: use one of {', '.join(map(repr, PRESETS))}.")
    text = resources.files("hf_sage.benchmark").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)
    own: dict[str, Any] = settings.pop("datasets").get(dataset, {})
    return settings | own
