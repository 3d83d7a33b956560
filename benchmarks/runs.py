"""Runs of a benchmark: each one JSON file, written when it is done, so that the benchmark goes on where it was stopped.

Several processes beside each other share the runs. Learning rates are chosen by one rule for everybody: three at first,
the best on development data, and while the best is at the edge, another one beyond it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.multiprocessing import ProcessExitedException, spawn

from benchmarks.record import write_json

MOST_RATES = 8
"""Learning rates tried at the most; then the best of them is taken, at the edge or not."""


class Unit(Protocol):
    """What is run once; its name is its file's."""

    @property
    def name(self) -> str: ...


class Runs:
    """The finished runs in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def get(self, name: str) -> dict[str, Any] | None:
        path = self.path(name)
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def matching(self, pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text("utf-8")) for path in sorted(self.folder.glob(f"{pattern}.json"))]

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this run is ours to do: no other process that is alive has claimed it."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".claim").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                try:
                    yield not path.exists()
                finally:
                    Path(file.name).unlink(missing_ok=True)

    def write(self, name: str, result: Mapping[str, Any]) -> None:
        write_json(self.path(name), result)

    def work(self, todo: Callable[[], Sequence[Unit]], run: Callable[[Any], Mapping[str, Any]]) -> None:
        """Do what is to be done, and what is to be done then, until nothing is left or others do it."""
        while True:
            for unit in todo():
                with self.claim(unit.name) as mine:
                    if mine:
                        self.write(unit.name, run(unit))
                        break
            else:
                return


def beside_each_other(work: Callable[..., None], *arguments: Any, processes: int) -> None:
    """Call it in so many processes, each with its share of torch's threads; where one fails, the others are ended."""
    if processes == 1:
        work(*arguments)
        return
    try:
        spawn(_with_its_share, (processes, work, *arguments), nprocs=processes)
    except ProcessExitedException as error:
        # it has said why
        raise SystemExit(error.exit_code) from None


def _with_its_share(_: int, processes: int, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    work(*arguments)


def named(name: str, settings: Mapping[str, Any]) -> str:
    """A file's or a folder's name that tells the flags that are not the usual ones."""
    values = {flag: "-".join(map(str, v)) if isinstance(v, list) else v for flag, v in sorted(settings.items())}
    changed = "".join(f"-{flag.replace('_', '-')}{value}" for flag, value in values.items())
    return (name + changed).strip("/").replace("/", "_")


def best_rate(scores: Mapping[float, float], grid: Sequence[float]) -> tuple[float | None, list[float]]:
    """The learning rate with the best development score; or None, and those that are to be tried next.

    Args:
        scores: development score by learning rate, greater is better; a run that diverged has the least.
        grid: the first three.
    """
    missing = [lr for lr in grid if lr not in scores]
    if missing:
        return None, missing
    best = max(scores, key=lambda lr: scores[lr])
    if len(scores) >= MOST_RATES:
        return best, []
    if best == max(scores):
        return None, [best * 2]
    if best == min(scores):
        return None, [best / 2]
    return best, []
