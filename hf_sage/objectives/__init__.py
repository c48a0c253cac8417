"""Objectives: what is descended in place of the mean loss of the batch, one rule a file."""

from hf_sage.objectives.base import FeatureObjective, GroupWeights, Objective, Rows

__all__ = ["FeatureObjective", "GroupWeights", "Objective", "Rows"]
