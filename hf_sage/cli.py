"""The ``hf-sage`` command: hands the words after a command's name to the function that is the command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "demo": ("hf_sage.benchmark.demo", "ERM, SAM and SAGE on real images, every domain held out once (5 minutes)"),
    "train": ("hf_sage.benchmark.train", "one model, one held-out domain"),
    "benchmark": ("hf_sage.benchmark.command", "datasets × methods × held-out domains × seeds, resumable"),
    "report": ("hf_sage.benchmark.report", "tables, differences and plots of a benchmark, beside the paper's"),
    "data": ("hf_sage.data.command", "datasets: list, check, preview"),
    "card": ("hf_sage.benchmark.cards", "the model card of a run, checked offline"),
    "push": ("hf_sage.benchmark.push", "a run's model and card to the Hub"),
    "methods": ("hf_sage.benchmark.methods", "the methods: papers, costs, needs, defaults"),
}
"""The module of each command, imported when it is called, whose ``main`` it is; and what it is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words after ``hf-sage``; by default those of the process.

    Returns:
        The exit status: 0, 1 after an error whose message has been printed, or what the command returns.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hf-sage",
        description="Train across domains: SAGE and its rivals on one trainer.",
        epilog=f"commands:\n{listing}\n\n`hf-sage COMMAND --help` has each one's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    name = parser.parse_args(argv[:1]).command
    # Where it is installed, it warns at import of kernels for 4-bit models, which no command has.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        status: int = import_module(COMMANDS[name][0]).main(argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-sage {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
