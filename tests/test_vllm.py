"""The engine `vllm` and its connector in stock vLLM. One small engine serves most tests: its cache is so small that
requests are preempted, its steps so short that prompts come in chunks, its memory so tight that prefixes are evicted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make setup-vllm, then make test-vllm")

from serving import prefix_for
from vllm_harness import BLOCK, CONTEXT, LENGTHS, TEXTS, Harness, Row, harness

from foreword.attach import attach
from foreword.errors import NoSuchPrefixError, PrefixFileError, SettingsError, TooLongError, WrongBaseError
from foreword.prefix import Card, Prefix
from foreword.serve.placeholders import cache_salt, placeholder_ids
from foreword.store import Version

# vLLM starts processes that are killed at the end, and warns of much at import
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.filterwarnings("default")]

BUDGET = 400_000
"""Bytes for prefixes, which all together take 477,696."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    options = {"num_gpu_blocks_override": 27, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    with harness(tmp_path_factory.mktemp("vllm"), budget=BUDGET, options=options) as one:
        yield one


ROWS: list[Row] = [(text, name) for text in TEXTS for name in (None, *LENGTHS)]


def test_many_prefixes_in_one_batch_beside_rows_without(small: Harness) -> None:
    small.check(ROWS)
    figures = small.engine.figures()
    assert figures.loads >= len(LENGTHS)
    assert figures.budget_bytes == BUDGET
    assert 0 < figures.resident_bytes <= BUDGET
    assert figures.evictions > 0
    assert figures.running == figures.waiting == 0


def test_preempted_requests_get_their_prefix_again(small: Harness) -> None:
    before = small.engine.figures().more["preemptions"]
    rows: list[Row] = [(text, name) for text in TEXTS[:2] for name in LENGTHS]
    # rows without a prefix wait for no file: the cache is too small for them alone, however slowly prefixes come
    rows += [(f"{number} more", None) for number in range(19)]
    small.check(rows, max_tokens=131)
    assert small.engine.figures().more["preemptions"] > before


def test_prompts_come_in_chunks(small: Harness) -> None:
    text = "one two three four five six seven. " * 6
    assert len(small.frame(text)) > 3 * 64
    small.check([(text, name) for name in (None, "five", "131")])


def test_a_request_keeps_the_content_it_was_admitted_with(small: Harness) -> None:
    """Its name is replaced, then deleted, while it is preempted and goes on."""
    old = small.put("replaced", prefix_for(small.base, 43, seed=1))
    rows: list[Row] = [(text, "replaced") for text in (*TEXTS, "another one", "and one more")]
    first = small.expected(rows, 151)
    before = small.engine.figures().more["preemptions"]

    async def work() -> tuple[list[str], list[str]]:
        running = [asyncio.create_task(small.text(small.request(*row, 151))) for row in rows]
        while small.engine.figures().running < 4:
            await asyncio.sleep(0.001)
        new = small.put("replaced", prefix_for(small.base, 43, seed=2))
        assert new.sha256 != old.sha256
        later = [asyncio.create_task(small.text(small.request(*row, 7))) for row in rows[:2]]
        second = [await task for task in later]
        small.store.delete("replaced")
        return [await task for task in running], second

    got, second = small.run(work())
    assert got == first
    assert second == small.expected(rows[:2], 7)
    assert second != [text[:7] for text in first[:2]]
    assert small.engine.figures().more["preemptions"] > before


def test_a_deleted_prefix_is_gone_from_memory_and_from_service(small: Harness) -> None:
    version = small.put("short-lived", prefix_for(small.base, 7))
    rows: list[Row] = [("a text", "short-lived")]
    small.check(rows)
    small.store.delete("short-lived")
    # the connector's own memory, past the engine's
    tokens = [*placeholder_ids(version.sha256, 7, 263), *small.frame("a text")]
    until = time.monotonic() + 30
    while small.ask(tokens, version)[1] != "error":
        assert time.monotonic() < until
        time.sleep(0.2)
    small.run(small.engine.forget([version.sha256]))
    with pytest.raises(NoSuchPrefixError, match="is not in the store any more"):
        small.texts(rows)


