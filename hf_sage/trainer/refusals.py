"""Set-ups in which the step would not be the published one: refused with the alternative, before training starts."""

from __future__ import annotations

import pickle
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from hf_sage.methods import Method


def refuse_what_cannot_be_exact(args: TrainingArguments, accelerator: Any, model: nn.Module, method: Method) -> None:
    """Raises a ValueError where gradients are not whole, or not there, when the step needs them.

    Raises:
        ValueError: Also where the method cannot be saved with a checkpoint's arguments, which would show only then.
    """
    if args.save_strategy != "no":
        _refuse_unpicklable(method)
    if method.is_plain:
        return
    name = method.name.upper()
    if accelerator.distributed_type == "DEEPSPEED":
        raise ValueError(
            f"{name} needs each parameter's whole gradient between its two passes, and DeepSpeed keeps gradients to "
            "itself. Train with DistributedDataParallel: `accelerate launch --multi_gpu` without DeepSpeed."
        )
    if accelerator.distributed_type == "FSDP":
        raise ValueError(
            f"{name} on FSDP's shards is exact in hf_sage.engine, for fully_shard and a loop of your own, but the "
            "trainer does not yet hand every rank the same passes, without which FSDP waits forever. Train with "
            "DistributedDataParallel: `accelerate launch --multi_gpu` without --use_fsdp."
        )
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            f"{name} does not yet know gradients that are split by tensor, context or sequence parallelism. Train with "
            "DistributedDataParallel: `accelerate launch --multi_gpu` without a parallelism configuration."
        )
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            f"The model's parameters are sharded (DTensor), and in the trainer {name} needs them whole. Load the model "
            "without tp_plan and without fully_shard; sharded ones are exact in hf_sage.engine with a loop of your own."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process mean torch's DataParallel, which {name} does not support. Start one "
            "process a GPU with `accelerate launch`, or show it one GPU by CUDA_VISIBLE_DEVICES."
        )
    optimizer = getattr(args.optim, "value", args.optim)
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise ValueError(
            f"The optimizer {optimizer!r} steps inside the backward pass, where {name} has only the clean gradient. "
            "Choose one that steps afterwards, e.g. optim='adamw_torch'."
        )


def _refuse_unpicklable(method: Method) -> None:
    try:
        pickle.dumps(method)
    except Exception as error:  # whatever its parts raise
        raise ValueError(
            f"The method {method.name!r} cannot be saved with the arguments of a checkpoint: {error}. Build it of "
            "classes and functions that a module defines by name (no lambda, no local function), or train with "
            'save_strategy="no".'
        ) from error
