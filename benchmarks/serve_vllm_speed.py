"""What do prefixes cost on vLLM? 32 concurrent requests, each with a prefix of its own, against none, against cached text,
and against vLLM's own multi-LoRA; and how long a first token takes whose prefix is not in memory yet.

    .venv-vllm/bin/python -m benchmarks.serve_vllm_speed prefixes
    .venv-vllm/bin/python -m benchmarks.serve_vllm_speed lora
    .venv-vllm/bin/python -m benchmarks.serve_vllm_speed first-token --json benchmarks/results/serve_vllm_speed.json

Each part is one run with its sides in turn, warm, eager, greedy, medians of several rounds; parts add themselves to one
JSON file. Every request writes the same number of tokens, whatever it says, and every side goes through vLLM's
AsyncLLM.generate. The base is smollm2-135m; x is a told record of about 30 tokens; prefixes are random, for speed does not
depend on what they say.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import foreword
from benchmarks.record import machine, write_json
from foreword.bases import Base, built_in_folder
from foreword.data import frame
from foreword.prefix import Card, Framing, Prefix
from foreword.serve.engine import Request, Sampling
from foreword.serve.placeholders import completion_fields
from foreword.serve.vllm import VllmEngine, base_for_vllm
from foreword.store import Store, Version

BASE = "smollm2-135m"
ROWS = 32
MAX_TOKENS = 64
SHORT, LONG = 10, 200
RANK = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCK = 32
"""Tokens of a block of vLLM's cache: 192 of 200 text tokens are in whole ones (with its default on CPUs, 128 would be)."""
OPTIONS = {
    "enforce_eager": True,
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 1 << 30,
    "max_model_len": 1024,
    "max_num_seqs": ROWS,
}
GOALS = {
    f"{SHORT} virtual tokens / none": 0.95,
    f"{LONG} virtual tokens / {LONG} cached text tokens": 0.95,
    f"{SHORT} virtual tokens / LoRA of rank {RANK}": 3.0,
    "first token, cold / warm": 1.2,
}


def random_prefix(base: Base, length: int, seed: int) -> Prefix:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (torch.randn(groups, length, dim, generator=generator), torch.randn(groups, length, dim, generator=generator))
        for groups, dim in base.shapes["decoder"]
    ]
    return Prefix({"decoder": layers}, Card(base=base.name, fingerprint=base.fingerprint))


def record(base: Base, n: int) -> list[int]:
    text = f"name: Copper Finch {n} | kind: desk lamp | colour: pale blue | price: {30 + n} euros"
    return frame(base, {"input": text}, Framing(), "x")


def fields(base: Base, version: Version, length: int, tokens: Sequence[int]) -> dict[str, Any]:
    return completion_fields(version, length, tokens, base.model.config.vocab_size)


async def run(llm: Any, requests: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second of requests that are sent at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def one(request: Mapping[str, Any]) -> int:
        extra = {"kv_transfer_params": request["kv_transfer_params"]} if "kv_transfer_params" in request else None
        params = SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": request["prompt"]}
        if "cache_salt" in request:
            prompt["cache_salt"] = request["cache_salt"]
        count = 0
        async for output in llm.generate(prompt, params, uuid.uuid4().hex, lora_request=request.get("lora")):
            count += len(output.outputs[0].token_ids)
        assert count == MAX_TOKENS, f"{count} tokens: {output.outputs[0].finish_reason}"
        return count

    began = time.perf_counter()
    counts = await asyncio.gather(*map(one, requests))
    return sum(counts) / (time.perf_counter() - began)


async def in_turn(sides: Mapping[str, Callable[[], Awaitable[float]]], rounds: int) -> dict[str, list[float]]:
    """A round to warm up, then so many that count; the sides take turns to be first."""
    for side in sides.values():
        await side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(await sides[name]())
    return found


async def measure_prefixes(base: Base, store: Store, rounds: int) -> dict[str, list[float]]:
    versions = {
        length: [store.put(f"{length}-{n}", random_prefix(base, length, n)) for n in range(ROWS)]
        for length in (SHORT, LONG)
    }
    x = [record(base, n) for n in range(ROWS)]
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1000, 40000, (ROWS, LONG), generator=generator).tolist()
    engine = VllmEngine(base, store, options=OPTIONS)
    await engine.start()

    def prefixed(length: int) -> list[dict[str, Any]]:
        return [fields(base, version, length, tokens) for version, tokens in zip(versions[length], x, strict=True)]

    requests = {
        "none": [{"prompt": tokens} for tokens in x],
        f"{SHORT} virtual tokens": prefixed(SHORT),
        f"{SHORT} text tokens more": [{"prompt": text[:SHORT] + tokens} for text, tokens in zip(texts, x, strict=True)],
        f"{LONG} virtual tokens": prefixed(LONG),
        f"{LONG} cached text tokens": [{"prompt": text + tokens} for text, tokens in zip(texts, x, strict=True)],
    }
    try:
        return await in_turn({name: partial(run, engine._llm, them) for name, them in requests.items()}, rounds)
    finally:
        await engine.stop(0)


