"""The ``hf-sage`` command: a thin dispatcher; each command's work is a function of `hf_sage.benchmark`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words after ``hf-sage``; by default those of the process.

    Returns:
        The exit status: 0, or 1 after an error whose message has been printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hf-sage", description="Train across domains: SAGE, SAM and ERM on the same trainer."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | train")
    demo = commands.add_parser("demo", help="ERM, SAM and SAGE on real images, every domain held out once (5 minutes)")
    demo.add_argument("--output-dir", type=Path, default=Path("demo"), help="where table, plot and model go [demo]")
    demo.add_argument("--seeds", type=_positive, help="number of seeds [2]")
    demo.add_argument("--steps", type=_positive, help="updates a run")
    demo.add_argument("--methods", nargs="+", metavar="METHOD", help="which methods [all]")
    demo.add_argument("--held-out", nargs="+", metavar="DOMAIN", help="which domains to hold out in turn [all]")
    demo.add_argument("--workers", type=_positive, help="processes [one a core]")
    commands.add_parser("train", help="one model, one held-out domain; `hf-sage train --help`", add_help=False)
    options, rest = parser.parse_known_args(argv)
    try:
        if options.command == "train":
            from hf_sage.benchmark.train import train  # heavy: after --help and bad options

            metrics = train(argv[argv.index("train") + 1 :])
            if int(os.environ.get("RANK", "0")) == 0:
                source = metrics.get("eval_avg_accuracy", metrics["eval_accuracy"])  # one group has no average
                print(f"held-out accuracy {metrics['test_accuracy']:.3f}, source {source:.3f}")
        else:
            if rest:
                parser.error(f"unknown options: {' '.join(rest)}")
            from hf_sage.benchmark.demo import demo as run_demo
            from hf_sage.benchmark.demo import demo_jobs

            jobs = demo_jobs(
                seeds=options.seeds, steps=options.steps, methods=options.methods, held_out=options.held_out
            )
            run_demo(jobs, options.output_dir, workers=options.workers)
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-sage {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number, 1 or more; got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
