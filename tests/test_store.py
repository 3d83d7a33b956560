from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save

import foreword.store
from foreword.bases import Base
from foreword.errors import NoSuchPrefixError, PrefixFileError, SettingsError, StoreError, WrongBaseError
from foreword.prefix import Card, Prefix
from foreword.store import (
    Store,
    Token,
    Version,
    check_name,
    key_of,
)

HOUR, DAY = 3600.0, 24 * 3600.0
START = 1_900_000_000.0


def prefix_of(seed: int, *, fingerprint: str = "f" * 64) -> Prefix:
    generator = torch.Generator().manual_seed(seed)
    layers = [(torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)) for _ in range(2)]
    card = Card(base="tiny", fingerprint=fingerprint, created="2026-01-01T00:00:00+00:00")
    return Prefix({"decoder": layers}, card)


def bytes_of(seed: int) -> bytes:
    return prefix_of(seed).to_bytes(torch.float32)


class Clock:
    """A clock that tests set; it goes on by a millisecond a look, or stands still."""

    def __init__(self, now: float = START, step: float = 0.001):
        self.now, self.step = now, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class ProbeFileSystem(MemoryFileSystem):
    """Files in memory; before every operation of the store's, `before(kind, path)` is called."""

    protocol = "probe"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    before: Callable[[str, str], None] | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("probe://"))

    def _tell(self, kind: str, path: str) -> None:
        if ProbeFileSystem.before:
            ProbeFileSystem.before(kind, path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._tell("ls", path)
        return super().ls(path, detail, **kwargs)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._tell("find", path)
        return super().find(path, *args, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self._tell("cat_file", path)
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self._tell("pipe_file", path)
        super().pipe_file(path, value, *args, **kwargs)

    def _rm(self, path: str) -> None:
        self._tell("rm", path)
        super()._rm(path)


class ServerFileSystem(DirFileSystem):
    """Files as a server of files has them (SFTP, SMB): a file can be written only where its folder is."""

    protocol = "server"

    def __init__(self, **kwargs: Any):
        super().__init__(path="/", fs=fsspec.filesystem("file", auto_mkdir=False))

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("server://")

    def _join(self, path: Any) -> Any:
        return super()._join(self._strip_protocol(path) if isinstance(path, str) else path)


fsspec.register_implementation("probe", ProbeFileSystem, clobber=True)
fsspec.register_implementation("server", ServerFileSystem, clobber=True)


@pytest.fixture
def probe() -> Iterator[type[ProbeFileSystem]]:
    ProbeFileSystem.store.clear()
    ProbeFileSystem.pseudo_dirs[:] = [""]
    ProbeFileSystem.before = None
    yield ProbeFileSystem
    ProbeFileSystem.before = None


@pytest.fixture(params=["whole", "renamed"])
def written(request: pytest.FixtureRequest, probe: type[ProbeFileSystem], monkeypatch: pytest.MonkeyPatch) -> None:
    """How the probe has its files written: in one operation, or aside and renamed."""

    def rename(self: ProbeFileSystem, old: str, new: str, **more: Any) -> None:
        self._tell("mv", old)
        if not self.exists(old):
            raise FileNotFoundError(old)
        self.store[new] = self.store.pop(old)

    if request.param == "renamed":
        monkeypatch.setattr(probe, "mv", rename)


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An S3 bucket on this machine. s3fs and moto are in no extra: aiobotocore wants an older python-dateutil than ours."""
    pytest.importorskip("s3fs", reason="needs pip install s3fs")
    server = pytest.importorskip("moto.server", reason="needs pip install 'moto[server]'").ThreadedMotoServer(port=0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["local", "memory", "server", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    if request.param == "server":
        yield f"server://{tmp_path}/store"
        return
    if request.param == "s3":
        yield f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
        return
    yield "memory://store-under-test"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(url: str, clock: Clock) -> Store:
    return Store(url, create=True, clock=clock)


def files_of(store: Store, below: str = "") -> list[str]:
    top = store._files.root
    try:
        return sorted(
            path.removeprefix(f"{top}/") for path in store._files.filesystem.find(f"{top}/{below}".rstrip("/"))
        )
    except FileNotFoundError:
        return []


def path_of(store: Store, version: Version) -> str:
    (path,) = (path for path in files_of(store, "names") if version.sha256 in path and version.id in path)
    return f"{store._files.root}/{path}"


def names_of(store: Store, **arguments: Any) -> list[str]:
    return [version.name for version in store.page(**{"limit": 10_000, **arguments}).versions]


def equal(a: Prefix, b: Prefix) -> bool:
    return a.card == b.card and all(
        torch.equal(x, y)
        for section in a.sections
        for one, other in zip(a.sections[section], b.sections[section], strict=True)
        for x, y in zip(one, other, strict=True)
    )


# --- one name -------------------------------------------------------------------------------------------------------


def test_put_and_get(store: Store) -> None:
    assert store.read(store.put("bob", bytearray(bytes_of(3)))) == bytes_of(3)  # type: ignore[arg-type]
    version = store.put("alice", prefix_of(1), dtype=torch.float32)
    assert equal(store.get("alice"), prefix_of(1))
    data = store.read(version)
    assert data == bytes_of(1)
    assert version.sha256 == hashlib.sha256(data).hexdigest()
    assert version == store.newest("alice")
    assert abs(version.time - datetime.fromtimestamp(START, UTC)) < timedelta(seconds=1)
    assert store.get("alice", version).length == 3
    assert list(store.verify()) == []


def test_a_version_that_was_listed_is_read_without_a_listing(probe: type[ProbeFileSystem]) -> None:
    store = world(Clock())
    newest, oldest = store.versions("alice")
    asked: list[str] = []
    probe.before = lambda kind, path: asked.append(kind)
    assert equal(store.get("alice", oldest), prefix_of(0))
    assert asked == ["cat_file"]
    probe.before = None
    with pytest.raises(NoSuchPrefixError, match="no version"):
        store.get("bob", newest)
    store.delete("alice")
    with pytest.raises(NoSuchPrefixError):
        store.get("alice", newest)


def test_bytes_are_kept_as_they_came(store: Store) -> None:
    data = prefix_of(1).to_bytes(torch.bfloat16)
    assert store.read(store.put("alice", data)) == data
    assert store.get("alice").sections["decoder"][0][0].dtype == torch.bfloat16


def test_the_newest_counts_and_history_stays(store: Store) -> None:
    versions = [store.put("alice", bytes_of(seed)) for seed in range(3)]
    assert store.versions("alice") == versions[::-1]
    assert equal(store.get("alice"), prefix_of(2))
    assert equal(store.get("alice", versions[0]), prefix_of(0))
    assert equal(store.get("alice", versions[1].sha256[:10].upper()), prefix_of(1))


def test_roll_back(store: Store) -> None:
    first, second = store.put("alice", bytes_of(1)), store.put("alice", bytes_of(2))
    third = store.roll_back("alice", first.sha256[:12])
    assert third.sha256 == first.sha256
    assert store.newest("alice") == third
    assert store.versions("alice") == [third, second, first]
    assert equal(store.get("alice"), prefix_of(1))
    assert store.roll_back("alice", second).sha256 == second.sha256


def test_no_such_prefix(store: Store) -> None:
    with pytest.raises(NoSuchPrefixError, match=r"^no prefix named 'bob' in .*: check the name, or put it first$"):
        store.get("bob")
    with pytest.raises(NoSuchPrefixError, match="no prefix named 'bob'"):
        store.newest("bob")
    with pytest.raises(NoSuchPrefixError, match="no prefix named 'bob'"):
        store.delete("bob")
    assert store.versions("bob") == []
    version = store.put("alice", bytes_of(1))
    store.put("alice", bytes_of(2))
    for asked in ("zz", "", "../" + version.sha256[:50]):
        with pytest.raises(
            NoSuchPrefixError, match=rf"no version '{re.escape(asked)}' of 'alice': there are \w{{12}}, "
        ):
            store.get("alice", asked)
    store.put("bob", bytes_of(1))
    with pytest.raises(NoSuchPrefixError, match=f"no version {version.sha256[:12]} of 'bob'"):
        store.get("bob", version)


def test_an_ambiguous_version(store: Store) -> None:
    by_digit: dict[str, int] = {}
    for seed in range(17):
        digit = hashlib.sha256(bytes_of(seed)).hexdigest()[0]
        if digit in by_digit:
            break
        by_digit[digit] = seed
    store.put("alice", bytes_of(by_digit[digit]))
    # the same content twice is no ambiguity
    store.put("alice", bytes_of(by_digit[digit]))
    assert equal(store.get("alice", digit), prefix_of(by_digit[digit]))
    store.put("alice", bytes_of(seed))
    with pytest.raises(NoSuchPrefixError, match=f"'{digit}' begins several versions of 'alice': give more digits"):
        store.get("alice", digit)


def test_get_checks_the_base(store: Store) -> None:
    class Fake:
        name, fingerprint, shapes, dtype = "tiny", "f" * 64, prefix_of(1).shapes, torch.bfloat16

    base: Base = Fake()  # type: ignore[assignment]
    store.put("alice", bytes_of(1))
    assert store.get("alice", base=base).length == 3
    store.put("alice", prefix_of(1, fingerprint="e" * 64))
    with pytest.raises(WrongBaseError, match="expected a prefix for the base 'tiny'"):
        store.get("alice", base=base)


def test_what_is_no_prefix_is_not_put(store: Store) -> None:
    good = bytes_of(1)
    for other in ("p.safetensors", Path("p.safetensors"), None):
        with pytest.raises(SettingsError, match=f"expected a prefix, or the bytes .*; got {type(other).__name__}"):
            store.put("alice", other)  # type: ignore[arg-type]
    card = {"foreword": prefix_of(1).card.to_json()}

    def made_of(**layer: torch.Tensor) -> bytes:
        return save({f"decoder.0.{kind}": tensor for kind, tensor in layer.items()}, metadata=card)

    for data, message in [
        (b"", "expected a safetensors file"),
        (good[:-7], "expected a safetensors file"),
        (b"\xff" * 8 + good[8:], "expected a safetensors file"),
        (b"not a prefix at all, just text", "expected a safetensors file"),
        (save({"a": torch.zeros(3)}), "its header has no foreword card"),
        (save({"a": torch.zeros(3)}, metadata=card), "missing or unknown: a"),
        (made_of(keys=torch.ones(2, 3, 5), values=torch.full((2, 3, 5), float("nan"))), "expected finite"),
        (made_of(keys=torch.ones(2, 3, 5), values=torch.ones(2, 3, 7)), "one shape"),
        (made_of(keys=torch.ones(2, 3, 5)), "missing or unknown: decoder.0.values"),
    ]:
        with pytest.raises(PrefixFileError, match=message) as caught:
            store.put("alice", data)
        assert "\n" not in str(caught.value)
    assert files_of(store) == ["foreword-store.json"]


def test_reading_bytes_is_reading_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(bytes_of(5))
    assert equal(Prefix.from_bytes(bytes_of(5)), Prefix.load(tmp_path / "p.safetensors"))


def test_a_damaged_object(store: Store) -> None:
    first, second = store.put("alice", bytes_of(1)), store.put("alice", bytes_of(2))
    data = bytearray(bytes_of(2))
    data[-1] ^= 1
    store._files.filesystem.pipe_file(path_of(store, second), bytes(data))
    with pytest.raises(
        PrefixFileError, match=rf"version {second.sha256[:12]} of 'alice' is damaged, its hash is another"
    ):
        store.get("alice")
    assert [(problem.name, problem.path) for problem in store.verify()] == [
        ("alice", next(path for path in files_of(store, "names") if second.sha256 in path))
    ]
    store.roll_back("alice", first)
    assert equal(store.get("alice"), prefix_of(1))


# --- names ----------------------------------------------------------------------------------------------------------

# fmt: off
HOSTILE = [
    "../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "C:\\x", "CON", "con", "nul.txt", "name.txt", "~", "~root",
    "memory://x", "s3://b/k", "a*b?[c]", "%2e%2e%2f", "$HOME", "-rf", " ", "  x  ", "x.", "aux", "%s{0}{x}",
    "Bob", "bob", "BOB", "ı", "I", "ß", "ss", "Å", "👩‍👩‍👧‍👦", "🏳️‍🌈", "مرحبا", "שלום", "日本語", "e\u0301\u0323", "ﬁ", "fi",
    "x" * 256, "🙈" * 256, "\u202ex", "'; drop table names; --", "<script>", "\U0010ffff", "\ufeffx", "\ufffe",
]
# fmt: on


def test_hostile_names(store: Store, tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    for i, name in enumerate(HOSTILE):
        store.put(name, bytes_of(i))
    wanted = {unicodedata.normalize("NFC", name) for name in HOSTILE}
    assert len(wanted) == len(HOSTILE)
    for i, name in enumerate(HOSTILE):
        assert equal(store.get(name), prefix_of(i)), name
    assert names_of(store) == sorted(wanted)
    # nothing but the store's own plain paths, and nothing beside it
    plain = re.compile(r"[0-9a-z./-]{1,160}")
    assert all(plain.fullmatch(path) and ".." not in path for path in files_of(store))
    assert len({path.lower() for path in files_of(store)}) == len(files_of(store))
    assert set(os.listdir(tmp_path)) <= {"beside", "store"}
    assert list(store.verify()) == []
    for name in HOSTILE:
        assert store.delete(name) == 1
    assert names_of(store) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a name of 1 to 256 characters; got 0: choose another name"),
        ("x" * 257, "expected a name of 1 to 256 characters; got 257"),
        ("x" * 10_000, "expected a name of 1 to 256 characters; got 10000"),
        ("a\0b", r"'a\\x00b' holds U\+0000: choose a name without control characters"),
        ("a\nb", r"holds U\+000A"),
        ("\x1b[31m", r"holds U\+001B"),
        ("a\x85b", r"holds U\+0085"),
        ("a\u2028b", r"holds U\+2028"),
        ("\ud800", r"'\\ud800' holds U\+D800"),
        (None, "expected a name of a prefix, a string; got NoneType"),
        (b"alice", "got bytes"),
    ],
)
def test_unusable_names(store: Store, name: Any, message: str) -> None:
    for call in (
        lambda: store.put(name, bytes_of(1)),
        *(lambda f=f: f(name) for f in (store.get, store.newest, store.versions, store.delete)),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
    assert files_of(store) == ["foreword-store.json"]


def test_a_name_is_its_nfc(store: Store) -> None:
    store.put("Zoe\u0308", bytes_of(1))
    assert store.newest("Zo\u00eb").name == "Zo\u00eb"
    assert key_of("Zoe\u0308") == key_of("Zo\u00eb") != key_of("Zoe")
    assert names_of(store, begins="Zoe\u0308") == ["Zo\u00eb"]
    assert names_of(store, after="Zoe\u0308") == []
    assert check_name("e\u0301" * 256) == "\u00e9" * 256
    # compatibility forms are names of their own
    assert check_name("ﬁ") == "ﬁ"


# --- opening --------------------------------------------------------------------------------------------------------


def test_opening(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"expected a store at .*nowhere; there is none: check the path, or make one with foreword"
    ):
        Store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    Store(tmp_path / "new", create=True).put("alice", bytes_of(1))
    assert equal(Store(tmp_path / "new", create=True).get("alice"), prefix_of(1))
    assert equal(Store(f"file://{tmp_path}/new/").get("alice"), prefix_of(1))
    with pytest.raises(FileNotFoundError):
        Store(f"server://{tmp_path}/nowhere/new", create=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match="it is something else"):
        Store(tmp_path / "file")
    for text, message in [
        ("{", "it is something else"),
        ("[]", "it is something else"),
        ('{"layout": 2}', "upgrade"),
    ]:
        (tmp_path / "new" / "foreword-store.json").write_text(text)
        with pytest.raises(StoreError, match=message):
            Store(tmp_path / "new")
    with pytest.raises(StoreError, match="expected a folder or a URL of a store; got an empty one"):
        Store("", create=True)
    for url in ("gopher://x", "github://x", "dir://x", "reference://", "generic://"):
        with pytest.raises(StoreError, match=f"^expected a folder or a URL that fsspec can open; got '{url}': .+$"):
            Store(url)


def test_a_folder_with_odd_characters(tmp_path: Path) -> None:
    # two that begin alike are two: fsspec reads a::b as a chain
    for folder in (tmp_path / "a [b] *?", "memory://a [b] *", tmp_path / "a::b", tmp_path / "a::c"):
        store = Store(folder, create=True)
        store.put("alice", bytes_of(1))
        assert names_of(store) == ["alice"]
        assert store.rebuild() == 1
        store.delete("alice")
    assert sorted(os.listdir(tmp_path)) == ["a [b] *?", "a::b", "a::c"]


# --- deletion -------------------------------------------------------------------------------------------------------


def test_delete_leaves_nothing(store: Store) -> None:
    for seed in range(3):
        store.put("alice", bytes_of(seed))
    store.put("bob", bytes_of(0))
    assert store.delete("alice") == 3
    with pytest.raises(NoSuchPrefixError, match="no prefix named 'alice'"):
        store.get("alice")
    with pytest.raises(NoSuchPrefixError, match="no prefix named 'alice'"):
        store.delete("alice")
    assert names_of(store) == ["bob"]
    # the content that both had is still the other's
    assert equal(store.get("bob"), prefix_of(0))
    left = [path for path in files_of(store, "names") if key_of("alice") in path]
    assert len(left) == 1
    assert left[0].endswith("-deleted")
    assert not any(
        b"alice" in store._files.filesystem.cat_file(path) for path in store._files.filesystem.find(store.url)
    )
    assert list(store.verify()) == []


def test_a_deleted_name_may_come_back(store: Store) -> None:
    store.put("alice", bytes_of(1))
    store.delete("alice")
    version = store.put("alice", bytes_of(2))
    assert store.versions("alice") == [version]
    assert names_of(store) == ["alice"]
    assert list(store.verify()) == []


def test_reading_a_version_that_is_gone(store: Store) -> None:
    version = store.put("alice", bytes_of(1))
    store.delete("alice")
    with pytest.raises(
        NoSuchPrefixError, match=rf"version {version.sha256[:12]} of 'alice' is not in the store any more"
    ):
        store.read(version)


# --- clocks ---------------------------------------------------------------------------------------------------------


def test_ties(url: str) -> None:
    """All at one moment: each put still counts as later than what its writer saw."""
    store = Store(url, create=True, clock=Clock(step=0))
    versions = [store.put("alice", bytes_of(seed)) for seed in range(5)]
    assert [version.stamp - versions[0].stamp for version in versions] == [0, 1, 2, 3, 4]
    assert store.versions("alice") == versions[::-1]


def test_a_writer_whose_clock_is_behind(url: str) -> None:
    ahead = Store(url, create=True, clock=Clock(START + 2 * HOUR))
    behind = Store(url, clock=Clock(START))
    first = ahead.put("alice", bytes_of(1))
    second = behind.put("alice", bytes_of(2))
    assert second.stamp == first.stamp + 1
    assert ahead.newest("alice") == behind.newest("alice") == second
    ahead.delete("alice")
    third = behind.put("alice", bytes_of(3))
    assert ahead.versions("alice") == [third]


@pytest.mark.parametrize("skew", [-55.0, 55.0])
def test_changes_of_a_writer_whose_clock_differs(url: str, skew: float) -> None:
    clock = Clock()
    here = Store(url, create=True, clock=clock)
    there = Store(url, clock=lambda: clock.now + skew)
    token = here.changes().token
    seen = []
    for i in range(12):
        (here if i % 2 else there).put(f"user {i}", bytes_of(i))
        clock.now += 7
        changes = here.changes(token)
        token = changes.token
        seen += [change.version.name for change in changes.items if change.version]
    assert seen == [f"user {i}" for i in range(12)]


def test_a_reader_whose_clock_is_ahead(url: str) -> None:
    writer = Store(url, create=True, clock=Clock())
    reader = Store(url, clock=Clock(START + 500))
    token = reader.changes().token
    for i in range(3):
        writer.put(f"user {i}", bytes_of(i))
        changes = reader.changes(token)
        token = changes.token
        assert [change.version and change.version.name for change in changes.items] == [f"user {i}"]


def test_one_writer_far_ahead_hides_nobody(url: str) -> None:
    clock = Clock()
    store, future = Store(url, create=True, clock=clock), Store(url, clock=Clock(START + 3 * DAY))
    token = store.changes().token
    future.put("tomorrow", bytes_of(0))
    changes = store.changes(token)
    assert [change.key for change in changes.items] == [key_of("tomorrow")]
    clock.now += 2 * HOUR
    store.put("alice", bytes_of(1))
    later = store.changes(changes.token)
    assert [change.key for change in later.items] == [key_of("alice")]


# --- changes --------------------------------------------------------------------------------------------------------


def test_changes(store: Store, clock: Clock) -> None:
    everything = store.changes()
    assert (everything.items, everything.reset) == ([], True)
    first = store.put("alice", bytes_of(1))
    changes = store.changes(everything.token)
    assert [(change.key, change.version) for change in changes.items] == [(key_of("alice"), first)]
    assert not changes.reset
    assert store.changes(changes.token).items == []
    # several changes of one name are one
    store.put("alice", bytes_of(2))
    store.put("bob", bytes_of(3))
    newest = store.put("alice", bytes_of(4))
    store.delete("bob")
    changes = store.changes(changes.token)
    assert {change.key: change.version for change in changes.items} == {
        key_of("alice"): newest,
        key_of("bob"): None,
    }
    clock.now += 5 * HOUR
    assert store.changes(changes.token).items == []
    again = store.put("bob", bytes_of(5))
    changes = store.changes(changes.token)
    assert [change.version for change in changes.items] == [again]
    assert {change.key for change in store.changes().items} == {key_of("alice"), key_of("bob")}


def test_changes_since_a_time(store: Store, clock: Clock) -> None:
    store.put("alice", bytes_of(1))
    clock.now += 60
    since = datetime.fromtimestamp(clock.now, UTC)
    store.put("bob", bytes_of(2))
    changes = store.changes(since)
    assert [change.key for change in changes.items] == [key_of("bob")]
    assert store.changes(since.astimezone().replace(tzinfo=None)).items == changes.items
    store.put("carol", bytes_of(3))
    assert [change.key for change in store.changes(changes.token).items] == [key_of("carol")]


def test_changes_over_days(store: Store, clock: Clock) -> None:
    token = store.changes().token
    names = []
    for i in range(60):
        names.append(f"user {i}")
        store.put(names[-1], bytes_of(i % 3))
        clock.now += 1700 if i % 2 else 41
    changes = store.changes(token)
    assert [change.version.name for change in changes.items if change.version] == names
    assert not store.changes(changes.token).items


def test_a_poll_is_cheap(probe: type[ProbeFileSystem]) -> None:
    """A handful of listings and nothing read, whatever the number of names."""
    clock = Clock()
    store = Store("probe://s", create=True, clock=clock)
    for i in range(50):
        store.put(f"user {i}", bytes_of(0))
        clock.now += 40
    token = store.changes().token
    asked: list[tuple[str, str]] = []
    probe.before = lambda kind, path: asked.append((kind, path))
    assert store.changes(token).items == []
    assert len(asked) <= 8
    assert {kind for kind, _ in asked} == {"ls"}
    assert not any("/names" in path for _, path in asked)
    for i in range(50):
        store.put(f"user {i}", bytes_of(1))
    token = store.changes(token).token
    assert len(token.seen) >= 50
    # when it has been quiet for a while, the last burst is not listed any more
    clock.now += 15 * 60
    token = store.changes(token).token
    asked.clear()
    assert store.changes(token).items == []
    assert len(asked) == 2
    assert token.seen == frozenset()
    asked.clear()
    store.get("user 7")
    assert [kind for kind, _ in asked] == ["ls", "cat_file"]


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("name", ["put", "delete"])
def test_a_slow_change_is_announced_again(probe: type[ProbeFileSystem], name: str, rebuilt: bool) -> None:
    clock = Clock()
    writer, reader = world(clock), Store("probe://s", clock=clock)
    token = reader.changes().token

    def hang(kind: str, path: str) -> None:
        nonlocal token
        if kind == "pipe_file" and path.endswith((".safetensors", "-deleted")):
            probe.before = None
            for i in range(5):
                clock.now += HOUR
                reader.put(f"other {i}", bytes_of(i))
                token = reader.changes(token).token
            if rebuilt:
                reader.rebuild()

    probe.before = hang
    result = ACTIONS[name](writer)
    version = result if name == "put" else None
    assert [change.version for change in reader.changes(token).items] == [version]
    listed = {one.name: one for one in Store("probe://s", clock=clock).page().versions}
    assert listed.get("alice") == version


# --- pages ----------------------------------------------------------------------------------------------------------


def all_pages(store: Store, limit: int, between: Callable[[int], None] = lambda i: None, **arguments: Any) -> list[str]:
    names: list[str] = []
    cursor: str | None = ""
    for i in range(10_000):
        page = store.page(cursor, limit, **arguments)
        assert len(page.versions) <= limit
        names += [version.name for version in page.versions]
        cursor = page.cursor
        if cursor is None:
            return names
        between(i)
    raise AssertionError("pages without end")


@pytest.mark.parametrize("limit", [1, 3, 7, 14, 15])
def test_pages(store: Store, limit: int) -> None:
    names = sorted(f"{group}{i}" for group in ("ann", "bob") for i in range(7))
    for name in names:
        store.put(name, bytes_of(0))
    assert all_pages(store, limit) == names
    assert all_pages(store, limit, begins="bob") == names[7:]
    assert all_pages(store, limit, begins="c") == []
    assert [version.name for version in store.page("ann3", 2).versions] == ["ann4", "ann5"]
    with pytest.raises(SettingsError, match="expected a page of 1 name or more; got limit=0"):
        store.page(limit=0)


def test_pages_while_others_write(store: Store, url: str, clock: Clock) -> None:
    other = Store(url, clock=clock)
    stay = [f"stay {i:02d}" for i in range(20)]
    for name in stay:
        store.put(name, bytes_of(0))
    for i in range(10):
        store.put(f"go {i}", bytes_of(0))

    def write(i: int) -> None:
        other.put(f"a new one {i}", bytes_of(1))
        other.put(f"stay 1{i}b", bytes_of(1))
        other.put(stay[-1 - i], bytes_of(2))
        other.delete(f"go {i}")

    names = all_pages(store, 4, write)
    assert len(names) == len(set(names))
    assert [name for name in names if name in stay] == stay
    assert store.newest("stay 19").sha256 == store.page("stay 18b", 1).versions[0].sha256


# --- the index ------------------------------------------------------------------------------------------------------


def test_rebuild(url: str, store: Store, clock: Clock) -> None:
    for i in range(9):
        store.put(f"user {i}", bytes_of(i))
    store.delete("user 4")
    assert store.rebuild() == 8
    clock.now += HOUR
    store.put("later", bytes_of(1))
    store.delete("user 5")
    fresh = Store(url, clock=clock)
    wanted = sorted({"later", *(f"user {i}" for i in range(9) if i not in (4, 5))})
    assert names_of(fresh) == wanted
    assert [problem.what for problem in fresh.verify()] == [
        "the index still holds the names of 1 deleted prefixes: rebuild it"
    ]
    store.rebuild()
    assert len(files_of(store, "index")) == 1
    assert names_of(Store(url, clock=clock)) == names_of(store) == wanted
    assert list(fresh.verify()) == []


def test_the_index_can_be_lost_or_damaged(url: str, store: Store, clock: Clock) -> None:
    for i in range(5):
        store.put(f"user {i}", bytes_of(i))
    store.rebuild()
    store.put("later", bytes_of(1))
    wanted = names_of(store)
    (index,) = files_of(store, "index")
    top = store._files.root
    for damage in (
        b"",
        b"{",
        b"[]",
        b'{"at": 1}',
        b'{"at": 1, "versions": [["\\ud800", 1, "a", "b"]]}',
        b'{"at": 1, "seen": [], "versions": [["bob", 1e999, "00000000", "%s"]]}' % (b"0" * 64),
        b'{"at": 1, "seen": [], "versions": [["bob", 123456789012345678, "00000000", "%s"]]}' % (b"0" * 64),
        b'{"at": 1, "seen": [], "versions": [[7, 1, "00000000", "%s"]]}' % (b"0" * 64),
        b'{"at": 1, "seen": [], "versions": [["bob", 1, "00000000", ""]]}',
        b'{"at": 1e999, "seen": [], "versions": []}',
        b"[" * 100_000,
        b"\xff",
    ):
        store._files.filesystem.pipe_file(f"{top}/{index}", damage)
        assert names_of(Store(url, clock=clock)) == wanted
    for path in files_of(store, "index") + files_of(store, "changes"):
        store._files.filesystem.rm_file(f"{top}/{path}")
    assert names_of(Store(url, clock=clock)) == wanted
    store = Store(url, clock=clock)
    assert store.rebuild() == 6
    assert names_of(Store(url, clock=clock)) == wanted
    assert list(store.verify()) == []


def test_an_index_made_by_a_clock_that_is_ahead(url: str, store: Store, clock: Clock) -> None:
    store.put("alice", bytes_of(1))
    Store(url, clock=Clock(START + DAY)).rebuild()
    clock.now += HOUR
    store.put("bob", bytes_of(2))
    assert names_of(Store(url, clock=clock)) == ["alice", "bob"]


def test_a_rebuild_by_a_clock_weeks_ahead(url: str, store: Store, clock: Clock) -> None:
    """It throws away what it should have kept: slow, until another rebuilds, but never wrong."""
    wrong = Store(url, clock=Clock(START + 30 * DAY))
    store.put("alice", bytes_of(1))
    reader = Store(url, clock=clock)
    assert names_of(reader) == ["alice"]
    wrong.put("future", bytes_of(1))
    wrong.rebuild()
    for name in ("bob", "carol"):
        store.put(name, bytes_of(2))
        store.delete("alice" if name == "carol" else "future")
        clock.now += HOUR
        for one in (reader, Store(url, clock=clock)):
            assert names_of(one) == [name for name in ("alice", "bob", "carol") if one.versions(name)]
    store.rebuild()
    store.put("dora", bytes_of(2))
    assert names_of(reader) == names_of(Store(url, clock=clock)) == ["bob", "carol", "dora"]
    assert not reader.changes(reader.changes().token).reset


def test_verify_finds_what_was_copied_in(store: Store, tmp_path: Path) -> None:
    """A folder that came without its announcements is found by `verify`, and listed after `rebuild`."""
    other = Store(tmp_path / "other", create=True)
    other.put("bob", bytes_of(3))
    store.put("alice", bytes_of(1))
    store.rebuild()
    top = store._files.root
    for path in files_of(other, "names"):
        store._files.filesystem.makedirs(f"{top}/{path}".rsplit("/", 1)[0], exist_ok=True)
        store._files.filesystem.pipe_file(f"{top}/{path}", (tmp_path / "other" / path).read_bytes())
    assert equal(store.get("bob"), prefix_of(3))
    assert [(problem.name, problem.what) for problem in store.verify()] == [
        ("bob", "the index says otherwise than the files: rebuild it")
    ]
    store.rebuild()
    assert list(store.verify()) == []


def test_verify_finds_a_missing_name(store: Store) -> None:
    store.put("alice", bytes_of(1))
    top = store._files.root
    path = f"names/{key_of('alice')[:2]}/{key_of('alice')}/name.txt"
    for text in (None, b"bob", b"\xff"):
        if text is None:
            store._files.filesystem.rm_file(f"{top}/{path}")
        else:
            store._files.filesystem.pipe_file(f"{top}/{path}", text)
        assert equal(store.get("alice"), prefix_of(1))
        problems = list(store.verify())
        assert (problems[0].path, problems[0].what.split(",")[0]) == (
            path,
            "the name is missing or another's",
        )
        # what the problem says to do
        store.put("alice", bytes_of(1))
        assert list(store.verify()) == []


def test_old_announcements_go(url: str, store: Store, clock: Clock) -> None:
    token = store.changes().token
    store.put("alice", bytes_of(1))
    store.put("bob", bytes_of(2))
    store.delete("bob")
    reader = store.changes(token)
    store.rebuild()
    assert store.changes(reader.token).items == []
    clock.now += 9 * DAY
    store.put("carol", bytes_of(3))
    before = files_of(store, "changes")
    store.rebuild()
    assert len(before) > 1
    left = files_of(store, "changes")
    assert len(left) == 2
    assert left[1].startswith("changes/pruned-")
    assert not any(path.endswith("-deleted") for path in files_of(store, "names"))
    # a token from before: everything, and the reader knows
    changes = store.changes(reader.token)
    assert changes.reset
    assert {change.key for change in changes.items} == {key_of("alice"), key_of("carol")}
    assert not store.changes(changes.token).reset
    assert store.changes(datetime.fromtimestamp(START, UTC)).reset
    assert names_of(Store(url, clock=clock)) == ["alice", "carol"]
    clock.now += 9 * DAY
    store.put("dora", bytes_of(3))
    store.rebuild()
    assert len(files_of(store, "changes")) == 2
    assert names_of(store) == ["alice", "carol", "dora"]
    assert list(store.verify()) == []


# --- crashes, and others at the same time ---------------------------------------------------------------------------


class CrashError(BaseException):
    """The process is gone."""


ACTIONS: dict[str, Callable[[Store], object]] = {
    "put": lambda store: store.put("alice", bytes_of(7)),
    "put new": lambda store: store.put("new", bytes_of(7)),
    "delete": lambda store: store.delete("alice"),
    "roll back": lambda store: store.roll_back("alice", hashlib.sha256(bytes_of(0)).hexdigest()),
    "rebuild": lambda store: store.rebuild(),
}


def world(clock: Clock) -> Store:
    """Two names, one of them with history, one that has been deleted, and an index."""
    ProbeFileSystem.before = None
    ProbeFileSystem.store.clear()
    ProbeFileSystem.pseudo_dirs[:] = [""]
    store = Store("probe://s", create=True, clock=clock)
    for seed in range(2):
        store.put("alice", bytes_of(seed))
    store.put("bob", bytes_of(0))
    store.put("gone", bytes_of(0))
    store.delete("gone")
    store.rebuild()
    return store


def at(moment: int, do: Callable[[], object]) -> None:
    """From now on, call `do` before each operation on files but the first `moment`."""
    left = moment

    def before(kind: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            do()

    ProbeFileSystem.before = before


def crash() -> None:
    raise CrashError


def operations(clock: Clock, action: Callable[[Store], object]) -> int:
    store, count = world(clock), 0

    def step(kind: str, path: str) -> None:
        nonlocal count
        count += 1

    ProbeFileSystem.before = step
    action(store)
    ProbeFileSystem.before = None
    return count


def state(store: Store) -> dict[str, list[str]]:
    names = names_of(store)
    assert names == [name for name in ("alice", "bob", "gone", "new") if store.versions(name)]
    for name in names:
        store.get(name)
    return {name: [version.sha256[:8] for version in store.versions(name)] for name in names}


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("name", ACTIONS)
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(probe: type[ProbeFileSystem], name: str) -> None:
    action, clock = ACTIONS[name], Clock()
    store = world(clock)
    old = state(store)
    action(store)
    new = state(store)
    outcomes = set()
    for moment in range(operations(clock, action)):
        store = world(clock)
        reader = Store("probe://s", clock=clock)
        names_of(reader)
        at(moment, crash)
        with pytest.raises(CrashError):
            action(store)
        probe.before = None
        found = state(Store("probe://s", clock=clock))
        assert found in (old, new), (moment, found)
        # one that has been reading since before the crash sees the same
        assert state(reader) == found
        outcomes.add(found == new)
        clock.now += 1
        if found != new or name == "delete":
            # what was cut off may be done again
            try:
                action(Store("probe://s", clock=clock))
            except NoSuchPrefixError:
                assert name == "delete"
                assert found == new
            assert state(reader) == new
        clock.now += 2 * HOUR
        for path in list(probe.store):
            probe.store[path].created = probe.store[path].modified = datetime.fromtimestamp(clock.now - 3 * HOUR, UTC)
        Store("probe://s", clock=clock).rebuild()
        assert list(reader.verify()) == []
        assert state(reader) == new
    assert outcomes == ({True} if name == "rebuild" else {False, True})


@pytest.mark.parametrize("again", [False, True])
def test_rebuild_ends_what_was_cut_off(probe: type[ProbeFileSystem], again: bool) -> None:
    clock = Clock()
    store = world(clock)

    def step(kind: str, path: str) -> None:
        if kind == "rm":
            raise CrashError

    probe.before = step
    with pytest.raises(CrashError):
        store.delete("alice")
    probe.before = None
    # the deletion may be under way
    assert [problem.path for problem in store.verify()] == ["index"]
    if again:
        store.put("alice", bytes_of(7))
    clock.now += 2 * HOUR
    left = [problem for problem in store.verify() if "deletion" in problem.what]
    assert {problem.what for problem in left} == {"left by a deletion that was cut off: rebuild, which ends it"}
    # two objects, and the name, unless it is there again
    assert len(left) == (2 if again else 3)
    store.rebuild()
    assert list(store.verify()) == []
    # the tombstone, and what is there again
    assert len([path for path in files_of(store, "names") if key_of("alice") in path]) == (3 if again else 1)


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("inner", ACTIONS)
@pytest.mark.parametrize("outer", ACTIONS)
def test_another_at_any_moment(probe: type[ProbeFileSystem], outer: str, inner: str) -> None:
    """All of `inner` happens within `outer`, at every moment of it: nothing is lost, and nothing is left."""
    clock = Clock()
    for moment in range(operations(clock, ACTIONS[outer])):
        store = world(clock)
        # the other's clock is behind, or ahead
        other = Store("probe://s", clock=lambda skew=(moment % 3 - 1) * 50: clock() + skew)
        results: list[object] = []

        def meanwhile(other: Store = other, results: list[object] = results) -> None:
            probe.before = None
            try:
                results.append(ACTIONS[inner](other))
            except NoSuchPrefixError:
                assert inner in ("delete", "roll back")

        at(moment, meanwhile)
        try:
            results.append(ACTIONS[outer](store))
        except NoSuchPrefixError:
            assert inner == "delete"
            assert outer in ("delete", "roll back")
        probe.before = None
        found = state(store)
        assert found == state(other) == state(Store("probe://s", clock=clock))
        put = [version for version in results if isinstance(version, Version)]
        if "delete" not in (outer, inner):
            assert all(version in store.versions(version.name) for version in put)
            assert store.versions("alice")[-1].sha256 == hashlib.sha256(bytes_of(0)).hexdigest()
        elif outer in ("put", "roll back"):
            # it ended after the deletion did
            assert all(version in store.versions(version.name) for version in put)
        clock.now += 2 * HOUR
        store.rebuild()
        assert list(store.verify()) == [], moment
        assert state(store) == found


@pytest.mark.parametrize("written", ["renamed"], indirect=True)
@pytest.mark.parametrize(("outer", "moment"), [("put", "pipe_file"), ("delete", "rm")])
@pytest.mark.usefixtures("written")
def test_deletions_that_clear_a_name_away_twice(probe: type[ProbeFileSystem], outer: str, moment: str) -> None:
    """One removes the name that a put counted on, and another the file aside that is to be the name again."""
    clock = Clock()
    store = world(clock)
    cleared = []

    def clear(path: str) -> None:
        del probe.store[path]
        cleared.append(path)

    def step(kind: str, path: str) -> None:
        if not cleared and kind == moment and "/names/" in path:
            probe.before = None
            if outer == "delete":
                store.put("alice", bytes_of(7))
            (name,) = (
                file for file in files_of(store, "names") if file.endswith("name.txt") and key_of("alice") in file
            )
            clear(f"{store._files.root}/{name}")
            probe.before = step
        elif len(cleared) == 1 and kind == "mv" and ".name.txt." in path:
            clear(path)

    probe.before = step
    ACTIONS[outer](store)
    probe.before = None
    assert len(cleared) == 2
    assert state(store)["alice"][0] == hashlib.sha256(bytes_of(7)).hexdigest()[:8]
    assert len(store.versions("alice")) == (1 if outer == "delete" else 3)
    assert list(store.verify()) == []


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("name", ["put", "put new", "delete", "roll back"])
def test_a_reader_at_every_moment(probe: type[ProbeFileSystem], name: str) -> None:
    """A reader that polls before each operation of a writer hears of the change, once."""
    clock = Clock()
    store = world(clock)
    reader = Store("probe://s", clock=clock)
    token = reader.changes().token
    heard = []

    def poll() -> None:
        nonlocal token
        before, probe.before = probe.before, None
        changes = reader.changes(token)
        token = changes.token
        heard.extend(changes.items)
        probe.before = before

    at(0, poll)
    result = ACTIONS[name](store)
    poll()
    key = key_of("new" if name == "put new" else "alice")
    assert [(change.key, change.version) for change in heard] == [(key, None if name == "delete" else result)]


def test_threads(url: str) -> None:
    """Eight writers of the same two names, and a reader: no version is lost."""
    store = Store(url, create=True)
    put: list[Version] = []
    failures: list[BaseException] = []

    def write(worker: int) -> None:
        mine = Store(url) if worker % 2 else store
        try:
            for i in range(5):
                put.append(mine.put(f"name {(worker + i) % 2}", bytes_of(10 * worker + i)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for version in store.page().versions:
            store.get(version.name, version)
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(put) == 40
    for name in ("name 0", "name 1"):
        assert set(store.versions(name)) == {version for version in put if version.name == name}
    assert {version.name: version for version in store.page().versions} == {
        name: store.newest(name) for name in ("name 0", "name 1")
    }
    assert list(store.verify()) == []


def test_a_store_that_has_gone(tmp_path: Path) -> None:
    for url in (str(tmp_path / "store"), f"server://{tmp_path}/store"):
        store = Store(url, create=True)
        store.put("alice", bytes_of(1))
        (tmp_path / "store").rename(tmp_path / "moved")
        gone = "the store is not there any more: was it moved, or is its volume not mounted"
        for call in (
            lambda store=store: store.put("alice", bytes_of(2)),
            lambda store=store: store.put("bob", bytes_of(2)),
            lambda store=store: store.get("alice"),
            lambda store=store: store.delete("alice"),
            lambda store=store: store.rebuild(),
            lambda store=store: store.versions("nobody"),
            lambda store=store: list(store.verify()),
        ):
            with pytest.raises(OSError, match=gone) as caught:
                call()
            assert not isinstance(caught.value, FileNotFoundError)
        assert not (tmp_path / "store").exists()
        (tmp_path / "moved").rename(tmp_path / "store")
        fresh = Store(url)
        (tmp_path / "store").rename(tmp_path / "moved")
        with pytest.raises(OSError, match=gone):
            fresh.page()
        (tmp_path / "moved").rename(tmp_path / "store")
        assert equal(store.get("alice"), prefix_of(1))
        store.delete("alice")


@pytest.mark.parametrize("renames", [True, False])
def test_nobody_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: bool) -> None:
    """A server of files shows a file while it is written; some rename over nothing that is there."""
    url = f"server://{tmp_path}/store"
    store, real, mv, seen = Store(url, create=True), ServerFileSystem.pipe_file, ServerFileSystem.mv, []

    def slowly(self: Any, path: str, value: bytes, **more: Any) -> None:
        real(self, path, value[: len(value) // 2], **more)
        for version in Store(url).page().versions:
            assert Store(url).get(version.name, version).length == 3
            seen.append(version.name)
        real(self, path, value, **more)

    def onto_nothing(self: Any, old: str, new: str, **more: Any) -> None:
        if self.exists(new):
            raise FileExistsError(new)
        mv(self, old, new, **more)

    def full(self: Any, path: str, value: bytes, **more: Any) -> None:
        real(self, path, value[:7], **more)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ServerFileSystem, "pipe_file", full)
    with pytest.raises(OSError, match="No space left"):
        store.put("bob", bytes_of(1))
    assert not [path for path in files_of(store) if path.endswith(".part")]
    monkeypatch.setattr(ServerFileSystem, "pipe_file", slowly)
    if not renames:
        monkeypatch.setattr(ServerFileSystem, "mv", onto_nothing)
    for seed in range(3):
        store.put("alice", bytes_of(seed))
    store._write_name(key_of("alice"), "alice")
    assert store.rebuild() == 1
    assert len(store.versions("alice")) == 3
    assert set(seen) == {"alice"}
    assert not [path for path in files_of(store) if path.endswith(".part")]


def test_threads_that_put_and_delete(url: str) -> None:
    store = Store(url, create=True)
    failures: list[BaseException] = []

    def write(worker: int) -> None:
        mine = Store(url)
        for i in range(6):
            try:
                if worker % 2:
                    mine.put("alice", bytes_of(i))
                else:
                    mine.delete("alice")
            except NoSuchPrefixError:
                pass
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names_of(store) == (["alice"] if store.versions("alice") else [])
    assert list(store.verify()) == []
    store.put("alice", bytes_of(1))
    assert names_of(store) == ["alice"]


WRITER = """
import sys
from pathlib import Path
from foreword.store import Store
folder, worker, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = Store(folder, create=True)
data = [Path(folder, f"../{i}.safetensors").read_bytes() for i in range(3)]
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    version = store.put(["shared", f"of {worker}, {i}"][i % 2], data[i % 3])
    print(version.id, flush=True)
"""


def writer(folder: Path, worker: str, count: int) -> subprocess.Popen[str]:
    for i in range(3):
        (folder.parent / f"{i}.safetensors").write_bytes(bytes_of(i))
    command = [sys.executable, "-c", WRITER, str(folder), worker, str(count)]
    # the child imports this checkout's package, as the test does
    source = str(Path(foreword.store.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_and_a_kill(tmp_path: Path) -> None:
    """One writes to the end, the other is killed in the middle. Everything that was reported put is there."""
    folder = tmp_path / "store"
    store = Store(folder, create=True)
    token = store.changes().token
    processes = [writer(folder, worker, count) for worker, count in (("a", 60), ("b", 100_000))]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    heard: dict[str, Version | None] = {}

    def poll() -> None:
        nonlocal token
        changes = store.changes(token)
        token = changes.token
        heard.update((change.key, change.version) for change in changes.items)

    deadline = time.monotonic() + 60
    while processes[0].poll() is None and time.monotonic() < deadline:
        poll()
        time.sleep(0.02)
    assert processes[1].poll() is None
    processes[1].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL]
    poll()
    reported = {id for output in outputs for id in output.split("\n")[:-1]}
    versions = [version for name in names_of(store) for version in store.versions(name)]
    assert len(reported) > 60
    assert reported <= {version.id for version in versions}
    # one more at most: it was put, and not yet reported
    assert len(versions) - len(reported) <= 1
    assert heard == {key_of(name): store.newest(name) for name in names_of(store)}
    for path in tmp_path.rglob("*.part"):
        os.utime(path, (time.time() - 2 * HOUR,) * 2)
    leftovers = [str(path.relative_to(folder)) for path in folder.rglob("*.part")]
    assert [problem.path for problem in store.verify()] == leftovers
    store.rebuild()
    assert list(store.verify()) == []


def test_leftovers_of_a_crash_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path, create=True)
    version = store.put("alice", bytes_of(1))
    home = Path(path_of(store, version)).parent
    half = home / f".{version.stamp}.abc.part"
    half.write_bytes(bytes_of(2)[:40])
    (home / "folder").mkdir()
    (home / "folder" / "file").write_text("x")
    # perhaps it is being written
    assert list(store.verify()) == []
    store.rebuild()
    assert half.exists()
    for path in (half, home / "folder" / "file"):
        os.utime(path, (time.time() - 2 * HOUR,) * 2)
    assert {problem.what for problem in store.verify()} == {
        "left by a write that was cut off: rebuild, which clears it away"
    }
    assert equal(store.get("alice"), prefix_of(1))
    store.rebuild()
    assert not half.exists()
    assert not (home / "folder" / "file").exists()
    half.write_bytes(bytes_of(2)[:40])
    store.delete("alice")
    assert [path.name[-8:] for path in home.iterdir()] == ["-deleted"]


def test_public_names() -> None:
    assert sorted(foreword.store.__all__) == foreword.store.__all__
    assert all(hasattr(foreword.store, name) for name in foreword.store.__all__)
    assert repr(Token(time=1, seen=frozenset({"x"}))) == "Token(time=1)"


def test_of_threads_that_list_one_looks_at_the_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", create=True)
    store.put("alice", bytes_of(1))
    changes, inside, most = store._index.changes, [0], []

    def slowly(since: Any) -> Any:
        inside[0] += 1
        most.append(inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return changes(since)

    monkeypatch.setattr(store._index, "changes", slowly)
    pages: list[list[str]] = []
    threads = [threading.Thread(target=lambda: pages.append(names_of(store))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    assert pages == [["alice"]] * 5
