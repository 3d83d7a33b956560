"""Each row's text is what it gives alone, whatever goes with it, and nothing but what was asked for."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.utils.logging
from reference import attention_layers, logits_by_hand
from tiny import (
    BOS,
    CONTEXT,
    DECODER_ONLY,
    ENCODER_DECODER,
    EOS,
    PAD,
    VOCAB,
    random_prefix,
    refused,
    tiny_model,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import foreword.generation
from foreword.attach import Stack, attach
from foreword.bases import Base
from foreword.capture import capture
from foreword.data import frame
from foreword.errors import DataError, PrefixFileError, SettingsError, TooLongError, WrongBaseError
from foreword.generation import GenerateSettings, generate, stream
from foreword.prefix import Card, Framing, Prefix
from foreword.training import TrainSettings, train

ALL = (*DECODER_ONLY, *ENCODER_DECODER)
MORE_ENDS = list(range(0, 256, 9))
"""Tokens that end a text as well, so that random models end some of theirs."""
INPUTS = ["a", "some longer input", "bcd", "x" * 29]


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """transformers has nothing to tell the user, though nothing silences it here."""
    monkeypatch.setattr(transformers.utils.logging, "set_verbosity_error", lambda: None)
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, w0 w1 w2 ..., so that a text shows which tokens it is made of."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 259}
    vocab = {f"w{i}": i for i in range(VOCAB) if i not in special.values()} | special
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_base(family: str, tokenizer: PreTrainedTokenizerFast | None = None, **config: Any) -> Base:
    model = tiny_model(family, **config)
    return Base(model, tokenizer or tiny_tokenizer(family), f"tiny {family}")


@functools.cache
def base_of(family: str) -> Base:
    """One for all tests, which leave it as it was."""
    base = make_base(family)
    base.model.generation_config.eos_token_id = [EOS, *MORE_ENDS]
    base.model.generation_config.forced_eos_token_id = None
    return base


@functools.cache
def words_of(family: str) -> Base:
    """A base whose texts show their tokens; only the end token ends them."""
    return make_base(family, word_tokenizer())


def prefix_for(base: Base, length: int, **framing: Any) -> Prefix:
    prefix = random_prefix(base.model, length, seed=length)
    return Prefix(prefix.sections, Card(base=base.name, fingerprint=base.fingerprint, framing=Framing(**framing)))


@functools.cache
def prefixes_of(family: str) -> list[Prefix]:
    """Of unequal lengths and framings."""
    base = base_of(family)
    return [
        prefix_for(base, 5, template="{input}\n"),
        prefix_for(base, 2, template="Say: {input} ="),
        prefix_for(base, 7, template="{input}"),
    ]


def ends_of(base: Base) -> set[int]:
    ends = base.model.generation_config.eos_token_id
    return {EOS, *(ends if isinstance(ends, list) else [ends])}


@functools.cache
@torch.no_grad()
def slowly(base: Base, text: str, prefix: Prefix | None, steps: int) -> str:
    """Greedy, for one row, everything computed anew for every token: no cache, no padding, no mask."""
    x = frame(base, {"input": text}, Framing() if prefix is None else prefix.card.framing)
    y: list[int] = []
    with nullcontext() if prefix is None else attach(base.model, prefix):
        for _ in range(steps):
            if base.is_encoder_decoder:
                start = base.model.config.decoder_start_token_id
                inputs = {"input_ids": torch.tensor([x]), "decoder_input_ids": torch.tensor([[start, *y]])}
            else:
                inputs = {"input_ids": torch.tensor([[*x, *y]])}
            token = int(base.model(**inputs, use_cache=False).logits[0, -1].argmax())
            if token in ends_of(base):
                break
            y.append(token)
    return base.decode(y)


@contextmanager
def scripted(base: Base, tokens: Sequence[int]) -> Iterator[list[int]]:
    """The base says these tokens and then its end token; yields a list of how many were asked for."""
    asked = [0]

    def say(head: object, args: object, logits: torch.Tensor) -> torch.Tensor:
        token = tokens[asked[0]] if asked[0] < len(tokens) else EOS
        asked[0] += 1
        said = torch.zeros_like(logits)
        said[..., token] = 9.0
        return said

    handle = base.model.get_output_embeddings().register_forward_hook(say)
    try:
        yield asked
    finally:
        handle.remove()


def bytes_of(base: Base, text: str) -> list[int]:
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- rows and their prefixes -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_mixed_rows_are_each_as_if_alone(family: str) -> None:
    base = base_of(family)
    a, b, c = prefixes_of(family)
    steps = 5
    seen = []
    for own, size in (
        ([a, b, c, b], 16),
        ([a, a, a, a], 16),
        ([b, c, b, b], 2),
        ([None, c, None, a], 3),
        ([None] * 4, 16),
    ):
        texts = generate(base, INPUTS, own, settings=GenerateSettings(max_new_tokens=steps, batch_size=size))
        assert texts == [slowly(base, text, prefix, steps) for text, prefix in zip(INPUTS, own, strict=True)]
        seen.append(texts)
    assert all(len(set(texts)) > 1 for texts in zip(*seen, strict=True)), "every row feels its prefix"


def test_one_prefix_or_none_is_everybodys() -> None:
    base = base_of("llama")
    a = prefixes_of("llama")[0]
    settings = GenerateSettings(max_new_tokens=6)
    assert generate(base, INPUTS, a, settings=settings) == [slowly(base, text, a, 6) for text in INPUTS]
    assert generate(base, INPUTS, settings=settings) == [slowly(base, text, None, 6) for text in INPUTS]


def test_some_texts_end_early_and_some_do_not() -> None:
    """What the comparisons above would be blind to."""
    found: Counter[bool] = Counter()
    for family in ALL:
        base = base_of(family)
        texts = [slowly(base, text, own, 5) for text in INPUTS for own in (None, prefixes_of(family)[0])]
        found.update(len(bytes_of(base, text)) < 5 for text in texts)
    assert min(found[True], found[False]) > 10


def test_rows_with_one_prefix_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    a, b, _ = prefixes_of("llama")
    stacked: list[int] = []
    plain = Stack.of

    def counted(prefixes: Sequence[Prefix], **more: Any) -> Stack:
        stacked.append(len(prefixes))
        return plain(prefixes, **more)

    monkeypatch.setattr(foreword.generation.Stack, "of", counted)
    generate(base, INPUTS, [a, b, None, a], settings=GenerateSettings(max_new_tokens=1))
    assert stacked == [2]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_the_head_is_handed_whole_memory(family: str) -> None:
    """A slice of several rows would make torch copy the head's matrix once a row."""
    base = base_of(family)
    seen: list[bool] = []
    head = base.model.get_output_embeddings()
    with head.register_forward_hook(lambda head, args, out: seen.append(args[0].is_contiguous())):
        generate(base, INPUTS, settings=GenerateSettings(max_new_tokens=3))
    assert seen
    assert all(seen)
    assert not head._forward_pre_hooks


