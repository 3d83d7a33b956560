"""The count of operations against torch's own counter over a training step as it is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import BUILDERS, base_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from foreword.attach import attach
from foreword.batching import collate
from foreword.data import Row
from foreword.limit import Work, product_rate
from foreword.loss import forward_loss
from foreword.reparam import trainable_prefix


class Counter(TorchDispatchMode):
    """torch's own count, without its view by modules, which a function that differentiates inside disturbs."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("family", BUILDERS)
def test_a_step_needs_what_torch_counts(family: str) -> None:
    # in float64, where experts are plain products: torch does not count its product of groups
    base, length = base_of(family, dtype=torch.float64), 5
    row = Row(list(range(7, 18)), list(range(20, 33)))
    attachment = attach(base.model, trainable_prefix(base, length=length, reparametrization="direct"))
    batch = collate(base, [row])
    with Counter() as counter:
        forward_loss(base, attachment, batch).backward()
    counted = counter.total
    needed = Work(base, length).of([row])
    # masked scores are computed all the same
    x, y = len(row.x), len(row.y)
    causal = y if base.is_encoder_decoder else x + y - 1
    masked = Work(base, length)._attention["decoder"] * causal * (causal - 1) / 2
    assert counted == pytest.approx(needed + masked, rel=1e-9)


def test_more_of_anything_needs_more() -> None:
    base = base_of("llama")
    needed = Work(base, 5).of([Row([1] * 7, [2] * 3)])
    assert Work(base, 50).of([Row([1] * 7, [2] * 3)]) > needed
    assert Work(base, 5).of([Row([1] * 8, [2] * 3)]) > needed
    # a token of y has its logits too
    assert Work(base, 5).of([Row([1] * 7, [2] * 4)]) > Work(base, 5).of([Row([1] * 8, [2] * 3)])


def test_what_rows_have_in_common_is_needed_once() -> None:
    base = base_of("llama")
    work, logits = Work(base, 5), 4 * base.embeddings.numel()
    first, second = Row([1, 2, 3, 4, 5], [6, 7, 8]), Row([1, 2, 3, 4, 5], [9, 8, 7, 6])
    start, alone = Row([1, 2, 3, 4, 5], [6]), Row([9], [6])
    assert work.of([start, start]) == work.of([start]) + logits
    assert work.of([first, second]) == work.of([first]) + work.of([second]) - work.of([start]) + logits
    assert work.of([first, alone]) == work.of([first]) + work.of([alone])
    # an infix stands before the last token of x, which is after it, and elsewhere in `longer`
    longer = Row([1, 2, 3, 4, 5, 6], [7, 8])
    assert work.of([first, second], infix=True) == work.of([first, second])
    assert work.of([first, longer], infix=True) > work.of([first, longer])
    bart = Work(base_of("bart"), 5)
    assert bart.of([first, second]) == bart.of([first]) + bart.of([second])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_the_rate_is_of_the_bases_own_products(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes a second for an operation, but half of one in the largest product."""
    base, tokens = base_of(family), 13
    kept = {id(module.weight) for module in base.model.modules() if isinstance(module, torch.nn.Embedding)}
    kept.add(id(base.model.get_output_embeddings().weight))
    each = []
    for p in base.model.parameters():
        if p.ndim > 1 and id(p) not in kept:
            # a token goes to 2 of 5 experts, so that each has 5 of 13
            seen, matrices = (tokens, 1) if p.ndim == 2 else (5, 5)
            each += [2 * seen * p.numel() / matrices] * matrices
    assert min(each) < max(each)

    def seconds(operations: float) -> float:
        return operations / (2 if operations == max(each) else 1)

    class Clock(Counter):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = self.total
            out = super().__torch_dispatch__(func, types, args, kwargs)
            self.total = before + seconds(self.total - before)
            return out

    with Clock() as clock:
        monkeypatch.setattr("foreword.limit.time", SimpleNamespace(perf_counter=lambda: clock.total))
        rate = product_rate(base, tokens)
    assert rate == pytest.approx(sum(each) / sum(map(seconds, each)))


def test_the_rate_is_of_this_machine() -> None:
    rate = product_rate(base_of("llama"), 13, seconds=0.05)
    assert 0 < rate < 1e16
    assert isinstance(rate, float)
