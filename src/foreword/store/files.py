"""A folder, or a filesystem fsspec can write to, as the store uses it. All paths are relative to its root."""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from foreword.errors import StoreError, one_line
from foreword.writing import write_atomically

SIGN = "foreword-store.json"
"""Says that a folder is a store."""

WORKERS = 16
TRIES = 10

_T = TypeVar("_T")
_R = TypeVar("_R")


class Files:
    """Whole files under one root of an fsspec filesystem: written once, read, listed, removed."""

    def __init__(self, filesystem: Any, root: str):
        self.filesystem = filesystem
        self.root = root.rstrip("/")

    def path(self, path: str) -> str:
        """On `filesystem`."""
        return f"{self.root}/{path}"

    def entries(self, folder: str) -> list[str]:
        """The names in a folder; none where there is no such folder."""
        try:
            paths = self.filesystem.ls(self.path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def find(self, path: str) -> list[str]:
        """The files below a folder, or the file itself; none where there is neither."""
        try:
            return [found.removeprefix(f"{self.root}/") for found in self.filesystem.find(self.path(path))]
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        return bytes(self.filesystem.cat_file(self.path(path)))

    def check(self) -> None:
        """Raise `OSError` where the store has gone since it was opened: nothing of it is there, and none is made anew."""
        try:
            self.read(SIGN)
        except FileNotFoundError:
            what = "the store is not there any more: was it moved, or is its volume not mounted?"
            raise OSError(errno.ENODEV, what, self.root) from None

    def write(self, path: str, data: bytes) -> None:
        """Write a file that is there whole or not at all."""
        for left in reversed(range(TRIES)):
            try:
                return self._write(path, data)
            except FileNotFoundError:
                # a deletion cleared away the file being written, or its folder
                if not left:
                    raise

    def _write(self, path: str, data: bytes) -> None:
        path = self.path(path)
        try:
            self.filesystem.pipe_file(path, data)
        except FileNotFoundError:
            # a server of files has folders to make; a bucket, which has no slash in its name, is never made
            if "/" not in self.root:
                raise
            if SIGN not in path:
                self.check()
            with suppress(FileExistsError):
                self.filesystem.mkdir(self.root, create_parents=False)
            self.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.filesystem.pipe_file(path, data)

    def remove(self, path: str) -> None:
        """Remove a file, if there is one."""
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self.path(path))

    def remove_all(self, path: str) -> None:
        """Remove a file, or a folder and all below it, if there is one."""
        self.map(self.remove, self.find(path))

    def remove_empty(self, folder: str) -> None:
        """Remove a folder that holds nothing; object stores have no such folders."""

    def modified(self, path: str) -> float:
        """When a file was written, in microseconds since 1970, UTC; infinity where it is gone."""
        try:
            return float(self.filesystem.modified(self.path(path)).timestamp() * 1e6)
        except FileNotFoundError:
            return math.inf

    def map(self, function: Callable[[_T], _R], items: list[_T]) -> list[_R]:
        """In order; many at a time, since each waits for a network."""
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(function, items))


class ServerFiles(Files):
    """The same on a server of files (SFTP, SMB), where a file is seen before it is whole, and can be renamed."""

    def _write(self, path: str, data: bytes) -> None:
        if not data:
            super()._write(path, data)
            return
        folder, _, name = path.rpartition("/")
        aside = f"{folder}/.{name[:40]}.{secrets.token_hex(6)}.part"
        try:
            super()._write(aside, data)
            self.filesystem.mv(self.path(aside), self.path(path))
        except Exception:  # its filesystems raise what they like
            self.remove(aside)
            # some rename over nothing; what is there is the same, since no file is ever changed
            if not self.filesystem.exists(self.path(path)):
                raise


class LocalFiles(Files):
    """The same in a folder of this machine, where fsspec neither writes atomically nor lists fast."""

    def entries(self, folder: str) -> list[str]:
        try:
            return os.listdir(self.path(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def find(self, path: str) -> list[str]:
        path = self.path(path)
        if os.path.isfile(path):
            return [path.removeprefix(f"{self.root}/")]
        return [
            f"{folder}/{file}".replace(os.sep, "/").removeprefix(f"{self.root}/")
            for folder, _, files in os.walk(path)
            for file in files
        ]

    def read(self, path: str) -> bytes:
        return Path(self.path(path)).read_bytes()

    def _write(self, path: str, data: bytes) -> None:
        if path != SIGN:
            self.check()
        if data:
            with write_atomically(self.path(path)) as aside:
                aside.write_bytes(data)
        else:
            Path(self.path(path)).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path(path)).touch()

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.remove(self.path(path))

    def remove_all(self, path: str) -> None:
        if os.path.isdir(self.path(path)):
            shutil.rmtree(self.path(path), ignore_errors=True)
        else:
            self.remove(path)

    def remove_empty(self, folder: str) -> None:
        # not empty where another has just put something there
        with suppress(OSError):
            os.rmdir(self.path(folder))

    def map(self, function: Callable[[_T], _R], items: list[_T]) -> list[_R]:
        return [function(item) for item in items]


def open_files(url: str, options: Mapping[str, Any]) -> Files:
    """The files at a path or a URL.

    Raises:
        StoreError: fsspec cannot open it.
    """
    # other writers change what is there, so listings are never cached
    options = {"use_listings_cache": False, **options}
    try:
        if "://" in url:
            filesystem, root = url_to_fs(url, **options)
        else:
            # fsspec would take a folder named a::b for a chain of filesystems
            filesystem = LocalFileSystem(**options)
            root = filesystem._strip_protocol(url)
    except Exception as error:  # its filesystems raise what they like
        raise StoreError(f"expected a folder or a URL that fsspec can open; got {url!r}: {one_line(error)}") from None
    if isinstance(filesystem, LocalFileSystem):
        return LocalFiles(filesystem, root)
    # an object store has no rename of its own: there, a file is seen when it is whole
    renames = type(filesystem).mv is not AbstractFileSystem.mv
    return (ServerFiles if renames else Files)(filesystem, root)
