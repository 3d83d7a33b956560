"""What the tests of vLLM share: tiny random bases in sizes that it computes on a CPU, and an engine beside a reference."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from serving import make_base, prefix_for, save
from tiny import EOS, scaled_rope

from foreword.attach import attach
from foreword.bases import Base, load_base
from foreword.data import frame
from foreword.generation import GenerateSettings, generate
from foreword.prefix import Framing, Prefix
from foreword.serve.engine import Piece, Request, Sampling
from foreword.serve.placeholders import kv_transfer_params, placeholder_ids
from foreword.serve.vllm import VllmEngine, base_for_vllm
from foreword.store import Store, Version

T = TypeVar("T")
Row = tuple[str, str | None]
"""A text, and the name of its prefix."""

BLOCK = 32
LENGTHS = {"one": 1, "five": 5, "thirteen": 13, "two blocks": 64, "ninety-seven": 97, "131": 131}
TEXTS = (
    "the quick brown fox",
    "a",
    "Moss Lantern, 8 euros. " * 7,  # longer than a step, which takes 64 tokens
    "name: Amber Kite | kind: desk lamp",
)

CONTEXT = 389
# heads of 32, the least of vLLM's on a CPU; even numbers of them, for two ranks
_GROUPED: dict[str, Any] = {
    "hidden_size": 4 * 32,
    "intermediate_size": 74,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
}
_WINDOWED = {**_GROUPED, "sliding_window": CONTEXT}
_EXPERTS = {**_GROUPED, "intermediate_size": 96, "moe_intermediate_size": 64}
SIZES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "smollm3": _GROUPED,
    "gemma2": {**_WINDOWED, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0},
    "gemma3": _WINDOWED,
    "olmo3": _WINDOWED,
    "granite": _GROUPED,
    "ministral3": {**_GROUPED, "rope_parameters": scaled_rope(64, CONTEXT)},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_neox": {"hidden_size": 3 * 32, "num_attention_heads": 3, "max_position_embeddings": CONTEXT},
    "gpt2": {"n_embd": 3 * 32, "n_layer": 2, "n_head": 3, "n_positions": CONTEXT},
}
"""Of tiny bases that vLLM can compute."""
OPTIONS = {"enforce_eager": True, "block_size": BLOCK, "kv_cache_memory_bytes": 1 << 26}


def save_base(folder: Path, family: str = "llama", *, ends: Sequence[int] = (EOS,), **config: Any) -> str:
    """Save a random base of a size for vLLM; returns its name."""
    base = make_base(family, **{**SIZES[family], **config})
    base.model.generation_config.eos_token_id = list(ends)
    return save(base, folder)


def served_base(base: Base, folder: Path) -> Base:
    """A base that was made in code, as the engine `vllm` and the server beside it take it: from a folder."""
    pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make setup-vllm, then make test-vllm")
    return base_for_vllm(save(base, folder / base.name), dtype="float32")


class Harness:
    """An engine, what it serves, and a slow reference beside it."""

    def __init__(self, folder: Path, family: str = "llama", *, ends: Sequence[int] = (EOS,), **more: Any):
        name = save_base(folder / "base", family, ends=ends)
        self.folder = folder
        self.base = load_base(name, dtype="float32", device="cpu")
        self.store = Store(folder / "store", create=True)
        self.prefixes: dict[str | None, Prefix | None] = {None: None}
        self.versions: dict[str | None, Version | None] = {None: None}
        for label, length in LENGTHS.items():
            self.put(label, prefix_for(self.base, length))
        self.loop = asyncio.Runner()
        options = {**OPTIONS, **more.pop("options", {})}
        self.engine = VllmEngine(base_for_vllm(name, dtype="float32"), self.store, options=options, **more)
        self.run(self.engine.start())

    def put(self, name: str, prefix: Prefix) -> Version:
        self.prefixes[name] = prefix
        version = self.versions[name] = self.store.put(name, prefix, dtype=torch.float32)
        return version

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def frame(self, text: str) -> tuple[int, ...]:
        return tuple(frame(self.base, {"input": text}, Framing(), "x"))

    def request(self, text: str, name: str | None, max_tokens: int = 23, **sampling: Any) -> Request:
        return Request(
            id=uuid.uuid4().hex,
            tokens=self.frame(text),
            prefix=self.versions[name],
            sampling=Sampling(max_tokens=max_tokens, **sampling),
        )

    async def pieces(self, request: Request) -> list[Piece]:
        async with aclosing(self.engine.generate(request)) as pieces:
            return [piece async for piece in pieces]

    async def text(self, request: Request) -> str:
        pieces = await self.pieces(request)
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish in ("stop", "length")
        return "".join(piece.text for piece in pieces)

    def texts(self, rows: Sequence[Row], max_tokens: int = 23) -> list[str]:
        """All at once."""

        async def work() -> list[str]:
            return await asyncio.gather(*(self.text(self.request(*row, max_tokens)) for row in rows))

        return self.run(work())

    def expected(self, rows: Sequence[Row], max_tokens: int = 23) -> list[str]:
        settings = GenerateSettings(max_new_tokens=max_tokens)
        return generate(
            self.base, [text for text, _ in rows], [self.prefixes[name] for _, name in rows], settings=settings
        )

    def check(self, rows: Sequence[Row], max_tokens: int = 23, *, distinct: float = 1) -> None:
        """The engine's texts are the reference's, of which that share at least are unlike all others."""
        expected = self.expected(rows, max_tokens)
        # or a prefix that is not there at all would pass
        assert len(set(expected)) >= distinct * len(set(rows))
        assert self.texts(rows, max_tokens) == expected

    def ask(
        self, tokens: Sequence[int], version: Version | None, *, salt: str | None = None, **params: Any
    ) -> tuple[list[int], str, int]:
        """As a client of `vllm serve` does, past the engine's own checks. Tokens, why they ended, how many were cached."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt: dict[str, Any] = {"prompt_token_ids": list(tokens)}
        if salt is not None:
            prompt["cache_salt"] = salt
        extra = {"kv_transfer_params": kv_transfer_params(version)} if version else {}
        sampling: dict[str, Any] = {"max_tokens": 11, "temperature": 0, "extra_args": extra, **params}
        sampling = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)

        async def work() -> Any:
            llm = self.engine._llm
            assert llm is not None
            async for output in llm.generate(prompt, sampling, uuid.uuid4().hex):
                last = output
            return last

        last = self.run(work())
        return list(last.outputs[0].token_ids), last.outputs[0].finish_reason, last.num_cached_tokens or 0

    def prompt(self, text: str, name: str) -> list[int]:
        version = self.versions[name]
        assert version is not None
        return [*placeholder_ids(version.sha256, LENGTHS[name], self.base.model.config.vocab_size), *self.frame(text)]

    def tokens(self, text: str, name: str | None, max_tokens: int = 11) -> list[int]:
        """What the reference continues with; tokens are bytes, so a text tells them where nothing is special."""
        x = torch.tensor([self.frame(text)])

        def run() -> list[int]:
            output = self.base.model.generate(
                x, attention_mask=torch.ones_like(x), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
            )
            return output[0, x.shape[1] :].tolist()

        prefix = self.prefixes[name]
        if prefix is None:
            return run()
        with attach(self.base.model, prefix):
            return run()

    def close(self) -> None:
        self.run(self.engine.stop(0))
        self.loop.close()


@contextmanager
def harness(folder: Path, family: str = "llama", **more: Any) -> Iterator[Harness]:
    one = Harness(folder, family, **more)
    try:
        yield one
    finally:
        one.close()
