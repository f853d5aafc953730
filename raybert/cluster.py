"""Ray: a cluster, or this machine as one; the workers that train on it, and those that predict.

Ray itself is imported when it is needed: a run of one worker on this machine does without.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybert.config import Recipe
from raybert.errors import TransientError, UserError
from raybert.machine import own_cores
from raybert.places import mirrors
from raybert.progress import Lines, NoBar, bar, on_terminal
from raybert.shares import most_cpus, slots
from raybert.storage import pull
from raybert.teacher import Request

if TYPE_CHECKING:
    from raybert.job import Job

logger = logging.getLogger("raybert")

LOOK = 30
"""Seconds without a shard after which it is looked whether all that make them can still run."""

PREEMPTIONS = 100
"""How often machines may be taken away by their cloud, which is no failure of the run's."""

# -- the connection --------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_for(recipe: Recipe) -> Iterator[tuple[int, bool]]:
    """Ray, for a recipe: CPUs a worker, and whether each has a GPU."""
    with ray_up():
        yield _workers_of(recipe)


@contextlib.contextmanager
def ray_up(dashboard: bool = True) -> Iterator[None]:
    """Ray, RAY_ADDRESS's cluster or this machine as one. What was started here is stopped at the
    end.

    Args:
        dashboard: whether a Ray started here has one, on loopback: Ray Train asks its State API
            which workers are left to clean. It takes seconds to start.
    """
    import ray

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
        if "RAY_ADDRESS" not in os.environ:
            # Not one that somebody has started on this machine.
            options |= {"address": "local", "num_cpus": own_cores()}
            options |= {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
        _connect(options)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _connect(options: dict[str, Any]) -> None:
    """Start Ray, or connect to the cluster that RAY_ADDRESS names.

    Raises:
        UserError: there is none, it does not let this process in, or Ray does not start.
    """
    import ray

    address, ended = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except Exception as error:  # Ray's own, when it does not start in time, has no other class
        if address is None:
            raise UserError(
                f"Ray did not start on this machine: {last_line(error)}. When the machine has less "
                "to do, the same command goes on; nothing was lost."
            ) from error
        raise UserError(
            f"no Ray cluster can be used at RAY_ADDRESS={address}: {last_line(error)}. Start one, "
            "or mend the address; one that asks for a token wants RAY_AUTH_MODE=token and its "
            "token in RAY_AUTH_TOKEN or ~/.ray/auth_token. Without RAY_ADDRESS the run stays on "
            "this machine."
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ended)  # Ray's own would end the process without a word


def _workers_of(recipe: Recipe) -> tuple[int, bool]:
    """CPUs a worker of the cluster, and whether each has a GPU.

    Raises:
        UserError: the cluster has not enough of them, and does not start more in time.
    """
    nodes, wait = machines(), recipe.resources.wait
    total, gpus = sum(cpu for cpu, _ in nodes), sum(gpu for _, gpu in nodes)
    cpus = recipe.resources.cpus or most_cpus(nodes, recipe.workers)
    if wait:
        # What is not there yet cannot be counted: a GPU has to be asked for.
        gpu = wants_gpu(recipe, gpus)
        _wait_for_machines(recipe, {"CPU": cpus, **({"GPU": 1} if gpu else {})})
        return cpus, gpu
    gpu = bool(recipe.resources.gpu)
    if slots(nodes, cpus, float(gpu)) < recipe.fewest:
        what = f"{cpus} CPUs{' and a GPU' if gpu else ''}"
        raise UserError(
            f"{recipe.fewest} workers of {what} do not fit the cluster, which has {total} CPUs "
            f"and {gpus} GPUs on {len(nodes)} machine(s). Use fewer workers or resources.cpus; if "
            "it starts machines on demand, give it minutes to do so: resources.wait=15."
        )
    if recipe.resources.gpu is None:
        gpu = slots(nodes, cpus, 1.0) >= recipe.fewest
    return cpus, gpu


def machines() -> list[tuple[int, int]]:
    """CPUs and GPUs of each machine of the cluster that Ray is connected to, or will be: of this
    one where no cluster is named and Ray has not been started."""
    import ray
    import torch

    if not ray.is_initialized():
        return [(own_cores(), torch.cuda.device_count())]
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in found]


def _wait_for_machines(recipe: Recipe, each: dict[str, int]) -> None:
    """Ask for room for all workers that it takes, and wait until the cluster has it."""
    from ray.util.placement_group import placement_group, remove_placement_group

    minutes = recipe.resources.wait
    if recipe.fewest == recipe.workers:
        # Ray Train's own patience, for when a machine that was taken away has to be replaced.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(max(60, 60 * minutes)))
    group = placement_group([dict(each) for _ in range(recipe.fewest)])
    try:
        if not group.wait(60 * minutes):
            asked = " and ".join(f"{count} {what}" for what, count in each.items())
            raise UserError(
                f"the cluster did not have {recipe.fewest} workers of {asked} within {minutes:g} "
                "minutes. Look at `ray status`; use fewer workers, or a larger resources.wait."
            )
    finally:
        remove_placement_group(group)


