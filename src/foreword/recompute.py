"""What is made again in the backward pass rather than kept: activation functions' outputs, whose inputs are kept too.

A gated MLP, down(act(gate(x)) * up(x)), keeps three wide tensors a token and layer: the input of act for act's own
gradient, its output and up(x) for the product's. The output is made again in the backward pass instead, by the base's own
module, at a hundredth of a step's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["without_activations"]


@contextmanager
def without_activations(model: nn.Module) -> Iterator[None]:
    """Run the model's forward pass in this block; gradients are the same to the bit."""
    # of the last activation that ran; it is held, so that no other tensor can be where it is
    last: tuple[torch.Tensor, nn.Module, torch.Tensor] | None = None

    def ran(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal last
        last = (output, module, args[0])

    def pack(tensor: torch.Tensor) -> Any:
        nonlocal last
        if last is None or not _same(tensor, last[0]):
            return tensor
        _, *how = last
        last = None
        return how

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        module, given = kept
        with torch.no_grad():
            made: torch.Tensor = module(given)
        return made

    handles = [module.register_forward_hook(ran) for module in _activations(model)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are one tensor that nobody has written to since it was made."""
    where = (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    return where and b._version == 0


def _activations(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers' MLPs call so."""
    names = ("act_fn", "act", "activation_fn")
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
