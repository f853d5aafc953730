"""Inputs that nobody thought of: whatever comes in, a user reads a sentence and never a traceback.

A short run by default; RAYBERT_FUZZ=5000 makes so many of each kind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import GOOD, OTHER
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from raybert.checkpoint import find_last_good
from raybert.cli import main
from raybert.compressed import longest_input
from raybert.config import DataConfig, KDConfig, MeasureConfig, Recipe, ResourcesConfig, TrainConfig
from raybert.data import prepare
from raybert.errors import UserError
from raybert.models import blank, load_tokenizer, read_config
from raybert.predictions import fault, key_of
from raybert.readers import read_file
from raybert.recipe_file import dump_recipe, load_recipe, recipe_from
from raybert.tasks import TASKS

COUNT = int(os.environ.get("RAYBERT_FUZZ", "0"))


def fuzzed(count: int) -> Any:
    return settings(
        max_examples=COUNT or count,
        deadline=None,
        database=None,
        derandomize=not COUNT,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
    )


def refused_or_not(call: Any, *args: Any) -> Any:
    """What a call returns; it may refuse, in one printable sentence, and nothing else."""
    try:
        return call(*args)
    except UserError as error:
        text = str(error)
        assert 10 < len(text) < 20_000
        assert text[-1] in ".)?:", text[-200:]
        return None


# -- recipes ---------------------------------------------------------------------------------------

SECTIONS = {"data": DataConfig, "train": TrainConfig, "kd": KDConfig, "measure": MeasureConfig}
SECTIONS |= {"resources": ResourcesConfig}
OF_METHODS = ("layers", "epochs", "lr", "share", "bits", "groups", "name", "shape", "nothing")
KEYS = [
    *Recipe.model_fields,
    *(f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields),
    *(f"method.{name}.{key}" for name in ("theseus", "lobert", "q8bert") for key in OF_METHODS),
    *("method.theseus", "method.x.y", "data.train.deep", "a.b.c.d", "", ".", "..", "="),
]

ODD = st.sampled_from(
    [
        *(
            "",
            "~",
            "~nobody-here/x",
            "\0",
            "null",
            ".inf",
            "-.inf",
            ".nan",
            "1e999",
            "-1",
            "0",
            "1",
        ),
        *("2001-13-45", "!!timestamp x", "!!int x", "!!python/object/apply:os.system [ls]", "*a"),
        *("[" * 250, "{" * 250, "&a [*a]", "{1: 2}", "[1, [2]]", "{name: [1]}", "theseus,theseus"),
        *("9" * 5000, "1" + "0" * 400, "0x1f", "1:30", "yes", "🙂", "\udcff", "a" * 300, "../../x"),
        *("[theseus: {layers: 1}]", "{theseus: 5}", "5", "[5]", "- a", "a: b: c", "%", "@", "`"),
    ]
)
VALUES = st.one_of(ODD, st.text(max_size=20), st.integers().map(str), st.floats().map(str))
WORDS = st.lists(st.tuples(st.sampled_from(KEYS), VALUES).map("=".join), max_size=5)

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["theseus", "lobert", "demo", "~nobody-here", "a\0b", "\ud800"]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "name", "theseus", "layers"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def whole_recipe(recipe: Recipe | None) -> None:
    """A recipe that was accepted can be written, and read again as it was."""
    if recipe is None:
        return
    text = dump_recipe(recipe)
    text.encode()
    assert recipe_from(yaml.safe_load(text)) == recipe
    assert recipe.folder.is_absolute()
    assert recipe.data.cache_folder.is_absolute()


@fuzzed(60)
@given(WORDS)
def test_words(words):
    whole_recipe(refused_or_not(load_recipe, None, words))


@fuzzed(40)
@given(st.dictionaries(st.sampled_from([k.split(".")[0] for k in KEYS]), TREES, max_size=4))
def test_mappings(data):
    whole_recipe(refused_or_not(recipe_from, data))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def mutated(draw: Any, content: bytes, extra: list[bytes]) -> bytes:
    """A file with a few pieces cut, repeated, or put in the place of others."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.integers(0, 30)))
        piece = draw(st.one_of(st.sampled_from(extra), st.binary(max_size=6)))
        kind = draw(st.sampled_from(["cut", "put", "twice", "end"]))
        if kind == "cut":
            content = content[:at] + content[to:]
        elif kind == "put":
            content = content[:at] + piece + content[to:]
        elif kind == "twice":
            content = content[:to] + content[at:]
        else:
            content = content[:at]
    return content


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join([f'*{b}'] * 9)}]\n" for b, n in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_BITS = [
    b": ",
    b"- ",
    b"\n  ",
    b"&a ",
    b"*a",
    b"!!set ",
    b"2001-99-99",
    b"[",
    b"{",
    b"\t",
    b"? ",
]


