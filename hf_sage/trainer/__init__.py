"""SAGETrainer: the two-pass, group-aware step in place of transformers.Trainer's."""

from hf_sage.trainer.config import SAGEArguments, SAGEConfig
from hf_sage.trainer.sampler import DomainBalancedSampler
from hf_sage.trainer.trainer import SAGEMixin, SAGETrainer

__all__ = ["DomainBalancedSampler", "SAGEArguments", "SAGEConfig", "SAGEMixin", "SAGETrainer"]
