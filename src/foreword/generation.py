"""Text from a base and prefixes: each row of a batch has its own prefix, or none.

A row's text is what that row gives alone. Padding is masked, positions count a row's own tokens and virtual tokens, and
each sampled row draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from foreword.attach import Stack, attach, check_free, lock_of
from foreword.batching import pad
from foreword.data import check_fits, frame
from foreword.errors import SettingsError
from foreword.prefix import Framing, Prefix, check_prefix
from foreword.settings import GenerateSettings
from foreword.text import TextSoFar

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["GenerateSettings", "end_ids", "generate", "sample_processors", "stream"]

Input = str | Mapping[str, Any]


def generate(
    base: Base,
    inputs: Sequence[Input],
    prefixes: Prefix | Sequence[Prefix | None] | None = None,
    *,
    settings: GenerateSettings | None = None,
    framing: Framing | None = None,
    numbers: Sequence[int] | None = None,
    on_texts: Callable[[Mapping[int, str]], None] | None = None,
) -> list[str]:
    """Continue each input.

    Threads that share a base wait for each other, batch by batch.

    Args:
        base: the frozen base; nothing is attached to it.
        inputs: strings, or records with the columns that the framing names.
        prefixes: one for all rows, or one a row; None for the bare base. Rows with one prefix share it in memory.
        settings: see `GenerateSettings`.
        framing: how x is made. Default: as in the training of the row's prefix; for rows without one, `Framing()`, or the
            base's chat template where they have messages.
        numbers: of the rows, for sampling and in errors: a row's text is the same whichever rows are beside it. Default: 0,
            1, 2, ... in the order of the inputs.
        on_texts: called with the texts of each batch, by the row's number, when it has ended.

    Returns:
        one text a row, in the order of the inputs.

    Raises:
        SettingsError: the inputs are one text, not a list; there are not as many prefixes or numbers as inputs; or
            something is attached to the base, such as a prefix that is being trained.
        WrongBaseError: a prefix is another base's.
        DataError: an input cannot be framed. TooLongError: one does not fit the base's context.
    """
    settings = settings or GenerateSettings()
    if isinstance(inputs, str | Mapping):
        raise SettingsError(f"expected a list of inputs; got one {type(inputs).__name__}: put it in a list")
    if hasattr(inputs, "columns"):
        raise SettingsError(f"expected a list of inputs; got a {type(inputs).__name__}: give its records")
    inputs = list(inputs)
    own = [prefixes] * len(inputs) if prefixes is None or isinstance(prefixes, Prefix) else list(prefixes)
    if len(own) != len(inputs):
        raise SettingsError(f"expected one prefix, or one for each of {len(inputs)} inputs; got {len(own)}")
    numbers = range(len(inputs)) if numbers is None else list(map(int, numbers))
    if len(numbers) != len(inputs):
        raise SettingsError(f"expected a number for each of {len(inputs)} inputs; got {len(numbers)}")
    for prefix in {id(prefix): prefix for prefix in own if prefix is not None}.values():
        check_prefix(prefix, base)
    rows = [
        _frame(base, record, prefix, framing, f"input {n + 1}")
        for record, prefix, n in zip(inputs, own, numbers, strict=True)
    ]
    budgets = [
        _budget(base, x, prefix, settings, f"input {n + 1}") for x, prefix, n in zip(rows, own, numbers, strict=True)
    ]
    texts = [""] * len(inputs)
    # rows whose context ends early go apart, so that they do not cut the others short
    order = sorted(range(len(rows)), key=lambda i: (budgets[i], len(rows[i])))
    start = 0
    while start < len(order):
        same = [i for i in order[start : start + settings.batch_size] if budgets[i] == budgets[order[start]]]
        start += len(same)
        here = [numbers[i] for i in same]
        with lock_of(base.model):
            output = _run(base, [rows[i] for i in same], [own[i] for i in same], budgets[same[0]], settings, here)
        for i, tokens in zip(same, output, strict=True):
            texts[i] = _cut(base.decode(tokens), settings.stop)
        if on_texts is not None:
            on_texts({numbers[i]: texts[i] for i in same})
    return texts


def stream(
    base: Base,
    input: Input,
    prefix: Prefix | None = None,
    *,
    settings: GenerateSettings | None = None,
    framing: Framing | None = None,
    write: Callable[[str], None],
) -> str:
    """As `generate` for one input, calling `write` with each new piece of text as it comes; returns the whole text.

    Raises:
        SettingsError: beams cannot be streamed, as the best one is not known before the end.
    """
    settings = settings or GenerateSettings()
    if settings.num_beams > 1:
        raise SettingsError("a text from beams cannot be streamed: set num_beams to 1")
    if prefix is not None:
        check_prefix(prefix, base)
    x = _frame(base, input, prefix, framing, "the input")
    budget = _budget(base, x, prefix, settings, "the input")
    pieces = _Pieces(base, settings.stop, write)
    with lock_of(base.model):
        _run(base, [x], [prefix], budget, settings, [0], streamer=pieces)
    return pieces.text


def _frame(base: Base, record: Input, prefix: Prefix | None, framing: Framing | None, where: str) -> list[int]:
    record = {"input": record} if isinstance(record, str) else record
    if framing is None:
        chat = isinstance(record, Mapping) and record.get("messages") is not None
        framing = Framing(chat=chat) if prefix is None else prefix.card.framing
    return frame(base, record, framing, where)


def _budget(base: Base, x: Sequence[int], prefix: Prefix | None, settings: GenerateSettings, where: str) -> int:
    """Tokens that a row may get, at least one."""
    length = 0 if prefix is None else prefix.length
    check_fits(base, len(x), 1, length, where)
    if base.context is None:
        return settings.max_new_tokens
    return min(settings.max_new_tokens, base.context - (0 if base.is_encoder_decoder else length + len(x)))


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return text[: min(places)] if places else text


@torch.no_grad()
def _run(
    base: Base,
    rows: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    budget: int,
    settings: GenerateSettings,
    numbers: Sequence[int],
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Token ids of y for one batch, without x and without the end token."""
    model = base.model
    tokens, mask = pad(rows, base.pad_id, left=not base.is_encoder_decoder)
    unique = list({id(prefix): prefix for prefix in prefixes if prefix is not None}.values())
    context: Any = nullcontext()
    if not unique:
        check_free(model)
    else:
        context = attach(model, Stack.of(unique, device=base.device, dtype=base.dtype))
        if len(unique) > 1 or None in prefixes:
            place = {id(prefix): n for n, prefix in enumerate(unique)}
            context.rows = torch.tensor([place.get(id(prefix), -1) for prefix in prefixes])
        if any(prefix.infix for prefix in unique):
            # x's last token stands after the infix, as in training
            before = [tokens.shape[1] - 1 if prefix is not None and prefix.infix else 0 for prefix in prefixes]
            context.infix = torch.tensor(before)
    skip, caches = tokens.shape[1], {}
    if base.is_encoder_decoder:
        # transformers' own would have as many layers as a T5's encoder, whatever its decoder has
        skip, caches = 1, {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
    # transformers hands the head a slice of the hidden states, for which torch would copy the head's matrix once a row
    whole = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0].contiguous(),))
    with context, whole, _only(base, _config(base, settings, budget)) as config:
        output = model.generate(  # type: ignore[operator]
            input_ids=tokens.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=config,
            logits_processor=sample_processors(base, settings, numbers),
            stopping_criteria=StoppingCriteriaList([_Stop(base, settings.stop, skip)] if settings.stop else []),
            streamer=streamer,
            **caches,
        )
    ends = end_ids(base)
    return [list(takewhile(lambda token: token not in ends, row[skip:])) for row in output.tolist()]


