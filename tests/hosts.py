"""Several hosts on one machine, and a raybert job on the Ray cluster that they form.

    python tests/hosts.py job --shared FOLDER --recipe FILE [--start ray-up]
    python tests/hosts.py faults --shared FOLDER --recipe FILE
    python tests/hosts.py elastic --shared FOLDER --recipe FILE

A host is a set of Linux namespaces: an address on a bridge; processes, /tmp, home and shared memory
of its own; FOLDER is every host's /mnt/raybert, as NFS would have it. All of it, the bridge too,
lies in namespaces of this program, which begins by entering them: however it ends, nothing is left,
and `ray stop` inside a host knows no other Ray. It needs root (CAP_SYS_ADMIN), iproute2 and
util-linux; `ray up` also sshd and rsync.

`job` submits the recipe from outside, with two workers, and sees that they ran on two hosts; with
`--start ray-up` the cluster is that of the on-premises launcher file, started over SSH as its first
lines say; else `ray start` is called on each host. `faults` does the recipe twice, to runs/whole
and runs/hit, and takes hosts away from the second. `elastic` takes one away from a run that does
with one worker as well as with two, and later brings another.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = str(ROOT / "tests" / "hosts.py")
SUBMIT = ROOT / "clusters" / "submit.py"
STORAGE = Path("/mnt/raybert")
SCRATCH = Path("/mnt/scratch")
"""What the hosts and the outside tell each other; in memory, as all of /mnt."""

BEGAN = time.monotonic()
OUTSIDE = Path("/mnt/outside")
"""The machine's own files, seen from within."""

NETWORK = "10.199.0"
HEAD = f"{NETWORK}.10"
TOOLS = ("unshare", "nsenter", "ip", "mount")
FOR_LAUNCHER = ("ssh", "sshd", "rsync")
SMALL = "--object-store-memory=100000000"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
ON_HOSTS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else other programs of this machine come first
}
"""What processes on the hosts find in the environment, beside what the launcher file says."""

BORROWED = ("--no-deps", "--no-index", "--force-reinstall", "--root-user-action=ignore")
"""How pip installs raybert where everything else is there already."""


def found(tool: str) -> str | None:
    """Where a program is, also one that only root has in its path."""
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    lacking = [tool for tool in TOOLS if not found(tool)]
    if lacking:
        return f"{', '.join(lacking)} not found"
    tried = subprocess.run([*unshared(), "mount", "-t", "tmpfs", "none", "/mnt"],
                           capture_output=True, text=True)  # fmt: skip
    if tried.returncode:
        return f"namespaces need more privileges: {tried.stderr.strip()}"
    bridge = [*unshared(), "ip", "link", "add", "bridge", "type", "bridge"]
    tried = subprocess.run(bridge, capture_output=True, text=True)
    return f"no network bridge: {tried.stderr.strip()}" if tried.returncode else ""


def unshared() -> list[str]:
    """The command that puts what follows into namespaces that end with it."""
    kinds = ["--net", "--mount", "--uts", "--ipc", "--pid"]
    return ["unshare", *kinds, "--fork", "--kill-child", "--mount-proc"]


def call(*words: str) -> None:
    subprocess.run(words, check=True)


def wait(what: str, there: Callable[[], Any], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} seconds")
        time.sleep(0.02)


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:.0f} s] {text}", flush=True)


def private() -> None:
    """Hide the machine's temporary folders behind empty ones, but for what is needed of them."""
    needed = {ROOT, Path(sys.prefix), Path(sys.executable).resolve().parents[1]}
    hidden = ["/tmp", str(Path.home()), "/run", "/dev/shm"]
    if not OUTSIDE.exists():
        call("mount", "-t", "tmpfs", "tmpfs", "/mnt")
        for folder in (OUTSIDE, STORAGE, SCRATCH):
            folder.mkdir()
        call("mount", "--rbind", "/", str(OUTSIDE))
    for place in hidden:
        call("mount", "-t", "tmpfs", "tmpfs", place)
    for path in needed:
        if any(path.is_relative_to(place) for place in hidden):
            path.mkdir(parents=True, exist_ok=True)
            call("mount", "--bind", f"{OUTSIDE}{path}", str(path))
    Path("/run/sshd").mkdir()


# -- a host ----------------------------------------------------------------------------------------


