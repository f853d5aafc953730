"""Weights as products of small factors: truncated SVD, data-aware SVD, Tucker and FALCON.

Pure functions of tensors; no model is known here. A weight is [out, in], as in ``nn.Linear``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorly
import torch
from torch import Tensor

_TENSORLY: Any = tensorly  # chooses its functions by backend when it runs: no checker can see them

SWEEPS = 3
"""HOOI sweeps over a Tucker decomposition's modes; the error settles in the third digit by then."""

FLOOR = 1e-4
"""What a direction counts at least in stacks, as a share of the mean; 1e-4 to 1e-1 do alike."""

WIDE = 1024
"""A mode wider than this is fitted once: its eigenvectors take longer than a sweep is worth."""

RIDGE = 1e-8
"""What a direction counts at least, as a share of the mean: where no calibration token went, the
weight itself is kept."""


def spectrum(weight: Tensor, moment: Tensor | None = None) -> Tensor:
    """Squared singular values of a weight, or of what it does to data, largest first.

    Args:
        weight: [out, in].
        moment: see `low_rank`.

    Returns:
        float64 [min(out, in)].
    """
    return _eigen(weight, moment)[0].flip(0).clamp(min=0.0)


def low_rank(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best product of rank ``rank`` in place of a weight.

    Without data this is the truncated SVD: the least ||W - L R||_F (Eckart, Young). With data it
    is the least ||X W^T - X (L R)^T||_F over inputs X, in closed form (DRONE, Chen et al., NeurIPS
    2021): with U the leading left singular vectors of W C^1/2, C the inputs' second moment, it is
    L R = U U^T W.

    Args:
        weight: W [out, in].
        rank: at most min(out, in).
        moment: where out < in, the second moment [out, out] of the outputs W x (without bias),
            which is W C W^T; elsewhere that of the inputs, C [in, in]. Summed in float64, or its
            small eigenvalues are noise.

    Returns:
        L [out, rank] and R [rank, in] in the weight's type, a singular value's root on either side.
    """
    vectors = _eigen(weight, moment)[1][:, -rank:].flip(1)  # [min(out, in), rank]
    exact = weight.double()
    if weight.shape[0] < weight.shape[1]:
        left = vectors
    else:
        # Directions with a singular value of zero come out of the product as noise; QR makes them
        # orthogonal to the others, and so harmless.
        left = torch.linalg.qr(_weighed(exact, moment) @ vectors)[0]
    right = left.T @ exact
    root = right.norm(dim=1).clamp(min=1e-12).sqrt()  # [rank]
    return (left * root).to(weight.dtype), (right / root[:, None]).to(weight.dtype)


def _eigen(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and vectors of the Gram matrix on the weight's smaller side.

    In float64 the Gram matrix is as exact as a float32 SVD, and twice as fast.
    """
    exact = weight.double()
    if weight.shape[0] < weight.shape[1]:
        gram = exact @ exact.T if moment is None else moment.double()
    else:
        weighed = _weighed(exact, moment)
        gram = weighed.T @ weighed
    return torch.linalg.eigh(gram)


def _weighed(weight: Tensor, moment: Tensor | None) -> Tensor:
    """W times a square root of the inputs' second moment: W S with S S^T = C."""
    if moment is None:
        return weight
    values, vectors = torch.linalg.eigh(moment.double())
    least = RIDGE * float(values.mean().clamp(min=1e-30))
    return weight @ (vectors * values.clamp(min=least).sqrt())


def error(weight: Tensor, approximation: Tensor) -> float:
    """The relative Frobenius error ||W - V||_F / ||W||_F; 0 where both are zero."""
    size = weight.double().norm().item()
    return (weight.double() - approximation.double()).norm().item() / size if size else 0.0


def error_on_data(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """The relative error ||X W^T - X V^T||_F / ||X W^T||_F over inputs X.

    Args:
        weight: W [out, in], out >= in.
        approximation: V, of the same shape.
        moment: the inputs' second moment [in, in].
    """
    found = []
    for part in (weight.double() - approximation.double(), weight.double()):
        found.append(((part @ moment.double()) * part).sum().item())
    return math.sqrt(max(0.0, found[0]) / max(found[1], 1e-30))


def error_of_projection(left: Tensor, moment: Tensor) -> float:
    """The same for `low_rank`'s factors of a weight with out < in.

    Args:
        left: L [out, rank]; as U U^T W, what the factors keep of the outputs is U^T G U.
        moment: the outputs' second moment G [out, out].
    """
    basis, exact = torch.linalg.qr(left.double())[0], moment.double()
    kept = ((exact @ basis) * basis).sum().item()
    return math.sqrt(max(0.0, 1.0 - kept / max(exact.trace().item(), 1e-30)))


def _whitening(moment: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """A square root S of a second moment C of inputs [in, in], S S^T = C, and S^-1.

    Factors of W S become factors of W by S^-1, which is why directions that no token took need a
    firmer floor here than in `low_rank`.
    """
    values, vectors = torch.linalg.eigh(moment.double() / moment.double().diagonal().mean())
    root = (values.clamp(min=0.0) + FLOOR).sqrt()
    return (vectors * root).to(like.dtype), (vectors / root).T.contiguous().to(like.dtype)


def tucker(
    stack: Tensor, ranks: Sequence[int], moment: Tensor | None = None, sweeps: int = SWEEPS
) -> tuple[Tensor, list[Tensor]]:
    """A Tucker decomposition by higher-order orthogonal iteration (De Lathauwer et al., 2000).

    Args:
        stack: [d1, ..., dn].
        ranks: r1, ..., rn, each at most its dimension.
        moment: the second moment [dn, dn] of the inputs that the stack's matrices [.., dn] are
            applied to; the error that is made small is then that of their outputs.
        sweeps: passes over the modes after the first fit.

    Returns:
        The core [r1, ..., rn] and a factor [di, ri] for each mode. Columns have length 1, and are
        orthogonal to each other but for the last mode's where there is a moment.
    """
    if moment is not None:
        root, inverse = _whitening(moment, stack)
        core, whitened = tucker(stack @ root, ranks, None, sweeps)
        inner = inverse.T @ whitened[-1]  # [dn, rn]
        length = inner.norm(dim=0)
        return core * length, [*whitened[:-1], inner / length]
    # tensorly's own partial_tucker takes a full SVD of every unfolding in every sweep (a minute and
    # more for a [12, 3072, 768] stack); the eigenvectors of the unfolding's Gram matrix are the
    # same and far cheaper. Modes are fitted smallest first on what the earlier ones have
    # left (Vannieuwenhoven et al., 2012).
    modes = sorted(range(stack.dim()), key=lambda mode: stack.shape[mode])
    factors: dict[int, Tensor] = {}
    with _TENSORLY.backend_context("pytorch"):
        for sweep in range(1 + sweeps):
            for mode in modes:
                if sweep and stack.shape[mode] > WIDE:
                    continue
                others = [other for other in factors if other != mode]
                rest = _TENSORLY.tenalg.multi_mode_dot(
                    stack, [factors[m] for m in others], modes=others, transpose=True
                )
                factors[mode] = _leading(_TENSORLY.unfold(rest, mode), ranks[mode])
        found = [factors[mode] for mode in range(stack.dim())]
        core = _TENSORLY.tenalg.multi_mode_dot(stack, found, transpose=True)
    return core, found


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors [d, rank] of a matrix [d, n]."""
    if rank == len(matrix):  # any basis of the whole space will do
        return torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:].flip(1)


def tucker_product(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The stack [d1, ..., dn] that a core and its factors stand for."""
    with _TENSORLY.backend_context("pytorch"):
        return _TENSORLY.tucker_to_tensor((core, list(factors)))


def falcon(
    stack: Tensor, rank: int = 1, *, rows: bool = True, moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """FALCON (Jang et al., 2019) in closed form: each row of the stack is a problem of its own.

    The stack's slices share ``rank`` bases, and each row of a slice is a sum of the bases' rows,
    scaled: ``stack[g, n] = sum_k scales[g, k, n] * bases[k, n]``. For row n the best is the
    truncated SVD of the matrix [G, D] that the slices' rows make.

    Args:
        stack: [G, N, D].
        rank: k, at most G.
        rows: a scale for each row; otherwise one for each slice, which is a single such problem.
        moment: the second moment [D, D] of the inputs that the slices are applied to; the error
            that is made small is then that of their outputs.

    Returns:
        scales [G, k, N], or [G, k, 1], and bases [k, N, D], of like lengths.
    """
    weighed, inverse = stack, None
    if moment is not None:
        root, inverse = _whitening(moment, stack)
        weighed = stack @ root
    problems = weighed.transpose(0, 1) if rows else weighed.flatten(1)[None]  # [P, G, D or N * D]
    gram = (problems @ problems.transpose(1, 2)).double()  # [P, G, G]
    vectors = torch.linalg.eigh(gram)[1][:, :, -rank:].flip(2).to(stack.dtype)  # [P, G, k]
    bases = (vectors.transpose(1, 2) @ problems).transpose(0, 1).reshape(rank, *stack.shape[1:])
    if inverse is not None:
        bases = bases @ inverse
    length = (
        bases.norm(dim=2, keepdim=True) if rows else bases.flatten(1).norm(dim=1)[:, None, None]
    )
    root = length.clamp(min=1e-12).sqrt()  # [k, P, 1]
    scales = vectors.permute(1, 2, 0) * root[..., 0]  # [G, k, P]
    return scales.contiguous(), (bases / root).contiguous()


def falcon_product(scales: Tensor, bases: Tensor) -> Tensor:
    """The stack [G, N, D] that scales [G, k, N or 1] and bases [k, N, D] stand for."""
    return (scales[..., None] * bases).sum(dim=1)