def test_the_same_text_of_two_tenants(small: Harness) -> None:
    """Blocks are shared by one content alone, whether a client sends the salt or forgets it."""
    long = "the very same text, long enough to fill some blocks of the cache, of both tenants"
    other = small.put("five too", prefix_for(small.base, 5, seed=9))
    LENGTHS["five too"] = 5
    for salted in (True, False):
        text = f"{salted}: {long}"
        seen = {}
        for name in ("five", "five too"):
            version = small.versions[name]
            assert version is not None
            salt = cache_salt(version.sha256) if salted else None
            prompt = small.prompt(text, name)
            seen[name] = [small.ask(prompt, version, salt=salt) for _ in range(2)]
        for name, ((tokens, _, cached), (again, _, shared)) in seen.items():
            assert tokens == again == small.tokens(text, name)
            assert cached == 5, "only virtual tokens were there"
            assert shared >= 2 * BLOCK
        assert seen["five"][0][0] != seen["five too"][0][0]
    # somebody who knows the ids, and names no prefix
    prompt = small.prompt(text, "five too")
    tokens, _, cached = small.ask(prompt, None)
    assert cached == 0
    assert tokens != small.tokens(text, "five too")
    # and with another's salt
    assert small.ask(prompt, None, salt=cache_salt(other.sha256))[2] == 0
    del LENGTHS["five too"]


def test_contents_whose_placeholders_are_the_same(small: Harness) -> None:
    """One virtual token has one of 263 ids: two contents that have the same one do not share blocks either."""
    by_id: dict[int, Version] = {}
    pair = None
    for seed in range(200):
        version = small.put(f"twin-{seed}", prefix_for(small.base, 1, seed=seed))
        (token,) = placeholder_ids(version.sha256, 1, 263)
        if token in by_id:
            pair = by_id[token], version
            break
        by_id[token] = version
    assert pair is not None
    text = "a text that fills two blocks of thirty-two tokens, at the least"
    for version in pair:
        for _ in range(2):
            LENGTHS[version.name] = 1
            tokens, _, _ = small.ask(small.prompt(text, version.name), version)
            assert tokens == small.tokens(text, version.name)
            del LENGTHS[version.name]
    assert small.tokens(text, pair[0].name) != small.tokens(text, pair[1].name)


def test_what_fails_fails_alone(small: Harness) -> None:
    """Requests that the connector refuses, each beside one that goes through."""
    five, thirteen = small.versions["five"], small.versions["thirteen"]
    assert five is not None
    assert thirteen is not None
    good = small.prompt("x", "five")
    gone = Version(name="five", stamp=five.stamp, id=five.id, sha256="0" * 64)
    bad: dict[str, tuple[Sequence[int], Version | None, dict[str, Any]]] = {
        "another's placeholders": (small.prompt("x", "thirteen"), five, {}),
        "one placeholder too few": (good[1:], five, {}),
        "no placeholders": (small.frame("x"), five, {}),
        "no x": (good[:5], five, {}),
        "no such content": (good, gone, {}),
        "no such name": (good, Version(name="nobody", stamp=0, id="", sha256=five.sha256), {}),
        "prompt_logprobs": (good, five, {"prompt_logprobs": 1}),
        "another form": (good, None, {"extra_args": {"kv_transfer_params": {"prefix": "five"}}}),
    }
    expected = small.tokens("x", "five")
    for what, (prompt, version, params) in bad.items():
        tokens, finish, _ = small.ask(prompt, version, **params)
        if what == "no such name":
            # its content is in memory, where names do not count
            continue
        assert (what, tokens, finish) == (what, [], "error")
        assert small.ask(good, five)[0] == expected
    # vLLM's cache can be passed by, which does not take the prefix away
    for _ in range(2):
        tokens, _, cached = small.ask(good * 1, five, skip_reading_prefix_cache=True)
        assert (tokens, cached) == (expected, 5)


