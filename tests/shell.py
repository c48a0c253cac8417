"""A shell whose ``hf-sage`` is this process: what a page tells to type runs as it stands, without imports each time."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path

from hf_sage.cli import main

PRELUDE = """
set -euo pipefail
hf-sage() {
    printf '%s\\0' "$@" > "$PIPES/command"
    local status
    read -r status < "$PIPES/status"
    cat "$PIPES/said"
    return "$status"
}
trap 'printf end > "$PIPES/command"' EXIT
"""


def run_script(script: str, folder: Path, pipes: Path, **environment: str) -> str:
    """Runs a bash script in a folder, where it stops at the first command that fails; returns what it printed.

    Commands of hf-sage, in pipes and substitutions too, are `hf_sage.cli.main` in this process.
    """
    pipes.mkdir()
    for name in ("command", "status"):
        os.mkfifo(pipes / name)
    here, variables = Path.cwd(), os.environ | environment | {"PIPES": str(pipes)}
    errors = []
    with (
        (pipes / "printed").open("w") as printed,
        subprocess.Popen(["bash", "-c", PRELUDE + script], cwd=folder, env=variables, stdout=printed) as shell,
    ):
        os.chdir(folder)
        try:
            while (command := (pipes / "command").read_bytes()) != b"end":
                argv = command.decode().split("\0")[:-1]
                said, failed = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
                    status = _status(argv)
                (pipes / "said").write_text(said.getvalue())
                (pipes / "status").write_text(f"{status}\n")
                if status:
                    errors.append(f"hf-sage {' '.join(argv)}: status {status}\n{said.getvalue()}{failed.getvalue()}")
        except BaseException:
            shell.kill()  # it waits for an answer
            raise
        finally:
            os.chdir(here)
    assert shell.returncode == 0, "\n".join(errors) or (pipes / "printed").read_text()
    return (pipes / "printed").read_text()


def _status(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as error:  # argparse's
        return int(error.code or 0)