@fuzzed(40)
@given(data=st.data())
def test_recipe_files(place, data):
    base = (
        b"task: demo\nmethod:\n  - name: theseus\n    layers: 2\ntrain: {epochs: 1, lr: 1.0e-4}\n"
    )
    path = place / "recipe.yaml"
    path.write_bytes(mutated(data.draw, base, [*YAML_BITS, LAUGHS.encode()]))
    words = data.draw(WORDS)
    whole_recipe(refused_or_not(load_recipe, str(path), words))


def test_a_recipe_that_stands_for_more_than_memory_holds_is_refused_at_once(place):
    path = place / "laughs.yaml"
    path.write_text(LAUGHS + "train: *i\n")
    with pytest.raises(UserError) as error:
        load_recipe(str(path))
    assert len(str(error.value)) < 20_000


# -- rows ------------------------------------------------------------------------------------------

ROWS = [(f"{OTHER[i % 9]} {GOOD[i % 5]}", ("good", "bad")[i % 2]) for i in range(6)]
TABLES = {
    ".csv": "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS),
    ".tsv": "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS),
    ".jsonl": "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS),
    ".json": json.dumps([{"text": t, "label": y} for t, y in ROWS]),
    ".txt": "\n".join(text for text, _ in ROWS),
}
SQUAD = {"id": "1", "question": "who", "answers": [{"text": "good", "answer_start": 4}]}
SQUAD_FILE = json.dumps({"data": [{"paragraphs": [{"context": "the good film", "qas": [SQUAD]}]}]})
ROW_BITS = [
    *(b'"', b",", b"\t", b"\n", b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"null"),
    *(b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b"{}", b"[]", b'""', b"true", b"-1"),
    *("🙂".encode(), "\u2028".encode(), b"label", b"text", b"1.0", b"\\u0000"),
]
KINDS = {"classification": "", "regression": "", "multilabel": "", "mlm": "", "squad": ".json"}


@fuzzed(40)
@given(data=st.data())
def test_data_files(place, encoder, data):
    task = data.draw(st.sampled_from(list(KINDS)))
    ending = KINDS[task] or data.draw(st.sampled_from(list(TABLES)))
    base = SQUAD_FILE if task == "squad" else TABLES[ending]
    path = place / f"rows{ending}"
    path.write_bytes(mutated(data.draw, base.encode(), ROW_BITS))
    refused_or_not(read_file, path)
    config = recipe_from(
        {
            "data": {
                "train": str(path),
                "dev": str(path),
                "max_length": 16,
                "stride": 4,
                "cache": str(place / "cache"),
                **data.draw(st.sampled_from([{}, {"separator": ";"}, {"labels": ["good", "bad"]}])),
            }
        }
    ).data
    refused_or_not(prepare, task, config, TOKENIZER.setdefault(0, load_tokenizer(str(encoder))))
    assert not list((place / "cache").glob(".*"))


TOKENIZER: dict[int, Any] = {}

# -- model folders ---------------------------------------------------------------------------------

