"""Two processes that run the cases of a module: started once, whichever test and whichever worker asks first.

`python rank_worker.py <module> <folder>` is what each of the two runs, with gloo on the CPU.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

RANKS = 2
HANG = timedelta(seconds=60)
"""How long a process waits for the other before that is an error."""

Outcome = dict[str, Any]


class Ranks:
    """What each rank found in each case."""

    def __init__(self, folder: Path) -> None:
        files = [folder / f"rank{rank}.pt" for rank in range(RANKS)]
        assert all(file.exists() for file in files), (folder / "output.txt").read_text()
        self.found = [torch.load(file, weights_only=False) for file in files]

    def __getitem__(self, case: str) -> list[Outcome]:
        for rank, own in enumerate(self.found):
            if case not in own:
                pytest.fail(f"rank {rank} stopped before {case!r}, in {list(own)[-1]!r}:\n{own[list(own)[-1]]}")
        return [own[case] for own in self.found]


def on_two_ranks(module: str, factory: pytest.TempPathFactory) -> Ranks:
    """Runs the module's ``CASES``, each a function of a folder that both ranks share."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / module
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            launch(module, folder)
    return Ranks(folder)


def launch(module: str, folder: Path) -> None:
    # `accelerate launch --cpu --num_processes 2` starts one process; this form starts two.
    flags = f"--multi_gpu --num_processes {RANKS} --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        subprocess.run([*command, __file__, module, str(folder)], env=environment, stdout=output, stderr=output)


def main(module: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=HANG)
    found: dict[str, Outcome] = {}
    for name, case in importlib.import_module(module).CASES.items():
        shared = folder / name.replace("/", " ")
        shared.mkdir(exist_ok=True)
        try:
            found[name] = case(shared)
        except Exception:  # the ranks are out of step now
            found[f"the failure of {name}"] = {"error": traceback.format_exc()}
            break
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    os._exit(0)  # taking the group down would wait for a rank that failed


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