def test_texts_are_told_batch_by_batch() -> None:
    base = base_of("gpt2")
    told: list[Mapping[int, str]] = []
    settings = GenerateSettings(max_new_tokens=1, batch_size=3)
    texts = generate(base, INPUTS, settings=settings, on_texts=told.append)
    assert [len(one) for one in told] == [3, 1]
    assert {**told[0], **told[1]} == dict(enumerate(texts))
    assert generate(base, [], settings=settings, on_texts=told.append) == []
    assert generate(base, [], [], settings=settings) == []
    assert len(told) == 2


def test_nothing_is_attached_meanwhile() -> None:
    """What is attached would answer for the bare base, too."""
    base = make_base("gpt2")
    expected = generate(base, INPUTS, settings=GenerateSettings(max_new_tokens=5))
    prefix = random_prefix(base.model, 3)
    with attach(base.model, prefix):
        for own in (None, [None] * len(INPUTS)):
            with pytest.raises(SettingsError, match="the model already has a prefix attached: detach that one first"):
                generate(base, INPUTS, own)
        with pytest.raises(SettingsError, match="the model already has a prefix attached"):
            stream(base, "a", write=print)
    assert generate(base, INPUTS, settings=GenerateSettings(max_new_tokens=5)) == expected


def test_threads_share_a_base() -> None:
    base = make_base("gpt2")
    settings = GenerateSettings(max_new_tokens=7, batch_size=2)
    first, second = prefix_for(base, 3), prefix_for(base, 2)
    own = [None, first, second, first]
    expected = [generate(base, INPUTS, prefix, settings=settings) for prefix in own]
    before = base.model.generation_config
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prefix: generate(base, INPUTS, prefix, settings=settings), own * 6))
    assert found == expected * 6
    assert base.model.generation_config is before
    assert len(set(map(tuple, expected))) == 3


