"""Corrections: what is done to the perturbed gradient before the optimizer sees it, one rule a file."""

from hf_sage.corrections.base import Correction, Descent
from hf_sage.corrections.eigenvector import EigenvectorCorrection
from hf_sage.corrections.gradient_norm import GradientNorm
from hf_sage.corrections.langevin import LangevinNoise
from hf_sage.corrections.look_sam import ReusedDirection
from hf_sage.corrections.mean import MeanOfGradients
from hf_sage.corrections.noise import AgreementNoise
from hf_sage.corrections.surrogate_gap import SurrogateGap

__all__ = [
    "AgreementNoise",
    "Correction",
    "Descent",
    "EigenvectorCorrection",
    "GradientNorm",
    "LangevinNoise",
    "MeanOfGradients",
    "ReusedDirection",
    "SurrogateGap",
]
