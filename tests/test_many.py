"""Many users at once: each gets what training alone gives, whoever else is there and whatever goes wrong with them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
import re
import tracemalloc
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Killed, cached_base, content, fresh_base, own_prefix, settings_of
from tiny import CONTEXT, MAIN, base_bytes
from tokenizers import normalizers

import foreword.many
from foreword.bases import Base
from foreword.errors import DataError, NoSuchPrefixError, SettingsError, WrongBaseError
from foreword.learner import Learner
from foreword.many import UserFile, UserReport, train_many
from foreword.prefix import Framing, Prefix
from foreword.reparam import MLPPrefix, matrices_of
from foreword.store import Store, Version
from foreword.training import TrainSettings, train

Rows = list[dict[str, Any]]

SIZES = {"ann": 5, "bob": 3, "cyd": 1, "dee": 7, "eve": 4}
EXACT = ("gpt2", "opt", "bart")
"""Families that compute in float64 all through, where the base is in float64."""


def rows_of_user(user: str, count: int, word: str = "") -> Rows:
    """Of unequal lengths, and unlike any other user's."""
    order = [(3 * n + len(user) + ord(user[0])) % 7 + 1 for n in range(count)]
    return [{"input": f"{user}{word} {n}", "output": f"{user[-1]}" * n + word} for n in order]


USERS = {user: rows_of_user(user, count) for user, count in SIZES.items()}
DEV = {user: rows_of_user(user, 2 + i % 3, "!") for i, user in enumerate(SIZES)}


def user_file(path: Path, users: Mapping[str, Rows], *, order: Iterable[str] | None = None) -> UserFile:
    """The users' lines one by one in turn, so that nobody's stand together."""
    left = {user: list(users[user]) for user in order or users}
    with path.open("w") as file:
        while any(left.values()):
            for user, rows in left.items():
                if rows:
                    file.write(json.dumps({"user": user, **rows.pop(0)}) + "\n")
    return UserFile(path)


class Exact:
    """A store that keeps prefixes as they were trained, unrounded."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Version, Prefix]] = {}

    def put(self, name: str, prefix: Prefix, *, dtype: torch.dtype) -> Version:
        assert name not in self.kept, "trained twice"
        version = Version(name=name, stamp=len(self.kept), id="0" * 8, sha256=f"{len(self.kept):064x}")
        self.kept[name] = version, prefix
        return version

    def newest(self, name: str) -> Version:
        if name not in self.kept:
            raise NoSuchPrefixError(name)
        return self.kept[name][0]

    def get(self, name: str, version: Version) -> Prefix:
        assert version == self.kept[name][0]
        return self.kept[name][1]

    @property
    def prefixes(self) -> dict[str, Prefix]:
        return {name: prefix for name, (_, prefix) in self.kept.items()}


def many(
    base: Base, data: UserFile, store: Any = None, **given: Any
) -> tuple[dict[str, Prefix], dict[str, UserReport]]:
    store = store or Exact()
    reports = list(train_many(base, data, store, **{"save_dtype": torch.float64, **given}))
    assert len({report.user for report in reports}) == len(reports)
    return store.prefixes, {report.user: report for report in reports}


@functools.cache
def alone(family: str, user: str, settings: TrainSettings, dev: bool = False, start: int | None = None) -> Prefix:
    base = cached_base(family, torch.float64)
    return train(
        base,
        USERS[user],
        dev=DEV[user] if dev else None,
        settings=settings,
        init_from=None if start is None else warm_start(base, start),
    )


warm_start = functools.cache(own_prefix)
"""One, since the card says when it was made."""


def assert_equal(ours: Prefix, theirs: Prefix, tolerance: float) -> None:
    assert ours.dtype == theirs.dtype == "float64"
    for section, matrix in matrices64(theirs).items():
        torch.testing.assert_close(matrices64(ours)[section], matrix, rtol=0, atol=tolerance)
    assert ours.card.metrics == pytest.approx(theirs.card.metrics, abs=tolerance)
    assert trained(ours) == dict(theirs.card.training)


def trained(prefix: Prefix) -> dict[str, Any]:
    """What the card says of the training, but for the hash of the rows that many users' prefixes have beside it."""
    assert len(prefix.card.training["source"]) == 64
    return {name: value for name, value in prefix.card.training.items() if name != "source"}


def matrices64(prefix: Prefix) -> dict[str, torch.Tensor]:
    """Unlike `matrices_of`, nothing is rounded."""
    return {
        section: torch.stack([tensor.transpose(0, 1).flatten(1) for layer in layers for tensor in layer])
        for section, layers in prefix.sections.items()
    }