def test_a_thread_that_trains_beside_one_that_generates() -> None:
    """The one waits while the other computes a batch, and what is attached meanwhile refuses it; nothing is left behind."""
    base = make_base("gpt2")
    prefix, settings = prefix_for(base, 3), GenerateSettings(max_new_tokens=9)
    expected = generate(base, ["a"], prefix, settings=settings)
    implementation = base.model.config._attn_implementation
    records = [{"input": "a", "output": "b"}]
    pieces: list[str] = []
    entered = threading.Event()

    def begin_and_train() -> None:
        # as a training begins, but for longer
        with capture(base.model):
            entered.set()
            time.sleep(0.5)
        train(base, records, settings=TrainSettings(epochs=1))

    with ThreadPoolExecutor(1) as pool:
        started: list[Any] = []

        def write(piece: str) -> None:
            if not started:
                started.append(pool.submit(begin_and_train))
                entered.wait(0.2)
            pieces.append(piece)

        stream(base, "a", prefix, settings=settings, write=write)
        started[0].result()
    assert ["".join(pieces)] == expected
    assert base.model.config._attn_implementation == implementation
    assert generate(base, ["a"], prefix, settings=settings) == expected


def test_the_mode_of_each_module_stays() -> None:
    base = make_base("gpt2")
    base.model.train()
    base.model.transformer.h[0].eval()
    before = [module.training for module in base.model.modules()]
    generate(base, ["a"], settings=GenerateSettings(max_new_tokens=1))
    assert [module.training for module in base.model.modules()] == before


def test_a_rows_number_is_what_it_samples_by() -> None:
    base = base_of("gpt2")
    told: dict[int, str] = {}
    settings = GenerateSettings(max_new_tokens=7, temperature=1.0, batch_size=2)
    whole = generate(base, INPUTS, settings=settings)
    assert generate(base, INPUTS[::-1], settings=settings) != whole[::-1]
    numbers = np.arange(len(INPUTS))[::-1]
    settings = dataclasses.replace(settings, seed=np.int64(0))  # type: ignore[arg-type]
    assert generate(base, INPUTS[::-1], settings=settings, numbers=numbers, on_texts=told.update) == whole[::-1]
    assert told == dict(enumerate(whole))
    with pytest.raises(SettingsError, match=f"expected a number for each of {len(INPUTS)} inputs; got 1"):
        generate(base, INPUTS, settings=settings, numbers=[0])
    with pytest.raises(TooLongError, match="input 8: expected at most"):
        generate(base, ["a" * 5 * CONTEXT], settings=settings, numbers=[7])


def test_records_and_texts_are_framed_as_in_training() -> None:
    base = make_base("gpt2")
    base.tokenizer.chat_template = "{% for m in messages %}<a>{{ m['content'] }}<b>{% endfor %}<c>"
    settings = GenerateSettings(max_new_tokens=5)
    chat, title = prefix_for(base, 5, chat=True), prefix_for(base, 5, template="{title}: {input}\n")
    by_hand = generate(base, ["<a>hello<b><c>"], chat, settings=settings, framing=Framing(template="{input}"))
    assert generate(base, ["hello"], chat, settings=settings) == by_hand
    assert generate(base, [{"messages": [{"role": "user", "content": "hello"}]}], chat, settings=settings) == by_hand
    messages = {"messages": [{"role": "user", "content": "hello"}]}
    bare = generate(base, ["<a>hello<b><c>"], settings=settings, framing=Framing(template="{input}"))
    assert generate(base, [messages], settings=settings) == bare, "without a prefix, too"
    none = {"input": "T: hello", "messages": None}
    assert generate(base, [none], settings=settings) == generate(base, ["T: hello"], settings=settings)
    by_hand = generate(base, ["T: hello\n"], title, settings=settings, framing=Framing(template="{input}"))
    assert generate(base, [{"title": "T", "input": "hello"}], title, settings=settings) == by_hand
    assert generate(base, ["T: hello"], settings=settings) == [slowly(base, "T: hello", None, 5)]
    with refused(DataError, r"input 2: expected text in the column 'title'; got no such column \(columns: 'input'\)"):
        generate(base, [{"title": "T", "input": "a"}, "b"], title)


def test_a_bfloat16_base_takes_a_float32_prefix() -> None:
    base = make_base("gemma3").model.to(torch.bfloat16)
    half = Base(base, tiny_tokenizer("gemma3"), "half")
    (text,) = generate(half, ["a"], prefix_for(half, 5), settings=GenerateSettings(max_new_tokens=5))
    assert text
    assert half.dtype == torch.bfloat16


