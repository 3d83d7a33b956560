"""Many users at once: each gets the prefix that training alone would have given.

K slots train together. A step takes, of every slot, the rows of that user's own next step; all of them go through the
base side by side, in batches of about one length, each row with its own user's prefix:

    loss = Σ_u  mean over u's y tokens of -log p(y | x; θ_u)

No term has another user's parameters, so each user's gradient is their own, and so are the optimizer's state, the step
count, the schedule, the clipping, the early stopping and the random stream: they are in one `Learner` a user. When a user
is done, the next takes the slot. A user whose data cannot be used, or whose loss is no longer finite, fails alone.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from foreword.attach import Attachment, Stack, attach
from foreword.data import Record, Row, collate, column_names, fields_of, record_of, renamed
from foreword.errors import DataError, ForewordError, PrefixFileError, SettingsError
from foreword.learner import Learner, check_dev, checkpointing, make_trainable
from foreword.loss import mean_loss, token_losses
from foreword.prefix import Framing, Prefix
from foreword.reparam import TrainablePrefix, layers_of
from foreword.settings import TrainSettings
from foreword.store import NoSuchPrefixError, Store, Version

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["UserFile", "UserReport", "train_many"]


class UserFile:
    """A JSONL file of many users' rows, of which only the places of each user's lines are held in memory.

    Users are told apart as the store tells names apart: in Unicode's form NFC.

    Args:
        path: the file, UTF-8. A user's lines need not stand together.
        by: the column that names the user.
        input, output: the columns that hold x and y.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: one column is to be both x and y.
        DataError: the file is empty, a line is no JSON object, or names no user.
    """

    def __init__(self, path: str | PathLike[str], by: str = "user", *, input: str = "input", output: str = "output"):
        self.path, self.by = Path(path), by
        self._names = column_names(input, output)
        self._places: dict[str, array[int]] = {}
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}"
                text = _text_of(line, where)
                if text.strip():
                    user = self._user_of(record_of(text, where), where)
                    if user not in self._places:
                        self._places[user] = array("Q")
                    self._places[user].append(place)
                place += len(line)
        if not self._places:
            raise DataError(f"{self.path}: expected at least one record; the file has none")

    def _user_of(self, record: Record, where: str) -> str:
        user = record.get(self.by)
        if not isinstance(user, str) or not user:
            came = "no such column" if self.by not in record else ascii(user)[:80]
            raise DataError(f"{where}: expected a user's name in the column {self.by!r}; got {came}")
        return unicodedata.normalize("NFC", user)

    @property
    def users(self) -> list[str]:
        """Every user, in the order of their first lines."""
        return list(self._places)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def rows(self, user: str) -> int:
        """How many rows a user has."""
        return len(self._places.get(user, ()))

    def records(self, user: str) -> list[Record]:
        """A user's records, read from the disk now.

        Raises:
            DataError: a record lacks a column that was named; or the file is no longer the one that was looked through.
        """
        records: list[Record] = []
        with self.path.open("rb") as file:
            for number, place in enumerate(self._places.get(user, ()), 1):
                file.seek(place)
                where = f"{self.path}, record {number} of {user!a}"
                record = record_of(_text_of(file.readline(), where), where)
                # nobody's rows may get into another's prefix
                if self._user_of(record, where) != user:
                    raise DataError(f"{self.path}: the file was changed while it was read: run this again")
                records.append(renamed(record, self._names, where))
        return records


def _text_of(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8; byte {error.start} of the line is not: convert the file") from None


@dataclass(frozen=True, kw_only=True)
class UserReport:
    """What became of one user.

    Args:
        user: the name.
        rows: how many the user has.
        metrics: of the prefix's card: `first_epoch_loss`, `train_loss`, and `dev_loss` where there are such rows.
        passes: how many rows were trained on, each as often as it was.
        version: content hash of the prefix in the store.
        error: why there is no prefix.
        skipped: the prefix was there already, from a run with the same rows, settings and base.
    """

    user: str
    rows: int
    passes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: str | None = None
    error: str | None = None
    skipped: bool = False

    def to_json(self) -> str:
        """One line of the report; what there is not is left out."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None}, ensure_ascii=False)


