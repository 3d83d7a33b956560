"""How fast are texts served? Many prefixes at once against PEFT switching adapters, and a store larger than memory.

    python -m benchmarks.serve_speed --folder /mnt/disk/prefixes --json benchmarks/results/serve_speed.json

In each question two sides take turns, round by round, in one process and warm; a figure is the median of the rounds.

    peft      32 requests with 32 prefixes of length 10, all at once in our engine; PEFT has the same prefixes as adapters,
              and switches to each request's in turn. Tokens that came, per second. Goal: 8 times.
    store     requests over all of 10,000 prefixes, with memory for 5% of them, against as many over 32 prefixes that are
              in memory, 32 at a time. Goal: at most 1.3 times the time.
    first     seconds to the first token of a request by itself, whose prefix is not in memory, against one whose is. Goal:
              at most 1.2 times. The file may be in the system's cache.

What prefixes cost on vLLM is another file's question, benchmarks/serve_vllm_speed.py, which runs in vLLM's own environment
(make setup-vllm) and writes to benchmarks/results/serve_vllm_speed.json.

Prefixes are the base's activations on a text, with a little noise, so that each is another and texts stay texts.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import foreword
from benchmarks.record import machine, write_json
from foreword.bases import Base
from foreword.data import frame
from foreword.interop.peft import export_peft
from foreword.prefix import Card, Framing, Layer, Prefix
from foreword.reparam import activations, layers_of
from foreword.serve.engine import Engine, Request, Sampling
from foreword.serve.local import LocalEngine
from foreword.serve.residents import size_of
from foreword.store import Store, Version

LENGTH = 10
AT_ONCE = 32
WORDS = "Describe the restaurant in one friendly sentence for a visitor who is new in town: "
RECORDS = (
    "name[Amber Kite], eatType[pub], food[Italian], priceRange[cheap]",
    "name[Blue Spice], food[Chinese], customer rating[5 out of 5], area[riverside], near[Rainbow Inn]",
    "name[The Mill], eatType[coffee shop], priceRange[more than 30 euros], familyFriendly[yes]",
    "name[Moss Lantern], area[city centre]",
)


@dataclass
class Question:
    """Two sides' rounds.

    Args:
        unit: of a round's figure.
        goal: the bound of the ratio; `at_least` or at most.
    """

    title: str
    sides: tuple[str, str]
    unit: str
    goal: float
    at_least: bool
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, side: str, value: float) -> None:
        self.rounds.setdefault(side, []).append(value)

    @property
    def medians(self) -> tuple[float, float]:
        first, second = (statistics.median(self.rounds[side]) for side in self.sides)
        return first, second

    @property
    def ratio(self) -> float:
        return self.medians[0] / self.medians[1]

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal


def layers_on_words(base: Base) -> list[Layer]:
    """Keys and values of every layer, [G, P, D], on a text."""
    tokens = frame(base, {"input": WORDS}, Framing(template="{input}"))
    return layers_of(activations(base, tokens, tokens, LENGTH)["decoder"], base.shapes["decoder"])


@functools.cache
def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prefix_of(base: Base, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], number: int) -> Prefix:
    """One of its own content: its card has its number, and its noise is one of 97."""

    def noisy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu() + 0.02 * tensor.std().cpu() * noise(tuple(tensor.shape), number % 97)

    card = Card(
        base=base.name,
        fingerprint=base.fingerprint,
        training={"number": number},
        created="2026-01-01T00:00:00+00:00",
    )
    return Prefix({"decoder": [(noisy(keys), noisy(values)) for keys, values in layers]}, card)


def filled(base: Base, folder: Path, count: int) -> list[Version]:
    """The versions of a store of so many prefixes; what an earlier run put there is kept."""
    store = Store(folder, create=True)
    there = {change.version.name: change.version for change in store.changes().items if change.version}
    layers = layers_on_words(base)
    missing = [i for i in range(count) if f"user-{i:06d}" not in there]
    for i in track(missing, f"putting {len(missing)} prefixes", disable=len(missing) < 500):
        version = store.put(f"user-{i:06d}", prefix_of(base, layers, i))
        there[version.name] = version
    if missing:
        store.rebuild()
    return [there[f"user-{i:06d}"] for i in range(count)]


def request_of(base: Base, i: int, version: Version | None, tokens: int) -> Request:
    x = frame(base, {"input": RECORDS[i % len(RECORDS)]}, Framing())
    return Request(id=f"{i}", tokens=tuple(x), prefix=version, sampling=Sampling(max_tokens=tokens))


async def texts(engine: Engine, requests: Sequence[Request]) -> int:
    """Let requests go, `AT_ONCE` at a time. Returns the tokens that came."""
    waiting = list(reversed(requests))
    came = 0

    async def work() -> None:
        nonlocal came
        while waiting:
            async for piece in engine.generate(waiting.pop()):
                came += len(piece.tokens)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return came


async def first_token(engine: Engine, request: Request) -> float:
    began = time.perf_counter()
    async with aclosing(engine.generate(request)) as pieces:
        await anext(pieces)
        return time.perf_counter() - began


class PeftSide:
    """A PEFT model with an adapter for each of our prefixes."""

    def __init__(self, base: Base, prefixes: Sequence[Prefix], folder: Path):
        self.base = base
        for i, prefix in enumerate(prefixes):
            export_peft(prefix, base, folder / str(i))
        self.model: Any = peft.PeftModel.from_pretrained(base.model, folder / "0", adapter_name="0")
        for i in range(1, len(prefixes)):
            self.model.load_adapter(folder / str(i), adapter_name=str(i))
        self.model.eval()

    @torch.no_grad()
    def text(self, i: int, request: Request) -> list[int]:
        self.model.set_adapter(str(i))
        tokens = torch.tensor([request.tokens], device=self.base.device)
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=request.sampling.max_tokens,
            do_sample=False,
            pad_token_id=self.base.pad_id,
        )
        return list(output[0, len(request.tokens) :].tolist())


async def ask_peft(options: argparse.Namespace, base: Base, engine: Engine, versions: Sequence[Version]) -> Question:
    """32 requests with 32 prefixes: ours at once, PEFT's one after another."""
    question = Question("32 prefixes, tokens/s", (engine.name, "PEFT"), "tokens/s", 8.0, True)
    other = foreword.load_base(options.base, dtype=options.dtype)
    store = Store(options.folder)
    requests = [request_of(base, i, versions[i], options.tokens) for i in range(AT_ONCE)]
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [Prefix.from_bytes(store.read(version)) for version in versions[:AT_ONCE]]
        theirs = PeftSide(other, prefixes, Path(folder))
        theirs.text(0, requests[0])
        await texts(engine, requests)
        for i in range(options.rounds):
            for side in question.sides if i % 2 else question.sides[::-1]:
                began = time.perf_counter()
                if side == "PEFT":
                    came = sum(len(theirs.text(n, request)) for n, request in enumerate(requests))
                else:
                    came = await texts(engine, requests)
                question.add(side, came / (time.perf_counter() - began))
    return question


