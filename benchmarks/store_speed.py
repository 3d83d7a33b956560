"""Does the store stay fast? The same operations on a store of 100,000 names and on one of 100.

    python -m benchmarks.store_speed
    python -m benchmarks.store_speed --folder /mnt/disk/stores --json benchmarks/results/store_speed.json

Both stores lie in one folder and take turns, round by round, on names drawn at random; a figure is the median of all
operations of a kind. Polls find nothing new; after busy minutes they list what was announced in the last two. Puts are
flushed to the disk, so a put is mostly the disk's time: give a folder in memory (/dev/shm) to see the store's own. The
goal: get and put at 100,000 names within 1.5 times those at 100.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.record import machine, write_json
from foreword.prefix import Card, Prefix
from foreword.store import Store

GOAL = 1.5


def prefix_bytes(seed: int) -> bytes:
    """A prefix file of some kB: 4 layers of 2 heads, 8 virtual tokens."""
    generator = torch.Generator().manual_seed(seed)
    layers = [tuple(torch.randn(2, 8, 16, generator=generator) for _ in range(2)) for _ in range(4)]
    card = Card(base="tiny", fingerprint="0" * 64, training={"seed": seed}, created="2026-01-01T00:00:00+00:00")
    return Prefix({"decoder": layers}, card).to_bytes()  # type: ignore[dict-item]


def name_of(i: int) -> str:
    return f"user-{i:06d}@example.org"


def filled(folder: Path, count: int, contents: list[bytes]) -> Store:
    """A store of `count` names; what an earlier run put there is kept."""
    store = Store(folder, create=True)
    there = {change.version.name for change in store.changes().items if change.version}
    missing = [name for i in range(count) if (name := name_of(i)) not in there]
    for i, name in enumerate(track(missing, f"putting {len(missing)} names", disable=len(missing) < 1000)):
        store.put(name, contents[i % len(contents)])
    if missing:
        store.rebuild()
    return store


class Side:
    """One store, and what was measured of it, in seconds by kind."""

    def __init__(self, folder: Path, count: int, contents: list[bytes]):
        self.folder, self.count, self.contents = folder, count, contents
        self.store = filled(folder, count, contents)
        # its clock says that the last change is a quarter of an hour ago
        self.later = Store(folder, clock=lambda: time.time() + 900)
        self.store.page()
        self.token = self.store.changes().token
        self.times: dict[str, list[float]] = {}
        self.random = random.Random(count)
        for change in self.store.changes().items:
            # a hundred names are always in the system's cache; so are all then, if memory allows
            assert change.version is not None
            self.store.get(change.version.name)

    def time(self, kind: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        self.times.setdefault(kind, []).append(time.perf_counter() - start)

    def round(self, operations: int) -> None:
        for _ in range(operations):
            name = name_of(self.random.randrange(self.count))
            self.time("get", lambda name=name: self.store.get(name))  # type: ignore[misc]
        for i in range(operations):
            name, data = name_of(self.random.randrange(self.count)), self.contents[i % len(self.contents)]
            self.time("put, a known name", lambda name=name, data=data: self.store.put(name, data))  # type: ignore[misc]
        for i in range(operations):
            name, data = f"new {i}", self.contents[i % len(self.contents)]
            self.time("put, a new name", lambda name=name, data=data: self.store.put(name, data))  # type: ignore[misc]
        for i in range(operations):
            self.time("delete", lambda name=f"new {i}": self.store.delete(name))  # type: ignore[misc]
        self.token = self.store.changes(self.token).token
        self.time("poll, busy minutes", lambda: self.store.changes(self.token))
        token = self.later.changes(self.token).token
        self.time("poll, quiet minutes", lambda: self.later.changes(token))
        self.store.page()
        self.time(
            "page of 100",
            lambda: self.store.page(name_of(self.random.randrange(self.count)), 100),
        )
        if len(self.times["get"]) == operations:
            self.time("a process's first page", lambda: Store(self.folder).page())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where to make both stores, and keep them; default: a temporary one"
    )
    parser.add_argument("--small", type=int, default=100, help="names")
    parser.add_argument("--large", type=int, default=100_000, help="names")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--operations", type=int, default=25, help="of each kind, each round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        contents = [prefix_bytes(seed) for seed in range(97)]
        sides = [Side(folder / str(count), count, contents) for count in (options.small, options.large)]
        for side in sides:
            side.round(3)
            side.times.clear()
        for i in range(options.rounds):
            # neither side is always the one that comes after the other
            for side in sides if i % 2 else sides[::-1]:
                side.round(options.operations)
        report(options, len(contents[0]), *(side.times for side in sides))


def report(
    options: argparse.Namespace, size: int, small: dict[str, list[float]], large: dict[str, list[float]]
) -> None:
    table = Table(
        "operation", f"{options.small:,} names, ms", f"{options.large:,} names, ms", "ratio", f"goal {GOAL}",
        title=f"store, files of {size / 1000:.1f} kB, medians",
    )  # fmt: skip
    medians = {}
    for kind, times in small.items():
        a, b = statistics.median(times), statistics.median(large[kind])
        medians[kind] = {"small_ms": 1e3 * a, "large_ms": 1e3 * b, "ratio": b / a, "operations": len(times)}
        goal = ("met" if b <= GOAL * a else "missed") if kind.startswith(("get", "put")) else ""
        table.add_row(kind, f"{1e3 * a:.3f}", f"{1e3 * b:.3f}", f"{b / a:.2f}", goal)
    Console().print(table)
    if options.json:
        result = {
            "settings": {"small": options.small, "large": options.large, "rounds": options.rounds,
                         "operations": options.operations, "bytes": size},
            "machine": machine(),
            "medians": medians,
        }  # fmt: skip
        write_json(options.json, result)


if __name__ == "__main__":
    main()