def assert_as_alone(prefixes: Mapping[str, Prefix], family: str, settings: TrainSettings, **given: Any) -> None:
    for user, prefix in prefixes.items():
        assert_equal(prefix, alone(family, user, settings, **given), 1e-9 if family in EXACT else 1e-4)


DIRECT = settings_of()
MLP = settings_of(reparametrization="mlp", hidden=13, lr=0.01)


# as if alone


@pytest.mark.parametrize("settings", [DIRECT, MLP], ids=["direct", "mlp"])
@pytest.mark.parametrize("family", MAIN)
def test_everybody_gets_what_training_alone_gives(family: str, settings: TrainSettings, tmp_path: Path) -> None:
    base = cached_base(family, torch.float64)
    before = base_bytes(base)
    prefixes, reports = many(base, user_file(tmp_path / "u.jsonl", USERS), settings=settings, slots=3, rows_at_once=5)
    assert set(prefixes) == set(reports) == set(USERS)
    assert_as_alone(prefixes, family, settings)
    for user, report in reports.items():
        assert (report.rows, report.passes, report.error, report.skipped) == (SIZES[user], 2 * SIZES[user], None, False)
        assert report.metrics == prefixes[user].card.metrics
    assert base_bytes(base) == before
    assert not hasattr(base.model, "foreword")
    # users differ by far more than the bound
    a, b = (matrices_of(prefixes[user])["decoder"] for user in ("ann", "dee"))
    assert (a - b).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize(("slots", "rows_at_once"), [(1, 1), (1, 50), (2, 3), (50, 4), (50, 1000)])
def test_whatever_the_slots_the_rows_at_once_and_the_order(
    family: str, slots: int, rows_at_once: int, tmp_path: Path
) -> None:
    order = sorted(USERS, reverse=slots % 2 == 0)
    data = user_file(tmp_path / "u.jsonl", USERS, order=order)
    base = cached_base(family, torch.float64)
    batches: list[int] = []
    handle = base.model.get_output_embeddings().register_forward_hook(
        lambda *_: (
            batches.append(len(base.model.get_submodule("foreword").slots))  # type: ignore[union-attr, arg-type]
            if hasattr(base.model, "foreword")
            else None
        )
    )
    prefixes, _ = many(base, data, settings=DIRECT, slots=slots, rows_at_once=rows_at_once)
    handle.remove()
    assert max(batches) == min(slots, len(USERS))
    assert len(prefixes) == len(USERS)
    assert_as_alone(prefixes, family, DIRECT)


def test_company_changes_nothing(tmp_path: Path) -> None:
    base = cached_base("gpt2", torch.float64)
    for company in (["ann"], ["ann", "dee"], ["bob", "ann", "cyd"]):
        prefixes, _ = many(base, user_file(tmp_path / "u.jsonl", USERS, order=company), settings=DIRECT)
        assert_as_alone(prefixes, "gpt2", DIRECT)


def test_no_more_rows_than_asked_go_through_the_base_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, seen, real = fresh_base(), [], foreword.many.token_losses

    def counted(base: Base, attachment: Any, batch: Any) -> torch.Tensor:
        seen.append(len(batch.infix))
        return real(base, attachment, batch)

    monkeypatch.setattr(foreword.many, "token_losses", counted)
    many(base, user_file(tmp_path / "u.jsonl", USERS), settings=settings_of(init="random"), slots=4, rows_at_once=3)
    # 4 slots of 2 rows: 3, 3, 2
    assert max(seen) == 3
    assert len(seen) < 2 * sum(SIZES.values()) * 2 / 3


