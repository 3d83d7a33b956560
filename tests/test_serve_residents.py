"""Prefixes in memory: within the budget whatever happens, read once, and gone when they are to be."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import until

from foreword.errors import NoSuchPrefixError, PrefixFileError, SettingsError
from foreword.prefix import Card, Prefix
from foreword.serve.engine import EngineStoppedError
from foreword.serve.residents import Residents
from foreword.store import Store, Version

BYTES = 2 * 2 * 3 * 5 * 7 * 4
"""Of one prefix of length 5: two layers of keys and values [3, 5, 7] in float32."""


def prefix_of(seed: int, length: int = 5) -> Prefix:
    generator = torch.Generator().manual_seed(seed)
    layers = [tuple(torch.randn(3, length, 7, generator=generator) for _ in range(2)) for _ in range(2)]
    return Prefix({"decoder": layers}, Card(base="tiny", fingerprint="0" * 64))  # type: ignore[dict-item]


@contextmanager
def holding(residents: Residents, version: Version) -> Iterator[Prefix]:
    prefix = residents.acquire(version)
    try:
        yield prefix
    finally:
        residents.release(version)


class CountingStore(Store):
    """Counts reads by content, and can be slow."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reads: dict[str, int] = {}
        self.before: Callable[[], None] = lambda: None

    def read(self, version: Version) -> bytes:
        self.before()
        self.reads[version.sha256] = self.reads.get(version.sha256, 0) + 1
        return super().read(version)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store", create=True)


def put(store: Store, name: str, seed: int, length: int = 5) -> Version:
    return store.put(name, prefix_of(seed, length), dtype=torch.float32)


def residents_of(store: Store, budget: int) -> Residents:
    return Residents(store, lambda prefix: prefix, budget=budget)


def test_who_waits_for_what_cannot_be_read_is_told_too(store: CountingStore) -> None:
    version, errors = put(store, "a", 1), []
    residents = residents_of(store, 9 * BYTES)

    def fail() -> None:
        until(lambda: waiting.is_alive())
        time.sleep(0.05)
        raise PrefixFileError("damaged")

    def ask() -> None:
        try:
            residents.acquire(version)
        except PrefixFileError as error:
            errors.append(str(error))

    store.before = fail
    waiting = threading.Thread(target=ask)
    first = threading.Thread(target=ask)
    first.start()
    waiting.start()
    for one in (first, waiting):
        one.join(20)
        assert not one.is_alive(), "it waits for ever"
    assert errors == ["damaged"] * 2


def test_what_is_to_be_forgotten_is_given_to_nobody_new(store: CountingStore) -> None:
    version = put(store, "a", 1)
    residents = residents_of(store, 9 * BYTES)
    with holding(residents, version):
        assert residents.acquire_now(version.sha256) is not None
        residents.release(version)
        residents.forget({version.sha256})
        assert residents.acquire_now(version.sha256) is None


def test_the_least_recently_used_goes_first(store: CountingStore) -> None:
    residents = residents_of(store, 3 * BYTES)
    a, b, c, d = (put(store, name, seed) for seed, name in enumerate("abcd"))
    for version in (a, b, c, a):
        with holding(residents, version) as prefix:
            assert torch.equal(
                prefix.sections["decoder"][1][1], prefix_of("abcd".index(version.name)).sections["decoder"][1][1]
            )
    assert (residents.hits, residents.loads, residents.evictions, residents.bytes) == (1, 3, 0, 3 * BYTES)
    with holding(residents, d):
        assert b.sha256 not in residents
        assert all(version.sha256 in residents for version in (a, c, d))
    assert (residents.loads, residents.evictions, residents.bytes, len(residents)) == (4, 1, 3 * BYTES, 3)
    assert store.reads == {version.sha256: 1 for version in (a, b, c, d)}


