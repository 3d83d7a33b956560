"""A small BART, pretrained by denoising the documents of debian-synopsis, for the encoder-decoder benchmarks.

    python -m benchmarks.bart                 # once, about an hour; prints the folder
    python -m benchmarks.bart --minutes 25    # a smaller budget: another folder

No pretrained encoder-decoder is to be had offline, so this is one: 9.7 million parameters, byte-level BPE of 8,192 tokens,
text infilling and sentence permutation as in Lewis et al. 2020 (30% of the words in spans of Poisson(3) length, each one
mask). It reads the documents alone, and none of their synopses. The learning rate falls with the time that is spent, so
the budget is kept on any machine; a run that is killed goes on from its checkpoint, at most a minute back.

The folder has the model, its tokenizer, and `pretraining.json`: budget, steps, tokens, and the loss on documents that were
held out, as it fell.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.e2e_rows import DATA
from benchmarks.record import write_json
from foreword.batching import batches, pad
from foreword.builtin import cache_folder
from foreword.data import read_records
from foreword.writing import write_atomically

VOCAB = 8192
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BOS, PAD, EOS, MASK = 0, 1, 2, 4
CONTEXT = 512
LENGTH = 256
"""Tokens of a document; the rest is cut."""
HELD_OUT = 200
MASKED = 0.3
SPAN = 3.0
BATCH = 16
PEAK_LR = 7e-4
WARM_STEPS = 200
"""A long warm-up: with 32 rows, 1e-3 and 8 steps of it the loss stayed at 7.1, that of the words' frequencies."""


def small_config() -> BartConfig:
    return BartConfig(
        vocab_size=VOCAB,
        d_model=256,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        max_position_embeddings=CONTEXT,
        dropout=0.0,  # no document is seen often enough to be learnt by heart
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
    )


def documents(limit: int | None = None) -> list[str]:
    """The documents, without their synopses, in an order of the seed's own; the first `HELD_OUT` are held out."""
    texts = [record["document"] for record in read_records(DATA / "debian-synopsis" / "train.jsonl")]
    random.Random(0).shuffle(texts)
    return texts[:limit]


def train_tokenizer(texts: list[str], vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def corrupt(sentences: list[list[int]], rng: random.Random) -> list[int]:
    """Sentences in another order, and spans of their tokens behind one mask each (a span of no token is a mask put in)."""
    shuffled = rng.sample(sentences, len(sentences))
    tokens = [token for sentence in shuffled for token in sentence]
    left = round(MASKED * len(tokens))
    starts: dict[int, int] = {}
    while left > 0:
        length = min(poisson(rng, SPAN), left)
        starts[rng.randrange(len(tokens))] = length
        left -= max(length, 1)
    out: list[int] = []
    i = 0
    while i < len(tokens):
        if i in starts:
            out.append(MASK)
            length = starts[i]
            if length == 0:
                out.append(tokens[i])
            i += max(length, 1)
        else:
            out.append(tokens[i])
            i += 1
    return [BOS, *out, EOS]


def poisson(rng: random.Random, mean: float) -> int:
    """Knuth's method."""
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        count += 1
    return count


def sentences_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[list[int]]]:
    """For each document its sentences' tokens, no more than fit `LENGTH` with the two at the ends."""
    out = []
    for text in texts:
        sentences: list[list[int]] = []
        room = LENGTH - 2
        for sentence in re.split(r"(?<=[.!?:])(?=\s)", text):
            tokens = tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"][:room]
            room -= len(tokens)
            if tokens:
                sentences.append(tokens)
        out.append(sentences)
    return out


def loss_of(model: Any, rows: list[list[list[int]]], rng: random.Random, autocast: bool) -> tuple[torch.Tensor, int]:
    """Mean loss over the target's tokens, and their number."""
    tokens, mask = pad([corrupt(sentences, rng) for sentences in rows], PAD)
    targets = [[BOS, *(token for sentence in sentences for token in sentence), EOS] for sentences in rows]
    labels, seen = pad(targets, PAD)
    shifted = torch.cat([torch.full((len(rows), 1), EOS), labels[:, :-1]], dim=1)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        hidden = model.model(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            decoder_input_ids=shifted.to(model.device),
        ).last_hidden_state
        logits = model.lm_head(hidden[seen.bool()])
    flat = labels[seen.bool()].to(model.device)
    return torch.nn.functional.cross_entropy(logits.float(), flat), len(flat)


