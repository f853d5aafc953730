"""What one short job after the other leaves behind on a cluster: 50 of them.

    python tests/benchmarks/soak.py

Each job fine-tunes a tiny model for two steps on two workers, and removes its run folder. What is
counted between jobs, when Ray has settled: processes of the cluster, their resident memory,
placement groups, and bytes in Ray's temporary folder and in shared memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from common import HERE, Figure, options, publish

MIB = 2**20
WARM = 5
"""Jobs after which what they leave is counted: the first ones fill pools and caches."""

GROUPS = """
import ray
from ray.util import placement_group_table

ray.init(logging_level="error", log_to_driver=False)
print(sum(group["state"] != "REMOVED" for group in placement_group_table().values()))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """A head of so many CPUs; its process, and the environment of its clients."""
    gcs, dashboard = free_port(), free_port()
    (folder / "token").write_text("0123456789abcdef" * 4)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    env["PYTHONPATH"] = str(HERE.parents[1])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    env["RAYBERT_CACHE"] = str(folder / "cache")
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    words += [f"--num-cpus={cpus}", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    words += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}/ray", "--disable-usage-stats"]
    words += [f"--ray-client-server-port={free_port()}", f"--object-store-memory={100 * MIB}"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while "will now block" not in (folder / "head.log").read_text():
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < end, "the cluster did not start"
            time.sleep(0.2)
        client = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        yield psutil.Process(process.pid), {**env, **client, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        process.terminate()  # it ends the processes that it has started
        process.wait(120)


def run_job(env: dict[str, str], words: list[str]) -> None:
    submit = HERE.parents[1] / "clusters" / "submit.py"
    # The jobs' client takes RAY_ADDRESS for the dashboard's.
    own = {key: value for key, value in env.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, str(submit), "finetune", *words]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def left(head: psutil.Process, env: dict[str, str], folder: Path) -> dict[str, float]:
    """What there is of the cluster now."""
    groups = subprocess.run(
        [sys.executable, "-c", GROUPS], env=env, capture_output=True, text=True, check=True
    )
    time.sleep(2)  # workers that this, and the job, had are going
    processes, resident = 0, 0
    for process in [head, *head.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            resident += process.memory_info().rss
            processes += 1
    files = [p.stat().st_size for p in (folder / "ray").rglob("*") if p.is_file()]
    shared = sum(p.stat().st_size for p in Path("/dev/shm").glob("*") if p.is_file())
    return {
        "processes": processes,
        "resident": resident / MIB,
        "groups": float(groups.stdout.split()[-1]),
        "disk": sum(files) / MIB,
        "shared": shared / MIB,
    }


def tiny_model(folder: Path) -> Path:
    """A random encoder, small enough that a job is nearly all Ray."""
    sys.path.insert(0, str(HERE.parent))
    from conftest import make_tokenizer, toy_encoder, write_rows

    toy_encoder(layers=1).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.csv", 60, seed=1)
    write_rows(folder / "dev.csv", 20, seed=2)
    return folder / "model"


def measure(args: Any, folder: Path) -> list[dict[str, float]]:
    """What was left after each job, from before the first."""
    words = [
        f"model={tiny_model(folder)}",
        "task=classification",
        "workers=2",
        "measure.batches=[]",
    ]
    words += [f"data.train={folder}/train.csv", f"data.dev={folder}/dev.csv", "data.text=text"]
    words += ["data.label=label", "train.max_steps=2", "resources.cpus=1", f"out={folder}/run"]
    with cluster(folder) as (head, env):
        seen = [left(head, env, folder)]
        for number in range(args.jobs):
            run_job(env, words)
            shutil.rmtree(folder / "run")
            seen.append(left(head, env, folder))
            print(f"after job {number + 1}: {seen[-1]}", flush=True)
    return seen


def main() -> None:
    """Measure, print and write."""
    parser = options("what jobs leave behind on a cluster", model=False)
    parser.add_argument("--jobs", type=int, help="(default: 50, with --quick 3)")
    args = parser.parse_args()
    args.jobs = args.jobs or (3 if args.quick else 50)
    # Sockets lie in it, whose paths may not be long.
    with tempfile.TemporaryDirectory(prefix="rb", ignore_cleanup_errors=True) as folder:
        seen = measure(args, Path(folder))
    warm = min(WARM, args.jobs - 1)
    jobs = len(seen) - 1 - warm

    def growth(key: str) -> float:
        """A job's, from the middle of the first warm three to that of the last three."""
        first, last = seen[warm : warm + 3], seen[-3:]
        middles = (statistics.median(part[key] for part in some) for some in (first, last))
        before, after = middles
        return (after - before) / max(1, jobs - 2)

    many = f"{args.jobs} short jobs on one cluster"
    figures = [
        Figure(f"{many}: processes more, a job", growth("processes"), "", 0.05),
        Figure(f"{many}: placement groups left in the end", seen[-1]["groups"], "", 0),
        Figure(f"{many}: the cluster's resident memory more, a job", growth("resident"), "MiB", 5),
        Figure(f"{many}: Ray's temporary folder more, a job", growth("disk"), "MiB", 2),
        Figure(f"{many}: shared memory more, a job", growth("shared"), "MiB", 0.1),
    ]
    publish(args, many, figures, {"after": seen})


if __name__ == "__main__":
    main()
