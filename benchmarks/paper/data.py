"""Rows for the paper's studies, from the data folder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks.e2e_rows import DATA, e2e_split
from benchmarks.study import Data, sampled
from foreword.tasks import Example, read, training_rows
from foreword.tasks.webnlg import SEEN_CATEGORIES

HELD_OUT = ("Building", "ComicsCharacter", "Monument", "University", "WrittenWork")
"""The five training categories of WebNLG that stand in for unseen ones: every other, and the last, of the alphabet."""


@cache
def e2e(sample: int, rows: int, dev: int, test: int) -> Data:
    """Rows drawn from all but the development and test meaning representations, which are the same for every sample.

    From the challenge's development set: the training set is not at hand.
    """
    split = e2e_split(rows=1 << 30, dev=dev, test=test)
    return Data(train=sampled(split.train, rows, sample), dev=split.dev, test=split.test)


@cache
def e2e_of_few(sample: int, rows: int, dev: int, test: int) -> Data:
    """The same, but all rows of as few meaning representations as have so many: each sample has its own."""
    split = e2e_split(rows=1 << 30, dev=dev, test=test)
    train = split.train[sample * rows : (sample + 1) * rows]
    if len(train) < rows:
        raise SystemExit(f"expected at most {len(split.train)} training rows in all samples; got {(sample + 1) * rows}")
    return Data(train=train, dev=split.dev, test=split.test)


def _some(examples: Sequence[Example], count: int) -> list[Example]:
    """So many at the most, the same every time."""
    chosen = list(examples)
    random.Random(0).shuffle(chosen)
    return chosen[:count]


def _apart(examples: Sequence[Example], *kept: Sequence[Example]) -> list[Example]:
    """Those whose input none of `kept` has: the data sets' own splits share some."""
    inputs = {one.input for part in kept for one in part}
    return [one for one in examples if one.input not in inputs]


@cache
def webnlg(sample: int, rows: int, dev: int, test: int, official: str | None) -> Data:
    """Training entries of five categories; test entries, as many of those five as of the five held out.

    Args:
        official: the challenge's own test folder; then all ten categories are trained on, and its five are the unseen.
    """
    train, _ = read("webnlg", DATA / "webnlg" / "train")
    other, _ = read("webnlg", DATA / "webnlg" / "dev")
    seen = [name for name in SEEN_CATEGORIES if official or name not in HELD_OUT]
    dev_entries = _some([one for one in other if one.category in seen], dev)
    if official:
        tried, _ = read("webnlg", Path(official))
    else:
        taken = {one.id for one in dev_entries}
        tried = _apart([one for one in other if one.id not in taken], dev_entries)
    known = _some([one for one in tried if one.category in seen], test)
    unknown = _some([one for one in tried if one.category not in seen], test)
    train = _apart([one for one in train if one.category in seen], dev_entries, known, unknown)
    return Data(
        train=sampled(training_rows(train), rows, sample),
        dev=dev_entries,
        test=[*known, *unknown],
        groups={
            "seen": range(len(known)),
            "unseen": range(len(known), len(known) + len(unknown)),
        },
    )


@cache
def synopsis(sample: int, rows: int, dev: int, test: int) -> Data:
    """Debian packages' long descriptions and their one-line synopses; learning rates are chosen on training rows left out."""
    train, _ = read("summarization", DATA / "debian-synopsis" / "train.jsonl")
    tried, _ = read("summarization", DATA / "debian-synopsis" / "dev.jsonl")
    tried = tried[:test]
    chosen = _some(_apart(train, tried), dev)
    return Data(
        train=sampled(training_rows(_apart(train, chosen, tried)), rows, sample),
        dev=chosen,
        test=tried,
    )
