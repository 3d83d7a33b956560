"""The command line: the forms of the README, and one line with exit code 2 for whatever a user can mend."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from test_training import ROWS, content, own_prefix, small_disk
from tiny import CONTEXT, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel
from transformers.utils import logging

import foreword
import foreword.bases
import foreword.limit
import foreword.training
from foreword.bases import Base
from foreword.batching import batches, likeness
from foreword.cli import TRACKERS, main
from foreword.data import read_records, rows_of
from foreword.evaluate import score_files
from foreword.limit import Work
from foreword.prefix import Framing, Prefix
from foreword.reparam import matrices_of
from foreword.training import TrainSettings
from foreword.version import __version__


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["foreword", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Ran(int(end.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models, and a prefix file of the first."""
    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("bases")
    for family in ("gpt2", "llama"):
        model: PreTrainedModel = tiny_model(family)
        model.save_pretrained(root / family)
        tiny_tokenizer(family).save_pretrained(root / family)
    base = foreword.load_base(root / "gpt2")
    own_prefix(base).save(root / "p.safetensors")
    logging.enable_progress_bar()
    return {path.stem: path for path in root.iterdir()}


@pytest.fixture
def base(folders: dict[str, Path]) -> Path:
    return folders["gpt2"]


@pytest.fixture
def prefix(folders: dict[str, Path]) -> Path:
    return folders["p"]


def jsonl(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "rows.jsonl", ROWS)


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# what works