def test_long_rows_go_through_the_base_with_fewer_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, seen = fresh_base(dtype=torch.float64), []
    monkeypatch.setattr("foreword.batching.TOKENS_AT_ONCE", 31)
    base.model.transformer.wte.register_forward_hook(lambda m, i, o: seen.append(o.shape[:2].numel()))
    rows = {**USERS, "long": [{"input": "x" * 40, "output": "y"}]}
    prefixes, _ = many(base, user_file(tmp_path / "u.jsonl", rows), settings=DIRECT, slots=3)
    assert len(prefixes.pop("long").sections) == 1
    assert sorted(set(seen))[-1] > 40
    assert sorted(set(seen))[-2] <= 31
    assert_as_alone(prefixes, "gpt2", DIRECT)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_accumulation_clipping_decay_and_checkpointing_are_each_users_own(family: str, tmp_path: Path) -> None:
    settings = settings_of(
        accumulation=3, clip=0.02, weight_decay=0.1, epochs=3, gradient_checkpointing=True, warmup=0.4
    )
    base, calls = cached_base(family, torch.float64), collections.Counter()
    layer = next(module for name, module in base.model.named_modules() if name.endswith((".0.mlp", ".0.fc1")))
    prefixes: dict[str, Prefix] = {}
    for checkpointing in (False, True):
        handle = layer.register_forward_pre_hook(
            lambda *_, to=checkpointing: calls.update({to: torch.is_grad_enabled()})
        )
        one = dataclasses.replace(settings, gradient_checkpointing=checkpointing)
        prefixes, _ = many(base, user_file(tmp_path / "u.jsonl", USERS), settings=one, slots=3, rows_at_once=4)
        handle.remove()
    assert calls[True] == 2 * calls[False] > 0, "layers run again for the backward pass"
    assert_as_alone(prefixes, family, settings)
    assert not any(module.training for module in base.model.modules())


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_early_stopping_is_each_users_own(family: str, tmp_path: Path) -> None:
    settings = settings_of(epochs=4, patience=1, lr=2.0)
    data, dev = user_file(tmp_path / "u.jsonl", USERS), user_file(tmp_path / "d.jsonl", DEV)
    prefixes, reports = many(cached_base(family, torch.float64), data, dev=dev, settings=settings, slots=2)
    assert_as_alone(prefixes, family, settings, dev=True)
    epochs = {reports[user].passes / rows for user, rows in SIZES.items()}
    assert len(epochs) > 1, "the settings stop everybody at the same epoch, which shows nothing"
    assert all("dev_loss" in report.metrics for report in reports.values())


@pytest.mark.parametrize("settings", [settings_of(), settings_of(reparametrization="mlp", hidden=13)], ids=["d", "m"])
def test_a_warm_start(settings: TrainSettings, tmp_path: Path) -> None:
    base = cached_base("gpt2", torch.float64)
    start = warm_start(base, 7)
    prefixes, _ = many(base, user_file(tmp_path / "u.jsonl", USERS), settings=settings, init_from=start, slots=3)
    assert_as_alone(prefixes, "gpt2", settings, start=7)
    assert {(prefix.length, prefix.card.init) for prefix in prefixes.values()} == {(7, "prefix")}


def test_gradients_that_are_off_outside(tmp_path: Path) -> None:
    with torch.no_grad():
        prefixes, _ = many(
            cached_base("gpt2", torch.float64), user_file(tmp_path / "u.jsonl", USERS), settings=settings_of()
        )
    assert_as_alone(prefixes, "gpt2", settings_of())


def test_the_embedding_ablation_too(tmp_path: Path) -> None:
    settings = settings_of(reparametrization="embedding")
    prefixes, _ = many(
        cached_base("gpt2", torch.float64), user_file(tmp_path / "u.jsonl", USERS), settings=settings, slots=3
    )
    assert len(prefixes) == len(USERS)
    # its keys and values are computed by the base and kept in float32
    for user, prefix in prefixes.items():
        theirs = alone("gpt2", user, settings)
        torch.testing.assert_close(matrices_of(prefix), matrices_of(theirs), rtol=0, atol=1e-5)


def test_split_over_processes(tmp_path: Path) -> None:
    base = cached_base("gpt2", torch.float64)
    data = user_file(tmp_path / "u.jsonl", USERS)
    both = [many(base, data, settings=DIRECT, slots=2, process=process, processes=2)[0] for process in (0, 1)]
    assert [sorted(part) for part in both] == [["ann", "cyd", "eve"], ["bob", "dee"]]
    for part in both:
        assert_as_alone(part, "gpt2", DIRECT)


def test_slots_are_never_idle(tmp_path: Path) -> None:
    steps: list[int] = []
    settings = settings_of(batch_size=1, epochs=1)
    many(cached_base(), user_file(tmp_path / "u.jsonl", USERS), settings=settings, slots=2, on_step=steps.append)
    # with a row a step, rows are slots: ann 5, then eve 4, beside bob 3, cyd 1, dee 7
    assert steps == [2] * 9 + [1] * 2


def test_reports_come_when_users_are_done(tmp_path: Path) -> None:
    told: list[str | int] = []
    data = user_file(tmp_path / "u.jsonl", USERS)
    settings = settings_of(batch_size=1, epochs=1)
    for report in train_many(cached_base(), data, Exact(), settings=settings, slots=5, on_step=told.append):  # type: ignore[arg-type]
        told.append(report.user)
        assert not hasattr(cached_base().model, "foreword"), "the caller may use the base between reports"
    assert [one for one in told if isinstance(one, str)] == ["cyd", "bob", "eve", "ann", "dee"]
    assert told[:2] == [5, "cyd"]


