"""One prefix while it learns: its rows, what it is computed from, its optimizer and schedule, the best so far.

A learner runs the base for its start alone, and knows of no other learners. Whoever trains asks it for the rows of its
next step, runs them, by themselves (`foreword.training`) or among those of others (`foreword.many`), and tells it the
loss.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from foreword.batching import batches, likeness
from foreword.data import Record, Row, rows_of, tokenize
from foreword.errors import PrefixFileError, SettingsError, TrainingError
from foreword.prefix import Card, Framing, Prefix, check_prefix
from foreword.reparam import TrainablePrefix, trainable_prefix
from foreword.settings import TrainSettings
from foreword.version import __version__

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = [
    "Learner",
    "check_dev",
    "checkpointing",
    "framing_for",
    "init_name",
    "make_trainable",
    "share_at",
]


def make_trainable(
    base: Base, rows: Sequence[Row], settings: TrainSettings, init_from: Prefix | None
) -> TrainablePrefix:
    """What the settings ask for, on the base's device."""
    if init_from is not None and settings.init_text is not None:
        raise SettingsError("init_text and a prefix to go on from exclude each other: give one of the two")
    trainable = trainable_prefix(
        base,
        length=settings.length,
        reparametrization=settings.reparametrization,
        hidden=settings.hidden,
        start=init_from or _start_tokens(base, rows, settings),
        seed=settings.seed,
    )
    # never in less than float32: small steps would be lost in rounding
    return trainable.to(base.device, torch.promote_types(base.dtype, torch.float32))


def _start_tokens(base: Base, rows: Sequence[Row], settings: TrainSettings) -> tuple[list[int], list[int]] | None:
    """Token ids whose activations start the prefix: the given words, else the first rows, x and y."""
    if settings.init_text is not None:
        words = tokenize(base, settings.init_text, "init_text")
        return words, words
    if settings.init == "random" or not rows:
        return None
    x: list[int] = []
    y: list[int] = []
    for row in rows:
        x += row.x if base.is_encoder_decoder else [*row.x, *row.y]
        y += row.y
        if min(len(x), len(y)) >= settings.length:
            break
    return x, y


def framing_for(base: Base, framing: Framing | None, init_from: Prefix | None) -> Framing:
    """How x is framed: as is said, else as the prefix that is gone on from, which must be the base's, has learnt it."""
    if init_from is None:
        return framing or Framing()
    check_prefix(init_from, base)
    if init_from.infix:
        raise SettingsError("expected a prefix to go on from; got an infix, an ablation that is trained once")
    return framing or init_from.card.framing


def check_dev(settings: TrainSettings, dev: object | None) -> None:
    """Raise `SettingsError` where the settings need development rows and there are none."""
    if settings.patience and dev is None:
        raise SettingsError("patience counts epochs by their development loss: give development rows, or no patience")


def init_name(settings: TrainSettings, init_from: Prefix | None) -> str:
    if init_from is not None:
        return "prefix"
    return "words" if settings.init_text is not None else settings.init


@contextmanager
def checkpointing(base: Base, wanted: bool) -> Iterator[None]:
    """Where wanted, the base's layers are recomputed in the backward pass."""
    if not wanted:
        yield
        return
    model: Any = base.model
    before = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def switch(way: str, *options: Mapping[str, bool]) -> None:
        with warnings.catch_warnings():
            # the newest transformers has another name for it, which the oldest that is supported has not
            warnings.simplefilter("ignore", FutureWarning)
            getattr(model, f"gradient_checkpointing_{way}")(*options)

    try:
        switch("enable", {"use_reentrant": False})
        # it has asked for the gradient of the embeddings, which nobody needs
        model.disable_input_require_grads()
        # transformers checkpoints in training mode alone; the base's dropout is off in it, too
        model.train()
        yield
    finally:
        if not before:
            switch("disable")
        model.eval()


