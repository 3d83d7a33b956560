"""How fast is training, side by side with PEFT's prefix tuning?

    python -m benchmarks.train_vs_peft --dtype bfloat16
    python -m benchmarks.train_vs_peft --dtype float32 --json benchmarks/results/train_vs_peft-float32.json

Sides: `foreword`; `peft`, as its documentation has it (forward with labels, shuffled batches padded to the longest,
default attention); `peft-best` (eager attention, our batches by length). Same base, rows, batch size, length, dtype and
optimizer. Each side runs in a process of its own, so that peak memory can be compared, and the sides take turns for several
rounds. Tokens are real ones, x and y; padding and virtual tokens are not counted. Beside them stands the machine's limit:
the floating-point operations that a step needs at the least (forward; backward to the prefix, with no gradient for
frozen weights; logits at y only) over the rate of a matrix product of the same shape, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import foreword
from benchmarks.e2e_rows import DATA, e2e_split
from foreword.attach import attach
from foreword.bases import Base
from foreword.data import Row, batches, collate, read_records, rows_of
from foreword.loss import forward_loss
from foreword.prefix import Framing
from foreword.reparam import trainable_prefix

SIDES = ("foreword", "peft", "peft-best")
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


def foreword_step(base: Base, length: int, rows: list[Row]) -> Step:
    trainable = trainable_prefix(base, length=length, start=(rows[0].x, rows[0].y))
    attachment = attach(base.model, trainable)
    optimizer = torch.optim.AdamW(trainable.parameters(), lr=1e-3, weight_decay=0.0)

    def step(chosen: list[Row]) -> None:
        batch = collate(base, chosen)
        (forward_loss(base, attachment, batch) / len(batch.labels)).backward()
        torch.nn.utils.clip_grad_norm_(trainable.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(base: Base, length: int, attention: str | None) -> Step:
    from benchmarks.peft_side import peft_batch, peft_model

    model = peft_model(base, length=length, attention=attention)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)

    def step(chosen: list[Row]) -> None:
        model(**peft_batch(base, chosen)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plan(side: str, rows: list[Row], batch: int) -> Iterator[list[int]]:
    """Batches for ever: by length, or, for PEFT as documented, shuffled."""
    epoch = 0
    while True:
        if side == "peft":
            order = list(range(len(rows)))
            random.Random(epoch).shuffle(order)
            made = [order[i : i + batch] for i in range(0, len(order), batch)]
        else:
            made = batches(rows, batch, seed=0, epoch=epoch)
        yield from (indices for indices in made if len(indices) == batch)
        epoch += 1


def synchronize(base: Base) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize()


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """One side's measurement: what its process prints."""
    torch.manual_seed(0)
    base = foreword.load_base(options.base, dtype=options.dtype, device=options.device)
    rows = rows_named(base, options.rows, options.length, options.count)
    loaded = peak_memory(base)
    if options.side == "foreword":
        step = foreword_step(base, options.length, rows)
    else:
        step = peft_step(base, options.length, "eager" if options.side == "peft-best" else None)
    turns = plan(options.side, rows, options.batch)
    for _ in range(options.warm):
        step([rows[i] for i in next(turns)])
    synchronize(base)
    tokens = count = needed = 0
    began = time.perf_counter()
    while time.perf_counter() - began < options.seconds:
        chosen = [rows[i] for i in next(turns)]
        step(chosen)
        tokens += sum(map(len, chosen))
        count += len(chosen)
        needed += sum(operations(base, row, options.length) for row in chosen)
    synchronize(base)
    seconds = time.perf_counter() - began
    mean_tokens = round(options.batch * tokens / count)
    return {
        "tokens_per_second": tokens / seconds,
        "rows_per_second": count / seconds,
        "peak_mib": peak_memory(base) / 2**20,
        "loaded_mib": loaded / 2**20,
        "limit_tokens_per_second": tokens / (needed / product_rate(base, mean_tokens)),
    }


def peak_memory(base: Base) -> int:
    """Bytes: of the process on a CPU, of the device on a GPU."""
    if base.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def operations(base: Base, row: Row, length: int) -> float:
    """Floating-point operations that one row's step needs at the least.

    Products with frozen weights: one forward, and one backward for the gradient of the activations, which the first
    layer's queries, and all before its attention, don't need. Attention: each token with the prefix and the tokens
    before it. Logits and their gradient at the positions of y alone.
    """
    model = base.model
    width, vocab = base.embeddings.shape[1], base.embeddings.shape[0]
    layers = len(base.shapes["decoder"])
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and p.shape[0] != vocab)
    tokens = len(row) - 1
    linear = 2 * weights * tokens * (2 - 1 / layers)
    heads = model.config.num_attention_heads * base.shapes["decoder"][0][1]
    attention = 2 * 2 * heads * tokens * (length + (tokens + 1) / 2) * 3 * layers
    logits = 2 * 2 * width * vocab * len(row.y)
    return linear + attention + logits


def product_rate(base: Base, tokens: int) -> float:
    """Operations a second of the base's own widest layer's product with a batch of `tokens` tokens."""
    weight = max(
        (p for p in base.model.parameters() if p.ndim == 2 and p is not base.embeddings), key=torch.Tensor.numel
    )
    x = torch.randn(tokens, weight.shape[1], dtype=base.dtype, device=base.device)
    best = 0.0
    with torch.no_grad():
        for _ in range(5):
            synchronize(base)
            began = time.perf_counter()
            for _ in range(20):
                torch.nn.functional.linear(x, weight)
            synchronize(base)
            best = max(best, 20 * 2 * x.shape[0] * weight.numel() / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", choices=("e2e", "long"), default="e2e")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=None)
    parser.add_argument("--count", type=int, default=500, help="rows to draw from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="each side, each round")
    parser.add_argument("--warm", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("\n" + json.dumps(run_side(options)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train_vs_peft", "--side", side, *sys.argv[1:]]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[side].append(json.loads(output.strip().splitlines()[-1]))
    report(options, found)


def report(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()
    }
    table = Table(
        "side", "tokens/s", "rows/s", "peak MiB", "of the limit", "foreword is faster by",
        title=f"{options.rows} rows, batch {options.batch}, prefix {options.length}, {options.dtype}, median of {options.rounds}",
    )  # fmt: skip
    ours = median.get("foreword")
    for side, m in median.items():
        # each side measured the limit in its own process; the median of all is the machine's
        limit = statistics.median(run["limit_tokens_per_second"] for run in found[side])
        ratio = (
            "" if ours is None or side == "foreword" else f"{ours['tokens_per_second'] / m['tokens_per_second']:.2f}"
        )
        table.add_row(
            side, f"{m['tokens_per_second']:,.0f}", f"{m['rows_per_second']:.1f}", f"{m['peak_mib']:,.0f}",
            f"{m['tokens_per_second'] / limit:.0%}", ratio,
        )  # fmt: skip
    Console().print(table)
    if options.json:
        settings: dict[str, Any] = {k: v for k, v in vars(options).items() if k not in ("json", "side")}
        result = {
            "settings": settings,
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
            "median": median,
            "rounds": found,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
