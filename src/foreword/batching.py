"""Rows become batches of about equal lengths, and a batch what the base takes: one forward pass, or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from foreword.data import Row

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["Batch", "batches", "collate", "likeness", "pad", "passes", "passes_of"]

POOL = 32
"""Batches are cut from pools of this many batches, each sorted by what is alike: little padding, and another mix every epoch."""

TOKENS_AT_ONCE = 1 << 12
"""Tokens that go through the base together: on a CPU more take more memory, and are no faster."""

ABOUT = 4
"""Rows whose lengths differ by fewer tokens than this may be taken for equally long where padding costs little."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass takes, right-padded.

    Args:
        inputs: keyword arguments of the model's forward, [B, T].
        y_positions: [B, T] of bool, over the decoder's tokens; where a token of y is predicted.
        labels: [N], all rows' y one after the other, N = `y_positions.sum()`.
        infix: [B], tokens of x before the last, for the paper's infix ablation.
        rows: what it was made of.
    """

    inputs: dict[str, torch.Tensor]
    y_positions: torch.Tensor
    labels: torch.Tensor
    infix: torch.Tensor
    rows: Sequence[Row]


def likeness(base: Base) -> Callable[[Row], Any]:
    """What to sort rows by, so that a base runs those beside each other fast.

    A decoder-only base runs once what rows begin with alike, and padding in attention alone: rows of about one length,
    and among them those whose x begins alike. An encoder-decoder base runs all padding: rows of one length.
    """
    return len if base.is_encoder_decoder else lambda row: (len(row) // ABOUT, row.x)


def batches(
    rows: Sequence[Any], batch_size: int, *, seed: int, epoch: int, key: Callable[[Any], Any] = len
) -> list[list[int]]:
    """Indices of rows in batches, in random order; the same for the same arguments.

    Args:
        key: what to sort rows by; those of a batch were beside each other.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    order = torch.randperm(len(rows), generator=generator).tolist()
    made = []
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lambda i: key(rows[i]))
        made += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


def pad(ids: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and their mask, of ones where a token is real, whatever its id."""
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), pad_id)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for b, row in enumerate(ids):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        tokens[b, place] = torch.tensor(row)
        mask[b, place] = 1
    return tokens, mask


def passes(rows: Sequence[Row], rows_at_once: int) -> list[list[int]]:
    """Which rows go through the base together: the shortest first, TOKENS_AT_ONCE at the most, padding counted.

    Args:
        rows: in any order.
        rows_at_once: no more than so many together.

    Returns:
        indices of the rows; one that is longer than that goes by itself.
    """
    made: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if not made or len(made[-1]) == rows_at_once or (len(made[-1]) + 1) * len(rows[i]) > TOKENS_AT_ONCE:
            made.append([])
        made[-1].append(i)
    return made


def passes_of(base: Base, rows: Sequence[Row]) -> list[list[Row]]:
    """A batch of training in as many passes as it takes: on a GPU one, whose memory is the batch size's to fill."""
    if base.device.type != "cpu":
        return [list(rows)]
    return [[rows[i] for i in sorted(together)] for together in passes(rows, len(rows))]


def collate(base: Base, rows: Sequence[Row]) -> Batch:
    """Rows as one right-padded batch on the base's device."""
    labels = torch.tensor([token for row in rows for token in row.y])
    if base.is_encoder_decoder:
        tokens, mask = pad([row.x for row in rows], base.pad_id)
        seen, seen_mask = pad([[base.start_id, *row.y[:-1]] for row in rows], base.pad_id)
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "decoder_input_ids": seen,
            "decoder_attention_mask": seen_mask,
        }
        y_positions = seen_mask.bool()
    else:
        tokens, mask = pad([row.ids for row in rows], base.pad_id)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        places = torch.arange(tokens.shape[1])
        first = torch.tensor([len(row.x) - 1 for row in rows])[:, None]
        y_positions = (places >= first) & mask.bool()
    return Batch(
        inputs={name: tensor.to(base.device) for name, tensor in inputs.items()},
        y_positions=y_positions.to(base.device),
        labels=labels.to(base.device),
        infix=torch.tensor([len(row.x) - 1 for row in rows]),
        rows=rows,
    )
