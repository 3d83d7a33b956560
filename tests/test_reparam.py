"""What is trained is the prefix it folds into, starts where it is told to, and learns in every layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import pytest
import torch
from tiny import (
    CONTEXT,
    DECODER_ONLY,
    ENCODER_DECODER,
    WINDOWED,
    random_prefix,
    refused,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn

from foreword.attach import attach
from foreword.bases import Base
from foreword.errors import SettingsError, TooLongError, WrongBaseError
from foreword.prefix import Card, Prefix
from foreword.reparam import (
    Reparametrization,
    TrainablePrefix,
    activations,
    layers_of,
    matrices_of,
    matrix_of,
    trainable_prefix,
)
from foreword.settings import REPARAMETRIZATIONS

ALL = (*DECODER_ONLY, *ENCODER_DECODER)
P = 5
UNEQUAL = [(2, 7), (5, 3), (1, 11)]
KINDS = [
    (family, kind) for family in ALL for kind in REPARAMETRIZATIONS if kind != "embedding" or family in DECODER_ONLY
]


@functools.cache
def base_of(family: str) -> Base:
    """One for all tests, which leave it as it was. Its windows are wider than any text here."""
    config = {"sliding_window": 64} if family in WINDOWED else {}
    return Base(tiny_model(family, **config), tiny_tokenizer(family), f"tiny {family}")


def random_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefix_for(base: Base, length: int = P, *, seed: int = 0) -> Prefix:
    prefix = random_prefix(base.model, length, seed=seed)
    return Prefix(prefix.sections, dataclasses.replace(prefix.card, fingerprint=base.fingerprint))


def card_of(base: Base) -> Card:
    return Card(base=base.name, fingerprint=base.fingerprint)


def inputs_of(base: Base, x: Sequence[int], y: Sequence[int] = (7, 3)) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor([x])}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([y])
    return inputs


def shaken(trainable: TrainablePrefix) -> TrainablePrefix:
    """As after some steps: away from where it started, and from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return trainable


def assert_equal_sections(actual: Prefix, expected: Prefix) -> None:
    assert actual.shapes == expected.shapes
    for section, layers in expected.sections.items():
        for layer, other in zip(layers, actual.sections[section], strict=True):
            assert torch.equal(layer[0], other[0])
            assert torch.equal(layer[1], other[1])


# ---- matrices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_layers_and_matrices_are_inverse(lead: tuple[int, ...]) -> None:
    matrix = torch.randn(*lead, P, sum(2 * groups * dim for groups, dim in UNEQUAL))
    layers = layers_of(matrix, UNEQUAL)
    for (keys, values), (groups, dim) in zip(layers, UNEQUAL, strict=True):
        assert keys.shape == values.shape == (*lead, groups, P, dim)
    assert torch.equal(matrix_of(layers), matrix)


def test_a_row_of_the_matrix_is_a_virtual_token() -> None:
    """Its keys and values layer by layer, head by head."""
    matrix = torch.arange(P * sum(2 * groups * dim for groups, dim in UNEQUAL)).view(P, -1)
    layers = layers_of(matrix, UNEQUAL)
    for i, row in enumerate(matrix):
        parts = [tensor[g, i] for layer in layers for tensor in layer for g in range(tensor.shape[0])]
        assert torch.cat(parts).tolist() == row.tolist()


def test_a_saved_prefix_as_matrices() -> None:
    base = base_of("bart")
    prefix = prefix_for(base)
    half = Prefix(
        {s: [(k.bfloat16(), v.bfloat16()) for k, v in layers] for s, layers in prefix.sections.items()}, prefix.card
    )
    for section, matrix in matrices_of(half).items():
        assert matrix.dtype == torch.float32
        keys, values = half.sections[section][1]
        groups, dim = base.shapes[section][0]
        start = 2 * groups * dim
        groups, dim = base.shapes[section][1]
        assert torch.equal(matrix[3, start : start + groups * dim], keys[:, 3].flatten().float())
        assert torch.equal(matrix[3, start + groups * dim : start + 2 * groups * dim], values[:, 3].flatten().float())


