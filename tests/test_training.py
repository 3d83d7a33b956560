"""The training loop is the plain one, it leaves the base alone, and a run that is killed and resumed is the run that was not."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process
from reference import logits_by_hand
from tiny import BUILDERS, CONTEXT, EOS, base_bytes, random_prefix, tiny_model, tiny_tokenizer
from transformers import DynamicCache

from foreword.attach import Stack, attach
from foreword.bases import Base
from foreword.batching import batches, collate, likeness, passes_of
from foreword.checkpoint import check_out, checkpoint_of
from foreword.data import Row, rows_of
from foreword.errors import DataError, SettingsError, TooLongError, TrainingError, WrongBaseError
from foreword.learner import Learner, _start_tokens, make_trainable
from foreword.learner import checkpointing as checkpointed
from foreword.limit import Work
from foreword.loss import forward_loss, mean_loss
from foreword.prefix import Card, Framing, Prefix
from foreword.reparam import layers_of, matrices_of
from foreword.training import TrainingProgress, TrainSettings, _Alone, attach_trainable, train
from foreword.writing import _aside

ROWS = [{"input": f"{n} plus {n}", "output": "ab" * n + "."} for n in (1, 4, 2, 7, 3, 5, 6)]
"""Of unequal lengths, x and y."""
DEV = [{"input": f"{n} minus", "output": "ba" * n} for n in (2, 5, 3)]


def fresh_base(family: str = "gpt2", dtype: torch.dtype = torch.float32, **config: Any) -> Base:
    return Base(tiny_model(family, dtype=dtype, **config), tiny_tokenizer(family), f"tiny {family}")


cached_base = functools.cache(fresh_base)
"""One for many tests: whatever is trained on it must leave it as it was."""


def settings_of(**more: Any) -> TrainSettings:
    """Few rows, few steps, and no MLP unless it is asked for: what is compared are keys and values themselves."""
    return TrainSettings(**{"length": 5, "batch_size": 2, "epochs": 2, "reparametrization": "direct", **more})


def own_prefix(base: Base, length: int = 5, seed: int = 0) -> Prefix:
    prefix = random_prefix(base.model, length, seed=seed)
    return Prefix(prefix.sections, Card(base=base.name, fingerprint=base.fingerprint))


def content(what: Prefix | Path) -> bytes:
    """A whole prefix file, but for its date."""
    prefix = what if isinstance(what, Prefix) else Prefix.load(what)
    card = dataclasses.replace(prefix.card, created="")
    return Prefix(prefix.sections, card).to_bytes(getattr(torch, prefix.dtype))


@contextmanager
def gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """What each step of AdamW is given, after clipping, for the first parameter."""
    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def record(self: Any, *args: Any) -> Any:
        seen.append(self.param_groups[0]["params"][0].grad.clone())
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        yield seen


class Killed(BaseException):
    """Stands for whatever ends a run from outside."""


def killed_at(step: int) -> Callable[[TrainingProgress], None]:
    def on_step(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise Killed

    return on_step


# what is trained


@pytest.mark.parametrize("family", BUILDERS)
def test_only_the_prefix_learns_and_the_base_keeps_its_bytes(family: str) -> None:
    base = fresh_base(family)
    before, trained = base_bytes(base), []

    def on_step(_: TrainingProgress) -> None:
        trained.append({name for name, p in base.model.named_parameters() if p.requires_grad})

    start = own_prefix(base)
    prefix = train(base, ROWS, init_from=start, settings=settings_of(epochs=1), on_step=on_step)
    sections = ("encoder", "decoder", "cross") if base.is_encoder_decoder else ("decoder",)
    assert trained == [{f"foreword.p_theta.{section}" for section in sections}] * 4
    for section, layers in prefix.sections.items():
        for layer, at_start in zip(layers, start.sections[section], strict=True):
            for tensor, old in zip(layer, at_start, strict=True):
                assert (tensor != old).any(dim=-1).all(), f"a virtual token of {section} did not learn"
    assert base_bytes(base) == before
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not hasattr(base.model, "foreword")


def test_under_the_mlp_its_parameters_learn_and_its_start_does_not() -> None:
    names: set[str] = set()
    base = cached_base()

    def on_step(_: TrainingProgress) -> None:
        names.update(name for name, p in base.model.named_parameters() if p.requires_grad)

    train(base, ROWS, settings=settings_of(epochs=1, reparametrization="mlp", hidden=13), on_step=on_step)
    mlp = {f"foreword.mlp.decoder.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert names == {"foreword.p_small.decoder", *mlp}


@pytest.mark.parametrize("family", BUILDERS)
def test_every_layers_keys_and_values_get_a_gradient_also_after_evaluation(family: str) -> None:
    base = cached_base(family)
    rows = rows_of(base, ROWS, Framing())
    with attach_trainable(base, settings=settings_of()) as attachment:
        for _ in range(2):
            loss = forward_loss(base, attachment, collate(base, rows))
            loss.backward()
            for section, layers in base.shapes.items():
                matrix = base.model.get_parameter(f"foreword.p_theta.{section}")
                assert matrix.grad is not None
                for i, layer in enumerate(layers_of(matrix.grad, layers)):
                    for kind, tensor in zip(("keys", "values"), layer, strict=True):
                        assert tensor.abs().amax(-1).min() > 0, f"{section}.{i}.{kind} has no gradient"
                matrix.grad = None
            mean_loss(base, rows, attachment)


# the loss


@pytest.mark.parametrize("family", BUILDERS)
def test_loss_is_the_mean_over_y_tokens_and_transformers_own(family: str) -> None:
    base = cached_base(family)
    rows = rows_of(base, ROWS, Framing())
    total = 0.0
    with attach(base.model, own_prefix(base)) as attachment:
        for row in rows:
            if base.is_encoder_decoder:
                ids, labels = [row.x], [row.y]
            else:
                ids, labels = [row.x + row.y], [[-100] * len(row.x) + row.y]
            with torch.no_grad():
                loss = base.model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss
            total += loss.item() * len(row.y)
        expected = total / sum(len(row.y) for row in rows)
        for batch_size in (1, 3, 7):
            assert mean_loss(base, rows, attachment, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    assert all(row.y[-1] == EOS for row in rows)
    assert mean_loss_without_prefix(base, rows) != pytest.approx(expected, rel=1e-4 if family == "pegasus" else 1e-3)


def mean_loss_without_prefix(base: Base, rows: Any) -> float:
    stack = Stack.of([own_prefix(base)], device=base.device, dtype=base.dtype)
    with attach(base.model, stack) as attachment:
        attachment.rows = torch.tensor([-1])
        return mean_loss(base, rows, attachment, batch_size=1)


def plain_run(base: Base, start: Prefix, settings: TrainSettings) -> tuple[list[float], list[float], torch.Tensor]:
    """The same training by other means: row by row, one float64 matrix, the prefix in a cache that is filled beforehand."""
    layers = base.shapes["decoder"]
    theta = torch.nn.Parameter(matrices_of(start)["decoder"].double())
    optimizer = torch.optim.AdamW([theta], lr=1.0, weight_decay=settings.weight_decay)
    rows = rows_of(base, ROWS, Framing())
    losses, norms, step = [], [], 0
    for epoch in range(settings.epochs):
        plan = batches(rows, settings.batch_size, seed=settings.seed, epoch=epoch, key=likeness(base))
        for at in range(0, len(plan), settings.accumulation):
            group = plan[at : at + settings.accumulation]
            members = [rows[i] for indices in group for i in indices]
            total = torch.zeros((), dtype=torch.float64)
            for row in members:
                cache = DynamicCache()
                for i, (keys, values) in enumerate(layers_of(theta[None], layers)):
                    cache.update(keys, values, i)
                positions = torch.arange(len(row)) + theta.shape[0]
                logits = base.model(
                    input_ids=torch.tensor([row.x + row.y]), position_ids=positions[None], past_key_values=cache
                ).logits[0]
                chosen = logits.log_softmax(-1)[len(row.x) - 1 : -1]
                total = total - chosen[torch.arange(len(row.y)), torch.tensor(row.y)].sum()
            loss = total / sum(len(row.y) for row in members)
            loss.backward()
            norms.append(theta.grad.norm().item())
            theta.grad *= min(1.0, settings.clip / (norms[-1] + 1e-6))
            optimizer.param_groups[0]["lr"] = settings.peak_lr * (0.5, 1.0, 1.0, 0.5)[step]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
    return losses, norms, theta.detach()


def test_training_equals_a_plain_loop() -> None:
    base = fresh_base(dtype=torch.float64)
    start = own_prefix(base)
    settings = settings_of(accumulation=2, lr=0.03, warmup=0.3, weight_decay=0.1, clip=0.47, seed=3)
    progress: list[TrainingProgress] = []
    prefix = train(base, ROWS, init_from=start, settings=settings, on_step=progress.append)
    losses, norms, theta = plain_run(base, start, settings)
    assert max(norms) > settings.clip > min(norms), f"clipping is not tried at both sides: {norms}"
    assert [p.loss for p in progress] == pytest.approx(losses, rel=1e-12)
    assert [p.lr for p in progress] == pytest.approx([0.015, 0.03, 0.03, 0.015])
    assert [(p.step, p.steps, p.epoch) for p in progress] == [(1, 4, 1), (2, 4, 1), (3, 4, 2), (4, 4, 2)]
    torch.testing.assert_close(matrices_of(prefix)["decoder"], theta.float(), rtol=1e-6, atol=1e-9)


def test_accumulation_gives_the_gradient_of_one_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    base = fresh_base(dtype=torch.float64)
    start, rows = own_prefix(base), ROWS[:6]
    seen: dict[tuple[int, int], tuple[list[float], torch.Tensor]] = {}
    for batch_size, accumulation in ((6, 1), (3, 2), (1, 6), (6, 5)):
        settings = settings_of(batch_size=batch_size, accumulation=accumulation, epochs=1, clip=0)
        losses: list[float] = []
        with gradients(monkeypatch) as steps:
            train(base, rows, init_from=start, settings=settings, on_step=lambda p, to=losses: to.append(p.loss))
        assert len(steps) == 1
        seen[batch_size, accumulation] = losses, steps[0]
    losses, gradient = seen[6, 1]
    assert gradient.norm() > 0.1
    for other_losses, other in seen.values():
        assert other_losses == pytest.approx(losses, rel=1e-12)
        torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-14)


def counted(base: Base) -> list[None]:
    """An entry for every forward pass from here on."""
    runs: list[None] = []
    base.model.register_forward_hook(lambda *_: runs.append(None))
    return runs


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_a_batch_of_many_tokens_goes_through_the_base_in_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = fresh_base(family, torch.float64)
    runs = counted(base)
    start, settings = own_prefix(base), settings_of(batch_size=len(ROWS), epochs=1, clip=0)
    seen: list[tuple[int, list[float], torch.Tensor]] = []
    for most in (4096, 40, 1):
        monkeypatch.setattr("foreword.batching.TOKENS_AT_ONCE", most)
        losses: list[float] = []
        runs.clear()
        with gradients(monkeypatch) as steps:
            train(base, ROWS, init_from=start, settings=settings, on_step=lambda p, to=losses: to.append(p.loss))
        assert len(steps) == 1
        seen.append((len(runs), losses, steps[0]))
    (whole, losses, gradient), (some, _, _), (each, _, _) = seen
    assert (whole, each) == (1, len(ROWS))
    assert 1 < some < len(ROWS)
    for _, other_losses, other in seen:
        assert other_losses == pytest.approx(losses, rel=1e-12)
        torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_development_rows_go_through_the_base_in_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = fresh_base(family, torch.float64)
    runs = counted(base)
    rows = rows_of(base, ROWS, Framing())
    with attach(base.model, own_prefix(base)) as attachment:
        whole = mean_loss(base, rows, attachment, batch_size=len(rows))
        assert len(runs) == 1
        monkeypatch.setattr("foreword.batching.TOKENS_AT_ONCE", 1)
        assert mean_loss(base, rows, attachment, batch_size=len(rows)) == pytest.approx(whole, rel=1e-12)
    assert len(runs) == 1 + len(rows)


def test_a_gpu_has_its_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.batching.TOKENS_AT_ONCE", 10)
    rows = [Row([7] * n, [8]) for n in (5, 1, 3)]
    of_cpu, of_gpu = (cast(Base, SimpleNamespace(device=torch.device(name))) for name in ("cpu", "cuda"))
    assert passes_of(of_cpu, rows) == [[rows[1], rows[2]], [rows[0]]]
    assert passes_of(of_cpu, rows[:0:-1]) == [rows[:0:-1]], "what fits stays in its order"
    assert passes_of(of_gpu, rows) == [rows]


def test_clip_bounds_the_norm_and_zero_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = cached_base()
    norms = {}
    for clip in (0.0, 1e-3, 1e3):
        with gradients(monkeypatch) as steps:
            train(base, ROWS, init_from=own_prefix(base), settings=settings_of(clip=clip, batch_size=7, epochs=1))
        norms[clip] = steps[0].norm().item()
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1e3] == norms[0.0] > 0.1


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_learning_rate_warms_up_and_falls_linearly(epochs: int) -> None:
    rates: list[float] = []
    train(
        cached_base(),
        ROWS,
        settings=settings_of(epochs=epochs, lr=1.0, warmup=0.1),
        on_step=lambda p: rates.append(p.lr),
    )
    total = 4 * epochs
    warm = math.ceil(total / 10)
    assert len(rates) == total
    assert rates[:warm] == pytest.approx([(n + 1) / warm for n in range(warm)])
    falls = [1 - n / (total - warm) for n in range(total - warm)]
    assert rates[warm:] == pytest.approx(falls)


def test_defaults_make_the_loss_fall_on_every_family() -> None:
    for family in BUILDERS:
        losses: list[float] = []
        train(
            cached_base(family), ROWS, settings=TrainSettings(epochs=5), on_step=lambda p, to=losses: to.append(p.loss)
        )
        assert losses[-1] < losses[0] - 0.1, f"{family}: {losses}"


def test_progress_counts_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    base = cached_base()
    progress: list[TrainingProgress] = []
    train(base, ROWS, dev=DEV, settings=settings_of(), on_step=progress.append)
    once = sum(map(len, rows_of(base, ROWS, Framing())))
    assert [p.tokens for p in progress][3::4] == [once, 2 * once]
    assert [p.rows for p in progress][3::4] == [len(ROWS), 2 * len(ROWS)]
    rows, work = rows_of(base, ROWS, Framing()), Work(base, settings_of().length)
    by_epoch = [
        sum(
            work.of([rows[i] for i in indices])
            for indices in batches(rows, 2, seed=settings_of().seed, epoch=epoch, key=likeness(base))
        )
        for epoch in (0, 1)
    ]
    assert [p.operations for p in progress][3::4] == pytest.approx([by_epoch[0], sum(by_epoch)], rel=1e-12)
    assert [p.seconds for p in progress] == sorted(p.seconds for p in progress)
    assert [p.dev_loss is None for p in progress] == [True, True, True, False] * 2


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_a_prefix_starts_from_as_many_first_rows_as_it_takes(family: str) -> None:
    base = cached_base(family)
    rows = rows_of(base, ROWS, Framing())
    own = [row.x if family == "bart" else [*row.x, *row.y] for row in rows]
    for count in (1, 2, 3):
        x = [token for one in own[:count] for token in one]
        y = [token for row in rows[:count] for token in row.y]
        enough = min(len(x), len(y))
        assert _start_tokens(base, rows, settings_of(length=enough)) == (x, y)
        assert _start_tokens(base, rows, settings_of(length=enough + 1)) != (x, y)


# what the development rows are for


def contrary() -> list[dict[str, str]]:
    """Rows whose y the training rows teach away from."""
    return [{"input": row["input"], "output": "#" * len(row["output"])} for row in ROWS]


def test_the_prefix_with_the_lowest_development_loss_is_kept(tmp_path: Path) -> None:
    base = cached_base()
    settings = settings_of(lr=0.3, epochs=5, warmup=0.0)
    losses: list[float] = []
    out = tmp_path / "p.safetensors"
    prefix = train(
        base,
        ROWS,
        dev=contrary(),
        settings=settings,
        out=out,
        on_step=lambda p: losses.append(p.dev_loss) if p.dev_loss is not None else None,
    )
    assert len(losses) == 5
    best = losses.index(min(losses))
    assert best < 4, f"the last prefix is the best, so nothing is tried: {losses}"
    with attach(base.model, prefix) as attachment:
        assert mean_loss(base, rows_of(base, contrary(), Framing()), attachment) == pytest.approx(min(losses), rel=1e-5)
    assert prefix.card.metrics["dev_loss"] == min(losses)
    assert content(out) == content(Prefix(prefix.sections, prefix.card)) or Prefix.load(out).dtype == "bfloat16"

    # what was trained for as long is the same prefix, with no development rows
    halted: list[Prefix] = []

    def halt(progress: TrainingProgress) -> None:
        if progress.step == 4 * (best + 1):
            module = base.model.get_submodule("foreword")
            halted.append(module.fold(prefix.card))
            raise Killed

    with pytest.raises(Killed):
        train(base, ROWS, settings=settings, on_step=halt)
    assert content(halted[0]) == content(prefix)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_training(patience: int) -> None:
    losses: list[float] = []
    prefix = train(
        cached_base(),
        ROWS,
        dev=contrary(),
        settings=settings_of(lr=0.3, epochs=40, warmup=0.0, patience=patience),
        on_step=lambda p: losses.append(p.dev_loss) if p.dev_loss is not None else None,
    )
    assert len(losses) < 40
    assert len(losses) == losses.index(min(losses)) + 1 + patience
    assert prefix.card.training["steps"] == 4 * len(losses)


# the same again


@pytest.mark.parametrize("reparametrization", ["direct", "mlp", "embedding"])
def test_same_seed_same_bytes(tmp_path: Path, reparametrization: Any) -> None:
    hidden = 13 if reparametrization == "mlp" else None
    files = []
    for n, seed in enumerate((0, 0, 1)):
        torch.manual_seed(n)
        files.append(tmp_path / f"{n}.safetensors")
        settings = settings_of(seed=seed, reparametrization=reparametrization, hidden=hidden)
        train(cached_base(), ROWS, settings=settings, out=files[-1])
    first, same, other = map(content, files)
    assert first == same != other


def test_training_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    train(cached_base(), ROWS, settings=settings_of(init="random"))
    assert torch.equal(torch.random.get_rng_state(), before)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"settings": settings_of(batch_size=3)},
    "mlp, accumulation, random start": {
        "settings": settings_of(reparametrization="mlp", hidden=13, accumulation=2, init="random")
    },
    # three steps an epoch, so that it is killed in the middle of one
    "accumulation within an epoch, mlp": {
        "settings": settings_of(batch_size=1, reparametrization="mlp", hidden=13, accumulation=3)
    },
    "development rows, patience": {
        "dev": contrary(),
        "settings": settings_of(batch_size=4, lr=0.3, warmup=0.0, epochs=9, patience=2),
    },
}


@pytest.mark.parametrize(("name", "every"), [*zip(RUNS, (3, 2, 1, 1), strict=True)])
def test_killed_at_any_step_and_resumed_is_the_run_that_was_not_killed(tmp_path: Path, name: str, every: int) -> None:
    run = {**RUNS[name], "checkpoint_every": every}
    whole, steps = tmp_path / "whole.safetensors", []
    train(cached_base(), ROWS, **run, out=whole, on_step=lambda p: steps.append(p.step))
    expected = content(whole)
    assert len(steps) > 3
    for step in steps:
        out, again = tmp_path / f"{step}.safetensors", []
        with pytest.raises(Killed):
            train(cached_base(), ROWS, **run, out=out, on_step=killed_at(step))
        assert not out.exists()
        train(cached_base(), ROWS, **run, out=out, resume=True, on_step=lambda p, to=again: to.append(p.step))
        assert content(out) == expected, f"killed at step {step}"
        assert again[-1] == steps[-1]
        assert len(again) <= len(steps) - step + every, "it began anew"
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * (len(steps) + 1)


def test_killed_twice(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "p.safetensors"
    train(cached_base(), ROWS, settings=settings_of(), out=whole)
    for step in (3, 6):
        with pytest.raises(Killed):
            train(
                cached_base(), ROWS, settings=settings_of(), out=out, resume=True, checkpoint_every=1,
                on_step=killed_at(step),
            )  # fmt: skip
    train(cached_base(), ROWS, settings=settings_of(), out=out, resume=True)
    assert content(out) == content(whole)


def test_killed_between_the_file_and_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.safetensors"
    save = Prefix.save

    def save_and_die(self: Prefix, *args: Any) -> None:
        save(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Prefix, "save", save_and_die)
        with pytest.raises(Killed):
            train(cached_base(), ROWS, settings=settings_of(), out=out)
    expected = content(out)
    with pytest.raises(TrainingError, match="is of a run that did not end: give --resume"):
        train(cached_base(), ROWS, settings=settings_of(), out=out)
    steps: list[int] = []
    # as a writer that was killed leaves them
    for left in (out, tmp_path / "p.safetensors.checkpoint"):
        left.with_name(f"{_aside(left)}0123456789ab.part").touch()
    train(cached_base(), ROWS, settings=settings_of(), out=out, resume=True, on_step=lambda p: steps.append(p.step))
    assert not steps
    assert content(out) == expected
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def checkpoint_of_step_4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("killed") / "p.safetensors"
    with pytest.raises(Killed):
        train(cached_base(), ROWS, settings=settings_of(), out=out, on_step=killed_at(5))
    return checkpoint_of(out).read_bytes()


@pytest.fixture
def killed(tmp_path: Path, checkpoint_of_step_4: bytes) -> Path:
    """The file that a run of all defaults here would have written, had it not been killed at step 5."""
    out = tmp_path / "p.safetensors"
    checkpoint_of(out).write_bytes(checkpoint_of_step_4)
    return out


@pytest.mark.parametrize(
    "change",
    [
        {"records": ROWS[:-1]},
        {"records": [*ROWS[1:], ROWS[0]]},
        {"dev": DEV},
        {"settings": settings_of(lr=0.01)},
        {"settings": settings_of(epochs=3)},
        {"settings": settings_of(seed=1)},
        {"settings": settings_of(init="random")},
        {"framing": Framing(template="{input} ")},
        {"init_from": own_prefix(cached_base())},
        {"base": fresh_base(activation_function="relu")},
        {"base": fresh_base(dtype=torch.bfloat16)},
        {"base": fresh_base("llama")},
    ],
    ids=lambda change: f"{next(iter(change))}",
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(killed: Path, change: dict[str, Any]) -> None:
    before = checkpoint_of(killed).read_bytes()
    run: dict[str, Any] = {"base": cached_base(), "records": ROWS, "settings": settings_of(), **change}
    with pytest.raises(
        TrainingError, match=r"is of a run with other data, settings, base or version of foreword: repeat"
    ):
        train(**run, out=killed, resume=True)
    assert checkpoint_of(killed).read_bytes() == before
    assert not killed.exists()


def test_other_processes_or_precision_make_another_run() -> None:
    def identity(**how: Any) -> str:
        return Learner(cached_base(), ROWS, dev=None, settings=settings_of(), framing=Framing(), **how).identity

    assert identity() == identity(processes=1, precision="no")
    assert len({identity(), identity(processes=2), identity(precision="bf16")}) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder", "foreign"])
def test_a_damaged_checkpoint_is_refused(killed: Path, damage: str) -> None:
    path = checkpoint_of(killed)
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "foreign":
        own_prefix(cached_base()).save(path)
    else:
        path.write_bytes({"cut": whole[:-7], "empty": b"", "text": b"not a checkpoint\n" * 50}[damage])
    what = "is of a run with other data" if damage == "foreign" else r"cannot be read \(.+\): remove it"
    with pytest.raises(TrainingError, match=what):
        train(cached_base(), ROWS, settings=settings_of(), out=killed, resume=True)


def test_overwrite_starts_anew_unless_it_resumes(killed: Path) -> None:
    killed.write_text("old")
    steps: list[int] = []
    with pytest.raises(Killed):
        train(
            cached_base(), ROWS, settings=settings_of(), out=killed, overwrite=True, checkpoint_every=1,
            on_step=killed_at(3),
        )  # fmt: skip
    assert killed.read_text() == "old"
    train(
        cached_base(), ROWS, settings=settings_of(), out=killed, overwrite=True, resume=True,
        on_step=lambda p: steps.append(p.step),
    )  # fmt: skip
    assert steps == [3, 4, 5, 6, 7, 8]
    assert Prefix.load(killed, cached_base()).length == 5


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert train(cached_base(), ROWS, settings=settings_of(), out=tmp_path / "p.safetensors", resume=True).length == 5


# files


def test_the_file_is_the_prefix_that_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "p.safetensors"
    prefix = train(cached_base(), ROWS, settings=settings_of(), out=out, save_dtype=torch.float32)
    assert content(out) == content(prefix)
    assert [path.name for path in out.parent.iterdir()] == ["p.safetensors"]
    out.unlink()
    prefix = train(cached_base(), ROWS, settings=settings_of(), out=out)
    assert content(out) == Prefix(prefix.sections, dataclasses.replace(prefix.card, created="")).to_bytes()
    assert Prefix.load(out).dtype == "bfloat16"


def test_words_that_the_base_lacks_are_refused() -> None:
    base = Base(tiny_model("gpt2"), tiny_tokenizer("gpt2"), "tiny")
    base.tokenizer.add_tokens(["<zzz>"])
    with pytest.raises(DataError, match="init_text: expected tokens that the base has; '<zzz>' was added"):
        train(base, ROWS, settings=settings_of(init_text="the <zzz> text"))


@pytest.mark.parametrize("way", ["direct", "mlp", "embedding"])
def test_a_prefix_as_long_as_the_context_is_refused(way: Any) -> None:
    settings = settings_of(length=CONTEXT, reparametrization=way, init="random")
    with pytest.raises(TooLongError, match="expected a length below the base's context of 131; got 131"):
        attach_trainable(cached_base(), settings=settings)
    attach_trainable(cached_base("t5"), settings=settings_of(length=CONTEXT, init="random")).detach()


def test_the_card_says_how_and_holds_no_text(tmp_path: Path) -> None:
    base = cached_base()
    settings = settings_of(init_text="Secret words of the task", length=7)
    framing = Framing(template="Q: {input}\nA:")
    prefix = train(base, ROWS, dev=DEV, settings=settings, framing=framing)
    card = prefix.card
    assert (card.base, card.fingerprint, card.framing, card.init) == (base.name, base.fingerprint, framing, "words")
    expected = {"length": 7, "lr": 5e-2, "rows": 7, "steps": 8, "epochs": 2, "seed": 0, "reparametrization": "direct"}
    assert {name: card.training[name] for name in expected} == expected
    assert set(card.metrics) == {"first_epoch_loss", "train_loss", "dev_loss"}
    text = card.to_json()
    assert not any(part in text for row in (*ROWS, *DEV) for part in row.values())
    assert "Secret" not in text

    again = train(base, ROWS, init_from=prefix, settings=settings_of(length=11))
    assert (again.length, again.card.training["length"], again.card.init) == (7, 7, "prefix")
    assert train(base, ROWS, settings=settings_of(init="random")).card.init == "random"
    assert train(base, ROWS, settings=settings_of()).card.init == "activations"


def test_training_goes_on_from_a_saved_prefix(tmp_path: Path) -> None:
    base, out = cached_base(), tmp_path / "p.safetensors"
    train(base, ROWS, settings=settings_of(), out=out, save_dtype=torch.float32)
    saved = Prefix.load(out, base)
    with attach(base.model, saved) as attachment:
        expected = mean_loss(base, rows_of(base, ROWS, Framing()), attachment)
    for reparametrization, hidden in (("direct", None), ("mlp", 13)):
        losses: list[float] = []
        settings = settings_of(batch_size=7, epochs=3, reparametrization=reparametrization, hidden=hidden)
        train(base, ROWS, init_from=saved, settings=settings, on_step=lambda p, to=losses: to.append(p.loss))
        assert losses[0] == pytest.approx(expected, rel=1e-5)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["file", "folder", "device", "below a file"])
def test_what_is_there_is_not_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "p.safetensors"
    if kind == "file":
        out.write_text("dear")
        message = "is there already: choose another name, or give --overwrite"
    elif kind == "folder":
        out.mkdir()
        message = "expected a file to write to; .* is a folder or a device"
    elif kind == "device":
        out = Path("/dev/null")
        message = "expected a file to write to; .* is a folder or a device"
    else:
        (tmp_path / "file").write_text("dear")
        out = tmp_path / "file" / "p.safetensors"
        message = "expected a folder to write to; .*file is none"
    steps: list[int] = []
    for resume in (False, True):
        with pytest.raises(SettingsError, match=message):
            train(cached_base(), ROWS, out=out, resume=resume, on_step=lambda p: steps.append(p.step))
        with pytest.raises(SettingsError, match=message):
            check_out(out, resume=resume)
    assert not steps
    assert all(path.is_dir() or path.read_text() == "dear" for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # root, as which tests may run, can write to any folder
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    steps: list[int] = []
    with pytest.raises(
        SettingsError, match=r"expected a folder to write to; .* is none \(Permission denied\): choose another"
    ):
        train(cached_base(), ROWS, out=tmp_path / "p.safetensors", on_step=lambda p: steps.append(p.step))
    assert not steps
    assert not list(tmp_path.iterdir())


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_a_usable_checkpoint(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "p.safetensors"
    train(cached_base(), ROWS, settings=settings_of(), out=whole)
    out.write_text("old")

    # the first checkpoint fails
    with small_disk(5000), pytest.raises(OSError, match="too large"):
        train(cached_base(), ROWS, settings=settings_of(), out=out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.safetensors", "whole.safetensors"]

    # a later one fails
    steps = []

    def fill(progress: TrainingProgress) -> None:
        steps.append(progress.step)
        if progress.step == 7:
            disk.__enter__()

    disk = small_disk(5000)
    with pytest.raises(OSError, match="too large"):
        train(cached_base(), ROWS, settings=settings_of(), out=out, overwrite=True, on_step=fill)
    disk.__exit__(None, None, None)
    assert steps[-1] == 8
    assert out.read_text() == "old"
    assert not list(tmp_path.glob(".*"))
    train(cached_base(), ROWS, settings=settings_of(), out=out, overwrite=True, resume=True)
    assert content(out) == content(whole)


# what goes wrong


def test_a_loss_that_is_not_finite_ends_the_run_with_nothing_half_written(tmp_path: Path) -> None:
    base, out = fresh_base(), tmp_path / "p.safetensors"

    def spoil(progress: TrainingProgress) -> None:
        if progress.step == 2:
            base.model.get_parameter("transformer.ln_f.bias")[7] = math.nan

    with pytest.raises(
        TrainingError, match=r"^the loss is nan and .* at step 3: lower the learning rate \(now 0.05\), or"
    ):
        train(base, ROWS, settings=settings_of(), out=out, on_step=spoil)
    assert not list(tmp_path.iterdir())


def test_a_development_loss_that_is_not_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.training.mean_loss", lambda *_, **__: math.nan)
    message = r"^the development loss is nan after step 4: lower the learning rate \(now 0.05\), or look for odd dev"
    with pytest.raises(TrainingError, match=message):
        train(cached_base(), ROWS, dev=DEV, settings=settings_of())


def test_a_prefix_that_no_base_would_take_is_not_what_training_gives(tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    settings = settings_of(lr=1e6, warmup=0.0, epochs=1, batch_size=len(ROWS))
    with pytest.raises(
        TrainingError,
        match=r"^decoder.\d: expected numbers up to 1,000,000; got .* train the prefix anew, with a lower",
    ):
        train(cached_base(), ROWS, settings=settings, out=out)
    assert not out.exists()


class Elsewhere(_Alone):
    """Of two processes that do not see the same disk, the one that sees the checkpoint."""

    num_processes = 2

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor / 2 if reduction == "mean" else tensor


def test_a_checkpoint_that_not_all_processes_see_is_not_gone_on_from(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "p.safetensors", cast(Any, Elsewhere())

    def kill(progress: TrainingProgress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            cached_base(),
            ROWS,
            settings=settings_of(),
            out=out,
            checkpoint_every=1,
            accelerator=elsewhere,
            on_step=kill,
        )
    checkpoint = f"{out}.checkpoint"
    with pytest.raises(
        TrainingError, match=f"expected every process to see the checkpoint {re.escape(checkpoint)}: put"
    ):
        train(cached_base(), ROWS, settings=settings_of(), out=out, resume=True, accelerator=elsewhere)
    assert Path(checkpoint).exists()


def test_embeddings_of_a_base_in_float64_learn_in_it() -> None:
    base = fresh_base(dtype=torch.float64)
    prefix = train(base, ROWS, settings=settings_of(reparametrization="embedding", epochs=1))
    assert prefix.dtype == "float64"


def test_a_gradient_that_is_not_finite_never_reaches_the_prefix(tmp_path: Path) -> None:
    base, out = fresh_base(), tmp_path / "p.safetensors"
    calls = []

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            calls.append(output)
            if len(calls) == 3:
                output.register_hook(lambda gradient: gradient * math.inf)

    base.model.get_submodule("transformer.ln_f").register_forward_hook(spoil)
    with pytest.raises(
        TrainingError, match=r"^the loss is [\d.]+ and the norm of its gradient (nan|inf) at step 3: lower"
    ):
        train(base, ROWS, settings=settings_of(), out=out, checkpoint_every=1)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors.checkpoint"]
    train(base, ROWS, settings=settings_of(), out=out, resume=True)
    assert Prefix.load(out, base).length == 5


def test_a_run_that_fails_leaves_the_base_as_it_was() -> None:
    base = fresh_base()
    before, implementation = base_bytes(base), base.model.config._attn_implementation
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules()]
    for checkpointing in (False, True):
        with pytest.raises(Killed):
            train(base, ROWS, settings=settings_of(gradient_checkpointing=checkpointing), on_step=killed_at(3))
        assert not any(module.training for module in base.model.modules())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())
    with checkpointed(base, True):
        train(base, ROWS, settings=settings_of(gradient_checkpointing=True, epochs=1))
        assert any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules()] == hooks
    assert base_bytes(base) == before
    assert base.model.config._attn_implementation == implementation
    assert not hasattr(base.model, "foreword")


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bart", "t5"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(family: str) -> None:
    base = cached_base(family)
    runs = {}
    for checkpointing in (False, True):
        calls, losses = [], []
        layer = next(m for name, m in base.model.named_modules() if name.endswith((".0.mlp", ".0.fc1", ".0.layer.1")))
        handle = layer.register_forward_pre_hook(lambda *_, to=calls: to.append(1))
        settings = settings_of(gradient_checkpointing=checkpointing)
        prefix = train(base, ROWS, settings=settings, on_step=lambda p, to=losses: to.append(p.loss))
        handle.remove()
        runs[checkpointing] = len(calls), losses, matrices_of(prefix)
    without, with_it = runs[False], runs[True]
    assert with_it[0] == 2 * without[0] - 1, "but for the initialization, layers run twice"
    assert with_it[1] == pytest.approx(without[1], rel=1e-6)
    for section, matrix in without[2].items():
        torch.testing.assert_close(with_it[2][section], matrix, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 0}, "expected length of at least 1; got 0"),
        ({"epochs": 2.5}, "expected a whole number for epochs; got 2.5"),
        ({"batch_size": "4"}, "expected a whole number for batch_size; got '4'"),
        ({"lr": "fast"}, "expected a number for lr; got 'fast'"),
        ({"lr": 10**400}, "expected a number for lr; got 1000"),
        ({"epochs": 0}, "expected epochs of at least 1; got 0"),
        ({"batch_size": 0}, "expected batch_size of at least 1; got 0"),
        ({"accumulation": 0}, "expected accumulation of at least 1; got 0"),
        ({"max_output_tokens": 0}, "expected max_output_tokens of at least 1; got 0"),
        ({"hidden": 0, "reparametrization": "mlp"}, "expected hidden of at least 1; got 0"),
        (
            {"hidden": 7, "reparametrization": "direct"},
            "hidden is the size of the MLP, and the reparametrization 'direct' has none",
        ),
        ({"patience": -1}, "expected patience of at least 0; got -1"),
        ({"clip": -1.0}, "expected clip of at least 0; got -1.0"),
        ({"clip": math.nan}, "expected clip of at least 0; got nan"),
        ({"weight_decay": -0.1}, "expected weight_decay of at least 0; got -0.1"),
        ({"weight_decay": math.inf}, "expected weight_decay of at least 0; got inf"),
        ({"seed": -1}, "expected seed of at least 0; got -1"),
        ({"seed": 1 << 32}, r"expected a seed below 2\*\*32; got 4294967296"),
        ({"warmup": 1.0}, r"expected warmup, a share of the steps, in \[0, 1\); got 1.0"),
        ({"warmup": math.nan}, "expected warmup, .* got nan"),
        ({"lr": 0.0}, "expected a learning rate above 0, and no more than a million; got 0.0"),
        ({"lr": math.nan}, "expected a learning rate above 0, .* got nan"),
        ({"lr": 1e38}, "expected a learning rate above 0, .* got 1e\\+38"),
        ({"reparametrization": "lora"}, "expected a reparametrization of direct, mlp, embedding; got 'lora'"),
        ({"init": "words"}, "expected init 'activations' or 'random'; got 'words'"),
        ({"init_text": " \n"}, "expected at least one word in init_text; it is empty"),
        ({"init_text": "a \udc80"}, "expected Unicode text in init_text; got a lone surrogate"),
        ({"init_text": "words", "init": "random"}, "init_text gives activations to start from: leave it away"),
    ],
    ids=str,
)
def test_settings_out_of_their_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{message}"):
        TrainSettings(**given)


def test_settings_of_numpy_and_of_configuration_files() -> None:
    given: Any = {"length": np.int64(3), "seed": np.int32(5), "lr": "1e-2", "clip": np.float32(0.5), "weight_decay": 0}
    assert TrainSettings(**given) == TrainSettings(length=3, seed=5, lr=0.01, clip=0.5)
    prefix = train(cached_base(), ROWS, settings=TrainSettings(**given, epochs=1))
    assert prefix.length == 3
    assert train(cached_base(), ROWS, settings=TrainSettings(**{**given, "epochs": 1})).card.training["seed"] == 5


def test_what_is_gone_on_from_says_how_x_is_framed() -> None:
    base, framing = cached_base(), Framing(template="Q: {input} A:", max_input_tokens=50)
    start = own_prefix(base)
    start = Prefix(start.sections, dataclasses.replace(start.card, framing=framing))
    settings = settings_of(epochs=1)
    assert train(base, ROWS, init_from=start, settings=settings).card.framing == framing
    own = Framing(template="{input}")
    assert train(base, ROWS, init_from=start, framing=own, settings=settings).card.framing == own


def test_gradients_that_are_off_outside() -> None:
    with torch.no_grad():
        found = train(cached_base(), ROWS, settings=settings_of(epochs=1))
    assert content(found) == content(train(cached_base(), ROWS, settings=settings_of(epochs=1)))


def test_what_excludes_each_other(tmp_path: Path) -> None:
    base, out = cached_base(), tmp_path / "p.safetensors"

    def refused(message: str, kind: type[Exception] = SettingsError, **given: Any) -> None:
        with pytest.raises(kind, match=message):
            train(given.pop("base", base), given.pop("records", ROWS), **given)

    infix = train(cached_base(), ROWS, settings=settings_of(infix=True, epochs=1))
    for settings in (settings_of(), settings_of(infix=True)):
        refused("expected a prefix to go on from; got an infix", settings=settings, init_from=infix)
    refused("infix is an ablation .* has no file format", settings=settings_of(infix=True), out=out)
    refused("infix is an ablation", base=cached_base("bart"), settings=settings_of(infix=True))
    refused("patience counts epochs by their development loss: give dev", settings=settings_of(patience=1))
    refused("expected checkpoint_every of at least 1 step; got 0", checkpoint_every=0)
    refused("resume and overwrite are about the file `out`", resume=True)
    refused("expected one of torch.bfloat16, .* for the file; got torch.int8", out=out, save_dtype=torch.int8)
    refused("resume and overwrite are about the file `out`", overwrite=True)
    refused("init_text and a prefix to go on from", init_from=own_prefix(base), settings=settings_of(init_text="a"))
    refused(
        "expected mixed precision 'no' or 'bf16'; got 'fp16'",
        accelerator=SimpleNamespace(mixed_precision="fp16"),
        out=out,
    )
    refused("expected at least one record; got none", DataError, records=[])
    refused("^expected at least one development record; got none", DataError, dev=[])
    refused("^record 2: expected a non-empty output", DataError, records=[ROWS[0], {"input": "a", "output": " "}])
    refused("^development record 1: .*'output'", DataError, dev=[{"input": "a"}])
    long = [{"input": "a" * CONTEXT, "output": "b"}]
    refused(f"^record 1: expected at most {CONTEXT} positions", TooLongError, records=long)
    refused(f"^development record 1: expected at most {CONTEXT} positions", TooLongError, dev=long)
    refused("expected a prefix for the base", WrongBaseError, init_from=own_prefix(cached_base("llama")))
    assert not list(tmp_path.iterdir())


def test_virtual_tokens_count_toward_the_context() -> None:
    base = cached_base()
    room = [{"input": "a" * (CONTEXT - 5 - 4), "output": "bc"}]  # a line break, two of y, the end token
    assert train(base, room, settings=settings_of(epochs=1)).length == 5
    with pytest.raises(TooLongError, match="after 6 virtual tokens"):
        train(base, room, settings=settings_of(epochs=1, length=6))


@pytest.mark.parametrize("dev", [False, True], ids=["training", "judging"])
def test_an_infix_is_learnt_as_one(dev: bool) -> None:
    """[x; infix; y] in the first step, by hand; and where the development rows are judged."""
    base, rows = fresh_base(dtype=torch.float64), ROWS[:3]
    start = make_trainable(base, rows_of(base, rows, Framing(), length=5), settings_of(infix=True, init="random"), None)
    sections = start.fold(Card(base="b", fingerprint=base.fingerprint)).sections
    losses: dict[bool, list[float]] = {}
    for infix in (True, False):
        seen: list[float] = []
        settings = settings_of(infix=infix, init="random", batch_size=3, epochs=1, lr=1e-12)
        judged = {"dev": rows} if dev else {}
        told = lambda p, to=seen: to.append(p.dev_loss if dev else p.loss)  # noqa: E731
        train(base, rows, settings=settings, on_step=told, **judged)
        losses[infix] = seen
    total, count = 0.0, 0
    for row in rows_of(base, rows, Framing(), length=5):
        tokens = torch.tensor([[*row.x, *row.y]])
        logits = logits_by_hand(base.model, [sections], tokens, infix=[len(row.x) - 1])[0, len(row.x) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(row.y), reduction="sum").item()
        count += len(row.y)
    assert losses[True] == [pytest.approx(total / count, abs=1e-7)]
    assert losses[False] != [pytest.approx(total / count, abs=1e-3)]


def test_what_is_learnt_is_never_below_float32() -> None:
    """Small steps would be lost in a base's own bfloat16."""
    learner = Learner(fresh_base(dtype=torch.bfloat16), ROWS, dev=None, settings=settings_of(), framing=Framing())
    for group in learner.optimizer.param_groups:
        assert {parameter.dtype for parameter in group["params"]} == {torch.float32}
    for parameter in learner.trainable.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.update(1.0)
    for state in learner.optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_a_longer_y_is_cut_in_training_and_judging() -> None:
    settings = settings_of(max_output_tokens=4)
    learner = Learner(cached_base(), ROWS, dev=DEV, settings=settings, framing=Framing())
    for rows in (learner.rows, learner.dev_rows):
        assert max(len(row.y) for row in rows) == 5
        assert {row.y[-1] for row in rows} == {EOS}


