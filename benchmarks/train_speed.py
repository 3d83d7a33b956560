"""Training speed at many sizes: foreword, PEFT's prefix tuning and full fine-tuning, and the machine's limit.

    python -m benchmarks.train_speed --quick                                  # the headline row, in three minutes
    python -m benchmarks.train_speed --json benchmarks/results/train_speed.json
    python -m benchmarks.train_speed --device cuda --dtypes bfloat16 --json benchmarks/results/train_speed-cuda.json
    python -m benchmarks.train_speed --device cuda --dtypes bfloat16 --base llama-1b-shaped --json benchmarks/results/train_speed-cuda-1b.json

Each row of the grid is a `benchmarks.train_vs_peft`; see there for what the sides and the figures are. A JSON file that is
there already is gone on from; a row of other settings, sides or device is another row. E2E rows have about 60 tokens; long ones are summarization rows, 512 tokens at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import train_vs_peft as one

HEADLINE = {"rows": "e2e", "batch": 16, "length": 10, "dtype": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="as load_base takes it, or one of benchmarks.shapes")
    parser.add_argument("--device")
    parser.add_argument("--rows", nargs="+", default=["e2e", "long"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 4, 64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[10, 200])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--sides", nargs="+", choices=one.SIDES, default=list(one.SIDES))
    parser.add_argument("--reparametrizations", nargs="+", default=["direct"], help="direct, mlp: each side's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="each side, each round")
    parser.add_argument("--quick", action="store_true", help="the headline row alone, less long")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = ("rows", "batch", "length", "dtype", "reparametrization")
    grid = [
        dict(zip(names, cell, strict=True))
        for cell in itertools.product(
            options.rows, options.batches, options.lengths, options.dtypes, options.reparametrizations
        )
    ]
    if options.quick:
        grid = [{**HEADLINE, "reparametrization": kind} for kind in options.reparametrizations]
        options.seconds, options.sides = 6.0, ["foreword", "peft", "peft-eager"]
    results: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
        # a file of old has one machine for all its rows
        results = [{"machine": found.get("machine"), **result} for result in found["results"]]
    console = Console(width=one.WIDTH)
    asked = []
    for cell in grid:
        shared = ["--base", options.base, "--rounds", str(options.rounds), "--seconds", str(options.seconds)]
        shared += ["--device", options.device] if options.device else []
        own = [part for key, value in cell.items() for part in (f"--{key}", str(value))]
        wanted = one.parser().parse_args([*shared, *own, "--sides", *options.sides])
        there = [result for result in results if one.is_of(result, wanted)]
        if not there:
            there = [one.compare(wanted)]
            results += there
            show(console, there)
            if options.json:
                one.write(options.json, results)
        asked += there
    if len(grid) > 1:
        show(console, asked)


def show(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table("row", *one.COLUMNS)
    for result in results:
        for i, line in enumerate(one.lines_of(result)):
            table.add_row("" if i else result["name"], *line)
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
