"""Submit a raybert command to a Ray cluster as a job, follow its log, and end as it ends.

    export RAY_AUTH_MODE=token        # the token itself is read from ~/.ray/auth_token
    python clusters/submit.py compress theseus/mrpc model=bert-base-uncased workers=4 \\
        resources.gpu=true resources.wait=20 out=/mnt/raybert/runs/mrpc

Paths are the cluster's: name runs, data and models on storage that all its machines see. Nothing of
this machine is sent along, but for the file of a recipe (`--recipe mine.yaml`). Ctrl-C leaves the
job running; `--stop` ends it, and the same command submitted again continues from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

FAILURES = (RuntimeError, OSError, RayError, aiohttp.ClientError)
"""What Ray's client raises when the dashboard is not there, or does not let it in."""

TRIES, PAUSE = 5, 5.0
"""How often a log is asked for again, one time after the other, and the seconds before each."""


def submit(client: JobSubmissionClient, words: Sequence[str], recipe: Path | None = None) -> str:
    """Start a raybert command as a job.

    Args:
        client: of the cluster.
        words: as they would be typed behind ``raybert``.
        recipe: a file of this machine, sent along; it stands behind the command's name.

    Returns:
        The job's id.
    """
    environment: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if recipe is not None:
            shutil.copy(recipe, Path(folder) / recipe.name)
            environment["working_dir"] = folder
            words = [words[0], recipe.name, *words[1:]]
        entrypoint = shlex.join(["raybert", *words])
        return client.submit_job(entrypoint=entrypoint, runtime_env=environment)


async def follow(client: JobSubmissionClient, job: str) -> int:
    """Show a job's log as it is written, also when the connection is lost in between.

    Returns:
        The command's exit status; 143 where the job was stopped, 1 where it never started.

    Raises:
        ConnectionError: it is lost, and does not come back; the job runs on.
    """
    printed, failures = 0, 0
    while True:
        try:
            seen = 0
            async for lines in client.tail_job_logs(job):  # each time from the log's beginning
                print(lines[max(0, printed - seen) :], end="", flush=True)
                seen += len(lines)
                printed, failures = max(printed, seen), 0
            # The log may end a moment before the job is said to.
            while not (status := client.get_job_status(job)).is_terminal():
                await asyncio.sleep(0.5)
            break
        except FAILURES as error:
            failures += 1
            if failures > TRIES:
                raise ConnectionError(
                    f"the connection to job {job} is lost ({error}). The job runs on: "
                    f"`ray job logs --follow {job}` shows it, and nothing has to be submitted again"
                ) from None
            await asyncio.sleep(PAUSE)
    if status == JobStatus.SUCCEEDED:
        return 0
    details = client.get_job_info(job)
    print(f"job {job} {status.lower()}: {details.message}", file=sys.stderr)
    return 143 if status == JobStatus.STOPPED else details.driver_exit_code or 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Submit a raybert command to a Ray cluster.")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="the dashboard (default: %(default)s, where `ray dashboard` forwards it)",
    )
    parser.add_argument("--recipe", type=Path, help="a recipe's file, sent along")
    parser.add_argument("--stop", metavar="JOB", help="stop this job instead")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    args = parser.parse_args(argv)
    if not (args.words or args.stop):
        parser.error("name a raybert command, for example: compress theseus/mrpc")
    if args.recipe is not None and not args.recipe.is_file():
        parser.error(f"there is no file {args.recipe}")
    try:
        client = JobSubmissionClient(args.address)
        if args.stop:
            client.stop_job(args.stop)
            return 0
        job = submit(client, args.words, args.recipe)
        print(f"job {job}; `--stop {job}` ends it", file=sys.stderr)
        try:
            return asyncio.run(follow(client, job))
        except KeyboardInterrupt:
            print(
                f"\njob {job} runs on: `ray job logs --follow {job}` shows it, and `--stop {job}` "
                "ends it",
                file=sys.stderr,
            )
            return 130
    except FAILURES as error:
        print(
            f"{' '.join(str(error).split())} ({args.address}; `ray dashboard CLUSTER.yaml` "
            "forwards the dashboard here, and RAY_AUTH_MODE=token sends the token)",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
