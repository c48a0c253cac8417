"""Objectives: what is descended in place of the mean loss of the batch, one rule a file."""

from hf_sage.objectives.base import FeatureObjective, GroupWeights, Objective, Rows
from hf_sage.objectives.coral import CORAL
from hf_sage.objectives.dann import DANN
from hf_sage.objectives.fishr import Fishr
from hf_sage.objectives.group_dro import GroupDRO
from hf_sage.objectives.irm import IRM
from hf_sage.objectives.mmd import MMD
from hf_sage.objectives.rsc import RSC
from hf_sage.objectives.vrex import VREx

__all__ = [
    "CORAL",
    "DANN",
    "IRM",
    "MMD",
    "RSC",
    "FeatureObjective",
    "Fishr",
    "GroupDRO",
    "GroupWeights",
    "Objective",
    "Rows",
    "VREx",
]