# ---- beams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bart", "t5"])
def test_beams_are_transformers_own(family: str) -> None:
    base = base_of(family)
    if family == "t5":
        # transformers' own T5 generates only with as many encoder as decoder layers
        base = make_base(family, num_decoder_layers=2)
    for penalty in (1.0, -2.0):
        settings = GenerateSettings(max_new_tokens=6, num_beams=3, length_penalty=penalty)
        config = GenerationConfig(
            max_new_tokens=6,
            num_beams=3,
            length_penalty=penalty,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=sorted(ends_of(base)),
        )
        expected = []
        for text in INPUTS:
            ids = torch.tensor([frame(base, {"input": text}, Framing())])
            mask = torch.ones_like(ids)
            logging.disable(logging.WARNING)  # GPT-2's, of padding after a beam's end
            out = base.model.generate(ids, attention_mask=mask, generation_config=config)[0]
            logging.disable(logging.NOTSET)
            y = out[1:] if base.is_encoder_decoder else out[ids.shape[1] :]
            expected.append(base.decode([token for token in y.tolist() if token not in ends_of(base)]))
        assert generate(base, INPUTS, settings=settings) == expected


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3", "bart", "t5"])
def test_beams_of_mixed_rows_are_each_as_if_alone(family: str) -> None:
    base = base_of(family)
    a, b, _ = prefixes_of(family)
    settings = GenerateSettings(max_new_tokens=6, num_beams=5)
    own = [a, None, b, a]
    texts = generate(base, INPUTS, own, settings=settings)
    assert texts == [generate(base, [x], prefix, settings=settings)[0] for x, prefix in zip(INPUTS, own, strict=True)]
    assert texts != generate(base, INPUTS, own, settings=GenerateSettings(max_new_tokens=6))


# ---- sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bart"])
def test_a_rows_sample_depends_on_its_place_alone(family: str) -> None:
    base = base_of(family)
    a, b, c = prefixes_of(family)
    settings = GenerateSettings(max_new_tokens=6, temperature=1.3, top_k=50, top_p=0.95, seed=3)
    own = [a, b, None, a]
    texts = generate(base, INPUTS, own, settings=settings)
    for size in (1, 2):
        assert generate(base, INPUTS, own, settings=dataclasses.replace(settings, batch_size=size)) == texts
    others = ["other", INPUTS[1], "words", INPUTS[3], "more"]
    company = generate(base, others, [c, b, None, a, c], settings=settings)
    assert (company[1], company[3]) == (texts[1], texts[3])
    assert generate(base, INPUTS[:1], [a], settings=settings) == texts[:1]
    assert generate(base, INPUTS, own, settings=dataclasses.replace(settings, seed=4)) != texts
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert generate(base, INPUTS, own, settings=settings) == texts
    assert torch.equal(torch.get_rng_state(), state)


def chi_square(counts: Counter[int], probabilities: torch.Tensor) -> None:
    """Whether counts may be drawn from these probabilities; outcomes expected fewer than 8 times count as one."""
    total = sum(counts.values())
    expected = (probabilities.double() * total).tolist()
    rare = [i for i, e in enumerate(expected) if e < 8]
    bins = [(counts[i], e) for i, e in enumerate(expected) if e >= 8]
    bins += [(sum(counts[i] for i in rare), sum(expected[i] for i in rare))]
    bins = [(found, e) for found, e in bins if e > 1e-9]
    assert len(bins) > 1
    freedom = len(bins) - 1
    statistic = sum((found - e) ** 2 / e for found, e in bins)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.6, 0, 1.0), (1.7, 5, 1.0), (1.0, 0, 0.7), (0.8, 11, 0.9)]
)
def test_samples_are_of_transformers_distribution(temperature: float, top_k: int, top_p: float) -> None:
    base = words_of("gpt2")
    prefix = prefix_for(base, 5)
    settings = GenerateSettings(
        max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=1, batch_size=1000
    )
    texts = generate(base, ["w3 w14"] * 2000, prefix, settings=settings)
    counts = Counter(int(text.removeprefix("w")) if text else EOS for text in texts)
    ids = torch.tensor([frame(base, {"input": "w3 w14"}, Framing())])
    with torch.no_grad(), attach(base.model, prefix):
        logits = base.model(input_ids=ids).logits[:, -1]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities = warpers(ids, logits)[0].softmax(-1)
    # special tokens have no word
    probabilities[EOS] += probabilities[[PAD, BOS, 259]].sum()
    probabilities[[PAD, BOS, 259]] = 0
    assert all(probabilities[token] > 0 for token in counts)
    assert set((probabilities > 0.01).nonzero().flatten().tolist()) <= set(counts)
    chi_square(counts, probabilities)


def test_a_rows_later_tokens_are_drawn_anew() -> None:
    """Pairs of tokens, the second given the first."""
    base = words_of("llama")
    settings = GenerateSettings(max_new_tokens=2, temperature=2.0, top_k=2, batch_size=1000)
    texts = generate(base, ["w3 w14"] * 2000, settings=settings)
    x = frame(base, {"input": "w3 w14"}, Framing())

    def best(tokens: list[int]) -> tuple[list[int], list[float]]:
        with torch.no_grad():
            scores, found = (base.model(input_ids=torch.tensor([tokens])).logits[0, -1] / 2.0).topk(2)
        return found.tolist(), scores.softmax(-1).tolist()

    pairs, probabilities = [], []
    for first, p in zip(*best(x), strict=True):
        for second, q in zip(*best([*x, first]), strict=True):
            pairs.append(f"w{first} w{second}")
            probabilities.append(p * q)
    assert min(probabilities) > 0.02
    counts = Counter(pairs.index(text) for text in texts)
    chi_square(counts, torch.tensor(probabilities))


