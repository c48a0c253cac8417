"""Set-ups in which the step would not be the published one: refused with the alternative, before training starts."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from hf_sage.methods import Method


def refuse_what_cannot_be_exact(args: TrainingArguments, accelerator: Any, method: Method) -> None:
    """Raises a ValueError where gradients are not whole, or not there, when the step needs them."""
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
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process mean torch's DataParallel, which {name} does not support. Start one "
            "process a GPU with `accelerate launch`, or show it one GPU by CUDA_VISIBLE_DEVICES."
        )
    if "lomo" in str(args.optim).lower() or "layerwise" in str(args.optim).lower():
        raise ValueError(
            f"The optimizer {args.optim} steps inside the backward pass, where {name} has only the clean gradient. "
            "Choose one that steps afterwards, e.g. optim='adamw_torch'."
        )
