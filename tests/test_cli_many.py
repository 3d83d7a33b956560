"""The commands for many users and their store."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from test_cli import Run, base, folders, jsonl, prefix, run, written  # noqa: F401
from test_many import DEV, SIZES, USERS, rows_of_user
from test_training import content
from tiny import CONTEXT

import foreword
import foreword.bases
import foreword.many
from foreword import cli, cli_many, terminal
from foreword.many import UserReport
from foreword.prefix import Prefix
from foreword.reparam import matrices_of
from foreword.store import Store

# rows of two lengths of names: a user's lines stand apart
LINES = [{"user": user, **USERS[user][i]} for i in range(max(SIZES.values())) for user in USERS if i < SIZES[user]]
QUICK = ("--epochs", 1, "--batch-size", 4, "--length", 3, "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "u.jsonl", LINES)


def report_of(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["user"] for line in lines] == list(dict.fromkeys(line["user"] for line in lines))
    return {line["user"]: line for line in lines}


def test_train_many(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    dev = jsonl(tmp_path / "d.jsonl", [{"user": user, **row} for user, rows in DEV.items() for row in rows])
    arguments = ("train-many", "--base", base, "--data", data, "--by", "user", "--out", "S", "--dev", dev, *QUICK)
    ran = run(*arguments)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("S: 5 users trained, 0 skipped, 0 failed; mean loss ")
    assert ran.out.endswith("rows/s; report in S.report.jsonl\n")
    assert ran.out.count("\n") == 1
    report = report_of(tmp_path / "S.report.jsonl")
    assert list(report) == list(USERS)
    store, frozen = Store(tmp_path / "S"), foreword.load_base(base, dtype="float32", device="cpu")
    means = {name: 0.0 for name in ("first_epoch_loss", "train_loss")}
    for user, rows in USERS.items():
        ours = store.get(user, base=frozen)
        settings = foreword.TrainSettings(epochs=1, batch_size=4, length=3)
        theirs = foreword.train(frozen, rows, dev=DEV[user], settings=settings)
        torch.testing.assert_close(matrices_of(ours), matrices_of(theirs), rtol=0.01, atol=1e-4)
        assert report[user]["rows"] == report[user]["passes"] == len(rows)
        assert report[user]["metrics"] == ours.card.metrics == pytest.approx(theirs.card.metrics, abs=1e-4)
        assert report[user]["version"] == store.newest(user).sha256
        for name in means:
            means[name] += theirs.card.metrics[name] / len(USERS)
    before, after = (f"{mean:.3f}" for mean in means.values())
    assert f"; mean loss {before} in the first epoch, {after} in the last; " in ran.out

    files = written(tmp_path / "S")
    again = run(*arguments)
    assert again.code == 0
    assert again.out.startswith(f"S: 0 users trained, 5 skipped, 0 failed; mean loss {before} in")
    assert written(tmp_path / "S") == files
    assert all(line["skipped"] for line in report_of(tmp_path / "S.report.jsonl").values())


def test_some_users_fail(run: Run, base: Path, tmp_path: Path) -> None:
    bad = [{"user": f"bad{i}", "input": "a", "output": "b" * CONTEXT} for i in range(7)]
    data = jsonl(tmp_path / "u.jsonl", [*LINES, *bad, {"user": "[red]\ud800", "input": "a", "output": "b"}])
    ran = run("train-many", "--base", base, "--data", data, "--out", "S/", "--report", "r.jsonl", *QUICK)
    assert ran.code == 1
    assert ran.out.startswith("S/: 5 users trained, 0 skipped, 8 failed; ")
    lines = ran.err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"bad0: record 1: expected at most {CONTEXT} positions")
    assert lines[4].startswith("bad4: record 1: ")
    assert lines[4].endswith("; more such are in the report alone")
    report = report_of(tmp_path / "r.jsonl")
    assert list(report)[5:] == [*(f"bad{i}" for i in range(7)), "[red]\ud800"]
    for user, line in report.items():
        assert ("error" in line) == (user not in USERS)
        assert ("version" in line) == (user in USERS)
    assert not list(tmp_path.glob("*.report.jsonl"))


def test_every_option_reaches_training(
    run: Run,
    base: Path,
    prefix: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jsonl(tmp_path / "u.jsonl", [{"who": "b", "q": "what", "a": "this"}])
    seen: dict[str, Any] = {}

    def train(base: Any, data: Any, store: Any, **given: Any) -> list[UserReport]:
        seen.update(base=base, data=data, store=store, **given)
        return []

    monkeypatch.setattr(foreword.many, "train_many", train)
    fields = {
        "length": 3, "lr": 0.5, "epochs": 2, "accumulation": 4, "batch_size": 7, "warmup": 0.25, "clip": 2.5,
        "weight_decay": 0.125, "patience": 1, "max_output_tokens": 9, "seed": 17,
    }  # fmt: skip
    flags = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]
    columns = ["--by", "who", "--input", "q", "--output", "a"]
    more = ["--template", "Q: {input}\\n", "--max-input-tokens", 19, "--save-dtype", "float32", "--dtype", "float32"]
    start = ["--init-from", prefix, "--slots", 5, "--rows-at-once", 6, "--gradient-checkpointing", "--init", "random"]
    mlp = ["--reparametrization", "mlp", "--hidden", 23]
    command = ["train-many", "--base", base, "--data", "u.jsonl", "--dev", "u.jsonl", "--out", "S", "--device", "cpu"]
    ran = run(*command, *columns, *flags, *more, *start, *mlp)
    assert (ran.code, ran.err) == (0, "")
    expected = {"reparametrization": "mlp", "hidden": 23, "gradient_checkpointing": True, "init": "random"}
    assert seen["settings"] == foreword.TrainSettings(**{**fields, **expected})
    assert seen["framing"] == foreword.Framing(template="Q: {input}\n", max_input_tokens=19)
    assert (seen["slots"], seen["rows_at_once"], seen["save_dtype"]) == (5, 6, torch.float32)
    assert (seen["process"], seen["processes"]) == (0, 1)
    assert content(seen["init_from"]) == content(Prefix.load(prefix))
    assert seen["base"].dtype == torch.float32
    for file in (seen["data"], seen["dev"]):
        assert file.records("b") == [{"who": "b", "q": "what", "a": "this", "input": "what", "output": "this"}]
    assert run(*command, *columns, "--chat", "--init-text", "words").code == 0
    assert seen["framing"].chat
    assert seen["settings"] == foreword.TrainSettings(init_text="words")


def test_train_and_train_many_share_options_and_defaults() -> None:
    one, many = (inspect.signature(command).parameters for command in (cli.train, cli_many.train_many))
    settings = {field.name: field.default for field in dataclasses.fields(foreword.TrainSettings)}
    assert {name for name in settings if name not in many} == {"infix"}
    for name, parameter in many.items():
        if name in settings:
            assert parameter.default == settings[name]
        if name in one:
            assert parameter.default == one[name].default


SHARED = ("train-many", "--base", "nowhere", "--out", "S", "--data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SHARED, "none.jsonl"], "none.jsonl: No such file or directory"),
        ([*SHARED, "bad.jsonl"], "bad.jsonl, line 2: expected one JSON object a line"),
        ([*SHARED, "u.jsonl", "--by", "who"], "u.jsonl, line 1: expected a user's name in the column 'who'; got no such column"),
        ([*SHARED, "u.jsonl", "--dev", "bad.jsonl"], "bad.jsonl, line 2: expected"),
        ([*SHARED, "u.jsonl", "--input", "output"], "expected two columns"),
        ([*SHARED, "u.jsonl", "--epochs", "0"], "expected epochs of at least 1; got 0"),
        ([*SHARED, "u.jsonl", "--save-dtype", "int8"], "expected bfloat16 or float32 for the file; got 'int8'"),
        ([*SHARED, "u.jsonl", "--chat", "--template", "x"], "--chat and --template exclude each other"),
        ([*SHARED, "u.jsonl", "--report", "S"], "expected a report outside the store; S is in it"),
        ([*SHARED, "u.jsonl", "--report", "S/../S/r/x"], "expected a report outside the store; S/../S/r/x is in it"),
        ([*SHARED, "u.jsonl", "--report", "u.jsonl"], "expected another file to write to than u.jsonl"),
        ([*SHARED, "u.jsonl", "--init-from", "none"], "no prefix file at none"),
        ([*SHARED, "u.jsonl", "--out", "memory://S"], "expected --report FILE, since the store memory://S is no local folder"),
        ([*SHARED, "u.jsonl", "--out", "u.jsonl", "--report", "r"], "expected a store at u.jsonl; it is something else"),
        ([*SHARED, "pipe"], "pipe: expected a file that can be read again; got a folder or a pipe"),
        ([*SHARED, "u.jsonl", "--report", "u.jsonl/r"], "expected a folder to write to; u.jsonl is none"),
        (["store", "ls", "none"], "expected a store at none; there is none"),
        (["store", "put", "S", "a\nb", "p"], "expected a name that is one line of text"),
        (["store", "put", "S", "bob", "none"], "no prefix file at none"),
        (["store", "put", "S", "bob", "u.jsonl"], "u.jsonl: expected a safetensors file"),
        (["generate", "--base", "nowhere", "--store", "S", "text"], "--store has the prefixes that rows of --input-file name"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(
    run: Run,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Any,
    message: str,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bad.jsonl").write_text('{"user": "b", "input": "1", "output": "2"}\n{"us\n')
    monkeypatch.setattr(foreword.bases, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    before = written(tmp_path)
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {message}")
    assert ran.err.count("\n") == 1
    assert written(tmp_path) == before


def test_the_bar(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False, _environ={})
    monkeypatch.setattr(terminal, "err", screen)
    monkeypatch.setattr(cli_many, "err", screen)
    users = foreword.many.UserFile(data)
    progress = cli_many._Progress(users, epochs=3, process=0, processes=1)
    with progress.bar:
        (task,) = progress.bar.tasks
        assert task.total == 3 * len(LINES) == 60
        progress.step(8)
        progress.tell(UserReport(user="ann", rows=5, passes=0, skipped=True))
        progress.tell(UserReport(user="bob", rows=3, passes=6))  # stopped early
        progress.tell(UserReport(user="cyd", rows=1, passes=2, error="odd [rows]"))
        assert (task.completed, task.total) == (8, 60 - 15 - 3 - 1)
        progress.step(33)
        for user in ("dee", "eve"):
            progress.tell(UserReport(user=user, rows=SIZES[user], passes=3 * SIZES[user]))
        assert task.completed == task.total == 41
    assert "cyd: odd [rows]" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "5/5 users" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "1 failed" in screen.file.getvalue()  # type: ignore[attr-defined]
    progress = cli_many._Progress(users, epochs=3, process=1, processes=2)
    assert progress.bar.disable
    assert progress.left == 3 * (SIZES["bob"] + SIZES["dee"])


def test_without_a_terminal_a_line_a_minute_says_how_far_it_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Console(file=io.StringIO(), width=120, highlight=False, _environ={})
    monkeypatch.setattr(terminal, "err", log)
    monkeypatch.setattr(cli_many, "err", log)
    now = [0.0]
    monkeypatch.setattr(cli_many.time, "perf_counter", lambda: now[0])
    users = foreword.many.UserFile(data)
    for process in (0, 1):
        progress = cli_many._Progress(users, epochs=3, process=process, processes=2)
        with progress.bar:
            for second in (30, 59, 61, 119, 122):
                now[0] += second - now[0] % 1000
                progress.step(5)
            progress.tell(UserReport(user="ann", rows=5, passes=15))
        now[0] = 1000.0
    # process 0 has ann, cyd and eve, 10 rows, three epochs
    assert log.file.getvalue() == (  # type: ignore[attr-defined]
        "0 of 3 users, 0 failed, 0 rows/s, 0:01:01 left\n0 of 3 users, 0 failed, 0 rows/s, 0:00:24 left\n"
    )


def test_who_cannot_be_trained_at_all_is_no_part_of_a_success(run: Run, base: Path, data: Path) -> None:
    """Exit code 2, though each user fails alone."""
    arguments = ["train-many", "--base", base, "--data", data, "--out", "S", *QUICK]
    assert run(*arguments, "--template", "{inptu}").code == 2
    ran = run(*arguments, "--length", "5000")
    assert ran.code == 2
    assert ran.err.startswith(
        "error: expected a length below the base's context of 131; got 5000: take a shorter prefix"
    )


def test_mixed_precision_is_not_passed_over(
    run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    ran = run("train-many", "--out", "S", "--base", base, "--data", data)
    assert ran.code == 2
    assert ran.err == "error: expected no mixed precision with train-many; got 'bf16': give --dtype instead\n"
    assert not (tmp_path / "S").exists()


def test_processes_that_do_not_see_each_other_do_nothing(
    run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.os, "environ", {**os.environ, "WORLD_SIZE": "2"})
    for command in (["train-many", "--out", "S"], ["train", "--out", "p"]):
        monkeypatch.setattr(terminal, "on_cpu", lambda _: False)
        ran = run(*command, "--base", base, "--data", data)
        assert ran.code == 2
        assert ran.err == "error: the launcher started 2 processes, and this one sees 1: name --device\n"
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("asked", "processes", "device"),
    [(None, 2, "cuda:1"), ("cuda", 2, "cuda:1"), ("cuda:7", 2, "cuda:7"), ("cpu", 2, "cpu"), (None, 1, None), ("cuda", 1, "cuda")],
)  # fmt: skip
def test_each_process_has_its_own_device(asked: str | None, processes: int, device: str | None) -> None:
    state: Any = SimpleNamespace(num_processes=processes, device=torch.device("cuda:1"))
    assert terminal.device_of(asked, state) == device


def test_the_store(run: Run, prefix: Path, tmp_path: Path) -> None:
    names = ["Zoë", "a/../b", "[red]bob"]
    for name in names:
        ran = run("store", "put", "S", name, prefix)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith("version ")
    store = Store(tmp_path / "S")
    first = store.newest("Zoë").sha256
    assert run("store", "ls", "S").out.splitlines() == [
        f"{first[:12]}  {store.newest(name).time.isoformat(timespec='seconds')}  {name}" for name in sorted(names)
    ]
    lines = [json.loads(line) for line in run("store", "ls", "S", "--json", "--limit", 2).out.splitlines()]
    assert [line["name"] for line in lines] == ["Zoë", "[red]bob"]
    assert lines[0]["sha256"] == first
    assert run("store", "ls", "S", "--begins", "a/").out.split()[-1] == "a/../b"
    assert run("store", "ls", "S", "--after", "[red]bob").out.count("\n") == 1

    other = Prefix.load(prefix)
    other.save(tmp_path / "q.safetensors", torch.float32)
    assert run("store", "put", "S", "Zoë", "q.safetensors").code == 0
    second = store.newest("Zoë").sha256
    shown = run("store", "show", "S", "Zoë", "--json")
    card = json.loads(shown.out)
    assert card["dtype"] == "float32"
    assert [one["sha256"] for one in card["versions"]] == [second, first]
    assert json.loads(run("store", "show", "S", "Zoë", "--version", first[:7], "--json").out)["dtype"] == "bfloat16"
    assert second in run("store", "show", "S", "Zoë").out

    assert run("store", "get", "S", "Zoë", "--out", "z.safetensors").code == 0
    assert (tmp_path / "z.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()
    assert run("store", "get", "S", "Zoë", "--out", "z.safetensors", "--version", first[:9]).code == 2
    assert run("store", "get", "S", "Zoë", "--out", "z.safetensors", "--version", first[:9], "--overwrite").code == 0
    assert (tmp_path / "z.safetensors").read_bytes() == prefix.read_bytes()
    assert run("store", "roll-back", "S", "Zoë", first[:9]).code == 0
    assert store.newest("Zoë").sha256 == first
    times = [one.time.isoformat(timespec="seconds") for one in store.versions("Zoë")]
    expected = [{"sha256": sha256, "time": time} for sha256, time in zip((first, second, first), times, strict=True)]
    assert json.loads(run("store", "show", "S", "Zoë", "--json").out)["versions"] == expected
    lines = [line.split() for line in run("store", "show", "S", "Zoë").out.splitlines()]
    place = lines.index(["versions", first, times[0]])
    assert lines[place + 1 : place + 3] == [[second, times[1]], [first, times[2]]]

    ran = run("store", "rm", "S", "Zoë", "nobody", "a/../b", "none")
    assert ran.out == "Zoë: 3 versions deleted\na/../b: 1 version deleted\n"
    assert ran.code == 2
    assert re.fullmatch("error: no prefix named 'nobody' in .*; no prefix named 'none' in .*\n", ran.err)
    assert run("store", "rm", "S", "Zoë").err.startswith("error: no prefix named 'Zoë'")
    assert run("store", "get", "S", "Zoë", "--out", "y").code == 2
    assert run("store", "rebuild", "S").out == "S: 1 names\n"
    assert run("store", "verify", "S").out == "S: nothing wrong\n"
    (file,) = (tmp_path / "S").rglob("*.safetensors")
    file.write_bytes(b"?" + file.read_bytes()[1:])
    ran = run("store", "verify", "S")
    assert ran.code == 1
    assert "([red]bob): version" in ran.out
    assert "is damaged" in ran.out
    assert run("store", "get", "S", "[red]bob", "--out", "y").code == 2


def test_generate_with_the_prefixes_of_a_store(
    run: Run,
    base: Path,
    prefix: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("store", "put", "S", "a/b", prefix).code == 0
    rows = [{"input": "x", "prefix": "a/b"}, {"input": "x"}, {"input": "y", "prefix": "a/b"}]
    jsonl(tmp_path / "rows.jsonl", rows)
    loads: list[str] = []
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, name: loads.append(name) or get(self, name))
    arguments = ("generate", "--base", base, "--input-file", "rows.jsonl", "--max-new-tokens", 5, "--dtype", "float32")
    assert run(*arguments, "--output", "o.jsonl", "--store", "S").code == 0
    assert loads == ["a/b"]
    jsonl(tmp_path / "rows.jsonl", [{**row, **({"prefix": str(prefix)} if "prefix" in row else {})} for row in rows])
    assert run(*arguments, "--output", "p.jsonl").code == 0
    ours, theirs = (
        [json.loads(line)["output"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("o.jsonl", "p.jsonl")
    )
    assert ours == theirs
    jsonl(tmp_path / "rows.jsonl", [{"input": "x", "prefix": "nobody"}])
    ran = run(*arguments, "--output", "q.jsonl", "--store", "S")
    assert (ran.code, ran.err.startswith("error: no prefix named 'nobody' in S")) == (2, True)
    # train-many's column, say: the bare base would answer for everybody
    jsonl(tmp_path / "rows.jsonl", [{"input": "x", "user": "a/b"}])
    ran = run(*arguments, "--output", "q.jsonl", "--store", "S")
    message = "error: rows.jsonl: expected a column 'prefix' that names a prefix of the store S; no row has one\n"
    assert (ran.code, ran.err) == (2, message)
    assert not (tmp_path / "q.jsonl").exists()


@pytest.mark.slow
def test_killed_and_started_again(run: Run, base: Path, tmp_path: Path) -> None:
    users = {f"u{i}": rows_of_user(f"u{i}", 6) for i in range(40)}
    data = jsonl(tmp_path / "u.jsonl", [{"user": user, **row} for user, rows in users.items() for row in rows])
    arguments = [*map(str, ("train-many", "--base", base, "--data", data, "--out", "S", "--slots", 3, *QUICK))]
    process = subprocess.Popen([sys.executable, "-m", "foreword", *arguments], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("S/names/*/*/*.safetensors"))) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = [*(path.name for path in tmp_path.glob("S/names/*/*/*.safetensors"))]
    assert len(there) < 40
    assert not (tmp_path / "S.report.jsonl").exists()
    assert run(*arguments).code == 0
    report = report_of(tmp_path / "S.report.jsonl")
    assert sum(line["skipped"] for line in report.values()) == len(there)
    assert len(list(tmp_path.glob("S/names/*/*/*.safetensors"))) == 40
    assert run("store", "verify", "S").code == 0


TOLD = """
import os, foreword.many
from foreword.cli import main
begin = foreword.many._Plan.begin
def told(plan, user):
    print(user, file=open("told-" + os.environ["RANK"], "a"))
    return begin(plan, user)
