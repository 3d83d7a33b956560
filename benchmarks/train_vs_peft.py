"""How fast is training, side by side with PEFT's prefix tuning?

    python -m benchmarks.train_vs_peft --dtype bfloat16
    python -m benchmarks.train_vs_peft --dtype float32 --json benchmarks/results/train_vs_peft-float32.json
    python -m benchmarks.train_vs_peft --base llama-1b-shaped --dtype bfloat16 --rounds 2 --warm 1 --json benchmarks/results/train_vs_peft-1b.json

Sides: `foreword`; `peft`, as its documentation has it (forward with labels, shuffled batches padded to the longest,
default attention); `peft-eager` and `peft-sdpa`, with that attention and batches by length, the faster of which is PEFT
at its best; `full`, full fine-tuning with such batches. Same base, rows, batch size, length, dtype and optimizer. Each side
runs in a process of its own, so that peak memory can be compared, and the sides take turns for several rounds. Tokens are
real ones, x and y; padding and virtual tokens are not counted. Beside them stands the machine's limit, measured in the same
run: see foreword.limit. It counts once what rows of a batch have in common; "without sharing" is the limit of a path that
runs every token of every row, as PEFT's does. `benchmarks.train_speed` does this for many sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import shapes
from benchmarks.e2e_rows import DATA, e2e_split
from benchmarks.record import machine, write_json
from foreword.attach import attach
from foreword.bases import Base
from foreword.batching import batches, collate, likeness, passes_of
from foreword.data import Row, read_records, rows_of
from foreword.limit import Work, peak_memory, product_rate, synchronize
from foreword.loss import forward_loss
from foreword.prefix import Framing
from foreword.reparam import Reparametrization, trainable_prefix

SIDES = ("foreword", "peft", "peft-eager", "peft-sdpa", "full")
Step = Callable[[list[Row]], None]


def rows_named(base: Base, name: str, length: int, count: int) -> list[Row]:
    """`e2e`, or `long`: summarization rows whose document has more than 1,000 characters."""
    if name == "e2e":
        return rows_of(base, e2e_split(rows=count).train, Framing(), length=length)
    records = [
        {"input": r["document"], "output": r["summary"]}
        for r in read_records(DATA / "debian-synopsis" / "train.jsonl")
        if len(r["document"]) > 1000
    ]
    framing = Framing(max_input_tokens=512)
    return rows_of(base, records[:count], framing, length=length)


def step_of(side: str, base: Base, length: int, rows: list[Row], kind: Reparametrization) -> Step:
    """What one training step of a side is; `kind` "mlp": prefixes are computed by each side's own MLP."""
    if side == "foreword":
        trainable = trainable_prefix(base, length=length, start=(rows[0].x, rows[0].y), reparametrization=kind).to(
            base.device
        )
        attachment = attach(base.model, trainable)

        def ours(chosen: list[Row]) -> None:
            count = sum(len(row.y) for row in chosen)
            for together in passes_of(base, chosen):
                (forward_loss(base, attachment, collate(base, together)) / count).backward()

        return _step(list(trainable.parameters()), ours)
    if base.is_encoder_decoder:
        raise SystemExit(
            f"expected a decoder-only base on the side {side}; {base.name!r} has an encoder: --sides foreword"
        )
    from benchmarks.peft_side import peft_batch, peft_model

    if side == "full":
        model: Any = base.model
        model.requires_grad_(True)
    else:
        model = peft_model(base, length=length, projection=kind == "mlp", attention=side.partition("-")[2] or None)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _step(parameters, lambda chosen: model(**peft_batch(base, chosen)).loss.backward())


