"""A prefix meets every family's attention as the paper says, whatever the batch, the cache and the kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from reference import attention_layers, logits_by_hand
from tiny import CONTEXT, DECODER_ONLY, ENCODER_DECODER, PAD, WINDOWED, random_prefix, tiny_model, tiny_tokenizer
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GPT2ForSequenceClassification,
    GPT2Model,
    PreTrainedModel,
)
from transformers.models.gemma2 import modeling_gemma2

import foreword.attach
import foreword.attention
from foreword.attach import Stack, attach
from foreword.attention import Mask
from foreword.bases import Base
from foreword.capture import capture
from foreword.errors import BaseLoadError, SettingsError, WrongBaseError
from foreword.families import FAMILIES, section_shapes
from foreword.prefix import Prefix
from foreword.reparam import trainable_prefix

ALL = (*DECODER_ONLY, *ENCODER_DECODER)
FLOAT64_THROUGHOUT = ("gpt2", "opt", "bart", "pegasus")
"""The other families compute their norms in float32 whatever the model's dtype."""
NO_DROPOUT: Mapping[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "bart": {"dropout": 0.0},
    "pegasus": {"dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
    "mt5": {"dropout_rate": 0.0},
}
OF_BART = ("bart", "pegasus")
GENERATING: Mapping[str, dict[str, Any]] = {
    "t5": {"num_decoder_layers": 2},
    "mt5": {"num_decoder_layers": 2},
}
"""transformers' T5 generates only with as many encoder as decoder layers."""
P = 5


@functools.cache
def model64(family: str) -> PreTrainedModel:
    """One for all tests; whatever is attached must leave it as it was."""
    return fresh_model64(family)


def fresh_model64(family: str, **config: Any) -> PreTrainedModel:
    return tiny_model(family, dtype=torch.float64, **config).requires_grad_(False)


def assert_same(family: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 if family in FLOAT64_THROUGHOUT else 2e-5)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def right_mask(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def batch_of(
    family: str, *, lengths: list[int], side: str = "right", y_lengths: list[int] | None = None
) -> dict[str, Any]:
    """Inputs of rows of these lengths, padded; an encoder-decoder family's have decoder tokens too."""
    mask = right_mask(lengths)
    if side == "left":
        mask = mask.flip(1)
    inputs = {
        "input_ids": random_ids(len(lengths), max(lengths)).where(mask.bool(), PAD),
        "attention_mask": mask,
    }
    if family in ENCODER_DECODER:
        y_mask = right_mask(y_lengths or [(7 * n) % 5 + 2 for n in range(len(lengths))])
        inputs["decoder_input_ids"] = random_ids(*y_mask.shape, seed=1).where(y_mask.bool(), PAD)
        inputs["decoder_attention_mask"] = y_mask
    return inputs


def real_places(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()


def row_alone(inputs: Mapping[str, torch.Tensor], b: int) -> dict[str, torch.Tensor]:
    """Row b without its padding."""
    alone = {}
    for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if name in inputs:
            alone[name] = inputs[name][b][inputs[mask][b].bool()][None]
    return alone


def by_hand(
    model: PreTrainedModel, prefixes: list[Prefix | None], inputs: Mapping[str, torch.Tensor], **more: Any
) -> torch.Tensor:
    return logits_by_hand(
        model,
        [None if prefix is None else prefix.sections for prefix in prefixes],
        inputs["input_ids"],
        inputs.get("attention_mask"),
        decoder_input_ids=inputs.get("decoder_input_ids"),
        decoder_real=inputs.get("decoder_attention_mask"),
        **more,
    )


class Trainable(nn.Module):
    """Keys and values are the parameters, one for each layer and kind."""

    def __init__(self, prefix: Prefix):
        super().__init__()
        self.kv = nn.ParameterDict()
        for section, layers in prefix.sections.items():
            for i, layer in enumerate(layers):
                for kind, tensor in zip(("keys", "values"), layer, strict=True):
                    self.kv[f"{section}-{i}-{kind}"] = nn.Parameter(tensor[None].clone())
        self.layers = {section: len(layers) for section, layers in prefix.sections.items()}
        self.calls = 0

    def forward(self) -> Stack:
        self.calls += 1
        return Stack(
            {
                section: [(self.kv[f"{section}-{i}-keys"], self.kv[f"{section}-{i}-values"]) for i in range(count)]
                for section, count in self.layers.items()
            }
        )


def loss_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of a random next token at every real place."""
    logits = model(**inputs, use_cache=False).logits
    targets = random_ids(*logits.shape[:2], seed=7).to(logits.device)
    real = real_places(inputs) if "attention_mask" in inputs else torch.ones_like(targets, dtype=torch.bool)
    return nn.functional.cross_entropy(logits[real], targets[real])


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


# ---- right -----------------------------------------------------------------------------------------------


def test_every_supported_family_is_tried() -> None:
    assert {tiny_model(family).config.model_type for family in ALL} == set(FAMILIES)


@pytest.mark.parametrize("family", ALL)
def test_the_reference_is_the_base_where_nothing_is_attached(family: str) -> None:
    model = model64(family)
    # so near that padding sees one in a window of 7: Gemma 2's own attention makes nan, in float64, of what sees nothing
    inputs = batch_of(family, lengths=[11, 5])
    real = real_places(inputs)
    assert_same(family, by_hand(model, [None, None], inputs)[real], model(**inputs).logits[real])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ALL)
def test_an_attached_prefix_equals_attention_by_hand(family: str, side: str) -> None:
    """Longer than the window of 7 where there is one, and padded on either side."""
    model = model64(family)
    prefix = random_prefix(model, P)
    inputs = batch_of(family, lengths=[11, 3], side=side)
    real = real_places(inputs)
    # Gemma 2's own attention makes nan, in float64, of padding that sees nothing
    bare = by_hand(model, [None, None], inputs) if family == "gemma2" else model(**inputs).logits
    with attach(model, prefix):
        logits = model(**inputs).logits
    assert_same(family, logits[real], by_hand(model, [prefix, prefix], inputs)[real])
    assert (logits - bare)[real].abs().amax(-1).min() > 1e-2, "every token feels the prefix"


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_keys_and_values_of_each_section_count(family: str) -> None:
    model = model64(family)
    prefix, other = random_prefix(model, P), random_prefix(model, P, seed=1)
    inputs = batch_of(family, lengths=[3, 2], y_lengths=[2, 3])
    real = real_places(inputs)
    with attach(model, prefix):
        before = model(**inputs).logits
    for section, layers in prefix.sections.items():
        for kind in (0, 1):
            layer = list(layers[-1])
            layer[kind] = other.sections[section][-1][kind]
            changed = Prefix({**prefix.sections, section: [*layers[:-1], (layer[0], layer[1])]}, prefix.card)
            with attach(model, changed):
                after = model(**inputs).logits
            assert (after - before)[real].abs().amax(-1).min() > 1e-3, (section, kind)


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_it_equals_a_cache_filled_beforehand(family: str) -> None:
    """As PEFT does it: P cached tokens, positions from P on, a mask of ones over both."""
    # a cache takes the prefix for tokens, which leave a window
    model = fresh_model64(family, **({"sliding_window": 64} if family in WINDOWED else {}))
    prefix = random_prefix(model, P)
    ids = random_ids(2, 11)
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(prefix.sections["decoder"]):
        cache.update(*(tensor[None].expand(2, *tensor.shape) for tensor in layer), i)
    expected = model(
        input_ids=ids,
        past_key_values=cache,
        attention_mask=torch.ones(2, P + 11, dtype=torch.long),
        position_ids=torch.arange(P, P + 11)[None],
    ).logits
    with attach(model, prefix):
        assert_same(family, model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_captured_activations_stand_for_the_tokens_themselves(family: str) -> None:
    """A prefix is what the cache holds for P tokens: with those of "words", x goes on as in [words; x]."""
    model = fresh_model64(family, **({"sliding_window": 64} if family in WINDOWED else {}))
    ids = random_ids(1, P + 11)
    with capture(model) as seen, torch.no_grad():
        model(input_ids=ids[:, :P])
    layers = [(keys[0], values[0]) for _, (keys, values) in sorted(seen["decoder"].items())]
    prefix = Prefix({"decoder": layers}, random_prefix(model, P).card)
    assert prefix.shapes == section_shapes(model)
    expected = model(input_ids=ids).logits[:, P:]
    with attach(model, prefix):
        assert_same(family, model(input_ids=ids[:, P:]).logits, expected)


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_capture_sees_every_section(family: str) -> None:
    model = model64(family)
    inputs = batch_of(family, lengths=[7], y_lengths=[3])
    before = model(**inputs).logits
    with capture(model) as seen:
        torch.testing.assert_close(model(**inputs).logits, before)
    for section, length in (("encoder", 7), ("decoder", 3), ("cross", 7)):
        shapes = [(1, groups, length, dim) for groups, dim in section_shapes(model)[section]]
        assert [keys.shape for _, (keys, _) in sorted(seen[section].items())] == shapes
        assert [values.shape for _, (_, values) in sorted(seen[section].items())] == shapes
    assert model.config._attn_implementation == "sdpa"
    assert not any("foreword" in layer.__dict__ for layer in attention_layers(model))


def test_capture_leaves_an_attached_prefix_as_it_was() -> None:
    model = model64("gpt2")
    ids = random_ids(1, 7)
    with attach(model, random_prefix(model, P)):
        expected = model(input_ids=ids).logits
        with pytest.raises(KeyError), capture(model):
            raise KeyError
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", WINDOWED)
def test_the_prefix_stays_visible_far_beyond_the_window(family: str) -> None:
    model = model64(family)
    prefix = random_prefix(model, P)
    inputs = {"input_ids": random_ids(1, 19), "attention_mask": torch.ones(1, 19, dtype=torch.long)}
    with attach(model, prefix):
        logits = model(**inputs).logits
    assert_same(family, logits, by_hand(model, [prefix], inputs))
    # what the last layer's virtual tokens hold reaches a token only by its own seeing them
    assert not hasattr(model.config, "layer_types") or model.config.layer_types[-1] == "sliding_attention"
    *lower, (keys, values) = prefix.sections["decoder"]
    with attach(model, Prefix({"decoder": [*lower, (keys, values.flip(1) + 1)]}, prefix.card)):
        assert (model(**inputs).logits - logits).abs().amax(-1).min() > 1e-2


def test_t5_gives_prefix_keys_no_relative_bias() -> None:
    """Huge biases of real tokens leave nothing to prefix keys, but for cross-attention, which has none."""
    model = fresh_model64("t5")
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight += 1000
    inputs = batch_of("t5", lengths=[7], y_lengths=[5])
    bare = model(**inputs).logits
    one, two = random_prefix(model, P), random_prefix(model, P, seed=1)
    with attach(model, one):
        logits = model(**inputs).logits
    with attach(model, Prefix({**two.sections, "cross": one.sections["cross"]}, one.card)):
        torch.testing.assert_close(model(**inputs).logits, logits)
    assert (logits - bare).abs().max() > 1e-2


# ---- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "scores", "block"), [("left", 0, 64), ("left", 1 << 25, 64), ("left", 1 << 25, 3), ("right", 1 << 25, 64)]
)
@pytest.mark.parametrize("family", ALL)
def test_rows_of_one_batch_are_each_as_if_alone(
    family: str, side: str, scores: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes of unequal lengths, one twice, and none; also as beams. `scores` 0 is the fused kernel."""
    monkeypatch.setattr(foreword.attention, "PRODUCTS_MAX_SCORES", scores)
    monkeypatch.setattr(foreword.attention, "BLOCK", block)
    if family in OF_BART:
        side = "right"  # its own positions count padding on the left
    model = model64(family)
    prefixes = [random_prefix(model, length, seed=length) for length in (5, 2, 7)]
    rows = [2, -1, 0, 1, 0]
    inputs = batch_of(family, lengths=[3, 7, 11, 2, 5], side=side)
    real = real_places(inputs)
    with attach(model, Stack.of(prefixes, device=model.device, dtype=model.dtype)) as attachment:
        attachment.rows = torch.tensor(rows)
        logits = model(**inputs).logits
        beams = model(**{name: tensor.repeat_interleave(3, 0) for name, tensor in inputs.items()}).logits
    assert logits.isfinite().all()
    assert_same(family, beams[::3][real], logits[real])
    assert_same(family, beams[1::3][real], logits[real])
    for b, n in enumerate(rows):
        alone = row_alone(inputs, b)
        if n < 0:
            expected = model(**alone).logits[0]
        else:
            with attach(model, prefixes[n]):
                expected = model(**alone).logits[0]
        assert_same(family, logits[b][real[b]], expected)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_first_of_a_stack_is_everybodys_by_default(family: str) -> None:
    model = model64(family)
    prefixes = [random_prefix(model, length) for length in (2, 5)]
    inputs = batch_of(family, lengths=[7, 3])
    real = real_places(inputs)
    with attach(model, Stack.of(prefixes, device=model.device, dtype=model.dtype)):
        logits = model(**inputs).logits
    assert_same(family, logits[real], by_hand(model, [prefixes[0]] * 2, inputs)[real])


@pytest.mark.parametrize("family", ALL)
def test_in_bfloat16_the_padding_of_rows_without_a_prefix_stays_finite(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    inputs = batch_of(family, lengths=[11, 2], side="left")
    with attach(model, Stack.of([random_prefix(model, P)], device=model.device, dtype=model.dtype)) as attachment:
        attachment.rows = torch.tensor([0, -1])
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


@pytest.mark.parametrize("family", ALL)
def test_states_and_logits_are_the_models_own(family: str) -> None:
    """After whatever the family does around its output layer."""
    config = {"gemma3": {"final_logit_softcapping": 3.0}, "t5": {"tie_word_embeddings": True}}
    model = fresh_model64(family, **config.get(family, {}))
    if family in OF_BART:
        model.final_logits_bias.normal_()
    if family == "t5":
        assert model.config.scale_decoder_outputs
    inputs = batch_of(family, lengths=[7, 5])
    shape = real_places(inputs).shape
    y_positions = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    assert 1 < y_positions.sum() < shape.numel()
    with attach(model, random_prefix(model, P)) as attachment:
        full = model(**inputs).logits
        chosen = attachment.logits(attachment.states_at(y_positions, inputs))
        assert_same(family, model(**inputs).logits, full)
    assert chosen.shape == (int(y_positions.sum()), full.shape[-1])
    assert_same(family, chosen, full[y_positions])


# ---- positions, and ways to call -------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_position_ids_of_a_caller_count_tokens(family: str) -> None:
    model = model64(family)
    ids = random_ids(2, 5)
    with attach(model, random_prefix(model, P)):
        expected = model(input_ids=ids).logits
        assert_same(family, model(input_ids=ids, position_ids=torch.arange(5)[None]).logits, expected)
        later = model(
            input_ids=ids, position_ids=torch.tensor([[0, 2, 4, 6, 9]]), attention_mask=torch.ones_like(ids)
        ).logits
    assert (later - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", [family for family in DECODER_ONLY if family != "opt"])
def test_packed_texts_are_each_as_if_alone(family: str) -> None:
    """Several texts in a row without padding, told apart by their positions: as TRL packs them.

    transformers' OPT tells its mask nothing of positions, so it cannot be packed, prefix or not.
    """
    model = model64(family)
    ids = random_ids(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with attach(model, random_prefix(model, P)):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert_same(family, packed[:, :5], model(input_ids=ids[:, :5]).logits)
        assert_same(family, packed[:, 5:], model(input_ids=ids[:, 5:]).logits)


@pytest.mark.parametrize("family", ALL)
def test_it_can_be_called_by_position_and_with_embeddings(family: str) -> None:
    model = model64(family)
    inputs = batch_of(family, lengths=[7, 5])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real = real_places(inputs)
    embeds = {**{name: tensor for name, tensor in inputs.items() if name != "input_ids"}}
    embeds["inputs_embeds"] = model.get_input_embeddings()(ids)
    by_position = {"gpt2": (ids, None, mask), "bart": (ids, mask), "t5": (ids, mask)}.get(family, (ids, mask))
    rest = {name: tensor for name, tensor in inputs.items() if name.startswith("decoder")}
    with attach(model, random_prefix(model, P)):
        expected = model(**inputs).logits
        assert_same(family, model(**embeds).logits[real], expected[real])
        assert_same(family, model(*by_position, **rest).logits[real], expected[real])
        as_tuple = model(**inputs, return_dict=False)
        assert_same(family, as_tuple[0], expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_a_text_can_come_in_pieces_through_a_cache(family: str, masked: bool) -> None:
    model = model64(family)
    ids = random_ids(2, 13)
    mask = torch.ones_like(ids)
    if masked:
        mask[1, :3] = 0
    cache = DynamicCache(config=model.config)
    with attach(model, random_prefix(model, P)):
        expected = model(input_ids=ids, attention_mask=mask).logits
        parts = [
            model(
                input_ids=ids[:, start:end],
                past_key_values=cache,
                **({"attention_mask": mask[:, :end]} if masked else {}),
            ).logits
            for start, end in ((0, 6), (6, 11), (11, 12), (12, 13))
        ]
    assert_same(family, torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_mask_made_by_the_caller_is_kept(family: str) -> None:
    """[1, 1, T, T], boolean or additive, shared by rows of different prefixes."""
    model = model64(family)
    ids = random_ids(2, 7)
    visible = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    added = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)
    prefixes = [random_prefix(model, length) for length in (5, 2)]
    with attach(model, Stack.of(prefixes, device=model.device, dtype=model.dtype)) as attachment:
        for rows in (None, torch.tensor([1, 0]), torch.tensor([-1, 1])):
            attachment.rows = rows
            expected = model(input_ids=ids).logits
            for mask in (visible, added):
                assert_same(family, model(input_ids=ids, attention_mask=mask).logits, expected)


# ---- generation ------------------------------------------------------------------------------------------


def next_log_probs(model: PreTrainedModel, alone: dict[str, torch.Tensor], ys: torch.Tensor) -> torch.Tensor:
    """[K, V], of the token after each of K continuations of one row, without cache or padding."""
    x = alone["input_ids"].expand(len(ys), -1)
    if model.config.is_encoder_decoder:
        start = torch.full((len(ys), 1), model.config.decoder_start_token_id)
        inputs = {"input_ids": x, "decoder_input_ids": torch.cat([start, ys], 1)}
    else:
        inputs = {"input_ids": torch.cat([x, ys], 1)}
    return model(**inputs, use_cache=False).logits[:, -1].log_softmax(-1)


def beam_search(model: PreTrainedModel, alone: dict[str, torch.Tensor], beams: int, steps: int) -> list[int]:
    """The likeliest of the `beams` best continuations kept at every step; one beam is greedy."""
    scores, ys = torch.zeros(1, dtype=torch.float64), torch.empty(1, 0, dtype=torch.long)
    for _ in range(steps):
        longer = scores[:, None] + next_log_probs(model, alone, ys)
        scores, best = longer.flatten().topk(beams)
        ys = torch.cat([ys[best // longer.shape[1]], best[:, None] % longer.shape[1]], 1)
    return ys[0].tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ALL)
def test_generate_equals_computing_everything_anew(family: str, beams: int) -> None:
    """transformers' own `generate`, rows padded, of different prefixes or none, against a row at a time."""
    steps = 5
    model = fresh_model64(family, **GENERATING.get(family, {}))
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    prefixes = [random_prefix(model, length, seed=length) for length in (5, 2)]
    rows = [1, -1, 0]
    inputs = batch_of(family, lengths=[9, 3, 6], side="right" if family in OF_BART else "left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        with attach(model, Stack.of(prefixes, device=model.device, dtype=model.dtype)) as attachment:
            attachment.rows = torch.tensor(rows)
            out = model.generate(**inputs, max_new_tokens=steps, num_beams=beams, do_sample=False)
        out = out[:, 1:] if family in ENCODER_DECODER else out[:, inputs["input_ids"].shape[1] :]
        bare = model.generate(**inputs, max_new_tokens=steps, num_beams=beams, do_sample=False)
        assert bare[:, -steps:].tolist() != out.tolist()
        for b, n in enumerate(rows):
            alone = row_alone(inputs, b)
            if n < 0:
                assert out[b].tolist() == beam_search(model, alone, beams, steps)
                continue
            with attach(model, prefixes[n]):
                assert out[b].tolist() == beam_search(model, alone, beams, steps)


@pytest.mark.parametrize("family", ALL)
def test_generate_takes_a_trainable_prefix_as_it_stands(family: str) -> None:
    """Also where generation calls the encoder by itself, before and after a step of training."""
    model = fresh_model64(family, **GENERATING.get(family, {}))
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    ids = random_ids(2, 7)
    prefixes = [random_prefix(model, P, seed=seed) for seed in (3, 4)]
    trainable = [Trainable(prefix) for prefix in prefixes]
    expected = []
    for prefix in prefixes:
        with attach(model, prefix):
            expected.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5).tolist())
    assert expected[0] != expected[1]
    with attach(model, trainable[0]):
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5).tolist() == expected[0]
        trainable[0].load_state_dict(trainable[1].state_dict())
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5).tolist() == expected[1]


# ---- kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[11, 11], [11, 4]], ids=["full", "padded"])
@pytest.mark.parametrize("family", ALL)
def test_products_and_the_fused_kernel_agree(family: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients, with and without a mask or a bias, and with grouped heads."""
    model = model64(family)
    source = Trainable(random_prefix(model, P))
    inputs = batch_of(family, lengths=lengths)
    if lengths[0] == lengths[1]:
        inputs = {name: tensor for name, tensor in inputs.items() if "mask" not in name}
    fused_calls = 0
    owner: Any = modeling_gemma2 if family == "gemma2" else foreword.attention
    name = "eager_attention_forward" if family == "gemma2" else "sdpa_attention_forward"
    fused = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal fused_calls
        fused_calls += 1
        return fused(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    found = []
    with attach(model, source):
        for scores, block in ((1 << 25, 3), (1 << 25, 64), (0, 64)):
            monkeypatch.setattr(foreword.attention, "PRODUCTS_MAX_SCORES", scores)
            monkeypatch.setattr(foreword.attention, "BLOCK", block)
            source.zero_grad()
            loss = loss_of(model, inputs)
            loss.backward()
            found.append({"loss": loss.detach(), **gradients(source)})
            assert fused_calls == (0 if scores else len(attention_layers(model)))
    assert len(found[0]) > 1
    for name, value in found[-1].items():
        assert_same(family, found[0][name], value)
        assert_same(family, found[1][name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_query_that_sees_nothing_has_finite_weights(dtype: torch.dtype) -> None:
    """Padding: its values go nowhere, but as NaN they would go everywhere."""
    mask = torch.tensor([[True, True, False], [False, False, False]])[None, None]
    added = Mask(mask, 2, 3).added(dtype)
    assert added is not None
    weights = (torch.tensor([[-100.0, -90.0, -80.0]], dtype=dtype) + added).softmax(-1)
    assert weights.dtype == dtype
    assert weights.isfinite().all()
    assert weights[0, 0, 0, 2] == 0


def test_keys_that_no_query_of_a_block_sees_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a causal mask behind a prefix of 5, with padding on the left of one row."""
    monkeypatch.setattr(foreword.attention, "BLOCK", 3)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    mask = torch.cat([torch.ones(2, 1, 7, 5, dtype=torch.bool), causal.expand(2, 1, 7, 7)], dim=-1)
    mask[1, 0, :, 5:9] = False
    assert Mask(mask, 7, 12).blocks == [(slice(0, 4), slice(0, 9)), (slice(4, 8), slice(0, 12))]
    nothing = torch.zeros_like(mask)
    assert [seen for _, seen in Mask(nothing, 7, 12).blocks] == [slice(0, 1)] * 2
    for all_seen in (None, torch.zeros(1, 1, 7, 12)):
        assert [seen for _, seen in Mask(all_seen, 7, 12).blocks] == [slice(0, 12)] * 2


def test_attention_dropout_acts_in_training_alone() -> None:
    model = fresh_model64("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    ids = random_ids(1, 7)
    with attach(model, random_prefix(model, P)):
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
        model.train()
        torch.manual_seed(0)
        dropped = model(input_ids=ids).logits
        assert (dropped - expected).abs().max() > 1e-2
        assert (model(input_ids=ids).logits - dropped).abs().max() > 1e-2


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_gradients_equal_finite_differences(family: str) -> None:
    """Of every section's keys and values, along random directions."""
    # T5's ReLU bends within so large a step; version 1.1 is smooth
    model = fresh_model64(family, **({"feed_forward_proj": "gated-gelu"} if family == "t5" else {}))
    source = Trainable(random_prefix(model, P))
    inputs = batch_of(family, lengths=[5, 3], y_lengths=[2, 4])
    # float32 norms round the loss at about 1e-8, and a small step would measure that: so a larger one, and a
    # looser bound
    eps, bound = (1e-4, 1e-7) if family in FLOAT64_THROUGHOUT else (1e-3, 1e-3)
    generator = torch.Generator().manual_seed(5)
    with attach(model, source):
        loss_of(model, inputs).backward()
        for section in source.layers:
            for kind in ("keys", "values"):
                chosen = [p for name, p in source.kv.items() if name.startswith(section) and name.endswith(kind)]
                norm = torch.stack([p.grad.norm() for p in chosen]).norm()
                # half along the gradient, so that the slope is far from zero; half anywhere
                directions = [
                    p.grad / norm + torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.numel() ** 0.5
                    for p in chosen
                ]
                slope = sum(float((p.grad * direction).sum()) for p, direction in zip(chosen, directions, strict=True))
                losses = []
                with torch.no_grad():
                    for step in (eps, -2 * eps, eps):
                        for p, direction in zip(chosen, directions, strict=True):
                            p += step * direction
                        losses.append(loss_of(model, inputs).item())
                assert slope > 1e-3
                assert (losses[0] - losses[1]) / (2 * eps) == pytest.approx(slope, rel=bound)


@pytest.mark.parametrize("family", ALL)
def test_only_the_prefix_learns(family: str) -> None:
    model = tiny_model(family)
    source = Trainable(random_prefix(model, P))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = batch_of(family, lengths=[7, 3])
    with attach(model, source):
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert set(trainable) == {
            f"foreword.kv.{section}-{i}-{kind}"
            for section, layers in section_shapes(model).items()
            for i in range(len(layers))
            for kind in ("keys", "values")
        }
        optimizer = torch.optim.AdamW(trainable.values(), lr=0.05)
        losses = []
        for _ in range(3):
            with torch.no_grad():
                loss_of(model, inputs)
            loss = loss_of(model, inputs)
            loss.backward()
            losses.append(loss.item())
            for name, parameter in trainable.items():
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 1e-6, name
            optimizer.step()
            optimizer.zero_grad()
        assert source.calls == 6, "once in every forward pass"
    assert losses[2] < losses[0] - 0.01
    after = model.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("family", ALL)
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = fresh_model64(family, **NO_DROPOUT.get(family, {}))
    source = Trainable(random_prefix(model, P))
    inputs = batch_of(family, lengths=[7, 3])
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    next(layer for layer in attention_layers(model)).register_forward_hook(count)
    model.train()
    found = []
    with attach(model, source):
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            runs = 0
            source.zero_grad()
            loss = loss_of(model, inputs)
            loss.backward()
            found.append({"loss": loss.detach(), **gradients(source)})
            assert runs == 1 + checkpointing
    assert len(found[0]) == 1 + len(source.kv)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-12)


def test_what_is_captured_has_a_gradient_under_checkpointing_too() -> None:
    """A prefix computed by the base itself, from embeddings that learn."""

    class Embedded(nn.Module):
        def __init__(self, model: PreTrainedModel):
            super().__init__()
            self.embeddings = nn.Parameter(model.get_input_embeddings()(random_ids(1, P)).detach().clone())
            self.model = [model]

        def forward(self) -> Stack:
            with capture(self.model[0]) as seen:
                self.model[0].base_model(inputs_embeds=self.embeddings, use_cache=False)
            return Stack({"decoder": [layer for _, layer in sorted(seen["decoder"].items())]})

    model = fresh_model64("gpt2", **NO_DROPOUT["gpt2"]).train()
    source = Embedded(model)
    inputs = batch_of("gpt2", lengths=[7, 3])
    found = []
    with attach(model, source):
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            source.zero_grad()
            loss_of(model, inputs).backward()
            found.append(gradients(source)["embeddings"])
    assert all(block.gradient_checkpointing for block in model.transformer.h)
    assert found[0].abs().amax(-1).min() > 1e-6
    torch.testing.assert_close(found[1], found[0])


def test_rows_of_different_trainable_prefixes_learn_from_their_own_rows_alone() -> None:
    class Two(nn.Module):
        def __init__(self, model: PreTrainedModel):
            super().__init__()
            self.users = nn.ModuleList([Trainable(random_prefix(model, P, seed=n)) for n in range(2)])

        def forward(self) -> Stack:
            one, two = (user().sections["decoder"] for user in self.users)
            layers = [tuple(torch.cat(pair) for pair in zip(a, b, strict=True)) for a, b in zip(one, two, strict=True)]
            return Stack({"decoder": layers})

    model = model64("gpt2")
    both = Two(model)
    inputs = batch_of("gpt2", lengths=[5, 7, 3])
    with attach(model, both) as attachment:
        attachment.rows = torch.tensor([1, -1, 1])
        loss_of(model, inputs).backward()
    assert all(p.grad.abs().max() > 1e-6 for p in both.users[1].parameters())
    assert all(p.grad.abs().max() == 0 for p in both.users[0].parameters())


def test_a_float32_prefix_learns_on_a_bfloat16_base_and_under_autocast() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model("llama", dtype=dtype)
        source = Trainable(random_prefix(model, P)).float()
        inputs = batch_of("llama", lengths=[7, 3])
        with attach(model, source), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logits = model(**inputs).logits
            assert logits.dtype == torch.bfloat16
            loss_of(model, inputs).backward()
        for name, gradient in gradients(source).items():
            assert gradient.dtype == torch.float32, name
            assert gradient.isfinite().all(), name
            assert gradient.abs().max() > 0, name
        exact = tiny_model("llama")
        with attach(exact, source):
            expected = exact(**inputs).logits
        assert (logits - expected).abs().mean() < 0.1 * expected.abs().mean()


# ---- infix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_infix_stands_between_x_and_y(family: str, masked: bool) -> None:
    """x doesn't see the virtual tokens and keeps its positions; y sees them and comes P later."""
    model = model64(family)
    prefix = random_prefix(model, P)
    lengths = [7, 6] if masked else [7, 7]
    inputs = batch_of(family, lengths=lengths)
    given = dict(inputs) if masked else {"input_ids": inputs["input_ids"]}
    real = real_places(inputs)
    infix = [4, 2]
    bare = model(**inputs).logits
    with attach(model, prefix) as attachment:
        attachment.infix = torch.tensor(infix)
        logits = model(**given, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = []
        for start, end in ((0, 3), (3, 4), (4, 6), (6, 7)):
            mask = {"attention_mask": inputs["attention_mask"][:, :end]} if masked else {}
            piece = inputs["input_ids"][:, start:end]
            parts.append(model(input_ids=piece, past_key_values=cache, **mask).logits)
    assert_same(family, logits[real], by_hand(model, [prefix] * 2, inputs, infix=infix)[real])
    assert_same(family, torch.cat(parts, 1)[real], logits[real])
    for b, n in enumerate(infix):
        assert_same(family, logits[b, :n], bare[b, :n])
        assert (logits - bare)[b, n:][real[b, n:]].abs().amax(-1).min() > 1e-3


def test_an_infix_counts_for_all_beams_of_its_row() -> None:
    model = model64("llama")
    prefix = random_prefix(model, P)
    inputs = {name: tensor.repeat_interleave(3, 0) for name, tensor in batch_of("llama", lengths=[7, 6]).items()}
    with attach(model, prefix) as attachment:
        attachment.infix = torch.tensor([4, 2])
        logits = model(**inputs, use_cache=False).logits
        attachment.infix = torch.tensor([4, 4, 4, 2, 2, 2])
        assert torch.equal(model(**inputs, use_cache=False).logits, logits)


# ---- coming and going ------------------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Whatever attaching could leave behind."""
    return {
        "class": type(model),
        "implementations": [m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)],
        "hooks": [
            len(getattr(m, name))
            for m in model.modules()
            for name in (
                "_forward_pre_hooks",
                "_forward_hooks",
                "_forward_hooks_always_called",
                "_forward_pre_hooks_with_kwargs",
            )
        ],
        "state": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "forward": type(model).forward,
    }


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_detach_leaves_the_model_as_it_was(family: str, trainable: bool) -> None:
    model = fresh_model64(family)
    before = state_of(model)
    inputs = batch_of(family, lengths=[5, 3])
    expected = model(**inputs).logits
    prefix = random_prefix(model, P)
    attachment = attach(model, Trainable(prefix) if trainable else prefix)
    assert isinstance(model, before["class"])
    assert type(model).forward is before["forward"]
    assert (list(model.state_dict()) == before["state"]) is not trainable
    model(**inputs)
    attachment.detach()
    assert state_of(model) == before
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    with pytest.raises(KeyError), attach(model, prefix):
        raise KeyError
    assert state_of(model) == before


def test_a_failed_forward_pass_leaves_no_trace() -> None:
    model = model64("gpt2")
    source = Trainable(random_prefix(model, P))
    ids = random_ids(1, 7)
    with attach(model, source):
        expected = model(input_ids=ids).logits
        with pytest.raises(IndexError):
            model(input_ids=random_ids(1, CONTEXT - P + 1))
        assert model(input_ids=random_ids(1, CONTEXT - P)).logits.isfinite().all()
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert source.calls == 4
        # torch tells no hook of an interrupt
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids)
        handle.remove()
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert source.calls == 6


def test_detaching_twice_leaves_the_next_one_alone() -> None:
    model = model64("gpt2")
    ids = random_ids(1, 7)
    first = attach(model, random_prefix(model, P))
    first.detach()
    with attach(model, random_prefix(model, P, seed=1)):
        expected = model(input_ids=ids).logits
        first.detach()
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_saving_can_be_taken_over_meanwhile() -> None:
    model = fresh_model64("gpt2")
    saved: list[Any] = []
    with attach(model, Trainable(random_prefix(model, P)), save=saved.append):
        model.save_pretrained("folder", safe_serialization=True)
    assert saved == ["folder"]
    assert model.save_pretrained.__func__ is PreTrainedModel.save_pretrained


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_attention_comes_back(implementation: str) -> None:
    model = fresh_model64("bart", attn_implementation=implementation)
    attach(model, random_prefix(model, P)).detach()
    assert {m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)} == {
        implementation
    }


# ---- errors ----------------------------------------------------------------------------------------------


def test_an_unsupported_family_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=14, n_layer=1, n_head=2))
    prefix = random_prefix(tiny_model("gpt2"), P)
    with pytest.raises(BaseLoadError, match=r"expected a base of one of the families gpt2, opt, .*, mt5; got 'bloom'"):
        attach(model, prefix)


@pytest.mark.parametrize("kind", [GPT2Model, GPT2ForSequenceClassification])
def test_a_model_that_predicts_no_words_is_refused(kind: type[PreTrainedModel]) -> None:
    gpt2 = tiny_model("gpt2")
    model = kind(gpt2.config).eval()
    before = state_of(model)
    with pytest.raises(
        BaseLoadError,
        match=rf"expected a language model .*; got {kind.__name__}: load it with foreword.load_base",
    ):
        attach(model, random_prefix(gpt2, P))
    assert state_of(model) == before


def test_attaching_twice_is_refused_and_the_first_stays() -> None:
    model = model64("gpt2")
    ids = random_ids(1, 7)
    first, second = random_prefix(model, P), random_prefix(model, P, seed=1)
    with attach(model, first):
        expected = model(input_ids=ids).logits
        with pytest.raises(SettingsError, match="the model already has a prefix attached: detach that one first"):
            attach(model, second)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
    with attach(model, second):
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("when", ["set_attn_implementation", "register_forward_hook", "add_module"])
def test_ctrl_c_while_a_prefix_is_attached(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model64("llama")
    before = state_of(model)
    trainable = trainable_prefix(Base(model, tiny_tokenizer("llama"), "x"), length=P, reparametrization="direct")
    real = getattr(type(model), when)

    def interrupted(*args: Any, **more: Any) -> None:
        patch.undo()
        if when != "register_forward_hook":
            real(*args, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(model), when, interrupted)
        with pytest.raises(KeyboardInterrupt):
            attach(model, trainable)
    assert state_of(model) == before
    with attach(model, random_prefix(model, P)):
        pass


def test_ctrl_c_while_a_prefix_is_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model64("llama")
    before = state_of(model)

    def interrupted(model: Any, name: str) -> None:
        patch.undo()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), attach(model, random_prefix(model, P)):
        patch.setattr(type(model), "set_attn_implementation", interrupted)
    assert state_of(model) == before


def test_what_cannot_be_attached_is_refused() -> None:
    base = Base(tiny_model("gpt2"), tiny_tokenizer("gpt2"), "x")
    prefix = random_prefix(base.model, P)
    with pytest.raises(SettingsError, match=r"expected a model of transformers, such as base\.model; got Base"):
        attach(base, prefix)  # type: ignore[arg-type]
    for source in ("p.safetensors", [prefix], None):
        with pytest.raises(SettingsError, match=f"expected a Prefix, .*; got {type(source).__name__}"):
            attach(base.model, source)  # type: ignore[arg-type]
    infix = Prefix(prefix.sections, dataclasses.replace(prefix.card, training={"infix": True}))
    with pytest.raises(SettingsError, match="an infix stands within x"):
        attach(base.model, infix)
    stack = Stack.of([prefix], device=base.device, dtype=base.dtype)
    with pytest.raises(WrongBaseError, match="expected a prefix with 3 decoder layers of 2x14; got one with 3 decoder"):
        attach(tiny_model("llama"), stack)
    with attach(base.model, prefix), pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        base.model()


def test_a_prefix_of_other_shapes_is_refused() -> None:
    gpt2, llama, bart = (tiny_model(family) for family in ("gpt2", "llama", "bart"))
    with pytest.raises(
        WrongBaseError,
        match=r"expected a prefix with 3 decoder layers of 2x14; got one of 'tiny gpt2' with 3 .* of 5x14",
    ):
        attach(llama, random_prefix(gpt2, P))
    with pytest.raises(
        WrongBaseError,
        match="expected a prefix with 2 encoder layers of 3x28, 3 decoder layers of 6x14, 3 cross",
    ):
        attach(bart, random_prefix(llama, P))
    prefixes = [random_prefix(gpt2, P), random_prefix(llama, P)]
    with pytest.raises(
        WrongBaseError,
        match=r"one base; got 3 .* of 5x14 \(of 'tiny gpt2'\) and 3 .* of 2x14 \(of 'tiny llama'\)",
    ):
        Stack.of(prefixes, device=gpt2.device, dtype=gpt2.dtype)


def test_of_threads_that_attach_at_once_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    prefix, both = random_prefix(model, P), threading.Barrier(2)
    free, outcomes = foreword.attach.check_free, []

    def look(model: PreTrainedModel) -> None:
        free(model)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    def run() -> None:
        try:
            outcomes.append(attach(model, prefix))
        except SettingsError as error:
            outcomes.append(error)

    monkeypatch.setattr(foreword.attach, "check_free", look)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (attachment,) = (one for one in outcomes if not isinstance(one, SettingsError))
    assert len(outcomes) == 2
    attachment.detach()
    free(model)
