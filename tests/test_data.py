"""From rows in files to tokenised data: real layouts, users' own files, reuse, and every mistake a
user can make."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import make_tokenizer

from raybert.config import DataConfig
from raybert.data import TaskData, load_prepared, prepare
from raybert.errors import TransientError, UserError
from raybert.features import TokenInfo, token_info

CSV = "text,label\nthe film was good,pos\na bad plot,neg\nvery fine,pos\nnot lovely,neg\n"


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file and returns its path as text."""

    def make(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return make


def prepared(name: str, cache: str, splits=("train", "dev", "test"), **data) -> TaskData:
    options = {"max_length": 32, **data}
    return prepare(
        name, DataConfig.model_validate({"cache": cache, **options}), make_tokenizer(), splits
    )


def refused(words: list[str], name: str, cache: str, **data) -> None:
    with pytest.raises(UserError) as error:
        prepared(name, cache, **data)
    for word in words:
        assert word in str(error.value), str(error.value)


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        ("mrpc", "glue/MRPC", (3668, 408, 1725)),
        ("rte", "glue", (2490, 277, 3000)),
        ("cola", "glue/CoLA", (8551, 1043, 1063)),
        ("stsb", "glue/STS-B", (5749, 1500, 1379)),
        ("sst2", "glue/SST-2", (67349, 872, 1821)),
    ],
)
def test_glue_folders(name: str, folder: str, counts, shared_data: Path, cache: str) -> None:
    data = prepared(name, cache, source=str(shared_data / folder))
    assert tuple(len(data.splits[s]) for s in ("train", "dev", "test")) == counts
    assert "label" not in data.rows["test"].column_names
    assert "labels" not in data.splits["test"].column_names
    assert all(isinstance(text, str) and text for text in data.rows["dev"]["text"][:50])


def test_glue_rows_are_the_files_rows(shared_data: Path, cache: str) -> None:
    data = prepared("mrpc", cache, ("dev",), source=str(shared_data / "glue/MRPC"))
    first = data.rows["dev"][0]
    assert first["text"].startswith("He said the foodservice pie business doesn't fit")
    # The stray quote is a character of the sentence, not the beginning of a quotation.
    assert first["text_pair"].startswith('"The foodservice')
    assert first["label"] == "equivalent"


def test_lines_that_qqp_has_cut_in_two_are_left_out(tmp_path: Path, cache: str, caplog) -> None:
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [f"{i}\t1\t2\tIs it {i} ?\tIs it not {i} ?\t{i % 2}" for i in range(4)]
    torn = "9\t1\t2\tIs it"
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join([head, rows[0], torn, *rows[1:], torn]))
    data = prepared("qqp", cache, ("train", "dev"), source=str(tmp_path))
    assert data.rows["train"]["text"][:] == [f"Is it {i} ?" for i in range(4)]
    assert "2 lines have other than 6 columns and are left out, the first is line 3" in caplog.text
    (tmp_path / "test.tsv").write_text("\n".join(["id\tquestion1\tquestion2", "0\tIs it ?"]))
    with pytest.raises(UserError, match="line 2: 2 columns, wanted 3"):
        prepared("qqp", cache, ("train", "test"), source=str(tmp_path))


# --- users' own files -----------------------------------------------------------------------------


def test_csv_with_a_held_out_dev(write, cache: str, caplog) -> None:
    lines = [f"the film was {'good' if i % 2 else 'bad'} {i},{i % 2}" for i in range(40)]
    path = write("mine.csv", "\n".join(["text,label", *lines]) + "\n")
    data = prepared("classification", cache, train=path)
    assert {s: len(d) for s, d in data.splits.items()} == {"train": 36, "dev": 4}
    assert data.task.labels == ("0", "1")
    assert "held out" in caplog.text
    texts = set(data.rows["train"]["text"]) | set(data.rows["dev"]["text"])
    assert len(texts) == 40
    again = prepared("classification", cache, ("dev",), train=path)
    assert again.rows["dev"]["text"][:] == data.rows["dev"]["text"][:]