def test_what_is_held_stays_and_others_wait_for_room(store: CountingStore) -> None:
    residents = residents_of(store, 2 * BYTES + BYTES // 2)
    a, b, c = (put(store, name, seed) for seed, name in enumerate("abc"))
    residents.acquire(a)
    residents.acquire(b)
    got = threading.Event()
    thread = threading.Thread(target=lambda: (residents.acquire(c), got.set()))
    thread.start()
    assert not got.wait(0.2)
    assert a.sha256 in residents
    residents.release(a)
    assert got.wait(10)
    thread.join()
    assert a.sha256 not in residents
    assert residents.bytes == 2 * BYTES


def test_a_large_one_is_not_passed_by_small_ones(store: CountingStore) -> None:
    residents = residents_of(store, 2 * BYTES)
    a, b, c = (put(store, name, seed) for seed, name in enumerate("abc"))
    large = put(store, "large", 9, length=10)
    residents.acquire(a)
    got: list[str] = []

    def ask(version: Version) -> None:
        residents.acquire(version)
        got.append(version.name)

    threads = []
    for version in (large, b, c):
        threads.append(threading.Thread(target=ask, args=(version,)))
        threads[-1].start()
        until(lambda: len(residents._line) == len(threads))
    assert got == []
    residents.release(a)
    threads[0].join(10)
    assert got == ["large"]
    residents.release(large)
    for thread in threads:
        thread.join(10)
    assert sorted(got) == ["b", "c", "large"]


def test_one_content_is_one_prefix_read_once(store: CountingStore) -> None:
    residents = residents_of(store, 2 * BYTES)
    data = prefix_of(1).to_bytes(torch.float32)
    versions = [store.put(name, data) for name in ("a", "b")]
    gate = threading.Event()
    store.before = lambda: gate.wait(10) and None  # type: ignore[assignment]
    got: list[Prefix] = []
    threads = [threading.Thread(target=lambda i=i: got.append(residents.acquire(versions[i % 2]))) for i in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join()
    assert len(got) == 5
    assert all(prefix is got[0] for prefix in got)
    assert store.reads == {versions[0].sha256: 1}
    assert residents.bytes == BYTES


def test_a_failure_is_the_asker_s_alone(store: CountingStore, tmp_path: Path) -> None:
    residents = residents_of(store, BYTES)
    gone, damaged, large, good = (
        put(store, name, i, 5 + 2 * (name == "large")) for i, name in enumerate(("gone", "damaged", "large", "good"))
    )
    store.delete("gone")
    with pytest.raises(NoSuchPrefixError, match="is not in the store any more"):
        residents.acquire(gone)
    (file,) = (tmp_path / "store").rglob(f"*{damaged.sha256}.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(PrefixFileError, match="is damaged"):
        residents.acquire(damaged)
    with pytest.raises(SettingsError, match=f"at most {BYTES:,} bytes.*takes {BYTES * 7 // 5:,}"):
        residents.acquire(large)
    assert (residents.bytes, residents.loads, len(residents)) == (0, 0, 0)
    with holding(residents, good):
        assert residents.bytes == BYTES
    assert hashlib.sha256(store.read(good)).hexdigest() == good.sha256


def test_forgotten_at_once_or_when_released(store: CountingStore) -> None:
    residents = residents_of(store, 2 * BYTES)
    a, b = (put(store, name, seed) for seed, name in enumerate("ab"))
    residents.acquire(a)
    residents.acquire(a)
    with holding(residents, b):
        pass
    residents.forget([a.sha256, b.sha256, "f" * 64])
    assert b.sha256 not in residents
    assert a.sha256 in residents
    residents.release(a)
    assert a.sha256 in residents
    residents.release(a)
    assert residents.bytes == len(residents) == 0


def test_closing_wakes_who_waits(store: CountingStore) -> None:
    residents = residents_of(store, BYTES)
    a, b = (put(store, name, seed) for seed, name in enumerate("ab"))
    residents.acquire(a)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            residents.acquire(b)
        except EngineStoppedError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.05)
    residents.close()
    thread.join(10)
    assert len(errors) == 1
    residents.release(a)


def test_many_threads_stay_within_the_budget(store: CountingStore) -> None:
    budget = 5 * BYTES + 1
    residents = residents_of(store, budget)
    versions = [put(store, f"n{i}", i, 3 + i % 4) for i in range(23)]
    worst = [0]

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(50):
            version = draw.choice(versions)
            with holding(residents, version) as prefix:
                worst[0] = max(worst[0], residents.bytes)
                assert prefix.length == 3 + int(version.name[1:]) % 4
            if draw.random() < 0.1:
                residents.forget([draw.choice(versions).sha256])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert 0 < worst[0] <= budget
    assert residents.hits + residents.loads == 200
