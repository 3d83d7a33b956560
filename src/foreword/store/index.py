"""What is in a store and what changed: announcements, a snapshot, and the pages read from them."""

from __future__ import annotations

import bisect
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from foreword.store.files import Files
from foreword.store.names import EPOCH, MICROSECOND, Folder, Mark, Version, hash_of

SECOND = 1_000_000
"""Times are whole microseconds since 1970, UTC."""
SKEW = 60 * SECOND
"""How far clocks may be apart for `changes` to miss nothing."""
WINDOW = 2 * SKEW
"""How far back a reader looks again: a writer's clock may be behind, and it announces again what takes longer than SKEW."""
KEPT = 7 * 24 * 3600 * SECOND
"""How long announcements and tombstones are kept."""
AHEAD = 10 * SKEW
"""How far a reader's clock may be ahead of the writers'."""
MANY_MINUTES = 20

_SHARD = re.compile(r"[0-9a-f]{2}")
_KEY = re.compile(r"[0-9a-f]{40}")
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_PRUNED = re.compile(r"pruned-(\d{16})", re.ASCII)
_ANNOUNCEMENT = re.compile(r"(\d{16})-([0-9a-f]{40})-(\d{16})-([0-9a-f]{8})", re.ASCII)
_SNAPSHOT = re.compile(r"\d{16}-\d{16}-[0-9a-f]{8}\.json", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a name is now.

    Args:
        key: `key_of(name)`.
        version: the newest version; None where the name was deleted (its text is gone with it).
    """

    key: str
    version: Version | None


@dataclass(frozen=True, kw_only=True)
class Token:
    """Where a reader of changes stands. Made by `Store.changes`; of the present time, it misses nothing that comes.

    Args:
        time: up to when all is known, in microseconds, but for announcements that come late.
        seen: the announcements of the last minutes that need not be read again.
    """

    time: int
    seen: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What changed.

    Args:
        items: one for each name that changed.
        token: hand it to the next call of `changes`.
        reset: `items` is everything there is; forget what you knew.
    """

    items: list[Change]
    token: Token
    reset: bool


@dataclass(frozen=True, kw_only=True)
class Page:
    """The newest versions of some names, sorted by name; `cursor` is the next call's `after`, None at the end."""

    versions: list[Version]
    cursor: str | None


class _Announcement(NamedTuple):
    time: int
    key: str
    stamp: int
    id: str
    file: str

    def arrived(self, folder: Folder, version: Version | None) -> bool:
        """Whether a name's folder shows the change, and can tell the name."""
        there = bool(folder.marks) and folder.marks[-1][:2] >= (self.stamp, self.id)
        return there and (version is not None or not folder.alive)


def _parsed(files: Iterable[str]) -> list[_Announcement]:
    """In order of time; other files are passed over."""
    matches = filter(None, map(_ANNOUNCEMENT.fullmatch, files))
    return sorted(_Announcement(int(match[1]), match[2], int(match[3]), match[4], match[0]) for match in matches)


def home(key: str) -> str:
    """The folder of a name."""
    return f"names/{key[:2]}/{key}"


def _minute(time: int) -> tuple[str, str]:
    """The folders that hold the announcements of a time: a day, and in it a minute."""
    moment = EPOCH + max(time, 0) * MICROSECOND
    return f"{moment:%Y-%m-%d}", f"{moment:%H%M}"


def _digits(time: int) -> str:
    """Sixteen, so that times sort as text."""
    return f"{max(time, 0):016d}"


class Index:
    """Reads and writes announcements and snapshots, and looks into the folders of names.

    Args:
        files: of the store.
        now: the time in microseconds.
    """

    def __init__(self, files: Files, now: Callable[[], int]):
        self._files = files
        self._now = now
        self._lock = threading.Lock()
        self._token: Token | None = None
        self._versions: dict[str, Version] = {}
        self._names: list[str] = []

    # what the files say

    def look(self, key: str) -> Folder:
        return Folder(self._files.entries(home(key)))

    def name(self, key: str) -> str | None:
        """None where it is missing, or another's."""
        with suppress(FileNotFoundError, UnicodeDecodeError):
            name = self._files.read(f"{home(key)}/name.txt").decode()
            return name if hash_of(name) == key else None
        return None

    def walk(self) -> Iterator[tuple[str, Folder, str | None]]:
        """The folder of every name, and the name."""
        for shard in sorted(filter(_SHARD.fullmatch, self._files.entries("names"))):
            files: dict[str, list[str]] = {}
            for path in self._files.find(f"names/{shard}"):
                key, _, file = path.removeprefix(f"names/{shard}/").partition("/")
                if _KEY.fullmatch(key):
                    files.setdefault(key, []).append(file)
            folders = {key: Folder(those) for key, those in sorted(files.items())}
            named = [key for key, folder in folders.items() if folder.named]
            names = dict(zip(named, self._files.map(self.name, named), strict=True))
            for key, folder in folders.items():
                yield key, folder, names.get(key)

    # announcements

    def announce(self, key: str, mark: Mark) -> int:
        """Say that a name is about to change. Returns the time that was written."""
        now = self._now()
        folder = "/".join(_minute(now))
        self._files.write(f"changes/{folder}/{_digits(now)}-{key}-{mark.stamp:016d}-{mark.id}", b"")
        return now

    def announce_late(self, key: str, mark: Mark, announced: int) -> None:
        """Announce again what took longer than SKEW: readers may no longer look for it."""
        if self._now() - announced > SKEW:
            self.announce(key, mark)

    def _days(self) -> tuple[list[str], int]:
        """The days that have announcements, and from when on these are complete."""
        entries = self._files.entries("changes")
        pruned = [int(match[1]) for entry in entries if (match := _PRUNED.fullmatch(entry))]
        return sorted(filter(_DAY.fullmatch, entries)), max(pruned, default=-WINDOW)

    def _announced(self, days: list[str], start: int) -> list[str]:
        """The files of the announcements from a time on."""
        first = _minute(start)
        files: list[str] = []
        for day in days:
            if day < first[0]:
                continue
            minutes = [minute for minute in self._files.entries(f"changes/{day}") if (day, minute) >= first]
            if len(minutes) > MANY_MINUTES:
                files += [path.rsplit("/", 1)[-1] for path in self._files.find(f"changes/{day}")]
            else:
                files += [file for minute in minutes for file in self._files.entries(f"changes/{day}/{minute}")]
        begin = _digits(start)
        return [file for file in files if file >= begin]

    def _head(self, days: list[str]) -> int:
        """The time of the last announcement, or now, whichever is earlier; 0 where there is none."""
        for day in reversed(days):
            for minute in sorted(self._files.entries(f"changes/{day}"), reverse=True):
                if found := _parsed(self._files.entries(f"changes/{day}/{minute}")):
                    return min(self._now(), found[-1].time)
        return 0

    def _replay(self, days: list[str], since: Token, known: Mapping[str, Version]) -> Changes:
        """Read the announcements that `since` has not seen, and look into the folders of their names."""
        fresh = _parsed(file for file in self._announced(days, since.time - WINDOW) if file not in since.seen)

        def look(key: str) -> tuple[Folder, Version | None]:
            folder, before = self.look(key), known.get(key)
            return folder, folder.newest(before.name if before else self.name(key) if folder.alive else None)

        keys = list(dict.fromkeys(one.key for one in fresh))
        states = dict(zip(keys, self._files.map(look, keys), strict=True))
        done: dict[_Announcement, Change] = {}
        for one in fresh:
            folder, version = states[one.key]
            if one.arrived(folder, version):
                done[one] = Change(key=one.key, version=version)
        # a clock that runs ahead, the reader's or one writer's, must not hide what others announce
        now = self._now()
        time = max(since.time, now - AHEAD, min(now, fresh[-1].time if fresh else 0))
        start = _digits(time - WINDOW)
        seen = {file for file in since.seen.union(one.file for one in done) if file >= start}
        items = {change.key: change for change in done.values()}
        return Changes(items=list(items.values()), token=Token(time=time, seen=frozenset(seen)), reset=False)

    # snapshots

    def survey(self, visit: Callable[[str, Folder, str | None], None]) -> tuple[Token, dict[str, Version]]:
        """Read the files: the newest version of every name by key, and where to go on reading announcements."""
        days, _ = self._days()
        at = self._head(days)
        announced: dict[str, list[_Announcement]] = {}
        for one in _parsed(self._announced(days, at - WINDOW)):
            announced.setdefault(one.key, []).append(one)
        versions, seen = {}, set()
        for key, folder, name in self.walk():
            version = folder.newest(name)
            if version:
                versions[key] = version
            seen |= {one.file for one in announced.get(key, []) if one.arrived(folder, version)}
            visit(key, folder, name)
        return Token(time=at, seen=frozenset(seen)), versions

    def _snapshots(self) -> list[str]:
        """The files of snapshots, the newest first."""
        return sorted(filter(_SNAPSHOT.fullmatch, self._files.entries("index")), reverse=True)

    def snapshot(self) -> tuple[Token, dict[str, Version]] | None:
        """What the newest survey found that was written down."""
        for file in self._snapshots():
            if file > _digits(self._now()):
                # made by a clock that ran ahead: it would hide what was announced since
                continue
            # a rebuild may have removed it meanwhile; a damaged one is as good as none
            with suppress(
                FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
            ):
                raw = json.loads(self._files.read(f"index/{file}"))
                token = Token(time=int(raw["at"]), seen=frozenset(raw["seen"]))
                return token, {hash_of(name): Mark(*mark).checked.of(name) for name, *mark in raw["versions"]}
        return None

    def changes(self, since: Token | None) -> Changes:
        """See `Store.changes`."""
        days, pruned = self._days()
        if since is not None and since.time - WINDOW >= pruned:
            return self._replay(days, since, self._versions)
        found = self.snapshot()
        if found is None or found[0].time - WINDOW < pruned:
            found = self.survey(lambda *_: None)
            days, _ = self._days()
        token, versions = found
        later = self._replay(days, token, versions)
        for change in later.items:
            versions.pop(change.key, None)
            if change.version:
                versions[change.key] = change.version
        items = [Change(key=key, version=version) for key, version in versions.items()]
        return Changes(items=items, token=later.token, reset=True)

    def page(self, after: str, limit: int, begins: str) -> Page:
        """See `Store.page`."""
        with self._lock:
            self._refresh()
            start = max(bisect.bisect_right(self._names, after), bisect.bisect_left(self._names, begins))
            names = self._names[start : start + limit + 1]
            names = names[: next((i for i, name in enumerate(names) if not name.startswith(begins)), len(names))]
            versions = [self._versions[hash_of(name)] for name in names[:limit]]
        return Page(versions=versions, cursor=names[limit - 1] if len(names) > limit else None)

    def _refresh(self) -> None:
        changes = self.changes(self._token)
        if changes.reset:
            self._versions, self._names = {}, []
        gone, new = set(), []
        for change in changes.items:
            before = self._versions.pop(change.key, None)
            if change.version:
                self._versions[change.key] = change.version
                if not before:
                    new.append(change.version.name)
            elif before:
                gone.add(before.name)
        if gone or new:
            self._names = sorted([name for name in self._names if name not in gone] + new)
        self._token = changes.token

    def rebuild(self, tidy: Callable[[str, Folder, str | None, int], None]) -> int:
        """See `Store.rebuild`; calls `tidy(key, folder, name, horizon)` for every name."""
        days, _ = self._days()
        horizon = max(self._head(days) - KEPT, 0)
        older = self._snapshots()
        token, versions = self.survey(lambda key, folder, name: tidy(key, folder, name, horizon))
        file = f"{_digits(token.time)}-{_digits(self._now())}-{secrets.token_hex(4)}.json"
        rows = sorted((one.name, one.stamp, one.id, one.sha256) for one in versions.values())
        content = {"at": token.time, "seen": sorted(token.seen), "versions": rows}
        self._files.write(f"index/{file}", json.dumps(content).encode())
        for other in older:
            self._files.remove(f"index/{other}")
        self._prune([day for day in days if day < _minute(horizon)[0]], f"pruned-{_digits(horizon)}")
        return len(versions)

    def _prune(self, days: list[str], mark: str) -> None:
        old = [entry for entry in self._files.entries("changes") if _PRUNED.fullmatch(entry)]
        if days:
            # the mark first: who reads a day while it goes then knows that it is not whole
            self._files.write(f"changes/{mark}", b"")
            for day in days:
                self._files.remove_all(f"changes/{day}")
        for entry in old:
            if (days and entry < mark) or entry > f"pruned-{_digits(self._now())}":
                self._files.remove(f"changes/{entry}")
