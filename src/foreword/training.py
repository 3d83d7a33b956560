"""One visible training loop.

It minimizes the mean over the y tokens of the effective batch of -log p(y | x), where only the prefix learns:

    max_θ  Σ log p(y_i | h_<i),  i in Y        (Li & Liang 2021, section 4.2)

The base stays in evaluation mode and its logits are computed at the positions of y alone. Every random choice is a
function of the seed and the step, and the checkpoint holds all the rest, so a run that is killed and resumed is, bit for
bit on a CPU, the run that was not killed.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as safetensors_bytes
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from foreword.attach import Attachment, attach
from foreword.attention import NAME
from foreword.batching import collate, passes_of
from foreword.checkpoint import check_out, checkpoint_of, read_checkpoint, write_checkpoint
from foreword.data import Record
from foreword.errors import SettingsError, TrainingError
from foreword.learner import Learner, checkpointing, framing_for, init_name, make_trainable
from foreword.limit import Work
from foreword.loss import forward_loss, mean_loss
from foreword.prefix import Card, Framing, Prefix, check_dtype
from foreword.settings import TrainSettings
from foreword.version import __version__
from foreword.writing import remove_asides, write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foreword.bases import Base

__all__ = ["FILE_NAME", "TrainSettings", "TrainingProgress", "attach_trainable", "train"]

FILE_NAME = "prefix.safetensors"
"""What `save_pretrained` and transformers' `Trainer.save_model` call the file in their folder."""


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """What a caller is told after every step.

    Args:
        step, steps: done, and in all.
        epoch: of `steps`, counted from 1.
        loss: mean over the y tokens of this step's batch, in nats.
        dev_loss: on the development rows, after an epoch.
        rows: so far in this run, of all processes.
        tokens: real tokens in them, x and y; padding and virtual tokens are not counted.
        operations: floating-point operations that these tokens need at the least; see `foreword.limit`.
        seconds: spent on them, evaluation not counted.
        lr: learning rate of this step.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    dev_loss: float | None
    rows: int
    tokens: int
    operations: float
    seconds: float
    lr: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def train(
    base: Base,
    records: Sequence[Record],
    *,
    dev: Sequence[Record] | None = None,
    settings: TrainSettings | None = None,
    framing: Framing | None = None,
    init_from: Prefix | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int = 50,
    save_dtype: torch.dtype = torch.bfloat16,
    accelerator: Accelerator | None = None,
    on_step: Callable[[TrainingProgress], None] | None = None,
) -> Prefix:
    """Train one prefix.

    Args:
        base: the frozen base.
        records: mappings with "input" and "output", or "messages"; see `foreword.data`.
        dev: as `records`; after every epoch their loss is taken, and the prefix with the lowest is kept.
        settings: see `TrainSettings`.
        framing: how x is made of a record; the card keeps it. Default: as for `init_from`, or `Framing()`.
        init_from: a saved prefix to go on from; its length is taken.
        out: where the `.safetensors` file goes; a checkpoint lies beside it, under the name `OUT.checkpoint`, until
            the run is done. Default: nothing is written.
        resume: go on from that checkpoint, if there is one.
        overwrite: replace a file that is already there; a checkpoint too, but with `resume`.
        checkpoint_every: steps between checkpoints; there is one after every epoch too.
        save_dtype: of the file.
        accelerator: for several processes, mixed precision in bfloat16, or trackers, which get loss, dev_loss, lr and
            tokens_per_second. The device is the base's, and accumulation is in `settings`. Default: none of these, whatever
            others in this process have set up.
        on_step: called after every step.

    Returns:
        the trained prefix, in float32; of a base in float64, in that.

    Raises:
        DataError: records that cannot be used. TooLongError: one does not fit the base's context.
        SettingsError: settings that exclude each other; `out` cannot be written, or is there already; or no accelerator in
            one of a launcher's processes.
        TrainingError: the loss is not finite, or the checkpoint beside `out` belongs to another run.
    """
    settings = settings or TrainSettings()
    framing = framing_for(base, framing, init_from)
    if accelerator is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingsError(
            "expected an accelerator in one of several processes: give accelerator=accelerate.Accelerator()"
        )
    accelerator = accelerator or _Alone()
    if settings.infix and (out is not None or base.is_encoder_decoder):
        raise SettingsError("infix is an ablation for decoder-only bases, and has no file format: leave `out` away")
    if checkpoint_every < 1:
        raise SettingsError(f"expected checkpoint_every of at least 1 step; got {checkpoint_every}")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise SettingsError(
            f"expected mixed precision 'no' or 'bf16'; got {accelerator.mixed_precision!r}, whose losses need scaling: load "
            "the base in another dtype instead"
        )
    check_dtype(save_dtype)
    if out is not None:
        check_out(out, resume=resume, overwrite=overwrite)
    elif resume or overwrite:
        raise SettingsError(
            "resume and overwrite are about the file `out` and its checkpoint: name it, or leave them away"
        )
    learner = Learner(
        base,
        records,
        dev=dev,
        settings=settings,
        framing=framing,
        init_from=init_from,
        processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
    )
    checkpoint = None if out is None else checkpoint_of(out)
    if checkpoint is not None and resume and checkpoint.exists():
        learner.load_state(*read_checkpoint(checkpoint, learner.identity))
    # the first to be done removes the checkpoint, which all have seen by now
    accelerator.wait_for_everyone()
    step = torch.tensor(float(learner.step), device=base.device)
    if accelerator.reduce(step, "mean").item() != learner.step:
        raise TrainingError(
            f"expected every process to see the checkpoint {checkpoint}: put it on a disk that all share"
        )

    work = Work(base, learner.trainable.length)
    count, tokens, operations, seconds = 0, 0, 0.0, 0.0
    with (
        torch.enable_grad(),
        attach(base.model, learner.trainable) as attachment,
        checkpointing(base, settings.gradient_checkpointing),
    ):
        for group in learner.groups():
            began = time.perf_counter()
            lr = learner.lr_at(learner.step)
            learner.update(_gradients(base, attachment, learner, group, accelerator))
            seconds += time.perf_counter() - began
            chosen = [learner.rows[i] for indices in group for i in indices]
            count += len(chosen)
            tokens += sum(map(len, chosen))
            batched = ([learner.rows[i] for i in indices] for indices in group)
            operations += sum(work.of(rows, infix=settings.infix) for rows in batched)
            dev_loss = None
            if learner.dev_rows and learner.epoch_ended:
                dev_loss = _dev_loss(base, attachment, learner, accelerator)
                learner.judge(dev_loss)
            progress = TrainingProgress(
                step=learner.step,
                steps=learner.total_steps,
                epoch=math.ceil(learner.step / learner.steps_per_epoch),
                loss=learner.loss,
                dev_loss=dev_loss,
                rows=count,
                tokens=tokens,
                operations=operations,
                seconds=seconds,
                lr=lr,
            )
            _log(accelerator, progress)
            if on_step is not None:
                on_step(progress)
            due = learner.step % checkpoint_every == 0 or learner.epoch_ended
            if checkpoint is not None and due and accelerator.is_main_process:
                write_checkpoint(checkpoint, learner.identity, *learner.state())
        prefix = learner.finish()
    if out is not None and checkpoint is not None and accelerator.is_main_process:
        prefix.save(out, save_dtype)
        checkpoint.unlink(missing_ok=True)
        for written in (out, checkpoint):
            remove_asides(written)
    return prefix


class _Alone:
    """What `train` asks of an accelerator, where none is given: one process, the base's own precision, no trackers.

    accelerate has one state for the whole process: ours would bind others to it, and theirs ours.
    """

    mixed_precision = "no"
    num_processes = 1
    process_index = 0
    is_main_process = True

    def autocast(self) -> nullcontext[None]:
        return nullcontext()

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor

    def log(self, values: dict[str, float], step: int) -> None:
        """There are no trackers."""

    def wait_for_everyone(self) -> None:
        """There is nobody else."""


def _gradients(
    base: Base,
    attachment: Attachment,
    learner: Learner,
    group: Sequence[Sequence[int]],
    accelerator: Accelerator | _Alone,
) -> float:
    """Run one step's batches forward and backward; returns the mean loss over their y tokens."""
    rows = learner.rows
    # every process knows the whole step, so the count of y tokens needs no communication
    count = sum(len(rows[i].y) for indices in group for i in indices)
    total = torch.zeros((), device=base.device, dtype=torch.promote_types(base.dtype, torch.float32))
    for indices in group[accelerator.process_index :: accelerator.num_processes]:
        for together in passes_of(base, [rows[i] for i in indices]):
            batch = collate(base, together)
            with accelerator.autocast():
                loss = forward_loss(base, attachment, batch, infix=learner.settings.infix) / count
            loss.backward()
            total = total + loss.detach()
    if accelerator.num_processes > 1:
        for parameter in learner.trainable.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, "sum")
        total = accelerator.reduce(total, "sum")
    return total.item()


