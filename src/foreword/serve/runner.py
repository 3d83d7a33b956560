"""The base at work on rows that come and go: x goes through it in chunks, then every row gets a token a step.

Each row sees its own prefix and its own tokens alone, so its logits are those that it would have by itself. One thread
uses it, and decides who comes and goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

from foreword.attach import attach
from foreword.batching import pad
from foreword.prefix import Layer, Prefix
from foreword.serve.cache import RunningCache
from foreword.serve.slots import Slots

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["Prefill", "Row", "Runner"]


@dataclass(eq=False, kw_only=True)
class Row:
    """One text under way.

    Args:
        x: token ids of the input.
        prefix: what stands before it; None for the bare base.
        key: the prefix's content's hash; None for none.
        y: token ids so far; whoever chooses them appends.
    """

    x: Sequence[int]
    prefix: Prefix | None = None
    key: str | None = None
    y: list[int] = field(default_factory=list)


class Prefill:
    """Rows whose x is going through the base. Made by `Runner.prefill`.

    In a decoder-only base that is x, and y where a row had begun before, column by column, as many at a time as one
    likes. In an encoder-decoder base the encoder takes x and the decoder what it has of y, at once.
    """

    def __init__(self, base: Base, rows: Sequence[Row]):
        self.rows = rows
        self.done = 0
        self.cache: Any = DynamicCache()
        given = [[*row.x, *row.y] for row in rows]
        self.x: tuple[torch.Tensor, torch.Tensor] | None = None
        if base.is_encoder_decoder:
            self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            # the encoder's own positions count from the left
            self.x = pad([row.x for row in rows], base.pad_id)
            given = [[base.start_id, *row.y] for row in rows]
        self.lengths = [len(tokens) for tokens in given]
        self.tokens, self.mask = pad(given, base.pad_id, left=True)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def columns(self) -> int:
        """How many are left."""
        return self.tokens.shape[1] - self.done


class Runner:
    """The base, the running rows' caches, and the prefixes beside them.

    The base's model has an attachment from here on, until `detach`.

    Attributes:
        rows: those that get a token a step.

    Raises:
        SettingsError: a prefix is attached to the model already.
    """

    def __init__(self, base: Base):
        self.base = base
        self._slots = Slots(base.shapes, device=base.device, dtype=base.dtype)
        self._attachment = attach(base.model, self._slots)
        base.model.eval()  # a trainer may have left it in training mode, in which there may be no cache
        self.clear()
        self._embedding: Any = None
        if base.is_encoder_decoder:
            self._embedding = getattr(base.model.get_decoder(), "embed_positions", None)
        self._positions: torch.Tensor | None = None
        self._handles = []
        if self._embedding is not None:
            self._handles = [
                self._embedding.register_forward_pre_hook(self._before_positions, with_kwargs=True),
                self._embedding.register_forward_hook(self._after_positions),
            ]

    def clear(self) -> None:
        """No rows, as at the start."""
        self.rows: list[Row] = []
        self._slots.clear()
        self._cache = RunningCache(len(self.base.shapes["decoder"]))
        self._cross = RunningCache(len(self.base.shapes["cross"])) if self.base.is_encoder_decoder else None

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._attachment.detach()

    # BART counts positions from the cache's length, as if all rows were of one age

    def _before_positions(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": self._positions}

    def _after_positions(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.squeeze(0)

    def tokens_with(self, rows: Sequence[Row] = ()) -> int:
        """Cached tokens, padding counted, once these rows have joined and every row has got a token more."""
        span = max(self._cache.span, *(self._tokens_of(row) for row in rows), 0) + 1
        if self._cross:
            span += max(self._cross.span, *(len(row.x) for row in rows), 0)
        return (len(self.rows) + len(rows)) * span

    def _tokens_of(self, row: Row) -> int:
        """Of the decoder; an encoder-decoder base begins with a start token."""
        return 1 + len(row.y) if self._cross else len(row.x) + len(row.y)

    def prefill(self, rows: Sequence[Row]) -> Prefill:
        """Begin with rows, whose prefixes take their slots now."""
        for row in rows:
            if row.key is not None:
                assert row.prefix is not None
                self._slots.take(row.key, row.prefix)
        return Prefill(self.base, rows)

    @torch.no_grad()
    def advance(self, prefill: Prefill, columns: int) -> torch.Tensor | None:
        """Let the next columns of rows that begin go through the base.

        Returns:
            after the last columns the logits of each row's next token, [b, V]; the rows have joined. Else None.
        """
        columns = prefill.columns if self._cross else min(columns, prefill.columns)
        place = slice(prefill.done, prefill.done + columns)
        prefill.done += columns
        last = prefill.columns == 0
        tokens = prefill.tokens[:, place]
        states = self._run(
            prefill.rows,
            tokens,
            prefill.mask[:, : prefill.done],
            prefill.positions[:, place],
            prefill.cache,
            prefill.x,
        )
        if not last:
            return None
        own = prefill.cache.self_attention_cache if self._cross else prefill.cache
        self._cache.join(_layers_of(own), prefill.lengths)
        if self._cross:
            for b, row in enumerate(prefill.rows):
                layers = _layers_of(prefill.cache.cross_attention_cache)
                own_x = [
                    (keys[b : b + 1, :, : len(row.x)], values[b : b + 1, :, : len(row.x)]) for keys, values in layers
                ]
                self._cross.join(own_x, [len(row.x)])
        self.rows += prefill.rows
        return self._attachment.logits(states)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Let each row's last token go through the base. Returns the logits of the next ones, [B, V]."""
        tokens = torch.tensor([[row.y[-1]] for row in self.rows])
        positions = torch.tensor(self._cache.lengths)[:, None]
        self._cache.make_room()
        cache: Any = self._cache
        if self._cross:
            cache = EncoderDecoderCache(self._cache, self._cross)
        states = self._run(self.rows, tokens, self._cache.mask(1), positions, cache, None)
        self._cache.advance()
        return self._attachment.logits(states)

    def _run(
        self,
        rows: Sequence[Row],
        tokens: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        x: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The hidden states of each row's last token, [b, W]: the head, as much work as several layers, runs for no other."""
        device = self.base.device
        self._attachment.rows = torch.tensor([self._slots.slot(row.key) for row in rows])
        inputs: dict[str, Any]
        if not self._cross:
            inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        elif x is not None:
            inputs = {"input_ids": x[0], "attention_mask": x[1]}
        else:
            # what the encoder gave is in the cache; only its shape is looked at
            seen = torch.zeros(1, 1, 1, device=device, dtype=self.base.dtype).expand(len(rows), self._cross.span, 1)
            inputs = {"encoder_outputs": (seen,), "attention_mask": self._cross.mask()}
        if self._cross:
            inputs |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
            self._positions = positions.to(device)
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
        ends = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
        ends[:, -1] = True
        return self._attachment.states_at(ends, {**inputs, "past_key_values": cache, "use_cache": True})

    def leave(self, row: Row) -> None:
        """Let a row go, which has joined."""
        place = self.rows.index(row)
        self._cache.leave(place)
        if self._cross:
            self._cross.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()
        self.give_up([row])

    def give_up(self, rows: Sequence[Row]) -> None:
        """Free the slots of rows that will not join, or have left."""
        for row in rows:
            if row.key is not None:
                self._slots.give(row.key)


def _layers_of(cache: DynamicCache) -> list[Layer]:
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
