"""Integer products, packing, and the modules of a finished quantised model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raybert import grid, int8
from raybert.errors import UserError
from raybert.int8 import Int8Embedding, Int8Linear, Scheme, TiedInt8Linear, linear_int8
from raybert.integer import product_int8

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(1, 7, 3), (5, 64, 64), (16, 8, 24), (300, 33, 40)]  # rows, inputs, outputs


def numbers(rows: int, inputs: int, outputs: int, seed: int = 0):
    draw = np.random.default_rng(seed)
    x = draw.normal(0, 40, (rows, inputs)).astype(np.float32)
    x[0, :2] = 1e6, -1e6  # far outside the range
    weight = draw.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    bias = draw.normal(0, 3, outputs).astype(np.float32)
    return x, weight, bias


def by_hand(x, weight, weight_scale, input_scale, bias):
    """The operator in NumPy's integers."""
    q = np.clip(np.rint(x / input_scale), -128, 127).astype(np.int64)
    sums = q @ weight.T.astype(np.int64)
    return sums.astype(np.float32) * (input_scale * weight_scale) + bias


@pytest.fixture(params=["own", "float", "cuda"])
def each_backend(request, monkeypatch):
    """This machine's integer product, the fallback in float32, and what CUDA's kernel is given."""
    if request.param != "own":
        monkeypatch.setattr(int8, "backend", lambda device="cpu": request.param)
    if request.param == "cuda":
        product = torch._int_mm

        def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape[0] > 16
            assert a.shape[1] % 8 == b.shape[1] % 8 == 0
            return product(a, b)

        monkeypatch.setattr(torch, "_int_mm", kernel)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_the_product_is_that_of_integers(monkeypatch, shape, per_row, device):
    monkeypatch.setattr(int8, "BLOCK_ROWS", 16)  # several blocks
    x, weight, bias = numbers(*shape)
    scale = np.linspace(0.01, 0.5, shape[2] if per_row else 1).astype(np.float32)
    given = [torch.from_numpy(a).to(device) for a in (x, weight, scale, bias)]
    found = linear_int8(given[0], given[1], given[2], torch.tensor(0.7, device=device), given[3])
    wanted = by_hand(x, weight, scale, np.float32(0.7), bias)
    assert np.array_equal(found.cpu().numpy(), wanted)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("zero", [0, 3, 128, 255])
def test_a_zero_point_moves_the_ends_of_the_range(monkeypatch, zero):
    monkeypatch.setattr(int8, "BLOCK_ROWS", 16)
    x, weight, bias = numbers(40, 16, 8)
    scale = np.linspace(0.01, 0.5, 8).astype(np.float32)
    given = [torch.from_numpy(a) for a in (x, weight, scale, bias)]
    at = torch.tensor(float(zero))
    found = linear_int8(*given[:3], torch.tensor(0.7), given[3], zero=at)
    # Bytes with a zero point, as in Jacob et al.: S (q - Z).
    q = np.clip(np.rint(x / np.float32(0.7)) + zero, 0, 255).astype(np.int64) - zero
    sums = q @ weight.T.astype(np.int64)
    wanted = sums.astype(np.float32) * (np.float32(0.7) * scale) + bias
    assert np.array_equal(found.numpy(), wanted)
    if zero == 0:
        same = linear_int8(*given[:3], torch.tensor(0.7), given[3], unsigned=True)
        assert torch.equal(found, same)


@pytest.mark.usefixtures("each_backend")
def test_without_a_scale_the_largest_magnitude_is_the_highest_level():
    x, weight, bias = numbers(9, 16, 8)
    x[0, :2] = 0
    scale = np.abs(x).max() / np.float32(127)
    found = linear_int8(
        torch.from_numpy(x).view(3, 3, 16),
        torch.from_numpy(weight),
        torch.tensor([0.1]),
        None,
        torch.from_numpy(bias),
    )
    assert found.shape == (3, 3, 8)
    wanted = by_hand(x, weight, np.float32(0.1), scale, bias)
    assert np.array_equal(found.view(9, 8).numpy(), wanted)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_at_the_ends_of_the_range_do_not_overflow(sign):
    x = torch.full((20, 384), 1000.0 * sign)
    weight = torch.full((16, 384), 127, dtype=torch.int8)
    found = linear_int8(x, weight, torch.ones(1), torch.ones(()), None)
    assert torch.all(found == 384 * 127 * (127 if sign > 0 else -128))