# poisoned


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("where", ["forward", "backward", "judging"])
def test_rows_that_memory_has_no_room_for_stay_with_their_user(
    family: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever shares the batch is run again without them; no gradient counts twice."""
    real, calls = foreword.many.token_losses, []

    def scarce(base: Base, attachment: Any, batch: Any) -> torch.Tensor:
        losses = real(base, attachment, batch)
        calls.append(len(batch.infix))
        ids = batch.inputs["input_ids"]
        if "zoe" in base.tokenizer.decode(ids.flatten()) and (where != "judging" or not losses.requires_grad):
            if where == "backward":
                losses.register_hook(lambda _: no_room())
                return losses
            no_room()
        return losses

    def no_room() -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(foreword.many, "token_losses", scarce)
    users = {"ann": USERS["ann"], "zoe": rows_of_user("zoe", 4), "dee": USERS["dee"]}
    dev = {**DEV, "zoe": rows_of_user("zoe", 2)} if where == "judging" else DEV
    data, dev_data = user_file(tmp_path / "u.jsonl", users), user_file(tmp_path / "d.jsonl", dev)
    judged = {"dev": dev_data} if where == "judging" else {}
    base = cached_base(family, torch.float64)
    prefixes, reports = many(base, data, settings=DIRECT, slots=3, rows_at_once=16, **judged)
    assert set(prefixes) == {"ann", "dee"}
    assert re.fullmatch(
        r"a row of \d+ tokens: the memory does not suffice: drop or shorten it", str(reports["zoe"].error)
    )
    assert 1 in calls
    assert_as_alone(prefixes, family, DIRECT, **({"dev": True} if where == "judging" else {}))
    monkeypatch.setattr(foreword.many, "token_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        many(base, data, settings=DIRECT)
    monkeypatch.setattr(foreword.many, "token_losses", lambda *_: torch.zeros(3) @ torch.zeros(4))
    with pytest.raises(RuntimeError, match="size"):
        many(base, data, settings=DIRECT)


def spoiled(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[torch.Tensor], object]) -> None:
    """Whoever's rows say "dee" has parameters that go wrong after so many steps."""

    class Spoiled(Learner):
        def __init__(self, base: Base, records: Any, **given: Any) -> None:
            super().__init__(base, records, **given)
            self.bad = records[0]["input"].startswith("dee")
            self.spoil()

        def update(self, loss: float) -> None:
            super().update(loss)
            self.spoil()

        @torch.no_grad()
        def spoil(self) -> None:
            if self.bad and self.step == step:
                for parameter in self.trainable.parameters():
                    change(parameter)

    monkeypatch.setattr(foreword.many, "Learner", Spoiled)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.fill_(math.nan),
        lambda p: p.view(-1)[17].fill_(math.inf),
        lambda p: p.mul_(1e200),
        lambda p: p.fill_(torch.finfo(p.dtype).max),
    ],
    ids=["nan", "one inf", "huge", "largest"],
)
def test_numbers_that_go_wrong_stay_with_their_user(
    family: str, step: int, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, step, change)
    prefixes, reports = many(
        cached_base(family, torch.float64), user_file(tmp_path / "u.jsonl", USERS), settings=DIRECT, slots=5
    )
    assert "dee" not in prefixes
    if "expected numbers up to 1,000,000" in reports["dee"].error:
        # huge keys saturate attention, and no step sees it
        assert "huge" in os.environ["PYTEST_CURRENT_TEST"]
    else:
        assert f"at step {step + 1}: lower the learning rate" in reports["dee"].error
        assert 2 * step < reports["dee"].passes <= 2 * (step + 1)
    assert reports["dee"].version is None
    assert len(prefixes) == 4
    assert_as_alone(prefixes, family, DIRECT)


def test_a_learning_rate_that_only_one_user_survives(tmp_path: Path) -> None:
    # one step a user is never felt; more than one are
    settings = settings_of(lr=1e6, warmup=0.0, clip=0.0, weight_decay=1e300, epochs=3)
    data = user_file(tmp_path / "u.jsonl", USERS)
    expected: dict[str, str | None] = {}
    for user in USERS:
        try:
            alone("gpt2", user, settings)
            expected[user] = None
        except foreword.ForewordError as error:
            expected[user] = str(error)
    _, reports = many(cached_base("gpt2", torch.float64), data, settings=settings, slots=3)
    assert any(expected.values())
    assert {user: report.error for user, report in reports.items()} == expected


