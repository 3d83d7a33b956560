"""The commands for many users: train them, and look after their store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TextColumn

from foreword import terminal as t
from foreword.errors import NoSuchPrefixError, SettingsError
from foreword.settings import TrainSettings
from foreword.terminal import err, out, shown
from foreword.writing import check_apart, check_new, write_atomically, write_jsonl

if TYPE_CHECKING:
    from foreword.many import UserFile, UserReport
    from foreword.store import Store, Version

__all__ = ["store_app", "train_many"]

LINE_SECONDS = 60
"""Between two lines that say how far it is, where there is no bar."""

SHOWN_FAILURES = 5
"""Failures that are printed as they come; the report has them all."""

StoreName = Annotated[str, typer.Argument(metavar="DIR", help="The store: a folder, or a URL that fsspec knows.")]
PrefixName = Annotated[str, typer.Argument(metavar="NAME", help="The prefix's name, such as a user's.")]


def train_many(
    base: t.BaseName,
    data: Annotated[Path, typer.Option(help="JSONL of all users' rows.")],
    out_store: Annotated[
        str, typer.Option("--out", metavar="DIR", help="The store: a folder, or a URL that fsspec knows.")
    ],
    by: Annotated[str, typer.Option(help="Column of the user's name.")] = "user",
    dev: Annotated[
        Path | None, typer.Option(help="The users' development rows: of each, the prefix with the lowest loss is kept.")
    ] = None,
    input: t.Input = "input",
    output: t.Output = "output",
    template: t.Template = None,
    chat: t.Chat = False,
    max_input_tokens: t.MaxInputTokens = None,
    max_output_tokens: t.MaxOutputTokens = TrainSettings.max_output_tokens,
    length: t.Length = TrainSettings.length,
    reparametrization: t.Reparametrization = TrainSettings.reparametrization,
    hidden: t.Hidden = TrainSettings.hidden,
    init: t.Init = TrainSettings.init,
    init_text: t.InitText = TrainSettings.init_text,
    init_from: Annotated[
        Path | None, typer.Option(help="A shared prefix that everybody starts from; it carries what it was trained on.")
    ] = None,
    lr: t.LearningRate = TrainSettings.lr,
    epochs: t.Epochs = TrainSettings.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows of each user that make a batch.")] = TrainSettings.batch_size,
    accumulation: Annotated[int, typer.Option(help="Such batches to one step of a user.")] = TrainSettings.accumulation,
    warmup: t.Warmup = TrainSettings.warmup,
    clip: t.Clip = TrainSettings.clip,
    weight_decay: t.WeightDecay = TrainSettings.weight_decay,
    patience: t.Patience = TrainSettings.patience,
    gradient_checkpointing: t.Checkpointing = TrainSettings.gradient_checkpointing,
    seed: t.Seed = TrainSettings.seed,
    slots: Annotated[int, typer.Option(min=1, help="Users that train at the same time, on each process.")] = 16,
    rows_at_once: Annotated[
        int, typer.Option(min=1, help="Rows through the base at once, whoever they are of; changes no result.")
    ] = 32,
    save_dtype: t.SaveDtype = "bfloat16",
    report: Annotated[
        Path | None, t.to_write(help="JSONL, a line a user; by default DIR.report.jsonl, beside the store.")
    ] = None,
    dtype: t.Dtype = "auto",
    device: t.Device = None,
) -> None:
    """Train a prefix for each of many users, on that user's rows alone, into a store.

    Started again, it goes on: who is in the store from the same rows and settings is skipped. Processes share the users:
    `torchrun --nproc_per_node 2 -m foreword train-many ...`, on GPUs `accelerate launch` too.

    Exits with 0 if everybody has a prefix, 1 if some users failed (the report says why), 2 if nothing could be done.
    """
    settings = t.settings_of(locals())
    file_dtype = t.file_dtype(save_dtype)
    report = report or _beside(out_store)
    if (folder := _local(out_store)) is not None and report.resolve().is_relative_to(folder.resolve()):
        raise SettingsError(f"expected a report outside the store; {report} is in it")
    check_apart(report, data, dev, init_from)
    # now, and not when all the work is done
    check_new(report, overwrite=True)

    from accelerate import PartialState
    from accelerate.utils import gather_object

    from foreword import many
    from foreword.bases import load_base
    from foreword.prefix import Prefix
    from foreword.store import Store

    # whatever can be wrong is looked at before the base, which may be large, is loaded
    users = many.UserFile(data, by, input=input, output=output)
    dev_users = None if dev is None else many.UserFile(dev, by, input=input, output=output)
    start = None if init_from is None else Prefix.load(init_from)
    framing = t.framing_of(template, chat, max_input_tokens, start)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise SettingsError(f"expected no mixed precision with train-many; got {precision!r}: give --dtype instead")
    store = Store(out_store, create=True)
    # processes end at different times, and wait for each other
    state = PartialState(cpu=t.on_cpu(device), timeout=timedelta(days=30))
    device = t.device_of(device, state)
    began = time.perf_counter()
    frozen = load_base(base, dtype=dtype, device=device)
    progress = _Progress(users, settings.epochs, state.process_index, state.num_processes)
    reports = []
    with t.told_if_interrupted("the same command again goes on, and trains nobody twice"), progress.bar:
        for one in many.train_many(
            frozen,
            users,
            store,
            dev=dev_users,
            settings=settings,
            framing=framing,
            init_from=start,
            slots=slots,
            rows_at_once=rows_at_once,
            save_dtype=file_dtype,
            process=state.process_index,
            processes=state.num_processes,
            on_step=progress.step,
        ):
            reports.append(one)
            progress.tell(one)
    speed = progress.passes / (time.perf_counter() - progress.began)
    everybody: list[UserReport] = gather_object(reports)
    speeds: list[float] = gather_object([speed])
    if state.is_main_process:
        places = {user: place for place, user in enumerate(users.users)}
        everybody.sort(key=lambda one: places[one.user])
        write_jsonl(report, (one.to_dict() for one in everybody))
        summary = _summary(everybody)
        out.print(
            f"{shown(out_store)}: {summary}; {time.perf_counter() - began:.0f} s, {sum(speeds):,.0f} rows/s; "
            f"report in {shown(str(report))}"
        )
        failed = [one.error is not None for one in everybody]
        if any(failed):
            raise typer.Exit(2 if all(failed) else 1)


def _local(store: str) -> Path | None:
    """The store's folder, where it is one of this machine."""
    store = store.removeprefix("file://")
    return None if "://" in store else Path(os.path.expanduser(store))