# ---- folding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_folded_prefix_is_what_was_trained(family: str, kind: Reparametrization, started: bool) -> None:
    base = base_of(family)
    start = (random_ids(9), random_ids(4, seed=1)) if started else None
    trainable = shaken(trainable_prefix(base, length=P, reparametrization=kind, hidden=13, start=start))
    card = card_of(base)
    with torch.no_grad(), attach(base.model, trainable):
        expected = base.model(**inputs_of(base, random_ids(7))).logits
        prefix = trainable.fold(card)
    assert prefix.card is card
    assert prefix.length == trainable.length == P
    assert prefix.dtype == "float32"
    stack = trainable()
    for section, layers in prefix.sections.items():
        for (keys, values), (trained_keys, trained_values) in zip(layers, stack.sections[section], strict=True):
            torch.testing.assert_close(keys, trained_keys[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(values, trained_values[0], rtol=0, atol=1e-6)
            assert keys.is_contiguous()
            assert not keys.requires_grad
    with torch.no_grad(), attach(base.model, prefix):
        torch.testing.assert_close(base.model(**inputs_of(base, random_ids(7))).logits, expected, rtol=0, atol=1e-5)
    bare = base.model(**inputs_of(base, random_ids(7))).logits
    assert (bare - expected).abs().max() > 1e-2


@pytest.mark.parametrize("started", [False, True])
def test_the_mlp_by_hand(started: bool) -> None:
    """A[i] + W tanh(V P'[i] + a) + b, for each section."""
    base = base_of("bart")
    start = prefix_for(base) if started else None
    trainable = shaken(trainable_prefix(base, length=P, reparametrization="mlp", hidden=13, start=start))
    named = dict(trainable.named_parameters())
    for section, matrix in trainable.matrices().items():
        small = named[f"p_small.{section}"]
        inner = small @ named[f"mlp.{section}.0.weight"].T + named[f"mlp.{section}.0.bias"]
        expected = inner.tanh() @ named[f"mlp.{section}.2.weight"].T + named[f"mlp.{section}.2.bias"]
        if start is not None:
            expected = expected + matrix_of(start.sections[section])
        torch.testing.assert_close(matrix, expected)


def test_a_state_is_taken_over_with_what_it_started_from() -> None:
    base = base_of("t5")
    make = functools.partial(trainable_prefix, base, length=P, reparametrization="mlp", hidden=13)
    trained, other = shaken(make(start=prefix_for(base))), make(start=prefix_for(base, seed=1))
    other.load_state_dict(trained.state_dict())
    for section, matrix in trained.matrices().items():
        assert torch.equal(other.matrices()[section], matrix)


# ---- where it starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_activations_are_what_the_cache_holds(family: str) -> None:
    base = base_of(family)
    ids = random_ids(P)
    with torch.no_grad():
        cache = base.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    assert len(cache.layers) == len(base.shapes["decoder"]) == 3
    for start in (ids, ids + random_ids(4, seed=1)):
        found = activations(base, start, [], P)
        assert list(found) == ["decoder"]
        for (keys, values), layer in zip(
            layers_of(found["decoder"], base.shapes["decoder"]), cache.layers, strict=True
        ):
            torch.testing.assert_close(keys, layer.keys[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(values, layer.values[0], rtol=0, atol=1e-5)
    again = activations(base, ids[:2], [], P)
    torch.testing.assert_close(again, activations(base, [*ids[:2], *ids[:2], ids[0]], [], P), rtol=0, atol=0)


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_activations_are_each_sections_projections(family: str) -> None:
    base = base_of(family)
    bart = {
        "encoder": "model.encoder.layers.{}.self_attn.{}_proj",
        "decoder": "model.decoder.layers.{}.self_attn.{}_proj",
        "cross": "model.decoder.layers.{}.encoder_attn.{}_proj",
    }
    t5 = {
        "encoder": "encoder.block.{}.layer.0.SelfAttention.{}",
        "decoder": "decoder.block.{}.layer.0.SelfAttention.{}",
        "cross": "decoder.block.{}.layer.1.EncDecAttention.{}",
    }
    places = {"bart": bart, "pegasus": bart, "t5": t5, "mt5": t5}[family]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        base.model.get_submodule(place.format(i, kind)).register_forward_hook(
            functools.partial(lambda name, module, args, out: seen.__setitem__(name, out), f"{section}{i}{kind}")
        )
        for section, place in places.items()
        for i in range(len(base.shapes[section]))
        for kind in "kv"
    ]
    x, y = random_ids(P), random_ids(P, seed=1)
    base.model(input_ids=torch.tensor([x]), decoder_input_ids=torch.tensor([y]))
    for handle in handles:
        handle.remove()
    found = activations(base, x, [*y, 3], P)
    assert list(found) == ["encoder", "decoder", "cross"]
    for section, shapes in base.shapes.items():
        parts = [seen[f"{section}{i}{kind}"][0] for i in range(len(shapes)) for kind in "kv"]
        torch.testing.assert_close(found[section], torch.cat(parts, 1), rtol=0, atol=2e-5 if family == "mt5" else 1e-5)
    torch.testing.assert_close(activations(base, x, [], P), activations(base, x, x, P), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["direct", "mlp", "embedding"])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_started_from_words_it_stands_for_the_words(family: str, kind: Reparametrization) -> None:
    """Before training, x goes on as in [words; x]."""
    base = base_of(family)
    ids = random_ids(P + 11)
    with torch.no_grad():
        expected = base.model(input_ids=torch.tensor([ids])).logits[:, P:]
        with attach(base.model, trainable_prefix(base, length=P, reparametrization=kind, start=(ids, []))):
            logits = base.model(input_ids=torch.tensor([ids[P:]])).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_trained_embeddings_stand_for_tokens(family: str) -> None:
    base = base_of(family)
    trainable = trainable_prefix(base, length=P, reparametrization="embedding")
    x = torch.tensor([random_ids(11)])
    with torch.no_grad():
        embeds = torch.cat([trainable.get_parameter("embeddings")[None], base.model.get_input_embeddings()(x)], 1)
        expected = base.model(inputs_embeds=embeds).logits[:, P:]
        with attach(base.model, trainable):
            logits = base.model(input_ids=x).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ALL)
def test_what_is_attached_meanwhile_changes_no_activations(family: str) -> None:
    base = base_of(family)
    expected = activations(base, random_ids(P), random_ids(P, seed=1), P)
    with attach(base.model, random_prefix(base.model, 3)):
        found = activations(base, random_ids(P), random_ids(P, seed=1), P)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ALL)
def test_an_mlp_on_top_of_a_start_begins_at_it(family: str) -> None:
    base = base_of(family)
    start = (random_ids(9), random_ids(4, seed=1))
    expected = activations(base, *start, P)
    found = trainable_prefix(base, length=P, reparametrization="mlp", hidden=13, start=start).matrices()
    for section, matrix in expected.items():
        assert torch.equal(found[section], matrix)
        assert matrix.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["direct", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bart", "t5"])
def test_training_goes_on_from_a_saved_prefix(family: str, kind: Reparametrization) -> None:
    """Its own length counts, and it stays as it was."""
    base = base_of(family)
    prefix = prefix_for(base, 7)
    before = {s: [(k.clone(), v.clone()) for k, v in layers] for s, layers in prefix.sections.items()}
    trainable = trainable_prefix(base, length=P, reparametrization=kind, hidden=13, start=prefix)
    assert trainable.length == 7
    assert_equal_sections(trainable.fold(card_of(base)), prefix)
    shaken(trainable)
    assert_equal_sections(prefix, Prefix(before, prefix.card))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_step_is_as_large_for_every_layer_in_its_own_measure(family: str) -> None:
    """P_θ = θ S, with S the power of two next to the root mean square of a layer's keys, or of its values."""
    base = base_of(family)
    prefix = prefix_for(base)
    for sign, layers in enumerate(prefix.sections.values()):
        for i, (keys, values) in enumerate(layers):
            keys *= 10.0 ** (i + sign)
            values *= 0.3
    layers = next(iter(prefix.sections.values()))
    layers[0][1].zero_()
    trainable = trainable_prefix(base, length=P, reparametrization="direct", start=prefix)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter += 0.5
    for section, moved in trainable.fold(card_of(base)).sections.items():
        for before, after in zip(prefix.sections[section], moved, strict=True):
            for old, new in zip(before, after, strict=True):
                size = old.square().mean().sqrt().item()
                step = 2.0 ** round(math.log2(size)) if size else 1.0
                torch.testing.assert_close(new - old, torch.full_like(old, 0.5 * step), rtol=1e-4, atol=1e-5 * step)


def test_random_starts_are_small() -> None:
    direct = trainable_prefix(base_of("bart"), length=31, reparametrization="direct")
    for matrix in direct.matrices().values():
        assert matrix.std().item() == pytest.approx(0.02, rel=0.05)
    for family in ("gpt2", "gemma3"):
        base = base_of(family)
        own = base.model.get_input_embeddings()(torch.arange(len(base.embeddings)))
        embedding = trainable_prefix(base, length=61, reparametrization="embedding")
        assert embedding.get_parameter("embeddings").std().item() == pytest.approx(own.std().item(), rel=0.05)
    # Gemma scales what it looks up
    assert own.std() > 5 * base.embeddings.std()


# ---- randomness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
def test_the_seed_alone_decides(kind: Reparametrization) -> None:
    base = base_of("gpt2")
    make = functools.partial(trainable_prefix, base, length=P, reparametrization=kind)
    torch.manual_seed(1)
    first = make(seed=3).state_dict()
    torch.manual_seed(2)
    same, other = make(seed=3).state_dict(), make(seed=4).state_dict()
    for name, tensor in first.items():
        assert torch.equal(same[name], tensor)
        # units are no choice of the seed's
        assert torch.equal(other[name], tensor) is name.startswith("scale")


@pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
def test_nobody_elses_random_numbers_change(kind: Reparametrization, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(*_: object) -> None:
        raise AssertionError("another device's generator was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    before = torch.get_rng_state()
    trainable_prefix(base_of("llama"), length=P, reparametrization=kind, start=(random_ids(3), []))
    trainable_prefix(base_of("llama"), length=P, reparametrization=kind)
    assert torch.equal(torch.get_rng_state(), before)


# ---- learning --------------------------------------------------------------------------------------------


def parameters_of(base: Base, kind: str) -> dict[str, tuple[int, ...]]:
    """What should be trained, and its shapes; the MLP's hidden layer has 13."""
    if kind == "embedding":
        return {"embeddings": (P, base.embeddings.shape[1])}
    expected: dict[str, tuple[int, ...]] = {}
    size = base.model.config.hidden_size
    for section, layers in base.shapes.items():
        width = sum(2 * groups * dim for groups, dim in layers)
        if kind == "direct":
            expected[f"p_theta.{section}"] = (P, width)
        else:
            expected |= {
                f"p_small.{section}": (P, size),
                f"mlp.{section}.0.weight": (13, size),
                f"mlp.{section}.0.bias": (13,),
                f"mlp.{section}.2.weight": (width, 13),
                f"mlp.{section}.2.bias": (width,),
            }
    return expected


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_exactly_the_prefixs_parameters_are_trained(family: str, kind: Reparametrization) -> None:
    base = base_of(family)
    trainable = trainable_prefix(base, length=P, reparametrization=kind, hidden=13)
    expected = parameters_of(base, kind)
    with attach(base.model, trainable) as attachment:
        found = {n: tuple(p.shape) for n, p in attachment.model.named_parameters() if p.requires_grad}
    assert found == {f"foreword.{name}": shape for name, shape in expected.items()}
    assert {name: tuple(p.shape) for name, p in trainable.named_parameters()} == expected
    assert all(parameter.dtype == torch.float32 for parameter in trainable.parameters())


@pytest.mark.parametrize(("length", "hidden"), [(1, 512), (99, 512), (100, 800)])
def test_the_mlps_size_is_the_papers(length: int, hidden: int) -> None:
    base = base_of("llama")
    trainable = trainable_prefix(base, length=length, reparametrization="mlp", start=prefix_for(base, length))
    assert trainable.get_parameter("mlp.decoder.0.bias").shape == (hidden,)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_layers_keys_and_values_learn(family: str, kind: Reparametrization, started: bool) -> None:
    """Separately, and after an evaluation pass, too."""
    base = base_of(family)
    start = (random_ids(9), random_ids(4, seed=1)) if started else None
    trainable = trainable_prefix(base, length=P, reparametrization=kind, hidden=13, start=start)
    kept: dict[str, torch.Tensor] = {}
    plain = trainable.matrices

    def matrices() -> dict[str, torch.Tensor]:
        kept.update(plain())
        for matrix in kept.values():
            if matrix.requires_grad:
                matrix.retain_grad()
        return dict(kept)

    trainable.matrices = matrices  # type: ignore[method-assign]
    inputs = inputs_of(base, random_ids(7), random_ids(3, seed=2))
    with attach(base.model, trainable):
        for step in range(2):
            with torch.no_grad():
                base.model(**inputs)
            logits = base.model(**inputs).logits
            nn.functional.cross_entropy(logits[0], torch.tensor(random_ids(logits.shape[1], seed=3))).backward()
            for section, shapes in base.shapes.items():
                for i, layer in enumerate(layers_of(kept[section].grad, shapes)):
                    for name, gradient in zip(("keys", "values"), layer, strict=True):
                        assert gradient.isfinite().all()
                        assert gradient.abs().amax((0, 2)).min() > 0, f"{section}.{i}.{name}"
            if step == 0:
                # an MLP that starts at zero moves its inner weights from the second step on
                with torch.no_grad():
                    for parameter in trainable.parameters():
                        parameter -= parameter.grad
                        parameter.grad = None
    for name, parameter in trainable.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for name, parameter in base.model.named_parameters())


def test_a_float32_prefix_on_a_bfloat16_base() -> None:
    base = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer("llama"), "half")
    for kind in REPARAMETRIZATIONS:
        trainable = trainable_prefix(base, length=P, reparametrization=kind, start=(random_ids(9), []))
        assert all(parameter.dtype == torch.float32 for parameter in trainable.parameters())
        with attach(base.model, trainable):
            base.model(input_ids=torch.tensor([random_ids(7)])).logits.float().logsumexp(-1).sum().backward()
        gradients = [parameter.grad for parameter in trainable.parameters() if parameter.grad is not None]
        assert any(gradient.abs().max() > 0 for gradient in gradients)
        assert trainable.fold(card_of(base)).dtype == "float32"


# ---- errors ----------------------------------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    gpt2, t5 = base_of("gpt2"), base_of("t5")
    with refused(SettingsError, "embedding-only virtual tokens need a decoder-only base; use the reparametrization"):
        trainable_prefix(t5, length=P, reparametrization="embedding")
    with refused(SettingsError, "a saved prefix has no embeddings to go on from: use 'direct' or 'mlp'"):
        trainable_prefix(gpt2, length=P, reparametrization="embedding", start=prefix_for(gpt2))


def test_a_prefix_of_another_base_is_refused() -> None:
    with refused(WrongBaseError, "expected a prefix for the base 'tiny gpt2' .*trained on 'tiny llama'"):
        trainable_prefix(base_of("gpt2"), length=P, reparametrization="direct", start=prefix_for(base_of("llama")))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bart"])
def test_more_virtual_tokens_than_the_context_are_refused(family: str) -> None:
    base = base_of(family)
    message = f"expected a length below the base's context of {CONTEXT}; got {CONTEXT}: take a shorter prefix"
    with refused(TooLongError, message):
        trainable_prefix(base, length=CONTEXT, reparametrization="direct", start=([1], [2]))
    if not base.is_encoder_decoder:
        with refused(TooLongError, message):
            trainable_prefix(base, length=CONTEXT, reparametrization="embedding")
    assert (
        trainable_prefix(base, length=CONTEXT - 1, reparametrization="direct", start=([1], [2])).length == CONTEXT - 1
    )
