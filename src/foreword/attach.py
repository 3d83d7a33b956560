"""How a prefix meets a base: inside its attention, in one place for every family.

For each attention layer the base computes queries, keys and values as ever; then

    Attn(x) = softmax(Q [K_prefix; K]^T / sqrt(D) + mask) [V_prefix; V]

where K_prefix and V_prefix are the prefix's own (Li & Liang 2021, section 4.1). transformers lets a function be
registered in the place of attention, and sees to it that every layer of every family calls it: ours, in
`foreword.attention`, asks here for what stands before a layer's keys. So nothing of the base is copied, replaced or
patched, and the same code serves encoders, decoders and cross-attention, with and without a cache, under gradient
checkpointing, and in a batch whose rows have different prefixes.

Positions: in a decoder-only base x starts at position P; position ids given by a caller count tokens, and P is added
here. In an encoder-decoder base tokens keep their positions, and relative biases of prefix keys are zero.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from foreword.attention import NAME, Mask
from foreword.errors import SettingsError, WrongBaseError
from foreword.families import section_shapes, sections_of
from foreword.prefix import Layer, Prefix
from foreword.sharing import Shared

__all__ = ["Attachment", "Stack", "attach", "check_free", "lock_of"]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCK = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """What a thread holds while it attaches to a model, or runs it: what is attached answers whoever calls the model."""
    with _LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def check_free(model: PreTrainedModel) -> None:
    """Raise `SettingsError` where something is attached to a model."""
    if any(NAME in module.__dict__ for modules in sections_of(model).values() for module in modules):
        raise SettingsError("the model already has a prefix attached: detach that one first")


@dataclass(frozen=True, eq=False)
class Stack:
    """N prefixes side by side, as attention takes them.

    Args:
        sections: for each section the layers' keys and values, each [N, G, P, D]; P is the longest's length.
        lengths: [N], on the CPU; prefix n has its vectors in the first `lengths[n]` places. None: all have P.
    """

    sections: Mapping[str, Sequence[Layer]]
    lengths: torch.Tensor | None = None

    @classmethod
    def of(cls, prefixes: Sequence[Prefix], *, device: torch.device, dtype: torch.dtype) -> Stack:
        """Stack prefixes of any lengths, the shorter ones padded at their end.

        Raises:
            WrongBaseError: the prefixes are not of one base.
        """
        for prefix in prefixes:
            if prefix.shapes != prefixes[0].shapes:
                raise WrongBaseError(
                    f"expected prefixes of one base; got {_describe(prefixes[0].shapes)} (of {prefixes[0].card.base!r}) and "
                    f"{_describe(prefix.shapes)} (of {prefix.card.base!r})"
                )
        lengths = torch.tensor([prefix.length for prefix in prefixes])
        longest = int(lengths.max())

        def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            groups, _, dim = tensors[0].shape
            out = torch.zeros(len(tensors), groups, longest, dim, device=device, dtype=dtype)
            for n, tensor in enumerate(tensors):
                out[n, :, : tensor.shape[1]] = tensor
            return out

        sections = {
            section: [
                (
                    stack([p.sections[section][i][0] for p in prefixes]),
                    stack([p.sections[section][i][1] for p in prefixes]),
                )
                for i in range(len(prefixes[0].sections[section]))
            ]
            for section in prefixes[0].sections
        }
        return cls(sections, None if (lengths == longest).all() else lengths)

    @property
    def shapes(self) -> dict[str, list[tuple[int, int]]]:
        """For each section, (G, D) of each layer."""
        return {
            section: [(keys.shape[1], keys.shape[3]) for keys, _ in layers] for section, layers in self.sections.items()
        }

    @property
    def shape(self) -> tuple[int, int]:
        """(N, P)."""
        keys = next(iter(self.sections.values()))[0][0]
        return keys.shape[0], keys.shape[2]


class Attachment:
    """What one attached model's attention layers look up while they run. Made by `attach`.

    Under gradient checkpointing they run again in the backward pass: `rows` and `infix` must stay until then.

    Attributes:
        rows: [B], on the CPU, which of the N prefixes each row of the batch has, -1 for none; None gives every row
            prefix 0. Where the batch holds k times as many rows (beams), each entry counts for k rows in turn.
        infix: [B] or None; for the paper's infix ablation, decoder-only: how many places of each row, padding counted,
            stand before the virtual tokens and so don't see them.
        shared: which tokens the rows of the latest forward pass had in common, see `states_at`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Stack | nn.Module,
        save: Callable[[str | PathLike[str]], None] | None = None,
    ):
        self.model = model
        self.source = source
        self.rows: torch.Tensor | None = None
        self.infix: torch.Tensor | None = None
        self._signature = inspect.signature(model.forward)
        self._refreshed = False
        self._cached = 0
        self._y_positions: torch.Tensor | None = None
        self._coming: Shared | None = None
        self.shared: Shared | None = None
        self._states: torch.Tensor | None = None
        self._masks: dict[tuple[int, ...], tuple[torch.Tensor | None, Mask]] = {}
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.stack: Stack | None = source if isinstance(source, Stack) else None

        self._handles: list[Any] = []
        with lock_of(model):
            check_free(model)
            self._implementation = model.config._attn_implementation
            try:
                self._begin(save)
            except BaseException:
                # Ctrl-C: nobody has a handle yet to detach by
                self.detach()
                raise

    def _begin(self, save: Callable[[str | PathLike[str]], None] | None) -> None:
        model = self.model
        for section, modules in sections_of(model).items():
            for i, module in enumerate(modules):
                module.__dict__[NAME] = (self, section, i)
        model.set_attn_implementation(NAME)
        hold = self._handles.append
        hold(model.register_forward_pre_hook(self._before, with_kwargs=True))
        hold(model.register_forward_hook(self._after, always_call=True))
        hold(model.get_output_embeddings().register_forward_pre_hook(self._before_logits))
        if model.config.is_encoder_decoder:
            # generation calls the encoder by itself
            hold(model.get_encoder().register_forward_pre_hook(self._refresh))
        if isinstance(self.source, nn.Module):
            model.requires_grad_(False)
            model.add_module(NAME, self.source)
        if save is not None:
            # what transformers' Trainer calls, on a model that stays a PreTrainedModel
            model.__dict__["save_pretrained"] = lambda folder, *_, **__: save(folder)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.detach()
        except BaseException:
            self.detach()  # Ctrl-C came in the middle
            raise

    def detach(self) -> None:
        """Leave the model as it was, but for `requires_grad`, which stays off where a trainable prefix was attached."""
        for handle in self._handles:
            handle.remove()
        layers = [module for modules in sections_of(self.model).values() for module in modules]
        own = [module for module in layers if module.__dict__.get(NAME, (None,))[0] is self]
        if not own:
            return  # detached before; what is attached now is another's
        self.model._modules.pop(NAME, None)
        self.model.__dict__.pop("save_pretrained", None)
        self.model.set_attn_implementation(self._implementation)
        # last, so that one that was interrupted can be done again
        for module in own:
            del module.__dict__[NAME]

    def _refresh(self, *_: object) -> None:
        if not self._refreshed:
            self._masks.clear()
            self._places.clear()
            if isinstance(self.source, nn.Module):
                self.stack = self.source()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # also after a forward pass that Ctrl-C ended, of which torch tells no hook
        self._refreshed = False
        self._refresh()
        self._refreshed = True
        self.shared = self._coming
        if self.model.config.is_encoder_decoder:
            return args, kwargs
        given = self._signature.bind(*args, **kwargs).arguments
        kwargs = {**given.pop("kwargs", {}), **given}
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs  # the model itself says what it expects
        cache, mask, positions = (kwargs.get(k) for k in ("past_key_values", "attention_mask", "position_ids"))
        self._cached = 0 if cache is None else int(cache.get_seq_length())
        if positions is None:
            positions = self._token_positions(tokens, mask)
        if self.infix is not None and mask is None:
            # without a mask, transformers takes a leap in the positions for the start of another text
            kwargs["attention_mask"] = tokens.new_ones(
                tokens.shape[0], self._cached + tokens.shape[1], dtype=torch.long
            )
        positions = positions + self._offsets(tokens.shape[0], tokens.shape[1], tokens.device)
        if self.shared is not None:
            kwargs["input_ids"] = tokens.flatten()[self.shared.first][None]
            positions = positions.expand(tokens.shape).flatten()[self.shared.first][None]
            # of four dimensions, for which transformers makes no other: attention has that of the rows
            kwargs["attention_mask"] = tokens.new_ones(1, 1, 1, 1, dtype=torch.bool)
        kwargs["position_ids"] = positions
        return (), kwargs

    def _after(self, *_: object) -> None:
        self._refreshed = False

    def _token_positions(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B or 1, T]: the place of each token among its row's tokens, padding not counted."""
        if mask is not None and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return torch.arange(self._cached, self._cached + tokens.shape[1], device=tokens.device)[None]

    def _offsets(self, batch: int, length: int, device: torch.device) -> torch.Tensor | int:
        """What the virtual tokens add to token positions: P, or per row [B, 1], or per token [B, T]."""
        assert self.stack is not None
        _, longest = self.stack.shape
        if self.rows is None and self.infix is None:
            return longest if self.stack.lengths is None else int(self.stack.lengths[0])
        rows = self._rows_of(batch)
        lengths = torch.full((rows.shape[0],), longest) if self.stack.lengths is None else self.stack.lengths[rows]
        offsets = torch.where(rows >= 0, lengths, 0)[:, None].to(device)
        return offsets if self.infix is None else offsets * self._after_infix(batch, length, device)

    def _rows_of(self, batch: int) -> torch.Tensor:
        """[B], on the CPU: `rows`, or zeros, each entry repeated where a batch of beams is that many times as large."""
        if self.rows is None:
            return torch.zeros(batch, dtype=torch.long)
        assert batch % len(self.rows) == 0, f"{len(self.rows)} rows were announced, the batch has {batch}"
        return self.rows.repeat_interleave(batch // len(self.rows))

    def _after_infix(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """[B, T] of bool: which tokens stand after the infix."""
        assert self.infix is not None
        places = torch.arange(self._cached, self._cached + length, device=device)
        return places >= self.infix.to(device).repeat_interleave(batch // len(self.infix))[:, None]

    def states_at(
        self, y_positions: torch.Tensor, inputs: Mapping[str, Any], shared: Shared | None = None
    ) -> torch.Tensor:
        """Run the base, and return what its logits would be computed from, at these positions alone.

        Args:
            y_positions: [B, T] of bool.
            inputs: keyword arguments of the model's forward; there is no cache but by `use_cache` among them.
            shared: which of the tokens the rows have in common: these are run once. The base is decoder-only then, and the
                inputs are right-padded `input_ids` [B, T] with their mask.

        Returns:
            [number of positions, hidden size], row by row; see `logits`.
        """
        self._y_positions, self._coming = y_positions, shared
        try:
            self.model(**{"use_cache": False, **inputs})
            assert self._states is not None
            return self._states
        finally:
            self._y_positions = self._states = self._coming = None

    def _before_logits(self, head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._y_positions is None:
            return None
        (hidden,) = args
        if self.shared is None:
            self._states = hidden[self._y_positions]
        else:
            self._states = hidden[0, self.shared.places[self._y_positions]]
        return (hidden[:, :0],)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What the base makes of its last hidden states, [N, hidden size] to [N, V]."""
        model: Any = self.model
        logits: torch.Tensor = model.get_output_embeddings()(states)
        if (bias := getattr(model, "final_logits_bias", None)) is not None:
            logits = logits + bias
        if (divisor := getattr(model.config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def extend(
        self,
        section: str,
        i: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Mask]:
        """Put the prefix before one layer's keys and values, [B, G, K, D], and its columns before the mask.

        Returns:
            keys and values, [B, G, P + K, D], and the mask, [B or 1, 1, T, P + K].
        """
        assert self.stack is not None, "the model's encoder or decoder was called by itself"
        batch = keys.shape[0]
        prefix_keys, prefix_values = (tensor.to(keys.dtype) for tensor in self.stack.sections[section][i])
        if self.rows is None:
            shape = (batch, *prefix_keys.shape[1:])
            prefix_keys, prefix_values = prefix_keys[:1].expand(shape), prefix_values[:1].expand(shape)
        else:
            if batch not in self._places:
                # once a forward pass: each copy to a GPU waits for all that it was given before
                rows = self._rows_of(batch)
                bare = (rows < 0)[:, None, None, None].to(keys.device) if bool((rows < 0).any()) else None
                self._places[batch] = rows.clamp(min=0).to(keys.device), bare
            places, bare = self._places[batch]
            prefix_keys, prefix_values = prefix_keys[places], prefix_values[places]
            if bare is not None:
                # they see none of it; and no mask hides what overflows
                prefix_keys, prefix_values = prefix_keys.masked_fill(bare, 0), prefix_values.masked_fill(bare, 0)
        # every layer of a kind is handed the same mask
        key = (id(mask), batch, query.shape[2], keys.shape[2])
        if key not in self._masks:
            extended = self._extend_mask(mask, *key[1:], device=keys.device)
            self._masks[key] = mask, Mask(extended, query.shape[2], prefix_keys.shape[2] + keys.shape[2])
        keys, values = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)
        return keys, values, self._masks[key][1]

    def _extend_mask(
        self, mask: torch.Tensor | None, batch: int, queries: int, length: int, *, device: torch.device
    ) -> torch.Tensor | None:
        assert self.stack is not None
        count, longest = self.stack.shape
        everywhere = self.infix is None and self.stack.lengths is None
        if everywhere and (self.rows is None or bool((self.rows >= 0).all())):
            if mask is None:
                return None
            sees = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        else:
            rows = self._rows_of(batch)
            lengths = torch.full((count,), longest) if self.stack.lengths is None else self.stack.lengths
            own = torch.where(rows >= 0, lengths[rows], 0)
            sees = (torch.arange(longest) < own[:, None]).to(device)[:, None, None, :]
            if self.infix is not None:
                sees = sees & self._after_infix(batch, queries, device)[:, None, :, None]
        if mask is None:
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(batch, 1, queries, length)
        if sees.shape[0] > 1:
            mask = mask.expand(batch, -1, -1, -1)
        sees = sees.expand(*mask.shape[:3], longest)
        if mask.dtype != torch.bool:
            sees = torch.zeros_like(sees, dtype=mask.dtype).masked_fill(~sees, torch.finfo(mask.dtype).min)
        return torch.cat([sees, mask], dim=-1)


def attach(
    model: PreTrainedModel,
    source: Prefix | Stack | nn.Module,
    *,
    save: Callable[[str | PathLike[str]], None] | None = None,
) -> Attachment:
    """Attach one prefix, a stack of them, or a trainable one, to a model.

    The model keeps its class, its parameters and its forward. Use it in a `with` statement, or call `detach`.

    Args:
        model: a causal or sequence-to-sequence language model of a supported family.
        source: a `Prefix`; a `Stack`, with `rows` set on what is returned; or a module whose `forward()` gives a
            `Stack`, called anew in every forward pass. A module becomes the model's submodule `foreword`, and all the
            model's own parameters stop requiring gradients.
        save: what the model's `save_pretrained(folder)` does meanwhile. Default: as ever.

    Returns:
        the attachment.

    Raises:
        BaseLoadError: the model's family is not supported.
        WrongBaseError: the prefix's layers are not shaped like the model's.
        SettingsError: a prefix is attached already; or the model, or what is to be attached, is something else.
    """
    if not isinstance(model, PreTrainedModel):
        raise SettingsError(f"expected a model of transformers, such as base.model; got {type(model).__name__}")
    if not isinstance(source, Prefix | Stack | nn.Module):
        raise SettingsError(
            f"expected a Prefix, a Stack or a module to attach; got {type(source).__name__}: see Prefix.load and Stack.of"
        )
    if isinstance(source, Prefix) and source.infix:
        raise SettingsError("an infix stands within x, at a place that `generate` knows: give it the infix instead")
    if isinstance(source, Prefix | Stack) and source.shapes != (expected := section_shapes(model)):
        of = f" of {source.card.base!r}" if isinstance(source, Prefix) else ""
        raise WrongBaseError(
            f"expected a prefix with {_describe(expected)}; got one{of} with {_describe(source.shapes)}"
        )
    if isinstance(source, Prefix):
        source = Stack.of([source], device=model.device, dtype=model.dtype)
    return Attachment(model, source, save)


def _describe(shapes: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    return ", ".join(
        f"{len(layers)} {section} layers of " + " or ".join(f"{g}x{d}" for g, d in sorted(set(layers)))
        for section, layers in shapes.items()
    )