@contextmanager
def _only(base: Base, config: GenerationConfig) -> Iterator[GenerationConfig]:
    """Put the base's own generation settings aside, which transformers would take wherever `config` is silent.

    Its remarks are kept off the terminal meanwhile: GPT-2's are of padding, where rows that have ended are filled up. So
    is training mode, in which another's trainer may have left the base: with gradient checkpointing there is no cache.
    """
    model: Any = base.model
    own, level = model.generation_config, logging.get_verbosity()
    training = [module for module in model.modules() if module.training]
    try:
        model.generation_config = config
        logging.set_verbosity_error()
        model.eval()
        yield config
    finally:
        model.generation_config = own
        logging.set_verbosity(level)
        for module in training:
            module.training = True


def end_ids(base: Base) -> set[int]:
    """Ids of every token that ends a text: the tokenizer's end token, and a base may know others, such as the end of a turn."""
    ends = base.model.generation_config.eos_token_id
    return {base.end_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}


def _config(base: Base, settings: GenerateSettings, budget: int) -> GenerationConfig:
    """Exactly what was asked for: a base's own generation settings (sampling, penalties, forced tokens) are not taken."""
    return GenerationConfig(
        max_new_tokens=budget,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty if settings.num_beams > 1 else None,
        do_sample=False,
        eos_token_id=sorted(end_ids(base)),
        pad_token_id=base.pad_id,
        bos_token_id=base.tokenizer.bos_token_id,
        decoder_start_token_id=base.start_id if base.is_encoder_decoder else None,
    )


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise from a generator a row: the largest of the sums is a sample of the softmax (Gumbel 1954)."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.stack(
            [
                torch.empty_like(scores[b], dtype=torch.float32).exponential_(generator=generator).log()
                for b, generator in enumerate(self.generators)
            ]
        )
        sums: torch.FloatTensor = scores.float() - noise  # type: ignore[assignment]
        return sums