# ---- where a text ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_texts_end_before_stop_strings_that_span_tokens(family: str) -> None:
    base = make_base(family)
    said = bytes_of(base, "one two STOP three")
    for settings in (
        GenerateSettings(stop=["STOP"]),
        GenerateSettings(stop=["three", "TOP", "STOP th", "STO"]),
        GenerateSettings(stop=("nothing", "STOP")),
    ):
        with scripted(base, said) as asked:
            (text,) = generate(base, ["x"], settings=settings)
        expected, steps = ("one two ", 12) if "STOP" in settings.stop else ("one two ", 11)
        assert (text, asked[0]) == (expected, steps)
    with scripted(base, said) as asked:
        assert generate(base, ["x"], settings=GenerateSettings(stop=["nothing"])) == ["one two STOP three"]
    assert asked[0] == len(said) + 1


def test_a_stop_string_of_several_bytes_ends_the_text_at_once() -> None:
    base = make_base("gpt2")
    with scripted(base, bytes_of(base, "one 😀 two")) as asked:
        assert generate(base, ["x"], settings=GenerateSettings(stop=["😀"])) == ["one "]
    assert asked[0] == len("one ") + 4


def test_stop_strings_are_looked_for_in_y_alone() -> None:
    """Not half of them in x, nor in special tokens, which no text shows."""
    base = make_base("gpt2")
    settings = GenerateSettings(stop=["\n\n", "<a>", "pad"])
    with scripted(base, [*bytes_of(base, "\nb"), 260, *bytes_of(base, "c\n\nd")]):
        assert generate(base, ["x"], prefix_for(base, 2), settings=settings) == ["\nbc"]


def test_a_stop_string_ends_its_own_row_alone() -> None:
    base = words_of("llama")
    settings = GenerateSettings(max_new_tokens=7, num_beams=1)
    inputs = ["w1 w2", "w3 w4 w5", "w6"]
    free = generate(base, inputs, settings=settings)
    word = free[1].split()[3]
    assert word not in free[0].split() + free[1].split()[:3]
    stopped = generate(base, inputs, settings=dataclasses.replace(settings, stop=[f"{word} "]))
    assert stopped[0] == free[0]
    assert stopped[1] == free[1][: free[1].index(f"{word} ")]
    with_beams = dataclasses.replace(settings, num_beams=3, stop=[f"{word} "])
    alone = [generate(base, [x], settings=with_beams)[0] for x in inputs]
    assert generate(base, inputs, settings=with_beams) == alone


def test_every_end_token_of_the_base_ends_a_text_and_none_is_shown() -> None:
    base = make_base("llama")
    (turn,) = bytes_of(base, "!")
    base.model.generation_config.eos_token_id = [turn]
    for end in (turn, EOS):
        with scripted(base, [*bytes_of(base, "one"), end, *bytes_of(base, "two")]) as asked:
            assert generate(base, ["x"]) == ["one"]
        assert asked[0] == 4
        pieces: list[str] = []
        with scripted(base, [*bytes_of(base, "one"), end]):
            assert stream(base, "x", write=pieces.append) == "one"
        assert "".join(pieces) == "one"


def test_a_base_may_name_no_end_token_of_its_own() -> None:
    base = make_base("llama")
    base.model.generation_config.eos_token_id = None
    with scripted(base, bytes_of(base, "one")) as asked:
        assert generate(base, ["x"]) == ["one"]
    assert asked[0] == 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_go_on_to_the_contexts_end_and_cut_nobody_short(family: str) -> None:
    """P + x + y fill the context exactly; words count tokens."""
    base = words_of(family)
    a = prefix_for(base, 5)
    lengths = [120, 3, 123, 120, 117]
    own = [a, a, a, None, a]
    inputs = [" ".join(["w7"] * length) for length in lengths]
    special = len(frame(base, {"input": ""}, Framing(template="{input}w7"))) - 1
    settings = GenerateSettings(max_new_tokens=8)
    texts = generate(base, inputs, own, settings=settings)
    budgets = [min(8, CONTEXT - length - special - (5 if p else 0)) for length, p in zip(lengths, own, strict=True)]
    assert budgets == [6, 8, 3, 8, 8]
    assert [len(text.split()) for text in texts] == budgets
    assert texts == [generate(base, [x], p, settings=settings)[0] for x, p in zip(inputs, own, strict=True)]
    assert len(generate(base, [" ".join(["w7"] * 125)], a, settings=settings)[0].split()) == 1
    what = "x of 126 and y of 1 tokens after 5 virtual tokens: shorten it, or train with max_input_tokens"
    with refused(TooLongError, f"input 2: expected at most 131 positions, the base's context; got {what}"):
        generate(base, ["w7", " ".join(["w7"] * 126)], a, settings=settings)