def test_a_development_loss_that_is_not_finite_stays_with_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = foreword.learner.Learner.judge
    bobs = len(USERS["bob"])

    def judge(self: Any, loss: float) -> None:
        real(self, math.nan if len(self.rows) == bobs else loss)

    assert [len(rows) for rows in USERS.values()].count(bobs) == 1
    monkeypatch.setattr("foreword.learner.Learner.judge", judge)
    data, dev = user_file(tmp_path / "u.jsonl", USERS), user_file(tmp_path / "d.jsonl", DEV)
    _, reports = many(cached_base("gpt2", torch.float64), data, dev=dev, settings=DIRECT, slots=2)
    assert [user for user, report in reports.items() if report.error is not None] == ["bob"]
    assert "the development loss is nan after step" in str(reports["bob"].error)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a"}, r"^record 6: expected text in the column 'output'; got no such column"),
        ({"input": "a", "output": " \n"}, "^record 6: expected a non-empty output"),
        ({"input": "a", "output": None}, "^record 6: .* got NoneType"),
        ({"input": "a" * CONTEXT, "output": "b"}, f"^record 6: expected at most {CONTEXT} positions"),
        ({"input": "\ud800", "output": "b"}, "^record 6: expected Unicode text; got a lone surrogate"),
        ({"input": math.nan, "output": "b"}, "^record 6: expected text or a finite number"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["data", "dev"])
def test_absurd_rows_stay_with_their_user(row: Any, message: str, where: str, tmp_path: Path) -> None:
    users = {**USERS, "ann": [*USERS["ann"], row]}
    dev = {**DEV, "ann": [*USERS["ann"], row]}
    data = user_file(tmp_path / "u.jsonl", users if where == "data" else USERS)
    dev_data = user_file(tmp_path / "d.jsonl", dev) if where == "dev" else None
    prefixes, reports = many(cached_base("gpt2", torch.float64), data, dev=dev_data, settings=DIRECT, slots=2)
    error = reports["ann"].error
    with pytest.raises(DataError, match=message):
        raise DataError(str(error).removeprefix("development "))
    assert str(error).startswith("development ") == (where == "dev")
    assert reports["ann"].passes == 0
    assert sorted(prefixes) == ["bob", "cyd", "dee", "eve"]
    assert_as_alone(prefixes, "gpt2", DIRECT, dev=where == "dev")


def test_what_is_nested_too_deep_to_be_hashed_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    records = UserFile.records
    monkeypatch.setattr(UserFile, "records", lambda self, user: [{**row, "x": deep} for row in records(self, user)])
    prefixes, _ = many(
        cached_base("gpt2", torch.float64), user_file(tmp_path / "u.jsonl", USERS), settings=DIRECT, slots=2
    )
    assert sorted(prefixes) == sorted(USERS)


def test_names_that_the_store_refuses_fail_alone(tmp_path: Path) -> None:
    users = {
        "a\nb": USERS["ann"],
        "x" * 257: USERS["ann"],
        "../../up": USERS["bob"],
        "\ud800": USERS["ann"],
        "é": USERS["cyd"],
    }
    store = memory()
    reports = {
        r.user: r for r in train_many(cached_base(), user_file(tmp_path / "u.jsonl", users), store, settings=DIRECT)
    }
    errors = {user: report.error for user, report in reports.items()}
    assert "control characters" in str(errors["a\nb"])
    assert "256 characters" in str(errors["x" * 257])
    assert "U+D800" in str(errors["\ud800"])
    assert errors["../../up"] is errors["é"] is None
    assert [version.name for version in store.page().versions] == ["../../up", "é"]
    assert all(report.to_dict()["user"] == user for user, report in reports.items())


def test_a_user_without_development_rows_fails_alone(tmp_path: Path) -> None:
    data, dev = user_file(tmp_path / "u.jsonl", USERS), user_file(tmp_path / "d.jsonl", DEV, order=["ann", "bob"])
    _, reports = many(cached_base(), data, dev=dev, settings=settings_of(epochs=1))
    assert {user for user, report in reports.items() if report.error is None} == {"ann", "bob"}
    assert reports["cyd"].error == "expected at least one development record; got none"


# killed and started again


def memory() -> Store:
    return Store(f"memory://{uuid.uuid4()}", create=True)


def run(store: Store, data: UserFile, **given: Any) -> list[UserReport]:
    return list(train_many(cached_base(), data, store, **{"settings": DIRECT, "slots": 2, **given}))


