"""A prefix on a task's data: outputs, kept as they come, and their scores, for each category too.

An evaluation that is killed goes on where it was, and a finished file is scored again without the base.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from foreword.data import check_fits, frame
from foreword.outputs import Outputs
from foreword.prefix import Prefix
from foreword.tasks import webnlg
from foreword.tasks.records import Example

if TYPE_CHECKING:
    from foreword.bases import Base
    from foreword.generation import GenerateSettings

__all__ = ["METRICS", "groups_of", "outputs_of"]

METRICS = {"dart": "webnlg,bertscore", "e2e": "e2e", "summarization": "rouge", "webnlg": "webnlg"}
"""The metrics of each task. DART's are WebNLG's, where its own script differs a little (docs/tasks.md), and BERTScore."""


def groups_of(task: str, examples: Sequence[Example]) -> dict[str, list[int]]:
    """What figures are given for: all examples, and those of each category where there are several.

    Args:
        task: a name in `foreword.tasks.TASKS`.
        examples: as read.

    Returns:
        By the group's name, the places of its examples: `all`, `seen` and `unseen` where both hold any, and the
        categories in alphabetical order.
    """
    groups: dict[str, list[int]] = {"all": list(range(len(examples)))}
    categories = sorted({one.category for one in examples if one.category is not None})
    known = {*webnlg.SEEN_CATEGORIES, *webnlg.UNSEEN_CATEGORIES}
    if task == "webnlg" and known.issuperset(categories):
        halves: dict[str, list[int]] = {"seen": [], "unseen": []}
        for i, one in enumerate(examples):
            if one.category is not None:
                halves["seen" if one.category in webnlg.SEEN_CATEGORIES else "unseen"].append(i)
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
        settings: how they are generated.
        file: JSONL, a row an example: `id`, `category` where there is one, `input`, `references`, `output` and `run`,
            a hash of all that decides the outputs. Until it is whole, the rows are in `FILE.part`.
        identity: what else decides the outputs, such as the dtype of the base.
        overwrite: replace a file of other outputs.
        on_rows: called with the number of rows done.

    Returns:
        One output an example, in their order.

    Raises:
        SettingsError: `file` or `FILE.part` is of other outputs, or something else.
        ForewordError: as `foreword.generate`, and before anything is generated.
    """
    inputs = [one.input for one in examples]
    outputs = Outputs(
        file,
        inputs,
        [prefix] * len(inputs),
        settings=settings,
        identity=identity,
        overwrite=overwrite,
        on_rows=on_rows,
    )
    # by what they are outputs of: a file may have been sorted since, and ids may be of a file that has another name now
    whole: dict[str, list[str]] = {}
    for row in outputs.rows_of(outputs.file, "input", overwrite=overwrite):
        whole.setdefault(row["input"], []).append(row["output"])
    done = [whole[one.input].pop(0) for one in examples if whole.get(one.input)]
    if len(done) == len(examples):
        if on_rows is not None:
            on_rows(len(done))
        return done

    def checked() -> Base:
        frozen = base()
        prefix.check(frozen)
        for one in examples:
            # `generate` looks at them too, and knows them by their number alone
            where = f"the input {one.id!r}"
            x = frame(frozen, {"input": one.input}, prefix.card.framing, where)
            check_fits(frozen, len(x), 1, prefix.length, where)
        return frozen

    texts = outputs.generate(checked)
    outputs.finish(
        {key: value for key, value in dataclasses.asdict(one).items() if value is not None}
        | {"output": text, "run": outputs.run}
        for one, text in zip(examples, texts, strict=True)
    )
    return texts
