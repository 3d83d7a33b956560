"""The loss: -log p(y | x) of each y token, and nothing of x (Li & Liang 2021, section 4.2).

The logits of a batch, N tokens by V words, are the largest thing in a training step, and are never all there: they are
made for some tokens at a time, and turned where they lie into what their gradient with respect to the hidden states needs,

    d(-log p_y) / d logits = softmax(logits) - onehot(y)

so the forward pass leaves one hidden-sized gradient a token, which the backward pass scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from foreword.attach import Attachment
from foreword.batching import Batch, collate, likeness, passes_of
from foreword.data import Row
from foreword.recompute import without_activations
from foreword.sharing import Shared

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["forward_loss", "mean_loss", "token_losses"]

CHUNK = 12_000_000
"""Logits held at once. In 16 bits they stay below 32 MB, from where on malloc fetches new pages for each."""

BLOCK = 1 << 19
"""Logits that a CPU turns into probabilities at once, in float32: about what its second-level caches hold."""


def forward_loss(base: Base, attachment: Attachment, batch: Batch, *, infix: bool = False) -> torch.Tensor:
    """Sum over the batch's y tokens of -log p(y | x)."""
    return token_losses(base, attachment, batch, infix=infix).sum()


def token_losses(base: Base, attachment: Attachment, batch: Batch, *, infix: bool = False) -> torch.Tensor:
    """[N], -log p of each y token of the batch, in float32; in float64 where the base computes in it."""
    attachment.infix = batch.infix if infix else None
    shared = None if base.is_encoder_decoder else _shared(batch, attachment)
    with without_activations(base.model) if torch.is_grad_enabled() else nullcontext():
        states = attachment.states_at(batch.y_positions, batch.inputs, shared)
    chunk = max(1, CHUNK // base.embeddings.shape[0])
    losses: torch.Tensor = _TokenLosses.apply(states, attachment.logits, batch.labels, chunk, torch.is_grad_enabled())
    return losses


def _shared(batch: Batch, attachment: Attachment) -> Shared | None:
    return Shared.of(
        [row.ids for row in batch.rows],
        None if attachment.rows is None else attachment.rows.tolist(),
        None if attachment.infix is None else attachment.infix.tolist(),
        device=batch.labels.device,
    )


@torch.no_grad()
def mean_loss(
    base: Base, rows: Sequence[Row], attachment: Attachment, *, batch_size: int = 16, infix: bool = False
) -> float:
    """Mean over all y tokens of -log p(y | x), in nats, with whatever is attached."""
    total = 0.0
    key = likeness(base)
    order = sorted(range(len(rows)), key=lambda i: key(rows[i]))
    for start in range(0, len(order), batch_size):
        for together in passes_of(base, [rows[i] for i in order[start : start + batch_size]]):
            total += forward_loss(base, attachment, collate(base, together), infix=infix).item()
    return total / sum(len(row.y) for row in rows)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token from its hidden state: [N, hidden size] and labels [N] to [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        labels: torch.Tensor,
        chunk: int,
        grad: bool,
    ) -> torch.Tensor:
        wanted = grad and ctx.needs_input_grad[0]
        losses = torch.empty(len(labels), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        gradient = torch.empty_like(states) if wanted else None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                own = states[part].detach().requires_grad_(wanted)
                logits = logits_of(own)
            _losses_into(losses[part], logits.detach(), labels[part], wanted)
            if gradient is not None:
                gradient[part] = torch.autograd.grad(logits, own, logits.detach())[0]
        ctx.gradient = gradient
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (ctx.gradient * outer[0][:, None]).to(ctx.gradient.dtype), None, None, None, None


def _losses_into(losses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, gradient: bool) -> None:
    """Fill `losses`, and, where `gradient`, write softmax - onehot over the logits."""
    rows = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        part, labels_N1 = logits[start : start + rows], labels[start : start + rows, None]
        log_p = torch.log_softmax(part, -1, dtype=losses.dtype)
        losses[start : start + rows] = -log_p.gather(1, labels_N1)[:, 0]
        if gradient:
            p = log_p.exp_()
            part.copy_(p.scatter_add_(1, labels_N1, torch.full_like(labels_N1, -1, dtype=p.dtype)))
