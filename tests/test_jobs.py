"""A cluster on this machine that asks for its token, and commands submitted to it as jobs."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from raybert.recipe_file import dump_recipe

SUBMIT = Path(__file__).resolve().parents[1] / "clusters" / "submit.py"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """The environment of the jobs' client, while a head of two CPUs runs."""
    # Sockets lie in it, whose paths may not be long.
    folder = Path(tempfile.mkdtemp(prefix="rb"))
    (folder / "token").write_text("0123456789abcdef" * 4)
    port, tests = free_port(), str(Path(__file__).parent)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    env |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}", "RAY_TMPDIR": str(folder)}
    env |= {"PYTHONPATH": os.pathsep.join([str(SUBMIT.parents[1]), tests])}
    env.pop("RAY_ADDRESS", None)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    started = [Path(sys.executable).parent / "ray", "start", "--head", "--block"]
    started += ["--num-cpus=2", f"--port={free_port()}", f"--dashboard-port={port}"]
    started += [f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    log = (folder / "head.log").open("w")
    process = subprocess.Popen([*started, "--ray-client-server-port=" + free_port()], env=env,
                               stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        end = time.monotonic() + 90
        while "will now block" not in (folder / "head.log").read_text():
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield env
    finally:
        process.terminate()  # it ends the processes that it has started
        process.wait(120)
        log.close()
        for _ in range(20):  # the last of them may still write
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.5)


class Log:
    """A client whose connection is lost after some lines, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\ntwo\n"
        if self.times:
            self.times -= 1
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield "three\n"

    def get_job_status(self, job: str) -> JobStatus:
        return JobStatus.SUCCEEDED


def test_a_log_goes_on_where_its_connection_was_lost(monkeypatch, capsys):
    module = runpy.run_path(str(SUBMIT))
    monkeypatch.setitem(module["follow"].__globals__, "PAUSE", 0)
    assert asyncio.run(module["follow"](Log(3), "job-1")) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_lost_connection_is_no_lost_job(monkeypatch, capsys):
    module = runpy.run_path(str(SUBMIT))
    monkeypatch.setitem(module["follow"].__globals__, "PAUSE", 0)

    class Silent(Log):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            raise OSError("no route to host")
            yield ""

    with pytest.raises(ConnectionError, match=r"job-1 is lost.*runs on.*ray job logs --follow"):
        asyncio.run(module["follow"](Silent(0), "job-1"))


def test_ctrl_c_leaves_the_job_running_and_says_so(monkeypatch, capsys):
    module = runpy.run_path(str(SUBMIT))

    class Client:
        def __init__(self, address: str) -> None:
            pass

        def submit_job(self, **_: object) -> str:
            return "job-1"

    async def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(module["main"].__globals__, "JobSubmissionClient", Client)
    monkeypatch.setitem(module["main"].__globals__, "follow", interrupted)
    assert module["main"](["tasks"]) == 130
    told = capsys.readouterr().err
    assert "job job-1 runs on" in told
    assert "`--stop job-1` ends it" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tasks"], "ray dashboard"),
        (["--stop", "job-1"], "ray dashboard"),
        (["--recipe", "nowhere.yaml", "tasks"], "there is no file nowhere.yaml"),
        ([], "name a raybert command"),
    ],
)
def test_a_dashboard_or_file_that_is_not_there_is_named(words, told):
    env = {**os.environ, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
    process = job(env, *words)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert told in output
    assert "Traceback" not in output


def job(env: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SUBMIT), *words],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.distributed
def test_a_command_runs_as_a_job_and_ends_as_it_would_have(head, toy, tmp_path):
    recipe = toy(tmp_path / "run", train={"max_steps": 3})
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(recipe))
    good = job(head, "--recipe", str(path), "finetune")
    bad = job(head, "finetune", "train.bach_size=8")
    stranger = job({**head, "RAY_AUTH_MODE": "disabled"}, "tasks")
    told = bad.communicate(timeout=300)[0]
    assert bad.returncode == 2, told
    assert "did you mean 'train.batch_size'" in told
    assert "Traceback" not in told
    told = stranger.communicate(timeout=300)[0]
    assert stranger.returncode == 2
    assert "token" in told
    assert "Traceback" not in told
    told = good.communicate(timeout=300)[0]
    assert good.returncode == 0, told
    assert "finetune: step 3 of 3" in told
    assert "\r" not in told
    assert "it/s" not in told
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["steps"] == 3
