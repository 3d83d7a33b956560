"""The loss in chunks against torch's own cross-entropy over all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BUILDERS, tiny_model, tiny_tokenizer

from foreword import loss
from foreword.attach import attach
from foreword.bases import Base
from foreword.batching import Batch, collate
from foreword.data import rows_of
from foreword.loss import forward_loss, token_losses
from foreword.prefix import Framing
from foreword.reparam import trainable_prefix


def tiny_base(family: str, **how: Any) -> Base:
    return Base(tiny_model(family, **how), tiny_tokenizer(family), f"tiny {family}")


ROWS = [{"input": "ab" * n, "output": "cde"[: 1 + n % 3] * n} for n in (2, 5, 3, 7, 1)]


def reference(base: Base, batch: Batch) -> torch.Tensor:
    logits = base.model(**batch.inputs, use_cache=False).logits[batch.y_positions]
    return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")


@pytest.mark.parametrize("tokens_at_once", [1, 7, 10_000])
@pytest.mark.parametrize("family", BUILDERS)
def test_losses_and_gradients_are_cross_entropys(
    family: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(family)
    vocab = len(base.embeddings)
    monkeypatch.setattr(loss, "CHUNK", tokens_at_once * vocab)
    monkeypatch.setattr(loss, "BLOCK", 3 * vocab)
    batch = collate(base, rows_of(base, ROWS, Framing()))
    weights = torch.rand(len(batch.labels), generator=torch.Generator().manual_seed(1))
    trainable = trainable_prefix(base, length=3, reparametrization="direct")
    got, expected = {}, {}
    with attach(base.model, trainable) as attachment:
        for losses, gradients in ((token_losses(base, attachment, batch), got), (reference(base, batch), expected)):
            gradients["loss"] = losses.detach()
            (losses * weights).sum().backward()
            for name, parameter in trainable.named_parameters():
                assert parameter.grad is not None
                assert parameter.grad.abs().max() > 0
                gradients[name] = parameter.grad.clone()
            trainable.zero_grad()
    assert len(batch.labels) > 7
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5 if family == "olmo2" else 1e-6)


def test_few_logits_are_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = tiny_base("llama"), []
    monkeypatch.setattr(loss, "CHUNK", 3 * len(base.embeddings))
    batch = collate(base, rows_of(base, ROWS, Framing()))
    with attach(base.model, trainable_prefix(base, length=3, reparametrization="direct")) as attachment:
        base.model.get_output_embeddings().register_forward_hook(lambda _, __, out: rows.append(out.numel()))
        token_losses(base, attachment, batch).sum().backward()
    assert len(batch.labels) > 9
    assert max(rows) <= 3 * len(base.embeddings)


def test_losses_of_logits_in_bfloat16_are_not_rounded_to_it() -> None:
    base = tiny_base("llama", dtype=torch.bfloat16)
    batch = collate(base, rows_of(base, ROWS, Framing()))
    with (
        attach(base.model, trainable_prefix(base, length=3, reparametrization="direct")) as attachment,
        torch.no_grad(),
    ):
        logits = base.model(**batch.inputs, use_cache=False).logits[batch.y_positions].float()
        expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        torch.testing.assert_close(token_losses(base, attachment, batch), expected, rtol=1e-5, atol=1e-5)


def test_an_infix_of_one_batch_is_not_the_next_ones() -> None:
    base = tiny_base("llama")
    batch = collate(base, rows_of(base, ROWS, Framing()))
    with attach(base.model, trainable_prefix(base, length=3, reparametrization="direct")) as attachment:
        before = token_losses(base, attachment, batch).detach()
        assert not torch.allclose(token_losses(base, attachment, batch, infix=True).detach(), before)
        assert torch.equal(token_losses(base, attachment, batch).detach(), before)


def test_without_gradients_nothing_is_made_for_them() -> None:
    base = tiny_base("llama")
    batch = collate(base, rows_of(base, ROWS, Framing()))
    with attach(base.model, trainable_prefix(base, length=3, reparametrization="direct")) as attachment:
        with torch.no_grad():
            silent = token_losses(base, attachment, batch)
        loud = token_losses(base, attachment, batch)
    assert not silent.requires_grad
    assert loud.requires_grad
    torch.testing.assert_close(silent, loud.detach())


def test_a_base_in_bfloat16_gives_losses_in_float32() -> None:
    base = tiny_base("llama", dtype=torch.bfloat16)
    batch = collate(base, rows_of(base, ROWS, Framing()))
    trainable = trainable_prefix(base, length=3, reparametrization="direct")
    with attach(base.model, trainable) as attachment:
        total = forward_loss(base, attachment, batch)
        assert total.dtype == torch.float32
        total.backward()
        assert total.item() == pytest.approx(reference(base, batch).float().sum().item(), rel=2e-2)
