"""Measures every figure about the cost of a step that the documentation gives, as ratios within one run.

    python scripts/benchmark_step.py                                   # everything; on one CPU thread an hour or more
    python scripts/benchmark_step.py --rows clean_pass memory          # some of it
    python scripts/benchmark_step.py --device cuda --dtype tf32 --compile --model vit_l_14

CPU time of the process on one thread, device events on a GPU; the figures are medians over repetitions that each run
every contestant once, in shuffled order. `torchjd` and `pytorch_optimizer`, if installed, are measured as peers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from step_benchmark.clean_pass import clean_pass, memory
from step_benchmark.imports import imports
from step_benchmark.polar import polar
from step_benchmark.steps import restore, step
from step_benchmark.table import Row, facts, to_markdown
from step_benchmark.workload import TOWERS, Setting

SECTIONS: dict[str, Callable[[Setting], list[Row]]] = {
    "clean_pass": clean_pass,
    "memory": memory,
    "restore": restore,
    "polar": polar,
    "step": step,
    "imports": imports,
}
"""What there is to measure, by the name that ``--rows`` takes."""


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes it beside the JSON; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        setting = _setting(options)
    except ValueError as error:
        print(f"benchmark_step: {error}", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for name in options.rows:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += SECTIONS[name](setting)
    table = to_markdown(rows)
    print(table)
    result = facts(setting) | {"format": 1, "rows": [row.to_json() for row in rows]}
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"Written to {output} and {output.with_suffix('.md')}.", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="which [all]")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds that count, after one of warm-up [3]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--dtype", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the passes [fp32]")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    towers = [name for name in TOWERS if name != "toy"]
    parser.add_argument("--model", choices=towers, help="measure all rows on it [each row on its own]")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and orders [0]")
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, no figures")
    parser.add_argument("--output", type=Path, default=Path("step_benchmark.json"), help="[step_benchmark.json]")
    return parser


def _setting(options: argparse.Namespace) -> Setting:
    """The setting that the options describe, with torch's own switches set accordingly."""
    if options.repetitions < 1:
        raise ValueError(f"--repetitions must be 1 or more; got {options.repetitions}.")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU. Use --device cpu, or a torch with CUDA on a machine with one."
        )
    if options.dtype == "tf32" and device.type != "cuda":
        raise ValueError("--dtype tf32 is a GPU's way to multiply. Add --device cuda, or use fp32.")
    torch.set_float32_matmul_precision("high" if options.dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = options.dtype == "tf32"
    if device.type == "cpu":
        torch.set_num_threads(1)
    return Setting(
        device=device,
        dtype=options.dtype,
        compile=options.compile,
        model=options.model,
        repetitions=options.repetitions,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