def assert_whole(store: Store, whole: Store, *, same_bytes: bool) -> None:
    """Who is in the batch beside a user changes the rounding, so that bytes are the same where nobody is."""
    for user in USERS:
        assert len(store.versions(user)) == 1, "trained twice"
        ours, theirs = store.get(user), whole.get(user)
        if same_bytes:
            assert content(ours) == content(theirs)
        torch.testing.assert_close(matrices_of(ours), matrices_of(theirs), rtol=0.01, atol=1e-4)
        assert ours.card.metrics == pytest.approx(theirs.card.metrics, abs=1e-5)
        assert ours.card.training == theirs.card.training


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Store]:
    """What a run that was not killed leaves, by its slots."""
    data = user_file(tmp_path_factory.mktemp("many") / "u.jsonl", USERS)
    stores = {slots: memory() for slots in (1, 2)}
    for slots, store in stores.items():
        reports = run(store, data, slots=slots)
        assert {report.version for report in reports} == {store.newest(user).sha256 for user in USERS}
    return stores


@pytest.mark.parametrize(("slots", "step"), [(1, 1), (1, 7), (1, 23), (2, 1), (2, 6), (2, 11)])
def test_killed_at_a_step_and_started_again(slots: int, step: int, whole: dict[int, Store], tmp_path: Path) -> None:
    store, data, steps = memory(), user_file(tmp_path / "u.jsonl", USERS), []

    def kill(rows: int) -> None:
        steps.append(rows)
        if len(steps) == step:
            raise Killed

    with pytest.raises(Killed):
        run(store, data, slots=slots, on_step=kill)
    assert not hasattr(cached_base().model, "foreword")
    there = {version.name: version for version in store.page().versions}
    assert len(there) < len(USERS)
    assert (len(there) == 0) == (step == 1)
    reports = run(store, data, slots=slots)
    assert {report.user for report in reports if report.skipped} == set(there)
    for report in reports:
        assert report.error is None
        assert (report.passes == 0) == report.skipped
        assert report.metrics == store.get(report.user).card.metrics != {}
        assert report.version == store.newest(report.user).sha256
    assert all(store.newest(user) == version for user, version in there.items())
    assert_whole(store, whole[slots], same_bytes=slots == 1)


def test_a_caller_that_goes_away_leaves_the_base_bare(whole: dict[int, Store], tmp_path: Path) -> None:
    store, data = memory(), user_file(tmp_path / "u.jsonl", USERS)
    running = train_many(cached_base(), data, store, settings=DIRECT, slots=2)
    assert next(running).user == "bob"
    running.close()
    assert not hasattr(cached_base().model, "foreword")
    assert sum(report.skipped for report in run(store, data)) == 1
    assert all(report.skipped for report in run(store, data))
    assert_whole(store, whole[2], same_bytes=False)


def test_what_decides_the_outcome_is_trained_anew(tmp_path: Path) -> None:
    data = user_file(tmp_path / "u.jsonl", USERS, order=["ann", "bob"])
    for changed in (
        {"settings": settings_of(seed=1)},
        {"framing": Framing(template="{input}: ")},
        {"save_dtype": torch.float32},
        {"dev": user_file(tmp_path / "d.jsonl", DEV)},
        {"init_from": warm_start(cached_base())},
    ):
        # each against the run without it alone
        store = memory()
        run(store, data)
        assert [report.skipped for report in run(store, data, **changed)] == [False, False], changed
        assert [report.skipped for report in run(store, data, **changed)] == [True, True], changed
    store = memory()
    run(store, data)
    users = {"ann": USERS["ann"], "bob": [*USERS["bob"], {"input": "more", "output": "rows"}]}
    reports = {report.user: report.skipped for report in run(store, user_file(tmp_path / "v.jsonl", users))}
    assert reports == {"ann": True, "bob": False}


