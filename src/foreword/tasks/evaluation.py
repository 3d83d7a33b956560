"""A prefix on a task's data: outputs, kept as they come, and their scores, for each category too.

Outputs go to a file beside the one they end in, a few rows at a time, so an evaluation that is killed goes on where it
was. A finished file is scored again without the base.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreword.data import check_fits, frame
from foreword.errors import SettingsError
from foreword.prefix import Prefix, write_atomically
from foreword.tasks import webnlg
from foreword.tasks.records import Example
from foreword.version import __version__

if TYPE_CHECKING:
    from foreword.bases import Base
    from foreword.generation import GenerateSettings

__all__ = ["MAX_NEW_TOKENS", "METRICS", "groups_of", "outputs_of"]

METRICS = {"dart": "webnlg,bertscore", "e2e": "e2e", "summarization": "rouge", "webnlg": "webnlg"}
"""The metrics of each task. DART's are WebNLG's, where its own script differs a little (docs/tasks.md), and BERTScore."""

MAX_NEW_TOKENS = 100
"""Most tokens of an output, unless another number is given: as the paper's code has it for every task here."""

CHUNK = 4
"""Batches whose outputs are written at once; also what is lost where an evaluation is killed."""


def groups_of(task: str, examples: Sequence[Example], *, seen: Collection[str] | None = None) -> dict[str, list[int]]:
    """What figures are given for: all examples, and those of each category where there are several.

    Args:
        task: a name in `foreword.tasks.TASKS`.
        examples: as read.
        seen: categories that were trained on. Default: for WebNLG the challenge's, else no such groups are made.

    Returns:
        By the group's name, the places of its examples: `all`, `seen` and `unseen` where both hold any, and the
        categories in alphabetical order.
    """
    groups: dict[str, list[int]] = {"all": list(range(len(examples)))}
    categories = sorted({one.category for one in examples if one.category is not None})
    known = {*webnlg.SEEN_CATEGORIES, *webnlg.UNSEEN_CATEGORIES}
    if seen is None and task == "webnlg" and known.issuperset(categories):
        seen = webnlg.SEEN_CATEGORIES
    if seen is not None:
        halves: dict[str, list[int]] = {"seen": [], "unseen": []}
        for i, one in enumerate(examples):
            if one.category is not None:
                halves["seen" if one.category in seen else "unseen"].append(i)
        if all(halves.values()):
            groups |= halves
    if len(categories) > 1:
        for category in categories:
            # a category may be called as a group is
            name = f"category {category}" if category in groups else category
            groups[name] = [i for i, one in enumerate(examples) if one.category == category]
    return groups


