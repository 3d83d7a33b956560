"""Rows that join and leave a running batch give what each gives alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from serving import ENDS, copy_of, make_base, prefix_for, reference_base
from tiny import MAIN

from foreword.bases import Base
from foreword.data import frame
from foreword.generation import GenerateSettings, generate
from foreword.prefix import Framing, Prefix
from foreword.serve.cache import RunningCache
from foreword.serve.runner import Row, Runner
from foreword.serve.slots import Slots


def rows_of(base: Base, prefixes: Sequence[Prefix | None], count: int, seed: int) -> list[tuple[str, Row]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prefix = draw.choice(prefixes)
        text = "".join(draw.choice("abc xyz") for _ in range(draw.choice((1, 2, 5, 13, 29))))
        x = frame(base, {"input": text}, Framing() if prefix is None else prefix.card.framing)
        rows.append((text, Row(x=x, prefix=prefix, key=None if prefix is None else str(id(prefix)))))
    return rows


def choose(runner: Runner, rows: Sequence[Row], logits: torch.Tensor, limit: int) -> list[Row]:
    """Greedy; lets rows go that have ended, and returns them."""
    ended = []
    for row, scores in zip(list(rows), logits, strict=True):
        row.y.append(int(scores.argmax()))
        if row.y[-1] in ENDS or len(row.y) == limit:
            runner.leave(row)
            ended.append(row)
    return ended


@pytest.mark.parametrize("family", MAIN)
def test_rows_come_and_go(family: str) -> None:
    reference = reference_base(family)
    base = copy_of(reference)
    prefixes = [prefix_for(base, 5), prefix_for(base, 2, template="Say {input}="), prefix_for(base, 23), None]
    waiting = rows_of(base, prefixes, 31, seed=3)
    expected = {
        id(row): generate(reference, [text], [row.prefix], settings=GenerateSettings(max_new_tokens=17))[0]
        for text, row in waiting
    }
    draw = random.Random(7)
    runner = Runner(base)
    most, left, resumed = 0, [row for _, row in waiting], 0
    ended: list[Row] = []
    while len(ended) < 31:
        # a few join at a time, in chunks of a few columns, between others' steps
        if left and draw.random() < 0.4:
            count = min(len(left), draw.choice((1, 2, 3)))
            prefill = runner.prefill([left.pop() for _ in range(count)])
            logits = None
            while logits is None:
                logits = runner.advance(prefill, draw.choice((3, 11, 100)))
                if runner.rows and logits is None:
                    ended += choose(runner, runner.rows, runner.step(), 17)
            ended += choose(runner, prefill.rows, logits, 17)
        if runner.rows and draw.random() < 0.2:
            # one is put off, and begins again where it was
            row = runner.rows[-1]
            runner.leave(row)
            left.insert(0, row)
            resumed += 1
        if runner.rows:
            ended += choose(runner, runner.rows, runner.step(), 17)
        most = max(most, len(runner.rows))
    assert most > 3
    assert resumed > 1
    for row in ended:
        tokens = row.y[:-1] if row.y[-1] in ENDS else row.y
        assert base.decode(tokens) == expected[id(row)]
    assert len(set(expected.values())) > 9, "texts must differ"
    runner.detach()


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_the_cache_holds_no_more_than_is_needed(family: str) -> None:
    base = make_base(family)
    runner = Runner(base)
    rows = [Row(x=[7] * 60, y=[]), *(Row(x=[i, 5], y=[]) for i in range(1, 6))]
    for row in rows:
        assert runner.tokens_with([row]) >= 3
        logits = runner.advance(runner.prefill([row]), 100)
        assert logits is not None
        row.y.append(3)
    # a decoder's columns are of x and y, or of the start token and y, beside its encoder's
    assert runner.tokens_with() == 6 * (61 if family == "llama" else 2 + 60)
    runner.leave(rows[0])
    assert runner.tokens_with() == 5 * (3 if family == "llama" else 2 + 2)
    for _ in range(70):
        runner.step()
        for row in runner.rows:
            row.y.append(3)
    keys = runner._cache._own[0].buffers[0]
    assert keys.shape[0] < 12
    assert keys.shape[2] < 2 * runner._cache.span + 64
    runner.detach()


def test_slots_shrink_and_grow() -> None:
    base = make_base("llama")
    slots = Slots(base.shapes, device=base.device, dtype=base.dtype)
    lengths = {"a": 3, "b": 41, "c": 2, "d": 5, "e": 7}
    prefixes = {key: prefix_for(base, length) for key, length in lengths.items()}

    def check(*keys: str) -> None:
        stack = slots()
        for key in keys:
            slot = slots.slot(key)
            assert stack.lengths is not None
            assert stack.lengths[slot] == lengths[key]
            for stacked, own in zip(stack.sections["decoder"], prefixes[key].sections["decoder"], strict=True):
                assert torch.equal(stacked[0][slot][:, : lengths[key]], own[0])
                assert torch.equal(stacked[1][slot][:, : lengths[key]], own[1])
        assert len({slots.slot(key) for key in keys}) == len(keys)

    assert slots.slot(None) == -1
    for n, key in enumerate("aab"):
        slots.take(key, prefixes[key])
        check(*sorted(set("aab"[: n + 1])))
    assert slots().shape[1] == 41
    slots.give("a")
    check("a", "b")
    slots.give("b")
    slots.take("c", prefixes["c"])
    check("a", "c")
    assert slots().shape[1] == 3
    slots.give("a")
    for key in "de":
        slots.take(key, prefixes[key])
    check("c", "d", "e")
    with pytest.raises(KeyError):
        slots.slot("a")


def test_the_cache_by_itself() -> None:
    cache = RunningCache(2)

    def states(rows: int, columns: int, value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (torch.full((rows, 3, columns, 5), value + layer), torch.full((rows, 3, columns, 7), -value - layer))
            for layer in range(2)
        ]

    cache.join(states(2, 11, 10.0), [11, 4])
    assert cache.mask(1).sum(-1).tolist() == [12, 5]
    for _ in range(3):
        cache.make_room()
        for i in range(2):
            keys, values = cache.update(torch.full((2, 3, 1, 5), 20.0), torch.full((2, 3, 1, 7), -20.0), i)
            assert keys.shape == (2, 3, cache.span + 1, 5)
            assert values.shape == (2, 3, cache.span + 1, 7)
            assert (keys[:, :, -1] == 20).all()
            assert (keys[0, :, -4] == (20 if cache.span > 13 else 10 + i)).all()
        cache.advance()
    assert cache.lengths == [14, 7]
    cache.join(states(1, 31, 30.0), [31])
    assert cache.span == 31
    keys, _ = cache._own[1].seen(cache.end)
    assert (keys[0, 0, -14:-3] == 11).all()
    assert (keys[2] == 31).all()
    everything = [buffer for layer in cache._own for buffer in layer.buffers]
    everything[0][2, :, cache.start : cache.end] = torch.nan
    cache.leave(2)
    assert torch.isfinite(everything[0]).all(), "whoever joins there has it masked, and 0 times NaN is NaN"
    cache.join(states(1, 31, 30.0), [31])
    cache.leave(0)
    assert cache.lengths == [31, 7]
    keys, _ = cache._own[0].seen(cache.end)
    assert (keys[0] == 30).all()
    assert (keys[1, 0, -7:-3] == 10).all()
    cache.leave(0)
    assert (cache.span, cache.lengths) == (7, [7])
    cache.leave(0)
    assert cache.span == 0
