from __future__ import annotations

import pytest
import torch

from raybert import losses


def test_kl_is_the_published_formula_averaged_over_rows():
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    p, q = (teacher / 4).softmax(-1), (student / 4).softmax(-1)
    by_hand = (p * (p.log() - q.log())).sum(-1).mean() * 16
    torch.testing.assert_close(losses.logits_kl(student, teacher, 4.0), by_hand)


def test_kl_counts_leading_axes_as_rows():
    student, teacher = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    flat = losses.logits_kl(student.view(14, 3), teacher.view(14, 3), 2.0)
    torch.testing.assert_close(losses.logits_kl(student, teacher, 2.0), flat)


def test_soft_cross_entropy_has_no_temperature_factor():
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    p, q = (teacher / 15).softmax(-1), (student / 15).softmax(-1)
    torch.testing.assert_close(
        losses.logits_soft_ce(student, teacher, 15.0), -(p * q.log()).sum(-1).mean()
    )


def test_every_loss_has_its_minimum_at_the_teacher():
    teacher = torch.randn(4, 3)
    hidden = [torch.randn(4, 6, 8)]
    mask = torch.ones(4, 6)
    assert losses.logits_kl(teacher, teacher, 3.0).abs() < 1e-6
    assert losses.cls_mse(hidden, hidden, True) == 0
    assert losses.hidden_mse(hidden, hidden, mask) == 0
    assert losses.attention_mse([torch.ones(4, 2, 6, 6)], [torch.ones(4, 2, 6, 6)], mask) == 0


def test_patient_loss_at_unit_length_ignores_scale():
    hidden = [torch.randn(4, 6, 8)]
    assert losses.cls_mse([hidden[0] * 3], hidden, True) < 1e-12
    assert losses.cls_mse([hidden[0] * 3], hidden, False) > 0.1


def test_padding_never_counts():
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    whole = losses.hidden_mse([student], [teacher], mask)
    student[0, 3:] += 100
    torch.testing.assert_close(losses.hidden_mse([student], [teacher], mask), whole)
    square = (student - teacher).square()
    by_hand = (square[0, :3].mean() + square[1].mean()) / 2  # rows count alike
    torch.testing.assert_close(whole, by_hand)
    attention = torch.rand(2, 2, 5, 5)
    taught = torch.rand(2, 2, 5, 5)
    before = losses.attention_mse([attention], [taught], mask)
    attention[0, :, 3:], attention[0, :, :, 3:] = 9, 9
    torch.testing.assert_close(losses.attention_mse([attention], [taught], mask), before)


def test_cutting_a_batch_into_chunks_changes_no_loss():
    student, teacher = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    mask = (torch.arange(5) < torch.tensor([[2], [5], [3], [4]])).long()
    whole = losses.hidden_mse([student], [teacher], mask)
    halves = [
        losses.hidden_mse([student[part]], [teacher[part]], mask[part])
        for part in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


@pytest.mark.parametrize("count", [0, 1])
def test_lists_of_different_lengths_are_refused_not_zipped(count):
    hidden = [torch.randn(1, 2, 3)] * 2
    with pytest.raises(ValueError, match="differ"):
        losses.cls_mse(hidden[:count], hidden, True)
    with pytest.raises(ValueError, match="differ"):
        losses.hidden_mse(hidden[:count], hidden, torch.ones(1, 2))
