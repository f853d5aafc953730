"""Factors against plain linear algebra: exact at full rank, the best there is below it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tensorly
import torch
from torch import Tensor

from raybert.factorise import (
    error,
    error_of_projection,
    error_on_data,
    falcon,
    falcon_product,
    low_rank,
    spectrum,
    tucker,
    tucker_product,
)

SHAPES = [(12, 12), (9, 14), (14, 9)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, rows: int = 200, directions: int | None = None) -> Tensor:
    """Rows [N, width] that lean to some directions, or lie in so few only."""
    spread = torch.logspace(0, -2, width)
    if directions:
        spread[directions:] = 0.0
    basis = torch.linalg.qr(random(width, width, seed=5))[0]
    return random(rows, width, seed=6) * spread @ basis.T


def moment_of(weight: Tensor, rows: Tensor) -> Tensor:
    seen = (rows @ weight.T if weight.shape[0] < weight.shape[1] else rows).double()
    return seen.T @ seen / len(rows)


# -- singular values -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_plain_factors_are_the_truncated_svd(shape, rank):
    weight = random(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    left, right = low_rank(weight, rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    best = u[:, :rank] * s[:rank] @ v[:rank]
    assert torch.allclose(left @ right, best, atol=1e-4)
    assert torch.allclose(spectrum(weight), s.double() ** 2, rtol=1e-4)
    # A singular value's root on either side.
    assert torch.allclose(left.norm(dim=0), s[:rank].sqrt(), rtol=1e-4)
    assert torch.allclose(right.norm(dim=1), s[:rank].sqrt(), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", [None, 3])
def test_full_rank_is_the_weight_itself(shape, directions):
    weight = random(*shape)
    rows = inputs(shape[1], directions=directions)
    for moment in (None, moment_of(weight, rows)):
        left, right = low_rank(weight, min(shape), moment)
        assert torch.allclose(left @ right, weight, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_data_aware_factors_are_the_best_on_the_data(shape, rank):
    weight, rows = random(*shape), inputs(shape[1])
    moment = moment_of(weight, rows)
    wanted = rows @ weight.T  # [N, out]
    singular = torch.linalg.svdvals(wanted)
    left, right = low_rank(weight, rank, moment)
    missed = (wanted - rows @ (left @ right).T).norm()
    # Eckart and Young: no product of this rank comes closer to X W^T than its own truncated SVD.
    assert missed.item() == pytest.approx(singular[rank:].norm().item(), rel=1e-3)
    values = singular.double()[: min(shape)] ** 2 / len(rows)
    assert torch.allclose(spectrum(weight, moment), values, rtol=1e-3)
    relative = (missed / wanted.norm()).item()
    told = (
        error_of_projection(left, moment)
        if shape[0] < shape[1]
        else error_on_data(weight, left @ right, moment)
    )
    assert told == pytest.approx(relative, rel=1e-2)
    plain = low_rank(weight, rank)
    assert missed < (wanted - rows @ (plain[0] @ plain[1]).T).norm()
    assert error(weight, left @ right) > error(weight, plain[0] @ plain[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_data_in_few_directions_is_kept_whole(shape):
    weight, rows = random(*shape), inputs(shape[1], directions=3)
    left, right = low_rank(weight, 4, moment_of(weight, rows))
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    assert torch.allclose(rows @ (left @ right).T, rows @ weight.T, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_zeros_gives_finite_factors(shape):
    weight = torch.zeros(shape)
    for moment in (None, moment_of(weight, inputs(shape[1]))):
        left, right = low_rank(weight, 3, moment)
        assert torch.equal(left @ right, weight)
    assert error(weight, weight) == 0.0


# -- Tucker ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 8, 6), (3, 4, 6, 6)])
def test_tucker_of_full_rank_is_the_stack(shape):
    stack = random(*shape)
    core, factors = tucker(stack, shape)
    assert torch.allclose(tucker_product(core, factors), stack, atol=1e-4)


def test_tucker_finds_a_stack_of_its_own_rank():
    core, ranks, shape = random(2, 3, 4), (2, 3, 4), (5, 9, 8)
    factors = [torch.linalg.qr(random(d, r, seed=d))[0] for d, r in zip(shape, ranks, strict=True)]
    stack = tucker_product(core, factors)
    found_core, found = tucker(stack, ranks)
    assert found_core.shape == ranks
    assert torch.allclose(tucker_product(found_core, found), stack, atol=1e-4)
    for factor, rank in zip(found, ranks, strict=True):
        assert torch.allclose(factor.T @ factor, torch.eye(rank), atol=1e-5)


def test_tucker_is_no_worse_than_tensorly_and_sweeps_do_not_harm():
    from tensorly.decomposition import partial_tucker

    library: Any = tensorly

    stack, ranks = random(4, 10, 12), (3, 5, 6)
    with library.backend_context("pytorch"):
        (core, factors), _ = partial_tucker(stack, ranks, n_iter_max=20)
    theirs = error(stack, tucker_product(core, factors))
    errors = [
        error(stack, tucker_product(*tucker(stack, ranks, sweeps=sweeps))) for sweeps in (0, 1, 3)
    ]
    assert errors[0] >= errors[1] - 1e-6 >= errors[2] - 2e-6
    assert errors[-1] <= theirs * 1.01
    assert library.get_backend() == "numpy", "the user's own backend is left alone"


def missed(stack: Tensor, approximation: Tensor, rows: Tensor) -> float:
    """The relative error of what a stack's matrices make of rows [N, D]."""
    return error(stack @ rows.T, approximation @ rows.T)


