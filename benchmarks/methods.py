"""The ways to tune a base that the benchmarks compare: each one function that makes something with a loss to learn.

    prefix       foreword's prefix: an MLP, keys and values alone, embeddings, an infix, or the decoder's section alone
    full         all of the base's parameters
    top2         its top two layers
    lora         LoRA on the query and value projections (PEFT)
    prompt       prompt tuning (PEFT)
    peft-prefix  prefix tuning (PEFT), with its MLP
    peft-direct  the same without

All learn by one loop: same rows, batches, loss over y, AdamW without weight decay, warm-up and linear decay, clipping. No
dropout. Weights in bfloat16 that learn have a float32 copy, since small steps would be lost in rounding. PEFT and the
tuned base compute attention "eager", which trains fastest on short rows.

Bottleneck adapters are not here. `adapters` 1.3.0, the last release, wants transformers 4.57 (ours is 5) and fails to
import beside ours, as huggingface_hub has no HfFolder any more; PEFT 0.21 has none of that kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from transformers import GenerationConfig

from benchmarks.peft_side import peft_batch, peft_model, peft_prefix
from foreword.attach import Attachment, attach
from foreword.attention import Mask
from foreword.bases import Base
from foreword.batching import batches, collate, likeness, pad
from foreword.data import Row, frame
from foreword.families import FAMILIES
from foreword.generation import end_ids
from foreword.learner import make_trainable, share_at
from foreword.loss import forward_loss
from foreword.prefix import Card, Framing, Prefix
from foreword.reparam import trainable_prefix, width
from foreword.settings import GenerateSettings, TrainSettings

WARMUP, CLIP = 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a method may be told; the fields are those of `TrainSettings`, and `section`: all, or the decoder's alone."""

    length: int = 10
    reparametrization: Any = "mlp"
    init: str = "activations"
    init_text: str | None = None
    infix: bool = False
    section: str = "all"
    rank: int = 8
    seed: int = 0


class Learner(NamedTuple):
    """What learns.

    Args:
        loss: of rows, the mean over their y tokens; with a gradient.
        parameters: what learns.
        finish: gives the trained prefix, or None where the base itself has what was learnt.
        folded: numbers that are kept, where what learns is folded away afterwards; else what learns is kept.
        attached: whether what was learnt stays attached, so that texts are `attached_texts`.
    """

    loss: Callable[[Sequence[Row]], torch.Tensor]
    parameters: list[torch.nn.Parameter]
    finish: Callable[[], Prefix | None]
    folded: int | None = None
    attached: bool = False

    @property
    def kept(self) -> int:
        """How many numbers a task takes."""
        return sum(p.numel() for p in self.parameters) if self.folded is None else self.folded


class _DecoderAlone(Attachment):
    """An encoder-decoder base whose decoder's self-attention alone has the prefix."""

    def extend(
        self, section: str, i: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Mask]:
        if section != "decoder":
            return keys, values, Mask(mask, query.shape[2], keys.shape[2])
        return super().extend(section, i, query, keys, values, mask)


def prefix(base: Base, rows: Sequence[Row], options: Options) -> Learner:
    settings = TrainSettings(
        length=options.length,
        reparametrization=options.reparametrization,
        init=options.init,
        init_text=options.init_text,
        infix=options.infix,
        seed=options.seed,
    )
    trainable = make_trainable(base, rows, settings, None)
    alone = options.section == "decoder"
    attachment = _DecoderAlone(base.model, trainable) if alone else attach(base.model, trainable)

    def loss(chosen: Sequence[Row]) -> torch.Tensor:
        batch = collate(base, chosen)
        return forward_loss(base, attachment, batch, infix=options.infix) / len(batch.labels)

    def finish() -> Prefix | None:
        if alone:
            return None  # it stays attached
        attachment.detach()
        card = Card(base=base.name, fingerprint=base.fingerprint, training={"infix": options.infix})
        return trainable.fold(card)

    named = [(name, p) for name, p in trainable.named_parameters() if not alone or "decoder" in name]
    shapes = {section: layers for section, layers in base.shapes.items() if not alone or section == "decoder"}
    folded = options.length * sum(map(width, shapes.values())) if options.reparametrization == "mlp" else None
    return Learner(loss, [p for _, p in named], finish, folded, alone)


