"""Object storage: what goes up and in which order, what comes down, and runs that have no other."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

import raybert
from raybert import buckets, checkpoint, run, storage
from raybert.checkpoint import find_last_good
from raybert.checks import check_folder
from raybert.cli import main
from raybert.compare import compare, make_comparison
from raybert.errors import UserError
from raybert.places import HIDDEN, checked_uri, local, mirrors, shown, uri_of
from raybert.plan import resolve_paths
from raybert.recipe_file import dump_recipe, load_recipe, recipe_from
from raybert.run import compress, finetune, predict_teacher
from raybert.search_plan import make_search
from raybert.storage import check_writable, entries, fetch, pull, push, remove

QUIET: dict[str, Any] = {"tell": lambda text: None}

SECRET = "wJalrXUtnFEMI"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


class Bucket:
    """A bucket of its own for each test, seen with another library than raybert's."""

    def __init__(self, endpoint: str, name: str) -> None:
        keys = {"aws_access_key_id": "tests", "aws_secret_access_key": SECRET}
        self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        self.name, self.uri = name, f"s3://{name}"
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, text: str = "x") -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=text.encode())

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def keys(self, prefix: str = "") -> set[str]:
        """Names of the objects below a folder, from there."""
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=1000)
        found = {entry["Key"].removeprefix(prefix) for entry in listed.get("Contents", [])}
        return {key for key in found if key and not key.endswith("/")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A machine with mirrors of its own, and patience for nothing."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RAYBERT_CACHE", str(tmp_path / "machine"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(buckets, "PAUSES", (0.0, 0.0))
    return tmp_path


@pytest.fixture
def bucket(here, server, monkeypatch, request) -> Bucket:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    return Bucket(server, f"bucket-{abs(hash(request.node.name))}")


@pytest.fixture
def elsewhere(here, monkeypatch):
    """Goes on as another machine, whose mirrors are empty; as often as it is called."""
    machines = iter(range(2, 10))

    def go() -> None:
        monkeypatch.setenv("RAYBERT_CACHE", str(here / f"machine{next(machines)}"))

    return go


def written(folder: Path, **files: str) -> Path:
    """A folder of these files, ``_`` in a name for its dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- names -----------------------------------------------------------------------------------------


def test_a_uri_and_its_mirror_tell_each_other(here):
    path = local("s3://bucket/runs/mrpc/")
    assert path == here / "machine" / "mirrors" / "s3" / "bucket" / "runs" / "mrpc"
    assert uri_of(path) == "s3://bucket/runs/mrpc"
    assert uri_of(path / "model") == "s3://bucket/runs/mrpc/model"
    assert uri_of(here / "runs") is uri_of("runs") is uri_of(mirrors()) is None
    assert uri_of("/other/gs/b/x", Path("/other")) == "gs://b/x"
    assert (
        shown(f"cannot read {path}/recipe.yaml") == "cannot read s3://bucket/runs/mrpc/recipe.yaml"
    )
    assert str(UserError(f"{path} is another run")) == "s3://bucket/runs/mrpc is another run"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("abfs://cache@account/raybert", "knows s3:// and gs://"),
        ("hdfs://name/model", "Mount any other"),
        (f"s3a://AKIA:{SECRET}@bucket/run", "Mount any other"),
        (f"https://user:{SECRET}@host/rows.csv", "Mount any other"),
        (f"abfs://run?sig={SECRET}", "Mount any other"),
        (f"s3://AKIA:{SECRET}@bucket/run", "has credentials in it"),
        (f"s3://AKIA:{SECRET[:5]}/{SECRET[5:]}@bucket/run", "has credentials in it"),
        (f"gs://{SECRET}@bucket/run", "has credentials in it"),
        (f"s3://bucket/run?access_key={SECRET}", "AWS_ENDPOINT_URL"),
        ("s3://bucket", "s3://BUCKET/FOLDER"),
        ("s3:///run", "s3://BUCKET/FOLDER"),
        ("s3://bucket/a/../../b", "s3://BUCKET/FOLDER"),
        ("s3://bucket/a//b", "s3://BUCKET/FOLDER"),
        ("s3://../run", "s3://BUCKET/FOLDER"),
    ],
)
def test_other_uris_are_refused_and_secrets_not_repeated(uri, told, capsys):
    with pytest.raises(ValueError, match=told) as error:
        checked_uri(uri)
    assert SECRET not in str(error.value)
    for words in (["compress", f"out={uri}"], ["evaluate", uri], ["export", "x", "--out", uri]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert told in err
        assert SECRET not in err
        assert SECRET[5:] not in err


def test_a_recipe_names_storage_by_its_uris(here):
    recipe = recipe_from(
        {
            "out": "s3://bucket/run/",
            "model": "gs://models/bert",
            "data": {"source": "s3://bucket/rows", "cache": "s3://bucket/cache"},
            "kd": {"predictions": "s3://bucket/said"},
        }
    )
    assert recipe.out == "s3://bucket/run"
    assert recipe.name == "run"
    inside = recipe.model_copy(update={"out": str(recipe.folder), "model": str(local("gs://m/b"))})
    assert "mirrors" not in dump_recipe(inside)
    again = load_recipe(None, ["out=s3://bucket/run"])
    assert again.folder == recipe.folder == inside.folder
    assert recipe.data.cache_folder == local("s3://bucket/cache")
    assert recipe.kd.predictions_folder == local("s3://bucket/said")


# -- up and down -----------------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_went(bucket, elsewhere):
    sent = written(local(f"{bucket.uri}/runs/one"), a_txt="1", _hidden="no")
    written(sent / "sub", b_txt="2")
    push(sent)
    assert bucket.keys("runs/one/") == {"a.txt", "sub/b.txt"}
    assert sorted(entries(sent)) == ["a.txt", "sub"]
    elsewhere()
    there = local(f"{bucket.uri}/runs/one")
    assert there != sent
    assert pull(there)
    assert contents(there) == {"a.txt": "1", "sub/b.txt": "2"}
    assert fetch(f"{bucket.uri}/runs/one/a.txt").read_text() == "1"


def test_the_bucket_is_the_truth(bucket):
    folder = written(local(f"{bucket.uri}/run"), a_txt="1", b_txt="2")
    push(folder)
    bucket.delete("run/a.txt")
    bucket.put("run/b.txt", "33")
    written(folder, c_txt="never sent")
    assert pull(folder)
    assert contents(folder) == {"b.txt": "33"}
    bucket.delete("run/b.txt")
    assert not pull(folder)
    assert not folder.exists()


def test_only_what_is_in_a_folder_itself_comes_when_no_more_is_wanted(bucket):
    bucket.put("run/recipe.yaml")
    bucket.put("run/model/config.json")
    folder = written(local(f"{bucket.uri}/run"), old_txt="")
    written(folder / "model", own_txt="")
    pull(folder, deep=False)
    assert contents(folder) == {"recipe.yaml": "x", "model/own.txt": ""}


def test_nothing_is_moved_twice(bucket, monkeypatch):
    moved: list[str] = []
    copy = storage.fs.copy_files

    def counted(source: str, target: str, **more: Any) -> None:
        moved.append(source)
        copy(source, target, **more)

    monkeypatch.setattr(storage.fs, "copy_files", counted)
    folder = written(local(f"{bucket.uri}/run"), a_txt="1", b_txt="2")
    push(folder, last="b.txt")
    assert [Path(name).name for name in moved] == ["a.txt", "b.txt"]
    push(folder, last="b.txt")
    assert pull(folder, "b.txt")
    assert len(moved) == 2


def test_a_folder_without_its_marker_is_not_there(bucket, monkeypatch, elsewhere):
    uri = f"{bucket.uri}/run"
    push(written(local(uri), weights="1", old="1", state="1", meta_json="{}"), last="meta.json")
    assert pull(local(uri), "meta.json")
    (local(uri) / "old").unlink()
    written(local(uri), weights="2", state="2")
    copy, sent = storage.fs.copy_files, []

    def cut(source: str, target: str, **more: Any) -> None:
        if len(sent) == 1:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode 7")
        sent.append(source)
        copy(source, target, **more)

    with monkeypatch.context() as broken:
        broken.setattr(storage.fs, "copy_files", cut)
        broken.setattr(storage, "AT_ONCE", 1)
        with pytest.raises(UserError, match="network and the storage are up"):
            push(local(uri), last="meta.json")
    assert "meta.json" not in bucket.keys("run/")
    push(local(uri), last="meta.json")
    assert bucket.keys("run/") == {"weights", "state", "meta.json"}
    elsewhere()
    assert pull(local(uri), "meta.json")
    assert contents(local(uri)) == {"weights": "2", "state": "2", "meta.json": "{}"}
    bucket.delete("run/meta.json")
    assert not pull(local(uri), "meta.json")
    assert not local(uri).exists()


def test_what_fails_for_a_moment_is_tried_again(bucket, monkeypatch):
    copy, failed = storage.fs.copy_files, []

    def shaky(source: str, target: str, **more: Any) -> None:
        if len(failed) < 2:
            failed.append(source)
            raise OSError("AWS Error SLOW_DOWN during PutObject operation")
        copy(source, target, **more)

    monkeypatch.setattr(storage.fs, "copy_files", shaky)
    push(written(local(f"{bucket.uri}/run"), a_txt="1"))
    assert bucket.get("run/a.txt") == b"1"


def test_what_is_made_in_a_mirror_is_not_gone_from_it_before_it_is_sent(bucket):
    folder, made = local(f"{bucket.uri}/cache"), threading.Event()
    found: list[bool] = []

    def other() -> None:
        made.wait(10)
        found.append(pull(folder, "meta.json"))

    thread = threading.Thread(target=other)
    thread.start()
    with storage.held(folder):
        written(folder, rows_arrow="1", meta_json="{}")
        made.set()
        time.sleep(0.5)  # the other one wants to see the folder as the bucket has it: empty
        assert not found
        push(folder, last="meta.json")
    thread.join(20)
    assert found == [True]
    assert contents(folder) == {"rows.arrow": "1", "meta.json": "{}"}


def test_a_mirror_keeps_what_is_of_this_machine_alone(bucket):
    folder = written(local(f"{bucket.uri}/cache"), a_txt="1")
    (folder / ".partial-shard").write_text("half")
    assert not pull(folder)
    assert contents(folder) == {".partial-shard": "half"}


def test_a_name_that_leads_out_of_the_mirror_is_not_followed(bucket, here):
    bucket.put("run/a.txt")
    bucket.put("run/../../../escaped.txt")
    pull(local(f"{bucket.uri}/run"))
    assert contents(local(f"{bucket.uri}/run")) == {"a.txt": "x"}
    assert not list(here.rglob("escaped.txt"))


def test_paths_that_mirror_nothing_are_left_alone(here):
    folder = written(here / "plain", a_txt="1")
    push(folder, last="a.txt")
    check_writable(folder)
    assert pull(folder)
    assert not pull(here / "nothing")
    assert entries(folder) == ["a.txt"]
    assert entries(here / "nothing") == []
    assert fetch("~/x") == Path("~/x").expanduser()
    remove(folder)
    assert not folder.exists()


def test_old_checkpoints_go_and_nothing_else(bucket):
    folder = local(f"{bucket.uri}/run/checkpoints")
    for name in ("phase0-step0000002 (copy)/manifest.json", "notes.txt"):
        bucket.put(f"run/checkpoints/{name}")
    for step in (2, 4, 6):
        name = f"phase0-step{step:07d}"
        checkpoint.send(written(folder / name, model="1", manifest_json="{}"))
    bucket.put("run/checkpoints/phase0-step0000008/model")  # cut short
    kept = {"phase0-step0000004", "phase0-step0000006", "phase0-step0000002 (copy)", "notes.txt"}
    assert set(entries(folder)) == kept | {"phase0-step0000008"}
    written(folder / "phase0-step0000010", model="never sent", manifest_json="{}")
    checkpoint.bring(folder)
    assert (
        sorted(path.name for path in folder.glob("phase*"))
        == [
            *("phase0-step0000002", "phase0-step0000004", "phase0-step0000006"),
        ][1:]
    )


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(bucket, toy, tmp_path):
    with pytest.raises(UserError, match="Make the bucket, or mend its name") as error:
        finetune(toy("s3://nobody-has-this/run"), **QUIET)
    assert "s3://nobody-has-this/run" in str(error.value)
    with pytest.raises(UserError, match="nobody-has-this"):
        fetch("s3://nobody-has-this/rows.csv")
    with pytest.raises(UserError, match="there is nothing at s3://bucket"):
        fetch(f"{bucket.uri}/rows.csv")
    data = {"train": f"{bucket.uri}/rows.csv"}
    with pytest.raises(UserError, match="there is nothing at"):
        finetune(toy(tmp_path / "run", data=data), **QUIET)
    with pytest.raises(UserError, match="there is nothing at"):
        finetune(toy(tmp_path / "run", model=f"{bucket.uri}/model"), **QUIET)


class Refusing(BaseHTTPRequestHandler):
    """A server that lets nobody in."""

    def answer(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""


def test_what_a_failed_look_at_storage_left_is_no_run(bucket, toy, monkeypatch):
    bucket.put(f"run/{HIDDEN}0123")
    recipe = resolve_paths(toy(f"{bucket.uri}/run"))
    assert not check_folder(recipe)
    bucket.put("run/notes.txt")
    with pytest.raises(UserError, match="is not a run folder"):
        check_folder(recipe)


def test_a_try_that_fails_once_leaves_nothing(bucket, monkeypatch):
    gone, failed = storage._gone, []

    def shaky(*args: Any) -> None:
        if not failed:
            failed.append(args)
            raise OSError("AWS Error SLOW_DOWN during DeleteObject operation")
        gone(*args)

    monkeypatch.setattr(storage, "_gone", shaky)
    check_writable(local(f"{bucket.uri}/run"))
    assert failed
    assert bucket.keys("run/") == set()


def test_storage_that_refuses(bucket, monkeypatch, toy):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        for words in ({"out": "s3://bucket/run"}, {"data": {"cache": "s3://bucket/cache"}}):
            keys = {"out": str(local("s3://b/run").parent / "run"), **words}
            recipe = toy(keys.pop("out"), **keys)
            with pytest.raises(UserError, match="credentials that may list, read, write") as error:
                finetune(recipe, **QUIET)
            assert SECRET not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()


def test_no_credentials_and_no_network_are_told_soon(here, monkeypatch):
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(UserError, match="s3://bucket/run could not be written to"):
        check_writable(local("s3://bucket/run"))
    assert time.monotonic() - began < 20


def test_google_without_credentials_is_told_soon(here, monkeypatch):
    monkeypatch.setattr(buckets, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(here / "nothing.json"))
    began = time.monotonic()
    with pytest.raises(UserError, match="gs://bucket/run could not be"):
        check_writable(local("gs://bucket/run"))
    assert time.monotonic() - began < 20


# -- runs ------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def steps(folder: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["phase"], line["step"]) for line in lines]


def stopped_at(name: str, work: Any, recipe: Any) -> None:
    """A run that ends, as by Ctrl-C, when it has sent the checkpoint of this name."""

    def saved(self: Any, checkpoint: Path) -> None:
        if checkpoint.name == name:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._LocalHooks, "saved", saved)
        with pytest.raises(KeyboardInterrupt):
            work(recipe, **QUIET)


@pytest.fixture(scope="module")
def chain() -> dict[str, Any]:
    """A run whose teacher's predictions are saved."""
    method = [{"name": "theseus", "finetune_epochs": 1}]
    train = {"epochs": 2, "save_every": 4, "eval_every": 5}
    return {"method": method, "kd": {"alpha": 0.3, "cls": 1.0}, "train": train}


def test_a_run_goes_on_on_another_machine(
    bucket, elsewhere, toy, teacher, tmp_path, monkeypatch, chain, capsys
):
    whole = compress(toy(tmp_path / "whole", teacher=str(teacher), **chain), **QUIET)
    for path in (teacher, Path(toy(tmp_path).model or "")):
        copy = local(f"{bucket.uri}/given/{path.name}")
        kept = shutil.ignore_patterns("checkpoints", "tensorboard")
        push(shutil.copytree(path, copy, ignore=kept))
    rows = toy(tmp_path).data
    for split in ("train", "dev"):
        bucket.put(f"given/rows/{split}.csv", Path(getattr(rows, split)).read_text())
    data = {"source": f"{bucket.uri}/given/rows", "train": None, "dev": None}
    data["cache"] = f"{bucket.uri}/cache"
    keys = {"teacher": f"{bucket.uri}/given/run", "data": data, **chain}
    recipe = toy(f"{bucket.uri}/runs/mrpc", **keys)
    elsewhere()  # nothing of what was copied is known there
    stopped_at("phase0-step0000008", compress, recipe)
    names = bucket.keys("runs/mrpc/")
    assert {"recipe.yaml", "metrics.jsonl"} <= names
    assert "checkpoints/phase0-step0000008/manifest.json" in names
    assert not any(".partial" in name or name.startswith("ray/") for name in names)
    predicted = {name for name in bucket.keys("cache/") if name.endswith("meta.json")}
    assert len(predicted) == 1
    held = bucket.get("runs/mrpc/recipe.yaml").decode()
    assert f"out: {bucket.uri}/runs/mrpc\n" in held
    assert f"teacher: {bucket.uri}/given/run/model\n" in held
    assert "machine" not in held

    elsewhere()
    assert not mirrors().exists()
    told: list[str] = []
    folder = compress(recipe, tell=told.append)
    assert any(text.startswith("continuing") for text in told)
    assert any("predictions are there already" in text for text in told)
    assert_same(weights(folder), weights(whole))
    assert steps(folder) == steps(whole)
    names = bucket.keys("runs/mrpc/")
    assert {"report.json", "report.html", "model/model.safetensors", "model/README.md"} <= names
    assert any(name.startswith("tensorboard/") for name in names)
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/phase")}
    assert kept == {path.name for path in (whole / "checkpoints").glob("phase*-step*")}
    for name in ("report.json", "report.md", "report.html", "model/README.md", "recipe.yaml"):
        text = bucket.get(f"runs/mrpc/{name}").decode()
        assert SECRET not in text
        assert str(tmp_path) not in text, name

    elsewhere()
    told.clear()
    assert_same(weights(compress(recipe, tell=told.append)), weights(whole))
    assert shown(told[0]) == f"{bucket.uri}/runs/mrpc is finished already"
    other = toy(f"{bucket.uri}/runs/mrpc", **{**keys, "kd": {"alpha": 0.4}})
    before = {name: bucket.get(f"runs/mrpc/{name}") for name in bucket.keys("runs/mrpc/")}
    elsewhere()
    with pytest.raises(UserError, match=r"holds another run: kd.alpha is 0.3 there and 0.4 here"):
        compress(other, **QUIET)
    with pytest.raises(UserError, match="is not a run folder; nothing in it is touched"):
        compress(toy(f"{bucket.uri}/given", **keys), **QUIET)
    assert before == {n: bucket.get(f"runs/mrpc/{n}") for n in bucket.keys("runs/mrpc/")}

    capsys.readouterr()
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    elsewhere()  # which has seen nothing of the run
    assert main(["compress", str(path), "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["compress", str(path)]) == 0
    assert f"model   {bucket.uri}/runs/mrpc/model" in capsys.readouterr().out
    assert main(["report", recipe.out or "", "--out", f"{bucket.uri}/page"]) == 0
    assert f"report  {bucket.uri}/page/report.html" in capsys.readouterr().out
    assert bucket.keys("page/") == {"report.md", "report.html"}
    elsewhere()
    assert main(["evaluate", recipe.out or ""]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    report = json.loads(bucket.get("runs/mrpc/report.json"))
    assert found == pytest.approx(report["student"]["metrics"])
    assert raybert.load(f"{bucket.uri}/runs/mrpc").config.num_hidden_layers == 2
    assert main(["compress", str(path), "--overwrite", "--dry-run"]) == 0
    assert bucket.keys("runs/mrpc/") == names


def test_overwrite_removes_a_run_from_its_bucket(bucket, toy, tmp_path):
    recipe = toy(f"{bucket.uri}/run", train={"max_steps": 3})
    held = recipe.model_copy(update={"task": "other"})
    bucket.put("run/recipe.yaml", dump_recipe(held))
    for name in ("report.json", "checkpoints/phase0-step0000002/manifest.json", "onnx/model.onnx"):
        bucket.put(f"run/{name}", "{}")
    before = bucket.keys("run/")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert main(["finetune", str(path)]) == 2
    bucket.put("run/mine.txt")
    assert main(["finetune", str(path), "--overwrite"]) == 2
    assert bucket.keys("run/") == {*before, "mine.txt"}
    bucket.delete("run/mine.txt")
    assert main(["finetune", str(path), "--overwrite"]) == 0
    assert json.loads(bucket.get("run/report.json"))["training"]["steps"] == 3
    assert not {name for name in bucket.keys("run/") if "0000002" in name or "onnx" in name}


def test_a_checkpoint_that_cannot_be_sent_and_one_that_is_damaged(
    bucket, elsewhere, toy, monkeypatch
):
    recipe = toy(f"{bucket.uri}/run", train={"epochs": 2, "save_every": 3})
    copy = storage.fs.copy_files

    def broken(source: str, target: str, **more: Any) -> None:
        if "step0000009/optimizer" in target:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode 28")
        copy(source, target, **more)

    with monkeypatch.context() as down:
        down.setattr(storage.fs, "copy_files", broken)
        with pytest.raises(UserError, match="phase0-step0000009 did not get into") as error:
            finetune(recipe, **QUIET)
    assert "the one before, phase0-step0000006, is the last there" in str(error.value)
    assert "start the same command again" in str(error.value)
    assert f"{bucket.uri}/run/checkpoints" in str(error.value)
    bucket.put("run/checkpoints/phase0-step0000006/optimizer.pt", "cut")
    elsewhere()
    told: list[str] = []
    folder = finetune(recipe, tell=told.append)
    assert told[0].startswith("continuing")
    report = json.loads((folder / "report.json").read_text())
    assert any("phase0-step0000006 is damaged" in note for note in report["notes"])
    assert not any("step0000009" in note for note in report["notes"])
    assert report["training"]["steps"] == 12
    names = bucket.keys("run/checkpoints/")
    whole = {name.split("/")[0] for name in names if name.endswith("manifest.json")}
    assert whole == {"phase0-step0000009", "phase0-step0000012"}


def test_predictions_go_to_a_bucket_and_come_from_it(bucket, elsewhere, toy, teacher, tmp_path):
    out = f"{bucket.uri}/said"
    recipe = toy(tmp_path / "run", teacher=str(teacher), kd={"alpha": 0.5}, method="theseus")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    bucket.put("said/mine.txt")
    assert main(["predict-teacher", str(path), "--out", out]) == 2
    bucket.delete("said/mine.txt")
    assert main(["predict-teacher", str(path), "--out", out]) == 0
    assert "meta.json" in bucket.keys("said/")
    shard = next(name for name in bucket.keys("said/") if name.endswith(".arrow"))
    elsewhere()
    told: list[str] = []
    predict_teacher(recipe, out=out, tell=told.append)
    assert "there already" in told[0]
    named = recipe.model_copy(update={"kd": recipe.kd.model_copy(update={"predictions": out})})
    report = json.loads((compress(named, **QUIET) / "report.json").read_text())
    assert report["teacher"] is not None
    bucket.delete(f"said/{shard}")
    elsewhere()
    other = toy(tmp_path / "other", teacher=str(teacher), method="theseus")
    other = other.model_copy(update={"kd": named.kd})
    with pytest.raises(UserError, match=f"predictions in {out} cannot be used: {shard} is missing"):
        compress(other, **QUIET)


def test_a_comparison_lies_in_a_bucket(bucket, elsewhere, toy, tmp_path):
    keys = {"train": {"max_steps": 2}, "finetune": {"max_steps": 2}, "method": "theseus"}
    recipe = toy(f"{bucket.uri}/compare", **keys)
    compare(make_comparison(recipe), **QUIET)
    assert {"report.html", "teacher/report.json", "theseus/report.json"} <= bucket.keys("compare/")
    elsewhere()
    told: list[str] = []
    compare(make_comparison(recipe), tell=told.append)
    assert sum("finished already" in text for text in told) == 2
    place = "compare/theseus/model/README.md"
    assert b"Latency is a median" not in bucket.get(place)
    measure = {"batches": [1], "length": 8, "seconds": 0.05}
    elsewhere()
    compare(make_comparison(toy(f"{bucket.uri}/compare", **keys, measure=measure)), **QUIET)
    assert b"Latency is a median" in bucket.get(place), "the card is sent with the report"
    bucket.put("compare/mine/notes.txt")
    with pytest.raises(UserError, match="holds something that is no run, mine"):
        compare(make_comparison(recipe), **QUIET)


def test_what_stays_on_a_machine_is_refused(bucket, toy, capsys, tmp_path):
    for words in (
        ["demo", "--out", f"{bucket.uri}/demo"],
        ["import-ma-bert", "x", "--model", "y", "--out", f"{bucket.uri}/model"],
        ["evaluate", "x", "--submission", f"{bucket.uri}/answers"],
    ):
        assert main(words) == 2
        assert "keeps this on the machine it runs on" in capsys.readouterr().err
    with pytest.raises(UserError, match="a search cannot keep its trials"):
        make_search(toy(f"{bucket.uri}/search", method="lobert"))
    assert bucket.keys() == set()


@pytest.mark.distributed
@pytest.mark.long
def test_workers_that_share_nothing_but_a_bucket(
    bucket, elsewhere, toy, teacher, tmp_path, chain, monkeypatch
):
    import ray

    push(shutil.copytree(teacher / "model", local(f"{bucket.uri}/teacher")))
    keys = {**chain, "data": {"cache": f"{bucket.uri}/cache"}, "workers": 2}
    keys["train"] = {**chain["train"], "dropout": 0.0, "precision": "fp32", "zero": 1}
    machines = tmp_path / "machines"

    def machine() -> None:
        os.environ["RAYBERT_CACHE"] = str(machines / str(os.getpid()))

    recipe = toy(f"{bucket.uri}/run", teacher=f"{bucket.uri}/teacher", **keys)
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings |= {"RAY_TRAIN_V2_ENABLED": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": machine, "env_vars": settings},
    )
    try:
        folder = compress(recipe, **QUIET)
    finally:
        ray.shutdown()
    used = [path for path in machines.iterdir() if list(path.rglob("raybert.json"))]
    assert len(used) == 3  # one that predicted the only shard, two that trained
    best = list(machines.rglob("phase0-best.safetensors"))
    assert len(best) == 1  # the first worker's: the other read nothing of it
    names = bucket.keys("run/")
    last = find_last_good(next(path.parent for path in best))[0]
    assert last is not None
    assert {f"checkpoints/{last.name}/rng-{rank}.pt" for rank in (0, 1)} <= names
    alone = toy(tmp_path / "alone", teacher=str(teacher), **{**keys, "workers": 1})
    alone = compress(alone, **QUIET)
    assert steps(folder) == steps(alone)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=0.01, atol=1e-3)
