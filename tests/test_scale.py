"""What a run moves, against sums done by hand."""

from __future__ import annotations

from raybert.scale import (
    Load,
    amount,
    checkpoint_bytes,
    network_bytes,
    prediction_bytes,
    step_flops,
)


def test_four_workers_send_what_the_zero_paper_counts():
    # A million float32 gradients are 4 MB; a worker of four sends 3/4 of that in half a ring.
    assert network_bytes(1_000_000, 4) == {0: 6e6, 1: 6e6, 2: 6e6, 3: 9e6}


def test_accumulated_passes_cost_the_stages_that_keep_only_parts():
    assert network_bytes(1_000_000, 4, accumulation=2) == {0: 6e6, 1: 6e6, 2: 9e6, 3: 18e6}


def test_one_worker_sends_nothing():
    assert set(network_bytes(10**9, 1, accumulation=8).values()) == {0}


def test_bert_large_on_64_gpus():
    # 335 M parameters, 1.34 GB of gradients, 63/64 of them twice: 2.64 GB; a third way for stage 3.
    sent = network_bytes(335_000_000, 64)
    assert sent[0] == 2 * 4 * 335_000_000 * 63 // 64 == 2_638_125_000
    assert sent[3] == 3_957_187_500
    assert checkpoint_bytes(335_000_000) == 4_020_000_000


def test_predictions_of_a_corpus():
    # 10 M rows of 2 logits and 24 x 1024 halves: 8 + 49152 bytes, and 8 more for place.
    assert prediction_bytes(10_000_000, 2, 24, 1024) == 491_680_000_000
    assert prediction_bytes(3, 1.5, 0, 0) == 42


def test_lines_name_the_stages_only_where_somebody_listens():
    load = Load(3e9, 120, 2, 1, network_bytes(1000, 2), 640, 12_000, 10, 0)
    _, network, storage = load.lines()
    assert network.split(": ")[1].startswith("4 kB at ZeRO 0, 4 kB at ZeRO 1, 4 kB at ZeRO 2, 6 kB")
    assert network.endswith("here ZeRO 1")
    assert "640 bytes read a step" in storage
    assert "12 kB every 10 steps (1.2 kB a step)" in storage
    alone = Load(3e9, 120, 1, 0, network_bytes(1000, 1), 640, 12_000, 10, 2_500_000).lines()
    assert [line.split()[0] for line in alone] == ["compute", "storage", "teacher"]
    assert "2.5 MB" in alone[2]


def test_a_step_is_three_forward_passes_and_the_teachers():
    assert step_flops(10, 4, 32) == 32 * 34
    # 1.8e18 operations at 1e14 a second are five hours.
    load = Load(1.8e16, 100, 1, 0, {}, 1, 1, 1, 0)
    assert load.lines()[0] == (
        "compute   18 PFLOP a step, 1.8 EFLOP in all: 5 device-hours at 100 TFLOP a second"
    )


def test_amounts():
    assert [amount(n) for n in (0, 999, 1e3, 1.234e6, 4e9, 5e12)] == [
        *("0 bytes", "999 bytes", "1 kB", "1.23 MB", "4 GB", "5 TB")
    ]