def test_the_decoders_context_is_its_own() -> None:
    """An encoder-decoder base's x takes no room from y; a base with relative positions has no end."""
    settings = GenerateSettings(max_new_tokens=23)
    bart, t5 = make_base("bart", word_tokenizer()), make_base("t5", word_tokenizer())
    bart.model.config.max_position_embeddings = 17
    x = " ".join(["w7"] * 17)
    with scripted(bart, [7] * 99):
        assert generate(bart, [x], prefix_for(bart, 5), settings=settings) == [x]
    with scripted(t5, [7] * 99):
        assert len(generate(t5, [" ".join([x] * 10)], prefix_for(t5, 5), settings=settings)[0].split()) == 23
    with refused(TooLongError, "input 1: expected at most 17 positions, .*; got x of 18 and y of 1 tokens: shorten"):
        generate(bart, [f"{x} w7"])


# ---- streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_a_stream_is_the_generated_text(family: str) -> None:
    base = base_of(family)
    for prefix in (prefixes_of(family)[0], None):
        for settings in (
            GenerateSettings(max_new_tokens=7),
            GenerateSettings(max_new_tokens=7, temperature=1.0, seed=2),
            GenerateSettings(max_new_tokens=7, temperature=1.0, stop=["e", "\ufffd"]),
        ):
            pieces: list[str] = []
            text = stream(base, "some input", prefix, settings=settings, write=pieces.append)
            assert [text] == generate(base, ["some input"], prefix, settings=settings)
            assert "".join(pieces) == text
            assert all(pieces)


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("naïve é 😀!", (), "naïve é 😀!"),
        ("one two STOP three", ("STOP",), "one two "),
        ("one STOne ST", ("STOP",), "one STOne ST"),
        ("aSSTOP", ("STOP", "SSTX"), "aS"),
        ("ab😀cd", ("😀c",), "ab"),
        ("ab😃", ("😀",), "ab😃"),
        ("abcd", ("bcdef", "c"), "ab"),
        ("STOP", ("STOP",), ""),
    ],
)
def test_pieces_are_whole_characters_and_are_never_taken_back(said: str, stop: tuple[str, ...], expected: str) -> None:
    base = make_base("llama")
    settings = GenerateSettings(stop=stop)
    pieces: list[str] = []
    with scripted(base, bytes_of(base, said)):
        assert stream(base, "x", settings=settings, write=pieces.append) == expected
    with scripted(base, bytes_of(base, said)):
        assert generate(base, ["x"], settings=settings) == [expected]
    assert "".join(pieces) == expected
    assert all(pieces)
    if not stop:
        assert pieces == list(said), "as soon as they are there"


@pytest.mark.parametrize("tail", [b"\xff", b"\xff abc", b"\xf0\x9f", b"\xf0\x9f abc \xe2\x82"])
def test_bytes_that_are_no_text_are_streamed_as_they_are_generated(tail: bytes) -> None:
    base = make_base("llama")
    said = base.tokenizer.convert_tokens_to_ids([bytes_to_unicode()[byte] for byte in b"ab" + tail])
    pieces: list[str] = []
    with scripted(base, said):
        text = stream(base, "x", write=pieces.append)
    assert text == (b"ab" + tail).decode("utf-8", errors="replace")
    assert "".join(pieces) == text
    with scripted(base, said):
        assert generate(base, ["x"]) == [text]


def test_beams_cannot_be_streamed() -> None:
    with refused(SettingsError, "a text from beams cannot be streamed: set num_beams to 1"):
        stream(base_of("gpt2"), "x", settings=GenerateSettings(num_beams=2), write=print)