class _Slots(nn.Module):
    """The prefixes that train at present, side by side."""

    def __init__(self, trainables: Iterable[TrainablePrefix]):
        super().__init__()
        self.slots = nn.ModuleList(trainables)

    def forward(self) -> Stack:
        trainables: list[TrainablePrefix] = list(self.slots)  # type: ignore[arg-type]
        matrices = [trainable.matrices() for trainable in trainables]
        return Stack(
            {
                section: layers_of(torch.stack([own[section] for own in matrices]), layers)
                for section, layers in trainables[0].shapes.items()
            }
        )


@dataclass(eq=False)
class _Slot:
    user: str
    learner: Learner
    groups: Iterator[list[list[int]]]
    passes: int = 0

    def next_rows(self) -> list[Row]:
        """The rows of the user's next step."""
        rows = [self.learner.rows[i] for part in next(self.groups) for i in part]
        self.passes += len(rows)
        return rows


def train_many(
    base: Base,
    data: UserFile,
    store: Store,
    *,
    dev: UserFile | None = None,
    settings: TrainSettings | None = None,
    framing: Framing | None = None,
    init_from: Prefix | None = None,
    slots: int = 16,
    rows_at_once: int = 32,
    save_dtype: torch.dtype = torch.bfloat16,
    process: int = 0,
    processes: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[UserReport]:
    """Train one prefix a user, K users at a time, each as if alone, and put each into the store under the user's name.

    A prefix that is in the store already, from the same rows, settings and base, is left as it is; so a run that was killed
    and is started again goes on where it was, and trains nobody twice. What was in a slot starts anew. One that is there
    but damaged is trained again.

    Args:
        base: the frozen base.
        data: the users' rows.
        store: where the prefixes go.
        dev: development rows of the same users; a user's best prefix by them is kept, as in `train`.
        settings: of every user's training; see `TrainSettings`. `batch_size` rows of each user make a step.
        framing: how x is made of a record.
        init_from: a shared prefix that every user starts from. It carries what it was trained on: off by default.
        slots: K, users that train at the same time.
        rows_at_once: rows that go through the base at once; it changes speed and memory, and no result.
        save_dtype: of what the store keeps.
        process, processes: this process's number, and how many share the users.
        on_step: called after each step with the number of rows in it.

    Yields:
        a report a user, when the user is done, has failed, or is skipped.

    Raises:
        SettingsError: settings that exclude each other. Whatever lies in one user's rows is in that user's report.
        WrongBaseError: `init_from` is of another base.
    """
    settings = settings or TrainSettings()
    framing = framing or Framing()
    if min(slots, rows_at_once) < 1:
        raise SettingsError(f"expected at least one slot and one row at once; got {slots} and {rows_at_once}")
    if not 0 <= process < processes:
        raise SettingsError(f"expected a process of {processes}, counted from 0; got {process}")
    if settings.infix:
        raise SettingsError("infix is an ablation for one prefix, and has no file format")
    check_dev(settings, dev)
    # what is wrong for every user is found out here, and not by each
    fields_of(framing.template)
    make_trainable(base, (), settings, init_from)
    waiting = iter(data.users[process::processes])
    active: list[_Slot] = []
    while True:
        # the base runs by itself here, for a user's start: nothing is attached yet
        while len(active) < slots:
            user = next(waiting, None)
            if user is None:
                break
            filled = _fill(base, user, data, dev, store, settings, framing, init_from, save_dtype)
            if isinstance(filled, UserReport):
                yield filled
            else:
                active.append(filled)
        if not active:
            return
        modules = _Slots(slot.learner.trainable for slot in active)
        rows = [slot.next_rows() for slot in active]
        with attach(base.model, modules) as attachment, checkpointing(base, settings.gradient_checkpointing):
            losses = _gradients(base, attachment, rows, rows_at_once)
            reports = [
                _advance(slot, loss, base, attachment, place, store, save_dtype)
                for place, (slot, loss) in enumerate(zip(active, losses, strict=True))
            ]
        active = [slot for slot, report in zip(active, reports, strict=True) if report is None]
        if on_step is not None:
            on_step(sum(map(len, rows)))
        yield from (report for report in reports if report is not None)


def _fill(
    base: Base,
    user: str,
    data: UserFile,
    dev: UserFile | None,
    store: Store,
    settings: TrainSettings,
    framing: Framing,
    init_from: Prefix | None,
    save_dtype: torch.dtype,
) -> _Slot | UserReport:
    """Let a user begin; a report, where that cannot be or need not be."""
    count = data.rows(user)
    try:
        learner = Learner(
            base,
            data.records(user),
            dev=None if dev is None else dev.records(user),
            settings=settings,
            framing=framing,
            init_from=init_from,
        )
        there = _there(store, user)
        if there is not None:
            version, prefix = there
            same = prefix.card.training.get("run") == learner.identity()
            if same and prefix.dtype == str(save_dtype).removeprefix("torch."):
                return UserReport(
                    user=user, rows=count, metrics=prefix.card.metrics, version=version.sha256, skipped=True
                )
    except ForewordError as error:
        return UserReport(user=user, rows=count, error=str(error))
    return _Slot(user, learner, learner.groups())


def _there(store: Store, user: str) -> tuple[Version, Prefix] | None:
    """What the store has of a user and can still give."""
    try:
        version = store.newest(user)
        return version, store.get(user, version)
    except (NoSuchPrefixError, PrefixFileError):
        return None


def _gradients(base: Base, attachment: Attachment, rows: Sequence[Sequence[Row]], rows_at_once: int) -> list[float]:
    """Run every slot's rows forward and backward; returns each slot's mean loss over its y tokens.

    Rows are put together by length, whoever they are of: a row's loss depends on its own prefix alone.
    """
    counts = torch.tensor([sum(len(row.y) for row in own) for own in rows], dtype=torch.float64)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    flat = sorted(((row, slot) for slot, own in enumerate(rows) for row in own), key=lambda pair: len(pair[0]))
    for start in range(0, len(flat), rows_at_once):
        chosen = flat[start : start + rows_at_once]
        attachment.rows = torch.tensor([slot for _, slot in chosen])
        owner = torch.tensor([slot for row, slot in chosen for _ in row.y])
        losses = token_losses(base, attachment, collate(base, [row for row, _ in chosen]))
        # a row that is not a number stays out of the sum, and so out of the others' gradients
        finite = torch.isfinite(losses.detach())
        weights = (1 / counts[owner]).to(losses.device, losses.dtype)
        (torch.where(finite, losses, 0.0) * weights).sum().backward()
        sums.index_add_(0, owner, losses.detach().cpu().double())
    attachment.rows = None
    return (sums / counts).tolist()


def _advance(
    slot: _Slot,
    loss: float,
    base: Base,
    attachment: Attachment,
    place: int,
    store: Store,
    save_dtype: torch.dtype,
) -> UserReport | None:
    """Make a user's step; a report, once that was the last or went wrong."""
    learner = slot.learner
    count = len(learner.rows)
    try:
        learner.update(loss)
        if learner.epoch_ended and learner.dev_rows:
            attachment.rows = torch.tensor([place])
            learner.judge(mean_loss(base, learner.dev_rows, attachment, batch_size=learner.settings.batch_size))
        if not learner.done:
            return None
        prefix = learner.finish()
        version = store.put(slot.user, prefix, dtype=save_dtype)
    except ForewordError as error:
        return UserReport(user=slot.user, rows=count, passes=slot.passes, error=str(error))
    return UserReport(
        user=slot.user, rows=count, passes=slot.passes, metrics=prefix.card.metrics, version=version.sha256
    )
