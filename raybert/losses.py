"""Distillation losses: pure functions of tensors, each the published formula.

Shapes: B rows, T tokens, C classes, H hidden units, A heads. Every function returns a scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher/T || student/T)``, the batch mean (Hinton et al. 2015, eq. 4).

    Some released code averages over elements instead of rows, which divides this by C.

    Args:
        student: logits [B, C], or [..., C]; leading axes count as rows.
        teacher: logits of the same shape.
        temperature: T > 0.
    """
    classes = student.shape[-1]
    p = F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=-1)
    q = F.log_softmax(student.reshape(-1, classes) / temperature, dim=-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def logits_soft_ce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with the teacher's softened probabilities, batch mean, without the T^2
    factor."""
    classes = student.shape[-1]
    p = F.softmax(teacher.reshape(-1, classes) / temperature, dim=-1)
    q = F.log_softmax(student.reshape(-1, classes) / temperature, dim=-1)
    return -(p * q).sum(-1).mean()


def logits_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the outputs: distillation for regression, which has no classes."""
    return F.mse_loss(student, teacher)


def logits_bce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2`` times binary cross-entropy with the teacher's softened probabilities
    (multi-label)."""
    targets = torch.sigmoid(teacher / temperature)
    return F.binary_cross_entropy_with_logits(student / temperature, targets) * temperature**2


def cls_mse(student: list[Tensor], teacher: list[Tensor], normalize: bool) -> Tensor:
    """Patient distillation: squared distance of matched layers' [CLS] vectors (PKD, eq. 7).

    Args:
        student: hidden_states [B, T, H] of the matched layers.
        teacher: the same number of hidden_states [B, T, H], or [B, 1, H] of [CLS] alone.
        normalize: compare unit vectors, as the paper does.

    Returns:
        The mean over rows and layers of the mean over H of the squared difference.
    """
    _same_length(student, teacher)
    terms = []
    for s, t in zip(student, teacher, strict=True):
        s, t = s[:, 0], t[:, 0]  # [B, H]
        if normalize:
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        terms.append(F.mse_loss(s, t))
    return torch.stack(terms).mean()


def hidden_mse(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> Tensor:
    """Mean squared error of matched hidden_states [B, T, H] over real tokens, then over rows.

    Rows count alike whatever their length, so that how a batch is cut into chunks changes nothing.

    Args:
        student: hidden_states of the matched layers.
        teacher: the same number of hidden_states.
        mask: [B, T], 1 for real tokens and 0 for padding.
    """
    _same_length(student, teacher)
    weight = mask.unsqueeze(-1).to(student[0].dtype)  # [B, T, 1]
    return _mean_over_rows(student, teacher, weight, student[0].shape[-1])


def attention_mse(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> Tensor:
    """Mean squared error of matched attention [B, A, T, T] over real pairs, then over rows.

    Args:
        student: attention of the matched layers.
        teacher: the same number of attention tensors.
        mask: [B, T], 1 for real tokens and 0 for padding.
    """
    _same_length(student, teacher)
    weight = (mask.unsqueeze(1) * mask.unsqueeze(2)).unsqueeze(1).to(student[0].dtype)
    return _mean_over_rows(student, teacher, weight, student[0].shape[1])  # weight: [B, 1, T, T]


def _mean_over_rows(
    student: list[Tensor], teacher: list[Tensor], weight: Tensor, width: int
) -> Tensor:
    """Squared differences, weighed, averaged within each row, then over rows and layers."""
    count = weight.flatten(1).sum(1) * width  # [B]
    terms = [
        (((s - t).square() * weight).flatten(1).sum(1) / count).mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def _same_length(student: list[Tensor], teacher: list[Tensor]) -> None:
    # A zipped loss over lists of different lengths is silently short, and over empty ones is zero.
    if not student or len(student) != len(teacher):
        raise ValueError(f"matched layers differ: student {len(student)}, teacher {len(teacher)}")
