"""The domain-generalisation objectives, each with DomainBed's defaults."""

from __future__ import annotations

from hf_sage.hooks import GGA, Fish
from hf_sage.methods.base import Method
from hf_sage.objectives import CORAL, DANN, IRM, MMD, RSC, Fishr, GroupDRO, VREx


def irm(penalty: float = 100.0, warmup: int = 500) -> Method:
    """One classifier is to be optimal in every group (Arjovsky et al. 2019, arXiv 1907.02893)."""
    return Method("irm", objective=IRM(penalty, warmup))


def vrex(penalty: float = 10.0, warmup: int = 500) -> Method:
    """The groups' losses are to be equal, not only low on average (Krueger et al. 2021, arXiv 2003.00688)."""
    return Method("vrex", objective=VREx(penalty, warmup))


def fishr(penalty: float = 1000.0, warmup: int = 1500, ema: float = 0.95) -> Method:
    """The classifier's gradients are to vary alike in every group (Rame et al. 2022, arXiv 2109.02934)."""
    return Method("fishr", objective=Fishr(penalty, warmup, ema))


def coral(penalty: float = 1.0) -> Method:
    """Features are to have the same mean and covariance in every group (Sun and Saenko 2016, arXiv 1607.01719)."""
    return Method("coral", objective=CORAL(penalty))


def mmd(penalty: float = 1.0) -> Method:
    """Features are to have the same distribution in every group, by Gaussian kernels (Li et al. 2018)."""
    return Method("mmd", objective=MMD(penalty))


def group_dro(eta: float = 1e-2) -> Method:
    """The worst group is what counts (Sagawa et al. 2020, arXiv 1911.08731)."""
    return Method("group_dro", objective=GroupDRO(eta))


def dann(penalty: float = 1.0, width: int = 256, discriminator_learning_rate: float = 5e-5) -> Method:
    """No discriminator is to tell the groups apart by their features (Ganin et al. 2016, arXiv 1505.07818)."""
    return Method("dann", objective=DANN(penalty, False, width, discriminator_learning_rate))


def cdann(penalty: float = 1.0, width: int = 256, discriminator_learning_rate: float = 5e-5) -> Method:
    """DANN within each class, every class counting alike (Li et al. 2018)."""
    return Method("cdann", objective=DANN(penalty, True, width, discriminator_learning_rate))


def rsc(drop_features: float = 1 / 3, drop_rows: float = 1 / 3) -> Method:
    """The features that decide most are muted (Huang et al. 2020, arXiv 2007.02454)."""
    return Method("rsc", objective=RSC(drop_features, drop_rows))


def fish(meta_rate: float = 0.5) -> Method:
    """Updates on one group after the other, and part of the way they lead (Shi et al. 2022, arXiv 2104.09937)."""
    return Method("fish", hook=Fish(meta_rate))


def gga(noise: float = 1e-5, proposals: int = 250, begin: int = 100, end: int = 200, tolerance: float = 0.1) -> Method:
    """251 passes in each of updates 100–199, until gradients agree better (Ballas and Diou 2025, arXiv 2502.20162)."""
    return Method("gga", hook=GGA(noise, proposals, begin, end, tolerance))
