"""Many users at once: each gets the prefix that training alone would have given.

K slots train together. A step takes, of every slot, the rows of that user's own next step; all of them go through the
base side by side, in batches of about one length, each row with its own user's prefix:

    loss = Σ_u  mean over u's y tokens of -log p(y | x; θ_u)

No term has another user's parameters, so each user's gradient is their own, and so are the optimizer's state, the step
count, the schedule, the clipping, the early stopping and the random stream: they are in one `Learner` a user. When a user
is done, the next takes the slot. A user whose data cannot be used, whose rows memory has no room for, or whose loss is no
longer finite, fails alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers
from torch import nn

from foreword.attach import Attachment, Stack, attach
from foreword.batching import collate, passes
from foreword.data import Record, Row, fields_of
from foreword.errors import (
    DataError,
    ForewordError,
    NoSuchPrefixError,
    PrefixFileError,
    SettingsError,
    out_of_memory,
)
from foreword.learner import Learner, check_dev, checkpointing, framing_for, make_trainable
from foreword.loss import token_losses
from foreword.prefix import Card, Framing, Prefix, check_dtype
from foreword.reparam import TrainablePrefix, layers_of
from foreword.settings import TrainSettings
from foreword.store import Store, Version
from foreword.users import UserFile
from foreword.version import __version__

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["UserFile", "UserReport", "train_many"]


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

    def to_dict(self) -> dict[str, Any]:
        """A row of the report; what there is not is left out."""
        return {k: v for k, v in asdict(self).items() if v is not None}


class _Slots(nn.Module):
    """The prefixes that train at present, side by side.

    P_θ of all of them, [K, P, W] a section, is computed once a step. What the base's passes see is cut off from how it
    was computed: there gradients gather, and `backward` takes them on, so that a step's batches share one pass through
    the MLPs.
    """

    def __init__(self, trainables: Sequence[TrainablePrefix]):
        super().__init__()
        self.slots = nn.ModuleList(trainables)
        self.shapes = trainables[0].shapes

    def compute(self) -> None:
        """Compute P_θ of every slot from its parameters as they are."""
        own = [trainable.matrices() for trainable in self.slots]  # type: ignore[operator]
        self.computed = {section: torch.stack([matrices[section] for matrices in own]) for section in self.shapes}
        self.seen = {section: matrix.detach().requires_grad_() for section, matrix in self.computed.items()}
        self.gathered = [torch.zeros_like(matrix) for matrix in self.seen.values()]

    def forward(self) -> Stack:
        return Stack({section: layers_of(matrix, self.shapes[section]) for section, matrix in self.seen.items()})

    def gather(self, loss: torch.Tensor) -> None:
        """Add a batch's gradients to those of P_θ: all of them or, where memory does not suffice, none."""
        gradients = torch.autograd.grad(loss, list(self.seen.values()))
        for total, gradient in zip(self.gathered, gradients, strict=True):
            total += gradient

    def backward(self) -> None:
        """Give the parameters the gradients that P_θ has gathered since `compute`."""
        torch.autograd.backward(list(self.computed.values()), self.gathered)