foreword.many._Plan.begin = told
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        # as on a machine with GPUs
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_give_the_prefixes_of_one(run: Run, base: Path, tmp_path: Path, launcher: list[str]) -> None:
    bad = {"user": "odd", "input": "a", "output": ""}
    data = jsonl(tmp_path / "u.jsonl", [*LINES[:3], bad, *LINES[3:]])
    # no device is named, as a user would not
    quick = [*QUICK[:6], *QUICK[8:]]
    arguments = [*map(str, ("train-many", "--base", base, "--data", data, "--save-dtype", "float32", *quick))]
    # who trained whom: each process tells its own file
    (tmp_path / "told.py").write_text(TOLD)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *launcher, "told", *arguments, "--out", "two"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    shares = [(tmp_path / f"told-{rank}").read_text().split() for rank in (0, 1)]
    assert shares == [["ann", "cyd", "dee"], ["bob", "odd", "eve"]]
    assert done.stdout.startswith("two: 5 users trained, 0 skipped, 1 failed; ")
    assert done.stdout.count("\n") == 1
    assert "odd: record 1: expected a non-empty output" in done.stderr
    assert run(*arguments, "--out", "one").code == 1
    two, one = (report_of(tmp_path / f"{name}.report.jsonl") for name in ("two", "one"))
    assert list(two) == list(one) == ["ann", "bob", "cyd", "odd", "dee", "eve"]
    for user in USERS:
        ours, theirs = (Store(tmp_path / name).get(user) for name in ("two", "one"))
        torch.testing.assert_close(matrices_of(ours), matrices_of(theirs), rtol=0, atol=1e-4)
        assert len(Store(tmp_path / "two").versions(user)) == 1
        assert two[user]["metrics"] == pytest.approx(one[user]["metrics"], abs=1e-5)
    assert two["odd"] == one["odd"]


def test_help_says_what_the_exit_codes_mean(run: Run) -> None:
    ran = run("train-many", "--help")
    assert ran.code == 0
    assert "Exits with 0 if everybody has a prefix, 1 if some users failed" in " ".join(ran.out.split())
    assert isinstance(cli_many.store_app, typer.Typer)


def test_interrupted(run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **given: Any) -> Any:
        yield UserReport(user="ann", rows=5)
        raise KeyboardInterrupt

    monkeypatch.setattr(foreword.many, "train_many", interrupted)
    (tmp_path / "S.report.jsonl").write_text("of the run before")
    ran = run("train-many", "--base", base, "--data", data, "--out", "S", *QUICK)
    assert ran.code == 130
    assert "interrupted: the same command again goes on, and trains nobody twice" in ran.err
    assert (tmp_path / "S.report.jsonl").read_text() == "of the run before"
    assert not list(tmp_path.glob(".*.part"))
