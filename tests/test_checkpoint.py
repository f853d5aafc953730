"""Checkpoints: whole or not at all, restored exactly, passed over when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import one_and_two
from safetensors.torch import load_file
from torch import nn

from raybert import checkpoint
from raybert.checkpoint import (
    KEPT,
    MANIFEST,
    Position,
    World,
    find_last_good,
    load_weights,
    read_position,
    restore,
    save,
    save_weights,
)
from raybert.errors import UserError

ALONE = World(0, 1, torch.device("cpu"))


class Engine:
    """What a checkpoint asks of DeepSpeed's engine at stage 0: module, optimiser, counter."""

    torch_autocast_z0_gradscaler = None

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.module.register_buffer("levels", torch.arange(5, dtype=torch.int8))
        decayed = [p for p in self.module.parameters() if p.dim() == 2]
        plain = [p for p in self.module.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "lr": 0.1, "peak_lr": 0.1},
                {"params": plain, "lr": 0.2, "peak_lr": 0.2, "weight_decay": 0.0},
            ]
        )
        self.global_steps = 0

    def zero_optimization_stage(self) -> int:
        return 0

    def step(self) -> float:
        """One step on random rows, dropout included: it depends on weights, moments and RNG."""
        self.optimizer.zero_grad()
        loss = self.module(torch.randn(6, 4)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.global_steps += 1
        return loss.item()

    def state(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self.module.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def saved(folder: Path, *steps: int) -> tuple[Engine, list[Path]]:
    """Checkpoints at these steps of phase 0, and the engine that they were made of."""
    engine, paths = Engine(), []
    for step in steps:
        while engine.global_steps < step:
            engine.step()
        paths.append(save(folder, engine, Position(step=step), ALONE, 0))
    return engine, paths


def test_a_restored_run_goes_on_as_the_uninterrupted_one(tmp_path):
    engine, _ = saved(tmp_path, 3)
    after = [engine.step() for _ in range(4)]
    whole = engine.state()

    other = Engine(seed=5)
    path, passed_over = find_last_good(tmp_path)
    assert path is not None
    assert passed_over == []
    position = restore(path, other, ALONE, 0)
    assert position.step == other.global_steps == 3
    assert [other.step() for _ in range(4)] == after
    assert_same(other.state(), whole)
    for one, two in zip(
        engine.optimizer.state.values(), other.optimizer.state.values(), strict=True
    ):
        assert_same(one, two)
    assert [g["peak_lr"] for g in other.optimizer.param_groups] == [0.1, 0.2]


def test_a_position_comes_back_whole(tmp_path):
    position = Position(
        phase=1,
        step=7,
        best=0.75,
        best_step=5,
        log_lines=11,
        seconds=1.5,
        tokens=999,
        steps=19,
        finished=[{"name": "replace", "steps": 12, "seconds": 1.0}],
    )
    path = save(tmp_path, Engine(), position, ALONE, 0)
    assert path.name == "phase1-step0000007"
    assert read_position(path) == (position, 1, 0)


def test_the_last_two_are_kept(tmp_path):
    _, paths = saved(tmp_path, 1, 2, 9, 10)
    assert KEPT == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in paths[-2:]]
    assert find_last_good(tmp_path)[0] == paths[-1]


def test_a_later_phase_is_newer_whatever_its_step(tmp_path):
    engine = Engine()
    save(tmp_path, engine, Position(phase=0, step=90), ALONE, 0)
    later = save(tmp_path, engine, Position(phase=1, step=2), ALONE, 0)
    last = save(tmp_path, engine, Position(phase=10, step=1), ALONE, 0)
    assert find_last_good(tmp_path)[0] == last
    assert sorted(tmp_path.iterdir()) == sorted([later, last])


def test_saving_the_same_step_again_replaces_it(tmp_path):
    engine, (path,) = saved(tmp_path, 2)
    engine.step()
    assert save(tmp_path, engine, Position(step=2), ALONE, 0) == path
    assert find_last_good(tmp_path) == (path, [])
    assert_same(load_file(path / "model.safetensors"), engine.state())


def truncated(path: Path) -> str:
    file = path / "optimizer.pt"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    return f"optimizer.pt has {size - 10} bytes instead of {size}"


def missing(path: Path) -> str:
    (path / "rng-0.pt").unlink()
    return "rng-0.pt is missing"


def grown(path: Path) -> str:
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"!")
    return "model.safetensors has"


def flipped(path: Path) -> str:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    return "model.safetensors has another checksum"


def no_manifest(path: Path) -> str:
    (path / MANIFEST).unlink()
    return f"{MANIFEST} is missing or cut short"


def cut_manifest(path: Path) -> str:
    file = path / MANIFEST
    file.write_text(file.read_text()[:-5])
    return f"{MANIFEST} is missing or cut short"


