"""Less is kept for the backward pass, and the gradients are the same to the bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny import BUILDERS, tiny_model
from torch import nn
from transformers import PreTrainedModel

from foreword.recompute import without_activations

UNGATED = ("gpt2", "opt", "gpt_neox", "bart", "pegasus", "t5")


def gradient(model: PreTrainedModel, *, less: bool) -> tuple[int, torch.Tensor]:
    """How often activations were computed, and the gradient of what is added to every embedding."""
    weight = model.get_input_embeddings().weight
    learner = nn.Parameter(torch.zeros(weight.shape[1], dtype=weight.dtype))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    acts = [m for name, m in model.named_modules() if name.endswith((".act_fn", ".act", ".activation_fn"))]
    handles = [module.register_forward_hook(count) for module in acts]
    inputs = {"inputs_embeds": weight[torch.arange(7, 21).view(2, 7)] + learner}
    if model.config.is_encoder_decoder:
        inputs["decoder_inputs_embeds"] = weight[torch.arange(40, 46).view(2, 3)] + learner
    with without_activations(model) if less else nullcontext():
        logits = model(**inputs, use_cache=False).logits
    logits.square().sum().backward()
    for handle in handles:
        handle.remove()
    assert learner.grad is not None
    return calls, learner.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BUILDERS)
def test_gradients_are_the_same_to_the_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype).requires_grad_(False).eval()
    once, expected = gradient(model, less=False)
    again, got = gradient(model, less=True)
    assert expected.abs().max() > 0
    assert torch.equal(got, expected)
    if family not in UNGATED:
        # none was kept
        assert again == 2 * once > 0


def test_an_output_that_is_written_to_is_kept() -> None:
    model = tiny_model("llama").requires_grad_(False).eval()
    written = [m for name, m in model.named_modules() if name.endswith(".act_fn")]
    for module in written:
        module.register_forward_hook(lambda _module, _args, output: output.mul_(3.0))
    _, expected = gradient(model, less=False)
    _, got = gradient(model, less=True)
    assert torch.equal(got, expected)


def test_an_output_seen_otherwise_is_kept() -> None:
    """A view of it has its address and its numbers, in another order."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.act_fn(x).t() * v

    model, x = Turned(), torch.randn(5, 5, generator=torch.Generator().manual_seed(7))
    v = torch.ones(5, 5, requires_grad=True)
    with without_activations(model):
        out = model(x, v)
    out.sum().backward()
    assert v.grad is not None
    assert torch.equal(v.grad, nn.functional.silu(x).t())
