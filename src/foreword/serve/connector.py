"""How a prefix enters stock vLLM: a KV connector, loaded by vLLM through `kv_connector_module_path`.

A request's prompt begins with P placeholder tokens, and its `kv_transfer_params` name a prefix and its content (see
`placeholders`). The scheduler's side reads prefixes from the store on threads of its own and lets the request wait
meanwhile; then it answers that P tokens are there already, less those that vLLM's own cache has. The workers' side
writes them into the paged cache before the step that needs them, through the attention backend's own function, since
the memory's layout is the backend's. Each rank writes its own heads.

A request holds its prefix in memory from its admission to its end, so a preemption cannot change it. What cannot be
served fails: `vllm serve` answers such a request with its error 500 and logs the reason.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec, UniformTypeKVCacheSpecs

from foreword.errors import ForewordError, SettingsError
from foreword.prefix import Prefix
from foreword.serve.placeholders import cache_salt, parse_kv_transfer_params, placeholder_ids
from foreword.serve.residents import Residents
from foreword.store import Store, Token, Version, key_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

__all__ = ["PrefixConnector"]

READERS = 4
"""Threads that read the store."""
POLL = 1.0
"""Seconds between two looks at what was deleted from the store."""

logger = init_logger("vllm.foreword")


@dataclass
class Loads(KVConnectorMetadata):
    """What the workers do before a step.

    Args:
        vectors: [L, 2, G, N, D], for each layer the keys and the values of the N places to write, of all heads.
        slots: [N], where in the paged cache each goes.
        failed: ids of requests that cannot be served.
    """

    vectors: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    failed: list[str] = field(default_factory=list)


class ResidentStats(KVConnectorStats):
    """What is in memory now, and counts since the start; the last observation is the whole of it."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return other if other.data else self

    def reduce(self) -> dict[str, int | float]:
        return self.data

    def is_empty(self) -> bool:
        return not self.data


@dataclass(frozen=True, kw_only=True)
class Served:
    """The base that is served, as far as `Prefix.check` looks."""

    name: str
    fingerprint: str
    shapes: dict[str, list[tuple[int, int]]]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Block(Prefix):
    """A checked prefix in one piece, of which its sections are views.

    Args:
        vectors: [L, 2, G, P, D], in the base's dtype.
    """

    vectors: torch.Tensor

    def __post_init__(self) -> None:
        """Checked before; in a cold request's time to its first token once more would show."""


@dataclass
class _Wanted:
    """A request's prefix: named, on its way, in memory, or an error."""

    version: Version
    coming: Future[Prefix] | None = None
    prefix: Prefix | None = None
    error: str | None = None


