"""What a container may use, and which cluster a process is connected to."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from raybert import machine

GIB = 2**30


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A machine of eight cores and 16 GiB, whose container says what it is given."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    memory = SimpleNamespace(available=10 * GIB, total=16 * GIB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)

    def tell(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(f"{text}\n")

    return tell


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1),
     ("1600000 100000", 8)],
)  # fmt: skip
def test_a_containers_cores_are_those_of_its_limit(told, limit, cores):
    assert machine.own_cores() == 8, "no container"
    told(cpu_max=limit)
    assert machine.own_cores() == cores


def test_a_containers_memory_is_that_of_its_limit(told):
    assert machine.own_memory() == (10 * GIB, 16 * GIB)
    told(memory_max="max", memory_current=str(GIB))
    assert machine.own_memory() == (10 * GIB, 16 * GIB)
    told(memory_max=str(4 * GIB), memory_current=str(3 * GIB))
    assert machine.own_memory() == (GIB, 4 * GIB)
    told(memory_stat=f"anon {GIB}\ninactive_file {2 * GIB}")
    assert machine.own_memory() == (3 * GIB, 4 * GIB), "what files keep gives way"
    told(memory_max=str(12 * GIB), memory_current="0", memory_stat="")
    assert machine.own_memory() == (10 * GIB, 12 * GIB), "of a machine that others use too"


def fake_ray(nodes: int, client: bool = False, up: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        is_initialized=lambda: up,
        nodes=lambda: [{"Alive": n < nodes} for n in range(nodes + 1)],
        util=SimpleNamespace(
            client=SimpleNamespace(ray=SimpleNamespace(is_connected=lambda: client))
        ),
        get_runtime_context=lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"),
    )


@pytest.mark.parametrize(
    ("ray", "address"),
    [
        (None, None),
        (fake_ray(3, up=False), None),
        (fake_ray(1), None),  # a notebook's own
        (fake_ray(3), "10.0.0.1:6379"),
        (fake_ray(3, client=True), "ray://"),
    ],
)
def test_a_cluster_that_a_notebook_is_connected_to_is_one(monkeypatch, ray, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(machine.sys.modules, "ray", ray)
    assert machine.cluster_address() == address
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert machine.cluster_address() == "auto"