def empty_folder(path: Path) -> str:
    for file in path.iterdir():
        file.unlink()
    return f"{MANIFEST} is missing or cut short"


DAMAGE = [
    truncated,
    missing,
    grown,
    flipped,
    no_manifest,
    cut_manifest,
    empty_folder,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    _, (before, newest) = saved(tmp_path, 1, 2)
    fault = damage(newest)
    path, passed_over = find_last_good(tmp_path)
    assert path == before
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"checkpoint {newest.name} is damaged ({fault}")
    assert restore(before, Engine(), ALONE, 0).step == 1


def test_when_all_are_damaged_there_is_none(tmp_path):
    _, paths = saved(tmp_path, 1, 2)
    for path in paths:
        truncated(path)
    found, passed_over = find_last_good(tmp_path)
    assert found is None
    assert [text.split()[1] for text in passed_over] == [p.name for p in reversed(paths)]


def test_damaged_checkpoints_of_later_steps_take_no_good_ones_place(tmp_path):
    engine, paths = saved(tmp_path, 20, 30)
    for path in paths:
        truncated(path)
    again = save(tmp_path, engine, Position(step=10), ALONE, 0)  # the run has begun anew
    assert find_last_good(tmp_path) == (again, [])
    assert [path.name for path in tmp_path.iterdir()] == [again.name]


def test_no_folder_holds_no_checkpoint(tmp_path):
    assert find_last_good(tmp_path / "absent") == (None, [])


def test_what_was_never_sealed_is_no_checkpoint(tmp_path, monkeypatch):
    engine, (path,) = saved(tmp_path, 1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_seal", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, engine, Position(step=2), ALONE, 0)
    partial = tmp_path / ".partial-phase0-step0000002"
    assert (partial / "model.safetensors").is_file()
    assert find_last_good(tmp_path) == (path, [])
    monkeypatch.undo()
    again = save(tmp_path, engine, Position(step=2), ALONE, 0)
    assert find_last_good(tmp_path) == (again, [])
    assert not partial.exists()


@pytest.mark.parametrize("place", ["save_file", "_seal"])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_rest(tmp_path, monkeypatch, place):
    engine, (path,) = saved(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, place, full)
    with pytest.raises(UserError, match="No space left on device") as error:
        save(tmp_path, engine, Position(step=2), ALONE, 0)
    assert f"The last good checkpoint, {path.name}, is untouched" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert find_last_good(tmp_path) == (path, [])


def test_a_full_disk_before_any_checkpoint_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="None was saved yet"):
        save(tmp_path, Engine(), Position(step=1), ALONE, 0)


@pytest.mark.parametrize(
    ("workers", "zero", "size", "stage"), [(2, 3, 4, 3), (2, 3, 2, 2), (1, 0, 1, 3)]
)
def test_zero_3_needs_the_workers_and_the_stage_it_was_saved_by(
    tmp_path, workers, zero, size, stage
):
    _, (path,) = saved(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "workers": workers, "zero": zero}))
    world = World(0, size, torch.device("cpu"))
    told = f"{workers} workers at ZeRO stage {zero}; this run has {size} at stage {stage}"
    with pytest.raises(UserError, match=told) as error:
        restore(path, Engine(), world, stage)
    assert f"workers={workers} train.zero={zero}" in str(error.value)


ANY_STAGE = """
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from raybert.checkpoint import Position, World, find_last_good, restore, save
from raybert.config import TrainConfig
from raybert.engine import alone, init_distributed, make_engine, whole_state

cpu = torch.device("cpu")
world = World(rank, workers, cpu)


def engine_of(stage):
    torch.manual_seed(stage)  # each begins with weights of its own
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    matrices, plain = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    groups = [
        {"params": matrices, "lr": 0.1, "peak_lr": 0.1, "weight_decay": 0.01},
        {"params": plain, "lr": 0.1, "peak_lr": 0.1, "weight_decay": 0.0},
    ]
    train = TrainConfig(zero=stage, batch_size=4)
    return make_engine(model, groups, SimpleNamespace(train=train, workers=workers), "fp32")


def step(engine, seed):
    torch.manual_seed(seed)  # every worker has the same rows, so any number makes the same step
    engine.backward(engine(torch.randn(4, 5)).square().mean())
    engine.step()


def flat(engine):
    state = whole_state(engine)["state"]
    keys = ("step", "exp_avg", "exp_avg_sq")
    moments = [state[i][key].flatten() for i in sorted(state) for key in keys]
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()] + moments)


with alone() if workers == 1 else contextlib.nullcontext():
    init_distributed(cpu, 1.0)
    for writes, reads in STAGES:
        place = Path(folder) / f"{workers}-{writes}"
        if reads is None:
            engine = engine_of(writes)
            for seed in range(3):
                step(engine, seed)
            save(place, engine, Position(step=3), world, writes)
            found.append(flat(engine))
            step(engine, 3)
        else:
            engine = engine_of(reads)
            other, _ = find_last_good(Path(folder) / f"{3 - workers}-{writes}")
            restore(other, engine, world, reads)
            found.append(flat(engine))
            step(engine, 3)
        found.append(flat(engine))
        engine.destroy()
"""