def boot(name: str, address: str) -> None:
    """What a host's first process does: settle in, start sshd, and bury orphans for ever."""
    socket.sethostname(name)
    private()
    # As Debian has it: a machine's own name is on loopback, where no other machine finds it.
    names = SCRATCH / f"names-{name}"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    call("mount", "--bind", str(names), "/etc/hosts")
    call("ip", "link", "set", "lo", "up")
    wait("eth0", lambda: "eth0" in dict(socket.if_nameindex()).values())
    call("ip", "address", "add", f"{address}/24", "dev", "eth0")
    call("ip", "link", "set", "eth0", "up")
    call("ip", "route", "add", "default", "via", f"{NETWORK}.1")
    install()
    if (SCRATCH / "sshd_config").exists():
        call(str(found("sshd")), "-f", str(SCRATCH / "sshd_config"))
    (SCRATCH / f"up-{name}").touch()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)


def install() -> None:
    """A virtual environment where the launcher file has one: it borrows all packages from this one
    but raybert itself, whose wheel is put in it."""
    venv = Path.home() / "raybert" / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", str(venv))
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ray = venv / "bin" / "ray"
    ray.write_text(f"#!{venv}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    ray.chmod(0o755)
    if not (SCRATCH / "sshd_config").exists():
        (wheel,) = (SCRATCH / "dist").glob("*.whl")
        call(str(venv / "bin" / "python"), "-m", "pip", "install", "-q", *BORROWED, str(wheel))


class Host:
    """One of them; it is gone when its first process is killed."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        words = ["boot", "--name", name, "--address", address]
        self.process = subprocess.Popen([*unshared(), sys.executable, PROGRAM, *words])
        pid, own = str(self.process.pid), os.readlink("/proc/self/ns/net")
        wait("namespaces", lambda: os.readlink(f"/proc/{pid}/ns/net") != own)
        peer = ["peer", "name", "eth0", "netns", pid]
        call("ip", "link", "add", f"to-{name}", "type", "veth", *peer)
        call("ip", "link", "set", f"to-{name}", "master", "hosts", "up")
        wait(name, (SCRATCH / f"up-{name}").exists)

    def run(self, *words: str) -> None:
        """A command on this host, as its user would type it."""
        path = f"{Path.home()}/raybert/venv/bin:{os.environ['PATH']}"
        (first,) = psutil.Process(self.process.pid).children()
        enter = ["nsenter", "-t", str(first.pid), "-m", "-u", "-i", "-n", "-p"]
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(SCRATCH / "token")}
        env = {**os.environ, **ON_HOSTS, **token, "PATH": path}
        env["RAYBERT_CACHE"] = str(STORAGE / "cache")
        subprocess.run([*enter, *words], check=True, env=env, stdout=subprocess.DEVNULL)

    def processes(self, word: str) -> list[psutil.Process]:
        """Those of this host whose command line has a word in it."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def lose(self) -> None:
        """Pull the plug; nobody hears the rest of it die, as the network is the first to go."""
        call("ip", "link", "set", f"to-{self.name}", "down")
        self.process.kill()
        self.process.wait()
        (SCRATCH / f"up-{self.name}").unlink()


# -- outside ---------------------------------------------------------------------------------------


class Outside:
    """Where the user sits: on the hosts' network, with the shared storage mounted."""

    def __init__(self, shared: Path) -> None:
        self.hosts, self.made = {}, 0
        socket.sethostname("outside")
        private()
        build_wheel()
        call("mount", "--bind", f"{OUTSIDE}{shared}", str(STORAGE))
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", "hosts", "type", "bridge")
        call("ip", "address", "add", f"{NETWORK}.1/24", "dev", "hosts")
        call("ip", "link", "set", "hosts", "up")
        self.ray("get-auth-token", "--generate", stdout=subprocess.DEVNULL)
        shutil.copy(Path.home() / ".ray" / "auth_token", SCRATCH / "token")

    def ray(self, *words: str, **keys: Any) -> None:
        """A command of Ray's, here."""
        subprocess.run([*RAY, *words], check=True, env=self.env(), cwd=SCRATCH, **keys)

    def env(self) -> dict[str, str]:
        """Of commands here: the token itself is in the home folder."""
        return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}

    def add(self, name: str = "") -> Host:
        """A new machine: the head, or a worker with an address that none has had."""
        self.made += name != "head"
        address = HEAD if name == "head" else f"{NETWORK}.{10 + self.made}"
        host = Host(name or f"worker{self.made}", address)
        self.hosts[host.name] = host
        say(f"{host.name} is up, {host.address}")
        return host

    def submit(self, address: str, recipe: Path, *more: str) -> subprocess.Popen[bytes]:
        """The recipe as a job: its log is shown, its status is the process's."""
        client = [sys.executable, str(SUBMIT), "--address", address]
        words = ["--recipe", str(recipe), "compress", *more]
        return subprocess.Popen([*client, *words], env=self.env())

    def busy(self) -> set[str]:
        """Names of the hosts on which a worker of the training runs."""
        return {name for name, host in self.hosts.items() if host.processes("RayTrainWorker")}