@pytest.mark.usefixtures("each_backend")
def test_halves_are_rounded_to_even():
    x = torch.tensor([[0.5], [1.5], [2.5], [-0.5], [-1.5], [126.5], [127.5], [-128.5]])
    one = torch.ones(1, 1, dtype=torch.int8)
    found = linear_int8(x, one, torch.ones(1), torch.ones(()), None).flatten()
    assert found.tolist() == [0, 2, 2, 0, -2, 126, 127, -128]


def test_the_operator_is_well_made():
    x, weight, bias = (torch.from_numpy(a) for a in numbers(6, 16, 8))
    for scale in (torch.tensor(0.5), None):
        arguments = (x, weight, torch.ones(8), scale, bias)
        torch.library.opcheck(linear_int8, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_its_work_is_counted(device):
    x = torch.zeros(2, 5, 16, device=device)
    weight = torch.zeros(8, 16, dtype=torch.int8, device=device)
    one = torch.ones((), device=device)
    with FlopCounterMode(display=False) as counter:
        out = linear_int8(x, weight, one.view(1), one, None)
    assert out.shape == (2, 5, 8)
    assert counter.get_total_flops() == 2 * 10 * 16 * 8


def test_a_processor_whose_products_of_bytes_overflow_is_not_trusted():
    # What oneDNN does where there is no VNNI; without oneDNN's limit this would say so as well.
    code = "from raybert import int8; print(int8.backend('cpu'))"
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=limited, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["float"]


@pytest.mark.parametrize(
    ("row", "may"),
    [
        ([127, 1], False),
        ([127, 2], True),  # 255 * 129 = 32895
        ([127, -127], False),
        ([0, 127, 127, 0], False),  # they are no pair
        ([-64, -65], True),
        ([63, 63, 63], False),
        ([1, 1, 127], False),
    ],
)
def test_pairs_of_large_weights_may_saturate(row, may):
    weight = torch.tensor([[1] * len(row), row], dtype=torch.int8)
    assert grid.may_saturate(weight) is may


def test_seven_bits_never_saturate():
    weight = torch.full((4, 6), 63, dtype=torch.int8)
    assert not grid.may_saturate(weight)
    assert not grid.may_saturate(-weight)


# -- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "each"), [(2, 4), (3, 2), (4, 2)])
@pytest.mark.parametrize("columns", [8, 9, 11])
def test_packed_integers_come_back(bits, each, columns):
    top = 2 ** (bits - 1)
    values = torch.arange(7 * columns).view(7, columns) % (2 * top) - top
    packed = grid.pack(values.to(torch.int8), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, -(-columns // each))
    again = grid.unpack(packed, bits, columns)
    assert again.dtype == torch.int8
    assert torch.equal(again.long(), values)


def test_the_first_of_packed_integers_is_in_the_lowest_bits():
    assert grid.pack(torch.tensor([[-8, 7]], dtype=torch.int8), 4).tolist() == [[0xF0]]
    assert grid.pack(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8), 2).tolist() == [[0xE4]]


# -- modules ---------------------------------------------------------------------------------------


def filled(scheme: Scheme, rows: int = 6, columns: int = 10) -> tuple[Int8Linear, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    layer = Int8Linear(columns, rows, scheme)
    scale = grid.weight_scale_of(weight, scheme.weight_bits, scheme.per_row)
    layer.fill(weight, scale)
    layer.fill_bias(torch.randn(rows), scale)
    return layer, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_layer_holds_its_weights_to_half_a_step(bits, per_row):
    layer, weight = filled(Scheme(weight_bits=bits, per_row=per_row))
    values, scale = layer.matrix()
    assert values.abs().max() <= 2 ** (bits - 1) - 1
    assert len(scale) == (6 if per_row else 1)
    error = (values * grid.column(scale) - weight).abs()
    assert torch.all(error <= grid.column(scale) * 0.5001)
    assert layer.weight.numel() == 6 * (10 if bits > 4 else 5 if bits > 2 else 3)


def test_unpacked_integers_follow_the_packed_ones():
    layer, _ = filled(Scheme(weight_bits=4))
    before = layer.integers()
    assert layer.integers() is before, "unpacked once"
    other, _ = filled(Scheme(weight_bits=4))
    other.fill(torch.ones(6, 10), torch.ones(1))
    layer.load_state_dict(other.state_dict())
    assert torch.all(layer.integers() == 1)
    layer.weight.copy_(grid.pack(torch.full((6, 10), -3, dtype=torch.int8), 4))
    assert torch.all(layer.integers() == -3)


@pytest.mark.parametrize("inputs", ["static", "dynamic", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_float32_whatever_the_model_is_cast_to(inputs, dtype):
    layer, _ = filled(Scheme(inputs=inputs, requantise=inputs == "static"))
    table = Int8Embedding(4, 10)
    table.fill(torch.randn(4, 10), torch.tensor([0.1]))
    model = torch.nn.Sequential(table, layer).to(dtype)
    scales = {k: v for k, v in model.state_dict().items() if k.endswith("_scale")}
    assert len(scales) == {"static": 4}.get(inputs, 2)
    assert all(scale.dtype == torch.float32 for scale in scales.values())
    assert table.weight_scale.item() == torch.tensor(0.1).item()
    assert model(torch.tensor([[0, 3]])).dtype == dtype


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_row", [False, True])
def test_an_embedding_gives_rows_times_scale(bits, per_row):
    torch.manual_seed(0)
    weight = torch.randn(12, 7)
    scale = grid.weight_scale_of(weight, bits, per_row)
    table = Int8Embedding(12, 7, bits, per_row)
    table.fill(weight, scale)
    ids = torch.tensor([[0, 11, 5], [5, 5, 1]])
    wanted = (torch.round(weight / grid.column(scale)) * grid.column(scale))[ids]
    assert torch.equal(table(ids), wanted)


def test_a_tied_layer_has_no_matrix_of_its_own():
    table = Int8Embedding(12, 8, 4, per_row=True)
    table.fill(torch.randn(12, 8), torch.full((12,), 0.2))
    layer = TiedInt8Linear(table, Scheme(inputs="dynamic", weight_bits=4))
    assert list(layer.state_dict()) == ["bias"]
    x = torch.randn(3, 8)
    wanted = linear_int8(x, table.integers(), table.weight_scale, None, None)
    assert torch.equal(layer(x), wanted)
    both = copy.deepcopy(torch.nn.ModuleList([table, layer]))
    again: TiedInt8Linear = both[1]  # pyright: ignore[reportAssignmentType]
    assert again._table[0] is both[0]


def test_rows_of_zeros_leave_the_bias_as_it_is():
    bias = torch.tensor([0.5, -2.0])
    layer = Int8Linear(4, 2, Scheme(per_row=True))
    scale = grid.weight_scale_of(torch.zeros(2, 4), 8, per_row=True)
    layer.fill(torch.zeros(2, 4), scale)
    layer.input_scale = grid.scale_of(torch.tensor(3.0), 8)
    layer.fill_bias(bias, scale)
    assert torch.allclose(layer(torch.zeros(1, 4)), bias, atol=1e-6)
    assert torch.isfinite(linear_int8(torch.zeros(1, 4), layer.weight, scale, None, None)).all()


def test_training_mode_is_refused_and_nothing_changes():
    layer, _ = filled(Scheme())
    assert layer.eval() is layer
    with pytest.raises(UserError, match="inference only"):
        layer.train()
    assert not layer.training


def test_autocast_does_not_round_whole_numbers(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=draw)
    weight = torch.randint(-127, 128, (6, 64), dtype=torch.int8, generator=draw)
    scales = torch.full((6,), 0.01), torch.tensor(0.02)
    for kind in ("float", int8.backend("cpu")):
        monkeypatch.setattr(int8, "backend", lambda device, kind=kind: kind)
        plain = linear_int8(x, weight, *scales, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear_int8(x, weight, *scales, None), plain)
    a, b = torch.randn(2, 3, 64, generator=draw), torch.randn(2, 64, 5, generator=draw)
    steps = torch.tensor(0.02), torch.tensor(0.03)
    plain = product_int8(a, b, *steps, None, False, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product_int8(a, b, *steps, None, False, 8), plain)