def sample_processors(base: Base, settings: GenerateSettings, numbers: Sequence[int]) -> LogitsProcessorList:
    """What logits [B, V] go through so that their largest is the next token, sampled as `settings` say.

    Args:
        base: whose logits; random numbers are drawn on its device.
        settings: `temperature`, `top_k`, `top_p` and `seed` count.
        numbers: [B], of the rows: each draws from a generator of its own, made from the seed and its number.

    Returns:
        processors that may be called with None for the tokens before; none of them where the temperature is 0.
    """
    if settings.temperature == 0:
        return LogitsProcessorList()
    # what is colder than that is as good as 0, and would make infinities of logits
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(max(settings.temperature, 1e-5))]
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    seeds = [(settings.seed * 1_000_003 + number) % (1 << 63) for number in numbers]
    return LogitsProcessorList([*processors, _Gumbel(seeds, base.device)])


class _Stop(StoppingCriteria):
    """Ends a row once its y holds a stop string; transformers' own would find one half in x, or in special tokens."""

    def __init__(self, base: Base, stop: Sequence[str], skip: int):
        self.base, self.stop, self.skip = base, stop, skip

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        texts = map(self.base.decode, input_ids[:, self.skip :].tolist())
        found: torch.BoolTensor = torch.tensor(  # type: ignore[assignment]
            [any(string in text for string in self.stop) for text in texts], device=input_ids.device
        )
        return found


class _Pieces(BaseStreamer):
    """Hands text on as its tokens come."""

    def __init__(self, base: Base, stop: Sequence[str], write: Callable[[str], None]):
        self.write, self.ends = write, end_ids(base)
        self.so_far = TextSoFar(base.decode, stop)
        self.text = ""
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            if token not in self.ends:
                self._show(self.so_far.add(token))

    def end(self) -> None:
        self._show(self.so_far.end())

    def _show(self, piece: str) -> None:
        if piece:
            self.write(piece)
            self.text += piece