def test_files_that_are_missing_or_wrong(small: Harness) -> None:
    def path(version: Version) -> Path:
        (found,) = (small.folder / "store").rglob(f"*{version.sha256}.safetensors")
        return found

    missing, cut = (small.put(name, prefix_for(small.base, 3, seed=i)) for i, name in enumerate(("missing", "cut")))
    path(missing).unlink()
    path(cut).write_bytes(path(cut).read_bytes()[:1000])
    stranger = prefix_for(small.base, 3)
    small.put("foreign", Prefix(stranger.sections, Card(base="else", fingerprint="f" * 64)))
    wide = Prefix({"decoder": [(k[:1], v[:1]) for k, v in stranger.sections["decoder"]]}, stranger.card)
    small.put("wide", wide)
    large = small.put("large", prefix_for(small.base, 277))
    errors = {
        "missing": (NoSuchPrefixError, "is not in the store any more"),
        "cut": (PrefixFileError, "is damaged"),
        "foreign": (WrongBaseError, "expected a prefix for the base"),
        "wide": (PrefixFileError, "layers do not fit the base"),
        "large": (SettingsError, "expected prefixes of at most 400,000 bytes, the memory that they have together; "),
    }
    for name, (error, match) in errors.items():

        async def work(name: str = name) -> tuple[Any, str]:
            failing = small.text(small.request("x", name))
            going = small.text(small.request("x", "five"))
            failed, text = await asyncio.gather(failing, going, return_exceptions=True)
            return failed, text

        failed, text = small.run(work())
        assert type(failed) is error, failed
        with pytest.raises(error, match=match):
            raise failed
        assert [text] == small.expected([("x", "five")])
        # the connector looks for itself
        version = small.versions[name]
        assert version is not None
        ids = placeholder_ids(version.sha256, 277 if name == "large" else 3, 263)
        assert small.ask([*ids, *small.frame("x")], version)[1] == "error"
    assert large


def test_what_does_not_fit_the_context(small: Harness) -> None:
    text = "x" * (CONTEXT - 131 - 2)
    assert len(small.frame(text)) == CONTEXT - 131
    with pytest.raises(
        TooLongError, match=f"at most {CONTEXT} .* got {CONTEXT - 131} tokens of input, 131 virtual tokens"
    ):
        small.texts([(text, "131")])
    pieces = small.run(small.pieces(small.request(text[1:], "131")))
    assert (sum(len(piece.tokens) for piece in pieces), pieces[-1].finish) == (1, "length")


def test_a_client_that_leaves_frees_its_row(small: Harness) -> None:
    async def work() -> None:
        async with aclosing(small.engine.generate(small.request(TEXTS[0], "131", 200))) as pieces:
            async for _ in pieces:
                break
        task = asyncio.create_task(small.text(small.request(TEXTS[0], "131", 200)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert small.engine.figures().waiting == 0
        # figures come with steps
        await small.text(small.request("a", None, 3))

    small.run(work())
    figures = small.engine.figures()
    assert (figures.running, figures.waiting) == (0, 0)
    assert figures.more["cache_usage"] == 0


def test_stop_strings_and_counts(small: Harness) -> None:
    (whole,) = small.expected([(TEXTS[0], "five")], 40)
    stop = whole[11:13]
    assert whole.find(stop) > 0
    pieces = small.run(small.pieces(small.request(TEXTS[0], "five", 40, stop=(stop,))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.find(stop)]
    assert pieces[-1].finish == "stop"
    count = sum(len(piece.tokens) for piece in pieces)
    assert count < 40
    pieces = small.run(small.pieces(small.request(TEXTS[0], "five", 17)))
    assert (sum(len(piece.tokens) for piece in pieces), pieces[-1].finish) == (17, "length")


def test_log_probabilities_are_the_models_own(small: Harness) -> None:
    request = small.request(TEXTS[0], "five", 5, logprobs=3, temperature=2.0, top_p=0.9, seed=4)
    pieces = small.run(small.pieces(request))
    assert small.run(small.pieces(request))[-1].tokens == pieces[-1].tokens
    tokens = [token for piece in pieces for token in piece.tokens]
    told = [one for piece in pieces for one in piece.logprobs]
    assert [one.token for one in told] == tokens
    x = torch.tensor([[*small.frame(TEXTS[0]), *tokens]])
    with torch.no_grad(), attach(small.base.model, small.prefixes["five"]):
        logits = small.base.model(x).logits[0, -len(tokens) - 1 : -1]
    expected = logits.log_softmax(-1)
    for place, one in enumerate(told):
        assert one.logprob == pytest.approx(expected[place, one.token].item(), abs=1e-3)
        top = expected[place].topk(3)
        assert [token for token, _ in one.top] == top.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_sampled_texts_differ_by_seed(small: Harness) -> None:
    def draw(seed: int) -> str:
        return small.run(small.text(small.request("a", "five", 11, temperature=1.5, seed=seed)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