def any_stage(folder: Path, stages: list[tuple[int, int | None]]) -> list[Any]:
    code = f"import contextlib, os\n\nSTAGES, found = {stages}, []\n"
    code += 'os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}\n'
    code += 'os.environ |= {"WORLD_SIZE": str(workers)}\n'
    return one_and_two(code + ANY_STAGE, folder)


def test_other_workers_at_another_stage_go_on_from_a_checkpoint(tmp_path):
    """One worker's checkpoints are continued by two, and two workers' by one."""
    one, first, _ = any_stage(tmp_path, [(0, None), (1, None), (2, None)])
    (tmp_path / "meet").unlink(missing_ok=True)
    onward, first_on, second_on = any_stage(tmp_path, [(0, 2), (1, 0), (2, 1)])
    for place in range(0, 6, 2):
        before, after = place, place + 1
        # What is restored is what was saved, bit for bit; the step made next is the same.
        assert torch.equal(onward[before], first[before])
        assert torch.equal(first_on[before], one[before])
        assert torch.equal(first_on[before], second_on[before])
        torch.testing.assert_close(onward[after], first[after], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(first_on[after], one[after], rtol=1e-5, atol=1e-7)
        assert not torch.equal(onward[after], onward[before])


def test_without_zero_other_workers_may_go_on(tmp_path):
    engine, (path,) = saved(tmp_path, 2)
    other = Engine(seed=5)
    position = restore(path, other, World(3, 4, torch.device("cpu")), 0)
    assert position.step == 2
    assert_same(other.state(), engine.state())


def test_zero_3_leaves_the_engine_to_save_and_load_itself(tmp_path):
    calls = []
    engine = Engine()
    zero = SimpleNamespace(
        module=engine.module,
        optimizer=engine.optimizer,
        save_checkpoint=lambda folder, **keys: (
            calls.append(("save", keys)),
            (Path(folder) / "zero.pt").write_bytes(b"state"),
        ),
        load_checkpoint=lambda folder, **keys: (
            calls.append(("load", Path(folder).name)) or folder,
            {},
        ),
        global_steps=0,
    )
    path = save(tmp_path, zero, Position(step=4), ALONE, 3)
    assert not (path / "model.safetensors").exists()
    assert "zero.pt" in json.loads((path / MANIFEST).read_text())
    assert restore(path, zero, ALONE, 3).step == 4
    assert calls == [("save", {"tag": "zero", "save_latest": False}), ("load", path.name)]
    assert zero.global_steps == 4


# -- weights alone ---------------------------------------------------------------------------------


def test_weights_and_buffers_come_back(tmp_path):
    one, two = Engine(0).module, Engine(1).module
    two.get_buffer("levels").zero_()
    path = tmp_path / "new" / "phase0.safetensors"
    save_weights(one, path)
    load_weights(two, path)
    assert_same(one.state_dict(), two.state_dict())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("I/O")])
def test_weights_are_whole_or_as_they_were(tmp_path, monkeypatch, error):
    path = tmp_path / "phase0.safetensors"
    save_weights(Engine(0).module, path)
    before = path.read_bytes()

    def full(_tensors, file):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="could not be written") as told:
        save_weights(Engine(1).module, path)
    assert str(error.args[-1]) in str(told.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_shared_weights_and_views_are_written_and_read(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(24)  # ZeRO keeps all weights as views of one storage
            self.one = nn.Linear(4, 3, bias=False)
            self.one.weight = nn.Parameter(flat[:12].view(3, 4))
            self.two = nn.Linear(4, 3, bias=False)
            self.two.weight = nn.Parameter(flat[12:].view(3, 4))
            self.tied = nn.Linear(4, 3, bias=False)
            self.tied.weight = self.one.weight

    one, two = Tied(), Tied()
    save_weights(one, tmp_path / "tied.safetensors")
    load_weights(two, tmp_path / "tied.safetensors")
    assert_same(one.state_dict(), two.state_dict())
    assert two.tied.weight is two.one.weight


def test_weights_of_another_model_are_refused(tmp_path):
    save_weights(nn.Linear(2, 3), tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"holds other tensors: \['bias'\]"):
        load_weights(nn.Linear(2, 3, bias=False), tmp_path / "one.safetensors")


def test_a_world_of_one_waits_for_nobody():
    ALONE.barrier()
    assert ALONE.all_true(True)
    assert not ALONE.all_true(False)
    assert ALONE.gather("x") == ["x"]
    assert ALONE.mean(torch.tensor([2.0])).item() == 2.0
