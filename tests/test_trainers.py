"""transformers' Trainer and TRL's SFTTrainer train a prefix as they are, and save it alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from tiny import base_bytes, base_of
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

import foreword
from foreword.attach import Attachment, attach
from foreword.bases import Base
from foreword.data import rows_of
from foreword.prefix import Framing, Prefix
from foreword.reparam import width
from foreword.training import FILE_NAME, TrainSettings, attach_trainable

ROWS = [{"input": f"{n} plus {n}", "output": "ab" * n + "."} for n in (1, 4, 2, 7, 3, 5, 6)]
IDS = torch.tensor([[71, 101, 108, 108, 111, 32, 3], [11, 2, 3, 5, 7, 13, 17]])


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def logits(base: Base) -> torch.Tensor:
    inputs: dict[str, Any] = {"decoder_input_ids": IDS} if base.is_encoder_decoder else {}
    with torch.no_grad():
        return base.model.eval()(input_ids=IDS, **inputs).logits


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }


def check(
    base: Base, attachment: Attachment, trainer: Trainer, folder: Path, before: str, kind: type, reparametrization: str
) -> None:
    """What is asked of any trainer."""
    assert trainer.model is base.model is attachment.model
    assert type(base.model) is kind
    assert isinstance(base.model, PreTrainedModel)
    sections = ("encoder", "decoder", "cross") if base.is_encoder_decoder else ("decoder",)
    trained = {name: p for name, p in base.model.named_parameters() if p.requires_grad}
    parts = {
        "direct": ["p_theta.{}"],
        "mlp": ["p_small.{}", *(f"mlp.{{}}.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))],
    }[reparametrization]
    assert set(trained) == {f"foreword.{part.format(section)}" for part in parts for section in sections}
    assert base_bytes(base) == before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3, losses

    trainer.save_model(str(folder / "saved"))
    # training_args.bin is transformers' own, and so is the tokenizer: there is nothing of the base
    weights = [path for path in (folder / "saved").rglob("*") if path.suffix in (".safetensors", ".pt", ".pth", ".h5")]
    assert weights == [folder / "saved" / FILE_NAME]
    assert not {"config.json", "pytorch_model.bin"} & {path.name for path in (folder / "saved").iterdir()}
    numbers = 5 * sum(width(layers) for layers in base.shapes.values())
    with safe_open(weights[0], framework="pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == numbers  # noqa: SIM118

    trained_logits = logits(base)
    attachment.detach()
    bare = logits(base)
    prefix = Prefix.load(weights[0], base)
    with attach(base.model, prefix):
        loaded = logits(base)
    # the file is in bfloat16
    assert (bare - trained_logits).abs().max() > 20 * (loaded - trained_logits).abs().max()
    torch.testing.assert_close(loaded, trained_logits, rtol=0, atol=0.05)
    assert prefix.card.fingerprint == base.fingerprint
    assert base_bytes(base) == before


@pytest.mark.parametrize(("family", "checkpointing"), [("gpt2", True), ("llama", False), ("bart", True)])
def test_transformers_trainer(tmp_path: Path, family: str, checkpointing: bool) -> None:
    set_seed(0)
    base = base_of(family)
    before, kind = base_bytes(base), type(base.model)
    rows = rows_of(base, ROWS, Framing())
    if base.is_encoder_decoder:
        data = [{"input_ids": row.x, "labels": row.y} for row in rows]
    else:
        data = [{"input_ids": row.x + row.y, "labels": [-100] * len(row.x) + row.y} for row in rows]
    settings = TrainSettings(length=5, reparametrization="direct", init_text="plus and plus")
    with attach_trainable(base, settings=settings) as attachment:
        trainer = Trainer(
            model=attachment.model,
            args=TrainingArguments(**options(tmp_path), activation_checkpointing=checkpointing),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(base.tokenizer),
        )
        trainer.train()
        check(base, attachment, trainer, tmp_path, before, kind, "direct")
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints
    for folder in checkpoints:
        assert (folder / FILE_NAME).is_file()
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert all(name.startswith("foreword.") for name in file.keys())  # noqa: SIM118


def test_trl_sft_trainer(tmp_path: Path) -> None:
    set_seed(0)
    base = base_of("qwen3")
    before, kind = base_bytes(base), type(base.model)
    data = Dataset.from_list([{"prompt": row["input"] + "\n", "completion": row["output"]} for row in ROWS])
    with foreword.attach_trainable(base, settings=TrainSettings(length=5)) as attachment:
        trainer = SFTTrainer(
            model=attachment.model,
            args=SFTConfig(
                **{**options(tmp_path), "learning_rate": 3e-3},
                max_length=None,
                bf16=False,
                activation_checkpointing=True,
            ),
            train_dataset=data,
            processing_class=base.tokenizer,
        )
        trainer.train()
        check(base, attachment, trainer, tmp_path, before, kind, "mlp")


def test_a_trainers_checkpoints_hold_what_is_trained(tmp_path: Path) -> None:
    """It goes on from them, and takes the best."""
    base = base_of("llama")
    rows = rows_of(base, ROWS, Framing())
    data = [{"input_ids": row.x + row.y, "labels": [-100] * len(row.x) + row.y} for row in rows]
    # the largest loss is called the best, so that the best is not the last
    more = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }

    def trainer(attachment: Attachment, epochs: int) -> Trainer:
        return Trainer(
            model=attachment.model,
            args=TrainingArguments(**{**options(tmp_path), **more, "num_train_epochs": epochs}),
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorForSeq2Seq(base.tokenizer),
        )

    with attach_trainable(base, settings=TrainSettings(length=5)) as attachment:
        first = trainer(attachment, 3)
        first.train()
        losses = [entry["eval_loss"] for entry in first.state.log_history if "eval_loss" in entry]
        assert losses[0] > losses[-1] + 0.1
        assert first.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-5)
        trainer(attachment, 4).train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "checkpoint-12").is_dir()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_texts_after_a_trainer(family: str) -> None:
    """It leaves the base in training mode, and with gradient checkpointing there is no cache in it."""
    base = base_of(family)
    settings = foreword.GenerateSettings(max_new_tokens=9)
    expected = foreword.generate(base, ["a b", "c"], settings=settings)
    for module in base.model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    base.model.train()
    assert foreword.generate(base, ["a b", "c"], settings=settings) == expected
    assert base.model.training
