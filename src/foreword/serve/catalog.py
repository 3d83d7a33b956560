"""What names mean now: each name's newest version, and how that frames x."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from foreword.prefix import Card, Prefix
from foreword.serve.engine import Engine
from foreword.serve.waiting import StoreThreads
from foreword.store import Change, Store, Token, Version, check_name, key_of

__all__ = ["Catalog", "Entry"]

POLL = 1.0
"""Seconds between looks at the store, and the longest for which a name's version is believed."""
MAX_BYTES = 64 << 20
"""Of the cards in memory."""
MAX_NAMES = 100_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version of a prefix, as far as the server needs to know it.

    Args:
        version: of the store.
        card: of its file.
        length: P.
        facts: `Prefix.facts`.
    """

    version: Version
    card: Card
    length: int
    facts: Mapping[str, object]

    @classmethod
    def of(cls, version: Version, prefix: Prefix) -> Entry:
        return cls(version=version, card=prefix.card, length=prefix.length, facts=prefix.facts)


class Catalog:
    """Names and cards of a store, and an eye on its changes.

    Args:
        store: of the prefixes; others may write to it.
        engine: told to forget what was deleted.
        seconds: for one call of the store.

    Attributes:
        threads: that wait for the store.
    """

    def __init__(self, store: Store, engine: Engine, seconds: float):
        self.store = store
        self.engine = engine
        self.threads = StoreThreads(seconds)
        self._newest: OrderedDict[str, tuple[Version, float]] = OrderedDict()
        self._entries: OrderedDict[str, tuple[Entry, int]] = OrderedDict()
        self._bytes = 0
        self._changes = 0
        self._contents: OrderedDict[str, set[str]] = OrderedDict()

    async def find(self, name: str) -> Entry:
        """The newest version of a name.

        Raises:
            NoSuchPrefixError: there is none. StoreError: it cannot be a name.
            PrefixFileError: its file is damaged.
            OSError: the store cannot be reached.
        """
        name = check_name(name)
        version, believed = self._newest.get(name, (None, 0.0))
        if version is None or believed < time.monotonic():
            changes = self._changes
            version = await self.threads.run(self.store.newest, name)
            # what changed while it was looked up may be newer than what was found
            if changes == self._changes:
                self._newest[name] = version, time.monotonic() + POLL
                self._newest.move_to_end(name)
            self._contents.setdefault(key_of(name), set()).add(version.sha256)
            for names in (self._newest, self._contents):
                while len(names) > MAX_NAMES:
                    names.popitem(last=False)
        held = self._entries.get(version.sha256)
        if held is None:
            found = version
            entry = await self.threads.run(lambda: Entry.of(found, Prefix.from_bytes(self.store.read(found))))
            self._keep(entry)
        else:
            self._entries.move_to_end(version.sha256)
            entry = replace(held[0], version=version)
        return entry

    def _keep(self, entry: Entry) -> None:
        size = 1000 + 2 * len(entry.card.to_json())
        if entry.version.sha256 not in self._entries:
            self._entries[entry.version.sha256] = entry, size
            self._bytes += size
        while self._bytes > MAX_BYTES:
            _, (_, size) = self._entries.popitem(last=False)
            self._bytes -= size

    def forget_name(self, name: str) -> None:
        """The name's version is looked up anew."""
        self._changes += 1
        self._newest.pop(check_name(name), None)

    async def forget(self, sha256s: Collection[str]) -> None:
        """What was deleted is in memory no more."""
        for sha256 in sha256s:
            if sha256 in self._entries:
                self._bytes -= self._entries.pop(sha256)[1]
        await self.engine.forget(sha256s)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look at the store's changes, every second, for the time of a `with` block."""
        token = Token(time=int(time.time() * 1e6))
        task = asyncio.create_task(self._watch(token), name="foreword-watch")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.threads.close()

    async def _watch(self, token: Token) -> None:
        while True:
            await asyncio.sleep(POLL)
            try:
                changes = await self.threads.run(self.store.changes, token)
                token = changes.token
                if changes.reset:
                    self._newest.clear()
                await self._apply(changes.items)
            except Exception:
                # a store that cannot be reached for a while ends no server
                log.exception("cannot look at the store's changes")

    async def _apply(self, changes: Collection[Change]) -> None:
        deleted: set[str] = set()
        self._changes += bool(changes)
        for change in changes:
            if change.version is None:
                deleted |= self._contents.pop(change.key, set())
            else:
                self._newest.pop(change.version.name, None)
        if deleted:
            await self.forget(deleted)
