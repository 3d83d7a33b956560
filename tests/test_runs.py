"""Processes beside each other share the runs of a benchmark."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.runs import Runs, beside_each_other


class One(NamedTuple):
    name: str


def one_of_two(folder: str) -> None:
    """Two runs, of which each waits for the other to be begun."""
    runs = Runs(Path(folder) / "runs")

    def run(unit: One) -> dict[str, Any]:
        (Path(folder) / unit.name).touch()
        until = time.monotonic() + 60
        while not all((Path(folder) / name).exists() for name in "ab"):
            assert time.monotonic() < until, "the other has not begun"
            time.sleep(0.05)
        return {"process": os.getpid(), "threads": torch.get_num_threads()}

    runs.work(lambda: [One(name) for name in "ab" if runs.get(name) is None], run)


def what_fails(folder: str) -> None:
    raise SystemExit("this is why")


def test_processes_share_the_runs_and_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))  # what a new process of torch's begins with
    beside_each_other(one_of_two, str(tmp_path), processes=2)
    made = Runs(tmp_path / "runs").matching("*")
    assert len({one["process"] for one in made} | {os.getpid()}) == 3
    assert [one["threads"] for one in made] == [max(1, cores // 2)] * 2


def test_one_process_is_this_one() -> None:
    seen: list[tuple[int, str]] = []
    beside_each_other(lambda word: seen.append((os.getpid(), word)), "here", processes=1)
    assert seen == [(os.getpid(), "here")]


def test_what_fails_in_a_process_fails_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as failed:
        beside_each_other(what_fails, str(tmp_path), processes=2)
    assert failed.value.code == 1
    assert "this is why" in capfd.readouterr().err
