"""Toy models and rows: small enough that a whole run takes a second on one core."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from raybert.config import Recipe
from raybert.recipe_file import recipe_from

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

GOOD = ("good", "great", "fine", "lovely", "superb")
BAD = ("bad", "awful", "poor", "dreadful", "weak")
OTHER = ("the", "film", "was", "a", "plot", "actor", "very", "and", "not", "but")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB = {word: i for i, word in enumerate((*SPECIAL, *GOOD, *BAD, *OTHER))}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real GLUE and SQuAD files; tests that need them skip on machines that have none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data files are not on this machine")
    return SHARED_DATA


def make_tokenizer(*, types: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that frames texts as BERT's does; DistilBERT's names no types."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", *["token_type_ids"] * types, "attention_mask"],
    )


def toy_encoder(family: str = "bert", layers: int = 4):
    """A random encoder of one family."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": len(VOCAB), "pad_token_id": 0, "initializer_range": 0.1}
    if family == "distilbert":
        return DistilBertModel(
            DistilBertConfig(**shared, dim=32, hidden_dim=64, n_layers=layers, n_heads=2)
        )
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 160,
    }
    if family == "roberta":
        # As the released ones have it: their tokenizers know no types.
        return RobertaModel(RobertaConfig(**shared, **sizes, type_vocab_size=1))
    return BertModel(BertConfig(**shared, **sizes))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy BERT encoder of four layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    toy_encoder().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int) -> None:
    """Sentences with one telling word; its kind is the label."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            good = draw.random() < 0.5
            words = [draw.choice(OTHER) for _ in range(draw.randint(2, 9))]
            words.insert(draw.randint(0, len(words)), draw.choice(GOOD if good else BAD))
            writer.writerow([" ".join(words), "good" if good else "bad"])


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Recipe keys of a toy classification task in CSV files."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.csv", 90, seed=1)
    write_rows(folder / "dev.csv", 41, seed=2)
    return {
        "train": str(folder / "train.csv"),
        "dev": str(folder / "dev.csv"),
        "text": "text",
        "label": "label",
        "cache": str(folder / "cache"),
    }


@pytest.fixture(scope="session")
def toy(encoder: Path, rows: dict[str, str]):
    """Builds recipes of toy runs: ``toy(out, method=..., train={...})``."""

    def make(out: Path, **keys) -> Recipe:
        train = {"epochs": 2, "lr": 1e-3, "batch_size": 16, **keys.pop("train", {})}
        finetune = {"epochs": 2, "lr": 3e-3, "batch_size": 16, **keys.pop("finetune", {})}
        data = {**rows, "max_length": 32, **keys.pop("data", {})}
        base = {"model": str(encoder), "task": "classification", "data": data}
        if "teacher" in keys and "model" not in keys:
            base.pop("model")
        base["measure"] = {"batches": []}  # timing starts a process for each model
        return recipe_from({**base, "train": train, "finetune": finetune, "out": str(out), **keys})

    return make


@pytest.fixture(scope="session")
def teacher(toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a toy teacher, fine-tuned once for all tests."""
    from raybert.run import finetune

    folder = tmp_path_factory.mktemp("teacher") / "run"
    recipe = toy(folder, train={"epochs": 6, "lr": 5e-3})
    return finetune(recipe, tell=lambda text: None)


WORKER = """
import sys
import torch
import torch.distributed as dist

torch.set_num_threads(1)
folder, rank, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if workers > 1:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=workers)
"""

SAVED = """
torch.save(found, f"{folder}/{rank}of{workers}.pt")
if dist.is_initialized():  # by DeepSpeed for one; its threads would end the process at its exit
    dist.destroy_process_group()
"""


def one_and_two(code: str, folder: Path) -> list[Any]:
    """What ``code`` leaves in ``found`` where one worker runs it, and where each of two does.

    It knows ``torch``, ``dist``, its ``rank`` and how many ``workers`` there are.
    """
    places = [("0", "1"), ("0", "2"), ("1", "2")]
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER + code + SAVED, str(folder), *place])
        for place in places
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    files = [folder / f"{rank}of{workers}.pt" for rank, workers in places]
    return [torch.load(file, weights_only=True) for file in files]