# ---- nothing but what was asked for ----------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_the_bases_own_generation_settings_are_left_aside(family: str, beams: int) -> None:
    settings = GenerateSettings(max_new_tokens=9, num_beams=beams)
    plain = make_base(family)
    expected = generate(plain, INPUTS, prefix_for(plain, 5), settings=settings)
    base = make_base(family)
    often = Counter("".join(expected)).most_common(1)[0][0]
    own = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        num_beams=2,
        early_stopping=True,
        max_length=11,
        min_length=3,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        forced_bos_token_id=65,
        forced_eos_token_id=66,
        suppress_tokens=list(range(97, 123)),
        begin_suppress_tokens=list(range(200)),
        bad_words_ids=[bytes_of(base, often)],
        eos_token_id=EOS,
    )
    base.model.generation_config = own
    kept = own.to_dict()
    assert generate(base, INPUTS, prefix_for(base, 5), settings=settings) == expected
    assert base.model.generation_config is own
    assert own.to_dict() == kept
    with scripted(base, [65, 65, 65]):
        assert generate(base, ["x"], settings=settings) == [base.decode([65, 65, 65])]


def test_a_failure_leaves_the_base_as_it_was() -> None:
    base = make_base("bart")
    own, level = base.model.generation_config, transformers.utils.logging.get_verbosity()

    def write(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), scripted(base, bytes_of(base, "one")):
        stream(base, "x", prefix_for(base, 5), write=write)
    assert base.model.generation_config is own
    assert transformers.utils.logging.get_verbosity() == level
    assert base.model.config._attn_implementation == "sdpa"
    assert not any("foreword" in layer.__dict__ for layer in attention_layers(base.model))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_there_is_nothing_to_warn_of(family: str) -> None:
    """Where the padding token is the end token and x ends with it, x is long, and settings go together oddly."""
    base = make_base(family)
    base.tokenizer.pad_token = "</s>"
    framing = Framing(template="{input}</s>", max_input_tokens=99)
    inputs = ["a", "b" * (CONTEXT + 1), "cde"]
    for settings in (
        GenerateSettings(max_new_tokens=2, length_penalty=2.0),
        GenerateSettings(max_new_tokens=2, length_penalty=2.0, num_beams=2, stop=["x"]),
        GenerateSettings(max_new_tokens=2, temperature=0.5, top_k=2, top_p=0.5, stop=["x"]),
        GenerateSettings(max_new_tokens=2, top_k=2, top_p=0.5),
    ):
        assert len(generate(base, inputs, prefix_for(base, 5), settings=settings, framing=framing)) == 3


