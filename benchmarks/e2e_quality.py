"""Is the default any good? 500 E2E rows, five epochs, length 10: our defaults against PEFT's prefix tuning.

    python -m benchmarks.e2e_quality              # runs what is not yet in benchmarks/results/e2e_quality, then the table
    python -m benchmarks.e2e_quality --table      # the table alone

Each side gets three learning rates with seed 0; the one with the best corpus BLEU on 50 development meaning
representations is run with two more seeds. If the best is at the grid's edge, the grid grows. Reported is corpus BLEU
(sacrebleu, lowercased, all references, greedy) on 100 other held-out meaning representations, and a paired bootstrap
over these, each with the outputs of all seeds, between the best side of PEFT and ours. The base is smollm2-135m in
bfloat16. PEFT's sides train PEFT's own prompt encoder: its parameters, start and projection.
To save hours, its keys and values enter the base through foreword's attention, whose logits are PEFT's to 1e-4
(tests/test_interop_peft.py); each run first compares the two losses of a batch. The trained prefix is read from the file
that PEFT writes, and generates as ours do.

Every run is one JSON file, written when it is done, so the benchmark can be stopped at any time and goes on where it was.
Several processes may be started beside each other; they share the runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import foreword
from benchmarks.e2e_rows import Split, e2e_split
from benchmarks.peft_side import peft_batch, peft_model, peft_prefix
from benchmarks.record import machine
from benchmarks.runs import Runs, best_rate, named
from foreword.attach import Stack, attach
from foreword.bases import Base
from foreword.data import batches, collate, rows_of
from foreword.evaluate import paired_bootstrap, score
from foreword.learner import share_at
from foreword.loss import forward_loss, mean_loss
from foreword.prefix import Framing, Prefix
from foreword.reparam import layers_of
from foreword.tasks import Example

RUNS = Runs(Path(__file__).with_name("results") / "e2e_quality")
GRIDS = {
    "foreword": [5e-4, 1e-3, 2e-3],
    "peft-projected": [5e-4, 1e-3, 2e-3],
    "peft-direct": [5e-3, 1e-2, 2e-2],
    "foreword-direct": [2.5e-2, 5e-2, 1e-1],
}
USUAL_SIDES = ["foreword", "peft-projected", "peft-direct"]
SEEDS = (0, 1, 2)
EPOCHS, BATCH, LENGTH, WARMUP = 5, 16, 10, 0.1


def train_foreword(base: Base, split: Split, lr: float, seed: int, reparametrization: Any) -> tuple[Prefix, float]:
    settings = foreword.TrainSettings(
        length=LENGTH,
        epochs=EPOCHS,
        batch_size=BATCH,
        warmup=WARMUP,
        lr=lr,
        seed=seed,
        reparametrization=reparametrization,
    )
    losses: list[float] = []
    prefix = foreword.train(base, split.train, settings=settings, on_step=lambda p: losses.append(p.loss))
    return prefix, last_epoch(losses)


class PeftPrefix(nn.Module):
    """PEFT's prompt encoder as what `attach` takes; PEFT's own layout, [P, 2 L G D], is ours."""

    def __init__(self, base: Base, model: Any):
        super().__init__()
        self.encoder = model.prompt_encoder["default"]
        self.shapes = base.shapes

    def forward(self) -> Stack:
        matrix = self.encoder(torch.arange(LENGTH, device=self.encoder.embedding.weight.device)[None]).float()
        return Stack({"decoder": layers_of(matrix, self.shapes["decoder"])})


def train_peft(base: Base, split: Split, lr: float, seed: int, projection: bool) -> tuple[Prefix, float]:
    """The same rows, batches, optimizer, schedule and clipping; only the prefix and its start are PEFT's."""
    torch.manual_seed(seed)
    model = peft_model(base, length=LENGTH, projection=projection, attention="eager")
    rows = rows_of(base, split.train, Framing(), length=LENGTH)
    with torch.no_grad():
        theirs = model(**peft_batch(base, rows[:4])).loss.item()
    # as foreword's own: small steps would be lost in bfloat16
    model.prompt_encoder.float()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(rows) / BATCH)
    losses: list[float] = []
    with attach(base.model, PeftPrefix(base, model)) as attachment:
        with torch.no_grad():
            ours = mean_loss(base, rows[:4], attachment)
        if not math.isclose(ours, theirs, rel_tol=0.01 if base.dtype == torch.bfloat16 else 1e-4):
            raise SystemExit(f"expected PEFT's own loss on the first rows, {theirs:.4f}; got {ours:.4f}")
        for epoch in range(EPOCHS):
            for indices in batches(rows, BATCH, seed=seed, epoch=epoch):
                batch = collate(base, [rows[i] for i in indices])
                loss = forward_loss(base, attachment, batch) / len(batch.labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.param_groups[0]["lr"] = lr * share_at(len(losses), steps, WARMUP)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return peft_prefix(base, model), last_epoch(losses)


def last_epoch(losses: Sequence[float]) -> float:
    count = len(losses) // EPOCHS
    return sum(losses[-count:]) / count


def texts(base: Base, prefix: Prefix, examples: Sequence[Example]) -> list[str]:
    settings = foreword.GenerateSettings(max_new_tokens=80, batch_size=25)
    return [
        " ".join(text.split())
        for text in foreword.generate(base, [e.input for e in examples], prefix, settings=settings)
    ]


def bleu(outputs: Sequence[str], examples: Sequence[Example]) -> float:
    return 100 * score([list(e.references) for e in examples], outputs, ["BLEU"]).figures["BLEU"]


class Quality(NamedTuple):
    """One run."""

    side: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.side}-lr{self.lr:g}-seed{self.seed}"


