"""Rows that begin alike against the same rows run one token at a time each, in losses, gradients and what is run."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny import DECODER_ONLY, base_of
from torch import nn

from foreword.attach import Stack, attach
from foreword.bases import Base
from foreword.batching import Batch, collate
from foreword.data import Row
from foreword.families import section_shapes
from foreword.learner import checkpointing
from foreword.loss import token_losses
from foreword.sharing import Shared, common_starts

START, TABLE = [7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]
ROWS = [
    Row([*START, *TABLE], [20, 21, 22]),
    Row([*START, 30, 31], [23]),
    Row([*START, *TABLE], [20, 21, 22, 23, 24, 25, 26]),
    Row([40, *START], [21, 22]),
    Row([*START, *TABLE], [27, 28]),
    Row([*START, *TABLE], [20, 21, 22]),
    Row([*START, *TABLE, 32], [20]),
]
"""Longer together than a window of 7; a row that is there twice, one that another begins with, one that shares nothing."""
OWNERS = [0, 1, 0, 2, 1, 0, -1]


class Slots(nn.Module):
    """Three prefixes that learn, of unequal lengths."""

    def __init__(self, base: Base):
        super().__init__()
        self.shapes = section_shapes(base.model)
        generator = torch.Generator().manual_seed(3)
        self.lengths = torch.tensor([5, 2, 3])
        self.vectors = nn.ParameterList(
            nn.Parameter(torch.randn(2, 3, groups, 5, dim, generator=generator).to(base.dtype))
            for layers in self.shapes.values()
            for groups, dim in layers
        )

    def forward(self) -> Stack:
        (section,) = self.shapes
        return Stack({section: [(both[0], both[1]) for both in self.vectors]}, self.lengths)


def losses_and_gradients(losses: torch.Tensor, learnt: nn.Module) -> dict[str, torch.Tensor]:
    weights = torch.rand(len(losses), generator=torch.Generator().manual_seed(1)).to(losses.dtype)
    (losses * weights).sum().backward()
    found = {"losses": losses.detach()}
    for name, parameter in learnt.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        found[name], parameter.grad = parameter.grad, None
    return found


def plain(attachment: Any, batch: Batch) -> torch.Tensor:
    """Every row with every token of its own."""
    logits = attachment.logits(attachment.states_at(batch.y_positions, batch.inputs))
    return nn.functional.cross_entropy(logits, batch.labels, reduction="none")


@pytest.mark.parametrize("infix", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("owners", [None, OWNERS])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_losses_and_gradients_are_those_of_plain_rows(
    family: str, owners: list[int] | None, recomputed: bool, infix: bool
) -> None:
    base = base_of(family, dtype=torch.float64)
    learnt, batch = Slots(base), collate(base, ROWS)
    run: list[torch.Size] = []
    base.model.get_input_embeddings().register_forward_hook(lambda _, args, __: run.append(args[0].shape))
    with attach(base.model, learnt) as attachment, checkpointing(base, recomputed):
        attachment.rows = None if owners is None else torch.tensor(owners)
        got = losses_and_gradients(token_losses(base, attachment, batch, infix=infix), learnt)
        # what was shared is of that forward pass alone
        expected = losses_and_gradients(plain(attachment, batch), learnt)
    once, every = run
    assert every == batch.inputs["input_ids"].shape
    assert once == (1, len(distinct(owners, infix)))
    # the families whose norms compute in float32 round there
    rtol, atol = (1e-9, 1e-12) if family in ("gpt2", "opt") else (1e-5, 1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=atol)


def distinct(owners: list[int] | None, infix: bool) -> set[Any]:
    """What makes a token of a row what it is: the tokens up to it, the prefix, and where that stands if it was met."""
    found = set()
    for b, row in enumerate(ROWS):
        for t in range(len(row.ids)):
            met = min(len(row.x) - 1, t + 1) if infix else None
            found.add((None if owners is None else owners[b], met, tuple(row.ids[: t + 1])))
    return found


def test_common_starts_are_those_that_a_slow_search_finds() -> None:
    rng = random.Random(5)
    for _ in range(300):
        count = rng.randint(1, 9)
        ids = [[rng.randint(0, 1) for _ in range(rng.randint(1, 7))] for _ in range(count)]
        owners = rng.choice([None, [rng.randint(-1, 1) for _ in range(count)]])
        order, common = common_starts(ids, owners)
        assert sorted(order) == list(range(count))
        seen: set[Any] = set()
        for b in order:
            starts = [((owners or [0] * count)[b], tuple(ids[b][: t + 1])) for t in range(len(ids[b]))]
            assert [start in seen for start in starts] == [t < common[b] for t in range(len(starts))]
            seen |= set(starts)


def test_rows_with_little_in_common_are_run_as_they_are() -> None:
    def tokens(row: int, count: int = 19) -> list[int]:
        return list(range(100 * row, 100 * row + count))

    apart = [tokens(row) for row in range(7)]
    assert Shared.of(apart) is None
    assert Shared.of([apart[0]]) is None
    # one token in twenty is the least that is worth it: of 7 x 20 these are 6 and 7
    assert Shared.of([[1, *row] for row in apart]) is None
    assert Shared.of([[1, *row] for row in [*apart[:6], [apart[5][0], *apart[6][1:]]]]) is not None
    assert Shared.of([[1, *row] for row in [*apart[:6], apart[5]]]) is not None
    # padding is not run either
    assert Shared.of([[1, 2, 3, 4, 5, 6], [7]]) is not None


def test_tensors_come_apart_and_together() -> None:
    shared = Shared.of([[1, 2, 3], [1, 2, 4, 5], [1], [1, 2, 3]])
    assert shared is not None
    tokens = torch.arange(5 * 2 * 3, dtype=torch.float64).view(1, 5, 2, 3).transpose(1, 2)
    rows = shared.apart(tokens)
    assert rows.shape == (4, 2, 4, 3)
    assert torch.equal(rows[0], rows[3])
    assert torch.equal(rows[0, :, :2], rows[1, :, :2])
    assert torch.equal(rows[2], rows[0, :, :1].expand(-1, 4, -1))
    assert not torch.equal(rows[0, :, 2], rows[1, :, 2])
    assert torch.equal(shared.together(rows.transpose(1, 2)), tokens.transpose(1, 2))


def test_a_user_who_is_no_number_stays_away_from_the_others() -> None:
    base = base_of("llama", dtype=torch.float64)
    batch, found = collate(base, ROWS), []
    owners = [max(owner, 0) for owner in OWNERS]  # theirs come first, and are the longest and the shortest
    for poison in (0.0, float("nan")):
        learnt = Slots(base)
        with torch.no_grad():
            for vectors in learnt.vectors:
                vectors[:, 0] += poison
        with attach(base.model, learnt) as attachment:
            attachment.rows = torch.tensor(owners)
            losses = token_losses(base, attachment, batch)
            assert attachment.shared is not None
            finite = losses.detach().isfinite()
            torch.where(finite, losses, 0.0).sum().backward()
        owner = torch.tensor([o for o, row in zip(owners, ROWS, strict=True) for _ in row.y])
        assert torch.equal(finite, (owner != 0) | (poison == 0))
        found.append([losses.detach()[owner != 0], *(v.grad[:, 1:] for v in learnt.vectors if v.grad is not None)])
    assert len(found[0]) == 1 + len(learnt.vectors)
    for healthy, beside in zip(*found, strict=True):
        assert torch.equal(healthy, beside)


@pytest.mark.parametrize("precision", ["bfloat16 base", "autocast"])
def test_in_bfloat16_it_is_the_same_but_for_rounding(precision: str) -> None:
    base = base_of("llama", dtype=torch.bfloat16 if precision == "bfloat16 base" else torch.float32)
    learnt, batch = Slots(base), collate(base, ROWS)
    with attach(base.model, learnt) as attachment, torch.autocast("cpu", enabled=precision == "autocast"):
        got = token_losses(base, attachment, batch)
        assert attachment.shared is not None
        got.sum().backward()
        expected = plain(attachment, batch).float()
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=0.05, atol=0.05)
    assert all(vectors.grad is not None and vectors.grad.isfinite().all() for vectors in learnt.vectors)


def test_the_same_to_the_bit_every_time() -> None:
    base = base_of("gpt2")
    learnt, batch = Slots(base), collate(base, ROWS)
    with attach(base.model, learnt) as attachment:
        first, second = (losses_and_gradients(token_losses(base, attachment, batch), learnt) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
