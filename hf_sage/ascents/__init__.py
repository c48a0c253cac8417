"""Ascents: rules for the perturbation ε at which the second gradient is taken, one a file."""

from hf_sage.ascents.adaptive import AdaptiveAscent
from hf_sage.ascents.align import AlignAscent
from hf_sage.ascents.base import Ascent
from hf_sage.ascents.domain import DomainAscent
from hf_sage.ascents.eigen import EigenAscent
from hf_sage.ascents.friendly import FriendlyAscent
from hf_sage.ascents.frobenius import FrobeniusAscent
from hf_sage.ascents.l2 import L2Ascent
from hf_sage.ascents.layerwise import BiasRadius
from hf_sage.ascents.matching import MatchingAscent
from hf_sage.ascents.spectral import SpectralAscent
from hf_sage.ascents.variance_suppressed import VarianceSuppressedAscent

__all__ = [
    "AdaptiveAscent",
    "AlignAscent",
    "Ascent",
    "BiasRadius",
    "DomainAscent",
    "EigenAscent",
    "FriendlyAscent",
    "FrobeniusAscent",
    "L2Ascent",
    "MatchingAscent",
    "SpectralAscent",
    "VarianceSuppressedAscent",
]