def run(split: Split, unit: Quality) -> dict[str, Any]:
    base = foreword.load_base("smollm2-135m", dtype="bfloat16")
    side, lr, seed = unit
    began = time.perf_counter()
    if side.startswith("peft"):
        prefix, loss = train_peft(base, split, lr, seed, side == "peft-projected")
    else:
        prefix, loss = train_foreword(base, split, lr, seed, "direct" if side == "foreword-direct" else "mlp")
    trained = time.perf_counter() - began
    dev, test = texts(base, prefix, split.dev), texts(base, prefix, split.test)
    result = {
        "side": side, "lr": lr, "seed": seed, "dtype": str(base.dtype), "train_loss": loss, "train_seconds": trained,
        "dev_bleu": bleu(dev, split.dev), "test_bleu": bleu(test, split.test),
        "machine": machine(base.device), "test_outputs": test,
    }  # fmt: skip
    print(
        f"{side} lr {lr:g} seed {seed}: loss {loss:.3f}, BLEU dev {result['dev_bleu']:.2f} test {result['test_bleu']:.2f}",
        flush=True,
    )
    return result


def done(side: str) -> list[dict[str, Any]]:
    return RUNS.matching(f"{side}-lr*")


def best_lr(side: str) -> tuple[float | None, list[float]]:
    return best_rate({r["lr"]: r["dev_bleu"] for r in done(side) if r["seed"] == 0}, GRIDS[side])


def todo(sides: Sequence[str]) -> list[Quality]:
    first, more = [], []
    for side in sides:
        best, lrs = best_lr(side)
        first += [Quality(side, lr, 0) for lr in lrs]
        if best is not None:
            units = [Quality(side, best, seed) for seed in SEEDS]
            more += [unit for unit in units if RUNS.get(unit.name) is None]
    # a turn for each side, so that an unfinished benchmark is unfinished evenly
    first.sort(key=lambda unit: (abs(math.log(unit.lr / sorted(GRIDS[unit.side])[1])), list(sides).index(unit.side)))
    return first + sorted(more, key=lambda unit: unit.seed)


def table(console: Console, split: Split, sides: Sequence[str]) -> None:
    view = Table(
        "side",
        "learning rate",
        "seeds",
        "last-epoch loss",
        "BLEU dev",
        "BLEU test",
        title="500 E2E rows, 5 epochs, length 10",
    )
    rows = [r for side in sides for r in done(side)]
    for side in sides:
        for lr in sorted({r["lr"] for r in rows if r["side"] == side}):
            runs = [r for r in rows if r["side"] == side and r["lr"] == lr]
            mean = {key: sum(r[key] for r in runs) / len(runs) for key in ("train_loss", "dev_bleu", "test_bleu")}
            spread = (
                f" ({min(r['test_bleu'] for r in runs):.1f} to {max(r['test_bleu'] for r in runs):.1f})"
                if len(runs) > 1
                else ""
            )
            chosen = " *" if best_lr(side)[0] == lr else ""
            view.add_row(
                side, f"{lr:g}{chosen}", ", ".join(str(r["seed"]) for r in runs), f"{mean['train_loss']:.3f}",
                f"{mean['dev_bleu']:.2f}", f"{mean['test_bleu']:.2f}{spread}",
            )  # fmt: skip
    console.print(view)
    left = todo(sides)
    if left:
        console.print(
            f"{len(left)} runs are not there yet: {', '.join(f'{s} lr {lr:g} seed {seed}' for s, lr, seed in left)}"
        )
        return
    chosen_runs = {side: [r for r in done(side) if r["lr"] == best_lr(side)[0]] for side in sides}
    means = {side: sum(r["test_bleu"] for r in runs) / len(runs) for side, runs in chosen_runs.items()}
    rival = max((side for side in sides if side.startswith("peft")), key=means.__getitem__)
    # every seed's outputs together
    ours = [t for r in chosen_runs["foreword"] for t in r["test_outputs"]]
    theirs = [t for r in chosen_runs[rival] for t in r["test_outputs"]]
    references = [list(e.references) for e in split.test]
    compared = paired_bootstrap(references, theirs, ours, runs=len(SEEDS))["BLEU"]
    interval = [100 * end for end in compared.interval]
    summary = {
        "means": means, "rival": rival, "difference": means["foreword"] - means[rival],
        "interval": interval, "p_value": compared.p_value, "signature": compared.signature,
    }  # fmt: skip
    RUNS.write(named("summary", {} if sides == USUAL_SIDES else {"sides": sides}), summary)
    low, high = interval
    console.print(
        f"foreword {means['foreword']:.2f}, {rival} {means[rival]:.2f}: difference {summary['difference']:+.2f}, 95% [{low:+.2f}, {high:+.2f}], p {compared.p_value:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=list(GRIDS), default=USUAL_SIDES)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    split = e2e_split()
    if not options.table:
        RUNS.work(lambda: todo(options.sides), lambda unit: run(split, unit))
    table(Console(), split, options.sides)


if __name__ == "__main__":
    main()
