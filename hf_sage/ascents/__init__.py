"""Ascents: rules for the perturbation ε at which the second gradient is taken, one a file."""

from hf_sage.ascents.base import Ascent
from hf_sage.ascents.l2 import L2Ascent
from hf_sage.ascents.spectral import BiasRadius, SpectralAscent

__all__ = ["Ascent", "BiasRadius", "L2Ascent", "SpectralAscent"]
