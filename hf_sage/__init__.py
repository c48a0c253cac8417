"""Train across domains and tasks: SAGETrainer in place of transformers.Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_sage.trainer import SAGEArguments, SAGEConfig, SAGEMixin, SAGETrainer

__version__ = "0.1.0"

__all__ = ["SAGEArguments", "SAGEConfig", "SAGEMixin", "SAGETrainer"]


def __getattr__(name: str) -> object:
    """Imports the trainer on first use, so that the mathematics and the engine never import transformers."""
    if name in __all__:
        import hf_sage.trainer

        return getattr(hf_sage.trainer, name)
    raise AttributeError(f"module 'hf_sage' has no attribute {name!r}")