def test_the_cards_losses_are_the_means_of_the_first_and_the_last_epoch() -> None:
    losses: dict[int, list[float]] = {}
    prefix = train(
        cached_base(),
        ROWS,
        settings=settings_of(epochs=3),
        on_step=lambda p: losses.setdefault(p.epoch, []).append(p.loss),
    )
    first, last = (sum(losses[epoch]) / len(losses[epoch]) for epoch in (1, 3))
    assert prefix.card.metrics == {"first_epoch_loss": pytest.approx(first), "train_loss": pytest.approx(last)}
    assert first > last


def test_infix_trains_and_comes_back() -> None:
    losses: list[float] = []
    prefix = train(
        cached_base(), ROWS, settings=settings_of(infix=True, epochs=6), on_step=lambda p: losses.append(p.loss)
    )
    assert losses[-1] < losses[0]
    assert prefix.card.training["infix"] is True


# accelerate


class Notebook(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.pages: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> None:
        return None

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config.update(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.pages.append((step, values))


def test_trackers_are_told_every_step() -> None:
    notebook = Notebook()
    accelerator = Accelerator(log_with=notebook)
    accelerator.init_trackers("foreword", config={"lr": 0.02})
    progress: list[TrainingProgress] = []
    train(cached_base(), ROWS, dev=DEV, settings=settings_of(), accelerator=accelerator, on_step=progress.append)
    accelerator.end_training()
    assert notebook.config == {"lr": 0.02}
    assert [step for step, _ in notebook.pages] == list(range(1, 9))
    for (_, page), told in zip(notebook.pages, progress, strict=True):
        speed = page.pop("tokens_per_second")
        assert speed == told.tokens / told.seconds > 0
        development = {} if told.dev_loss is None else {"dev_loss": told.dev_loss}
        assert page == {"loss": told.loss, "lr": told.lr, **development}


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_computes_in_bfloat16() -> None:
    base = cached_base("llama")
    exact: list[float] = []
    rounded: list[float] = []
    dtypes = set()
    train(base, ROWS, dev=DEV, settings=settings_of(), on_step=lambda p: exact.append(p.loss))
    AcceleratorState._reset_state(reset_partial_state=True)
    handle = base.model.get_output_embeddings().register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    train(
        base, ROWS, dev=DEV, settings=settings_of(), accelerator=accelerator, on_step=lambda p: rounded.append(p.loss)
    )
    handle.remove()
    assert dtypes == {torch.bfloat16}
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)


def test_several_processes_need_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="expected an accelerator in one of several processes: give accelerator="):
        train(cached_base(), ROWS, settings=settings_of())


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_others_have_set_up_changes_nothing() -> None:
    """As transformers' Trainer does with bf16; and what we set up does not bind them."""
    base = cached_base("llama")
    expected = train(base, ROWS, settings=settings_of()).to_bytes(torch.float32)
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    assert matrices_equal(train(base, ROWS, settings=settings_of()), Prefix.from_bytes(expected))


