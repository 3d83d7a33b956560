"""Does `foreword train-many` need more memory for more users? 40 rows each, on a tiny GPT-2, for 100 users and for many.

    python -m benchmarks.train_many_scale
    python -m benchmarks.train_many_scale --users 10000 --json benchmarks/results/train_many_scale.json

Each run is the command itself, in a process of its own; its peak memory is what the system says of it when it has ended
(ru_maxrss). The goal: that of many users is at most 1.1 times that of 100. The base is tiny, so that what grows with the
users would be seen beside it. The run of many is killed twice on its way (SIGKILL) and started again, and once more when
it is done: then everybody must have one prefix, trained once.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.record import machine, write_json
from foreword.store import Store

ROWS = 40
FEW = 100
GOAL = 1.1
KILLED_AT = (0.05, 0.1)
"""Shares of the users that are in the store when a run is killed."""
SETTINGS: dict[str, Any] = {
    "length": 5,
    "reparametrization": "direct",
    "epochs": 1,
    "batch-size": 8,
    "slots": 16,
    "rows-at-once": 128,
}


def save_base(folder: Path) -> None:
    """A random GPT-2 of 2 layers, whose tokens are bytes."""
    torch.manual_seed(0)
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["</s>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    end = vocab["</s>"]
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=len(vocab), bos_token_id=end, eos_token_id=end
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def save_rows(path: Path, users: int) -> None:
    """The users' rows, each of another user than the one before."""
    with path.open("w") as file:
        for row in range(ROWS):
            for user in range(users):
                name = f"user-{user:06d}@example.org"
                file.write(json.dumps({"user": name, "input": f"{user} x {row}", "output": f"= {user * row}"}) + "\n")


def command_for(base: Path, folder: Path, users: int) -> list[str]:
    command = [sys.executable, "-m", "foreword", "train-many", "--base", base, "--data", folder / f"{users}.jsonl"]
    command += ["--out", folder / f"store-{users}", "--device", "cpu", "--dtype", "float32"]
    command += [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    return [str(part) for part in command]


LAUNCH = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""
"""Starts a command from a process that is small: the system counts what the starter held as the command's own."""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds that the command took, and its peak memory in MiB."""
    began = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", LAUNCH, *command], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    print(output.stdout, end="")
    status, peak = map(int, output.stdout.split("\n")[-2].split())
    if status:
        sys.exit(f"{' '.join(command)} ended with {status}")
    return seconds, peak * (1 if platform.system() == "Darwin" else 1024) / 2**20


def killed(command: list[str], store: Path, users: int) -> int:
    """Start the command, kill it once the store has so many users, and say how many there are then."""
    process = subprocess.Popen(command)
    while (there := len(list(store.glob("names/*/*/*.safetensors")))) < users:
        if process.poll() is not None:
            sys.exit(f"{' '.join(command)} ended before it could be killed")
        time.sleep(0.25)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return max(there, len(list(store.glob("names/*/*/*.safetensors"))))


def check(folder: Path, users: int, skipped: int) -> None:
    """Everybody has one prefix, trained once, and the last report says so."""
    with (folder / f"store-{users}.report.jsonl").open() as file:
        report = [json.loads(line) for line in file]
    assert len(report) == users
    assert not any("error" in line for line in report)
    assert sum(line["skipped"] for line in report) == skipped
    assert sum(line["passes"] > 0 for line in report) == users - skipped
    store = Store(folder / f"store-{users}")
    for line in report:
        assert [version.sha256 for version in store.versions(line["user"])] == [line["version"]], "trained twice"
    assert list(store.verify()) == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000, help=f"compared with {FEW}")
    parser.add_argument("--folder", type=Path, help="where the data and the stores go; by default a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    users = arguments.users
    runs = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        save_base(folder / "base")
        for count in (FEW, users):
            save_rows(folder / f"{count}.jsonl", count)
        runs[f"{FEW:,} users"] = FEW, 0, *run(command_for(folder / "base", folder, FEW))
        command = command_for(folder / "base", folder, users)
        there = [killed(command, folder / f"store-{users}", int(share * users)) for share in KILLED_AT]
        runs[f"{users:,} users, the third start"] = users - there[-1], there[-1], *run(command)
        check(folder, users, there[-1])
        runs[f"{users:,} users, once more"] = 0, users, *run(command)
        check(folder, users, users)
    report(arguments, there, runs)


def report(arguments: argparse.Namespace, there: list[int], runs: dict[str, tuple[int, int, float, float]]) -> None:
    few, many, again = runs.values()
    ratio = many[3] / few[3]
    table = Table("run", "trained", "skipped", "seconds", "peak memory, MiB", box=None)
    for name, (trained, skipped, seconds, peak) in runs.items():
        table.add_row(name, f"{trained:,}", f"{skipped:,}", f"{seconds:.1f}", f"{peak:.0f}")
    console = Console(width=110)
    console.print(table)
    # what all take to start is in neither
    skipping = (again[2] - few[2]) / again[1]
    speed = (many[0] - few[0]) / (many[2] - few[2] - skipping * many[1])
    console.print(
        f"killed with {there[0]:,} and with {there[1]:,} users in the store; everybody was trained once. "
        f"Peak memory {ratio:.3f} times that of {FEW} users; goal: at most {GOAL}. "
        f"Beyond the start {speed:.1f} users/s trained ({speed * ROWS * SETTINGS['epochs']:,.0f} rows/s), "
        f"{1e3 * skipping:.2f} ms for one who is skipped."
    )
    if arguments.json is not None:
        names = ("trained", "skipped", "seconds", "peak_mib")
        figures = {
            "runs": {name: dict(zip(names, one, strict=True)) for name, one in runs.items()},
            "killed_at": there,
            "memory_ratio": ratio,
            "goal": GOAL,
            "users_per_second": speed,
            "seconds_for_one_skipped": skipping,
            "rows_per_user": ROWS,
            "settings": SETTINGS,
            "machine": machine(),
        }
        write_json(arguments.json, figures)
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