def takes_gpu(recipe: Recipe, gpus: int) -> bool:
    """Whether each worker gets a GPU: as the recipe says, else when there are enough."""
    if recipe.resources.gpu and gpus < recipe.fewest:
        raise UserError(
            f"{recipe.fewest} workers want a GPU each; there are {gpus}. Use fewer workers, or "
            "resources.gpu=false."
        )
    return wants_gpu(recipe, gpus)


def wants_gpu(recipe: Recipe, gpus: int) -> bool:
    """Whether each worker is to get one of so many GPUs, or of those that a cluster will start."""
    return gpus >= recipe.fewest if recipe.resources.gpu is None else recipe.resources.gpu


def last_line(error: BaseException) -> str:
    """The line of a worker's failure that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


# -- the worker group ------------------------------------------------------------------------------


def run_group(
    job: Job, cpus: int, gpu: bool, callbacks: Sequence[Any] = (), checkpoints: bool = False
) -> dict[str, Any]:
    """The loop on a Ray Train worker group, restarted when a worker dies; Ray is up already.

    Args:
        job: what to do.
        cpus: of each worker.
        gpu: whether each has one.
        callbacks: Ray Train's, who hear what the loop reports.
        checkpoints: whether they also hear of each checkpoint, as a report with the key
            ``checkpoint``.

    Returns:
        What `raybert.train.run` does.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from raybert.network import Groups

    recipe = job.recipe
    fixed = recipe.fewest == recipe.workers
    waits = round(60 * recipe.resources.timeout)
    # Of a process that does not even answer; one that does is noticed by those who wait for it.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(waits))
    config = {"job": job, "mirrors": mirrors(), "threads": cpus}
    config |= {"checkpoints": checkpoints, "terminal": on_terminal()}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=Groups(backend="nccl" if gpu else "gloo", timeout_s=waits),
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.workers if fixed else (recipe.fewest, recipe.workers),
            elastic_resize_monitor_interval_s=60 * recipe.resources.resize_every,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpu else {})},
        ),
        run_config=_run_config(recipe, callbacks),
    )
    try:
        with _interruptible():
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        # What goes wrong outside the loop, as with the network, is not tried again.
        outside = isinstance(error, ray.train.ControllerError)
        tries = 1 if outside else recipe.resources.max_failures + 1
        raise (TransientError if outside else UserError)(
            f"training failed{f' {tries} times' if tries > 1 else ''}: {last_line(error)}. "
            "What was saved is kept; when the cause is mended, the same command continues."
        ) from error
    finally:
        shutil.rmtree(recipe.folder / "ray", ignore_errors=True)
    return result.return_value or {}


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C while Ray Train trains is what it is elsewhere: Ray's own handler ends the process
    instead, and stays when the training is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _run_config(recipe: Recipe, callbacks: Sequence[Any]) -> Any:
    from ray.train import FailureConfig, RunConfig

    # A name of its own each time: the run's state is in its checkpoints, and Ray would take a
    # finished name as nothing left to do.
    return RunConfig(
        name=f"fit-{time.time_ns()}",
        storage_path=str(recipe.folder / "ray"),
        failure_config=FailureConfig(
            max_failures=recipe.resources.max_failures,
            # A range of workers: machines that are gone are counted on until Ray has noticed.
            controller_failure_limit=3 if recipe.fewest == recipe.workers else 20,
            max_preemption_failures=PREEMPTIONS,
        ),
        callbacks=list(callbacks),
    )


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a group runs, in its own process."""
    from ray.train import get_context
    from ray.train.torch import get_device

    from raybert.checkpoint import World
    from raybert.engine import init_distributed
    from raybert.train import run

    _quiet_worker()
    context, device = get_context(), get_device()
    rank, size = context.get_world_rank(), context.get_world_size()
    init_distributed(device, config["job"].recipe.resources.timeout)
    world = World(rank, size, device)
    try:
        job = world.agreed(lambda: config["job"].on(config["mirrors"]))
        world.agreed(lambda: _check_shared(job.recipe))
    except UserError as error:
        return {"error": error.with_traceback(None)}
    hooks = _RayHooks(rank, config["terminal"], config["checkpoints"])
    return run(job, world, hooks, config["threads"])


def _check_shared(recipe: Recipe) -> None:
    """Refuse to train where the run folder is not the one that the driver has written to."""
    if not pull(recipe.folder / "recipe.yaml"):
        raise UserError(
            f"{recipe.folder} cannot be seen from {socket.gethostname()}, where a worker runs: "
            "`out` must be on storage that all machines share, and data.cache too; a URI such as "
            "s3://BUCKET/runs/NAME names such storage."
        )


def _quiet_worker() -> None:
    """In a process of Ray's, what is printed goes to the driver, between its progress bars."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    logging.disable(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)
    disable_progress_bar()
    set_verbosity_error()


