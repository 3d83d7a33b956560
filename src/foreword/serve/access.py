"""Who may what: API keys, kept as hashes in a file, and what each may use.

A key is `fw-ID-SECRET`. The file holds the SHA-256 of the whole; a secret of 256 random bits needs no slower hash. What
is wrong with a key that was given is told to nobody: not known, removed and mistyped are one error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from foreword.errors import SettingsError, one_line
from foreword.writing import write_atomically

__all__ = ["OPEN", "Key", "KeyFile"]

log = logging.getLogger(__name__)

FORMAT = 1
RELOAD = 1.0
"""Seconds after which the file is looked at again."""

_KEY = re.compile(r"fw-([0-9a-f]{8})-[\w-]{43}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Key:
    """An API key, without its secret.

    Args:
        id: eight hex digits, which logs and the file name it by.
        sha256: of the whole key.
        label: for people.
        prefixes: names that it may use; in them `*` stands for any characters. The bare base may be used by all.
        admin: whether it may use every prefix, and upload and delete them.
        tokens_per_minute: of x and y together; None for no limit.
        concurrency: texts under way at once; None for no limit.
        created: UTC time, ISO 8601.
    """

    id: str
    sha256: str
    label: str = ""
    prefixes: tuple[str, ...] = ()
    admin: bool = False
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    created: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "label", "created"):
            if not isinstance(getattr(self, name), str):
                raise SettingsError(f"expected {name} as text; got {getattr(self, name)!r}")
        # a string would be taken letter by letter, and one of them may be *
        listed = isinstance(self.prefixes, Sequence) and not isinstance(self.prefixes, str)
        if not listed or not all(isinstance(name, str) for name in self.prefixes):
            raise SettingsError(f"expected prefixes to be a list of names; got {self.prefixes!r}")
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if not (isinstance(self.sha256, str) and re.fullmatch(r"[0-9a-f]{64}|", self.sha256, re.ASCII)):
            raise SettingsError(f"expected sha256 as 64 hexadecimal digits; got {self.sha256!r}")
        if not isinstance(self.admin, bool):
            raise SettingsError(f"expected admin to be true or false; got {self.admin!r}")
        for name in ("tokens_per_minute", "concurrency"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SettingsError(f"expected {name} as a whole number of at least 1; got {value!r}")

    def may_use(self, name: str) -> bool:
        """Whether it may use the prefix of that name."""
        return self.admin or any(_matches(pattern, name) for pattern in self.prefixes)


def _matches(pattern: str, name: str) -> bool:
    parts = normalized(pattern).split("*")
    return re.fullmatch(".*".join(map(re.escape, parts)), name, re.DOTALL) is not None


def normalized(pattern: str) -> str:
    """As names are, in NFC."""
    return unicodedata.normalize("NFC", pattern)


OPEN = Key(id="open", sha256="", admin=True)
"""What everybody has where no keys are asked for."""


class KeyFile:
    """The keys in a file. Others may change it meanwhile: a change counts within seconds.

    Where it becomes something else than a file of keys, or cannot be read, the keys that were known stay known.

    Args:
        path: of the file; none is a file without keys.

    Raises:
        SettingsError: it is something else than a file of keys, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._read_at = -RELOAD
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._failed: str | None = None
        self._load()

    def known(self) -> list[Key]:
        """All keys, the oldest first."""
        return list(self._by_id().values())

    def _by_id(self) -> dict[str, Key]:
        """As the file has them, or had them a moment ago; never changed, but replaced."""
        with self._lock:
            now = time.monotonic()
            if now - self._read_at >= RELOAD:
                self._read_at = now
                try:
                    self._load()
                    self._failed = None
                except SettingsError as error:
                    if str(error) != self._failed:
                        log.error("the keys that were known stay known: %s", error)
                    self._failed = str(error)
            return self._keys

    def _load(self) -> None:
        try:
            status = self.path.stat()
            seen = status.st_mtime_ns, status.st_ino, status.st_size
            if seen != self._seen:
                self._keys = {key.id: key for key in self._parsed(self.path.read_bytes())}
                self._seen = seen
        except FileNotFoundError:
            self._keys, self._seen = {}, None
        except OSError as error:
            raise SettingsError(f"cannot read the file of API keys at {self.path}: {error.strerror}") from error

    def _parsed(self, data: bytes) -> Sequence[Key]:
        try:
            raw = json.loads(data)
            if raw["format"] != FORMAT:
                raise ValueError
            keys = [Key(**one) for one in raw["keys"]]
        except SettingsError as error:
            raise SettingsError(f"{self.path}: one of its API keys is none: {one_line(error)}") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise SettingsError(
                f"expected a file of API keys at {self.path}; it is something else: name another, or make one with "
                "foreword keys add"
            ) from None
        return keys

    def find(self, given: str) -> Key | None:
        """The key that was given; None where there is none such. Takes the same time for every wrong one."""
        match = _KEY.fullmatch(given)
        known = self._by_id().get(match[1]) if match else None
        expected = known.sha256 if known else "0" * 64
        same = hmac.compare_digest(hashlib.sha256(given.encode(errors="replace")).hexdigest(), expected)
        return known if same else None

    def add(self, **what: Any) -> tuple[Key, str]:
        """Make a key; arguments as of `Key`, without its id, its hash and its time.

        Returns:
            the key, and its text, which is kept nowhere.

        Raises:
            SettingsError: a limit out of its range.
        """
        created = datetime.now(UTC).isoformat(timespec="seconds")
        with self._changing() as keys:
            taken = {key.id for key in keys}
            while (id := secrets.token_hex(4)) in taken:
                pass
            text = f"fw-{id}-{secrets.token_urlsafe(32)}"
            key = Key(id=id, sha256=hashlib.sha256(text.encode()).hexdigest(), created=created, **what)
            keys.append(key)
        return key, text

    def remove(self, id: str) -> Key:
        """Remove a key. Raises `SettingsError` where there is none of that id."""
        with self._changing() as keys:
            found = next((key for key in keys if key.id == id), None)
            if found is None:
                raise SettingsError(f"no key {id!r} in {self.path}: see foreword keys ls")
            keys.remove(found)
        return found

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            with self._lock:
                self._load()
                keys = list(self._keys.values())
            yield keys
            raw = {"format": FORMAT, "keys": [dataclasses.asdict(key) for key in keys]}
            with write_atomically(self.path) as aside:
                aside.chmod(0o600)
                if self.path.exists():
                    # or the server that reads it may be locked out by whoever changes it
                    status = self.path.stat()
                    with suppress(OSError):
                        os.chown(aside, status.st_uid, status.st_gid)
                aside.write_text(json.dumps(raw, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            with self._lock:
                self._read_at = -RELOAD
