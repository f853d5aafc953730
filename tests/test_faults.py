"""What goes wrong around a run: on one worker alone, on the cluster, in its folder, by signal."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import yaml
from conftest import one_and_two

from raybert import cluster as cluster_room
from raybert import progress, run
from raybert.cli import main
from raybert.config import Recipe
from raybert.errors import TransientError, UserError
from raybert.recipe_file import dump_recipe, recipe_from

# Its name in `ray.util` is the function's.
groups = importlib.import_module("ray.util.placement_group")

ONE_IS_BAD = """
from raybert.checkpoint import World
from raybert.errors import UserError
from raybert.step import Recent

world = World(rank, workers, torch.device("cpu"))
last = rank == workers - 1
found = []


def told(call):
    try:
        call()
        found.append("")
    except UserError as error:
        found.append(str(error))


def own_mistake():
    if last:
        raise UserError("the last worker's storage is not there.")


recent = Recent(world, 1)
recent.add({"task": torch.tensor(float("nan") if last else 1.0)}, 8)
told(lambda: recent.settle(7, "replace"))
told(lambda: world.agreed(own_mistake))
found.append(str(world.all_true(not last)))
told(lambda: world.on_first(lambda: 1))
"""


def test_what_is_wrong_on_one_worker_alone_stops_all_with_one_sentence(tmp_path):
    one, first, second = one_and_two(ONE_IS_BAD, tmp_path)
    assert one == first == second
    loss, storage, weights, fine = one
    assert "the loss stopped being a number at step 7 of phase replace" in loss
    assert weights == "False"
    assert storage == "the last worker's storage is not there."
    assert fine == ""


# -- the cluster -----------------------------------------------------------------------------------


def on_cluster(**resources: Any) -> Recipe:
    return recipe_from({"workers": 4, "resources": resources})


@pytest.fixture
def cluster(monkeypatch):
    """Says what a cluster has; its placement groups are granted once they are asked to wait."""
    asked = SimpleNamespace(nodes=[], granted=True, bundles=None, seconds=None, removed=0)

    def group(bundles: list[dict[str, int]]) -> Any:
        asked.bundles = bundles
        return SimpleNamespace(wait=wait)

    def wait(seconds: float) -> bool:
        asked.seconds = seconds
        return asked.granted

    def remove(_: Any) -> None:
        asked.removed += 1

    monkeypatch.setattr(cluster_room, "machines", lambda: asked.nodes)
    monkeypatch.setattr(groups, "placement_group", group)
    monkeypatch.setattr(groups, "remove_placement_group", remove)
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    return asked


def test_a_cluster_that_is_too_small_is_refused_at_once(cluster):
    cluster.nodes = [(2, 0)]
    for resources in ({}, {"gpu": True}, {"cpus": 8}):
        with pytest.raises(UserError, match=r"which has 2 CPUs and 0 GPUs.*resources\.wait=15"):
            cluster_room._workers_of(on_cluster(**resources))
    assert cluster.bundles is None


def test_a_cluster_that_starts_machines_on_demand_is_waited_for(cluster):
    workers = cluster_room._workers_of(on_cluster(gpu=True, cpus=2, wait=20))
    assert workers == (2, True)
    assert cluster.bundles == [{"CPU": 2, "GPU": 1}] * 4
    assert cluster.seconds == 1200
    assert cluster.removed == 1
    # A machine that is taken away in the middle is replaced as slowly.
    assert float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) == 1200


def test_a_cluster_that_starts_none_is_not_waited_for_for_ever(cluster):
    cluster.granted = False
    with pytest.raises(UserError, match=r"4 workers of 1 CPU within 20 minutes.*ray status"):
        cluster_room._workers_of(on_cluster(wait=20))
    assert cluster.removed == 1


def test_what_ends_workers_from_outside_may_pass(monkeypatch, tmp_path):
    """As a start-up that took too long; what ends them from within has been tried again."""
    recipe = on_cluster().model_copy(update={"out": str(tmp_path / "r")})
    job: Any = SimpleNamespace(recipe=recipe)
    outside = ray.train.ControllerError(RuntimeError("the start timed out"))
    within = ray.train.WorkerGroupError("it crashed", {0: RuntimeError()})
    for error, transient in ((outside, True), (within, False)):

        def fit(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(
            "ray.train.torch.TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit)
        )
        with pytest.raises(UserError, match="What was saved is kept") as caught:
            cluster_room.run_group(job, 1, False)
        assert isinstance(caught.value, TransientError) == transient


def test_shared_cpus_and_gpus_are_counted(cluster):
    cluster.nodes = [(16, 4)]
    assert cluster_room._workers_of(on_cluster()) == (4, True)
    assert cluster_room._workers_of(on_cluster(gpu=False, cpus=3)) == (3, False)


def test_a_workers_cpus_are_of_one_machine(cluster):
    cluster.nodes = [(3, 0), (3, 0)]  # 6 CPUs, and room for two workers of 2
    assert cluster_room._workers_of(on_cluster()) == (1, False)
    with pytest.raises(UserError, match=r"4 workers of 2 CPUs do not fit .* 6 CPUs .* 2 machine"):
        cluster_room._workers_of(on_cluster(cpus=2))
    cluster.nodes = [(0, 0), (8, 1), (8, 1)]  # two GPUs are too few for four
    assert cluster_room._workers_of(on_cluster()) == (4, False)
    with pytest.raises(UserError, match="a GPU do not fit the cluster, which has 16 CPUs and 2 GP"):
        cluster_room._workers_of(on_cluster(gpu=True))


def test_workers_that_were_lost_are_not_waited_for_for_ever(cluster, monkeypatch):
    cluster.nodes, now = [(2, 0), (2, 0)], [100.0]
    monkeypatch.setattr(cluster_room.time, "monotonic", lambda: now[0])
    recipe = on_cluster(timeout=10)

    def look(lost: float | None) -> float | None:
        return cluster_room._missing_since(lost, 4, (1, False), recipe)

    assert look(None) is None
    cluster.nodes = [(2, 0)]
    assert look(None) == 100.0
    now[0] += 599
    assert look(100.0) == 100.0
    cluster.nodes = [(2, 0), (2, 0)]
    assert look(100.0) is None  # it came back
    cluster.nodes = [(2, 0)]
    now[0] += 2
    with pytest.raises(UserError, match=r"room for 2 .*shards .* are kept.*workers=2"):
        look(100.0)


def test_an_interruption_of_ray_train_is_one_and_its_handler_goes():
    def fit() -> None:
        # What Ray Train does: it installs a handler of its own, which ends the process.
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), cluster_room._interruptible():
        fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_ray_on_this_machine_is_not_one_that_somebody_else_has_started(monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster_room.ray_up():
        assert asked["address"] == "local"
    asked.clear()
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with cluster_room.ray_up():
        assert "address" not in asked


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    def refuse(**_: Any) -> None:
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(UserError, match=r"RAY_ADDRESS=192\.0\.2\.1:6379.*RAY_AUTH_MODE=token"):
        cluster_room._connect({})
    monkeypatch.delenv("RAY_ADDRESS")
    # Ray on this machine: nothing that an address could mend.
    with pytest.raises(UserError, match="did not start on this machine: ray client connection"):
        cluster_room._connect({})


def test_workers_that_do_not_see_the_run_say_where_they_are(toy, tmp_path):
    recipe = toy(tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot be seen from .*data\.cache too"):
        cluster_room._check_shared(recipe)
    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text("")
    cluster_room._check_shared(recipe)


def test_a_run_is_not_left_in_a_folder_that_ray_removes(toy, tmp_path):
    recipe = toy(tmp_path / "working_dir_files" / "_ray_pkg_0a62fe483960e4e9" / "runs" / "mrpc")
    with pytest.raises(UserError, match="that Ray removes after the job"):
        run.finetune(recipe)
    assert not list(tmp_path.iterdir())


# -- the command -----------------------------------------------------------------------------------


def test_sigterm_ends_a_command_in_order(toy, tmp_path, monkeypatch, capsys):
    left = []

    def work(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt as error:  # Ray raises another in its place
            raise KeyboardInterrupt from error
        finally:
            left.append("in order")

    monkeypatch.setattr(run, "finetune", work)
    before = signal.getsignal(signal.SIGTERM)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(toy(tmp_path / "run")))
    assert main(["finetune", str(path)]) == 143
    assert left == ["in order"]
    assert "the same command continues from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("text", ["a: [", "2001-99-99", "\x00", "- a", "a: &a [*a]"])
def test_a_broken_recipe_in_the_run_folder_is_no_run(toy, tmp_path, capsys, text):
    recipe = toy(tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text(text)
    assert main(["finetune", str(path)]) == 2
    assert "nothing in it is touched" in capsys.readouterr().err
    assert (recipe.folder / "recipe.yaml").read_text() == text


def test_the_home_of_nobody_is_refused(capsys):
    for words in (["evaluate", "~nobody-here/run"], ["report", "a", "~nobody-here/run"]):
        assert main(words) == 2
        assert "a user who is not on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["data.source=~nobody-here/x", "out=a\0b", "model=\udcff"])
def test_places_that_cannot_be_are_refused(text):
    key, _, value = text.partition("=")
    section, _, name = key.rpartition(".")
    with pytest.raises(UserError, match=f"`{key}`"):
        recipe_from({section: {name: value}} if section else {name: value})


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "out=ftp://server/run"],
        ["compress", "data=file:///rows/glue"],
        ["compress", "data.cache=abfs://cache@account/raybert"],
        ["finetune", "model=hdfs://name/model"],
        ["evaluate", "abfs://runs@account/run"],
        ["predict-teacher", "--out", "hdfs://name/said", "teacher=x"],
    ],
)
def test_storage_of_other_kinds_is_refused_before_a_folder_is_made_of_it(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "it knows s3:// and gs://" in told
    assert "Mount any other and give the path" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["epochs", "lr", "clip"])
def test_numbers_without_a_value_are_refused(key, text):
    with pytest.raises(UserError, match=rf"train\.{key}"):
        recipe_from({"train": {key: yaml.safe_load(text)}})


# -- progress --------------------------------------------------------------------------------------


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    assert not progress.on_terminal()
    with progress.bar(100, "replace") as told:
        told.update(10)  # a run that is continued
        for _ in range(60):
            now[0] += 1
            told.set_postfix_str(f"loss {now[0]:.0f}")
            told.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "replace: step 10 of 100"
    assert lines[1] == "replace: step 30 of 100, 70 s left, loss 120"
    assert lines[2] == "replace: step 50 of 100, 50 s left, loss 140"
    assert lines[-1].startswith("replace: step 70 of 100")
    assert len(lines) == 5
