"""A model folder may be anybody's: none of its code runs; and what is secret here stays here."""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import toy_encoder
from safetensors.torch import load_file

import raybert
from raybert.artifact import evaluate_model
from raybert.bench import bench
from raybert.errors import UserError
from raybert.import_ma_bert import read_state
from raybert.models import load_for_task, load_tokenizer, read_config
from raybert.recipe_file import load_recipe, recipe_from
from raybert.run import finetune
from raybert.tasks import get_task
from raybert.trust import check_weights

PACKAGE = Path(__file__).resolve().parents[1] / "raybert"


class Trap:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def hostile(encoder, tmp_path, monkeypatch) -> Path:
    """A copy of a good model, with code beside it; nobody is there to be asked."""

    def asked(*_: Any) -> str:
        raise AssertionError("the user was asked whether to run a folder's code")

    monkeypatch.setattr(builtins, "input", asked)
    folder = tmp_path / "hostile"
    shutil.copytree(encoder, folder)
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    return folder


def change(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def unmarked(folder: Path) -> bool:
    return not (folder.parent / "mark").exists()


def task(data: dict[str, Any]) -> Any:
    keys = recipe_from({"data": {**data, "labels": ["bad", "good"]}}).data
    return get_task("classification", keys)


# -- model folders ---------------------------------------------------------------------------------


def test_a_pickle_with_code_is_refused_unread(hostile, rows):
    weights = load_file(hostile / "model.safetensors")
    (hostile / "model.safetensors").unlink()
    trapped = {**weights, "trap": Trap(hostile.parent / "mark")}
    torch.save(trapped, hostile / "pytorch_model.bin", pickle_protocol=pickle.HIGHEST_PROTOCOL)
    change(hostile, "config.json", architectures=["BertForSequenceClassification"])
    recipe = recipe_from({"task": "classification", "data": rows})
    for call in (
        lambda: check_weights(str(hostile)),
        lambda: raybert.load(hostile),
        lambda: load_for_task(str(hostile), task(rows), seed=0),
        lambda: evaluate_model(hostile, recipe),
        lambda: bench(hostile, None, shapes=[(1, 8)], seconds=0.1),
    ):
        with pytest.raises(UserError):
            call()
    assert unmarked(hostile)


def test_a_checkpoint_to_be_imported_runs_nothing(tmp_path):
    torch.save({"weight": Trap(tmp_path / "mark")}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="cannot be read as a PyTorch state dict"):
        read_state(tmp_path / "ckpt.pt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("known", [True, False])
def test_a_models_own_classes_are_never_run(hostile, rows, known):
    classes = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C"}
    change(hostile, "config.json", auto_map=classes, **({} if known else {"model_type": "evil"}))
    if known:  # BERT after all: its own class serves
        model, _ = load_for_task(str(hostile), task(rows), seed=0)
        assert type(model).__name__ == "BertForSequenceClassification"
    else:
        with pytest.raises(UserError, match="cannot be read"):
            read_config(str(hostile))
    assert unmarked(hostile)


def test_a_tokenizers_own_class_is_never_run(hostile):
    auto_map = {"AutoTokenizer": ["evil.C", "evil.C"]}
    change(hostile, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="C")
    with contextlib.suppress(UserError):
        load_tokenizer(str(hostile))
    assert unmarked(hostile)


@pytest.mark.parametrize(
    "keys", [{"attn_implementation": "evil/kernel"}, {"output_attentions": True}]
)
def test_a_config_does_not_decide_how_a_forward_pass_is_carried_out(hostile, rows, keys):
    change(hostile, "config.json", return_dict=False, **keys)
    config = read_config(str(hostile))
    assert config._attn_implementation == "sdpa"
    model, _ = load_for_task(str(hostile), task(rows), seed=0)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(input_ids=ids).keys() == {"logits"}


@pytest.mark.parametrize(
    "shard", ["../../secret.safetensors", "/etc/passwd", "pytorch_model.bin", "absent.safetensors"]
)
def test_weights_outside_their_folder_are_refused(hostile, shard):
    (hostile / "pytorch_model.bin").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"bert.pooler.dense.bias": shard}}
    (hostile / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no safetensors file of its folder"):
        check_weights(str(hostile))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"num_hidden_layers": 10**9}, "layers 1000000000"),
        ({"num_attention_heads": 5}, "5 heads cannot share"),
        ({"hidden_act": "evil"}, "unknown activation"),
        ({"architectures": [5]}, "list of names"),
        ({"pad_token_id": 99}, "pad_token_id 99"),
        ({"id2label": {"0": "a", "7": "b"}}, "2 labels and names for"),
        ({"compression": [{"name": "evil"}]}, "method 'evil' that this raybert does not know"),
        ({"compression": 5}, "cannot be read"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(hostile, keys, told):
    change(hostile, "config.json", **keys)
    with pytest.raises(UserError, match=told):
        read_config(str(hostile))


def test_weights_that_the_config_does_not_describe_are_not_made_up(hostile, rows):
    change(hostile, "config.json", num_hidden_layers=6)
    with pytest.raises(UserError, match=r"lacks weights of its encoder.*encoder\.layer\.4"):
        load_for_task(str(hostile), task(rows), seed=0)
    toy_encoder(layers=6).save_pretrained(hostile)
    _, new = load_for_task(str(hostile), task(rows), seed=0)
    assert sorted(new) == ["classifier.bias", "classifier.weight"]


# -- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../etc", "/etc/x", "a/b", "..", ".hidden", "a\\b", ""])
def test_a_runs_name_is_no_path(name):
    try:
        recipe = recipe_from({"name": name})
    except UserError:
        return
    assert name == ""
    assert recipe.out == f"runs/{recipe.name}"


def test_a_recipe_builds_no_objects(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"task: !!python/object/apply:os.mkdir [{tmp_path / 'mark'}]\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_recipe(str(path))
    with pytest.raises(UserError, match="plain folder name"):  # it stays the text that it is
        load_recipe(None, [f"name=!!python/object/apply:os.mkdir [{tmp_path / 'mark'}]"])
    assert not (tmp_path / "mark").exists()


# -- raybert itself --------------------------------------------------------------------------------

RUNS_CODE = {"eval", "exec", "compile", "__import__"}
RUNS_MORE = ("os.system", ".popen", ".unpack_archive", ".extractall", ".full_load", ".unsafe_load")


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_nothing_in_the_package_runs_what_it_reads(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        keys = {key.arg: ast.unparse(key.value) for key in call.keywords}
        if name == "torch.load":
            assert keys["weights_only"] == "True", f"{path}:{call.lineno}"
        assert not name.startswith(("pickle.", "yaml.load", "marshal.", "dill.", "joblib.")), name
        assert name not in RUNS_CODE, f"{path}:{call.lineno}"
        assert not name.endswith(RUNS_MORE), f"{path}:{call.lineno}"
        assert keys.get("trust_remote_code", "False") == "False"
        assert keys.get("shell", "False") == "False"
        if name.startswith("Auto") and name.endswith("from_pretrained"):
            assert "trust_remote_code" in keys, f"{path}:{call.lineno}"


# -- secrets ---------------------------------------------------------------------------------------

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")


def test_secrets_reach_no_log_report_or_card(toy, tmp_path, monkeypatch, capfd):
    for name in SECRETS:
        monkeypatch.setenv(name, f"secret-{name}-0123456789")
    folder = finetune(toy(tmp_path / "run", train={"max_steps": 2}))
    with pytest.raises(UserError) as error:
        finetune(toy(tmp_path / "other", model="nobody/private-model"))
    seen = "".join(capfd.readouterr()) + str(error.value)
    written = [p for p in folder.rglob("*") if p.is_file()]
    assert {"README.md", "report.html", "metrics.jsonl", "recipe.yaml"} <= {p.name for p in written}
    for path in written:
        assert b"secret-" not in path.read_bytes(), path
    assert "secret-" not in seen
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["name"] == "run"