@pytest.mark.parametrize("ext", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(ext: str, tmp_path: Path, cache: str) -> None:
    rows = {"review": ["good film", "bad, bad plot", 'a "fine" actor'], "stars": ["2", "1", "2"]}
    path = tmp_path / f"train.{ext}"
    table = datasets.Dataset.from_dict(rows)
    records = [dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)]
    if ext == "csv":
        table.to_csv(path)
    elif ext == "parquet":
        table.to_parquet(path)
    elif ext == "tsv":
        path.write_text(
            "review\tstars\n" + "".join(f"{r['review']}\t{r['stars']}\n" for r in records)
        )
    elif ext == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    else:
        path.write_text(json.dumps(records))
    options = {"source": str(tmp_path), "text": "review", "label": "stars"}
    data = prepared("classification", cache, ("train",), **options)
    assert data.rows["train"]["text"][:] == rows["review"]
    assert data.task.labels == ("1", "2")
    assert data.splits["train"]["labels"][:] == [1, 0, 1]


def test_regression_and_multilabel(write, cache: str) -> None:
    path = write("r.csv", "text,label\ngood,1.5\nbad,-2\n")
    data = prepared("regression", cache, ("train",), train=path)
    assert data.splits["train"]["labels"][:] == [1.5, -2.0]
    path = write("m.csv", "text,label\ngood,b;a\nbad,\nfine,c\n")
    data = prepared("multilabel", cache, ("train",), train=path, separator=";")
    assert data.task.labels == ("a", "b", "c")
    assert data.splits["train"]["labels"][:] == [[1.0, 1.0, 0.0], [0.0] * 3, [0.0, 0.0, 1.0]]


def test_text_for_mlm_is_packed(write, cache: str) -> None:
    path = write("book.txt", "the film was good\n\na bad plot and\n" * 50)
    data = prepared("mlm", cache, train=path, max_length=16)
    ids = data.splits["train"]["input_ids"][:]
    assert all(len(row) == 16 and row[0] == 2 and row[-1] == 3 for row in ids[:-1])
    total = sum(len(row) - 2 for s in data.splits for row in data.splits[s]["input_ids"])
    assert total == 50 * 8
    assert len(data.rows["dev"]) == 5