def build_wheel() -> None:
    """The repository's wheel in ``dist``, as the launcher file asks for."""
    source = SCRATCH / "source"  # a copy, because setuptools writes beside what it builds from
    for part in ("raybert", "tune_spaces"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    (SCRATCH / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "constraints.txt", SCRATCH / "tests")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    words = ["-m", "pip", "wheel", *options, "-w", str(SCRATCH / "dist"), str(source)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def started(outside: Outside) -> Iterator[str]:
    """A cluster of a head and two workers by `ray start`; the address that jobs go to."""
    start_head(outside)
    for _ in range(2):
        start_worker(outside.add())
    yield f"http://{HEAD}:8265"


def start_head(outside: Outside) -> None:
    head = ["ray", "start", "--head", "--port=6379", f"--dashboard-host={HEAD}", "--num-cpus=0"]
    outside.add("head").run(*head, SMALL)


def start_worker(host: Host) -> None:
    host.run("ray", "start", f"--address={HEAD}:6379", "--num-cpus=1", SMALL)


@contextlib.contextmanager
def launched(outside: Outside) -> Iterator[str]:
    """The same by `ray up`, over SSH; the address where `ray dashboard` forwards the head's."""
    key = Path.home() / ".ssh" / "id_ed25519"
    key.parent.mkdir(mode=0o700)
    for path in (key, SCRATCH / "host_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
    variables = " ".join(f"{name}={value}" for name, value in ON_HOSTS.items())
    (SCRATCH / "sshd_config").write_text(
        f"HostKey {SCRATCH}/host_key\nAuthorizedKeysFile {SCRATCH}/authorized\nStrictModes no\n"
        f"PasswordAuthentication no\nSetEnv {variables}\nPidFile none\n"
    )
    shutil.copy(key.with_suffix(".pub"), SCRATCH / "authorized")
    for name in ("head", "", ""):
        outside.add(name)
    file = SCRATCH / "on-premises.yaml"
    file.write_text(yaml.safe_dump(with_hosts(outside)))
    outside.ray("up", "-y", "--no-config-cache", str(file))
    forwarder = subprocess.Popen([*RAY, "dashboard", str(file)], env=outside.env())
    try:
        wait("the dashboard", lambda: reachable(8265))
        # The head logs in to start them, one after the other.
        there = outside.hosts.values()
        wait("the workers", lambda: all(host.processes("raylet") for host in there), 900)
        yield "http://127.0.0.1:8265"
    finally:
        forwarder.terminate()
        outside.ray("down", "-y", str(file))
    # It stops the head's Ray; that of workers ends when it has missed the head for a minute.
    ended(outside.hosts.values())


def ended(hosts: Iterable[Host]) -> None:
    """Wait until Ray runs on none of them."""
    wait("Ray to end", lambda: not any(host.processes("raylet") for host in hosts), 300)


def with_hosts(outside: Outside) -> dict[str, Any]:
    """The on-premises file with what a user changes, and machines as small as these."""
    config = yaml.safe_load((ROOT / "clusters" / "on-premises.yaml").read_text())
    workers = [host.address for name, host in outside.hosts.items() if name != "head"]
    config["provider"] |= {"head_ip": HEAD, "worker_ips": workers}
    config["auth"]["ssh_user"] = psutil.Process().username()
    pip = "pip install -q"
    for key, old, new in (
        ("setup_commands", pip, " ".join([pip, *BORROWED])),
        ("head_start_ray_commands", "ray start", f"ray start --num-cpus=0 {SMALL}"),
        ("worker_start_ray_commands", "ray start", f"ray start --num-cpus=1 {SMALL}"),
    ):
        assert any(old in command for command in config[key])
        config[key] = [command.replace(old, new) for command in config[key]]
    return config


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- what is tried ---------------------------------------------------------------------------------


def one_job(outside: Outside, recipe: Path, address: str) -> None:
    """A job from outside; its two workers have to be on two hosts, neither of them the head."""
    job, seen = outside.submit(address, recipe), set()
    while job.poll() is None:
        seen |= outside.busy()
        time.sleep(0.5)
    assert job.returncode == 0, f"the job ended with {job.returncode}"
    assert seen == {"worker1", "worker2"}, f"workers ran on {seen}"
    say("the job is done")


def faults(outside: Outside, recipe: Path, address: str) -> None:
    """The same recipe in peace, and while hosts are lost; whoever calls compares the results."""
    peace = outside.submit(address, recipe, "out=/mnt/raybert/runs/whole")
    assert peace.wait() == 0
    say("in peace: done")
    run = STORAGE / "runs" / "hit"
    job = outside.submit(address, recipe, f"out={run}")
    saved(run, 1, job)
    lose_a_worker(outside, a_busy_host(outside), "in the middle of a step")
    saved(run, newest(run) + 1, job)
    lose_in_checkpoint(outside, run, job)
    saved(run, newest(run) + 1, job)
    outside.hosts.pop("head").lose()
    say("lost the head")
    left = list(outside.hosts.values())
    ended(left)
    assert not outside.busy(), "workers train on without a head"
    job.kill()
    before = newest(run)
    assert not (run / "report.json").exists()
    start_head(outside)
    for host in left:
        start_worker(host)
    again = outside.submit(address, recipe, f"out={run}")
    assert again.wait() == 0
    say(f"continued from step {before}: done")


def elastic(outside: Outside, recipe: Path, address: str) -> None:
    """One or two workers: with one when a host is lost, with two when another has come."""
    run = STORAGE / "runs" / "elastic"
    more = ("workers=1-2", "resources.resize_every=0.2", f"out={run}")
    job = outside.submit(address, recipe, *more)
    saved(run, 1, job)
    assert len(outside.busy()) == 2
    victim = a_busy_host(outside)
    outside.hosts.pop(victim.name).lose()
    say(f"lost {victim.name}")
    step = newest(run)
    saved(run, step + 1, job)
    assert len(outside.busy()) == 1
    say(f"one worker goes on from step {step}")
    start_worker(outside.add())
    wait("two workers", lambda: len(outside.busy()) == 2 or job.poll() is not None, 300)
    assert job.poll() is None, "the job ended before another host came"
    step = newest(run)
    saved(run, step + 1, job)
    say(f"two workers go on from step {step}")
    assert job.wait() == 0
    say("done")


def lose_a_worker(outside: Outside, victim: Host, when: str) -> None:
    """Take a host away, and bring a new one."""
    outside.hosts.pop(victim.name).lose()
    say(f"lost {victim.name} {when}")
    start_worker(outside.add())


def a_busy_host(outside: Outside) -> Host:
    return outside.hosts[max(outside.busy())]


def lose_in_checkpoint(outside: Outside, run: Path, job: subprocess.Popen[bytes]) -> None:
    """Lose a worker while a checkpoint is being written, which must not become one."""
    for _ in range(3):
        victim = a_busy_host(outside)
        while not (began := list((run / "checkpoints").glob(".partial-phase*-step*"))):
            assert job.poll() is None
            time.sleep(0.002)
        victim.process.kill()
        whole = began[0].with_name(began[0].name.removeprefix(".partial-"))
        late = whole.exists()
        lose_a_worker(outside, victim, f"{'after' if late else 'in the middle of'} {whole.name}")
        if not late:
            return
        saved(run, newest(run) + 1, job)
    raise AssertionError("no checkpoint was hit in three attempts")


def saved(run: Path, step: int, job: subprocess.Popen[bytes]) -> None:
    """Wait for a checkpoint of this step or a later one."""
    wait(f"step {step} to be saved", lambda: newest(run) >= step or job.poll() is not None, 300)
    assert job.poll() is None, f"the job ended with {job.returncode}"


def newest(run: Path) -> int:
    """The step of the newest checkpoint of a run of one phase; 0: there is none."""
    return max((int(p.name[-7:]) for p in (run / "checkpoints").glob("phase0-step*")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Several hosts on one machine.")
    parser.add_argument("what", choices=("job", "faults", "elastic", "boot"))
    parser.add_argument("--shared", type=Path, help="every host's /mnt/raybert")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--start", choices=("ray-up", "ray-start"), default="ray-start")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "boot":
        boot(args.name, args.address)
    if not args.inside:
        words = [*unshared(), sys.executable, PROGRAM, *sys.argv[1:], "--inside"]
        os.execvp(words[0], words)
    outside = Outside(args.shared.absolute())
    recipe = SCRATCH / args.recipe.name
    shutil.copy(f"{OUTSIDE}{args.recipe.absolute()}", recipe)
    with (launched if args.start == "ray-up" else started)(outside) as address:
        say(f"the cluster is up, {address}")
        tried = {"job": one_job, "faults": faults, "elastic": elastic}
        tried[args.what](outside, recipe, address)


if __name__ == "__main__":
    main()
