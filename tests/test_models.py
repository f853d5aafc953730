"""Compressed classes, loading with a task's head, and probes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import VOCAB, toy_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

import raybert
from raybert.bench import parameters
from raybert.compressed import COMPRESSED, mark_compressed
from raybert.errors import UserError
from raybert.method import MethodConfig
from raybert.methods import METHODS
from raybert.models import HEADS, PROBE, blank, load_for_task, read_config, write_probe
from raybert.phase import Phase
from raybert.surgery import encoder_layers, family
from raybert.tasks import TASKS, Task

FAMILIES = ("bert", "roberta", "distilbert")
KINDS = ("classification", "qa", "mlm")
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
}


class Squeeze(Phase):
    """Two thin matrices in place of each feed-forward's first."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def prepare(self, model: nn.Module) -> None:
        for layer in encoder_layers(model):
            distil = family(model.config) == "distilbert"
            holder, name = (
                (layer.get_submodule("ffn"), "lin1")
                if distil
                else (layer.get_submodule("intermediate"), "dense")
            )
            whole = holder.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            thin = nn.Linear(whole.in_features, self.rank, bias=False)
            setattr(holder, name, nn.Sequential(thin, nn.Linear(self.rank, whole.out_features)))


class Levels(Phase):
    """An int8 buffer beside every weight matrix that there is by now, added to its output."""

    def prepare(self, model: nn.Module) -> None:
        for layer in encoder_layers(model):
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    levels = torch.randint(-9, 9, (module.out_features,), dtype=torch.int8)
                    module.register_buffer("levels", levels)
                    module.register_forward_hook(_add_levels)