CONFIG_KEYS = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size", "hidden_act", "pad_token_id", "architectures"),
    *("id2label", "label2id", "num_labels", "problem_type", "model_type", "compression", "dtype"),
    *(
        "attn_implementation",
        "_attn_implementation",
        "auto_map",
        "quantization_config",
        "is_decoder",
    ),
    *("hidden_dropout_prob", "layer_norm_eps", "output_attentions", "return_dict", "use_cache"),
    *("add_cross_attention", "chunk_size_feed_forward", "pruned_heads", "tie_word_embeddings"),
]
CONFIG_VALUES = st.one_of(
    LEAVES,
    st.integers(-2, 70),
    st.sampled_from(
        [10**9, 2**63, "gelu", "relu", "raybert_bert", "roberta", "gpt2", "evil/kernel"]
    ),
    st.sampled_from(
        [
            [{"name": "theseus"}],
            [{"name": "q8bert", "weight_bits": 99}],
            [{"name": "nobody"}],
            {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
            {"0": "a", "5": "b"},
            {"x": "y"},
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            ["BertForSequenceClassification"],
            [5],
        ]
    ),
    TREES,
)


@fuzzed(40)
@given(data=st.data())
def test_model_configs(place, encoder, data):
    folder = place / "model"
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    held = json.loads((encoder / "config.json").read_text())
    if data.draw(st.booleans()):
        changes = st.dictionaries(
            st.sampled_from(CONFIG_KEYS), CONFIG_VALUES, min_size=1, max_size=3
        )
        text = json.dumps({**held, **data.draw(changes)}).encode()
    else:
        bits = [b"null", b"-1", b"[]", b"{}", b'"x"', b"1e9", b"true", b",", b"\xff"]
        text = mutated(data.draw, json.dumps(held).encode(), bits)
    (folder / "config.json").write_bytes(text)
    config = refused_or_not(read_config, str(folder))
    if config is not None:
        assert config._attn_implementation == "sdpa"
        assert longest_input(config) < 2**25
        if config.num_hidden_layers < 8:
            for kind in ("classification", "mlm"):
                refused_or_not(blank, config, kind, [])


@fuzzed(25)
@given(data=st.data())
def test_tokenizer_files(place, encoder, data):
    folder = place / "tokenizer"
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    bits = [b"null", b"-1", b"[]", b"{}", b'"x"', b'"auto_map": {"AutoTokenizer": ["e.T", "e.T"]},']
    (folder / name).write_bytes(mutated(data.draw, (encoder / name).read_bytes(), bits))
    tokenizer = refused_or_not(load_tokenizer, str(folder))
    if tokenizer is not None:
        config = {"train": str(place / "good.csv"), "max_length": 16, "cache": str(place / "cache")}
        (place / "good.csv").write_text(TABLES[".csv"])
        refused_or_not(prepare, "classification", recipe_from({"data": config}).data, tokenizer)


# -- what raybert itself has written ---------------------------------------------------------------


@fuzzed(40)
@given(TREES)
def test_folders_of_predictions(place, tree):
    folder = place / "predictions"
    folder.mkdir(exist_ok=True)
    identity = {"teacher": "t", "data": "d", "split": "train", "format": 1}
    meta = {"format": 1, "identity": identity, "key": key_of(identity), "kind": "classification"}
    meta |= {"cls": True, "layers": 1, "hidden": 1, "rows": 1, "shard_rows": 1, "shards": []}
    if isinstance(tree, dict):
        renamed = dict(zip(meta, tree.values(), strict=False))
        tree = {**meta, **{list(meta)[-1 - i]: v for i, v in enumerate(renamed.values())}}
    (folder / "meta.json").write_text(json.dumps(tree))
    reason = fault(folder, identity, cls=True)
    assert reason is None or isinstance(reason, str)


@fuzzed(30)
@given(TREES, st.sampled_from(["phase0-step0000006", "phase0-step0000006 (copy)", "phasex-stepy"]))
def test_checkpoint_folders(place, tree, name):
    folder = place / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    (folder / name / "manifest.json").write_text(json.dumps(tree))
    kept, passed_over = find_last_good(folder)
    assert kept is None or not tree
    assert len(passed_over) <= 1


RUN_BITS = [b"null", b"-1", b"[]", b"{}", b'"x"', b"1e999", b"NaN", b"true", b"\xff", b'"kind": 5,']


@fuzzed(8)
@given(data=st.data())
def test_run_folders(place, teacher, data):
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("report.json", "metrics.jsonl", "recipe.yaml"):
        shutil.copy(teacher / name, folder)
    name = data.draw(st.sampled_from(["report.json", "metrics.jsonl", "recipe.yaml"]))
    (folder / name).write_bytes(mutated(data.draw, (teacher / name).read_bytes(), RUN_BITS))
    assert main(["report", str(folder), "--out", str(place / "page")]) in (0, 2)


# -- the command itself ----------------------------------------------------------------------------


@fuzzed(5)
@given(data=st.data())
def test_the_command_ends_with_a_sentence(place, encoder, data):
    path = place / "rows.csv"
    path.write_text(TABLES[".csv"])
    words = [f"model={encoder}", "task=classification", f"data.train={path}", f"data.dev={path}"]
    words += [f"data.cache={place / 'cache'}", "data.max_length=16", f"out={place / 'out'}"]
    task = st.sampled_from([f"task={name}" for name in TASKS if TASKS[name].hub is None])
    words += data.draw(WORDS) + data.draw(st.lists(task, max_size=1))
    command = data.draw(st.sampled_from(["finetune", "compress"]))
    words = [word for word in words if "=" in word and not word.startswith("-")]
    assert main([command, *words, "--dry-run"]) in (0, 2)
    assert not (place / "out").exists()