def test_train_in_the_form_of_the_readme(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    dev = jsonl(tmp_path / "dev.jsonl", ROWS[:3])
    ran = run("train", "--base", base, "--data", data, "--dev", dev, "--out", "P.safetensors")
    assert ran.code == 0
    # a line an epoch, where there is no terminal for a bar
    epochs = [
        re.fullmatch(r"epoch (\d) of 5: loss [\d.]+ \(dev [\d.]+\), [\d,]+ tokens/s", one)
        for one in ran.err.splitlines()
    ]
    assert [one and one[1] for one in epochs] == ["1", "2", "3", "4", "5"]
    out = tmp_path / "P.safetensors"
    size = f"{out.stat().st_size:,}"
    assert ran.out.startswith(f"P.safetensors: 10 virtual tokens, 4,200 parameters, {size} bytes; ")
    assert "dev_loss" in ran.out
    assert ran.out.endswith(" tokens/s\n")
    assert ran.out.count("\n") == 1
    assert sorted(written(tmp_path)) == ["P.safetensors", "dev.jsonl", "rows.jsonl"]
    frozen = foreword.load_base(base)
    expected = foreword.train(frozen, ROWS, dev=ROWS[:3], out=tmp_path / "python.safetensors")
    assert expected.length == 10
    assert content(out) == content(tmp_path / "python.safetensors")
    assert Prefix.load(out, frozen).card.base == str(base)

    assert run("train", "--base", base, "--data", data, "--out", "Q.safetensors").code == 0
    assert "dev_loss" not in Prefix.load(tmp_path / "Q.safetensors").card.metrics


def test_every_option_of_train_reaches_training(
    run: Run, base: Path, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.tsv").write_text("q\ta\nwhat\tthis\nwho\tthat\n")
    seen: dict[str, Any] = {}
    original = foreword.training.train

    def spy(*args: Any, **kwargs: Any) -> Prefix:
        seen.update(kwargs, base=args[0], records=args[1])
        return original(*args, **kwargs)

    monkeypatch.setattr(foreword.training, "train", spy)
    words = "--length 7 --reparametrization mlp --hidden 13 --init activations --init-text words --lr 0.003 --epochs 2"
    words += " --batch-size 1 --accumulation 2 --warmup 0.2 --clip 0.5 --weight-decay 0.01 --patience 3 --seed 5"
    words += " --max-output-tokens 19 --max-input-tokens 23 --gradient-checkpointing --input q --output a"
    words += (
        " --dev rows.tsv --checkpoint-every 3 --save-dtype float32 --dtype float32 --device cpu --overwrite --resume"
    )
    ran = run(
        "train", "--base", base, "--data", "rows.tsv", "--out", "p", "--template", r"{input}\t>\n", *words.split()
    )
    assert (ran.code, past_epochs(ran)) == (0, "")
    assert seen["settings"] == TrainSettings(
        length=7, reparametrization="mlp", hidden=13, init_text="words", lr=0.003, epochs=2, batch_size=1, accumulation=2,
        warmup=0.2, clip=0.5, weight_decay=0.01, patience=3, seed=5, max_output_tokens=19, gradient_checkpointing=True,
    )  # fmt: skip
    assert seen["framing"] == Framing(template="{input}\t>\n", max_input_tokens=23)
    rows = [{"q": "what", "a": "this"}, {"q": "who", "a": "that"}]
    assert seen["records"] == seen["dev"] == [{**row, "input": row["q"], "output": row["a"]} for row in rows]
    assert (seen["resume"], seen["overwrite"], seen["checkpoint_every"]) == (True, True, 3)
    assert seen["base"].dtype == torch.float32
    assert Prefix.load(tmp_path / "p").dtype == "float32"

    # and without any, training has its own defaults
    assert run("train", "--base", base, "--data", "rows.tsv", "--input", "q", "--output", "a", "--out", "r").code == 0
    assert seen["settings"] == TrainSettings()
    assert seen["framing"] == Framing()
    assert Prefix.load(tmp_path / "r").dtype == "bfloat16"

    assert run("train", "--base", base, "--data", "rows.tsv", "--input", "q", "--output", "a", "--out", "s",
               "--init-from", prefix).code == 0  # fmt: skip
    assert Prefix.load(tmp_path / "s").card.init == "prefix"


def test_profile(run: Run, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def rate(frozen: Base, tokens: int) -> float:
        asked.append(tokens)
        return 1.5e9

    monkeypatch.setattr(foreword.limit, "product_rate", rate)
    options = ("--batch-size", 2, "--accumulation", 2, "--epochs", 3, "--length", 7, "--profile")
    ran = run("train", "--base", base, "--data", data, "--out", "p", *options)
    assert (ran.code, past_epochs(ran)) == (0, "")
    _, told = ran.out.splitlines()
    frozen = foreword.load_base(base)
    rows = rows_of(frozen, ROWS, Framing(), length=7)
    tokens = sum(map(len, rows))
    plans = (batches(rows, 2, seed=0, epoch=epoch, key=likeness(frozen)) for epoch in range(3))
    batched = ([rows[i] for i in indices] for plan in plans for indices in plan)
    needed = sum(map(Work(frozen, 7).of, batched)) / (3 * tokens)
    number = r"([\d.,]+)"
    found = re.fullmatch(
        rf"profile: {number}% of the limit, {number} of {number} tokens/s; {number} GFLOP a token, 2 GFLOP/s of bare "
        rf"products; peak memory {number} MiB",
        told,
    )
    assert found is not None
    share, speed, limit, gflop, peak = (float(group.replace(",", "")) for group in found.groups())
    assert limit == pytest.approx(1.5e9 / needed, abs=0.5)
    assert share == pytest.approx(100 * speed / limit, abs=1 + 50 / limit)
    assert gflop == pytest.approx(needed / 1e9, abs=0.005)
    assert 50 < peak < 50_000
    # of a batch, not of a step
    assert asked == [round(2 * tokens / len(ROWS))]


def test_train_on_messages(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(folders["gpt2"], chatty)
    template = "{% for m in messages %}<a>{{ m['content'] }}{% endfor %}<b>"
    (chatty / "chat_template.jinja").write_text(template)
    rows = [
        [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}] for row in ROWS
    ]
    data = jsonl(tmp_path / "rows.jsonl", [{"messages": messages} for messages in rows])
    ran = run("train", "--base", chatty, "--data", data, "--chat", "--epochs", "1", "--out", "p.safetensors")
    assert (ran.code, past_epochs(ran)) == (0, "")
    assert Prefix.load(tmp_path / "p.safetensors").card.framing.chat
    ran = run("generate", "--base", chatty, "--prefix", "p.safetensors", "--max-new-tokens", "3", "1 plus 1")
    assert (ran.code, ran.err) == (0, "")


def test_generate_in_the_forms_of_the_readme(run: Run, base: Path, prefix: Path, tmp_path: Path) -> None:
    frozen = foreword.load_base(base)
    loaded = Prefix.load(prefix, frozen)
    ran = run("generate", "--base", base, "--prefix", prefix, "some text")
    expected = foreword.generate(frozen, ["some text"], loaded)
    assert ran == (0, expected[0] + "\n", "")

    texts = ["some text", "more", "a third of them"]
    expected = foreword.generate(
        frozen, texts, loaded, settings=foreword.GenerateSettings(max_new_tokens=7, num_beams=2)
    )
    ran = run("generate", "--base", base, "--prefix", prefix, "--max-new-tokens", "7", "--num-beams", "2", *texts)
    assert ran == (0, "".join(text + "\n" for text in expected), "")

    rows = [{"input": text, "id": n} for n, text in enumerate(texts)]
    rows[1]["odd"] = "\ud800 half a pair"
    given = jsonl(tmp_path / "F.jsonl", rows)
    ran = run(
        "generate", "--base", base, "--prefix", prefix, "--input-file", given, "--output", "out/G.jsonl",
        "--max-new-tokens", "7",
    )  # fmt: skip
    assert ran == (0, "", "")
    expected = foreword.generate(frozen, texts, loaded, settings=foreword.GenerateSettings(max_new_tokens=7))
    made = [json.loads(line) for line in (tmp_path / "out" / "G.jsonl").read_text("utf-8").splitlines()]
    assert made == [{**row, "output": text} for row, text in zip(rows, expected, strict=True)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["G.jsonl"]


def test_generate_with_a_prefix_a_row(run: Run, base: Path, prefix: Path, tmp_path: Path) -> None:
    frozen = foreword.load_base(base)
    mine, other = own_prefix(frozen, length=3, seed=1), Prefix.load(prefix, frozen)
    mine.save(tmp_path / "mine.safetensors")
    (tmp_path / "F.csv").write_text("text,prefix,input\na,mine.safetensors,x\nb,,y\nc,mine.safetensors,z\n")
    ran = run("generate", "--base", base, "--prefix", prefix, "--input-file", "F.csv", "--input", "text", "--output", "G.jsonl",
              "--max-new-tokens", "5")  # fmt: skip
    assert ran == (0, "", "")
    mine = Prefix.load(tmp_path / "mine.safetensors")
    expected = foreword.generate(
        frozen, ["a", "b", "c"], [mine, other, mine], settings=foreword.GenerateSettings(max_new_tokens=5)
    )
    assert read_records(tmp_path / "G.jsonl") == [
        {**row, "output": text} for row, text in zip(read_records(tmp_path / "F.csv"), expected, strict=True)
    ]


def test_outputs_may_be_inputs(run: Run, base: Path, prefix: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "told.jsonl", [{"input": "not this", "output": "some text", "messages": None}])
    command = ["generate", "--base", base, "--prefix", prefix, "--max-new-tokens", "5"]
    assert run(*command, "--input-file", "told.jsonl", "--input", "output", "--output", "again.jsonl").code == 0
    (row,) = map(json.loads, (tmp_path / "again.jsonl").read_text("utf-8").splitlines())
    assert row["output"] + "\n" == run(*command, "some text").out
    # a row whose messages are none is one of input, for the bare base too
    assert run("generate", "--base", base, "--input-file", "told.jsonl", "--output", "bare.jsonl").code == 0


@pytest.mark.parametrize("sampled", [False, True])
def test_generate_goes_on_where_it_was_interrupted(
    run: Run, base: Path, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    texts = ["a", "of it", "some text", "more", "a third of them"]
    given = jsonl(tmp_path / "F.jsonl", [{"input": text} for text in texts])
    command = ["generate", "--base", base, "--prefix", prefix, "--input-file", given, "--batch-size", "2"]
    command += ["--max-new-tokens", "5", *(["--temperature", "1", "--seed", "3"] if sampled else [])]
    assert run(*command, "--output", "whole.jsonl").code == 0
    real, asked = foreword.generation._run, []

    def interrupted(*args: Any) -> Any:
        asked.extend(args[-1])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(foreword.generation, "_run", interrupted)
        ran = run(*command, "--output", "G.jsonl")
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted: the same command again goes on where it was\n")
    assert not (tmp_path / "G.jsonl").exists()
    part = (tmp_path / "G.jsonl.part").read_bytes()
    refused(run(*command, "--output", "G.jsonl", "--stop", "e"), "G.jsonl.part is of another run")
    refused(run(*command, "--output", "G.jsonl", "--raw"), "G.jsonl.part is of another run")
    jsonl(given, [{"input": text, "more": 1} for text in texts])
    refused(run(*command, "--output", "G.jsonl"), "G.jsonl.part is of another run")
    jsonl(given, [{"input": text} for text in texts])
    assert (tmp_path / "G.jsonl.part").read_bytes() == part

    done = asked[:2]
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(foreword.generation, "_run", lambda *args: asked.extend(args[-1]) or real(*args))
        assert run(*command, "--output", "G.jsonl").code == 0
    assert sorted([*done, *asked]) == [0, 1, 2, 3, 4]
    assert (tmp_path / "G.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "G.jsonl.part").exists()
    # killed between the two files
    with monkeypatch.context() as patch:
        patch.setattr(foreword.outputs.Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*command, "--output", "H.jsonl").code != 0
    assert (tmp_path / "H.jsonl").exists()
    assert (tmp_path / "H.jsonl.part").exists()
    assert run(*command, "--output", "H.jsonl").code == 0
    assert (tmp_path / "H.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "H.jsonl.part").exists()
    refused(run(*command, "--output", "G.jsonl"), "G.jsonl is there already: choose another name, or give --overwrite")


def test_every_option_of_generate_reaches_generation(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("foreword.generation.generate", lambda *args, **kwargs: seen.update(kwargs) or ["x"])
    words = (
        "--max-new-tokens 3 --num-beams 2 --length-penalty 0.5 --stop a --stop b --batch-size 4 --raw --dtype float32"
    )
    assert run("generate", "--base", base, *words.split(), "text").out == "x\n"
    assert seen["settings"] == foreword.GenerateSettings(
        max_new_tokens=3, num_beams=2, length_penalty=0.5, stop=("a", "b"), batch_size=4
    )
    assert seen["framing"] == Framing(template="{input}")
    assert run("generate", "--base", base, "--stop", r"\n\n", "--stop", r"\t", "two", "texts").out == "x\n"
    assert seen["settings"].stop == ("\n\n", "\t")
    words = "--temperature 0.5 --top-k 3 --top-p 0.9 --seed 7"
    assert run("generate", "--base", base, *words.split(), "two", "texts").out == "x\n"
    assert seen["settings"] == foreword.GenerateSettings(temperature=0.5, top_k=3, top_p=0.9, seed=7)
    assert seen["framing"] is None


def test_inspect(run: Run, prefix: Path) -> None:
    card = Prefix.load(prefix).card
    ran = run("inspect", prefix)
    assert (ran.code, ran.err) == (0, "")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in ran.out.splitlines() if line.split()}
    expected = {"length": "5", "parameters": "2100", "base": card.base, "fingerprint": card.fingerprint, "format": "1"}
    assert {name: lines.get(name) for name in expected} == expected
    assert r"'{input}\n'" in ran.out

    ran = run("inspect", prefix, "--json")
    shown = json.loads(ran.out)
    assert shown["fingerprint"] == card.fingerprint
    assert shown["sections"] == {"decoder": 3}
    assert shown["bytes"] == prefix.stat().st_size


def test_a_hash_is_whole_on_a_narrow_screen(
    run: Run, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    loaded = Prefix.load(prefix)
    Prefix(loaded.sections, dataclasses.replace(loaded.card, training={"run": "ab" * 32})).save(tmp_path / "p")
    assert f"run: '{'ab' * 32}'" in run("inspect", "p").out
    assert run("store", "put", "S", "p", "p").code == 0
    assert f"run: '{'ab' * 32}'" in run("store", "show", "S", "p").out


def test_text_that_the_outputs_encoding_lacks(
    run: Run, base: Path, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Prefix.load(prefix)
    Prefix(loaded.sections, dataclasses.replace(loaded.card, base="caf\xe9")).save(tmp_path / "p")
    monkeypatch.setattr("foreword.generation.generate", lambda *_, **__: ["th\xe9"])
    for arguments, told in ((("inspect", "p"), rb"caf\xe9"), (("generate", "--base", base, "a", "b"), rb"th\xe9")):
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            stream = io.TextIOWrapper(written, encoding="ascii")
            patch.setattr(sys, "stdout", stream)
            ran = run(*arguments)
            stream.flush()
        assert (ran.code, ran.err) == (0, "")
        assert told in written.getvalue()


def test_the_home_folder_in_what_is_written(
    run: Run, base: Path, prefix: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("foreword.generation._run", lambda *args: [[]] * len(args[1]))
    monkeypatch.setattr("foreword.many.train_many", lambda *_, **__: [])
    assert run("generate", "--base", base, "--input-file", data, "--output=~/o.jsonl").code == 0
    assert run("train-many", "--base", base, "--data", data, "--by", "input", "--out=~/S").code == 0
    assert run("card", prefix, "--out=~/README.md").code == 0
    assert run("store", "put", "~/S", "a", prefix).code == 0
    assert run("store", "get", "~/S", "a", "--out=~/a.safetensors").code == 0
    assert {path.name for path in home.iterdir()} == {"o.jsonl", "S", "S.report.jsonl", "README.md", "a.safetensors"}
    assert run("card", prefix, "--out=~nobody.md").code == 0
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "~nobody.md").exists()


def test_a_strangers_card_and_file_name_do_nothing_to_the_terminal(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    odd = "\x1b[31m[red]\r\x07"
    made = own_prefix(foreword.load_base(folders["gpt2"]))
    card = dataclasses.replace(made.card, base=odd, training={odd: odd})
    name = "\x1b[2J.safetensors"
    Prefix(made.sections, card).save(tmp_path / name)
    ran = run("inspect", name)
    assert (ran.code, ran.err) == (0, "")
    assert all(character.isprintable() or character == "\n" for character in ran.out)
    assert r"\x1b[31m[red]\r\x07" in ran.out
    assert r"\x1b[2J.safetensors" in ran.out
    refused(
        run("generate", "--base", folders["llama"], "--prefix", name, "x"),
        r"expected a prefix for the base .* trained on '\\x1b\[31m\[red\]",
    )
    nowhere = b"caf\xe9".decode(errors="surrogateescape")
    refused(run("inspect", nowhere), r"caf\\udce9.*\n")


def test_peft_there_and_back(run: Run, base: Path, prefix: Path, tmp_path: Path) -> None:
    assert run("export-peft", prefix, "--base", base, "--out", "adapter") == (0, "adapter\n", "")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.peft_type, config.num_virtual_tokens) == ("PREFIX_TUNING", 5)
    ran = run("import-peft", "adapter", "--base", base, "--out", "again.safetensors", "--template", r"{input}\n=>")
    assert ran == (0, "again.safetensors: 5 virtual tokens\n", "")
    assert run("import-peft", "adapter", "--base", base, "--out", "chat.safetensors", "--chat").code == 0
    assert Prefix.load(tmp_path / "chat.safetensors").card.framing == Framing(chat=True)
    there, back = Prefix.load(prefix), Prefix.load(tmp_path / "again.safetensors")
    assert back.card.framing.template == "{input}\n=>"
    for layer, ours in zip(back.sections["decoder"], there.sections["decoder"], strict=True):
        for tensor, original in zip(layer, ours, strict=True):
            assert torch.equal(tensor, original.float())


def test_prepare_and_score(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "e2e.csv").write_text('mr,ref\n"name[The Mill], food[English]",The Mill is English.\n')
    ran = run("prepare", "e2e", "e2e.csv", "--out", "rows.jsonl")
    assert ran == (0, "kept 1 inputs with 1 references; dropped nothing\n", "")
    (row,) = read_records(tmp_path / "rows.jsonl")
    assert (row["input"], row["output"]) == ("name : The Mill | food : English", "The Mill is English.")

    (tmp_path / "r.txt").write_text("the mill is an old place\nit is by the river\n\na second one is here\n")
    (tmp_path / "o.txt").write_text("the mill is an old pub\na second one is there\n")
    ran = run("score", "--references", "r.txt", "--outputs", "o.txt", "--metrics", "e2e.BLEU")
    scores = score_files("r.txt", "o.txt", "e2e.BLEU")
    assert (ran.code, ran.err) == (0, "")
    assert f"{scores.figures['BLEU']:.4f}" in ran.out
    assert f"\nBLEU: {scores.signatures['BLEU']}\n" in ran.out
    ran = run("score", "--references", "r.txt", "--outputs", "o.txt", "--metrics", "e2e.BLEU", "--json")
    assert json.loads(ran.out) == scores.figures


def test_score_without_any_figure_fails(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("r.txt", "o.txt"):
        (tmp_path / name).write_text("a text\n")
    for module in ("rouge_score", "rouge_score.rouge_scorer"):  # another test may have imported the inner one
        monkeypatch.setitem(sys.modules, module, None)
    for options, printed in (([], ""), (["--json"], "{}\n")):
        ran = run("score", "--references", "r.txt", "--outputs", "o.txt", "--metrics", "ROUGE-1", *options)
        assert (ran.code, ran.out) == (2, printed)
        assert ran.err.startswith("ROUGE-1: this needs the package 'rouge-score'")
        assert ran.err.count("\n") == 1


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, __version__ + "\n", "")
    for command in ([], ["train"], ["generate"], ["inspect"], ["import-peft"], ["export-peft"], ["prepare"], ["score"]):
        ran = run(*command, "--help")
        assert ran.code == 0
        assert "Usage: foreword" in ran.out


# bad input


def past_epochs(ran: Ran) -> str:
    """What was said beside the line that `train` says an epoch."""
    return re.sub(r"(?m)^epoch \d+ of \d+: .*\n", "", ran.err)


def refused(ran: Ran, message: str) -> None:
    """One line that says so, and exit code 2."""
    assert (ran.code, ran.out) == (2, ""), ran
    assert ran.err.count("\n") == 1, ran.err
    assert re.match(f"error: .*({message})", ran.err), ran.err


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded before the input was looked at")

    monkeypatch.setattr(foreword.bases, "load_base", load)


def spoilt(folder: Path, prefix: Path) -> None:
    """Everything that can be wrong, each in a file of its own."""
    jsonl(folder / "rows.jsonl", ROWS)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "latin1.jsonl").write_bytes(
        json.dumps({"input": "caf\xe9", "output": "x"}, ensure_ascii=False).encode("latin1")
    )
    (folder / "half.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a", "outp')
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "ragged.csv").write_text("input,output\na,b\nc\n")
    jsonl(folder / "nothing.jsonl", [ROWS[0], {"input": "a", "output": " "}])
    jsonl(folder / "column.jsonl", [{"input": "a", "text": "b"}])
    jsonl(folder / "number.jsonl", [{"input": ["a"], "output": "b"}])
    jsonl(folder / "pair.jsonl", [{"input": "\ud800", "output": "b"}])
    jsonl(folder / "long.jsonl", [{"input": "a" * (CONTEXT - 12), "output": "b"}])
    jsonl(folder / "own.jsonl", [{"input": "a", "prefix": "none.safetensors"}])
    jsonl(folder / "given.part", [{"input": "a"}])
    jsonl(folder / "own3.jsonl", [{"input": "a", "prefix": 3}])
    (folder / "cut.safetensors").write_bytes(prefix.read_bytes()[:-9])
    (folder / "text.safetensors").write_text("no prefix")
    shutil.copy(prefix.parent / "gpt2" / "model.safetensors", folder / "foreign.safetensors")
    (folder / "old.safetensors").write_text("dear")
    (folder / "left.safetensors.checkpoint").write_text("dear")
    (folder / "folder").mkdir()


TRAIN = ("train", "--base", "{base}")
GENERATE = ("generate", "--base", "{base}")
BEFORE = {
    # of the data
    "data: no such file": ([*TRAIN, "--data", "none.jsonl", "--out", "p"], "none.jsonl: No such file"),
    "data: a folder": ([*TRAIN, "--data", "folder", "--out", "p"], "folder: Is a directory"),
    "data: empty": ([*TRAIN, "--data", "empty.jsonl", "--out", "p"], "empty.jsonl: expected at least one record"),
    "data: not UTF-8": ([*TRAIN, "--data", "latin1.jsonl", "--out", "p"], r"latin1.jsonl: expected UTF-8; byte 14 \(0xe9\) is not"),
    "data: half a line": ([*TRAIN, "--data", "half.jsonl", "--out", "p"], "half.jsonl, line 2: expected one JSON object"),
    "data: a list": ([*TRAIN, "--data", "list.jsonl", "--out", "p"], "list.jsonl, line 1: expected a JSON object; got list"),
    "data: ragged": ([*TRAIN, "--data", "ragged.csv", "--out", "p"], "ragged.csv, line 3: expected 2 columns"),
    "data: column by name": ([*TRAIN, "--data", "rows.jsonl", "--input", "q", "--out", "p"], "expected the column 'q'"),
    "dev: empty": ([*TRAIN, "--data", "rows.jsonl", "--dev", "empty.jsonl", "--out", "p"], "empty.jsonl: expected at least"),
    "rows: empty": ([*GENERATE, "--input-file", "empty.jsonl", "--output", "o"], "empty.jsonl: expected at least one"),
    "rows: not UTF-8": ([*GENERATE, "--input-file", "latin1.jsonl", "--output", "o"], "latin1.jsonl: expected UTF-8"),
    # of prefix files
    "prefix: no such file": ([*GENERATE, "--prefix", "none", "x"], "no prefix file at none"),
    "prefix: truncated": ([*GENERATE, "--prefix", "cut.safetensors", "x"], "cut.safetensors: expected a safetensors file"),
    "prefix: text": ([*GENERATE, "--prefix", "text.safetensors", "x"], "text.safetensors: expected a safetensors file"),
    "prefix: a model": ([*GENERATE, "--prefix", "foreign.safetensors", "x"], "foreign.safetensors: a safetensors file, but not"),
    "prefix: a folder": ([*GENERATE, "--prefix", "folder", "x"], "folder: cannot be read as a prefix file"),
    "prefix of a row": ([*GENERATE, "--input-file", "own.jsonl", "--output", "o"], "no prefix file at none.safetensors"),
    "prefix of a row: no name": ([*GENERATE, "--input-file", "own3.jsonl", "--output", "o"], "record 1: expected a file name in 'prefix'; got 3"),
    "inspect: truncated": (["inspect", "cut.safetensors"], "cut.safetensors: expected a safetensors file"),
    "inspect: foreign": (["inspect", "foreign.safetensors"], "foreign.safetensors: a safetensors file, but not a prefix"),
    "init-from: truncated": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--init-from", "cut.safetensors"], "cut.safetensors: expected"),
    "export: truncated": (["export-peft", "cut.safetensors", "--base", "{base}", "--out", "a"], "cut.safetensors: expected"),
    "data: no output": ([*TRAIN, "--data", "column.jsonl", "--out", "p"], "record 1: expected .*'output'.*columns: 'input', 'text'"),
    "data: no column of the template": ([*TRAIN, "--data", "rows.jsonl", "--template", "{{x}}", "--out", "p"], "record 1: .*'x'"),
    "data: a list for text": ([*TRAIN, "--data", "number.jsonl", "--out", "p"], "record 1: expected text .*'input'; got list"),
    "data: empty y": ([*TRAIN, "--data", "nothing.jsonl", "--out", "p"], "record 2: expected a non-empty output; y is empty"),
    "dev: empty y": ([*TRAIN, "--data", "rows.jsonl", "--dev", "nothing.jsonl", "--out", "p"], "nothing.jsonl, record 2: expected a non-"),
    "patience alone": ([*TRAIN, "--data", "rows.jsonl", "--patience", "1", "--out", "p"], "patience .* give development rows"),
    # of what is written
    "out: there": ([*TRAIN, "--data", "rows.jsonl", "--out", "old.safetensors"], "old.safetensors is there already: .* --overwrite"),
    "out: a folder": ([*TRAIN, "--data", "rows.jsonl", "--out", "folder"], "expected a file to write to; folder is a folder"),
    "out: below a file": ([*TRAIN, "--data", "rows.jsonl", "--out", "old.safetensors/p"], "expected a folder to write to; old.safetensors is none"),
    "out: here": ([*TRAIN, "--data", "rows.jsonl", "--out", "."], "expected a file to write to; . is a folder"),
    "out: a device": ([*TRAIN, "--data", "rows.jsonl", "--out", "/dev/full"], "/dev/full is a folder or a device"),
    "out: the data": ([*TRAIN, "--data", "rows.jsonl", "--out", "rows.jsonl", "--overwrite"], "expected another file to write to than rows.jsonl"),
    "out: of a killed run": ([*TRAIN, "--data", "rows.jsonl", "--out", "left.safetensors"], "is of a run that did not end: give --resume"),
    "resume: done already": ([*TRAIN, "--data", "rows.jsonl", "--out", "old.safetensors", "--resume"], "old.safetensors is there already"),
    "output: the rows": ([*GENERATE, "--input-file", "rows.jsonl", "--output", "./rows.jsonl"], "expected another file to write to than rows.jsonl"),
    "output: the prefix": ([*GENERATE, "--prefix", "{prefix}", "--input-file", "rows.jsonl", "--output", "{prefix}"], "expected another file to write to"),
    "output: a folder": ([*GENERATE, "--input-file", "rows.jsonl", "--output", "folder"], "expected a file to write to; folder is a folder"),
    "output: below a file": ([*GENERATE, "--input-file", "rows.jsonl", "--output", "old.safetensors/o"], "old.safetensors"),
    "output: the rows are its .part": ([*GENERATE, "--input-file", "given.part", "--output", "given"], "expected another file to write to than given.part"),
    "output: of something else": ([*GENERATE, "--input-file", "rows.jsonl", "--output", "old.safetensors"], "old.safetensors is there already"),
    "import: there": (["import-peft", "folder", "--base", "{base}", "--out", "old.safetensors"], "is there already"),
    "import: template": (["import-peft", "folder", "--base", "{base}", "--out", "p", "--template", "{{inp"], "expected a template such as"),
    "import: of a killed run": (["import-peft", "folder", "--base", "{base}", "--out", "left.safetensors"], "left.safetensors.checkpoint is of a training run that did not end and writes left.safetensors: choose another name"),
    "pull: of a killed run": (["pull", "a/b", "--out", "left.safetensors"], "is of a training run .*: choose another name"),
    "get: of a killed run": (["store", "get", "S", "a", "--out", "left.safetensors"], "is of a training run .*: choose another name"),
    "import: below a file": (["import-peft", "folder", "--base", "{base}", "--out", "old.safetensors/p"], "old.safetensors"),
    "prepare: no source": (["prepare", "e2e", "none.csv", "--out", "o"], "none.csv"),
    "prepare: no task": (["prepare", "x", "rows.jsonl", "--out", "o"], "expected a task of dart, e2e, summarization, webnlg; got 'x'"),
    "score: nothing": (["score", "--references", "none", "--outputs", "rows.jsonl"], "cannot read none: No such file"),
    # of settings
    "settings: epochs": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--epochs", "0"], "expected epochs of at least 1; got 0"),
    "settings: kind": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--reparametrization", "lora"], "expected a reparam.*'lora'"),
    "settings: save dtype": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--save-dtype", "int8"], "expected bfloat16 or float32"),
    "settings: two framings": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--chat", "--template", "{{input}}"], "--chat and --template"),
    "settings: a tracker's folder": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--log-dir", "logs"], "expected a tracker to write into --log-dir; give --log-with"),
    "settings: hidden": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--hidden", "9" * 30], "expected hidden below 2\\*\\*31; got a number of 100 bits"),
    "settings: tracker": ([*TRAIN, "--data", "rows.jsonl", "--out", "p", "--log-with", "paper"], "expected a tracker of .*; got 'paper'"),
    "settings: beams": ([*GENERATE, "--num-beams", "2", "--temperature", "1", "x"], "beams and sampling exclude each other"),
    "settings: stop": ([*GENERATE, "--stop", "", "x"], "expected a list of non-empty stop strings"),
    "texts and a file": ([*GENERATE, "x", "--input-file", "rows.jsonl", "--output", "o"], "give one of the two"),
    "neither": ([*GENERATE], "expected texts, or --input-file with --output"),
    "a file alone": ([*GENERATE, "--input-file", "rows.jsonl"], "--input-file and --output go together"),
    "an output alone": ([*GENERATE, "x", "--output", "o"], "--input-file and --output go together"),
}  # fmt: skip


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize("what", BEFORE)
def test_bad_input_is_found_before_the_base_is_loaded(
    run: Run, base: Path, prefix: Path, tmp_path: Path, what: str
) -> None:
    spoilt(tmp_path, prefix)
    before, its = written(tmp_path), prefix.read_bytes()
    arguments, message = BEFORE[what]
    refused(run(*(argument.format(base=base, prefix=prefix) for argument in arguments)), message)
    assert written(tmp_path) == before
    assert prefix.read_bytes() == its


AFTER = {
    "base: a folder": (["train", "--base", "folder", "--data", "rows.jsonl", "--out", "p"], "'folder' has no config.json"),
    "base: a file": (["generate", "--base", "rows.jsonl", "x"], "'rows.jsonl' is another kind of file"),
    "base: nothing": (["generate", "--base", "./none", "x"], "no model at './none'"),
    "base: damaged": (["generate", "--base", "damaged", "x"], "cannot load 'damaged'"),
    "base: damaged, file": (["generate", "--base", "damaged", "--input-file", "rows.jsonl", "--output", "o"], "cannot load"),
    "base: dtype": ([*GENERATE, "--dtype", "fp8", "x"], "expected dtype to be one of auto"),
    "base: device": ([*GENERATE, "--device", "abacus", "x"], "expected a device of this machine, such as cpu; got 'abacus'"),
    "data: half a pair": ([*TRAIN, "--data", "pair.jsonl", "--out", "p"], "record 1: "),
    "data: too long": ([*TRAIN, "--data", "long.jsonl", "--out", "p"], f"record 1: expected at most {CONTEXT} positions"),
    "data: no template for chat": ([*TRAIN, "--data", "rows.jsonl", "--chat", "--out", "p"], "has no chat template"),
    "text: too long": ([*GENERATE, "--prefix", "{prefix}", "a" * (CONTEXT - 5)], f"expected at most {CONTEXT} positions"),
    "text: too long, bare": ([*GENERATE, "a" * CONTEXT], f"expected at most {CONTEXT} positions"),
    "texts: too long": ([*GENERATE, "--prefix", "{prefix}", "b", "a" * (CONTEXT - 5)], f"input 2: expected at most {CONTEXT}"),
    "text: not UTF-8": ([*GENERATE, "caf\udce9"], "the input: expected Unicode text"),
    "text: streamed beams": ([*GENERATE, "--top-p", "0", "x"], "0 < top_p <= 1"),
    "rows: no input": ([*GENERATE, "--input-file", "own4.jsonl", "--output", "o"], "'input'"),
    "prefix: another base's": (["generate", "--base", "{other}", "--prefix", "{prefix}", "x"], "expected a prefix for the base .*llama.* this one was trained on .*gpt2'"),
    "prefix: another base's, file": (["generate", "--base", "{other}", "--prefix", "{prefix}", "--input-file", "rows.jsonl", "--output", "o"], "expected a prefix for the base"),
    "init-from: another base's": (["train", "--base", "{other}", "--data", "rows.jsonl", "--init-from", "{prefix}", "--out", "p"], "expected a prefix for the base"),
    "export: another base's": (["export-peft", "{prefix}", "--base", "{other}", "--out", "a"], "expected a prefix for the base"),
    "export: in use": (["export-peft", "{prefix}", "--base", "{base}", "--out", "damaged"], "expected a new or empty folder"),
    "import: no checkpoint": (["import-peft", "folder", "--base", "{base}", "--out", "p"], "adapter_config.json cannot be read"),
    "resume: not a checkpoint": ([*TRAIN, "--data", "rows.jsonl", "--out", "left.safetensors", "--resume"], "left.safetensors.checkpoint cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", AFTER)
def test_bad_input_ends_in_one_line_and_loses_nothing(
    run: Run, folders: dict[str, Path], prefix: Path, tmp_path: Path, what: str
) -> None:
    spoilt(tmp_path, prefix)
    jsonl(tmp_path / "own4.jsonl", [{"text": "a"}])
    shutil.copytree(folders["gpt2"], tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    before = written(tmp_path)
    arguments, message = AFTER[what]
    names = {"base": folders["gpt2"], "other": folders["llama"], "prefix": prefix}
    refused(run(*(argument.format(**names) for argument in arguments)), message)
    assert written(tmp_path) == before


def test_the_line_is_whole_on_a_narrow_screen(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    name = "a [bold]long[/bold] :smile: name " * 6 + ".jsonl"
    ran = run("generate", "--base", "x", "--input-file", name, "--output", "o")
    assert ran.err == f"error: {name}: No such file or directory\n"


def test_a_usage_error_is_exit_2(run: Run) -> None:
    for arguments in (["train"], ["fly"], ["train", "--epochs", "many"], ["generate", "--base"]):
        ran = run(*arguments)
        assert ran.code == 2
        assert ran.err.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_full_disk(run: Run, base: Path, data: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    out.write_text("dear")
    if command == "train":
        arguments = ["train", "--base", base, "--data", data, "--out", out, "--overwrite"]
    else:
        jsonl(data, [{"input": "a", "more": "b" * 5000}])
        arguments = ["generate", "--base", base, "--input-file", data, "--output", out, "--max-new-tokens", "3"]
        arguments += ["--overwrite"]
    before = written(tmp_path)
    with small_disk(5000):
        ran = run(*arguments)
    refused(
        ran._replace(err=past_epochs(ran)), "File too large: what was there is unchanged; make room, and run this again"
    )
    after = written(tmp_path)
    # the outputs themselves found room, and are not generated again
    assert (after.pop("out.part", None) is None) == (command == "train")
    assert after == before
    assert run(*arguments).code == 0
    assert out.read_bytes() != b"dear"
    assert written(tmp_path).keys() == before.keys()


# runs that end early


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
    ids=repr,
)  # fmt: skip
def test_too_little_memory(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raising(**_: Any) -> None:
        raise error

    monkeypatch.setattr("foreword.cli.app", raising)
    refused(run("train"), "the memory does not suffice: take smaller batches")
    error = NotImplementedError("a mistake of ours")
    with pytest.raises(NotImplementedError):
        run("train")


def test_interrupted(run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "--base", base, "--data", data, "--batch-size", "2", "--checkpoint-every", "1"]
    assert run(*arguments, "--out", "whole").code == 0
    write, count = foreword.training.write_checkpoint, []

    def interrupted(*args: Any) -> None:
        write(*args)
        count.append(1)
        if len(count) == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(foreword.training, "write_checkpoint", interrupted)
        # where a shell's background job runs the tests, the signal is ignored
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        ran = run(*arguments, "--out", "p")
        signal.signal(signal.SIGINT, before)
    said = "interrupted: the same command with --resume goes on from the last checkpoint\n"
    assert (ran.code, ran.out, past_epochs(ran)) == (130, "", said)
    assert sorted(written(tmp_path)) == ["p.checkpoint", "rows.jsonl", "whole"]
    refused(run(*arguments, "--out", "p"), "p.checkpoint is of a run that did not end: give --resume to go on")
    refused(
        run(*arguments, "--out", "p", "--resume", "--seed", "1"), "p.checkpoint is of a run with other data, settings"
    )
    assert run(*arguments, "--out", "p", "--resume").code == 0
    assert content(tmp_path / "p") == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_and_resumed(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["train", "--base", base, "--data", data, "--dev", data, "--batch-size", "2", "--epochs", "10"]
    arguments += ["--checkpoint-every", "1", "--patience", "9"]
    checkpoint = tmp_path / "p.checkpoint"
    process = subprocess.Popen(
        [sys.executable, "-m", "foreword", *map(str, arguments), "--out", "p"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert checkpoint.exists()
    assert not (tmp_path / "p").exists()
    assert run(*arguments, "--out", "p", "--resume").code == 0
    assert run(*arguments, "--out", "whole").code == 0
    assert content(tmp_path / "p") == content(tmp_path / "whole")
    assert not checkpoint.exists()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    arguments = f"train --base {base} --data {data} --batch-size 2 --dtype float32 --save-dtype float32".split()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "foreword"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments, "--out", "two"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("two: 10 virtual tokens")
    assert done.stdout.count("\n") == 1
    assert run(*arguments, "--accumulation", "2", "--out", "one").code == 0
    two, one = (matrices_of(Prefix.load(tmp_path / name))["decoder"] for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


# trackers


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_accelerate_refuses_is_one_line(run: Run, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "--base", base, "--data", data, "--out", "p"]
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
        refused(run(*command), "accelerate refuses its settings: .*fp8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused(run(*command), "accelerate refuses its settings: DeepSpeed is not installed")


def test_a_tracker_that_is_not_installed_is_named(
    run: Run, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tracker in TRACKERS:
        monkeypatch.setitem(sys.modules, tracker, None)
        refused(
            run("train", "--base", base, "--data", data, "--out", "p", "--log-with", tracker),
            f"this needs the package '{tracker}', which is not installed: pip install 'foreword\\[trackers\\]'",
        )


def test_tensorboard_is_told(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra trackers: pip install 'foreword[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["train", "--base", base, "--data", data, "--out", "p", "--log-with", "tensorboard", "--epochs", "3"]
    ran = run(*arguments)
    assert (ran.code, ran.err) == (0, "")
    (events,) = (path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "foreword")
    scalars = EventAccumulator(str(events)).Reload()
    assert [event.step for event in scalars.Scalars("loss")] == [1, 2, 3]
