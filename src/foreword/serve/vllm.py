"""The engine `vllm`: vLLM as it comes, asynchronous, in processes of its own, with our KV connector in it.

It decides which tokens come; how they become text, and where a stop string ends it, is as in the local engine.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreword.bases import Base, built_in_folder, load_base
from foreword.builtin import BUILT_IN
from foreword.errors import ForewordError, MissingExtraError, PrefixFileError, SettingsError, one_line
from foreword.generation import end_ids
from foreword.prefix import Card, Prefix
from foreword.serve.choose import vllm_is_installed
from foreword.serve.engine import (
    Engine,
    EngineStoppedError,
    Figures,
    Finish,
    Piece,
    Request,
    Sampling,
    TokenLogprob,
    all_ended,
)
from foreword.serve.placeholders import BUDGET, cache_salt, kv_transfer_config, kv_transfer_params, placeholder_ids
from foreword.serve.residents import check_size
from foreword.serve.waiting import StoreThreads
from foreword.store import Store, Version
from foreword.text import TextSoFar

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["VllmEngine", "base_for_vllm"]

MAX_LENGTHS = 1 << 17
"""How many contents are remembered as checked, a number each."""


def base_for_vllm(name: str, *, dtype: torch.dtype | str | None = None, device: str | None = None) -> Base:
    """A base as the engine and the server beside it need it: all but its weights, which vLLM loads itself.

    Args:
        name: as `load_base` takes it.
        dtype: the same; by default and for `auto` what vLLM's device has, which is not always the processor.
        device: None, or the kind of device that vLLM was built for.

    Raises:
        SettingsError: another device. BaseLoadError, MissingExtraError, SettingsError: as `load_base` does.
    """
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if device not in (None, kind, f"{kind}:0"):
        raise SettingsError(
            f"expected the device {kind!r}, which vLLM is for here; got {device!r}: set CUDA_VISIBLE_DEVICES to choose among "
            "several, or use the local engine"
        )
    if dtype in (None, "auto") and not current_platform.is_cpu():
        dtype = current_platform.supported_dtypes[0]
    base = load_base(name, dtype=dtype, device="cpu")
    # both look at the weights, and are remembered
    assert base.fingerprint
    assert base.shapes
    model: torch.nn.Module = base.model
    model.to("meta")
    return base


class VllmEngine(Engine):
    """Serves a decoder-only base and the prefixes of a store with vLLM.

    Args:
        base: as `base_for_vllm` gives it; one with weights will do, and keeps them.
        store: where the prefixes are. Other processes open it again, so it cannot be in one process's memory.
        budget: the most bytes of host memory that prefixes may take. What waits for vLLM waits for room here, too.
        cache_bytes: memory of vLLM's cache on a CPU, of each rank; `options` can say otherwise. On a GPU vLLM takes what is left
            of its `gpu_memory_utilization`.
        ranks: processes that share each layer (tensor parallel), each with its own heads.
        options: more of vLLM's `AsyncEngineArgs`, by name; `max_model_len` bounds the context.

    Raises:
        MissingExtraError: vLLM is not installed.
        SettingsError: vLLM refuses its options, or cannot serve prefixes of this base; the local engine can.
    """

    name = "vllm"

    def __init__(
        self,
        base: Base,
        store: Store,
        *,
        budget: int = BUDGET,
        cache_bytes: int = 2 << 30,
        ranks: int = 1,
        options: Mapping[str, Any] | None = None,
    ):
        if not vllm_is_installed():
            raise MissingExtraError("vllm", "vllm")
        if base.is_encoder_decoder:
            raise SettingsError(f"vLLM serves decoder-only bases; {base.name!r} has an encoder: use the local engine")
        if store.url.startswith("memory:"):
            raise SettingsError(
                f"vLLM's processes cannot see the store {store.url}: use a folder or a shared filesystem"
            )
        self.base = base
        self.store = store
        self._threads = StoreThreads()
        self.budget = budget
        options = dict(options or {})
        given = options.get("max_model_len")
        if given is not None and (type(given) is not int or given < 1):
            raise SettingsError(f"expected vLLM's max_model_len as a whole number of at least 1; got {given!r}")
        limits = [limit for limit in (base.context, given) if limit is not None]
        self._config = self._configured(ranks, cache_bytes, {**options, "max_model_len": min(limits, default=None)})
        self.context = self._config.model_config.max_model_len
        self._ends = end_ids(base)
        self._llm: AsyncLLM | None = None
        self._starting = self._closed = False
        self._running: dict[str, asyncio.Event] = {}
        self._lengths: dict[str, int] = {}
        self._told: dict[str, float] = {}

    def _configured(self, ranks: int, cache_bytes: int, options: Mapping[str, Any]) -> VllmConfig:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform

        connector = kv_transfer_config(self.store.url, self.base.fingerprint, base=self.base.name, budget=self.budget)
        args: dict[str, Any] = {
            "model": str(_where(self.base.name)),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "tensor_parallel_size": ranks,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "kv_transfer_config": KVTransferConfig(**connector),
        }
        if current_platform.is_cpu() and "gpu_memory_utilization" not in options:
            # by itself it takes nine tenths of the machine's memory, and does not start where less is free
            args["kv_cache_memory_bytes"] = cache_bytes
        rope = getattr(self.base.model.config, "rope_parameters", None) or {}
        if (beta := rope.get("llama_4_scaling_beta")) is not None:
            # transformers has it among the rotary parameters, where vLLM does not look
            first = rope["original_max_position_embeddings"]
            args["hf_overrides"] = {"llama_4_scaling": {"original_max_position_embeddings": first, "beta": beta}}
        if clash := sorted({"model", "tensor_parallel_size", "kv_transfer_config"} & set(options)):
            raise SettingsError(f"expected other options for vLLM; {', '.join(clash)} are set by foreword")
        try:
            config = AsyncEngineArgs(**{**args, **options}).create_engine_config()
        except (TypeError, ValueError, RuntimeError) as error:
            # the last where there is no device of the kind that vLLM was built for
            raise SettingsError(f"vLLM does not start with these options: {one_line(error, 500)}") from error
        window = config.model_config.get_sliding_window()
        if window is not None and window < config.model_config.max_model_len:
            raise SettingsError(
                f"expected a sliding window that covers the context of {config.model_config.max_model_len}; that of "
                f"{self.base.name!r} is {window}: set max_model_len to {window} or less, or use the local engine"
            )
        return config

    async def start(self) -> None:
        """Start vLLM's processes and have them load the base: seconds to minutes.

        Raises:
            SettingsError: they did not start, for a reason that their log tells.
            EngineStoppedError: `stop` was called meanwhile.
        """
        self._starting = True
        try:
            self._llm = await asyncio.to_thread(self._make)
            # the first request has vLLM import and compile what it needs, for seconds
            first = Request(id="foreword-warm-up", tokens=(0,), prefix=None, sampling=Sampling(max_tokens=1))
            async with aclosing(self.generate(first)) as pieces:
                async for _ in pieces:
                    pass
        except Exception:
            await self._end(0)
            raise
        finally:
            self._starting = False

    def _make(self) -> AsyncLLM:
        from vllm.v1.engine.async_llm import AsyncLLM

        listeners = [_listener(self._told)]
        try:
            return AsyncLLM.from_vllm_config(self._config, stat_loggers=listeners, disable_log_stats=True)
        except RuntimeError as error:
            raise SettingsError(
                f"vLLM did not start with the base {self.base.name!r}: see what it logged, or use the local engine"
            ) from error

    def problem(self) -> str | None:
        dead = self._llm is not None and self._llm.errored
        return "vLLM has ended; see its log" if dead else None

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        if self._llm is None or self._closed:
            raise EngineStoppedError("the engine is not running")
        if request.id in self._running:
            raise SettingsError(f"expected an id that no request under way has; got {request.id!r}")
        ended = self._running[request.id] = asyncio.Event()
        try:
            prompt: dict[str, Any] = {"prompt_token_ids": list(request.tokens)}
            params = self._params(request)
            length = 0
            if request.prefix is not None:
                length = await self._length(request.prefix)
                sha256 = request.prefix.sha256
                ids = placeholder_ids(sha256, length, self.base.model.config.vocab_size)
                prompt = {"prompt_token_ids": [*ids, *request.tokens], "cache_salt": cache_salt(sha256)}
                params.extra_args = {"kv_transfer_params": kv_transfer_params(request.prefix)}
            self.room(len(request.tokens), length)
            async with aclosing(self._pieces(request, prompt, params)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            del self._running[request.id]
            ended.set()

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            stop_token_ids=sorted(self._ends),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    async def _pieces(self, request: Request, prompt: Any, params: Any) -> AsyncGenerator[Piece, None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self._llm is not None
        text = TextSoFar(self.base.decode, request.sampling.stop)
        try:
            async with aclosing(self._llm.generate(prompt, params, request.id)) as outputs:
                async for output in outputs:
                    (one,) = output.outputs
                    if one.finish_reason == "error":
                        await self._explain(request)
                    if one.finish_reason == "abort":
                        raise EngineStoppedError(f"the engine was stopped before the end of {request.id}")
                    piece = self._piece(text, one, request.sampling.logprobs or 0)
                    yield piece
                    if piece.finish is not None:
                        return
        except EngineDeadError:
            raise EngineStoppedError("vLLM has ended; see its log") from None

    def _piece(self, text: TextSoFar, one: Any, count: int) -> Piece:
        """What of a delta belongs to the text: nothing after a stop string."""
        shown, tokens = "", []
        for token in one.token_ids:
            tokens.append(token)
            # an end token is no text, though it may be no special one
            if token not in self._ends:
                shown += text.add(token)
            if text.stopped:
                break
        finish: Finish | None = "stop" if text.stopped else one.finish_reason
        if finish is not None:
            shown += text.end()
            finish = "stop" if text.stopped else finish
        logprobs = [_told(token, at_place, count) for token, at_place in zip(tokens, one.logprobs or (), strict=False)]
        return Piece(text=shown, tokens=tokens, logprobs=logprobs, finish=finish)

    async def _length(self, version: Version) -> int:
        """P of a version, which was read and checked once."""
        length = self._lengths.get(version.sha256)
        if length is None:
            if len(self._lengths) >= MAX_LENGTHS:
                self._lengths.clear()
            length = await self._threads.run(self._read, version)
            self._lengths[version.sha256] = length
        return length

    def _read(self, version: Version) -> int:
        data = self.store.read(version)
        return _length_told(data, self.base.fingerprint) or Prefix.from_bytes(data).check(self.base).length

    async def _explain(self, request: Request) -> None:
        """vLLM says only that a request failed; looking again says why."""
        version = request.prefix
        if version is not None:
            self._lengths.pop(version.sha256, None)
            prefix = await self._threads.run(lambda: Prefix.from_bytes(self.store.read(version)).check(self.base))
            check_size(version, prefix.num_parameters * self.base.dtype.itemsize, self.budget)
        raise PrefixFileError(f"vLLM could not serve {version or 'the request'}: see its log, and try again")

    async def forget(self, sha256s: Collection[str]) -> None:
        """Later requests look into the store again; the connector hears of deletions from the store, within seconds."""
        for sha256 in sha256s:
            self._lengths.pop(sha256, None)

    def figures(self) -> Figures:
        told = self._told
        # told after each step, and the last request may have gone since
        running = min(int(told.get("running", 0)), len(self._running))
        names = ("resident_prefixes", "resident_bytes", "hits", "loads", "evictions")
        return Figures(
            running=running,
            waiting=len(self._running) - running,
            budget_bytes=self.budget,
            **{name: int(told.get(name, 0)) for name in names},
            more={name: told[name] for name in told if name not in ("running", *names)},
        )

    async def stop(self, grace: float) -> None:
        self._closed = True
        while self._starting:
            # they would finish it first, for minutes perhaps
            for process in multiprocessing.active_children():
                if process.name.startswith("EngineCore"):
                    process.kill()
            await asyncio.sleep(0.05)
        await self._end(grace)
        self._threads.close()

    async def _end(self, grace: float) -> None:
        await all_ended(self._running.values(), grace)
        llm, self._llm = self._llm, None
        if llm is not None:
            if not llm.errored:
                await llm.abort(list(llm.output_processor.request_states), internal=True)
            if llm.output_handler is not None:
                llm.output_handler.cancel()
                await asyncio.wait([llm.output_handler])
            await asyncio.to_thread(llm.shutdown)


def _where(name: str) -> str | Path:
    """What vLLM calls a base."""
    if name in BUILT_IN:
        return built_in_folder(name)
    if Path(name).suffix == ".gguf":
        raise SettingsError(f"vLLM does not read GGUF files; {name!r} is one: use the local engine")
    return Path(name).expanduser() if Path(name).expanduser().is_dir() else name


def _length_told(data: bytes, fingerprint: str) -> int | None:
    """P as a file's header tells it; None where that is odd, and the file is to be looked at whole.

    The connector looks at it whole in any case, and a cold request's first token waits for both.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if Card.from_json(header["__metadata__"]["foreword"]).fingerprint != fingerprint:
            return None
        return int(header["decoder.0.keys"]["shape"][1]) or None
    except (ForewordError, ValueError, KeyError, TypeError, IndexError):
        return None


def _told(token: int, at_place: Mapping[int, Any], count: int) -> TokenLogprob:
    """vLLM's log-probabilities at one place: the chosen token's, and those of the `count` likeliest."""
    ranked = sorted((one.rank, other, one.logprob) for other, one in at_place.items() if one.rank is not None)
    top = tuple((other, logprob) for rank, other, logprob in ranked if rank <= count)
    return TokenLogprob(token=token, logprob=at_place[token].logprob, top=top)


def _listener(told: dict[str, float]) -> Callable[..., Any]:
    """A stat logger of vLLM's that keeps the last figures in `told`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Listener(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0):
            """Nothing to set up."""

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            if iteration_stats is not None:
                told["preemptions"] = told.get("preemptions", 0) + iteration_stats.num_preempted_reqs
            if scheduler_stats is None:
                return
            told["running"] = scheduler_stats.num_running_reqs
            told["cache_usage"] = scheduler_stats.kv_cache_usage
            caching = scheduler_stats.prefix_cache_stats
            for name, count in (("cache_queries", caching.queries), ("cache_hits", caching.hits)):
                told[name] = told.get(name, 0) + count
            told.update(scheduler_stats.kv_connector_stats or {})

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return Listener