def _step(parameters: list[torch.nn.Parameter], backward: Step) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)

    def step(chosen: list[Row]) -> None:
        backward(chosen)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plan(base: Base, side: str, rows: list[Row], batch: int) -> Iterator[list[int]]:
    """Batches for ever: by length, or, for PEFT as documented, shuffled."""
    epoch = 0
    while True:
        if side == "peft":
            order = list(range(len(rows)))
            random.Random(epoch).shuffle(order)
            made = [order[i : i + batch] for i in range(0, len(order), batch)]
        else:
            # the others do not run what rows have in common once: less padding is better for them
            made = batches(rows, batch, seed=0, epoch=epoch, key=likeness(base) if side == "foreword" else len)
        yield from (indices for indices in made if len(indices) == batch)
        epoch += 1


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """One side's measurement: what its process prints."""
    torch.manual_seed(0)
    base = shapes.load(options.base, dtype=options.dtype, device=options.device)
    rows = rows_named(base, options.rows, options.length, options.count)
    loaded = peak_memory(base)
    step = step_of(options.side, base, options.length, rows, options.reparametrization)
    work = Work(base, options.length)
    turns = plan(base, options.side, rows, options.batch)
    for _ in range(options.warm):
        step([rows[i] for i in next(turns)])
    synchronize(base.device)
    done: list[list[Row]] = []
    began = time.perf_counter()
    while time.perf_counter() - began < options.seconds:
        done.append([rows[i] for i in next(turns)])
        step(done[-1])
    synchronize(base.device)
    seconds = time.perf_counter() - began
    every = [row for chosen in done for row in chosen]
    tokens, count = sum(map(len, every)), len(every)
    needed, needed_apart = sum(map(work.of, done)), sum(work.of([row]) for row in every)
    rate = product_rate(base, round(options.batch * tokens / count))
    return {
        "tokens_per_second": tokens / seconds,
        "rows_per_second": count / seconds,
        "peak_mib": peak_memory(base) / 2**20,
        "loaded_mib": loaded / 2**20,
        "limit_tokens_per_second": tokens / (needed / rate),
        "limit_without_sharing": tokens / (needed_apart / rate),
    }


def main() -> None:
    options = parser().parse_args()
    if options.side:
        print("\n" + json.dumps(run_side(options)))
        return
    result = compare(options)
    table = Table(*COLUMNS, title=f"{result['name']}, median of {options.rounds}")
    for line in lines_of(result):
        table.add_row(*line)
    Console(width=WIDTH).print(table)
    if options.json:
        write(options.json, [result])


WIDTH = 120
"""Of tables, in characters."""

COLUMNS = (
    *("side", "tokens/s", "rows/s", "peak MiB", "of the limit", "without sharing"),
    *("foreword is faster by", "foreword's memory"),
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="as load_base takes it, or one of benchmarks.shapes")
    parser.add_argument("--rows", choices=("e2e", "long"), default="e2e")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=None)
    parser.add_argument("--count", type=int, default=500, help="rows to draw from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="each side, each round")
    parser.add_argument("--warm", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--reparametrization", choices=("direct", "mlp"), default="direct", help="each side's own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("base", "rows", "batch", "length", "dtype", "device", "count", "seconds", "warm", "reparametrization")
    return {name: getattr(options, name) for name in (*names, "rounds")}


def is_of(result: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """Whether the result is what `compare` would measure here."""
    here, there = machine(options.device), result["machine"] or {}
    same = all(there.get(name) == here[name] for name in ("processor", "device", "threads"))
    return same and result["settings"] == settings_of(options) and result["rounds"].keys() == set(options.sides)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run every side in turn, each in its own process; a side that dies, of memory, has no figures."""
    settings = settings_of(options)
    given = [
        part
        for name, value in settings.items()
        if value is not None and name != "rounds"
        for part in (f"--{name}", str(value))
    ]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train_vs_peft", "--side", side, *given]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode == 0:
                found[side].append(json.loads(ended.stdout.strip().splitlines()[-1]))
            elif ended.returncode != -9 and "tried to allocate" not in ended.stderr.lower():
                raise SystemExit(f"{side} failed:\n{ended.stderr[-2000:]}")
    return {
        "name": f"{options.rows} rows, batch {options.batch}, prefix {options.length}, {options.dtype}, {options.reparametrization}",
        "settings": settings,
        "machine": machine(options.device),
        "median": {
            side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for side, runs in found.items()
            if runs
        },
        "rounds": found,
    }


def lines_of(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line a side, as in `COLUMNS`."""
    median = result["median"]
    # each side measured the limit in its own process, with its own batches: the best of them is the machine's
    limit = max(m["limit_tokens_per_second"] for m in median.values())
    # results of old have it not
    apart = max(m.get("limit_without_sharing", math.nan) for m in median.values())
    ours = median.get("foreword")
    for side in result["rounds"]:
        m = median.get(side)
        if m is None:
            yield [side, "out of memory", *[""] * (len(COLUMNS) - 2)]
            continue
        beside = ["", ""]
        if ours is not None and side != "foreword":
            beside = [
                f"{ours['tokens_per_second'] / m['tokens_per_second']:.2f}",
                f"{ours['peak_mib'] / m['peak_mib']:.2f}",
            ]
        yield [
            side,
            f"{m['tokens_per_second']:,.0f}",
            f"{m['rows_per_second']:.1f}",
            f"{m['peak_mib']:,.0f}",
            f"{m['tokens_per_second'] / limit:.0%}",
            "" if math.isnan(apart) else f"{m['tokens_per_second'] / apart:.0%}",
            *beside,
        ]


def write(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    write_json(path, {"results": list(results)})


if __name__ == "__main__":
    main()
