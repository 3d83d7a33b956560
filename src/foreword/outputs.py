"""Outputs by row, kept as they come: what is killed goes on where it was.

Until there is one for every row they are in FILE.part, a line an output; then the file itself is written whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreword import generation
from foreword.errors import DataError, SettingsError
from foreword.prefix import Framing, Prefix
from foreword.version import __version__
from foreword.writing import check_file, write_atomically, write_jsonl

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["Outputs", "part_of"]


def part_of(file: str | os.PathLike[str]) -> Path:
    """Where the outputs are until there is one for every row."""
    return Path(f"{Path(file)}.part")


class Outputs:
    """What a run generates, and has generated before it was killed.

    Args:
        file: what the outputs end in.
        inputs, prefixes, settings, framing: as `foreword.generate` takes them.
        identity: what else decides the outputs, such as the base's name and dtype.
        overwrite: go on where `FILE.part` has something else, which is lost.
        on_rows: called with the number of rows that are done, those of an earlier run first.

    Attributes:
        run: a hash of all that decides the outputs; the batch size does not.
        whole: there is one for every input, and all that is left, or was left when the run was killed, is `finish`.

    Raises:
        SettingsError: `file` or `FILE.part` is a folder or a device, or `FILE.part` has something else.
        DataError: an input is nested too deep.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        inputs: Sequence[generation.Input],
        prefixes: Sequence[Prefix | None],
        *,
        settings: generation.GenerateSettings,
        framing: Framing | None = None,
        identity: Sequence[str] = (),
        overwrite: bool = False,
        on_rows: Callable[[int], None] | None = None,
    ):
        self.file, self.part = Path(file), part_of(file)
        self._inputs, self._prefixes, self._settings, self._framing = inputs, prefixes, settings, framing
        self._on_rows = on_rows
        own = {id(one): one for one in prefixes if one is not None}
        hashes = {key: hashlib.sha256(one.to_bytes(torch.float32)).hexdigest() for key, one in own.items()}
        how = {**dataclasses.asdict(settings), "batch_size": None}
        frame = None if framing is None else dataclasses.asdict(framing)
        facts = [how, frame, list(inputs), [hashes.get(id(one)) for one in prefixes], list(identity), __version__]
        try:
            self.run = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        except RecursionError:
            raise DataError("expected records that JSON can hold; one is nested too deep") from None
        for path in (self.file, self.part):
            check_file(path)
        begun = self.rows_of(self.part, "row", overwrite=overwrite)
        self._texts: dict[int, str] = {row["row"]: row["output"] for row in begun}
        self.whole = len(self._texts) == len(inputs)

    def rows_of(self, path: Path, *columns: str, overwrite: bool = False) -> list[dict[str, Any]]:
        """The run's rows in a file, with an output and these columns; none where there is no file.

        Raises:
            SettingsError: it has something else, and `overwrite` is false.
        """
        if not path.exists():
            return []
        *lines, last = path.read_bytes().split(b"\n")
        start = json.dumps({"run": self.run})[:-1].encode()
        # a kill may leave the half of one of the run's lines at the end, which is nothing to lose
        if not start.startswith(last[: len(start)]):
            lines.append(last)
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and row.get("run") == self.run and row.keys() >= {*columns, "output"}:
                rows.append(row)
            elif not overwrite:
                raise SettingsError(
                    f"{path} is of another run (base, prefix, data or settings differ): name another file, or give --overwrite"
                )
        return rows

    def generate(self, base: Callable[[], Base]) -> list[str]:
        """An output for each input, in their order.

        Args:
            base: gives the base; called only where something is left to generate, and can be written.

        Raises:
            ForewordError: as `foreword.generate`, and before anything is generated.
            OSError: nothing can be written there.
        """
        self._tell(len(self._texts))
        left = [i for i in range(len(self._inputs)) if i not in self._texts]
        if left:
            self._generate(base, left)
        return [self._texts[i] for i in range(len(self._inputs))]

    def _generate(self, base: Callable[[], Base], left: Sequence[int]) -> None:
        # written anew, without the half of a line that a kill may have left
        with write_atomically(self.part) as aside:
            aside.write_text("".join(map(self._line, self._texts.items())), encoding="utf-8")
        try:
            with self.part.open("a", encoding="utf-8") as file:

                def keep(texts: Mapping[int, str]) -> None:
                    file.write("".join(map(self._line, texts.items())))
                    file.flush()
                    self._texts |= texts
                    self._tell(len(texts))

                generation.generate(
                    base(),
                    [self._inputs[i] for i in left],
                    [self._prefixes[i] for i in left],
                    settings=self._settings,
                    framing=self._framing,
                    numbers=left,
                    on_texts=keep,
                )
        finally:
            if not self._texts:
                self.part.unlink(missing_ok=True)

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `file`, whole or not at all, and remove `FILE.part`."""
        write_jsonl(self.file, rows)
        self.part.unlink(missing_ok=True)

    def _line(self, item: tuple[int, str]) -> str:
        row, output = item
        return json.dumps({"run": self.run, "row": row, "output": output}, ensure_ascii=False) + "\n"

    def _tell(self, rows: int) -> None:
        if self._on_rows is not None:
            self._on_rows(rows)