def matrices_equal(one: Prefix, other: Prefix) -> bool:
    return all(torch.equal(matrix, matrices_of(other)[section]) for section, matrix in matrices_of(one).items())


def train_with(accelerator: Accelerator, folder: Path, *, resume: bool = False, **settings: Any) -> None:
    with (folder / f"losses{accelerator.process_index}").open("a") as losses:
        train(
            fresh_base(dtype=torch.float64),
            ROWS,
            dev=DEV,
            settings=settings_of(epochs=3, **settings),
            accelerator=accelerator,
            out=folder / "p.safetensors",
            save_dtype=torch.float32,
            checkpoint_every=1,
            resume=resume,
            on_step=lambda p: print(repr(p.loss), file=losses),
        )


def one_of_two(folder: Path, end: str) -> None:
    """In its first run killed before its file is there; in its second the other process is late."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    with pytest.MonkeyPatch.context() as patch:
        if end == "killed":
            patch.setattr(Prefix, "save", lambda *_: 1 / 0)
        if not accelerator.is_main_process and end == "late":
            # long enough for the other to end, if it did not wait
            time.sleep(5)
        # three batches an epoch, of which the second step has one
        with pytest.raises(ZeroDivisionError) if end == "killed" and accelerator.is_main_process else nullcontext():
            train_with(accelerator, folder, batch_size=3, resume=end == "late")


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    # forked from a process of its own, since this one has threads
    for end in ("killed", "late"):
        script = f"import accelerate, pathlib, test_training as t; accelerate.debug_launcher(t.one_of_two, (pathlib.Path({str(tmp_path / 'two')!r}), {end!r}), 2)"
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
    train_with(Accelerator(), tmp_path / "one", accumulation=2, batch_size=3)
    one = [*map(float, (tmp_path / "one" / "losses0").read_text().split())]
    assert len(one) == 6
    for process in (0, 1):
        two = [*map(float, (tmp_path / "two" / f"losses{process}").read_text().split())]
        assert two == pytest.approx(one, rel=1e-12)
    theirs, ours = (Prefix.load(tmp_path / name / "p.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(matrices_of(theirs)["decoder"], matrices_of(ours)["decoder"], rtol=1e-6, atol=1e-9)
    # of the development rows each process has its share
    assert theirs.card.metrics["dev_loss"] == pytest.approx(ours.card.metrics["dev_loss"], rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["losses0", "losses1", "p.safetensors"]
