"""The engine `vllm` on two ranks, on other families, at its end, and what it refuses before it starts."""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make setup-vllm, then make test-vllm")

from serving import make_base, save
from vllm_harness import LENGTHS, OPTIONS, SIZES, TEXTS, Row, harness, save_base

from foreword.bases import load_base
from foreword.errors import BaseLoadError, SettingsError
from foreword.serve.choose import choose_engine
from foreword.serve.engine import EngineStoppedError
from foreword.serve.vllm import VllmEngine, base_for_vllm
from foreword.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.filterwarnings("default")]

ROWS: list[Row] = [(text, name) for text in TEXTS for name in (None, *LENGTHS)]


def test_each_rank_has_its_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with harness(tmp_path, ranks=2, options={"num_gpu_blocks_override": 64}) as two:
        two.check(ROWS)
        two.check(ROWS)
        five = two.versions["five"]
        assert five is not None
        # a failure is told by every rank, and ends none
        assert two.ask(two.frame("x"), five)[1] == "error"
        two.check(ROWS[:5])


def test_gpt2_and_the_engines_end(tmp_path: Path) -> None:
    with harness(tmp_path, "gpt2", ends=(258, *range(0, 256, 9))) as one:
        one.check(ROWS, distinct=0.7)
        pieces = one.run(one.pieces(one.request(TEXTS[0], "five", 200)))
        ended = [token for piece in pieces for token in piece.tokens]
        assert ended[-1] in (258, *range(0, 256, 9))
        assert pieces[-1].finish == "stop"

        async def work() -> None:
            running = [
                asyncio.create_task(one.text(one.request(TEXTS[0], name, 300, stop=("~~",)))) for name in LENGTHS
            ]
            quick = asyncio.create_task(one.text(one.request(TEXTS[0], None, 1)))
            await quick
            stopping = asyncio.create_task(one.engine.stop(0))
            await asyncio.sleep(0)
            with pytest.raises(EngineStoppedError, match="the engine is not running"):
                await one.text(one.request("a", None))
            results = await asyncio.gather(*running, return_exceptions=True)
            assert all(isinstance(result, str | EngineStoppedError) for result in results)
            assert any(isinstance(result, EngineStoppedError) for result in results)
            await stopping
            await one.engine.stop(0)

        one.run(work())


@pytest.mark.parametrize("family", [family for family in SIZES if family not in ("llama", "mistral", "gpt2")])
def test_another_family(family: str, tmp_path: Path) -> None:
    with harness(tmp_path, family) as one:
        one.check(ROWS, distinct=0.7 if family == "gpt_neox" else 1)


def test_a_base_without_its_weights(tmp_path: Path) -> None:
    name = save_base(tmp_path / "base")
    light, whole = base_for_vllm(name), load_base(name)
    assert light.model.device.type == "meta"
    assert (light.fingerprint, light.shapes, light.context) == (whole.fingerprint, whole.shapes, whole.context)
    with pytest.raises(BaseLoadError, match="no model at"):
        base_for_vllm(str(tmp_path / "none"))


def test_bases_and_stores_that_vllm_cannot_serve(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", create=True)
    with pytest.raises(
        SettingsError, match="vLLM serves decoder-only bases; 'tiny-bart' has an encoder: use the local"
    ):
        VllmEngine(make_base("bart"), store)
    base = load_base(save_base(tmp_path / "base"))
    with pytest.raises(SettingsError, match="vLLM's processes cannot see the store memory://x: use a folder"):
        VllmEngine(base, Store("memory://x", create=True))

    with pytest.raises(SettingsError, match="vLLM does not start with these options: .*no_such"):
        VllmEngine(base, store, options={"no_such": 1})
    with pytest.raises(SettingsError, match="expected other options for vLLM; model are set by foreword"):
        VllmEngine(base, store, options={"model": "x"})


def test_what_vllm_finds_out_as_it_starts(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path / "base"))
    options = {**OPTIONS, "num_gpu_blocks_override": 2}
    engine = VllmEngine(base, Store(tmp_path / "store", create=True), options=options)
    with pytest.raises(
        SettingsError, match="vLLM did not start with the base '.*base': see what it logged, or use the"
    ):
        asyncio.run(engine.start())
    assert multiprocessing.active_children() == []


def test_a_short_window_is_refused_by_name(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path / "base", "mistral", sliding_window=97))
    store = Store(tmp_path / "store", create=True)
    with pytest.raises(SettingsError, match=r"window that covers the context of 389; that of '.*base' is 97: set max_"):
        VllmEngine(base, store)
    assert VllmEngine(base, store, options={"max_model_len": 97}).context == 97


def test_which_engine_is_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "store", create=True)
    llama, mistral = (save_base(tmp_path / family, family) for family in ("llama", "mistral"))
    bart = save(make_base("bart"), tmp_path / "bart")
    for kind, name, expected in [
        ("auto", llama, "vllm"), ("vllm", llama, "vllm"), ("local", llama, "local"), ("auto", mistral, "local"), ("auto", bart, "local"),
    ]:  # fmt: skip
        base, engine = choose_engine(kind, name, store, cache_bytes=1 << 26)
        assert (engine.name, base.is_encoder_decoder) == (expected, name == bart)
        assert base.model.device.type == ("meta" if expected == "vllm" else "cpu")
    reasons = [record.getMessage() for record in caplog.records if record.name == "foreword.serve.choose"]
    assert [reason.partition(":")[0] for reason in reasons] == ["the engine local, since"] * 2
    assert "expected a sliding window that covers" in reasons[0]
    assert "has an encoder" in reasons[1]
    for name in (bart, mistral):
        with pytest.raises(SettingsError, match="use the local engine"):
            choose_engine("vllm", name, store)


def test_the_devices_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    store = Store(tmp_path / "store", create=True)
    name = save_base(tmp_path / "base")
    for device in ("cpu", "cpu:0"):
        assert choose_engine("vllm", name, store, device=device, cache_bytes=1 << 26)[1].name == "vllm"
    # the engine local is asked, which there is none for here
    with pytest.raises(SettingsError, match="expected a device of this machine, such as cpu; got 'cuda'"):
        choose_engine("auto", name, store, device="cuda")
    with pytest.raises(SettingsError, match="expected the device 'cpu', which vLLM is for here; got 'cuda:1': set"):
        choose_engine("vllm", name, store, device="cuda:1")
    # where vLLM was built for another device, that one's dtype counts, and not the processor's
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "supported_dtypes", [torch.float16])
    assert base_for_vllm(name).dtype == torch.float16
    assert base_for_vllm(name, dtype="float32").dtype == torch.float32

    def no_device(self: AsyncEngineArgs) -> None:
        raise RuntimeError("Device string must not be empty")

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", no_device)
    assert choose_engine("auto", name, store)[1].name == "local"
    with pytest.raises(SettingsError, match="vLLM does not start with these options: Device string must not be empty"):
        choose_engine("vllm", name, store)
