"""The machine's limit: how fast training could be if it were nothing but matrix products at the machine's own rate.

Counted are the floating-point operations that a step needs at the least: the forward pass; the backward pass of the
activations down to the first layer's prefix, and none for frozen weights; attention over prefix and tokens; logits at the
positions of y alone; tokens that rows of a batch have in common once, see `foreword.sharing`. They are held against the
rate of the same products, each measured alone: of as many tokens as a batch has with the base's own weights.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from foreword.data import Row
from foreword.families import sections_of
from foreword.sharing import common_starts

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["Work", "peak_memory", "product_rate", "synchronize"]

_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "o")
"""What the families call the projection that follows attention."""

_OF_X = ("k_proj", "v_proj", "k", "v")
"""What they call those projections of cross-attention that see x."""


_AT_A_TIME = 5
"""Times that a product is made between two looks at the clock, beside which waiting for a GPU is then nothing."""


class Work:
    """Floating-point operations that training needs.

    Args:
        base: the frozen base.
        length: P.
    """

    def __init__(self, base: Base, length: int):
        model = base.model
        sections = sections_of(model)
        self.base, self.length = base, length
        # two products forward, four backward; but nothing that learns is below the first layer's queries
        self._attention = {
            section: 2 * sum(_width(m) * (5 if i == 0 and section != "cross" else 6) for i, m in enumerate(modules))
            for section, modules in sections.items()
        }
        # the first layer's queries, keys and values are of tokens alone: nothing that learns is below them, or OPT's project_in
        first = {
            id(p)
            for section, modules in sections.items()
            if section != "cross"
            for name, child in modules[0].named_children()
            if name not in _OUTPUTS
            for p in child.parameters()
        }
        of_x = set()
        if base.is_encoder_decoder:
            of_x = {id(p) for p in model.get_encoder().parameters()}
            of_x |= {
                id(p)
                for module in sections["cross"]
                for name, child in module.named_children()
                if name in _OF_X
                for p in child.parameters()
            }
        # GPT-NeoX's first MLP is not after attention, but beside it
        beside = getattr(model.config, "use_parallel_residual", False)
        self._of_x = self._of_y = 0.0
        for name, parameter in _weights(base).items():
            # a multiplication and an addition, forward, and backward
            below = id(parameter) in first or "project_in" in name or (beside and ".layers.0.mlp." in name)
            needed = parameter.numel() * _share(base, parameter) * 2 * (1 if below else 2)
            if id(parameter) in of_x:
                self._of_x += needed
            else:
                self._of_y += needed

    def of(self, rows: Sequence[Row], *, infix: bool = False) -> float:
        """For rows of one prefix in one batch, forward and backward.

        Args:
            infix: the virtual tokens stand between x and y.
        """
        length = self.length
        vocab, hidden = self.base.embeddings.shape
        total: float = 2 * 2 * hidden * vocab * sum(len(row.y) for row in rows)
        if self.base.is_encoder_decoder:
            for row in rows:
                x, y = len(row.x), len(row.y)
                total += self._of_x * x + self._of_y * y
                pairs = {"encoder": x * (length + x), "decoder": _causal(y, length), "cross": y * (length + x)}
                total += sum(self._attention[section] * count for section, count in pairs.items())
            return total
        ids = [row.ids for row in rows]
        _, common = common_starts(ids, infix=[len(row.x) - 1 for row in rows] if infix else None)
        for own, others in zip(map(len, ids), common, strict=True):
            total += self._of_y * (own - others)
            total += self._attention["decoder"] * (_causal(own, length) - _causal(others, length))
        return total


def _weights(base: Base) -> dict[str, torch.Tensor]:
    """What tokens are multiplied with, by name: no embeddings, and not the vocabulary's."""
    model = base.model
    skipped = {id(model.get_output_embeddings().weight)}
    skipped |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {name: p for name, p in base.parameters.items() if p.ndim > 1 and id(p) not in skipped}


def _share(base: Base, weight: torch.Tensor) -> float:
    """Of all tokens, those that a matrix sees: all, but of a mixture's experts, [E, …], each has its part."""
    return 1.0 if weight.ndim == 2 else base.model.config.num_experts_per_tok / len(weight)


def _causal(tokens: int, length: int) -> float:
    """Pairs of a token and what it sees."""
    return tokens * (length + (tokens + 1) / 2)


def _width(attention: nn.Module) -> int:
    """H·D of an attention layer."""
    output = next(getattr(attention, name) for name in _OUTPUTS if hasattr(attention, name))
    # transformers' Conv1D, GPT-2's, has its weight the other way round
    return int(output.in_features if isinstance(output, nn.Linear) else output.weight.shape[0])


@torch.no_grad()
def product_rate(base: Base, tokens: int, *, seconds: float = 1.0) -> float:
    """Operations a second of the products of `tokens` tokens with the base's weights, forward and backward.

    A weight of each shape is measured, the best of its tries, and counts as often as the base has that shape.

    Args:
        base: whose weights, but not its embeddings and the vocabulary's.
        tokens: of a batch.
        seconds: to take, about; each shape is tried once at the least.
    """
    by_shape: dict[tuple[torch.Size, int], list[torch.Tensor]] = {}
    for parameter in _weights(base).values():
        seen = max(1, round(tokens * _share(base, parameter)))
        matrices = parameter.view(-1, *parameter.shape[-2:])
        by_shape.setdefault((matrices.shape[1:], seen), []).extend(matrices)
    operations = took = 0.0
    for (shape, seen), alike in by_shape.items():
        x, y = (torch.randn(seen, width, dtype=base.dtype, device=base.device) for width in reversed(shape))
        best, until = math.inf, time.perf_counter() + seconds / len(by_shape)
        while best == math.inf or time.perf_counter() < until:
            synchronize(base.device)
            began = time.perf_counter()
            for _ in range(_AT_A_TIME):
                nn.functional.linear(x, alike[0])
                y @ alike[0]
            synchronize(base.device)
            best = min(best, (time.perf_counter() - began) / _AT_A_TIME)
        operations += len(alike) * 4 * seen * shape.numel()
        took += len(alike) * best
    return operations / took


def peak_memory(base: Base) -> int:
    """The most bytes that there were: of this process on a CPU, of the device on a GPU."""
    if base.device.type == "cuda":
        return torch.cuda.max_memory_allocated(base.device)
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given, before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
