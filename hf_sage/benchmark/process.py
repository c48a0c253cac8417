"""``python -m hf_sage.benchmark.process JOB``: one process of a job that `hf-sage benchmark --launch` has claimed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_sage.benchmark.claims import living_owner
from hf_sage.benchmark.launch import check_processes, leave_together
from hf_sage.benchmark.perform import work
from hf_sage.benchmark.store import JobFolder


def main(argv: Sequence[str]) -> int:
    """Runs the job in the given folder, as long as the process that has claimed it lives."""
    check_processes()
    folder = JobFolder(Path(argv[0]))
    owner = living_owner(folder.path)

    def still_wanted(step: int) -> None:
        if step % 50 == 0 and living_owner(folder.path) != owner:
            raise RuntimeError(f"The process that started this job and held its claim has ended: {owner}.")

    work(folder, still_wanted)
    leave_together()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
