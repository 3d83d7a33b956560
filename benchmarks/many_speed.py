"""How fast are many users at once, in training and in generation?

    python -m benchmarks.many_speed --part train --json benchmarks/results/many_speed-train.json
    python -m benchmarks.many_speed --part generate --json benchmarks/results/many_speed-generate.json

Training: 16 teams of shared/data/debian-synopsis, a step of 4 rows of each. Sides: `joint`, foreword's train_many; `one prefix`,
`foreword.train` of a single prefix on the same 64 rows a step, as many rows at once; `peft-best`, PEFT with eager attention,
the teams one after the other, each with its own prefix and optimizer, 4 rows a step. The goals: joint at least 2 times as
fast as peft-best, and at most 1.15 times as long as one prefix.

Generation: 32 rows, a fixed number of new tokens, greedy. Sides: `32 prefixes`, a row each; `one prefix` for all rows, both
in one batch; `peft-switch`, PEFT with 32 adapters, one after the other, a row each. The goals: 32 prefixes at least 0.95 of
the throughput of one, and at least 8 times that of peft-switch.

The sides take turns, round by round, in one process; figures are medians over the rounds. Tokens are real ones: x and y in
training, the new ones in generation.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import foreword
from benchmarks import shapes
from benchmarks.peft_side import peft_batch, peft_model
from benchmarks.record import machine, write_json
from benchmarks.users_help import team_rows
from foreword.bases import Base
from foreword.data import Row, rows_of
from foreword.generation import end_ids
from foreword.limit import synchronize
from foreword.many import train_many
from foreword.prefix import Framing, Prefix
from foreword.reparam import trainable_prefix
from foreword.store import Store
from foreword.users import UserFile
from foreword.writing import write_jsonl

USERS, ROWS_OF_EACH = 16, 4
GOALS = {
    "train": {"peft-best": ("at least", 2.0), "one prefix": ("at least", 1 / 1.15)},
    "generate": {"one prefix": ("at least", 0.95), "peft-switch": ("at least", 8.0)},
}

Side = Callable[[], float]
"""Makes a round and says how many seconds the part that counts took."""


class EnoughError(Exception):
    """Ends a run after the step that was timed."""


def load(options: argparse.Namespace) -> Base:
    return shapes.load(options.base, dtype=options.dtype, device=options.device)


def framing_of(options: argparse.Namespace) -> Framing:
    return Framing(template="{input}\n\nOne-line summary:", max_input_tokens=options.max_input_tokens)


# training


def joint(options: argparse.Namespace, folder: Path) -> Side:
    base = load(options)
    path = folder / "users.jsonl"
    write_jsonl(path, (row for rows in chosen().values() for row in rows))
    settings = foreword.TrainSettings(
        length=options.length, reparametrization=options.reparametrization, batch_size=ROWS_OF_EACH, epochs=100
    )

    def side() -> float:
        times: list[float] = []

        def told(rows: int) -> None:
            assert rows == USERS * ROWS_OF_EACH
            times.append(time.perf_counter())
            if len(times) == 2:
                raise EnoughError

        # a step is what lies between two of them
        try:
            for _ in train_many(
                base,
                UserFile(path),
                Store(f"memory://{uuid.uuid4()}", create=True),
                settings=settings,
                framing=framing_of(options),
                slots=USERS,
                rows_at_once=options.rows_at_once,
                on_step=told,
            ):
                pass
        except EnoughError:
            pass
        return times[1] - times[0]

    return side


def one_prefix(options: argparse.Namespace) -> Side:
    base = load(options)
    rows = [row for own in chosen().values() for row in own]
    settings = foreword.TrainSettings(
        length=options.length,
        reparametrization=options.reparametrization,
        batch_size=options.rows_at_once,
        accumulation=len(rows) // options.rows_at_once,
        epochs=2,
    )

    def side() -> float:
        seconds: list[float] = []
        foreword.train(
            base, rows, settings=settings, framing=framing_of(options), on_step=lambda p: seconds.append(p.seconds)
        )
        assert len(seconds) == 2
        return seconds[1] - seconds[0]

    return side


def peft_best(options: argparse.Namespace) -> Side:
    base = load(options)
    users = [
        rows_of(base, rows, framing_of(options), length=options.length) for rows in chosen().values()
    ]  # all of one user are one batch, so there is nothing to sort by length
    model = peft_model(base, length=options.length, projection=options.reparametrization == "mlp", attention="eager")
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(rows: Sequence[Row], optimizer: torch.optim.Optimizer) -> None:
        model(**peft_batch(base, rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def side() -> float:
        seconds = 0.0
        for rows in users:
            optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
            synchronize(base.device)
            began = time.perf_counter()
            step(rows, optimizer)
            synchronize(base.device)
            seconds += time.perf_counter() - began
        return seconds

    return side


def chosen() -> dict[str, list[dict[str, str]]]:
    """The first rows of the first teams."""
    return {team: rows[:ROWS_OF_EACH] for team, rows in list(team_rows("users-train").items())[:USERS]}


# generation


def inputs_of(options: argparse.Namespace) -> list[dict[str, str]]:
    return [row for rows in team_rows("users-dev").values() for row in rows][:: 440 // options.rows][: options.rows]


def ours(options: argparse.Namespace, count: int) -> Side:
    base = load(options)
    card = foreword.Card(base=base.name, fingerprint=base.fingerprint)
    prefixes = [
        trainable_prefix(base, length=options.length, reparametrization="direct", seed=seed).fold(card)
        for seed in range(count)
    ]
    ends = torch.tensor(sorted(end_ids(base)), device=base.device)
    # nobody ends early, so that all sides have the same to do
    base.model.get_output_embeddings().register_forward_hook(
        lambda m, i, out: out.index_fill(-1, ends, torch.finfo(out.dtype).min)
    )
    settings = foreword.GenerateSettings(max_new_tokens=options.new_tokens, batch_size=options.rows)
    given: list[Prefix | None] = [prefixes[i % count] for i in range(options.rows)]

    def side() -> float:
        began = time.perf_counter()
        foreword.generate(base, inputs_of(options), given, settings=settings, framing=framing_of(options))
        return time.perf_counter() - began

    return side


def peft_switch(options: argparse.Namespace) -> Side:
    base = load(options)
    from foreword.data import frame

    rows = [frame(base, record, framing_of(options)) for record in inputs_of(options)]
    model = peft_model(base, length=options.length)
    for i in range(1, options.rows):
        model.add_adapter(f"user{i}", model.peft_config["default"])
    names = ["default", *(f"user{i}" for i in range(1, options.rows))]

    def side() -> float:
        began = time.perf_counter()
        for name, x in zip(names, rows, strict=True):
            model.set_adapter(name)
            out = model.generate(
                input_ids=torch.tensor([x], device=base.device),
                attention_mask=torch.ones(1, len(x), dtype=torch.long, device=base.device),
                min_new_tokens=options.new_tokens,
                max_new_tokens=options.new_tokens,
                do_sample=False,
                pad_token_id=base.pad_id,
            )
            assert out.shape == (1, len(x) + options.new_tokens)
        return time.perf_counter() - began

    return side


def tokens_of(options: argparse.Namespace) -> int:
    if options.part == "generate":
        return int(options.rows * options.new_tokens)
    base = load(options)
    rows = [row for own in chosen().values() for row in own]
    return sum(map(len, rows_of(base, rows, framing_of(options), length=options.length)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("train", "generate"), required=True)
    parser.add_argument("--base", default="smollm2-135m", help="as load_base takes it, or one of benchmarks.shapes")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--reparametrization", choices=("direct", "mlp"), default="direct", help="each side's own")
    parser.add_argument("--max-input-tokens", type=int, default=40)
    parser.add_argument("--rows-at-once", type=int, default=32, help="through the base, in training")
    parser.add_argument("--rows", type=int, default=32, help="in generation")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Side]
        if options.part == "train":
            sides = {
                "joint": joint(options, Path(folder)),
                "one prefix": one_prefix(options),
                "peft-best": peft_best(options),
            }
        else:
            sides = {
                f"{options.rows} prefixes": ours(options, options.rows),
                "one prefix": ours(options, 1),
                "peft-switch": peft_switch(options),
            }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(options.rounds + 1):
            # neither side is always the one that comes after the other
            for name in list(sides)[:: 1 if i % 2 else -1]:
                seconds[name].append(sides[name]())
    report(options, {name: times[1:] for name, times in seconds.items()}, tokens_of(options))


def report(options: argparse.Namespace, seconds: dict[str, list[float]], tokens: int) -> None:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(median))
    table = Table(
        "side", "seconds", "tokens/s", f"{first} is faster by", "goal",
        title=f"{options.part}, {options.dtype}, prefix {options.length}, {tokens} tokens, median of {options.rounds}",
    )  # fmt: skip
    ratios = {}
    for name, median_seconds in median.items():
        row = [name, f"{median_seconds:.2f}", f"{tokens / median_seconds:,.0f}"]
        if name != first:
            how, goal = GOALS[options.part][name]
            ratios[name] = median_seconds / median[first]
            row += [f"{ratios[name]:.2f}", f"{how} {goal:.2f}: {'met' if ratios[name] >= goal else 'missed'}"]
        table.add_row(*row)
    Console(width=110).print(table)
    if options.json:
        settings: dict[str, Any] = {k: v for k, v in vars(options).items() if k != "json"}
        result = {
            "settings": settings,
            "machine": machine(options.device),
            "tokens": tokens,
            "median_seconds": median,
            "ratios": ratios,
            "rounds": seconds,
        }
        write_json(options.json, result)


if __name__ == "__main__":
    main()
