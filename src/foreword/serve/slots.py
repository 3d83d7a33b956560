"""The prefixes of the rows under way, side by side, as attention takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from foreword.attach import Stack
from foreword.prefix import Prefix

__all__ = ["Slots"]


class Slots(nn.Module):
    """A stack that changes by one prefix at a time: what `foreword.attach.attach` takes for a source.

    Each prefix is there once, however many rows have it, and is copied once, when the first of them comes. The stack is
    made anew where a slot or a virtual token is lacking, and where it has become more than twice as long as needed.

    Args:
        shapes: for each section, (G, D) of each layer.
        device, dtype: of the stack.
    """

    def __init__(self, shapes: Mapping[str, Sequence[tuple[int, int]]], *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self._shapes, self._device, self._dtype = shapes, device, dtype
        self.clear()

    def forward(self) -> Stack:
        return self._stack

    def clear(self) -> None:
        """No rows, no prefixes."""
        self._prefixes: dict[str, Prefix] = {}
        self._rows: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._stack = self._build(1, 1)

    def slot(self, key: str | None) -> int:
        """The number of a prefix in the stack; -1 for none."""
        return -1 if key is None else self._slots[key]

    def take(self, key: str, prefix: Prefix) -> None:
        """A row with this prefix comes.

        Args:
            key: its content's hash.
        """
        self._rows[key] = self._rows.get(key, 0) + 1
        if key in self._prefixes:
            return
        self._prefixes[key] = prefix
        slots, length = self._stack.shape
        longest = max(one.length for one in self._prefixes.values())
        if len(self._prefixes) > slots or longest > length or longest * 2 < length:
            count = len(self._prefixes)
            self._stack = self._build(count if count <= slots else count + count // 2, longest)
            self._slots = {}
            for other in self._prefixes:
                self._put(other)
        else:
            self._put(key)

    def give(self, key: str) -> None:
        """A row with this prefix went."""
        self._rows[key] -= 1
        if not self._rows[key]:
            del self._rows[key], self._prefixes[key], self._slots[key]

    def _build(self, slots: int, length: int) -> Stack:
        def zeros(groups: int, dim: int) -> torch.Tensor:
            return torch.zeros(slots, groups, length, dim, device=self._device, dtype=self._dtype)

        sections = {
            section: [(zeros(*shape), zeros(*shape)) for shape in layers] for section, layers in self._shapes.items()
        }
        return Stack(sections, torch.zeros(slots, dtype=torch.long))

    def _put(self, key: str) -> None:
        prefix = self._prefixes[key]
        slot = self._slots[key] = min(set(range(self._stack.shape[0])) - set(self._slots.values()))
        assert self._stack.lengths is not None
        self._stack.lengths[slot] = prefix.length
        for section, layers in self._stack.sections.items():
            for stacked, own in zip(layers, prefix.sections[section], strict=True):
                for to, tensor in zip(stacked, own, strict=True):
                    to[slot, :, : prefix.length] = tensor
                    to[slot, :, prefix.length :] = 0
