"""Prefixes in memory: read from the store when they are asked for, by their content, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from foreword.errors import SettingsError
from foreword.prefix import Prefix
from foreword.serve.engine import EngineStoppedError
from foreword.store import Store, Version

__all__ = ["Residents", "check_size", "size_of"]


@dataclass(eq=False)
class _Resident:
    """A prefix in memory, or on its way (None), and how many hold it."""

    prefix: Prefix | None = None
    held: int = 0
    doomed: bool = False

    @property
    def bytes(self) -> int:
        return 0 if self.prefix is None else size_of(self.prefix)


def size_of(prefix: Prefix) -> int:
    """Bytes of a prefix's keys and values."""
    return sum(tensor.nbytes for layers in prefix.sections.values() for layer in layers for tensor in layer)


def check_size(version: Version, size: int, budget: int) -> None:
    """Raise `SettingsError` where a prefix of so many bytes never fits the budget."""
    if size > budget:
        raise SettingsError(
            f"expected prefixes of at most {budget:,} bytes, the memory that they have together; {version} "
            f"takes {size:,}: give them more"
        )


class Residents:
    """The prefixes in memory, the least recently used going first. Threads may share one.

    Two names with one content are one prefix here, and a version is read once however many ask for it at a time.
    What is held stays; who asks for one more than fits waits until others have let go.

    Args:
        store: where prefixes are read.
        check: what each is put through when it was read, such as `lambda prefix: prefix.check(base)`; it may raise, and
            what it returns is kept.
        budget: the most bytes that all keys and values together may take.

    Attributes:
        hits, loads, evictions: see `Figures`.
        bytes: what is in memory.
    """

    def __init__(self, store: Store, check: Callable[[Prefix], Prefix], *, budget: int):
        self.store = store
        self.budget = budget
        self.bytes = self.hits = self.loads = self.evictions = 0
        self._check = check
        self._changed = threading.Condition()
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._line: list[_Resident] = []
        self._closed = False

    def __len__(self) -> int:
        return sum(resident.prefix is not None for resident in self._residents.copy().values())

    def figures(self) -> dict[str, Any]:
        """By the names of `Figures`."""
        return {
            "resident_prefixes": len(self),
            "resident_bytes": self.bytes,
            **{"hits": self.hits, "loads": self.loads, "evictions": self.evictions},
        }

    def __contains__(self, sha256: str) -> bool:
        resident = self._residents.get(sha256)
        return resident is not None and resident.prefix is not None

    def acquire(self, version: Version) -> Prefix:
        """The prefix of a version, which stays in memory until it is released as often as it was acquired.

        Waits for the store, and for room.

        Raises:
            NoSuchPrefixError: it is neither in memory nor in the store.
            PrefixFileError: its file is damaged, or `check` refuses it.
            SettingsError: it alone is larger than the budget.
            EngineStoppedError: closed.
        """
        with self._changed:
            while not self._closed:
                resident = self._residents.get(version.sha256)
                if resident is None:
                    resident = self._residents[version.sha256] = _Resident()
                    break
                if resident.prefix is not None:
                    resident.held += 1
                    self.hits += 1
                    self._residents.move_to_end(version.sha256)
                    return resident.prefix
                self._changed.wait()
            else:
                raise EngineStoppedError("the engine was stopped")
        try:
            prefix = self._check(Prefix.from_bytes(self.store.read(version)))
            size = size_of(prefix)
            check_size(version, size, self.budget)
        except BaseException:
            with self._changed:
                del self._residents[version.sha256]
                self._changed.notify_all()
            raise
        with self._changed:
            # in line, so that a large one is not passed by small ones for ever
            self._line.append(resident)
            try:
                while self._line[0] is not resident or not self._make_room(size):
                    if self._closed:
                        del self._residents[version.sha256]
                        raise EngineStoppedError("the engine was stopped")
                    self._changed.wait()
            finally:
                self._line.remove(resident)
                self._changed.notify_all()
            resident.prefix, resident.held = prefix, 1
            self._residents.move_to_end(version.sha256)
            self.bytes += size
            self.loads += 1
        return prefix

    def acquire_now(self, sha256: str) -> Prefix | None:
        """As `acquire` for what is in memory already; None, at once, for what is not."""
        with self._changed:
            resident = self._residents.get(sha256)
            if resident is None or resident.prefix is None or resident.doomed:
                return None
            resident.held += 1
            self.hits += 1
            self._residents.move_to_end(sha256)
            return resident.prefix

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes are free, after letting go of what nobody holds, the least recently used first."""
        for sha256 in list(self._residents):
            if self.bytes + size <= self.budget:
                break
            resident = self._residents[sha256]
            if resident.prefix is not None and not resident.held:
                self._drop(sha256)
                self.evictions += 1
        return self.bytes + size <= self.budget

    def _drop(self, sha256: str) -> None:
        self.bytes -= self._residents.pop(sha256).bytes

    def release(self, version: Version) -> None:
        """Let go of what was acquired."""
        with self._changed:
            resident = self._residents[version.sha256]
            resident.held -= 1
            if resident.doomed and not resident.held:
                self._drop(version.sha256)
            self._changed.notify_all()

    def release_coming(self, version: Version, coming: Future[Prefix]) -> None:
        """Let go of what is being acquired on another thread: if need be, when it is there."""
        if not coming.cancel():
            # a callback on a future that is done runs at once
            coming.add_done_callback(lambda done: None if done.exception() else self.release(version))

    def forget(self, sha256s: Collection[str]) -> None:
        """Free what nobody holds of these contents at once, and the rest when it is released."""
        with self._changed:
            for sha256 in sha256s:
                resident = self._residents.get(sha256)
                if resident is not None:
                    resident.doomed = True
                    if resident.prefix is not None and not resident.held:
                        self._drop(sha256)
            self._changed.notify_all()

    def close(self) -> None:
        """Wake up and refuse whoever waits. What is held may still be released."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
