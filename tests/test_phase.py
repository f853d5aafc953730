"""What is recorded of a forward pass, and the distillation losses made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB, toy_encoder
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from raybert.config import KDConfig
from raybert.errors import UserError
from raybert.methods.theseus import Theseus, TheseusModule
from raybert.models import HEADS
from raybert.phase import (
    Distillation,
    Outputs,
    Phase,
    Taps,
    check_layer_map,
    even_layer_map,
)
from raybert.surgery import encoder_layers, set_depth, set_encoder_layers

FAMILIES = ("bert", "roberta", "distilbert")


def toy_classifier(name: str = "bert", layers: int = 4, kind: str = "classification") -> Any:
    torch.manual_seed(1)
    config = toy_encoder(name, layers).config
    return HEADS[kind].from_config(config, attn_implementation="eager").eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, len(VOCAB), (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def assert_same(one: list[Tensor] | tuple[Tensor, ...], two: Any, count: int) -> None:
    assert len(one) == len(two) == count
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


# -- taps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_record_what_transformers_records(name):
    taps = Taps(model := toy_classifier(name), hidden=True, attention=True)
    with torch.inference_mode():
        wanted = model(**batch(), output_hidden_states=True, output_attentions=True)
        taps.collect(None)
        found = taps.collect(model(**batch()))
    assert_same(found.hidden, wanted.hidden_states, 5)
    assert_same(found.attention, wanted.attentions, 4)
    assert torch.equal(found.logits()[0], wanted.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_record_layers_that_were_swapped_in_after_a_first_run(name):
    """Transformers installs its own hooks once a model: a layer swapped in later gives it none."""
    model = toy_classifier(name)
    with torch.inference_mode():
        model(**batch(), output_hidden_states=True, output_attentions=True)
        layers = list(encoder_layers(toy_classifier(name)))
        for layer in layers:
            for parameter in layer.parameters():
                parameter.mul_(1.5)
        set_encoder_layers(model, layers[:3])
        set_depth(model)
        taps = Taps(model, hidden=True, attention=True)
        found = taps.collect(model(**batch()))
        fresh = toy_classifier(name, layers=3)
        fresh.load_state_dict(model.state_dict())
        wanted = fresh(**batch(), output_hidden_states=True, output_attentions=True)
    assert_same(found.hidden, wanted.hidden_states, 4)
    assert_same(found.attention, wanted.attentions, 3)


def test_taps_inside_a_container_record_the_layer_that_ran_last():
    model = toy_classifier()
    (phase,) = Theseus.model_validate({"layers": 2}).resolve(model.config).phases()
    phase.prepare(model)
    taps = Taps(model, hidden=True, attention=True)
    model.train()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    plain = toy_classifier()
    with torch.no_grad():
        for module in encoder_layers(model):
            assert isinstance(module, TheseusModule)
            module.replaced = (False, False)
        found = taps.collect(model(**batch()))
        wanted = plain(**batch(), output_hidden_states=True, output_attentions=True)
    assert_same(found.hidden, wanted.hidden_states[::2], 3)
    assert_same(found.attention, wanted.attentions[1::2], 2)


def test_taps_forget_and_come_off():
    model = toy_classifier()
    taps = Taps(model, hidden=True, attention=False)
    with torch.inference_mode():
        assert len(taps.collect(model(**batch())).hidden) == 5
        assert taps.collect(None).hidden == []
        taps.remove()
        assert taps.collect(model(**batch())).hidden == []


def test_attention_that_was_not_computed_is_an_error():
    model = toy_classifier()
    model.set_attn_implementation("sdpa")
    taps = Taps(model, hidden=False, attention=True)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="eager"):
        taps.collect(model(**batch()))


# -- layer maps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        (6, 12, (2, 4, 6, 8, 10, 12)),
        (3, 6, (2, 4, 6)),
        (4, 4, (1, 2, 3, 4)),
        (1, 12, (12,)),
        (4, 6, (2, 3, 5, 6)),
        (6, 3, (1, 1, 2, 2, 3, 3)),
    ],
)
def test_even_layer_maps(student, teacher, wanted):
    assert even_layer_map(student, teacher) == wanted


def test_every_even_layer_map_fits_and_rises_to_the_last_layer():
    for student in range(1, 25):
        for teacher in (1, 3, 6, 12, 24):
            found = even_layer_map(student, teacher)
            check_layer_map(found, student, teacher)
            assert list(found) == sorted(found)
            assert found[-1] == teacher
            assert len(set(found)) == min(student, teacher)


@pytest.mark.parametrize(
    ("layer_map", "told"),
    [
        ((1, 2), r"2 entries for a student of 3 layers.*\[2, 4, 6\]"),
        ((1, 2, 3, 4), "4 entries"),
        ((2, 4, 7), "teacher layer 7; the teacher's layers are 1 to 6"),
        ((0, 4, 6), "teacher layer 0"),
    ],
)
def test_layer_maps_that_do_not_fit_are_refused(layer_map, told):
    with pytest.raises(UserError, match=told):
        check_layer_map(layer_map, 3, 6)


# -- losses ----------------------------------------------------------------------------------------


def classified(logits: Tensor, loss: float = 2.0, **more: Any) -> Outputs:
    """An output of a model with one tensor of logits."""
    output = SequenceClassifierOutput(loss=torch.tensor(loss), logits=logits)  # pyright: ignore[reportArgumentType]
    return Outputs(output, **more)


def spans(start: Tensor, end: Tensor) -> Outputs:
    output = QuestionAnsweringModelOutput(
        loss=torch.tensor(2.0),  # pyright: ignore[reportArgumentType]
        start_logits=start,  # pyright: ignore[reportArgumentType]
        end_logits=end,  # pyright: ignore[reportArgumentType]
    )
    return Outputs(output)


def kd(kind: str = "classification", layer_map: tuple[int, ...] = (), **keys: Any) -> Distillation:
    return Distillation(KDConfig(**keys), kind, layer_map)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` written out; [N, C] -> the mean over N."""
    p = torch.softmax(teacher / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    return (p * (p.log() - q.log())).sum(-1).mean() * temperature**2


def test_without_a_teacher_there_is_the_task_alone():
    out = classified(random(4, 3))
    assert set(kd(alpha=0.5, cls=1.0).losses(out, None, batch())) == {"task"}
    assert kd(alpha=0.5).losses(out, None, batch())["task"] == 2.0


def test_a_phase_has_these_losses_by_default():
    out, taught = classified(random(4, 3)), classified(random(4, 3, seed=1))
    distillation = kd(alpha=0.25)
    found = Phase().losses(nn.Identity(), out, taught, batch(), distillation)
    assert found == distillation.losses(out, taught, batch())
    assert set(found) == {"task", "kd_logits"}


@pytest.mark.parametrize("form", ["kl", "soft_ce"])
def test_classification_is_compared_by_probabilities(form):
    student, teacher = random(4, 3), random(4, 3, seed=1)
    distillation = kd(alpha=0.25, temperature=3.0, form=form)
    found = distillation.losses(classified(student), classified(teacher), batch())
    assert set(found) == {"task", "kd_logits"}
    assert found["task"] == pytest.approx(0.75 * 2.0)
    wanted = kl(student, teacher, 3.0)
    if form == "soft_ce":
        wanted = F.cross_entropy(student / 3.0, torch.softmax(teacher / 3.0, -1))
    assert found["kd_logits"].item() == pytest.approx(0.25 * wanted.item(), rel=1e-5)


def test_regression_is_compared_by_squares_and_multilabel_label_by_label():
    student, teacher = random(4, 3), random(4, 3, seed=1)
    out, taught = classified(student), classified(teacher)
    found = kd("regression", alpha=0.5).losses(out, taught, batch())["kd_logits"]
    assert found.item() == pytest.approx(0.5 * (student - teacher).square().mean().item())
    found = kd("multilabel", alpha=0.5, temperature=2.0).losses(out, taught, batch())["kd_logits"]
    p, q = torch.sigmoid(teacher / 2), torch.sigmoid(student / 2)
    wanted = -(p * q.log() + (1 - p) * (1 - q).log()).mean() * 4
    assert found.item() == pytest.approx(0.5 * wanted.item(), rel=1e-5)


@pytest.mark.parametrize("form", ["kl", "soft_ce"])
def test_answers_are_compared_at_real_tokens_only(form):
    rows = batch()
    start, end, taught_start, taught_end = (random(3, 10, seed=i) for i in range(4))
    distillation = kd("qa", alpha=1.0, temperature=2.0, form=form)
    found = distillation.losses(spans(start, end), spans(taught_start, taught_end), rows)
    assert found["task"] == 0.0

    lengths = [10, 10, 6]
    each = []
    for student, teacher in ((start, taught_start), (end, taught_end)):
        for row, length in enumerate(lengths):
            s, t = student[row, :length], teacher[row, :length]
            if form == "kl":
                each.append(kl(s[None], t[None], 2.0))
            else:
                each.append(F.cross_entropy(s / 2.0, torch.softmax(t / 2.0, -1)))
    wanted = torch.stack(each).mean()
    assert found["kd_logits"].item() == pytest.approx(wanted.item(), rel=1e-5)

    pad = rows["attention_mask"] == 0
    wild = start.masked_fill(pad, 1e4)
    again = distillation.losses(spans(wild, end), spans(taught_start, taught_end), rows)
    assert torch.equal(again["kd_logits"], found["kd_logits"])


def test_padding_gets_no_gradient_and_no_nan():
    rows = batch()
    start = random(3, 10).requires_grad_()
    taught = spans(random(3, 10, seed=2), random(3, 10, seed=3))
    loss = kd("qa", alpha=1.0).losses(spans(start, start), taught, rows)["kd_logits"]
    loss.backward()
    assert start.grad is not None
    assert torch.isfinite(start.grad).all()
    assert (start.grad[rows["attention_mask"] == 0] == 0).all()
    assert start.grad[0].abs().sum() > 0


def test_masked_language_modelling_compares_masked_tokens_only():
    student, teacher = random(3, 10, 7), random(3, 10, 7, seed=1)
    labels = torch.full((3, 10), -100)
    labels[0, 2], labels[2, 5] = 4, 1
    rows = {**batch(), "labels": labels}
    distillation = kd("mlm", alpha=1.0, temperature=2.0)
    found = distillation.losses(classified(student), classified(teacher), rows)["kd_logits"]
    picked = [torch.stack([x[0, 2], x[2, 5]]) for x in (student, teacher)]
    assert found.item() == pytest.approx(kl(picked[0], picked[1], 2.0).item(), rel=1e-5)
    other = torch.where((labels == -100).unsqueeze(-1), student * 9, student)
    again = distillation.losses(classified(other), classified(teacher), rows)["kd_logits"]
    assert torch.equal(again, found)


def test_hidden_states_and_attention_are_matched_by_the_map():
    rows, mask = batch(), batch()["attention_mask"]
    hidden = [random(3, 10, 8, seed=i) for i in range(3)]
    taught_hidden = [random(3, 10, 8, seed=10 + i) for i in range(5)]
    attention = [random(3, 2, 10, 10, seed=20 + i) for i in range(2)]
    taught_attention = [random(3, 2, 10, 10, seed=30 + i) for i in range(4)]
    out = classified(random(3, 2), hidden=hidden, attention=attention)
    taught = classified(random(3, 2), hidden=taught_hidden, attention=taught_attention)
    weights = {"cls": 3.0, "hidden": 0.5, "attention": 2.0, "normalize": False}
    found = kd(layer_map=(2, 3), **weights).losses(out, taught, rows)
    assert set(found) == {"task", "kd_cls", "kd_hidden", "kd_attention"}
    assert found["task"] == 2.0

    matched = [(hidden[1], taught_hidden[2]), (hidden[2], taught_hidden[3])]
    cls = sum((s[:, 0] - t[:, 0]).square().mean() for s, t in matched) / 2
    assert found["kd_cls"].item() == pytest.approx(3.0 * float(cls), rel=1e-5)
    real = mask.bool()
    rows_apart = [(s[i] - t[i])[real[i]] for s, t in matched for i in range(3)]
    inside = sum(gap.square().mean() for gap in rows_apart) / 6
    assert found["kd_hidden"].item() == pytest.approx(0.5 * float(inside), rel=1e-5)
    pairs = (real[:, None, :, None] & real[:, None, None, :]).expand(3, 2, 10, 10)
    twos = [(attention[0], taught_attention[1]), (attention[1], taught_attention[2])]
    maps_apart = [(s[i] - t[i])[pairs[i]] for s, t in twos for i in range(3)]
    between = sum(gap.square().mean() for gap in maps_apart) / 6
    assert found["kd_attention"].item() == pytest.approx(2.0 * float(between), rel=1e-5)


def test_a_map_shorter_than_the_student_is_never_silently_zipped():
    out = classified(random(3, 2), hidden=[random(3, 10, 8)] * 3)
    taught = classified(random(3, 2), hidden=[random(3, 10, 8)] * 5)
    for layer_map in ((2,), ()):
        with pytest.raises(ValueError, match="differ"):
            kd(cls=1.0, layer_map=layer_map).losses(out, taught, batch())


@pytest.mark.parametrize("kind", ["classification", "qa", "mlm"])
def test_a_student_like_its_teacher_has_nothing_to_learn_from_it(kind):
    model = toy_classifier(kind=kind)
    labels = {"labels": torch.tensor([0, 1, 0])}
    if kind == "qa":
        labels = {
            "start_positions": torch.tensor([1, 2, 3]),
            "end_positions": torch.tensor([2] * 3),
        }
    elif kind == "mlm":
        labels = {"labels": batch()["input_ids"]}
    rows = {**batch(), **labels}
    taps = Taps(model, hidden=True, attention=True)
    one, two = (taps.collect(model(**rows)) for _ in range(2))
    keys = {"alpha": 0.5, "cls": 1.0, "hidden": 1.0, "attention": 1.0}
    found = Distillation(KDConfig(**keys), kind, (1, 2, 3, 4)).losses(one, two, rows)  # pyright: ignore[reportArgumentType]
    assert set(found) == {"task", "kd_logits", "kd_cls", "kd_hidden", "kd_attention"}
    assert found["task"].item() == pytest.approx(0.5 * one.model.loss.item())
    for name in set(found) - {"task"}:
        assert abs(found[name].item()) < 1e-5, name