class Few:
    """A tokenizer that is given few texts at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.given, self.count = most, make_tokenizer(), 0

    def __call__(self, texts, *args, **kwargs):
        if not isinstance(texts, str):
            assert len(texts) <= self.most
            self.count += len(texts)
        return self.given(texts, *args, **kwargs)

    def __len__(self) -> int:
        return len(self.given)

    def __getattr__(self, name: str):
        return getattr(self.given, name)


@pytest.mark.parametrize("form", ["txt", "hub"])
def test_a_corpus_is_read_a_little_at_a_time(monkeypatch, write, cache: str, form: str) -> None:
    lines = [f"{'the film ' * (n % 7)}was {'good' if n % 3 else 'bad'}" for n in range(90)]
    path = write("book.txt", "\n\n".join(lines))
    if form == "hub":
        loaded = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": lines})})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    options = {"train": path} if form == "txt" else {"source": "a/corpus"}
    options |= {"max_length": 16, "limit": 60}
    whole = prepared("mlm", cache, **options)
    for name in ("features", "data"):
        monkeypatch.setattr(f"raybert.{name}.CHUNK", 7)
    config = DataConfig.model_validate({**options, "cache": cache + "2"})
    few = Few(7)
    parts = prepare("mlm", config, few)
    assert len(parts.rows["train"]) == 60
    assert len(parts.rows["dev"]) == round(0.05 * 90)
    assert few.count == 60 + round(0.05 * 90), "each text once"
    assert prepare("mlm", config, Few(0)).folder == parts.folder, "and then never again"
    for split, wanted in whole.splits.items():
        assert parts.rows[split]["text"][:] == whole.rows[split]["text"][:]
        assert parts.splits[split].to_dict() == wanted.to_dict()


def test_text_that_cannot_be_kept_is_pointed_at(monkeypatch, write, cache: str) -> None:
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [["a"], ["b"]]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: rows)
    with pytest.raises(UserError, match=r"row 1: .* is a list, not text"):
        prepared("mlm", cache, source="a/corpus")
    path = write("x.txt", "")
    Path(path).write_bytes(b"good\n\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        prepared("mlm", cache, train=path)


def test_a_corpus_that_is_lost_on_the_way_is_named(monkeypatch, write, cache: str) -> None:
    path = write("book.txt", "the film was good\n" * 30)

    def lost(tokenizer) -> TokenInfo:
        Path(path).unlink()
        return token_info(tokenizer)

    monkeypatch.setattr("raybert.data.token_info", lost)  # the last step before it is kept
    with pytest.raises(TransientError, match=r"book\.txt cannot be read: No such file"):
        prepared("mlm", cache, train=path)
    assert not list(Path(cache).iterdir())


def test_limit_keeps_the_same_few_training_rows(write, cache: str) -> None:
    path = write("t.csv", CSV)
    few = prepared("classification", cache, train=path, dev=path, limit=2)
    assert (len(few.splits["train"]), len(few.splits["dev"])) == (2, 4)
    again = prepared("classification", cache + "2", train=path, dev=path, limit=2)
    assert again.rows["train"]["text"][:] == few.rows["train"]["text"][:]


def test_imdb_folder(write, cache: str, tmp_path: Path) -> None:
    for half in ("train", "test"):
        for side in ("pos", "neg"):
            write(f"aclImdb/{half}/{side}/0_1.txt", f"a {half} <br />film")
    data = prepared("imdb", cache, source=str(tmp_path / "aclImdb"))
    assert data.rows["dev"]["label"][:] == ["neg", "pos"]
    assert data.rows["train"]["text"][0] == "a train  film"


def test_long_texts_are_cut_and_labels_may_be_ids_or_names(write, cache: str) -> None:
    path = write("t.csv", "sentence,label\n" + "good " * 60 + ",1\nbad,negative\n")
    data = prepared("sst2", cache, ("train",), train=path, max_length=8)
    assert data.lengths("train").tolist() == [8, 3]
    assert data.splits["train"]["labels"][:] == [1, 0]


# --- the Hub --------------------------------------------------------------------------------------


def test_hub_splits_and_names(monkeypatch, cache: str) -> None:
    asked = []
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        }
    )

    def rows(word: str, labels: list[int]) -> datasets.Dataset:
        texts = [f"{word} film"] * len(labels)
        columns = {"premise": texts, "hypothesis": texts, "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    def load(*names):
        asked.append(names)
        return datasets.DatasetDict(
            {
                "train": rows("good", [0, 1, 2]),
                "validation_matched": rows("bad", [1]),
                "validation_mismatched": rows("poor", [2, 0]),
                "test_mismatched": rows("weak", [-1]),
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = prepared("mnli_mm", cache)
    assert asked == [("nyu-mll/glue", "mnli")]
    assert data.rows["dev"]["text"][:] == ["poor film"] * 2
    assert data.rows["dev"]["label"][:] == ["contradiction", "entailment"]
    assert len(data.splits["test"]) == 1
    refused(
        ["no split 'trian'", "did you mean 'train'"], "mnli", cache, train="trian", source="a/b"
    )


def test_ids_count_in_the_sources_order_whatever_the_models_is(monkeypatch, write, cache) -> None:
    path = write("t.csv", "sentence,label\ngood,1\nbad,0\nbad,negative\n")
    data = prepared("sst2", cache, ("train",), train=path, labels=["positive", "negative"])
    assert data.rows["train"]["label"][:] == ["positive", "negative", "negative"]
    assert data.splits["train"]["labels"][:] == [0, 1, 1]
    # Other names are new ones, in the order of the ids.
    path = write("t.csv", "sentence,label\ngood,1\nbad,0\n")
    data = prepared("sst2", cache, ("train",), train=path, labels=["bad", "good"])
    assert data.rows["train"]["label"][:] == ["good", "bad"]

    def hub(names: list[str], ids: list[int]) -> None:
        label = datasets.ClassLabel(names=names)
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        rows = {"text": ["good film"] * len(ids), "label": ids}
        loaded = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)

    hub(["low", "mid", "high"], [0, 1, 2])
    options = {"source": "a/b", "labels": ["high", "low", "mid"]}
    data = prepared("classification", cache, ("train",), **options)
    assert data.rows["train"]["label"][:] == ["low", "mid", "high"]
    hub(["1", "2", "3"], [0, 1, 2])  # names that look like other labels' ids
    data = prepared("classification", cache, ("train",), source="a/b")
    assert data.rows["train"]["label"][:] == ["1", "2", "3"]


def test_hub_that_cannot_be_reached(cache: str) -> None:
    refused(["'nobody/nothing'", "Hub", "data=FOLDER"], "mrpc", cache, source="nobody/nothing")


# --- reuse ----------------------------------------------------------------------------------------


def test_second_call_reuses_and_workers_open_the_folder(write, cache: str) -> None:
    path = write("t.csv", CSV)
    first = prepared("classification", cache, train=path, dev=path)
    stamp = (first.folder / "raybert.json").stat().st_mtime_ns
    second = prepared("classification", cache, train=path, dev=path)
    assert second.folder == first.folder
    assert (first.folder / "raybert.json").stat().st_mtime_ns == stamp
    opened = load_prepared(first.folder)
    assert opened.task == first.task
    assert opened.splits["dev"][:] == first.splits["dev"][:]
    assert [p.name for p in Path(cache).iterdir()] == [first.folder.name]


def test_what_matters_changes_the_key_and_calls_do_not(write, cache: str) -> None:
    path = write("t.csv", CSV)
    tokenizer = make_tokenizer()

    def key(**data) -> str:
        options = {"max_length": 32, "cache": cache, "train": path, "dev": path, **data}
        return prepare("classification", DataConfig.model_validate(options), tokenizer).key

    first = key()
    # A fast tokenizer keeps the last call's truncation in itself.
    tokenizer(["a film"], truncation=True, max_length=5, padding="max_length")
    assert key() == first
    assert key(max_length=16) != first
    assert key(limit=3) != first
    tokenizer.add_tokens(["superduper"])
    assert key() != first
    again = key()
    write("t.csv", CSV.replace("good", "great"))
    assert key() != again


@pytest.mark.parametrize("victim", ["splits/train.arrow", "rows/dev.arrow", "raybert.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_data_is_made_again(victim: str, damage: str, write, cache: str) -> None:
    path = write("t.csv", CSV)
    first = prepared("classification", cache, train=path, dev=path)
    file = first.folder / victim
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="prepare it again"):
        load_prepared(first.folder)
    again = prepared("classification", cache, train=path, dev=path)
    assert again.splits["train"]["labels"][:] == [1, 0, 1, 0]


def _race(path: str, cache: str, barrier, results) -> None:
    barrier.wait()
    data = prepared("classification", cache, train=path, dev=path)
    results.put(data.splits["train"]["labels"][:])


def test_two_processes_may_prepare_at_once(write, cache: str) -> None:
    path = write("t.csv", CSV)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_race, args=(path, cache, barrier, results)) for _ in "12"]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert got == [[1, 0, 1, 0]] * 2
    assert len(list(Path(cache).iterdir())) == 1


# --- mistakes -------------------------------------------------------------------------------------


def test_missing_things(write, cache: str, tmp_path: Path) -> None:
    refused(["no such file", "nowhere.csv"], "mrpc", cache, train=str(tmp_path / "nowhere.csv"))
    refused(["no such file or folder"], "mrpc", cache, source=str(tmp_path / "nowhere"))
    (tmp_path / "void").mkdir()
    refused(["holds no data", "nothing"], "mrpc", cache, source=str(tmp_path / "void"))
    refused(["data.train=FILE"], "classification", cache)
    refused(["unknown task", "'mrpc'"], "mrcp", cache)
    refused([".docx", ".csv"], "mrpc", cache, train=write("t.docx", "x"))
    write("half/train.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\ta\tb\tc\td\n")
    refused(["no such file", "dev.tsv"], "mrpc", cache, source=str(tmp_path / "half"))


def test_row_of_the_wrong_width_is_named(write, cache: str, tmp_path: Path) -> None:
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    path = write("MRPC/train.tsv", header + "1\ta\tb\tc\td\n0\ta\tb\tc\n")
    write("MRPC/dev.tsv", header + "1\ta\tb\tc\td\n")
    refused([path, "line 3", "4 columns", "wanted 5"], "mrpc", cache, source=str(tmp_path / "MRPC"))
    path = write("t.csv", 'text,label\n"two\nlines",a\nx,b,c\n')
    refused([path, "line 4", "3 columns"], "classification", cache, train=path)


def test_labels_that_do_not_fit(write, cache: str) -> None:
    path = write("t.csv", "sentence,label\ngood,1\nbad,negatve\n")
    refused(
        ["line 3", "'negatve'", "did you mean 'negative'", "positive"], "sst2", cache, train=path
    )
    path = write("t.csv", "sentence,label\ngood,1\nbad,2\n")
    refused(["line 3", "'2' is not a label"], "sst2", cache, train=path)
    path = write("t.csv", "sentence,label\ngood,1\nbad,\n")
    refused(["line 3", "'' is not a label"], "sst2", cache, train=path)
    path = write("t.csv", "sentence,label\ngood,1\nbad,1\n")
    refused(["every training row", "'positive'"], "sst2", cache, train=path)
    # Among labels that are numbers, a number that is none of them is no id.
    stars = write("s.csv", "text,label\ngood,5\nbad,2\nwell,3\n")
    dev = write("d.csv", "text,label\ngood,5\npoor,1\n")
    refused(["line 3", "'1' is not a label"], "classification", cache, train=stars, dev=dev)
    path = write("u.csv", "text,label\ngood,a\nbad,a\n")
    refused(["1 class(es)", "at least two"], "classification", cache, train=path)
    path = write("r.csv", "text,label\ngood,1\nbad,high\n")
    refused(["line 3", "'high'", "not a number"], "regression", cache, train=path)
    path = write("r.csv", "text,label\ngood,1\nbad,nan\n")
    refused(["line 3", "not a number"], "regression", cache, train=path)


def test_columns_that_do_not_fit(write, cache: str) -> None:
    path = write("t.csv", "review,label\ngood,a\nbad,b\n")
    refused(
        ["no column 'reveiw'", "did you mean 'review'"],
        "classification",
        cache,
        train=path,
        text="reveiw",
    )
    path = write("t.csv", "text,label\n,a\n,b\n")
    refused(["'text' is empty in every row"], "classification", cache, train=path)
    refused(
        ["no rows", "train split"], "classification", cache, train=write("e.csv", "text,label\n")
    )
    refused(["is empty"], "classification", cache, train=write("n.csv", ""))
    refused(["names a column twice"], "classification", cache, train=write("d.csv", "a,a\n1,2\n"))


def test_cells_that_are_no_text(cache: str, tmp_path: Path) -> None:
    path = str(tmp_path / "t.parquet")
    for texts, kind in (([b"good", b"bad"], "raw bytes"), ([["a", "b"], ["c"]], "a list")):
        datasets.Dataset.from_dict({"text": texts, "label": ["a", "b"]}).to_parquet(path)
        refused(["row 1", f"is {kind}, not text"], "classification", cache, train=path)
    datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [b"a", b"b"]}).to_parquet(path)
    refused(["row 1", "is raw bytes"], "classification", cache, train=path)
    rows = {"text": ["good", "bad", "fine"], "label": [0.0, 1.0, float("nan")]}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    refused(["row 3", "'' is not a label"], "classification", cache, train=path)


def test_files_that_are_not_what_they_say(write, cache: str, tmp_path: Path) -> None:
    refused(["line 2", "not JSON"], "mrpc", cache, train=write("t.jsonl", '{"a": 1}\n{"a": \n'))
    refused(["line 1", "wanted an object"], "mrpc", cache, train=write("t.jsonl", "[1]\n"))
    refused(["Parquet"], "mrpc", cache, train=write("t.parquet", "text"))
    (tmp_path / "latin.csv").write_bytes(b"text,label\ncaf\xe9,1\n")
    refused(["not UTF-8"], "classification", cache, train=str(tmp_path / "latin.csv"))
    write("two/train.csv", CSV)
    write("two/train.tsv", CSV)
    refused(
        ["several files", "data.train=FILE"], "classification", cache, source=str(tmp_path / "two")
    )


def test_lengths_that_leave_no_room(write, cache: str) -> None:
    path = write("t.csv", CSV)
    refused(["data.max_length=2", "at least 3"], "classification", cache, train=path, max_length=2)
    refused(["data.max_length=4", "at least 5"], "mrpc", cache, train=path, max_length=4)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 64
    with pytest.raises(UserError, match="64 tokens that the model takes"):
        prepare(
            "classification",
            DataConfig.model_validate({"train": path, "cache": cache, "max_length": 65}),
            tokenizer,
        )


def test_cache_that_cannot_be_written(write, tmp_path: Path) -> None:
    path = write("t.csv", CSV)
    blocked = write("blocked", "a file, not a folder")
    refused(["data.cache"], "classification", blocked, train=path)


def test_demo_needs_no_source(cache: str) -> None:
    data = prepared("demo", cache)
    assert set(data.splits) == {"train", "dev", "test"}
    assert np.bincount(data.batcher("dev").columns["labels"]).min() > 200