def save_adapters(folder: Path, count: int) -> None:
    """Random LoRA adapters in PEFT's format, on all projections."""
    from peft import LoraConfig, get_peft_model

    base = foreword.load_base(BASE, device="cpu")
    model = get_peft_model(base.model, LoraConfig(r=RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    for n in range(count):
        torch.manual_seed(n)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(str(folder / str(n)))


async def measure_lora(base: Base, store: Store, rounds: int) -> dict[str, list[float]]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    adapters = Path(store.url).parent / "adapters"
    save_adapters(adapters, ROWS)
    x = [record(base, n) for n in range(ROWS)]
    versions = [store.put(str(n), random_prefix(base, SHORT, n)) for n in range(ROWS)]
    engine = VllmEngine(base, store, options=OPTIONS)
    await engine.start()
    args = AsyncEngineArgs(
        model=str(built_in_folder(BASE)),
        dtype=str(base.dtype).removeprefix("torch."),
        enable_lora=True,
        max_loras=ROWS,
        max_lora_rank=RANK,
        disable_log_stats=True,
        **OPTIONS,
    )
    other = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
    ours = [fields(base, version, SHORT, tokens) for version, tokens in zip(versions, x, strict=True)]
    loras = [
        {"prompt": tokens, "lora": LoRARequest(str(n), n + 1, str(adapters / str(n)))} for n, tokens in enumerate(x)
    ]
    bare = [{"prompt": tokens} for tokens in x]
    try:
        return await in_turn(
            {
                f"{SHORT} virtual tokens": lambda: run(engine._llm, ours),
                f"LoRA of rank {RANK}": lambda: run(other, loras),
                "none, on the engine with LoRA": lambda: run(other, bare),
            },
            rounds,
        )
    finally:
        await engine.stop(0)
        await asyncio.to_thread(other.shutdown)


async def measure_first_token(base: Base, store: Store, rounds: int) -> dict[str, list[float]]:
    """Milliseconds to the first piece, of one request at a time, through our engine with its checks."""
    engine = VllmEngine(base, store, options=OPTIONS)
    await engine.start()

    async def first(version: Version | None, n: int) -> float:
        request = Request(
            id=uuid.uuid4().hex, tokens=tuple(record(base, n)), prefix=version, sampling=Sampling(max_tokens=2)
        )
        began = time.perf_counter()
        async with aclosing(engine.generate(request)) as pieces:
            async for _ in pieces:
                return 1000 * (time.perf_counter() - began)
        raise AssertionError

    found: dict[str, list[float]] = {}
    try:
        for length in (SHORT, LONG):
            for n in range(rounds + 3):
                version = store.put(f"first-{length}-{n}", random_prefix(base, length, n))
                cold = await first(version, 3 * n)
                warm = await first(version, 3 * n + 1)
                none = await first(None, 3 * n + 2)
                # the first ones warm up
                if n >= 3:
                    for name, took in (("cold", cold), ("warm", warm), ("none", none)):
                        found.setdefault(f"{name}, {length} virtual tokens", []).append(took)
        return found
    finally:
        await engine.stop(0)


PARTS = {"prefixes": (measure_prefixes, 5), "lora": (measure_lora, 3), "first-token": (measure_first_token, 31)}


def ratios(part: str, medians: Mapping[str, float]) -> dict[str, float]:
    if part == "prefixes":
        pairs = {
            f"{SHORT} virtual tokens / none": (f"{SHORT} virtual tokens", "none"),
            f"{LONG} virtual tokens / {LONG} cached text tokens": (
                f"{LONG} virtual tokens",
                f"{LONG} cached text tokens",
            ),
        }
    elif part == "lora":
        pairs = {f"{SHORT} virtual tokens / LoRA of rank {RANK}": (f"{SHORT} virtual tokens", f"LoRA of rank {RANK}")}
    else:
        pairs = {
            f"first token, cold / warm, {length} virtual tokens": (
                f"cold, {length} virtual tokens",
                f"warm, {length} virtual tokens",
            )
            for length in (SHORT, LONG)
        }
    return {name: medians[over] / medians[under] for name, (over, under) in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, help="that count")
    parser.add_argument("--json", type=Path, help="add the figures to those there")
    parser.add_argument(
        "--more", action="store_true", help="the part's rounds there count too, of an engine started before"
    )
    arguments = parser.parse_args()
    measure, rounds = PARTS[arguments.part]
    rounds = arguments.rounds or rounds
    base = base_for_vllm(BASE)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store", create=True)
        found = asyncio.run(measure(base, store, rounds))
    figures = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else {}
    if arguments.more:
        found = {name: figures[arguments.part]["values"][name] + values for name, values in found.items()}
        rounds += figures[arguments.part]["rounds"]
    unit = "ms" if arguments.part == "first-token" else "tokens/s"
    medians = {name: statistics.median(values) for name, values in found.items()}
    told = ratios(arguments.part, medians)
    table = Table("side", f"median {unit}", "least", "most", box=None)
    for name, values in found.items():
        table.add_row(name, f"{medians[name]:.1f}", f"{min(values):.1f}", f"{max(values):.1f}")
    console = Console()
    console.print(table)
    for name, ratio in told.items():
        goal = next(goal for start, goal in GOALS.items() if name.startswith(start))
        console.print(f"{name}: {ratio:.3f}; goal: {'at most' if 'first' in name else 'at least'} {goal}")
    if arguments.json is not None:
        figures[arguments.part] = {
            "unit": unit,
            "rounds": rounds,
            "values": found,
            "medians": medians,
            "ratios": told,
            "settings": {"base": BASE, "dtype": str(base.dtype), "rows": ROWS, "max_tokens": MAX_TOKENS, **OPTIONS},
            "machine": {**machine(), "vllm": vllm_version()},
        }
        write_json(arguments.json, figures)


def vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


if __name__ == "__main__":
    main()
