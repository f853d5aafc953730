"""Run the model in this folder: `python inference.py "a text" ["a second text"]`.

Needs Python 3.10, onnxruntime (README.md says from which version on), numpy and tokenizers, and
nothing else. As a module:

    from inference import Model

    model = Model()
    model(["a text", "another"])          # one answer a text
    model(["a question"], ["a context"])  # pairs, and questions about a context

An answer is a dict, which depends on what the model was trained for:

- classification: ``label``, its ``score``, and the ``scores`` of all labels, which add up to 1
- several labels: the ``labels`` whose probability is above a half, and the ``scores`` of all
- regression: ``score``
- question answering: ``answer`` as it stands in the context, its ``start`` there, and ``score``,
  by how much it is above having no answer; the answer may be empty if the model was trained so
- masked words: ``tokens``, for each mask token of the text its likeliest tokens with their scores
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer

BATCH = 16
"""Rows that are computed together."""

TOP = 5
"""Tokens named for each mask token."""


class Model:
    """An exported model.

    Args:
        folder: of `model.onnx`, `tokenizer.json` and `export.json`; nothing: this file's.
        threads: CPU threads; nothing: all cores.
    """

    def __init__(self, folder: str | Path | None = None, threads: int | None = None) -> None:
        self.folder = Path(folder) if folder else Path(__file__).resolve().parent
        text = (self.folder / "export.json").read_text(encoding="utf-8")
        self.settings: dict[str, Any] = json.loads(text)["model"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(
            str(self.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.names = [entry.name for entry in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        answers = self.settings["kind"] == "qa"
        self.tokenizer.enable_truncation(
            self.settings["max_length"],
            stride=self.settings["stride"] if answers else 0,
            strategy="only_second" if answers else "longest_first",
        )

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """One answer for each text, or for each text and its pair, in order."""
        if isinstance(texts, str) or isinstance(pairs, str):
            raise TypeError("give lists of texts, not a string")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} second texts; give one for each")
        kind = self.settings["kind"]
        if kind == "qa":
            if pairs is None:
                raise ValueError("give each question a context, as its second text")
            return [self._answer(*both) for both in zip(texts, pairs, strict=True)]
        rows = list(zip(texts, pairs, strict=True)) if pairs is not None else list(texts)
        encodings = self.tokenizer.encode_batch(rows)
        make = {
            "classification": self._classes,
            "multilabel": self._labels,
            "regression": self._number,
            "mlm": self._words,
        }[kind]
        return [
            make(encoding, logits)
            for encoding, (logits,) in zip(encodings, self.logits(encodings), strict=True)
        ]

    def logits(self, encodings: Sequence[Encoding]) -> list[list[np.ndarray]]:
        """For each row the model's outputs, cut to its own tokens where they are one a token."""
        rows: list[list[np.ndarray]] = []
        for first in range(0, len(encodings), BATCH):
            part = encodings[first : first + BATCH]
            longest = max(len(encoding.ids) for encoding in part)
            shape = len(part), longest
            arrays = {
                "input_ids": np.full(shape, self.settings["pad_id"], np.int64),
                "attention_mask": np.zeros(shape, np.int64),
                "token_type_ids": np.zeros(shape, np.int64),
            }
            for row, encoding in enumerate(part):
                own = len(encoding.ids)
                arrays["input_ids"][row, :own] = encoding.ids
                arrays["attention_mask"][row, :own] = 1
                if self.settings["token_types"]:
                    arrays["token_type_ids"][row, :own] = encoding.type_ids
            outputs = self.session.run(None, {name: arrays[name] for name in self.names})
            each = self.settings["kind"] in ("qa", "mlm")
            for row, encoding in enumerate(part):
                own = slice(len(encoding.ids)) if each else slice(None)
                rows.append([np.asarray(output)[row][own] for output in outputs])
        return rows

    def _classes(self, _: Encoding, logits: np.ndarray) -> dict[str, Any]:
        scores = _named(self.settings["labels"], _softmax(logits))
        label = max(scores, key=lambda name: scores[name])
        return {"label": label, "score": scores[label], "scores": scores}

    def _labels(self, _: Encoding, logits: np.ndarray) -> dict[str, Any]:
        scores = _named(self.settings["labels"], 1 / (1 + np.exp(-logits)))
        return {"labels": [name for name, score in scores.items() if score > 0.5], "scores": scores}

    def _number(self, _: Encoding, logits: np.ndarray) -> dict[str, Any]:
        return {"score": float(logits[0])}

    def _words(self, encoding: Encoding, logits: np.ndarray) -> dict[str, Any]:
        asked = np.flatnonzero(np.array(encoding.ids) == self.settings["mask_id"])
        if not len(asked):
            mask = self.tokenizer.id_to_token(self.settings["mask_id"])
            raise ValueError(f"no {mask} in the text; put it where a word is to be found")
        found = []
        for scores in _softmax(logits[asked]):
            best = np.argsort(-scores, kind="stable")[:TOP]
            words = [self.tokenizer.id_to_token(int(token)) or "" for token in best]
            found.append(_named(words, scores[best]))
        return {"tokens": found}

    def _answer(self, question: str, context: str) -> dict[str, Any]:
        """The best span over all windows of a context."""
        first = self.tokenizer.encode(self._cut(question), context)
        windows = [first, *first.overflowing]
        best, null, span = -np.inf, np.inf, (0, 0)
        for window, (starts, ends) in zip(windows, self.logits(windows), strict=True):
            null = min(null, float(starts[0] + ends[0]))
            places = np.array([part == 1 for part in window.sequence_ids])
            width = np.arange(len(places))[None, :] - np.arange(len(places))[:, None] + 1
            real = places[:, None] & places[None, :]
            real &= (width >= 1) & (width <= self.settings["max_answer"])
            scores = np.where(real, starts[:, None] + ends[None, :], -np.inf)  # [T, T]
            start, end = np.unravel_index(scores.argmax(), scores.shape)
            if scores[start, end] > best:
                best = float(scores[start, end])
                span = window.offsets[start][0], window.offsets[end][1]
        if best == -np.inf or (self.settings["no_answer"] and null > best):
            score = None if best == -np.inf else best - null  # none of the context was read
            return {"answer": "", "start": None, "score": score}
        text = context[slice(*span)]
        shift = len(text) - len(text.lstrip())
        return {"answer": text.strip(), "start": span[0] + shift, "score": best - null}

    def _cut(self, question: str) -> str:
        """A question of as many tokens as every window has room for, as in training."""
        question, room = question.strip(), self.settings["question"]
        self.tokenizer.no_truncation()
        offsets = self.tokenizer.encode(question, add_special_tokens=False).offsets
        self.tokenizer.enable_truncation(
            self.settings["max_length"], stride=self.settings["stride"], strategy="only_second"
        )
        return question if len(offsets) <= room else question[: offsets[room - 1][1]]


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def main() -> None:
    """Print the answer for one text or pair as JSON."""
    parser = argparse.ArgumentParser(description="run the model in this folder")
    parser.add_argument("text", help="a text; for question answering, the question")
    parser.add_argument("second", nargs="?", help="a second text; the context")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    args = parser.parse_args()
    model = Model(threads=args.threads)
    try:
        answers = model([args.text], None if args.second is None else [args.second])
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(answers[0], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