class PrefixConnector(KVConnectorBase_V1):
    """Puts prefixes from a store before requests. Set up by `placeholders.kv_transfer_config`.

    Raises:
        SettingsError: vLLM is set up in a way that a prefix cannot be served with.
        StoreError: there is no such store.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if multiprocessing.parent_process() is not None:
            # Ctrl-C goes to all processes of a terminal; the server lets its texts end, and then ends vLLM's with SIGTERM
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._side: _Scheduler | _Worker
        if role == KVConnectorRole.SCHEDULER:
            self._side = self._scheduler = _Scheduler(vllm_config, kv_cache_config)
        else:
            self._side = self._worker = _Worker(vllm_config)

    def shutdown(self) -> None:
        self._side.close()

    # the scheduler's side

    def on_new_request(self, request: Request) -> None:
        self._scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._scheduler.plan(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.take_loads()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.remove(request.request_id)
        return False, None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._scheduler.stats() if self.role == KVConnectorRole.SCHEDULER else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return ResidentStats(data=data or {})

    # the workers' side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._worker.write(self._loads)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        failed = set(self._loads.failed)
        return KVConnectorTransferResults(finished_recving=set(failed), failed_recving=failed)

    @property
    def _loads(self) -> Loads:
        loads = self._get_connector_metadata()
        assert isinstance(loads, Loads)
        return loads

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: all layers were written before the step."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing is saved: a prefix is only read."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


class _Scheduler:
    """Which prefix each request has, and what of it is to be written. Everything but reading is on one thread."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        told = vllm_config.kv_transfer_config.kv_connector_extra_config
        if missing := {"store", "fingerprint", "base", "budget"} - set(told):
            raise SettingsError(
                f"kv_connector_extra_config lacks {', '.join(sorted(missing))}: make it with "
                "foreword.serve.placeholders.kv_transfer_config"
            )
        check_set_up(vllm_config)
        self._block_size = check_cache(kv_cache_config, vllm_config.model_config.max_model_len)
        model = vllm_config.model_config
        self._vocab_size = model.get_vocab_size()
        shape = (model.get_total_num_kv_heads(), model.get_head_size())
        layers = model.get_num_layers(vllm_config.parallel_config)
        self._served = Served(
            name=told["base"] or model.model,
            fingerprint=told["fingerprint"],
            shapes={"decoder": [shape] * layers},
            dtype=model.dtype,
        )
        self._store = Store(told["store"])
        self._residents = Residents(self._store, self._check, budget=told["budget"])
        self._wanted: dict[str, _Wanted] = {}
        self._loads: list[tuple[_Block, range, list[int]]] = []
        self._failed: list[str] = []
        # nobody outside this process can name a block of ours in vLLM's cache
        self._secret = secrets.token_hex(16)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="foreword-reader")
        self._ended = threading.Event()
        self._names: dict[str, set[str]] = {}
        threading.Thread(target=self._watch, name="foreword-watcher", daemon=True).start()

    def _check(self, prefix: Prefix) -> Prefix:
        prefix.check(self._served)
        vectors = torch.stack([tensor for layer in prefix.sections["decoder"] for tensor in layer]).to(
            self._served.dtype
        )
        vectors = vectors.unflatten(0, (-1, 2))
        return _Block({"decoder": [(keys, values) for keys, values in vectors]}, prefix.card, vectors)

    def add(self, request: Request) -> None:
        """A new request: note its prefix, and keep its blocks in vLLM's cache apart from all others'."""
        params = request.kv_transfer_params
        if params is None:
            return
        name, sha256, refusal = "?", "", None
        try:
            _check_request(request)
            name, sha256 = parse_kv_transfer_params(params)
        except ForewordError as error:
            refusal = error
        wanted = self._wanted[request.request_id] = _Wanted(Version(name=name, stamp=0, id="", sha256=sha256))
        if refusal is not None:
            self._fail(request, wanted, refusal)
        own = "" if request.cache_salt == cache_salt(sha256) else request.cache_salt or ""
        if request.skip_reading_prefix_cache:
            # with this set vLLM would compute the placeholders as text; a salt of its own has the same effect
            request.skip_reading_prefix_cache = False
            own = secrets.token_hex(16)
        # the cache is asked before the connector is, so this is where two contents are kept apart whatever a client sent
        request.cache_salt = f"{self._secret} {sha256} {own}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many more tokens are there; None: not known yet. (1, True) lets the workers report a failure."""
        wanted = self._wanted.get(request.request_id)
        if wanted is None:
            return 0, False
        if wanted.error is None and wanted.prefix is None:
            try:
                wanted.prefix = self._fetch(wanted)
                if wanted.prefix is None:
                    return None, False
                self._compare(request, wanted.version, wanted.prefix.length)
            except ForewordError as error:
                self._fail(request, wanted, error)
            except Exception as error:  # a filesystem raises what it likes, and that is no reason to end the engine
                logger.exception("reading %s", wanted.version)
                self._fail(request, wanted, error)
        if wanted.error is not None:
            return 1, True
        assert wanted.prefix is not None
        return max(0, wanted.prefix.length - computed), False

    def _fail(self, request: Request, wanted: _Wanted, error: Exception) -> None:
        wanted.error = str(error)
        logger.error("request %s fails: %s", request.request_id, error)

    def _fetch(self, wanted: _Wanted) -> Prefix | None:
        """The prefix, held until `remove`; None while it is read."""
        if wanted.coming is None:
            prefix = self._residents.acquire_now(wanted.version.sha256)
            if prefix is not None:
                return prefix
            wanted.coming = self._readers.submit(self._read, wanted.version)
        return wanted.coming.result() if wanted.coming.done() else None

    def _read(self, named: Version) -> Prefix:
        version = self._store.find(named.name, named.sha256)
        self._names.setdefault(key_of(named.name), set()).add(version.sha256)
        return self._residents.acquire(version)

    def _compare(self, request: Request, version: Version, length: int) -> None:
        """Refuse a prompt that does not begin with the placeholders of this very content."""
        ids = request.prompt_token_ids or []
        if ids[:length] != placeholder_ids(version.sha256, length, self._vocab_size):
            raise SettingsError(
                f"expected a prompt that begins with the {length} placeholder ids of {version}; it begins with others: "
                "make them with foreword.serve.placeholders"
            )
        if len(ids) == length:
            raise SettingsError(f"expected at least one token after the {length} placeholder ids of {version}")

    def plan(self, request: Request, blocks: list[int], count: int) -> None:
        """Blocks were allocated: the last `count` of the P tokens are to be written, or a failure reported."""
        wanted = self._wanted[request.request_id]
        if wanted.error is not None:
            self._failed.append(request.request_id)
            return
        assert isinstance(wanted.prefix, _Block)
        length = wanted.prefix.length
        span = range(length - count, length)
        slots = [blocks[i // self._block_size] * self._block_size + i % self._block_size for i in span]
        self._loads.append((wanted.prefix, span, slots))

    def take_loads(self) -> Loads:
        loads, failed = self._loads, self._failed
        self._loads, self._failed = [], []
        if not loads:
            return Loads(failed=failed)
        vectors = torch.cat([block.vectors[..., span.start : span.stop, :] for block, span, _ in loads], dim=-2)
        slots = torch.tensor([slot for *_, slots in loads for slot in slots], dtype=torch.int64)
        return Loads(vectors, slots, failed)

    def remove(self, request_id: str) -> None:
        """A request has ended: let go of its prefix, if need be when it comes."""
        wanted = self._wanted.pop(request_id, None)
        if wanted is None:
            return
        if wanted.coming is not None:
            self._residents.release_coming(wanted.version, wanted.coming)
        elif wanted.prefix is not None:
            self._residents.release(wanted.version)

    def stats(self) -> ResidentStats:
        return ResidentStats(data=self._residents.figures())

    def _watch(self) -> None:
        """Forget the prefixes whose names are deleted from the store; and end with the process that started this one.

        vLLM's processes outlive a server that was killed, with the base in their memory, and nobody can ask them anything.
        """
        since = Token(time=int(time.time() * 1e6))
        parent = multiprocessing.parent_process()
        while not self._ended.wait(POLL):
            if parent is not None and os.getppid() != parent.pid:
                logger.error("the server has ended without a word, and so do vLLM's processes")
                os._exit(1)
            if not self._names:
                continue
            try:
                changes = self._store.changes(since)
            except Exception:  # as above; the next look sees what this one did not
                logger.exception("looking for changes in %s", self._store.url)
                continue
            since = changes.token
            for change in changes.items:
                if change.version is None:
                    self._residents.forget(self._names.pop(change.key, set()))

    def close(self) -> None:
        self._ended.set()
        self._residents.close()
        self._readers.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """Writes this rank's heads into its paged cache."""

    def __init__(self, vllm_config: VllmConfig):
        self._context: Mapping[str, Any] = vllm_config.compilation_config.static_forward_context
        groups = vllm_config.model_config.get_total_num_kv_heads()
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        # where there are more ranks than heads, several have the same
        first = rank * groups // ranks
        self._heads = slice(first, first + max(1, groups // ranks))
        self._layers: list[Any] = []

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = {extract_layer_index(name): self._context[name] for name in kv_caches}
        assert sorted(layers) == list(range(len(kv_caches))), "expected one attention in each layer"
        self._layers = [layers[i] for i in range(len(layers))]
        for layer in self._layers:
            if not hasattr(layer.impl, "do_kv_cache_update"):
                raise SettingsError(
                    f"expected an attention backend that can write its cache; {type(layer.impl).__name__} has no "
                    "do_kv_cache_update: choose another one with --attention-backend"
                )

    def write(self, loads: Loads) -> None:
        if loads.vectors is None or loads.slots is None:
            return
        device = self._layers[0].kv_cache.device
        slots = loads.slots.to(device, non_blocking=True)
        vectors = loads.vectors[:, :, self._heads].transpose(2, 3).contiguous().to(device, non_blocking=True)
        for layer, (keys, values) in zip(self._layers, vectors, strict=True):
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

    def close(self) -> None:
        """Nothing is held."""


def _check_request(request: Request) -> None:
    """Refuse what cannot go together with a prefix."""
    params = request.sampling_params
    if params is not None and (params.prompt_logprobs, params.prompt_logprob_token_ids) != (None, None):
        raise SettingsError("a request with a prefix can have no prompt_logprobs: virtual tokens have none")
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        raise SettingsError("a request with a prefix can have no prompt_embeds: send token ids")
    if request.resumable:
        raise SettingsError("a request with a prefix cannot come in pieces: send the whole prompt")


def check_set_up(vllm_config: VllmConfig) -> None:
    """Refuse settings under which a prefix would be lost or doubled.

    Raises:
        SettingsError: see its text.
    """
    config = vllm_config.kv_transfer_config
    if config.kv_load_failure_policy != "fail":
        raise SettingsError(
            "expected kv_load_failure_policy 'fail'; with 'recompute' placeholders would be computed as text"
        )
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise SettingsError(
                f"expected {name} 1; got {getattr(parallel, name)}: prefixes go with tensor parallel alone"
            )
    if vllm_config.speculative_config is not None:
        raise SettingsError("prefixes do not go with speculative decoding, whose own model has none: switch it off")


def check_cache(kv_cache_config: KVCacheConfig, max_model_len: int) -> int:
    """The block size of a cache of plain attention layers.

    Raises:
        SettingsError: layers are of another kind, or their window is shorter than the context.
    """
    (group,) = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    specs = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    for one in specs:
        if type(one) not in (FullAttentionSpec, SlidingWindowSpec):
            raise SettingsError(f"expected plain attention layers; this base has {type(one).__name__}")
        window = one.sliding_window
        if window is not None and window < max_model_len:
            raise SettingsError(
                f"expected a sliding window that covers the context of {max_model_len}; this base's is {window}, beyond "
                f"which the prefix would be lost: set max_model_len to {window} or less, or use the local engine"
            )
    return int(spec.block_size)