def outputs_of(
    base: Callable[[], Base],
    prefix: Prefix,
    examples: Sequence[Example],
    settings: GenerateSettings,
    file: str | os.PathLike[str],
    *,
    identity: Sequence[str] = (),
    overwrite: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> list[str]:
    """The prefix's output for each example, from `file` where it has them, else generated and written there.

    Args:
        base: gives the base; called only where something is left to generate.
        prefix: on disk or in memory.
        examples: what to generate for.
        settings: greedy or with beams; a sampled output would depend on where a run was interrupted.
        file: JSONL, a row an example: `id`, `category` where there is one, `input`, `references`, `output` and `run`,
            a hash of all that decides the outputs. Until it is whole, the rows are in `FILE.part`.
        identity: what else decides the outputs, such as the dtype of the base.
        overwrite: replace a file of other outputs.
        on_rows: called with the number of rows done.

    Returns:
        One output an example, in their order.

    Raises:
        SettingsError: `settings` sample; or `file`, or `FILE.part`, is of other outputs, or something else.
        ForewordError: as `foreword.generate`, and before anything is generated.
    """
    if settings.temperature > 0:
        raise SettingsError("expected temperature 0: outputs that are kept and gone on with cannot be sampled")
    file = Path(file)
    part = Path(f"{file}.part")
    run = _run(prefix, examples, settings, identity)
    for path in (file, part):
        if path.exists() and not path.is_file():
            raise SettingsError(f"expected a file for the outputs; {path} is a folder or a device: name another path")
    whole, begun = _rows(file, run, "output"), _rows(part, run, "row", "output")
    for path, rows in ((file, whole), (part, begun)):
        if {} in rows and not overwrite:
            raise SettingsError(
                f"{path} is of another evaluation (prefix, data or settings differ): name another file, or give --overwrite"
            )
    done = [row["output"] for row in whole if row]
    if len(done) == len(examples):
        if on_rows is not None:
            on_rows(len(done))
        return done
    texts = {row["row"]: row["output"] for row in begun if row}
    if on_rows is not None:
        on_rows(len(texts))
    _generate(base, prefix, examples, settings, part, run, texts, on_rows)
    with write_atomically(file) as aside, aside.open("w", encoding="utf-8") as out:
        for i, example in enumerate(examples):
            facts = {k: v for k, v in dataclasses.asdict(example).items() if v is not None}
            out.write(json.dumps({**facts, "output": texts[i], "run": run}, ensure_ascii=False) + "\n")
    part.unlink(missing_ok=True)
    return [texts[i] for i in range(len(examples))]


def _generate(
    base: Callable[[], Base],
    prefix: Prefix,
    examples: Sequence[Example],
    settings: GenerateSettings,
    part: Path,
    run: str,
    texts: dict[int, str],
    on_rows: Callable[[int], None] | None,
) -> None:
    """Generate what `texts` lacks, and put it there and into the file `part`."""
    from foreword.generation import generate

    # long and short inputs apart: batches then have little padding
    order = sorted((i for i in range(len(examples)) if i not in texts), key=lambda i: len(examples[i].input))
    if not order:
        return
    # written anew, without the half of a line that a kill may have left
    with write_atomically(part) as aside:
        aside.write_text("".join(_line(run, i, text) for i, text in texts.items()), encoding="utf-8")
    frozen = base()
    _check_fit(frozen, prefix, [examples[i] for i in order])
    with part.open("a", encoding="utf-8") as file:
        step = CHUNK * settings.batch_size
        for start in range(0, len(order), step):
            places = order[start : start + step]
            for i, text in zip(
                places,
                generate(frozen, [examples[i].input for i in places], prefix, settings=settings, on_rows=on_rows),
                strict=True,
            ):
                texts[i] = text
                file.write(_line(run, i, text))
            file.flush()


def _check_fit(base: Base, prefix: Prefix, examples: Sequence[Example]) -> None:
    """Look at all before the first is generated: one that is too long would be found last, after hours perhaps."""
    prefix.check(base)
    for one in examples:
        where = f"the input {one.id!r}"
        check_fits(base, len(frame(base, {"input": one.input}, prefix.card.framing, where)), 1, prefix.length, where)


def _line(run: str, row: int, output: str) -> str:
    return json.dumps({"run": run, "row": row, "output": output}, ensure_ascii=False) + "\n"


def _rows(path: Path, run: str, *columns: str) -> list[dict[str, Any]]:
    """The run's rows in a file of outputs, and an empty one for each line that is something else."""
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    start = json.dumps({"run": run})[:-1].encode()
    # a kill may leave the half of one of the run's lines at the end, which is nothing to lose
    if not start.startswith(last[: len(start)]):
        lines.append(last)
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        ours = isinstance(row, dict) and row.get("run") == run and row.keys() >= set(columns)
        rows.append(row if ours else {})
    return rows


def _run(prefix: Prefix, examples: Sequence[Example], settings: GenerateSettings, identity: Sequence[str]) -> str:
    how = {k: v for k, v in dataclasses.asdict(settings).items() if k != "batch_size"}  # changes no output
    digest = hashlib.sha256(prefix.to_bytes(torch.float32))
    digest.update(json.dumps([how, [one.input for one in examples], *identity, __version__], sort_keys=True).encode())
    return digest.hexdigest()[:16]