def test_another_base_dtype_version_or_chat_template_is_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen without tokenizing, where the rows are hashed alone."""
    data, settings = user_file(tmp_path / "u.jsonl", USERS, order=["ann", "bob"]), settings_of(epochs=1)
    base = fresh_base()
    other = fresh_base(seed=5)

    def skipped(store: Store, base: Base) -> list[bool]:
        given = {"settings": settings, "save_dtype": torch.float32}
        return [report.skipped for report in train_many(base, data, store, **given)]  # type: ignore[arg-type]

    for change in ("base", "dtype", "version", "chat template", "end"):
        store = memory()
        assert skipped(store, base) == [False, False]
        assert skipped(store, base) == [True, True]
        with monkeypatch.context() as patch:
            now = {"base": other, "dtype": fresh_base(dtype=torch.bfloat16)}.get(change, base)
            if change == "version":
                patch.setattr(foreword.many, "__version__", "another")
                patch.setattr("foreword.learner.__version__", "another")
            elif change == "chat template":
                patch.setattr(base.tokenizer, "chat_template", "{{ messages }}")
                patch.setattr(Learner, "identity", "not looked at")
            elif change == "end":
                patch.setattr(type(base), "end_id", property(lambda _: 7))
            assert skipped(store, now) == [False, False], change


def test_who_is_done_is_known_without_tokenizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data, dev = memory(), user_file(tmp_path / "u.jsonl", USERS), user_file(tmp_path / "d.jsonl", DEV)
    run(store, data, dev=dev)
    more = user_file(tmp_path / "v.jsonl", {user: [{**r, "more": 1} for r in rows] for user, rows in USERS.items()})
    began: list[str] = []

    class Counted(Learner):
        def __init__(self, base: Base, records: Any, **given: Any) -> None:
            began.append(records[0]["input"][:3])
            super().__init__(base, records, **given)

    monkeypatch.setattr(foreword.many, "Learner", Counted)
    assert all(report.skipped for report in run(store, data, dev=dev))
    assert began == []
    # other text, in a column that nothing reads: the tokens tell that it is the same
    assert all(report.skipped for report in run(store, more, dev=dev))
    assert sorted(began) == sorted(USERS)


def test_another_tokenizer_makes_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data, base = memory(), user_file(tmp_path / "u.jsonl", USERS), fresh_base()

    def skipped() -> set[bool]:
        reports = list(train_many(base, data, store, settings=settings_of(epochs=1)))
        assert not any(report.error for report in reports)
        return {report.skipped for report in reports}

    assert [skipped(), skipped()] == [{False}, {True}]
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "_")
    assert [skipped(), skipped()] == [{False}, {True}]
    # one that cannot be hashed whole: the tokens are looked at
    monkeypatch.setattr(type(base.tokenizer), "backend_tokenizer", None)
    assert skipped() == {True}
    base.tokenizer.eos_token = "<a>"
    assert [skipped(), skipped()] == [{False}, {True}]


def test_a_step_computes_each_prefix_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, steps = [], []
    matrices = MLPPrefix.matrices
    monkeypatch.setattr(MLPPrefix, "matrices", lambda self: computed.append(id(self)) or matrices(self))
    settings = settings_of(reparametrization="mlp", hidden=13, epochs=2, batch_size=8)
    data = user_file(tmp_path / "u.jsonl", USERS)
    many(cached_base(), data, settings=settings, slots=5, rows_at_once=1, on_step=steps.append)
    assert steps == [sum(SIZES.values())] * 2
    # in each of two steps of 20 batches, and when folded
    assert len(computed) == 5 * (2 + 1)


def test_a_damaged_prefix_is_trained_anew(tmp_path: Path) -> None:
    store, data = Store(tmp_path / "store", create=True), user_file(tmp_path / "u.jsonl", USERS, order=["ann", "bob"])
    # one at a time: who is in the batch beside her would change the rounding
    run(store, data, slots=1)
    before = content(store.get("ann"))
    (file,) = (path for path in tmp_path.rglob("*.safetensors") if store.newest("ann").sha256 in path.name)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert {report.user: report.skipped for report in run(store, data, slots=1)} == {"ann": False, "bob": True}
    assert content(store.get("ann")) == before


# what is refused


def test_settings_that_are_wrong_for_everybody(tmp_path: Path) -> None:
    data, base = user_file(tmp_path / "u.jsonl", USERS), cached_base()

    def refused(message: str, kind: type[Exception] = SettingsError, **given: Any) -> None:
        with pytest.raises(kind, match=message):
            many(given.pop("base", base), data, **given)

    refused("infix is an ablation", settings=settings_of(infix=True))
    refused("expected at least one slot and one row at once; got 0 and 32", slots=0)
    refused("expected at least one slot and one row at once; got 16 and -1", rows_at_once=-1)
    refused("expected a process of 2, counted from 0; got 2", process=2, processes=2)
    refused("expected a process of 0", processes=0)
    refused("expected one of torch.bfloat16, .* for the file; got 'float32'", save_dtype="float32")
    refused("patience counts epochs", settings=settings_of(patience=1))
    refused("init_text and a prefix", settings=settings_of(init_text="a"), init_from=own_prefix(base))
    refused("expected plain column names", framing=Framing(template="{a.b}"))
    refused("expected a prefix for the base", WrongBaseError, init_from=own_prefix(cached_base("llama")))
    embedding = settings_of(reparametrization="embedding")
    refused("need a decoder-only base", base=cached_base("bart"), settings=embedding)


# the file of users


def test_users_lines_may_stand_anywhere(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"user": "b", "input": "1", "output": "x"}\r\n',
        b"\r\n",
        '{"user": "Zoë", "input": "2", "output": "\u2028y"}\n'.encode(),
        b"   \n",
        b'{"input": "3", "user": "b", "output": "z", "more": [1]}\r\n',
        '{"user": "Zoe\u0308", "input": "4", "output": "w"}'.encode(),
    ]
    (tmp_path / "u.jsonl").write_bytes(b"".join(lines))
    data = UserFile(tmp_path / "u.jsonl")
    assert data.users == ["b", "Zoë"]
    assert len(data) == 4
    assert [data.rows(user) for user in ("b", "Zoë", "nobody")] == [2, 2, 0]
    assert [(r["input"], r["output"]) for r in data.records("Zoë")] == [("2", "\u2028y"), ("4", "w")]
    assert data.records("b")[1] == {"input": "3", "user": "b", "output": "z", "more": [1]}
    assert data.records("nobody") == []


def test_columns_by_other_names(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_text('{"who": "b", "q": "1", "a": "2", "input": "not this", "output": "nor this"}\n')
    assert UserFile(path, "who", input="q", output="a").records("b") == [
        {"who": "b", "q": "1", "a": "2", "input": "1", "output": "2"}
    ]
    with pytest.raises(DataError, match="u.jsonl, record 1 of 'b': expected the column 'p'; got 'a', 'input'"):
        UserFile(path, "who", input="p").records("b")
    with pytest.raises(SettingsError, match="expected two columns"):
        UserFile(path, "who", input="q", output="q")
    # who the user is may be part of x
    assert UserFile(path, "q", input="q").records("1")[0]["input"] == "1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"user": "b", "inp', "expected one JSON object a line; Invalid control"),
        (b"[1]", "expected a JSON object; got list"),
        (b"[" * 100_000, "expected one JSON object a line"),
        (b'{"user": "\xff"}', "expected UTF-8; byte 10 \\(0xff\\) is not"),
        (b'{"input": "a"}', "expected a user's name in the column 'user'; got no such column"),
        (b'{"user": 7}', "expected a user's name in the column 'user'; got 7: write it as text"),
        (b'{"user": null}', "expected a user's name in the column 'user'; got None"),
        (b'{"user": ""}', "expected a user's name in the column 'user'; got ''"),
        (b'{"user": ["a"]}', r"expected a user's name in the column 'user'; got \['a'\]"),
    ],
    ids=range(9),
)
def test_bad_lines_are_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_bytes(b'{"user": "b"}\n\n' + line + b'\n{"user": "c"}\n')
    with pytest.raises(DataError, match=f"u.jsonl, line 3: {message}"):
        UserFile(path)


def test_a_file_without_records(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        UserFile(tmp_path / "none.jsonl")
    for nothing in (b"", b"\n \r\n", b"\xef\xbb\xbf\n"):
        (tmp_path / "u.jsonl").write_bytes(nothing)
        with pytest.raises(DataError, match="expected at least one record; the file has none"):
            UserFile(tmp_path / "u.jsonl")


def test_nobodys_rows_get_into_anothers_prefix(tmp_path: Path) -> None:
    data = user_file(tmp_path / "u.jsonl", USERS)
    text = (tmp_path / "u.jsonl").read_text()
    (tmp_path / "u.jsonl").write_text(text.replace("ann", "bob"))
    with pytest.raises(DataError, match="the file was changed while it was read: run this again"):
        data.records("ann")
    (tmp_path / "u.jsonl").write_text(text[:100])
    with pytest.raises(DataError, match="the file was changed while it was read: run this again"):
        data.records("dee")


def test_only_places_are_held(tmp_path: Path) -> None:
    def held(users: int) -> int:
        path = tmp_path / f"{users}.jsonl"
        with path.open("w") as file:
            for row in range(10):
                for user in range(users):
                    file.write(json.dumps({"user": f"{user:05d}", "input": "x" * 700, "output": str(row)}) + "\n")
        tracemalloc.start()
        data = UserFile(path)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(data) == users * 10
        assert peak < held + 100_000, "more than a line at a time"
        return held

    few, many = held(200), held(2000)
    # of the rows' 800 bytes, some 8 for each and some 300 for each user
    assert (many - few) / 1800 < 600