class _RayHooks:
    """Reports to Ray Train; the first worker's progress is drawn by the driver, on its terminal if
    it has one."""

    def __init__(self, rank: int, terminal: bool, checkpoints: bool) -> None:
        self.rank, self.terminal, self.checkpoints = rank, terminal, checkpoints

    def report(self, metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(metrics)

    def saved(self, checkpoint: Path) -> None:
        if self.checkpoints:
            self.report({"checkpoint": str(checkpoint)})

    def progress(self, total: int, label: str) -> Any:
        if self.rank:
            return NoBar()
        if not self.terminal:
            return Lines(total, label)
        from ray.experimental import tqdm_ray

        return _RayBar(tqdm_ray.tqdm(total=total, desc=label), label)

    def note(self, text: str) -> None:
        logger.warning(text)


class _RayBar:
    """A bar that Ray draws in the driver; its description carries what tqdm shows at the end."""

    def __init__(self, bar: Any, label: str) -> None:
        self.bar, self.label = bar, label

    def update(self, n: int) -> None:
        if n:
            self.bar.update(n)

    def set_postfix_str(self, text: str) -> None:
        self.bar.set_description(f"{self.label} {text}")

    def close(self) -> None:
        self.bar.close()


# -- the teacher's predictions ---------------------------------------------------------------------


def predict_on_ray(request: Request, recipe: Recipe, shards: list[int]) -> dict[int, str]:
    """Shards made by Ray actors; one that dies is replaced and its shard made again."""
    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    tries, files, lost = recipe.resources.max_failures, {}, None
    with ray_for(recipe) as (cpus, gpu), bar(request.rows_of(shards), "teacher", "row") as told:
        actor: Any = ray.remote(
            num_cpus=cpus, num_gpus=int(gpu), max_restarts=tries, max_task_retries=tries
        )(_Maker)
        # One that the cluster has no room for would be given shards all the same.
        count = max(1, min(recipe.workers, slots(machines(), cpus, float(gpu)), len(shards)))
        pool = ActorPool([actor.remote(request, mirrors(), gpu, cpus) for _ in range(count)])
        for shard in shards:
            pool.submit(lambda a, s: a.write.remote(s), shard)
        try:
            while pool.has_next():
                try:
                    shard, file, error = pool.get_next_unordered(timeout=LOOK)
                except TimeoutError:
                    lost = _missing_since(lost, count, (cpus, gpu), recipe)
                    continue
                if error:
                    raise UserError(error)
                files[shard] = file
                told.update(len(request.positions(shard)))
        except RayError as error:
            raise UserError(
                f"predicting failed {tries + 1} times: {last_line(error)}. The shards that were "
                "made are kept; when the cause is mended, the same command continues."
            ) from error
    return files


def _missing_since(
    lost: float | None, count: int, each: tuple[int, bool], recipe: Recipe
) -> float | None:
    """Since when the cluster has had too little room for all that predict; None: it has enough.

    Raises:
        UserError: for longer than a worker is waited for; a lost one would never start again.
    """
    cpus, gpu = each
    room = slots(machines(), cpus, float(gpu))
    if room >= count:
        return None
    now = time.monotonic()
    if lost is not None and now - lost > 60 * max(recipe.resources.timeout, recipe.resources.wait):
        raise UserError(
            f"of {count} workers that predict, the cluster has had room for {room} for too long: "
            "machines were lost. The shards that were made are kept; the same command continues, "
            f"with workers={max(1, room)} if they do not come back."
        )
    return lost or now


class _Maker:
    """A Ray actor that holds the teacher and writes one shard after the other."""

    def __init__(self, request: Request, mirrors: Path, gpu: bool, threads: int) -> None:
        import torch

        _quiet_worker()
        torch.set_num_threads(threads)
        self.request, self.mirrors = request, mirrors
        self.device = torch.device("cuda:0" if gpu else "cpu")
        self.predictor: Any = None

    def write(self, shard: int) -> tuple[int, str, str]:
        """The shard, its file's name, and what the user has to mend, if anything."""
        from raybert.teacher import Predictor

        try:
            if self.predictor is None:
                self.predictor = Predictor(self.request.on(self.mirrors), self.device)
            return shard, self.predictor.write(shard), ""
        except UserError as error:  # raised, it would look like a crash
            return shard, "", str(error)