def attached_texts(base: Base, inputs: Sequence[str], *, settings: GenerateSettings, framing: Framing) -> list[str]:
    """As `foreword.generate`, which refuses a base with something attached; of an encoder-decoder base."""
    ends = end_ids(base)
    own = base.model.generation_config
    base.model.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=base.pad_id,
        decoder_start_token_id=base.start_id,
    )
    texts = []
    try:
        for start in range(0, len(inputs), settings.batch_size):
            rows = [frame(base, {"input": one}, framing) for one in inputs[start : start + settings.batch_size]]
            tokens, mask = (one.to(base.device) for one in pad(rows, base.pad_id))
            with torch.no_grad():
                model: Any = base.model
                out = model.generate(input_ids=tokens, attention_mask=mask)[:, 1:].tolist()
            texts += [base.decode([token for token in row if token not in ends]) for row in out]
    finally:
        base.model.generation_config = own
    return texts


def _tuned(base: Base, parameters: Sequence[torch.nn.Parameter]) -> Learner:
    """Parameters of the base's own model, or put into it, that learn."""
    model: Any = base.model
    model.set_attn_implementation("eager")
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss(chosen: Sequence[Row]) -> torch.Tensor:
        batch = collate(base, chosen)

        def select(_: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (inputs[0][batch.y_positions][None],)

        handle = model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits = model(**batch.inputs, use_cache=False).logits[0]
        finally:
            handle.remove()
        return torch.nn.functional.cross_entropy(logits.float(), batch.labels)

    def finish() -> None:
        model.requires_grad_(False)
        model.set_attn_implementation("sdpa")

    return Learner(loss, list(parameters), finish)


def full(base: Base, rows: Sequence[Row], options: Options) -> Learner:
    return _tuned(base, list(base.model.parameters()))


def top2(base: Base, rows: Sequence[Row], options: Options) -> Learner:
    stem = FAMILIES[base.model.config.model_type]["decoder"].partition(".*.")[0]
    layers = list(base.model.get_submodule(stem).children())[-2:]
    return _tuned(base, [p for layer in layers for p in layer.parameters()])


def lora(base: Base, rows: Sequence[Row], options: Options) -> Learner:
    torch.manual_seed(options.seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
    )
    get_peft_model(base.model, config)  # its layers are put into the base's model
    return _tuned(base, [p for p in base.model.parameters() if p.requires_grad])


def _by_peft(base: Base, model: Any, finish: Callable[[], Prefix], folded: int | None = None) -> Learner:
    def loss(chosen: Sequence[Row]) -> torch.Tensor:
        value = model(**peft_batch(base, chosen)).loss
        assert isinstance(value, torch.Tensor)
        return value

    return Learner(loss, [p for p in model.parameters() if p.requires_grad], finish, folded)


def peft_tuning(base: Base, rows: Sequence[Row], options: Options, *, projection: bool = True) -> Learner:
    torch.manual_seed(options.seed)
    model = peft_model(base, length=options.length, projection=projection, attention="eager")
    return _by_peft(base, model, lambda: peft_prefix(base, model), options.length * width(base.shapes["decoder"]))


def prompt(base: Base, rows: Sequence[Row], options: Options) -> Learner:
    torch.manual_seed(options.seed)
    base.model.set_attn_implementation("eager")
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=options.length,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )
    model: Any = get_peft_model(base.model, config)

    def finish() -> Prefix:
        # what the base computes of the trained embeddings, so that all generate alike
        embeddings = model.prompt_encoder["default"].embedding.weight.detach().float()
        base.model.set_attn_implementation("sdpa")
        base.model.requires_grad_(False)
        trained: Any = trainable_prefix(base, length=options.length, reparametrization="embedding")
        with torch.no_grad():
            trained.embeddings.copy_(embeddings)
        return trained.to(base.device).fold(Card(base=base.name, fingerprint=base.fingerprint, framing=Framing()))

    return _by_peft(base, model, finish)