def _add_levels(module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out + 0.01 * module.get_buffer("levels")


class Bottleneck(MethodConfig):
    leaves_trace = True
    name: Literal["bottleneck"] = "bottleneck"
    rank: int = 3

    def resolve(self, model_config: Any) -> Bottleneck:
        return self

    def phases(self) -> list[Phase]:
        return [Squeeze(self.rank)]


class Stepped(Bottleneck):
    name: Literal["stepped"] = "stepped"  # pyright: ignore[reportIncompatibleVariableOverride]

    def phases(self) -> list[Phase]:
        return [Levels()]


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.setitem(METHODS, "bottleneck", Bottleneck)
    monkeypatch.setitem(METHODS, "stepped", Stepped)


def with_head(name: str, kind: str) -> Any:
    """A toy model of a family with a head of three labels, in evaluation mode."""
    config = toy_encoder(name, layers=2).config
    if kind == "classification":
        config.num_labels = 3
    torch.manual_seed(1)
    return HEADS[kind].from_config(config).eval()


def compressed(model: Any, *chain: MethodConfig) -> Any:
    """What training leaves: each method's phases done, and noted in the config."""
    torch.manual_seed(2)
    for method in chain:
        for phase in method.phases():
            phase.prepare(model)
            phase.finish(model)
        mark_compressed(model, method)
    return model.eval()


def batch(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, len(VOCAB), (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def outputs(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(**batch()).to_tuple()[0]


def assert_real(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_meta, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shards", [1, 4])
def test_a_compressed_model_loads_bit_for_bit_by_every_door(methods, tmp_path, name, kind, shards):
    model = with_head(name, kind)
    stock = type(model).__name__
    model = compressed(model, Bottleneck(rank=4))
    assert type(model) is COMPRESSED[stock]
    before = outputs(model)
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 1000)
    files = [p.name for p in tmp_path.iterdir()]
    assert not [file for file in files if file.endswith((".bin", ".pt"))]
    assert (sum(file.endswith(".safetensors") for file in files) > 1) == (shards > 1)
    for load in (
        raybert.load,
        AUTO[kind].from_pretrained,
        COMPRESSED[stock].from_pretrained,
    ):
        again = load(tmp_path).eval()
        assert type(again) is COMPRESSED[stock]
        assert again.config.compression == [Bottleneck(rank=4).model_dump()]
        assert_real(again)
        assert torch.equal(outputs(again), before)
        assert parameters(again) == parameters(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_models_are_untouched(tmp_path, name):
    model = with_head(name, "classification")
    model.save_pretrained(tmp_path)
    again = raybert.load(tmp_path)
    assert type(again) is type(model)
    assert again.config.model_type == name
    assert "compression" not in again.config.to_dict()
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_was_stored_in_half_precision_is_computed_in_float32(tmp_path, dtype):
    model = with_head("bert", "classification").to(dtype)
    model.save_pretrained(tmp_path)
    again = raybert.load(tmp_path)
    assert again.dtype == again.config.dtype == torch.float32
    assert torch.equal(outputs(again), outputs(model.float()))


@pytest.mark.parametrize("order", [("bottleneck", "stepped"), ("stepped", "bottleneck")])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_chain_is_replayed_in_its_order_and_integers_survive(methods, tmp_path, name, order):
    model = compressed(
        with_head(name, "classification"), *(METHODS[n].model_validate({"name": n}) for n in order)
    )
    assert [entry["name"] for entry in model.config.compression] == list(order)
    model.save_pretrained(tmp_path)
    again = raybert.load(tmp_path)
    assert again.config.compression == model.config.compression
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    integers = [key for key in one if key.endswith("levels")]
    thin = [key for key in integers if ".dense.0." in key or ".lin1.0." in key]
    assert len(thin) == (2 if order[0] == "bottleneck" else 0)
    assert integers
    for key in integers:
        assert two[key].dtype == torch.int8
        assert torch.equal(one[key], two[key]), key
    assert torch.equal(outputs(again), outputs(model))
    # Loading a second time what was loaded changes nothing either.
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(raybert.load(tmp_path / "again")), outputs(model))


def test_marking_keeps_the_attention_and_all_modules_share_the_config(methods):
    model = with_head("bert", "classification")
    model.set_attn_implementation("eager")
    model = compressed(model, Bottleneck())
    assert model.config._attn_implementation == "eager"
    assert model.config.model_type == "raybert_bert"
    assert model.base_model.config is model.config
    with torch.inference_mode():
        out = model(**batch(), output_attentions=True)
    assert len(out.attentions) == 2


def test_without_raybert_a_compressed_folder_is_refused_and_not_misread(methods, tmp_path):
    compressed(with_head("bert", "classification"), Bottleneck()).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['raybert'] = sys.modules['deepspeed'] = None\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        f"try: A.from_pretrained({str(tmp_path)!r})\n"
        "except ValueError as error: print('refused:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "refused:" in done.stdout
    assert "raybert_bert" in done.stdout


def test_loading_what_is_no_model_is_refused(tmp_path, encoder):
    with pytest.raises(UserError, match="not a model folder"):
        raybert.load(tmp_path)
    with pytest.raises(UserError, match="holds a BertModel"):
        raybert.load(encoder)
    with pytest.raises(UserError, match="cannot be read"):
        raybert.load(tmp_path / "absent")


def test_damaged_weights_are_refused(tmp_path):
    with_head("bert", "classification").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match="is damaged"):
        raybert.load(tmp_path)


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    with_head("bert", "classification").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks .*layer\.1\.output\.dense\.weight"):
        raybert.load(tmp_path)


# -- probes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_finds_a_weight_that_changed(tmp_path, kind):
    model = with_head("bert", kind)
    model.save_pretrained(tmp_path)
    write_probe(model, tmp_path, {**batch(), "labels": torch.zeros(3)})
    assert set(load_file(tmp_path / PROBE)) == {"input_ids", "attention_mask", "expected"}
    raybert.load(tmp_path)
    raybert.load(tmp_path, attention="eager")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.encoder.layer.1.output.dense.bias"][5] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="gives other outputs than when it was made"):
        raybert.load(tmp_path)
    raybert.load(tmp_path, verify=False)


def test_a_probe_finds_outputs_that_are_no_numbers(tmp_path):
    model = with_head("bert", "classification")
    model.save_pretrained(tmp_path)
    write_probe(model, tmp_path, batch())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="largest difference nan"):
        raybert.load(tmp_path)


# -- heads -----------------------------------------------------------------------------------------


def three_labels() -> Task:
    return TASKS["classification"].model_copy(update={"labels": ("a", "b", "c")})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_head_comes_where_it_may_and_is_the_same_each_time(tmp_path, name):
    two = with_head(name, "classification")
    config = two.config
    config.num_labels = 2
    torch.manual_seed(4)
    two = AutoModelForSequenceClassification.from_config(config)
    two.save_pretrained(tmp_path)
    model, new = load_for_task(str(tmp_path), three_labels(), seed=7)
    head = [key for key in new if key.startswith("classifier")]
    assert head == new
    assert outputs(model).shape == (3, 3)
    assert not model.training
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    again, _ = load_for_task(str(tmp_path), three_labels(), seed=7)
    other, _ = load_for_task(str(tmp_path), three_labels(), seed=8)
    assert torch.equal(outputs(model), outputs(again))
    assert not torch.equal(outputs(model), outputs(other))
    old = two.state_dict()
    for key, tensor in model.state_dict().items():
        if key not in new:
            assert torch.equal(tensor, old[key]), key
    with pytest.raises(UserError, match="head of 2 outputs"):
        load_for_task(str(tmp_path), three_labels(), seed=7, new_head=False)


def test_a_teacher_must_have_a_head(encoder):
    with pytest.raises(UserError, match="was not fine-tuned"):
        load_for_task(str(encoder), three_labels(), seed=0, new_head=False)
    _, new = load_for_task(str(encoder), three_labels(), seed=0)
    assert new == ["classifier.bias", "classifier.weight"]


def test_a_teacher_keeps_its_head_for_its_own_task(tmp_path):
    model = with_head("bert", "classification")
    model.save_pretrained(tmp_path)
    again, new = load_for_task(str(tmp_path), three_labels(), seed=0, new_head=False)
    assert new == []
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("multilabel", "multi_label_classification"), ("regression", "regression")],
)
def test_the_head_knows_the_kind_of_its_task(encoder, kind, wanted):
    task = TASKS[kind]
    if kind == "multilabel":
        task = task.model_copy(update={"labels": ("a", "b", "c")})
    model, _ = load_for_task(str(encoder), task, seed=0)
    assert model.config.problem_type == wanted
    assert outputs(model).shape == (3, task.num_labels)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rate", [0.0, 0.37])