def _beside(store: str) -> Path:
    folder = _local(store)
    if folder is None:
        raise SettingsError(f"expected --report FILE, since the store {store} is no local folder")
    return Path(f"{folder if folder.name not in ('', '..') else folder.resolve()}.report.jsonl")


def _summary(reports: Sequence[UserReport]) -> str:
    failed = sum(one.error is not None for one in reports)
    skipped = sum(one.skipped for one in reports)
    text = f"{len(reports) - failed - skipped:,} users trained, {skipped:,} skipped, {failed:,} failed"
    metrics = [one.metrics for one in reports if one.error is None]
    if metrics:
        before, after = (sum(m[name] for m in metrics) / len(metrics) for name in ("first_epoch_loss", "train_loss"))
        text += f"; mean loss {before:.3f} in the first epoch, {after:.3f} in the last"
    return text


class _Progress:
    """What the bar shows, or, where there is no terminal, a line a minute. It measures rows trained on; a user who needs
    fewer makes it shorter.
    """

    def __init__(self, users: UserFile, epochs: int, process: int, processes: int):
        self.epochs = epochs
        own = users.users[process::processes]
        self.bar = t.bar(
            TextColumn("{task.fields[speed]} rows/s"),
            TextColumn("{task.fields[failed]} failed"),
            count=TextColumn(f"{{task.fields[users]}}/{len(own)} users"),
        )
        # of several processes one has the terminal, and shows its own share
        self.lines = self.bar.disable and process == 0
        self.bar.disable |= process > 0
        self.of = len(own)
        self.left = sum(map(users.rows, own)) * epochs
        self.passes, self.users, self.failed = 0, 0, 0
        self.task = self.bar.add_task("training", total=self.left, speed="–", failed=0, users=0)
        self.began = self.told = time.perf_counter()

    def step(self, rows: int) -> None:
        self.passes += rows
        self.left -= rows
        self._show()

    def tell(self, report: UserReport) -> None:
        self.users += 1
        self.left -= report.rows * self.epochs - report.passes
        if report.error is not None:
            self.failed += 1
            if self.failed <= SHOWN_FAILURES:
                more = "; more such are in the report alone" if self.failed == SHOWN_FAILURES else ""
                err.print(f"{shown(report.user)}: {shown(report.error)}{more}")
        self._show()

    def _show(self) -> None:
        now = time.perf_counter()
        speed = self.passes / (now - self.began)
        if self.lines and now - self.told >= LINE_SECONDS:
            self.told = now
            left = timedelta(seconds=round(self.left / speed)) if speed else "–"
            err.print(f"{self.users:,} of {self.of:,} users, {self.failed:,} failed, {speed:,.0f} rows/s, {left} left")
        self.bar.update(
            self.task,
            completed=self.passes,
            total=self.passes + self.left,
            speed=f"{speed:,.0f}",
            failed=self.failed,
            users=self.users,
        )