METHODS: dict[str, Callable[[Base, Sequence[Row], Options], Learner]] = {
    "prefix": prefix,
    "full": full,
    "top2": top2,
    "lora": lora,
    "prompt": prompt,
    "peft-prefix": peft_tuning,
    "peft-direct": partial(peft_tuning, projection=False),
}
"""The methods, by name."""

GRIDS: dict[str, list[float]] = {
    "prefix": [2.5e-4, 5e-4, 1e-3],
    "prefix-few": [6.25e-5, 1.25e-4, 2.5e-4],
    "prefix-batch16": [5e-4, 1e-3, 2e-3],
    "prefix-small": [5e-4, 1e-3, 2e-3],
    "prefix-direct": [2.5e-2, 5e-2, 1e-1],
    "prefix-embedding": [1e-2, 2e-2, 4e-2],
    "full": [1.25e-5, 2.5e-5, 5e-5],
    "full-many": [2.5e-5, 5e-5, 1e-4],
    "full-small": [2.5e-4, 5e-4, 1e-3],
    "top2": [1e-4, 2e-4, 4e-4],
    "lora": [5e-4, 1e-3, 2e-3],
    "prompt": [1e-2, 2e-2, 4e-2],
    "peft-prefix": [5e-4, 1e-3, 2e-3],
    "peft-direct": [5e-3, 1e-2, 2e-2],
}
"""The first three learning rates of each method; more are tried where the best is at the edge."""


class Fitted(NamedTuple):
    """How the learning went: mean loss of the last epoch's steps, seconds, real tokens; infinite where it diverged."""

    loss: float
    seconds: float
    tokens: int


class _InFloat32:
    """AdamW over parameters of any dtype, each with a float32 copy where its own is shorter."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self.own = list(parameters)
        self.exact = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in self.own]
        self.adam = torch.optim.AdamW(self.exact, weight_decay=0.0, fused=True)

    def step(self, lr: float) -> bool:
        """Make a step; False where the gradient is not finite."""
        for own, exact in zip(self.own, self.exact, strict=True):
            if own is not exact:
                exact.grad = None if own.grad is None else own.grad.float()
                own.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.exact, CLIP)
        if not torch.isfinite(norm):
            return False
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            for own, exact in zip(self.own, self.exact, strict=True):
                if own is not exact:
                    own.copy_(exact)
        return True


def fit(
    base: Base, learner: Learner, rows: Sequence[Row], *, lr: float, epochs: int, batch_size: int, seed: int
) -> Fitted:
    """Let it learn; foreword's schedule and batches, for every method."""
    optimizer = _InFloat32(learner.parameters)
    steps = epochs * math.ceil(len(rows) / batch_size)
    losses: list[float] = []
    tokens = 0
    began = time.perf_counter()
    for epoch in range(epochs):
        for indices in batches(rows, batch_size, seed=seed, epoch=epoch, key=likeness(base)):
            chosen = [rows[i] for i in indices]
            loss = learner.loss(chosen)
            loss.backward()
            share = share_at(len(losses), steps, WARMUP)
            losses.append(loss.item())
            tokens += sum(map(len, chosen))
            if not math.isfinite(losses[-1]) or not optimizer.step(lr * share):
                return Fitted(math.inf, time.perf_counter() - began, tokens)
    last = losses[-math.ceil(len(rows) / batch_size) :]
    return Fitted(sum(last) / len(last), time.perf_counter() - began, tokens)