@dataclass(eq=False)
class _Slot:
    user: str
    learner: Learner
    groups: Iterator[list[list[int]]]
    source: str | None
    passes: int = 0

    def next_rows(self) -> list[Row]:
        """The rows of the user's next step."""
        rows = [self.learner.rows[i] for part in next(self.groups) for i in part]
        self.passes += len(rows)
        return rows

    def failed(self, error: ForewordError) -> UserReport:
        return UserReport(user=self.user, rows=len(self.learner.rows), passes=self.passes, error=str(error))

    def finish(self, store: Store, save_dtype: torch.dtype) -> UserReport:
        prefix = self.learner.finish()
        card = replace(prefix.card, training={**prefix.card.training, "source": self.source})
        version = store.put(self.user, Prefix(prefix.sections, card), dtype=save_dtype)
        return UserReport(
            user=self.user,
            rows=len(self.learner.rows),
            passes=self.passes,
            metrics=card.metrics,
            version=version.sha256,
        )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is the same for every user. The arguments are those of `train_many`."""

    base: Base
    data: UserFile
    store: Store
    dev: UserFile | None
    settings: TrainSettings
    framing: Framing
    init_from: Prefix | None
    save_dtype: torch.dtype

    def begin(self, user: str) -> _Slot | UserReport:
        """Let a user begin; a report, where that cannot be or need not be."""
        count = self.data.rows(user)
        try:
            records = self.data.records(user)
            dev = None if self.dev is None else self.dev.records(user)
            source = self._source(records, dev)
            there = self._there(user)
            if there is not None and source is not None and there[1].training.get("source") == source:
                return _skipped(user, count, *there)
            learner = Learner(
                self.base, records, dev=dev, settings=self.settings, framing=self.framing, init_from=self.init_from
            )
            # the rows may read otherwise, in a column that is not looked at, and be the same tokens
            if there is not None and there[1].training.get("run") == learner.identity:
                return _skipped(user, count, *there)
        except ForewordError as error:
            return UserReport(user=user, rows=count, error=str(error))
        return _Slot(user, learner, learner.groups(), source)

    def _there(self, user: str) -> tuple[Version, Card] | None:
        """What the store has of a user, can still give, and keeps in the dtype that is asked for."""
        try:
            version = self.store.newest(user)
            prefix = self.store.get(user, version)
        except (NoSuchPrefixError, PrefixFileError):
            return None
        return (version, prefix.card) if prefix.dtype == str(self.save_dtype).removeprefix("torch.") else None

    def _source(self, records: Sequence[Record], dev: Sequence[Record] | None) -> str | None:
        """As `Learner.identity`, but of the records and the tokenizer, so that nothing need be tokenized to know it.

        None where the tokenizer is none of the library `tokenizers`, which alone can be hashed whole, or the records cannot.
        """
        if self._everybodys is None:
            return None
        digest = self._everybodys.copy()
        try:
            digest.update(json.dumps([records, dev], sort_keys=True).encode())
        except RecursionError:
            # what can be read can be nested too deep to be written again
            return None
        return digest.hexdigest()

    @cached_property
    def _everybodys(self) -> Any:
        tokenizer = self.base.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        how: list[Any] = [asdict(self.settings), asdict(self.framing), self.base.fingerprint, str(self.base.dtype)]
        how += [__version__, transformers.__version__, tokenizers.__version__, type(tokenizer).__name__]
        how += [backend.to_str(), tokenizer.chat_template, self.base.end_id]
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
        digest.update(b"" if self.init_from is None else self.init_from.to_bytes(torch.float32))
        return digest


def _skipped(user: str, rows: int, version: Version, card: Card) -> UserReport:
    return UserReport(user=user, rows=rows, metrics=card.metrics, version=version.sha256, skipped=True)


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
        framing: how x is made of a record. Default: as for `init_from`, or `Framing()`.
        init_from: a shared prefix that every user starts from. It carries what it was trained on: off by default.
        slots: K, users that train at the same time. Each takes four times the memory of what learns (itself, its gradient,
            AdamW's two means): of smollm2-135m 100 MB with the MLP, and 2 MB without.
        rows_at_once: rows that go through the base at once, fewer where they are long; it changes speed and memory, and no
            result.
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
    framing = framing_for(base, framing, init_from)
    check_dtype(save_dtype)
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
    plan = _Plan(
        base=base,
        data=data,
        store=store,
        dev=dev,
        settings=settings,
        framing=framing,
        init_from=init_from,
        save_dtype=save_dtype,
    )
    waiting = iter(data.users[process::processes])
    active: list[_Slot] = []
    while True:
        # the base runs by itself here, for a user's start: nothing is attached
        while len(active) < slots and (user := next(waiting, None)) is not None:
            begun = plan.begin(user)
            if isinstance(begun, UserReport):
                yield begun
            else:
                active.append(begun)
        if not active:
            return
        modules = _Slots([slot.learner.trainable for slot in active])
        reports: list[UserReport | None] = []
        with attach(base.model, modules) as attachment, checkpointing(base, settings.gradient_checkpointing):
            while not any(reports):
                rows = [slot.next_rows() for slot in active]
                with torch.enable_grad():
                    reports = _step(plan, attachment, modules, active, rows, rows_at_once)
                if on_step is not None:
                    on_step(sum(map(len, rows)))
        active = [slot for slot, report in zip(active, reports, strict=True) if report is None]
        yield from filter(None, reports)


def _step(
    plan: _Plan,
    attachment: Attachment,
    modules: _Slots,
    active: Sequence[_Slot],
    rows: Sequence[Sequence[Row]],
    rows_at_once: int,
) -> list[UserReport | None]:
    """Make a step of every user; a report for each whose last it was, or for whom it went wrong."""
    reports: list[UserReport | None] = [None] * len(active)
    modules.compute()
    losses, errors = _mean_losses(plan.base, attachment, dict(enumerate(rows)), rows_at_once, modules)
    modules.backward()
    for place, slot in enumerate(active):
        try:
            if place in errors:
                raise errors[place]
            slot.learner.update(losses[place])
        except ForewordError as error:
            reports[place] = slot.failed(error)
    judged = {
        place: slot.learner.dev_rows
        for place, slot in enumerate(active)
        if reports[place] is None and slot.learner.epoch_ended and slot.learner.dev_rows
    }
    if judged:
        with torch.no_grad():
            modules.compute()
            losses, errors = _mean_losses(plan.base, attachment, judged, rows_at_once)
        for place in judged:
            try:
                if place in errors:
                    raise errors[place]
                active[place].learner.judge(losses[place])
            except ForewordError as error:
                reports[place] = active[place].failed(error)
    for place, slot in enumerate(active):
        if reports[place] is None and slot.learner.done:
            try:
                reports[place] = slot.finish(plan.store, plan.save_dtype)
            except ForewordError as error:
                reports[place] = slot.failed(error)
    return reports


def _mean_losses(
    base: Base,
    attachment: Attachment,
    rows: Mapping[int, Sequence[Row]],
    rows_at_once: int,
    learning: _Slots | None = None,
) -> tuple[dict[int, float], dict[int, DataError]]:
    """Each slot's mean loss over its y tokens, by place, and whose rows memory has no room for; `learning` gets gradients.

    Rows are put together by length, whoever they are of: a row's loss depends on its own prefix alone.
    """
    counts = torch.ones(max(rows) + 1, dtype=torch.float64)
    for place, own in rows.items():
        counts[place] = sum(len(row.y) for row in own)
    sums = torch.zeros_like(counts)
    errors: dict[int, DataError] = {}
    flat = [(row, place) for place, own in rows.items() for row in own]
    waiting = [[flat[i] for i in together] for together in passes([row for row, _ in flat], rows_at_once)]
    while waiting:
        chosen = waiting.pop()
        attachment.rows = torch.tensor([place for _, place in chosen])
        owner = torch.tensor([place for row, place in chosen for _ in row.y])
        try:
            losses = token_losses(base, attachment, collate(base, [row for row, _ in chosen]))
            if learning is not None:
                # a row that is not a number stays out of the sum, and so out of the others' gradients
                finite = torch.isfinite(losses.detach())
                weights = (1 / counts[owner]).to(losses.device, losses.dtype)
                learning.gather((torch.where(finite, losses, 0.0) * weights).sum())
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            half = len(chosen) // 2
            if half:
                waiting += [chosen[half:], chosen[:half]]
            else:
                ((row, place),) = chosen
                errors[place] = DataError(
                    f"a row of {len(row)} tokens: the memory does not suffice: drop or shorten it"
                )
            continue
        sums.index_add_(0, owner, losses.detach().cpu().double())
    attachment.rows = None
    means = (sums / counts).tolist()
    return {place: means[place] for place in rows}, errors
