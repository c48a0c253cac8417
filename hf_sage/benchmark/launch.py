"""From one process to several: flags that are accelerate's start it, and processes that did not start are noticed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate.commands.launch import launch_command_parser


def relaunch(argv: Sequence[str], launch_flags: Sequence[str], *, on_cpu: bool = False) -> NoReturn:
    """Replaces this process by ``accelerate launch <launch_flags> -m hf_sage.cli train <the rest>``.

    Args:
        argv: All arguments of ``hf-sage train``.
        launch_flags: Those among them that are accelerate's.
        on_cpu: Whether the training itself was told to stay on the CPU.

    Raises:
        ValueError: If a flag is not accelerate's either.
    """
    command, environment = launch_command(launch_flags, on_cpu=on_cpu)
    own = _without(argv, launch_flags)
    os.execve(sys.executable, [*command, "-m", "hf_sage.cli", "train", *own], environment)


def launch_command(launch_flags: Sequence[str], *, on_cpu: bool = False) -> tuple[list[str], dict[str, str]]:
    """The beginning of an ``accelerate launch`` command, up to its script, and the environment to run it in.

    Without a GPU, ``accelerate launch --cpu --num_processes 2`` starts one process and says nothing. The form that
    starts two, with the gloo backend, is ``--multi_gpu`` under ``ACCELERATE_USE_CPU``; so that is what is launched.

    Args:
        launch_flags: Flags of ``accelerate launch``.
        on_cpu: Whether the training itself was told to stay on the CPU.

    Raises:
        ValueError: If a flag is not accelerate's.
    """
    flags = list(launch_flags)
    parsed, unknown = launch_command_parser().parse_known_args([*flags, "script"])
    if unknown or parsed.training_script != "script":
        odd = unknown[0] if unknown else parsed.training_script
        raise ValueError(f"Unknown option {odd!r}: neither `hf-sage train` nor `accelerate launch` has it. See --help.")
    environment = dict(os.environ)
    if parsed.cpu or on_cpu or not torch.cuda.is_available():
        flags = [flag for flag in flags if flag != "--cpu"]
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (parsed.num_processes or 1))))
        if (parsed.num_processes or 1) > 1 and not parsed.multi_gpu:
            flags.append("--multi_gpu")
    for option, value in (("--num_machines", "1"), ("--mixed_precision", "no"), ("--dynamo_backend", "no")):
        if parsed.config_file is None and not any(flag.split("=")[0] == option for flag in flags):
            flags += [option, value]  # else accelerate warns that it chose them
    return [sys.executable, "-m", "accelerate.commands.launch", *flags], environment


def check_processes() -> None:
    """Raises if several processes were asked of ``accelerate launch`` and only this one started.

    Its launcher for the CPU announces a meeting point for the processes and then starts one, which has no rank.
    """
    environment = os.environ
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    if launched and "MASTER_ADDR" in environment and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(environment):
        raise ValueError(
            "accelerate launch was asked for several processes on the CPU but started one, as it does with --cpu. Use "
            "`hf-sage train --num_processes N ...`, or `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes N scripts/train.py ...`."
        )


def leave_together() -> None:
    """Ends the process group when all ranks are here; left to the exit of the interpreter, its threads may abort it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _without(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """``argv`` without the first occurrence of each flag, in order."""
    left = list(flags)
    kept = []
    for word in argv:
        if left and word == left[0]:
            left.pop(0)
        else:
            kept.append(word)
    return kept