@pytest.mark.parametrize("directions", [None, 3])
def test_data_aware_stacks_come_closer_on_the_data(directions):
    stack, rows = random(3, 12, 12), inputs(12, directions=directions)
    moment = moment_of(stack[0], rows)
    ranks = (2, 6, 6)
    plain, aware = (tucker_product(*tucker(stack, ranks, m)) for m in (None, moment))
    assert missed(stack, aware, rows) < 0.9 * missed(stack, plain, rows)
    assert error(stack, aware) > error(stack, plain)
    told = error_on_data(stack[1], aware[1], moment)
    assert told == pytest.approx(missed(stack[1], aware[1], rows), rel=1e-2, abs=1e-3)
    for by_row in (True, False):
        plain, aware = (
            falcon_product(*falcon(stack, 2, rows=by_row, moment=m)) for m in (None, moment)
        )
        assert missed(stack, aware, rows) < missed(stack, plain, rows)
    full = tucker_product(*tucker(stack, (3, 12, 12), moment))
    assert torch.allclose(full, stack, atol=1e-3)
    assert torch.allclose(falcon_product(*falcon(stack, 3, moment=moment)), stack, atol=1e-3)


# -- FALCON ----------------------------------------------------------------------------------------


def test_falcon_solves_every_row_as_an_svd():
    stack = random(3, 5, 7)
    scales, bases = falcon(stack, 1)
    assert scales.shape == (3, 1, 5)
    assert bases.shape == (1, 5, 7)
    found = falcon_product(scales, bases)
    for row in range(5):
        u, s, v = torch.linalg.svd(stack[:, row], full_matrices=False)
        assert torch.allclose(found[:, row], s[0] * torch.outer(u[:, 0], v[0]), atol=1e-4)


def test_falcon_by_gradient_steps_comes_no_closer():
    stack = random(3, 4, 6)
    closed = error(stack, falcon_product(*falcon(stack, 1)))
    scales = random(3, 1, 4, seed=1).requires_grad_()
    bases = random(1, 4, 6, seed=2).requires_grad_()
    optimizer = torch.optim.Adam([scales, bases], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (falcon_product(scales, bases) - stack).pow(2).sum()
        loss.backward()
        optimizer.step()
    fitted = error(stack, falcon_product(scales, bases).detach())
    assert closed <= fitted + 1e-4


def test_more_bases_come_closer_and_all_of_them_are_exact():
    stack = random(3, 5, 7)
    errors = [error(stack, falcon_product(*falcon(stack, rank))) for rank in (1, 2, 3)]
    assert all(more < less for less, more in itertools.pairwise(errors))
    assert errors[-1] < 1e-5
    scales, bases = falcon(stack, 3, rows=False)
    assert scales.shape == (3, 3, 1)
    assert error(stack, falcon_product(scales, bases)) < 1e-5


def test_falcon_of_zeros_is_finite():
    scales, bases = falcon(torch.zeros(3, 4, 5), 2)
    assert torch.equal(falcon_product(scales, bases), torch.zeros(3, 4, 5))
