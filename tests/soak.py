"""A soak of a running server, whatever its engine: requests at random times, and prefixes that come and go meanwhile.

Every answer is compared with what its request gives alone, with the very content that the server says it took, which has
to be one that the name had while the request was under way.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import torch
from serving import prefix_for

from foreword.attach import attach
from foreword.bases import Base
from foreword.data import frame
from foreword.prefix import Framing, Prefix

CLOSE = 1e-3
"""Two logits so near are a tie, which rounding may decide either way."""
SHARE = 0.005
"""Of the requests that may meet one."""


@dataclass(frozen=True)
class Change:
    """What a name became (None: nothing), and the time in which it did."""

    began: float
    ended: float
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    name: str | None
    prompt: str
    limit: int
    began: float
    ended: float
    sha256: str | None
    text: str | None
    """None where there was no such prefix."""


@dataclass
class Soak:
    """See the module.

    Args:
        base: for references; its words are its tokens (see `serving.words_base`), and nothing else is attached to it.
        url: of the server.
        base_name: what the server calls the base.
        requests: how many.
        seconds: in which they begin.
    """

    base: Base
    url: str
    base_name: str
    requests: int = 200
    seconds: float = 10.0
    prefixes: int = 50
    key: str = "none"
    seed: int = 0
    contents: dict[str, Prefix] = field(default_factory=dict)
    history: dict[str, list[Change]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    made: int = 0

    async def run(self) -> None:
        """Put the prefixes, and let requests and changes go at the same time."""
        draw = random.Random(self.seed)
        limits = httpx.Limits(max_connections=100)
        headers = {"authorization": f"Bearer {self.key}"}
        async with (
            httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120) as admin,
            openai.AsyncOpenAI(
                base_url=f"{self.url}/v1",
                api_key=self.key,
                max_retries=3,
                http_client=httpx.AsyncClient(limits=limits, timeout=300),
            ) as client,
        ):
            names = [f"user {i}/é" for i in range(self.prefixes)]
            for name in names:
                await self._put(admin, name)
            changing = asyncio.create_task(self._change(admin, names, random.Random(self.seed + 1)))
            prompts = [" ".join(f"w{draw.randrange(250)}" for _ in range(n)) for n in (1, 2, 5, 13, 29, 47)]
            asked = [
                self._ask(
                    client,
                    draw.random() * self.seconds,
                    draw.choice([*names, *[None] * (1 + len(names) // 10)]),
                    draw.choice(prompts),
                    draw.choice((1, 3, 7, 23)),
                    stream=draw.random() < 0.5,
                )
                for _ in range(self.requests)
            ]
            self.answers = list(await asyncio.gather(*asked))
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)

    async def _put(self, admin: httpx.AsyncClient, name: str) -> None:
        self.made += 1
        prefix = prefix_for(self.base, 1 + self.made % 11, seed=self.made)
        data = prefix.to_bytes(torch.float32)
        sha256 = hashlib.sha256(data).hexdigest()
        self.contents[sha256] = prefix
        began = time.monotonic()
        answer = await admin.put(_path(name), content=data)
        assert answer.status_code == 201, answer.text
        assert answer.json()["sha256"] == sha256
        self.history.setdefault(name, []).append(Change(began, time.monotonic(), sha256))

    async def _change(self, admin: httpx.AsyncClient, names: Sequence[str], draw: random.Random) -> None:
        """Replace, delete, and put again, one after another."""
        while True:
            await asyncio.sleep(draw.random() / 10)
            name = draw.choice(names)
            # shielded, so that history tells of every change that was made
            if self.history[name][-1].sha256 is None or draw.random() < 0.6:
                await asyncio.shield(self._put(admin, name))
            else:
                await asyncio.shield(self._delete(admin, name))

    async def _delete(self, admin: httpx.AsyncClient, name: str) -> None:
        began = time.monotonic()
        answer = await admin.delete(_path(name))
        assert answer.status_code == 200, answer.text
        self.history[name].append(Change(began, time.monotonic(), None))

    async def _ask(
        self, client: openai.AsyncOpenAI, wait: float, name: str | None, prompt: str, limit: int, *, stream: bool
    ) -> Answer:
        await asyncio.sleep(wait)
        how: dict[str, Any] = {"model": name or self.base_name, "prompt": prompt, "max_tokens": limit, "temperature": 0}
        began = time.monotonic()
        sha256: str | None = None
        text: str | None
        try:
            raw = await client.completions.with_raw_response.create(**how, stream=stream)
            sha256 = raw.headers.get("x-prefix-sha256")
            parsed: Any = raw.parse()
            if stream:
                text = "".join([choice.text async for chunk in parsed for choice in chunk.choices])
            else:
                text = parsed.choices[0].text
        except openai.NotFoundError:
            text = None
        return Answer(
            name=name,
            prompt=prompt,
            limit=limit,
            began=began,
            ended=time.monotonic(),
            sha256=sha256,
            text=text,
        )

    def check(self) -> dict[str, int]:
        """Compare all answers. Returns how many there were of each kind."""
        assert len(self.answers) == self.requests, "none is lost"
        counts = {"same": 0, "tied": 0, "no such prefix": 0, "bare": 0, "changes": self.made - self.prefixes}
        known: dict[tuple[str | None, str, int, str], bool] = {}
        for answer in self.answers:
            possible = self._possible(answer)
            if answer.text is None:
                assert None in possible, f"no such prefix as {answer.name!r}, though there was one"
                assert answer.name is not None
                counts["no such prefix"] += 1
                continue
            assert answer.sha256 in possible
            counts["bare"] += answer.name is None
            key = answer.sha256, answer.prompt, answer.limit, answer.text
            if key not in known:
                known[key] = self._same(*key)
            counts["same" if known[key] else "tied"] += 1
        assert counts["tied"] <= SHARE * self.requests
        return counts

    def _possible(self, answer: Answer) -> set[str | None]:
        """The contents that the name had between a request's beginning and its end."""
        if answer.name is None:
            return {None}
        changes = self.history[answer.name]
        before = [change.sha256 for change in changes if change.ended <= answer.began]
        return {*before[-1:], *(c.sha256 for c in changes if c.ended > answer.began and c.began < answer.ended)}

    @torch.no_grad()
    def _same(self, sha256: str | None, prompt: str, limit: int, text: str) -> bool:
        """Whether a text is the greedy one of its request alone; false where it parts from that at a tie, and an error elsewhere.

        One pass over x and the text tells whether each of its tokens is the likeliest after those before; one pass more
        for each token that has no text, where the base says so.
        """
        prefix = None if sha256 is None else self.contents[sha256]
        framing = Framing(template="{input}") if prefix is None else prefix.card.framing
        x = frame(self.base, {"input": prompt}, framing)
        left: list[int] = self.base.tokenizer.convert_tokens_to_ids(text.split())
        said: list[int] = []
        with nullcontext() if prefix is None else attach(self.base.model, prefix):
            while len(said) < limit and self.base.end_id not in said:
                logits = self.base.model(input_ids=torch.tensor([[*x, *said, *left]]), use_cache=False).logits
                values, tokens = logits[0, len(x) + len(said) - 1 :].topk(2)
                for (best, second), token in zip(values.tolist(), tokens[:, 0].tolist(), strict=True):
                    if len(said) == limit:
                        break
                    if not self.base.decode([token]):
                        said.append(token)
                        break
                    if not left or left[0] != token:
                        what = f"{best - second} apart at {len(said)}: {text!r} is not {self.base.decode([*said, token])!r}"
                        assert best - second < CLOSE, what
                        return False
                    said.append(left.pop(0))
        assert not left, f"{text!r} goes on after {self.base.decode(said)!r}"
        return True


def _path(name: str) -> str:
    return "/v1/prefixes/" + "".join(f"%{byte:02x}" for byte in name.encode())
