"""The engine `local`: transformers on one machine, a laptop's included. Rows join and leave the running batch between steps.

One thread owns the base. It lets waiting requests in while there are rows and memory, sends a chunk of their x through
the base, then gives every row a token, and so on, so that nobody waits for another's end. Where the rows' keys and values
would outgrow their memory, the youngest row is put off, and goes on later where it was.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import threading
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList

from foreword.errors import PrefixFileError, SettingsError
from foreword.generation import GenerateSettings, end_ids, sample_processors
from foreword.prefix import Prefix
from foreword.serve.engine import Engine, EngineStoppedError, Figures, Finish, Piece, Request, TokenLogprob, all_ended
from foreword.serve.residents import Residents
from foreword.serve.runner import Prefill, Row, Runner
from foreword.text import TextSoFar

if TYPE_CHECKING:
    from foreword.bases import Base
    from foreword.store import Store

__all__ = ["LocalEngine"]

PREFILL_TOKENS = 512
"""About so many tokens of x, padding counted, go through the base between two steps."""
LOADERS = 4

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """A request on its way."""

    request: Request
    out: asyncio.Queue[Piece | Exception]
    text: TextSoFar
    processors: LogitsProcessorList
    loading: Future[Prefix] | None = None
    row: Row | None = None
    limit: int = 0
    left: bool = False
    """Whether nobody waits for it any more."""
    tokens: list[int] = field(default_factory=list)
    """Those not yet told, as their text is not certain."""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return self.request.prefix is None or (self.loading is not None and self.loading.done())


class LocalEngine(Engine):
    """See the module.

    Args:
        base: the frozen base; its model has an attachment from `start` to `stop`.
        store: where prefixes are read.
        max_rows: rows that are computed at once.
        prefix_bytes: memory of the prefixes that are kept for the next request. The running rows' have a copy beside it,
            at most `max_rows` times the longest.
        cache_bytes: memory of the running rows' keys and values, padding counted, and beside it about half as much for
            rows and tokens to come. Where it cannot hold one row of the whole context, the context is what it can hold.

    Raises:
        SettingsError: a setting out of its range.
    """

    name = "local"

    def __init__(
        self,
        base: Base,
        store: Store,
        *,
        max_rows: int = 32,
        prefix_bytes: int = 1 << 30,
        cache_bytes: int = 2 << 30,
    ):
        if min(max_rows, prefix_bytes, cache_bytes) < 1:
            raise SettingsError(
                f"expected max_rows, prefix_bytes and cache_bytes of at least 1; got {max_rows}, {prefix_bytes}, {cache_bytes}"
            )
        self.base = base
        self.max_rows = max_rows
        self._residents = Residents(store, lambda prefix: prefix.check(base), budget=prefix_bytes)
        self._max_tokens = cache_bytes // _bytes_a_token(base)
        if self._max_tokens < 2:
            raise SettingsError(
                f"expected cache_bytes of more than {2 * _bytes_a_token(base):,}, two tokens' keys and values; got {cache_bytes:,}"
            )
        # an encoder-decoder base has the context twice: x's, and y's
        most = self._max_tokens // 2 if base.is_encoder_decoder else self._max_tokens
        self.is_encoder_decoder = base.is_encoder_decoder
        self.context = most if base.context is None else min(base.context, most)
        self._ends = end_ids(base)
        self._changed = threading.Condition()
        self._arrived: list[_Job] = []
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[Row, _Job] = {}
        self._prefill: Prefill | None = None
        self._under_way = 0
        self._state = "new"

    async def start(self) -> None:
        assert self._state == "new", "an engine starts once"
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._runner = Runner(self.base)
        self._loaders = ThreadPoolExecutor(LOADERS, "foreword-load")
        self._thread = threading.Thread(target=self._work, name="foreword-local", daemon=True)
        self._state = "running"
        self._thread.start()
        if self.context is not None and self.base.context is not None and self.context < self.base.context:
            log.warning(
                "texts may have %s tokens of the base's %s, for which --cache-memory has no room",
                self.context,
                self.base.context,
            )

    def problem(self) -> str | None:
        dead = self._state == "running" and not self._thread.is_alive()
        return "the engine's thread has ended" if dead else None

    def figures(self) -> Figures:
        running = len(self._jobs)
        return Figures(
            running=running,
            waiting=max(self._under_way - running, 0),
            budget_bytes=self._residents.budget,
            **self._residents.figures(),
        )

    async def forget(self, sha256s: Collection[str]) -> None:
        self._residents.forget(sha256s)

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        if self._state != "running":
            raise EngineStoppedError("the engine takes no requests: it has been stopped, or was not started")
        sampling = request.sampling
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        settings = GenerateSettings(
            max_new_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed
        )
        self.room(len(request.tokens), 0)
        job = _Job(
            request,
            asyncio.Queue(),
            TextSoFar(self.base.decode, sampling.stop),
            sample_processors(self.base, settings, [0]),
        )
        self._under_way += 1
        self._idle.clear()
        try:
            with self._changed:
                self._arrived.append(job)
                self._changed.notify()
            while True:
                piece = await job.out.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            job.left = True
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
            with self._changed:
                self._changed.notify()

    async def stop(self, grace: float) -> None:
        if self._state == "new":
            self._state = "stopped"
        if self._state == "stopped":
            return
        self._state = "stopping"
        if self._under_way and not await all_ended([self._idle], grace):
            log.warning("%d requests were cut off after %s s", self._under_way, grace)
        self._state = "stopped"
        self._residents.close()
        with self._changed:
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        # the store may hang
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._runner.detach()

    # below, all runs in the engine's own thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._state != "stopped" and not self._arrived and not self._busy():
                    self._changed.wait()
                self._waiting += self._arrived
                self._arrived = []
            told: list[tuple[_Job, Piece | Exception]] = []
            if self._state == "stopped":
                self._drop_all(EngineStoppedError("the engine was stopped before the text's end"), told)
                self._tell(told)
                return
            try:
                self._turn(told)
            except Exception as error:
                # whatever the rows were, their caches are not to be trusted any more
                log.exception("a step of the engine failed")
                self._drop_all(error, told)
            self._tell(told)

    def _busy(self) -> bool:
        """Whether there is anything to do but wait for requests and for the store."""
        return bool(self._jobs) or any(
            job.left or job.ready or job.loading is None for job in islice(self._waiting, self.max_rows)
        )

    def _tell(self, told: list[tuple[_Job, Piece | Exception]]) -> None:
        def deliver() -> None:
            for job, piece in told:
                job.out.put_nowait(piece)

        if told:
            try:
                self._loop.call_soon_threadsafe(deliver)
            except RuntimeError:
                log.warning("the event loop was closed before the engine was stopped")

    def _turn(self, told: list[tuple[_Job, Piece | Exception]]) -> None:
        """Let go, let in, a chunk of x, a step."""
        for row in [row for row in self._runner.rows if self._jobs[row].left]:
            self._runner.leave(row)
            self._end(self._jobs[row])
        prefill = self._prefill
        if prefill is not None and all(self._jobs[row].left for row in prefill.rows):
            self._runner.give_up(prefill.rows)
            for row in prefill.rows:
                self._end(self._jobs[row])
            self._prefill = None
        self._let_in(told)
        if self._prefill is not None:
            prefill = self._prefill
            logits = self._runner.advance(prefill, max(1, PREFILL_TOKENS // len(prefill.rows)))
            if logits is not None:
                self._prefill = None
                self._choose(prefill.rows, logits, told)
        while len(self._runner.rows) > 1 and self._runner.tokens_with() > self._max_tokens:
            youngest = max(self._runner.rows, key=list(self._jobs).index)
            self._runner.leave(youngest)
            self._waiting.appendleft(self._jobs.pop(youngest))
        if self._runner.rows:
            self._choose(list(self._runner.rows), self._runner.step(), told)

    def _let_in(self, told: list[tuple[_Job, Piece | Exception]]) -> None:
        """Begin to load prefixes for the next requests, and begin with those whose prefix is there."""
        for job in [job for job in self._waiting if job.left]:
            self._waiting.remove(job)
            self._end(job)
        for job in islice(self._waiting, self.max_rows):
            if job.request.prefix is not None and job.loading is None:
                # what is in memory waits for nobody's loading
                here = self._residents.acquire_now(job.request.prefix.sha256)
                if here is not None:
                    job.loading = Future()
                    job.loading.set_result(here)
                    continue
                job.loading = self._loaders.submit(self._residents.acquire, job.request.prefix)
                job.loading.add_done_callback(self._wake)
        if self._prefill is not None:
            return
        rows: list[Row] = []
        for job in [job for job in self._waiting if job.ready]:
            try:
                row = job.row or self._row_of(job)
            except Exception as error:
                self._waiting.remove(job)
                self._end(job)
                told.append((job, error))
                continue
            if not self._fits([*rows, row]):
                break
            self._waiting.remove(job)
            self._jobs[row] = job
            rows.append(row)
        if rows:
            self._prefill = self._runner.prefill(rows)

    def _fits(self, rows: Sequence[Row]) -> bool:
        """Whether these rows may begin together: a place for each, memory, and not much padding among them."""
        if len(rows) == 1 and not self._runner.rows:
            return True
        sizes = [len(row.x) + len(row.y) for row in rows]
        return (
            len(self._runner.rows) + len(rows) <= self.max_rows
            and self._runner.tokens_with(rows) <= self._max_tokens
            and max(sizes) * len(rows) <= 1.5 * sum(sizes) + 64
        )

    def _row_of(self, job: _Job) -> Row:
        """What is to be computed for a request; raises what its prefix's loading did."""
        request = job.request
        prefix = None if job.loading is None else job.loading.result()
        length = 0 if prefix is None else prefix.length
        room = self.room(len(request.tokens), length)
        assert room is not None
        job.limit = min(request.sampling.max_tokens, room)
        key = None if request.prefix is None else request.prefix.sha256
        job.row = Row(x=request.tokens, prefix=prefix, key=key)
        return job.row

    def _choose(self, rows: Sequence[Row], logits: torch.Tensor, told: list[tuple[_Job, Piece | Exception]]) -> None:
        """Give each row its next token, and let those go that have ended."""
        scores = logits.float()
        highest, likeliest = (one.tolist() for one in scores.max(-1))
        for b, row in enumerate(rows):
            job = self._jobs[row]
            token = likeliest[b]
            if not math.isfinite(highest[b]):
                self._runner.leave(row)
                self._end(job)
                told.append(
                    (job, PrefixFileError("the next token's logits are no finite numbers: train the prefix anew"))
                )
                continue
            if job.processors:
                token = int(job.processors(None, scores[b : b + 1]).argmax())  # type: ignore[arg-type]
            row.y.append(token)
            job.tokens.append(token)
            if job.request.sampling.logprobs is not None:
                job.logprobs.append(_logprob(scores[b], token, job.request.sampling.logprobs))
            finish: Finish | None = None
            text = "" if token in self._ends else job.text.add(token)
            if token in self._ends or job.text.stopped:
                finish = "stop"
            elif len(row.y) >= job.limit:
                finish = "length"
            if finish is not None:
                text += job.text.end()
                finish = "stop" if job.text.stopped else finish
                self._runner.leave(row)
                self._end(job)
            if finish is not None or text:
                piece = Piece(text=text, tokens=tuple(job.tokens), logprobs=tuple(job.logprobs), finish=finish)
                told.append((job, piece))
                job.tokens, job.logprobs = [], []

    def _end(self, job: _Job) -> None:
        """Free what a request holds, but for its place in the batch."""
        if job.row is not None:
            self._jobs.pop(job.row, None)
        version = job.request.prefix
        if version is not None and job.loading is not None:
            loading, job.loading = job.loading, None
            self._residents.release_coming(version, loading)

    def _drop_all(self, error: Exception, told: list[tuple[_Job, Piece | Exception]]) -> None:
        self._runner.clear()
        self._prefill = None
        jobs = list(self._jobs.values())
        if isinstance(error, EngineStoppedError):
            jobs += self._waiting
            self._waiting.clear()
        for job in jobs:
            self._end(job)
            told.append((job, error))

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify()


def _bytes_a_token(base: Base) -> int:
    """Of keys and values in the decoder; those of the encoder's output are as many."""
    return base.dtype.itemsize * sum(2 * groups * dim for groups, dim in base.shapes["decoder"])


def _logprob(scores: torch.Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = scores.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprob(
        token=token, logprob=float(logprobs[token]), top=tuple(zip(ids.tolist(), values.tolist(), strict=True))
    )