def test_dropout_is_replaced_everywhere(tmp_path, name, rate):
    toy_encoder(name, layers=2).save_pretrained(tmp_path)
    model, _ = load_for_task(str(tmp_path), three_labels(), seed=0, dropout=rate)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {rate}
    model.train()
    one, two = (model(**batch()).logits for _ in range(2))
    assert torch.equal(one, two) == (rate == 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_both_attentions_give_the_same_logits(tmp_path, name, kind):
    with_head(name, kind).save_pretrained(tmp_path)
    eager, sdpa = (raybert.load(tmp_path, attention=a) for a in ("eager", "sdpa"))
    assert eager.config._attn_implementation == "eager"
    assert sdpa.config._attn_implementation == "sdpa"
    assert torch.allclose(outputs(eager), outputs(sdpa), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_blank_structure_counts_like_the_real_one(methods, name, kind):
    model = with_head(name, kind)
    config = copy.deepcopy(model.config)
    assert parameters(blank(config, kind, [])) == parameters(model)
    chain: list[MethodConfig] = [Bottleneck(), Stepped()]
    empty = blank(config, kind, chain)
    assert all(p.is_meta for p in empty.parameters())
    assert parameters(empty) == parameters(compressed(model, *chain))
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["runs/mrpc/teacher", "./teacher", "/nowhere/at/all", "a b"])
def test_what_is_no_folder_and_no_hub_name_is_told_apart_from_one_that_is_not_there(name):
    with pytest.raises(UserError, match="no such folder, and no model of the Hugging Face Hub"):
        read_config(name)


def test_a_hub_name_that_cannot_be_reached_is_named():
    with pytest.raises(UserError, match="'nobody/nothing' cannot be read"):
        read_config("nobody/nothing")


def test_a_relative_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with_head("bert", "classification").save_pretrained(tmp_path / "model")
    assert raybert.load(Path("~/model")).config.num_labels == 3
