"""The main job, on real input: one prefix a voice on one frozen base, then all of them in one batch.

python demo/run.py            # what `make demo` runs
python demo/run.py --help
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from voices import VOICES, NaiveBayes, coverage, linearize, load, rows

import foreword
from foreword import Base, GenerateSettings, Prefix, TrainSettings


def weights_hash(base: Base) -> str:
    """SHA-256 over every byte of the base's parameters."""
    digest = hashlib.sha256()
    for _, parameter in sorted(base.model.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"), help="folder for the prefix files")
    parser.add_argument("--show", type=int, default=2, help="held-out records to print")
    options = parser.parse_args()

    console = Console(soft_wrap=True)
    train_records, held_out = load()
    base = foreword.load_base(options.base)
    base_bytes = sum(p.numel() * p.element_size() for p in base.model.parameters())
    console.print(
        f"base {base.name}: {sum(p.numel() for p in base.model.parameters()):,} parameters, {base.dtype} on {base.device}, "
        f"frozen. {len(train_records)} records to train on, {len(held_out)} held out, {len(VOICES)} voices.",
        highlight=False,
    )
    before = weights_hash(base)
    settings = TrainSettings(epochs=options.epochs, batch_size=8)
    began = time.perf_counter()
    prefixes: dict[str, Prefix] = {}
    speeds = []
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        for voice in VOICES:
            task = bar.add_task(voice, total=None, state="")

            def show(progress: foreword.TrainingProgress, task: TaskID = task) -> None:
                speed = progress.tokens_per_second
                bar.update(
                    task,
                    completed=progress.step,
                    total=progress.steps,
                    state=f"loss {progress.loss:.2f}, {speed:,.0f} tokens/s",
                )
                if progress.step == progress.steps:
                    speeds.append(speed)

            prefixes[voice] = foreword.train(
                base,
                rows(train_records, voice),
                settings=settings,
                out=options.out / f"{voice}.safetensors",
                overwrite=True,
                on_step=show,
            )
    trained = time.perf_counter() - began
    after = weights_hash(base)

    # the files, not what is still in memory: that is what a user would have tomorrow
    loaded = {voice: Prefix.load(options.out / f"{voice}.safetensors", base) for voice in VOICES}
    names: list[str | None] = [None, *VOICES]
    inputs = [linearize(record.fields) for record in held_out for _ in names]
    owners = [None if name is None else loaded[name] for _ in held_out for name in names]
    began = time.perf_counter()
    texts = foreword.generate(base, inputs, owners, settings=GenerateSettings(max_new_tokens=80, batch_size=20))
    generated = time.perf_counter() - began

    for r in range(min(options.show, len(held_out))):
        table = Table(
            title=escape(inputs[r * len(names)]),
            box=box.SIMPLE,
            show_header=False,
            title_justify="left",
            padding=(0, 1, 1, 1),
        )
        for name, text in zip(names, texts[r * len(names) :], strict=False):
            table.add_row("bare base" if name is None else name, escape(" ".join(text.split())))
        console.print(table)

    judge = NaiveBayes()
    judge.fit(
        [record.voices[voice] for record in train_records for voice in VOICES],
        [voice for _ in train_records for voice in VOICES],
    )
    told = [
        (record, name, text)
        for (record, name), text in zip(((r, n) for r in held_out for n in names), texts, strict=True)
        if name
    ]
    right = sum(judge.predict(text) == name for _, name, text in told) / len(told)
    covered = sum(coverage(record.fields, text) for record, _, text in told) / len(told)

    sizes = Table(box=box.SIMPLE, title="on disk", title_justify="left")
    sizes.add_column("file")
    sizes.add_column("bytes", justify="right")
    sizes.add_column("of the base's", justify="right")
    sizes.add_row(f"{base.name} ({base.dtype})", f"{base_bytes:,}", "")
    for voice in VOICES:
        size = (options.out / f"{voice}.safetensors").stat().st_size
        sizes.add_row(f"{voice}.safetensors", f"{size:,}", f"{size / base_bytes:.3%}")
    console.print(sizes)
    console.print(
        f"the base's weights before  {before[:32]}…\n                   after   {after[:32]}…  {'the same' if before == after else 'CHANGED'}",
        highlight=False,
    )
    console.print(
        f"trained {len(VOICES)} prefixes in {trained:.0f} s, {sum(speeds) / len(speeds):,.0f} tokens/s; "
        f"{len(texts)} texts, four voices and the bare base mixed in each batch, in {generated:.0f} s",
        highlight=False,
    )
    console.print(
        f"a bag-of-words classifier tells the voices apart in {right:.0%} of {len(told)} texts (aim: 90%); "
        f"{covered:.0%} of the records' field values are in them (aim: 80%)",
        highlight=False,
    )


if __name__ == "__main__":
    main()