store_app = typer.Typer(help="Look after a store of prefixes.", no_args_is_help=True, rich_markup_mode=None)


def _open(url: str, *, create: bool = False) -> Store:
    from foreword.store import Store

    return Store(url, create=create)


def _line(version: Version) -> str:
    return f"{version.sha256[:12]}  {version.time.isoformat(timespec='seconds')}"


@store_app.command(name="ls")
def list_names(
    store: StoreName,
    begins: Annotated[str, typer.Option(help="Only names that begin so.")] = "",
    after: Annotated[str, typer.Option(help="Only names that sort after this one.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="No more than so many; by default all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line a name.")] = False,
) -> None:
    """List names, sorted, with the newest version of each."""
    opened = _open(store)
    cursor: str | None = after
    while cursor is not None:
        page = opened.page(cursor, min(limit or 1000, 1000), begins=begins)
        for version in page.versions:
            if as_json:
                facts = {"name": version.name, "sha256": version.sha256, "time": version.time.isoformat()}
                typer.echo(json.dumps(facts, ensure_ascii=False))
            else:
                out.print(f"{_line(version)}  {shown(version.name)}")
        if limit is not None:
            limit -= len(page.versions)
        cursor = None if limit == 0 else page.cursor


@store_app.command()
def show(
    store: StoreName,
    name: PrefixName,
    version: Annotated[str | None, typer.Option(help="First digits of its hash; by default the newest.")] = None,
    as_json: t.AsJson = False,
) -> None:
    """Print the card of a prefix, and what versions of it there are."""
    opened = _open(store)
    prefix = opened.get(name, version)
    versions = [{"sha256": one.sha256, "time": one.time.isoformat(timespec="seconds")} for one in opened.versions(name)]
    t.show_prefix(prefix, name, {"versions": versions}, as_json=as_json)


@store_app.command()
def rm(
    store: StoreName,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The prefixes' names.")],
) -> None:
    """Delete prefixes, all versions of each."""
    opened, missing = _open(store), []
    for name in names:
        try:
            count = opened.delete(name)
        except NoSuchPrefixError as error:
            missing.append(str(error))
        else:
            out.print(f"{shown(name)}: {count} version{'' if count == 1 else 's'} deleted")
    if missing:
        raise NoSuchPrefixError("; ".join(missing))


@store_app.command()
def verify(store: StoreName) -> None:
    """Read everything, and say what is wrong; exits with 1 if anything is."""
    wrong = False
    for problem in _open(store).verify():
        wrong = True
        whose = "" if problem.name is None else f" ({shown(problem.name)})"
        out.print(f"{shown(problem.path)}{whose}: {shown(problem.what)}")
    if wrong:
        raise typer.Exit(1)
    out.print(f"{shown(store)}: nothing wrong")


@store_app.command()
def rebuild(store: StoreName) -> None:
    """Make the index anew from the files, and clear away what is no longer needed."""
    out.print(f"{shown(store)}: {_open(store).rebuild():,} names")


@store_app.command()
def get(
    store: StoreName,
    name: PrefixName,
    out_file: t.OutFile,
    version: Annotated[str | None, typer.Option(help="First digits of its hash; by default the newest.")] = None,
    overwrite: t.Overwrite = False,
) -> None:
    """Write a prefix of the store to a file."""
    from foreword.checkpoint import check_out
    from foreword.prefix import Prefix

    check_out(out_file, resume=None, overwrite=overwrite)
    opened = _open(store)
    found = opened.find(name, version)
    data = opened.read(found)
    Prefix.from_bytes(data)
    with write_atomically(out_file) as aside:
        aside.write_bytes(data)
    out.print(f"{shown(str(out_file))}: {shown(str(found))}")


@store_app.command()
def put(store: StoreName, name: PrefixName, file: Annotated[Path, typer.Argument(help="A prefix file.")]) -> None:
    """Put a prefix file into the store, as the newest version of a name. Where there is no store, one is made."""
    from foreword.prefix import Prefix
    from foreword.store import check_name

    check_name(name)
    Prefix.load(file)
    out.print(shown(str(_open(store, create=True).put(name, file.read_bytes()))))


@store_app.command(name="roll-back")
def roll_back(
    store: StoreName,
    name: PrefixName,
    version: Annotated[str, typer.Argument(help="First digits of its hash; see store show.")],
) -> None:
    """Make an older version of a prefix the newest again."""
    out.print(shown(str(_open(store).roll_back(name, version))))
