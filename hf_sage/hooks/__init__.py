"""Hooks: rules that move the weights before an update or in place of one, one a file."""

from hf_sage.hooks.base import WeightHook, WeightPasses
from hf_sage.hooks.fish import Fish
from hf_sage.hooks.gga import GGA

__all__ = ["GGA", "Fish", "WeightHook", "WeightPasses"]
