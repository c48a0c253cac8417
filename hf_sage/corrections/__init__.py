"""Corrections: what is done to the perturbed gradient before the optimizer sees it, one rule a file."""

from hf_sage.corrections.base import Correction, Descent
from hf_sage.corrections.noise import AgreementNoise

__all__ = ["AgreementNoise", "Correction", "Descent"]