def share_at(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate that a step has: linear warm-up, then linear decay to zero.

    Args:
        step: counted from 0.
        steps: of the run.
        warmup: share of them.
    """
    warm = math.ceil(warmup * steps)
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


class Learner:
    """Everything that changes while one prefix is trained.

    Args:
        base: the frozen base.
        records: mappings with "input" and "output", or "messages".
        dev: as `records`, or None.
        settings: see `TrainSettings`.
        framing: how x is made of a record.
        init_from: a saved prefix to go on from; its length is taken.
        processes: how many share each step's batches.
        precision: of the forward pass, as accelerate names it.

    Raises:
        DataError, SettingsError, WrongBaseError: as `foreword.train`.
    """

    def __init__(
        self,
        base: Base,
        records: Sequence[Record],
        *,
        dev: Sequence[Record] | None,
        settings: TrainSettings,
        framing: Framing,
        init_from: Prefix | None = None,
        processes: int = 1,
        precision: str = "no",
    ):
        check_dev(settings, dev)
        self.base, self.settings, self.framing, self.init_from = base, settings, framing, init_from
        self.group_size, self.precision = settings.accumulation * processes, precision
        length = settings.length if init_from is None else init_from.length
        limit = settings.max_output_tokens
        self.rows = rows_of(base, records, framing, length=length, max_output_tokens=limit)
        self.dev_rows: list[Row] = []
        if dev is not None:
            what = "development record"
            self.dev_rows = rows_of(base, dev, framing, length=length, max_output_tokens=limit, what=what)
        self.trainable = make_trainable(base, self.rows, settings, init_from)
        # fused: an MLP is many times the size of the prefix it makes, and each pass over it shows
        self.optimizer = torch.optim.AdamW(
            self.trainable.parameters(), lr=settings.peak_lr, weight_decay=settings.weight_decay, fused=True
        )
        self.step = 0
        self.best: dict[str, torch.Tensor] | None = None
        self.loss = math.nan
        self.epoch_losses: list[float] = []
        self.metrics: dict[str, float] = {}
        self.bad_epochs = 0
        self.steps_per_epoch = math.ceil(math.ceil(len(self.rows) / settings.batch_size) / self.group_size)
        self.total_steps = self.steps_per_epoch * settings.epochs

    @property
    def epoch_ended(self) -> bool:
        """Whether the last step was an epoch's last."""
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    @property
    def done(self) -> bool:
        """All steps are made, or the development loss has not fallen for as many epochs as `patience`."""
        return self.step >= self.total_steps or (self.epoch_ended and 0 < self.settings.patience <= self.bad_epochs)

    def groups(self) -> Iterator[list[list[int]]]:
        """For each step from here on, the batches that make it, of indices of rows."""
        size = self.settings.batch_size
        while not self.done:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            plan = batches(self.rows, size, seed=self.settings.seed, epoch=epoch, key=likeness(self.base))
            for start in range(first * self.group_size, len(plan), self.group_size):
                yield plan[start : start + self.group_size]

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, see `share_at`."""
        return self.settings.peak_lr * share_at(step, self.total_steps, self.settings.warmup)

    def update(self, loss: float) -> None:
        """Make a step with the gradients that are there.

        Args:
            loss: mean over the y tokens of the step's rows, in nats.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.parameters(), self.settings.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {loss:g} and the norm of its gradient {norm:g} at step {self.step + 1}: lower the learning "
                f"rate (now {self.settings.peak_lr:g}), or look for odd rows"
            )
        for options in self.optimizer.param_groups:
            options["lr"] = self.lr_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.loss = loss
        self.epoch_losses.append(loss)
        if self.epoch_ended:
            mean = sum(self.epoch_losses) / len(self.epoch_losses)
            self.metrics.setdefault("first_epoch_loss", mean)
            self.metrics["train_loss"] = mean
            self.epoch_losses = []

    def judge(self, dev_loss: float) -> None:
        """Take note of an epoch's development loss, and keep the prefix if none was better.

        Raises:
            TrainingError: the loss is not finite.
        """
        if not math.isfinite(dev_loss):
            raise TrainingError(
                f"the development loss is {dev_loss:g} after step {self.step}: lower the learning rate (now "
                f"{self.settings.peak_lr:g}), or look for odd development rows"
            )
        if dev_loss < self.metrics.get("dev_loss", math.inf):
            self.metrics["dev_loss"] = dev_loss
            self.best = {name: tensor.clone() for name, tensor in self.trainable.state_dict().items()}
            self.bad_epochs = 0
        else:
            self.bad_epochs += 1

    def finish(self) -> Prefix:
        """The trained prefix: the best by development loss where there was one, else the last.

        The card's metrics: `first_epoch_loss` and `train_loss`, means over the steps of the first and of the last epoch;
        `dev_loss`, the lowest.

        Raises:
            TrainingError: its numbers would overflow in the base.
        """
        if self.best is not None:
            self.trainable.load_state_dict(self.best)
        prefix = self.trainable.fold(self._card())
        try:
            return prefix.check(self.base)
        except PrefixFileError as error:
            raise TrainingError(f"{error}, with a lower learning rate (now {self.settings.peak_lr:g})") from None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that a run needs to go on: tensors, and a few numbers."""
        tensors = {f"prefix.{name}": tensor for name, tensor in self.trainable.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
        names = ("step", "loss", "epoch_losses", "metrics", "bad_epochs")
        return tensors, {name: getattr(self, name) for name in names}

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        self.trainable.load_state_dict(part("prefix."))
        self.best = {name: tensor.to(self.base.device) for name, tensor in part("best.").items()} or None
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in part("optimizer.").items():
            i, _, key = name.partition(".")
            state.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for name, value in numbers.items():
            setattr(self, name, value)

    @functools.cached_property
    def identity(self) -> str:
        """Hash of all that decides the outcome: a checkpoint of another run is never gone on from."""
        base = self.base
        how = [base.fingerprint, str(base.dtype), self.precision, self.group_size, __version__]
        digest = hashlib.sha256()
        for part in (dataclasses.asdict(self.settings), dataclasses.asdict(self.framing), how):
            digest.update(json.dumps(part, sort_keys=True).encode())
        for rows in (self.rows, self.dev_rows):
            digest.update(json.dumps([(row.x, row.y) for row in rows]).encode())
        if self.init_from is not None:
            digest.update(self.init_from.to_bytes(torch.float32))
        return digest.hexdigest()

    def _card(self) -> Card:
        settings = self.settings
        # words given for the start are the user's text, and the card holds none
        training = {k: v for k, v in dataclasses.asdict(settings).items() if k != "init_text"}
        return Card(
            base=self.base.name,
            fingerprint=self.base.fingerprint,
            framing=self.framing,
            init=init_name(settings, self.init_from),
            training={
                **training,
                "length": self.trainable.length,
                "lr": settings.peak_lr,
                "rows": len(self.rows),
                "steps": self.step,
                "run": self.identity,
                "foreword": __version__,
            },
            metrics=dict(self.metrics),
        )