async def ask_store(options: argparse.Namespace, base: Base, engine: Engine, versions: Sequence[Version]) -> Question:
    """Requests over all prefixes of a store, against as many over those that are in memory."""
    question = Question(f"{len(versions):,} prefixes, 5% in memory, s", ("over all", "in memory"), "s", 1.3, False)
    draw = random.Random(0)
    warm = versions[:AT_ONCE]
    before = engine.figures()
    for i in range(options.rounds + 1):
        for side in question.sides if i % 2 else question.sides[::-1]:
            chosen = [draw.choice(versions if side == "over all" else warm) for _ in range(3 * AT_ONCE)]
            requests = [request_of(base, n, version, options.tokens) for n, version in enumerate(chosen)]
            if side == "in memory":
                await texts(engine, [request_of(base, n, version, 1) for n, version in enumerate(warm)])
            began = time.perf_counter()
            await texts(engine, requests)
            if i:
                question.add(side, time.perf_counter() - began)
            after = engine.figures()
            assert after.resident_bytes <= after.budget_bytes, "within the budget"
    assert after.loads - before.loads > options.rounds * AT_ONCE, "most prefixes had to be loaded"
    return question


async def ask_first(options: argparse.Namespace, base: Base, engine: Engine, versions: Sequence[Version]) -> Question:
    """The first token with a prefix that is not in memory, against one that is."""
    question = Question("first token, ms", ("not in memory", "in memory"), "ms", 1.2, False)
    cold = random.Random(1).sample(list(versions), 10 * options.rounds)
    await engine.forget({version.sha256 for version in cold})
    for n, version in enumerate(cold):
        question.add("not in memory", 1e3 * await first_token(engine, request_of(base, n, version, 1)))
        question.add("in memory", 1e3 * await first_token(engine, request_of(base, n, version, 1)))
    return question


Asked = Callable[[argparse.Namespace, Base, Engine, Sequence[Version]], Coroutine[Any, Any, Question]]
QUESTIONS: dict[str, Asked] = {"peft": ask_peft, "store": ask_store, "first": ask_first}


async def ask(options: argparse.Namespace) -> dict[str, Question]:
    base = foreword.load_base(options.base, dtype=options.dtype)
    versions = filled(base, options.folder, options.prefixes)
    store = Store(options.folder)
    budget = options.prefixes * size_of(Prefix.from_bytes(store.read(versions[0]))) // 20
    engine = LocalEngine(base, store, max_rows=AT_ONCE, prefix_bytes=budget)
    await engine.start()
    try:
        return {name: await QUESTIONS[name](options, base, engine, versions) for name in options.only}
    finally:
        await engine.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--folder", type=Path, required=True, help="where to make the store, and keep it")
    parser.add_argument("--prefixes", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=16, help="of each text, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--fill", action="store_true", help="make the store, and measure nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.fill:
        filled(foreword.load_base(options.base, dtype=options.dtype), options.folder, options.prefixes)
        return
    report(options, asyncio.run(ask(options)))


def report(options: argparse.Namespace, questions: Mapping[str, Question]) -> None:
    table = Table("question", "side", "median", "side", "median", "ratio", "goal")
    for one in questions.values():
        first, second = one.medians
        goal = f"{'>=' if one.at_least else '<='} {one.goal}, {'met' if one.met else 'missed'}"
        table.add_row(
            one.title, one.sides[0], f"{first:,.2f}", one.sides[1], f"{second:,.2f}", f"{one.ratio:.2f}", goal
        )
    Console(width=120).print(table)
    if options.json:
        # beside what earlier runs asked
        asked = json.loads(options.json.read_text()) if options.json.exists() else {}
        settings = {
            "base": options.base,
            "dtype": options.dtype,
            "prefixes": options.prefixes,
            "tokens": options.tokens,
            "length": LENGTH,
            "at_once": AT_ONCE,
        }
        for name, one in questions.items():
            asked[name] = {
                "title": one.title,
                "unit": one.unit,
                "rounds": one.rounds,
                "medians": dict(zip(one.sides, one.medians, strict=True)),
                "ratio": one.ratio,
                "goal": one.goal,
                "met": one.met,
                "settings": settings,
                "machine": machine(),
            }
        write_json(options.json, asked)


if __name__ == "__main__":
    main()
