"""Does the fast path learn what a plain one learns?

    python -m benchmarks.loss_curves --batch 4 --count 500 --json benchmarks/results/loss_curves-float32.json
    python -m benchmarks.loss_curves --dtype bfloat16 --steps 200 --json benchmarks/results/loss_curves-bfloat16.json
    python -m benchmarks.loss_curves --dtype bfloat16 --steps 200 --count 500
    python -m benchmarks.loss_curves --dtype bfloat16 --steps 200 --batch 4 --count 500 --reparametrization mlp

The plain path is transformers' own alone: the prefix in a cache, the model called with labels, its default attention, all
logits. A second plain path, which differs from it in the attention's implementation (eager), shows how far rounding alone
takes two of them. All start from the same prefix and see the same batches of E2E rows with the same optimizer and schedule.
Goals: each step's loss within 1e-4 of the plain one in float32, as a share of it, and within 2% in bfloat16; the loss on
held-out rows, at the end, within 0.5%. It is computed by one path for all prefixes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache, get_linear_schedule_with_warmup

import foreword
from benchmarks.e2e_rows import e2e_split
from benchmarks.peft_side import peft_batch
from benchmarks.record import machine, write_json
from foreword.attach import attach
from foreword.bases import Base
from foreword.batching import batches, collate, likeness
from foreword.data import Row, rows_of
from foreword.loss import forward_loss, mean_loss
from foreword.prefix import Framing
from foreword.reparam import TrainablePrefix, trainable_prefix
from foreword.settings import DEFAULT_LR
from foreword.tasks import training_rows

GOALS = {"float32": 1e-4, "bfloat16": 0.02}
HELD_OUT_GOAL = 0.005

Loss = Callable[[list[Row]], torch.Tensor]


def fast(base: Base, trainable: TrainablePrefix) -> Loss:
    def loss(rows: list[Row]) -> torch.Tensor:
        batch = collate(base, rows)
        with attach(base.model, trainable) as attachment:
            return forward_loss(base, attachment, batch) / len(batch.labels)

    return loss


def plain(base: Base, trainable: TrainablePrefix, *, attention: str = "sdpa") -> Loss:
    model: Any = base.model

    def loss(rows: list[Row]) -> torch.Tensor:
        batch, cache = peft_batch(base, rows), DynamicCache()
        for i, layer in enumerate(trainable().sections["decoder"]):
            cache.update(*(t.to(base.dtype).expand(len(rows), -1, -1, -1) for t in layer), i)
        ones = torch.ones(len(rows), trainable.length, dtype=torch.long, device=base.device)
        batch["attention_mask"] = torch.cat([ones, batch["attention_mask"]], dim=1)
        model.set_attn_implementation(attention)
        value = model(**batch, past_key_values=cache).loss
        assert isinstance(value, torch.Tensor)
        return value

    return loss


def turns(base: Base, rows: list[Row], size: int) -> Iterator[list[Row]]:
    for epoch in itertools.count():
        plan = batches(rows, size, seed=0, epoch=epoch, key=likeness(base))
        yield from ([rows[i] for i in indices] for indices in plan)


SIDES: Mapping[str, Callable[[Base, TrainablePrefix], Loss]] = {
    "foreword": fast,
    "plain": plain,
    "plain, eager": functools.partial(plain, attention="eager"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", choices=list(GOALS), default="float32")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, default=3400, help="rows to draw from; by default more than 200 steps see")
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--reparametrization", choices=("direct", "mlp"), default="direct")
    parser.add_argument("--lr", type=float, help="peak learning rate; by default that of `foreword train`")
    parser.add_argument("--held-out", type=int, default=100, help="rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    base = foreword.load_base(options.base, dtype=options.dtype, device=options.device)
    split = e2e_split(rows=options.count)
    rows = rows_of(base, split.train, Framing(), length=options.length)
    held_out = rows_of(base, training_rows(split.dev)[: options.held_out], Framing(), length=options.length)
    kind = options.reparametrization
    start = trainable_prefix(base, length=options.length, start=(rows[0].x, rows[0].y), reparametrization=kind).to(
        base.device
    )
    base.model.requires_grad_(False)
    sides = {}
    for name, path in SIDES.items():
        trainable = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(trainable.parameters(), lr=options.lr or DEFAULT_LR[kind], weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
        sides[name] = trainable, path(base, trainable), optimizer, schedule

    curves: dict[str, list[float]] = {name: [] for name in sides}
    steps = itertools.islice(turns(base, rows, options.batch), options.steps)
    for chosen in track(steps, "steps", total=options.steps, console=Console(stderr=True)):
        for name, (trainable, loss_of, optimizer, schedule) in sides.items():
            loss = loss_of(chosen)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curves[name].append(loss.item())
    ends = {}
    for name, (trainable, *_) in sides.items():
        with attach(base.model, trainable) as attachment:
            ends[name] = mean_loss(base, held_out, attachment)
    report(options, curves, ends)


def report(options: argparse.Namespace, curves: dict[str, list[float]], ends: dict[str, float]) -> None:
    others = [name for name in curves if name != "plain"]
    apart = {name: [abs(a / b - 1) for a, b in zip(curves[name], curves["plain"], strict=True)] for name in others}
    furthest = {name: max(values) for name, values in apart.items()}
    held_out_apart = {name: abs(ends[name] / ends["plain"] - 1) for name in others}
    table = Table(
        "step",
        *curves,
        *(f"{name}: from plain" for name in others),
        title=f"{options.dtype}, batch {options.batch}, prefix {options.length}, {options.reparametrization}",
    )
    for step in sorted({1, *range(10, options.steps + 1, max(10, options.steps // 10)), options.steps}):
        losses = [f"{curve[step - 1]:.5f}" for curve in curves.values()]
        table.add_row(str(step), *losses, *(f"{values[step - 1]:.1e}" for values in apart.values()))
    table.add_section()
    for name, value, goal in (
        ("furthest", furthest, GOALS[options.dtype]),
        ("held out", held_out_apart, HELD_OUT_GOAL),
    ):
        losses = [f"{loss:.5f}" if name == "held out" else "" for loss in ends.values()]
        ours, *rest = value.values()
        told = f"{ours:.1e}, goal {goal:g}: {'met' if ours <= goal else 'missed'}"
        table.add_row(name, *losses, told, *(f"{one:.1e}" for one in rest))
    Console(width=120).print(table)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        result = {
            "settings": settings, "machine": machine(options.device), "furthest": furthest, "held_out": ends,
            "held_out_apart": held_out_apart,
        }  # fmt: skip
        write_json(options.json, {**result, "curves": curves})


if __name__ == "__main__":
    main()
