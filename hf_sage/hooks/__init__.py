"""Hooks: rules that move the weights before an update or in place of one, one a file."""

from hf_sage.hooks.base import WeightHook, WeightPasses

__all__ = ["WeightHook", "WeightPasses"]