@torch.no_grad()
def held_out_loss(model: Any, rows: list[list[list[int]]], autocast: bool) -> float:
    model.eval()
    losses = [loss_of(model, rows[i : i + BATCH], random.Random(i), autocast) for i in range(0, len(rows), BATCH)]
    model.train()
    return sum(loss.item() * count for loss, count in losses) / sum(count for _, count in losses)


def lr_at(step: int, share: float) -> float:
    """Warm-up over the first steps, and linear decay over the share of the budget that is spent."""
    return PEAK_LR * min(1.0, (step + 1) / WARM_STEPS) * max(0.0, 1 - share)


def save_checkpoint(path: Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    with write_atomically(path) as aside:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, aside)


def pretrain(
    folder: Path,
    *,
    minutes: float,
    config: BartConfig | None = None,
    limit: int | None = None,
    device: str | None = None,
    every: float = 60.0,
) -> Path:
    """Pretrain into `folder`, or go on; nothing is done where it is there.

    Args:
        folder: where the model goes.
        minutes: of training; what evaluation and saving take is not counted.
        config: the model's. Default: `small_config`.
        limit: documents, for trials.
        device: as torch names it.
        every: seconds between checkpoints.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(folder.name + ".unfinished")
    work.mkdir(exist_ok=True)
    torch.manual_seed(0)
    texts = documents(limit)
    if not (work / "tokenizer.json").exists():
        train_tokenizer(texts[HELD_OUT:] or texts).save_pretrained(work)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    split = sentences_of(tokenizer, texts)
    held_out, rows = split[:HELD_OUT], split[HELD_OUT:]
    flat = [[token for sentence in row for token in sentence] for row in rows]
    rows = [row for row, tokens in zip(rows, flat, strict=True) if len(tokens) > 4]
    flat = [tokens for tokens in flat if len(tokens) > 4]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = BartForConditionalGeneration(config or small_config())
    # for short rows its backward pass is the fastest on a CPU
    model.set_attn_implementation("eager")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "curve": []}
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        loaded = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        state = loaded["state"]
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    autocast = device != "cpu" or bool(can.get("avx512_bf16"))
    budget, saved = 60 * minutes, state["seconds"]
    per_epoch = math.ceil(len(rows) / BATCH)
    while state["seconds"] < budget:
        began = time.perf_counter()
        epoch, place = divmod(state["step"], per_epoch)
        chosen = batches(flat, BATCH, seed=0, epoch=epoch)[place]
        loss, count = loss_of(model, [rows[i] for i in chosen], random.Random(state["step"]), autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(state["step"], state["seconds"] / budget)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        state["tokens"] += count
        state["seconds"] += time.perf_counter() - began
        if state["seconds"] - saved > every or state["seconds"] >= budget:
            saved = state["seconds"]
            measured = held_out_loss(model, held_out, autocast)
            state["curve"].append({"seconds": round(saved), "step": state["step"], "held_out_loss": measured})
            save_checkpoint(checkpoint, model, optimizer, state)
            print(
                f"{saved / 60:.1f} of {minutes:g} min, step {state['step']} (epoch {state['step'] / per_epoch:.2f}), "
                f"{state['tokens'] / saved:,.0f} tokens/s, loss {loss.item():.3f}, held out {measured:.3f}",
                flush=True,
            )
    model.eval().save_pretrained(work)
    facts = {
        **{"minutes": minutes, "parameters": model.num_parameters(), "documents": len(rows)},
        **{"epochs": state["step"] / per_epoch, "threads": torch.get_num_threads(), "bfloat16": autocast},
        **state,
    }
    write_json(work / "pretraining.json", facts)
    checkpoint.unlink()
    shutil.move(work, folder)
    return folder


def default_folder(minutes: float) -> Path:
    return cache_folder() / "benchmarks" / f"bart-debian-{minutes:g}-minutes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=Path, help="by default in foreword's cache, named by the budget")
    parser.add_argument("--documents", type=int, help="for trials")
    parser.add_argument("--device")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(
        pretrain(
            options.folder or default_folder(options.minutes),
            minutes=options.minutes,
            limit=options.documents,
            device=options.device,
        )
    )


if __name__ == "__main__":
    main()