def test_what_transformers_says_of_padding_is_kept_from_the_terminal(
    nothing_logged: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 without padding at first warns once rows have ended and are filled up."""
    base = make_base("gpt2", word_tokenizer())
    inputs = [f"w{i} w{2 * i}" for i in range(1, 9)]
    first = generate(base, inputs, settings=GenerateSettings(max_new_tokens=1))
    base.model.generation_config.eos_token_id = int(first[0].removeprefix("w"))
    texts = generate(base, inputs, settings=GenerateSettings(max_new_tokens=4))
    assert not texts[0]
    assert any(texts)
    assert ["attention_mask" in record.getMessage() for record in nothing_logged] == [True]
    nothing_logged.clear()

    level = transformers.utils.logging.get_verbosity()
    monkeypatch.undo()
    transformers.utils.logging.warning_once.cache_clear()
    assert generate(base, inputs, settings=GenerateSettings(max_new_tokens=4)) == texts
    assert transformers.utils.logging.get_verbosity() == level


# ---- errors ----------------------------------------------------------------------------------------------


def test_a_prefix_of_another_base_is_refused() -> None:
    base = base_of("gpt2")
    other = prefixes_of("llama")[0]
    with refused(WrongBaseError, "expected a prefix for the base 'tiny gpt2' .* on 'tiny llama'"):
        generate(base, INPUTS[:2], [None, other])
    with refused(WrongBaseError, "expected a prefix for the base 'tiny gpt2'"):
        stream(base, "x", other, write=print)


def test_inputs_are_a_list_and_prefixes_are_one_or_as_many() -> None:
    base = base_of("gpt2")
    a = prefixes_of("gpt2")[0]
    with refused(SettingsError, "expected a list of inputs; got one str: put it in a list"):
        generate(base, "hello")
    with refused(SettingsError, "expected a list of inputs; got one dict: put it in a list"):
        generate(base, {"input": "hello"})  # type: ignore[arg-type]
    # as pandas', which gives the names of its columns, one by one
    frame_of_data: Any = type("DataFrame", (), {"columns": ["input", "output"], "__iter__": lambda _: iter("ab")})()
    with refused(SettingsError, "expected a list of inputs; got a DataFrame: give its records"):
        generate(base, frame_of_data)
    with refused(DataError, "input 2: expected a mapping, such as .*; got float"):
        generate(base, ["a", math.nan])  # type: ignore[list-item]
    settings = GenerateSettings(max_new_tokens=3)
    expected = generate(base, ["a", "b"], [a, None], settings=settings)
    both: Any = {"x": a, "y": None}.values()
    assert generate(base, iter(["a", "b"]), both, settings=settings) == expected  # type: ignore[arg-type]
    with refused(SettingsError, "expected one prefix, or one for each of 3 inputs; got 2"):
        generate(base, ["a", "b", "c"], [a, None])
    with refused(DataError, "the input: expected Unicode text; got a lone surrogate"):
        stream(base, "a\udcff", write=print)
    with refused(SettingsError, "expected a Prefix; got str: see Prefix.load"):
        generate(base, ["a", "b"], [a, "p.safetensors"])  # type: ignore[list-item]
    with refused(SettingsError, "expected a Prefix; got PosixPath: see Prefix.load"):
        stream(base, "a", Path("p.safetensors"), write=print)  # type: ignore[arg-type]
    with refused(SettingsError, "expected a Prefix; got str: see Prefix.load"):
        train(base, [{"input": "a", "output": "b"}], init_from="p.safetensors", framing=Framing())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "expected max_new_tokens of at least 1; got 0"),
        ({"num_beams": 0}, "expected num_beams of at least 1; got 0"),
        ({"batch_size": -1}, "expected batch_size of at least 1; got -1"),
        ({"temperature": -0.1}, "expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0; got -0.1, 1.0, 0"),
        ({"temperature": float("nan")}, "expected temperature >= 0, .*got nan"),
        ({"temperature": float("inf")}, "expected temperature >= 0, .*got inf"),
        ({"top_p": 0.0}, "got 0.0, 0.0, 0"),
        ({"top_p": 1.1}, "got 0.0, 1.1, 0"),
        ({"top_k": -1}, "got 0.0, 1.0, -1"),
        ({"num_beams": 2, "temperature": 0.5}, "beams and sampling exclude each other: set num_beams to 1, or temper"),
        ({"stop": "\n"}, r"expected a list of non-empty stop strings; got '\\n'"),
        ({"stop": [7]}, r"expected a list of non-empty stop strings; got \[7\]"),
        ({"stop": ["a", ""]}, r"expected a list of non-empty stop strings; got \['a', ''\]"),
        ({"length_penalty": 1000}, "expected length_penalty from -10 to 10; got 1000.0"),
        ({"length_penalty": float("nan")}, "expected length_penalty from -10 to 10; got nan"),
        ({"max_new_tokens": 2.5}, "expected a whole number for max_new_tokens; got 2.5"),
        ({"temperature": "hot"}, "expected a number for temperature; got 'hot'"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with refused(SettingsError, message):
        GenerateSettings(**settings)


@pytest.mark.parametrize("penalty", [-10, 10])
def test_the_most_extreme_beams_are_numbers(penalty: float) -> None:
    base = base_of("llama")
    settings = GenerateSettings(num_beams=3, length_penalty=penalty, max_new_tokens=100)
    assert len(generate(base, ["a"], settings=settings)) == 1


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_temperature_of_almost_nothing_is_that_of_nothing(family: str) -> None:
    base = base_of(family)
    greedy = generate(base, INPUTS, settings=GenerateSettings(max_new_tokens=9))
    for temperature in (1e-6, 1e-45):
        settings = GenerateSettings(max_new_tokens=9, temperature=temperature)
        assert generate(base, INPUTS, settings=settings) == greedy


def test_an_infix_generates_as_it_was_trained_beside_other_rows() -> None:
    """[x; infix; y] for rows of an infix, [prefix; x; y] for others, in one batch; each as a row alone, by hand."""
    base = Base(tiny_model("gpt2"), tiny_tokenizer("gpt2"), "tiny gpt2")
    records = [{"input": f"name {i}", "output": f"it is {i}"} for i in range(6)]
    infix = train(base, records, settings=TrainSettings(length=5, epochs=2, lr=0.1, infix=True))
    prefix = train(base, records, settings=TrainSettings(length=3, epochs=2, lr=0.1))
    assert infix.infix
    assert not prefix.infix
    inputs = ["name 1", "one 2", "n", "name 4"]
    own = [infix, prefix, infix, None]
    settings = GenerateSettings(max_new_tokens=3)
    texts = generate(base, inputs, own, settings=settings)
    for text, x, one in zip(texts, inputs, own, strict=True):
        ids = base.tokenizer(x + "\n")["input_ids"]
        tokens = list(ids)
        while len(tokens) < len(ids) + 3 and tokens[-1] != base.end_id:
            before = [len(ids) - 1] if one is infix else None
            logits = logits_by_hand(
                base.model, [None if one is None else one.sections], torch.tensor([tokens]), infix=before
            )
            tokens.append(int(logits[0, -1].argmax()))
        assert text == base.decode(tokens[len(ids) :])
    with pytest.raises(PrefixFileError, match="an infix is an ablation and has no file format"):
        infix.to_bytes()
