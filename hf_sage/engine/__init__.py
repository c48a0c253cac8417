"""The two-pass step on plain torch: group gradients, ascend, perturbed pass, descend."""

from hf_sage.engine.batchnorm import frozen_running_statistics, same_running_statistics
from hf_sage.engine.distributed import mean_over_ranks
from hf_sage.engine.features import FeatureTap
from hf_sage.engine.gradients import CleanPass, Part, clean_pass
from hf_sage.engine.hooks import apply_hook
from hf_sage.engine.joint import Joint, Verdict, joint_clean_pass
from hf_sage.engine.perturbation import perturbed
from hf_sage.engine.randomness import RandomState, step_seed
from hf_sage.engine.step import StepReport, descend, two_pass_step
from hf_sage.rules import Step

__all__ = [
    "CleanPass",
    "FeatureTap",
    "Joint",
    "Part",
    "RandomState",
    "Step",
    "StepReport",
    "Verdict",
    "apply_hook",
    "clean_pass",
    "descend",
    "frozen_running_statistics",
    "joint_clean_pass",
    "mean_over_ranks",
    "perturbed",
    "same_running_statistics",
    "step_seed",
    "two_pass_step",
]