def _dev_loss(base: Base, attachment: Attachment, learner: Learner, accelerator: Accelerator | _Alone) -> float:
    """Mean over the y tokens of the development rows, of which each process takes its share; the same in all of them."""
    settings = learner.settings
    own = learner.dev_rows[accelerator.process_index :: accelerator.num_processes]
    share = sum(len(row.y) for row in own) / sum(len(row.y) for row in learner.dev_rows)
    loss = 0.0
    if own:
        with accelerator.autocast():
            loss = share * mean_loss(base, own, attachment, batch_size=settings.batch_size, infix=settings.infix)
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(torch.tensor(loss, device=base.device), "sum").item()
    return loss


def _log(accelerator: Accelerator | _Alone, progress: TrainingProgress) -> None:
    values = {
        "loss": progress.loss,
        "lr": progress.lr,
        "tokens_per_second": progress.tokens_per_second,
    }
    if progress.dev_loss is not None:
        values["dev_loss"] = progress.dev_loss
    accelerator.log(values, step=progress.step)


def attach_trainable(
    base: Base,
    *,
    settings: TrainSettings | None = None,
    framing: Framing | None = None,
    init_from: Prefix | None = None,
) -> Attachment:
    """Attach a trainable prefix for another trainer's loop: transformers' `Trainer`, TRL's `SFTTrainer`, your own.

        with foreword.attach_trainable(base) as attachment:
            trainer = Trainer(model=attachment.model, ...)
            trainer.train()
            trainer.save_model("out")       # writes out/prefix.safetensors, and nothing of the base

    A trainer's checkpoints hold what is trained too, so that it can go on from them, or take the best; transformers then
    says that the base's weights are missing there, as they are meant to be.

    Args:
        base: its model is frozen; only the parameters below its new submodule `foreword` require gradients.
        settings: of them length, reparametrization, hidden, init_text and seed count; without `init_text` or
            `init_from` the prefix starts as small noise, since there are no rows here.
        framing: what the card will say of how x is made. Default: as for `init_from`, or `Framing()`.
        init_from: a saved prefix to go on from.

    Returns:
        the attachment; `detach()` it, or leave the `with` block, when done.
    """
    settings = settings or TrainSettings()
    framing = framing_for(base, framing, init_from)
    trainable = make_trainable(base, (), settings, init_from)

    def save(folder: str | os.PathLike[str]) -> None:
        card = Card(
            base=base.name,
            fingerprint=base.fingerprint,
            framing=framing,
            init=init_name(settings, init_from) if init_from or settings.init_text else "random",
            training={"reparametrization": settings.reparametrization, "foreword": __version__},
        )
        trainable.fold(card).save(Path(folder) / FILE_NAME)
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name):
            # by the names that they have in the model, which the trainer loads them into
            state = {f"{NAME}.{name}": tensor.contiguous() for name, tensor in trainable.state_dict().items()}
            with write_atomically(Path(folder) / SAFE_WEIGHTS_NAME) as aside:
                aside.write_bytes(safetensors_bytes(state, {"format": "pt"}))

    return attach(base.model, trainable, save=save)
