"""Muon for the hidden weight matrices and AdamW for everything else: one optimizer, for `transformers.Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_sage.engine.features import HEADS
from hf_sage.trainer.config import SAGEArguments

logger = logging.getLogger(__name__)

OUTPUTS = (*HEADS, "lm_head")
"""What networks call the module that turns features into logits or tokens."""


def muon(args: TrainingArguments, momentum: float = 0.95) -> tuple[type[MuonFactory], dict[str, Any]]:
    """Muon (Jordan et al. 2024) as the optimizer of any Trainer, for its ``optimizer_cls_and_kwargs``.

    The hidden weight matrices take `torch.optim.Muon`'s step, orthogonalised momentum; embeddings, the module of the
    logits, biases, norms and convolution kernels take `torch.optim.AdamW`'s. Both go by the arguments' learning rate,
    schedule and weight decay, so what is known to suit AdamW suits both: an orthogonal A × B matrix has entries of root
    mean square 1/√max(A, B), and ``match_rms_adamw`` makes it 0.2, about that of AdamW's steps (Liu et al. 2025, arXiv
    2502.16982, §2.2). AdamW's β and ε are the arguments' too.

    torch's Muon orthogonalises in bf16, where the last bit of a gradient can turn a rounding: an update that is cut
    into micro-batches or over ranks differs from the whole one by some thousandths of its length.

    The module of the logits is the one that ``classifier`` of `SAGEConfig` names, else the first of `OUTPUTS`.

    Args:
        args: The trainer's arguments. They are read when the training begins.
        momentum: Muon's, default 0.95 (torch's).

    Example:
        >>> trainer = SAGETrainer(model, args, optimizer_cls_and_kwargs=muon(args))  # doctest: +SKIP
    """
    return MuonFactory, {"args": args, "momentum": momentum}


class MuonFactory:
    """What Trainer, which makes it without arguments, asks for the optimizer of a model; see `muon`."""

    def __call__(self, model: nn.Module, args: TrainingArguments, momentum: float) -> MuonAndAdamW:
        """Splits the trainable parameters and builds the optimizer.

        Raises:
            ValueError: If the model has no hidden matrix, if ``classifier`` names none of its modules, or if ``optim``
                is not torch's AdamW.
        """
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if kind is not AdamW:
            raise ValueError(
                f"Muon leaves what is no hidden matrix to AdamW, and optim={OptimizerNames(args.optim).value!r} is "
                "another optimizer: set optim='adamw_torch_fused' or 'adamw_torch', or leave optimizer_cls_and_kwargs "
                "out."
            )
        # Trainer's own rule of what decays; nothing of the trainer is looked at.
        decaying = set(Trainer.get_decay_parameter_names(None, model))
        not_hidden = {id(p) for module in _not_hidden(model, args) for p in module.parameters()}
        matrices, decayed, others = [], [], []
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if name not in decaying:
                others.append(p)
            elif p.ndim == 2 and id(p) not in not_hidden:
                matrices.append(p)
            else:
                decayed.append(p)
        if not matrices:
            raise ValueError(
                f"{type(model).__name__} has no trainable hidden weight matrix for Muon: its {len(decayed + others)} "
                "trainable tensors are embeddings, the classifier, convolution kernels, biases or norms, all of them "
                "AdamW's. Train it with AdamW: leave optimizer_cls_and_kwargs out."
            )
        rate, decay = options["lr"], args.weight_decay
        groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return MuonAndAdamW(
            Muon(matrices, rate, decay, momentum, adjust_lr_fn="match_rms_adamw"), AdamW(groups, **options)
        )


class MuonAndAdamW(Optimizer):
    """Two optimizers of torch's as one: Muon's group is the first, the others are AdamW's.

    Groups and state are this one's and both read them here, so that schedules, state dictionaries, loss scaling and
    accelerate's wrapper meet an optimizer like any other.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self._muon, self._adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.defaults = adamw.defaults  # only now: a group that is added later is AdamW's, Muon's own is not

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each.

        Args:
            closure: Computes the loss anew.

        Returns:
            What it returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Groups and state are other objects after `load_state_dict`.
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state
        self._muon.step()  # type: ignore[no-untyped-call]  # so it is in torch
        self._adamw.step()
        return loss


def _not_hidden(model: nn.Module, args: TrainingArguments) -> list[nn.Module]:
    """The embeddings and the module of the logits, whose matrices are Muon's by shape and not by nature."""
    modules = dict(model.named_modules())
    given = args.classifier if isinstance(args, SAGEArguments) else None
    if given is not None and given not in modules:
        raise ValueError(
            f"The model has no module {given!r}, which classifier=... names; its modules are: "
            f"{', '.join(name for name, _ in model.named_children())}."
        )
    embeddings = [module for module in modules.values() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    heads = [modules[name] for name in ((given,) if given is not None else OUTPUTS) if name in modules]
    if not heads:
        logger.warning(
            "The model has no module %s, so Muon takes every matrix for a hidden one. If one turns features into "
            "logits, name its module by SAGEConfig(classifier=...), so that AdamW trains it.",
            " or ".join(map(repr, OUTPUTS)),
        )
    return [*embeddings, *heads[:1]]
