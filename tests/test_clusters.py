"""The cluster files: what Ray and KubeRay themselves accept, and what safety asks for."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raybert import __version__
from raybert.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "clusters"
CLOUDS = ("aws", "gcp", "azure")
LAUNCHED = (*CLOUDS, "on-premises")
MANIFESTS = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}
WHEEL = f"raybert-{__version__}-py3-none-any.whl"
STORAGE = "/mnt/raybert"


def launched(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


def manifest(kind: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "kuberay" / MANIFESTS[kind]).read_text())


def cluster_spec(kind: str) -> dict[str, Any]:
    spec = manifest(kind)["spec"]
    return spec["rayClusterSpec"] if kind == "RayJob" else spec


def pods(kind: str) -> list[dict[str, Any]]:
    """The templates of Ray's own pods, the head's first."""
    spec = cluster_spec(kind)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.fixture(scope="module")
def crds(shared_data: Path) -> dict[str, dict[str, Any]]:
    """The operator's own schema of each kind, made strict: what it does not know it refuses."""
    schemas = {}
    for kind in MANIFESTS:
        text = (shared_data / "kuberay" / f"{kind.lower()}s.crd.yaml").read_text()
        definition = yaml.load(text, yaml.CSafeLoader)
        served = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
        schemas[kind] = strict(served["schema"]["openAPIV3Schema"])
    return schemas


def strict(schema: Any) -> Any:
    """A Kubernetes schema as JSON Schema that refuses unknown fields, as `kubectl` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(part) for name, part in value.items()}
        if key == "properties"
        else strict(value)
        for key, value in schema.items()
    }
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


# -- Ray's cluster launcher ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_launcher_file(name):
    config = prepare_config(launched(name))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**copy.deepcopy(config), "idle_timeout_minute": 5})


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launched_cluster_asks_for_the_token_and_keeps_its_dashboard_to_itself(name):
    config = launched(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in (CLUSTERS / f"{name}.yaml").read_text()
    if name in CLOUDS:
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    else:
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            assert "RAY_AUTH_MODE=token" in " ".join(config[commands])


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launched_cluster_installs_this_wheel_with_the_versions_tested(name):
    config = launched(name)
    assert config["file_mounts"][f"~/raybert/{WHEEL}"] == f"dist/{WHEEL}"
    constraints = config["file_mounts"]["~/raybert/constraints.txt"]
    assert f"ray=={ray.__version__}" in (ROOT / constraints).read_text().split()
    setup = " ".join(config["setup_commands"])
    assert f"-c ~/raybert/constraints.txt ~/raybert/{WHEEL}" in setup
    if name in CLOUDS:
        images = [config["docker"]["head_image"], config["docker"]["worker_image"]]
        assert all(image.startswith(f"rayproject/ray:{ray.__version__}-") for image in images)


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launched_cluster_keeps_runs_on_storage_that_all_see_and_returns_what_idles(name):
    config = launched(name)
    text = (CLUSTERS / f"{name}.yaml").read_text()
    assert f"RAYBERT_CACHE={STORAGE}/cache" in text
    assert STORAGE in " ".join(config["initialization_commands"])
    assert 0 < config["idle_timeout_minutes"] <= 30
    types = prepare_config(config)["available_node_types"]
    workers = {k: v for k, v in types.items() if k != config.get("head_node_type")}
    if name in CLOUDS:
        assert all(kind["min_workers"] == 0 for kind in workers.values())


def test_machines_on_premises_are_all_kept_up():
    # Ray's autoscaler takes one that is down to have no CPU, and never starts it on demand.
    config = launched("on-premises")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize(
    ("name", "spot"),
    [("aws", "InstanceMarketOptions"), ("gcp", "preemptible"), ("azure", "Spot")],
)
def test_workers_are_spot_machines_with_gpus_and_the_head_is_on_demand(name, spot):
    types = launched(name)["available_node_types"]
    assert spot not in str(types["head"])
    assert types["head"]["resources"] == {"CPU": 0}
    assert spot in str(types["gpu_worker"])
    assert types["gpu_worker"]["resources"]["GPU"] == 1
    assert types["gpu_worker"]["max_workers"] == launched(name)["max_workers"]


def test_ssh_alone_comes_in_on_aws_and_not_from_everywhere():
    rules = launched("aws")["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    assert all(net["CidrIp"] != "0.0.0.0/0" for rule in rules for net in rule["IpRanges"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_no_command_has_a_comment_that_would_swallow_what_ray_appends(name):
    config = launched(name)
    commands = [c for key, part in config.items() if key.endswith("commands") for c in part]
    assert len(commands) > 5
    assert not [c for c in commands if "#" in c]


# -- Kubernetes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_operators_schema_accepts_the_manifest(kind, crds):
    body = manifest(kind)
    validator = jsonschema.Draft202012Validator(crds[kind])
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(body)] == []
    body["spec"]["imagePullPolicies"] = "Always"
    assert [e.validator for e in validator.iter_errors(body)] == ["additionalProperties"]


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_kubernetes_cluster_asks_for_the_token_and_is_closed(kind):
    spec = cluster_spec(kind)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__
    head = spec["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert "enableIngress" not in head
    # Where the operator must reach the dashboard, the network policy lets nobody else do so.
    wanted = {"RayCluster": "127.0.0.1", "RayJob": "0.0.0.0"}
    assert head["rayStartParams"]["dashboard-host"] == wanted[kind]
    for group in (head, *spec["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == {"app": "raybert"}
    for pod in pods(kind):
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_kubernetes_cluster_has_storage_gpus_and_returns_what_idles(kind):
    spec = cluster_spec(kind)
    assert spec["enableInTreeAutoscaling"]
    assert 0 < spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 1800
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    for pod in pods(kind):
        (container,) = pod["containers"]
        assert container["image"].endswith(f":{__version__}")
        assert {"name": "raybert", "mountPath": STORAGE} in container["volumeMounts"]
        assert {"name": "RAYBERT_CACHE", "value": f"{STORAGE}/cache"} in container["env"]
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "raybert"}


def test_the_kubernetes_storage_is_shared_and_its_fence_lets_in_the_cluster_and_the_operator():
    text = (CLUSTERS / "kuberay" / "storage.yaml").read_text()
    claim, policy = yaml.safe_load_all(text)
    assert claim["metadata"]["name"] == "raybert"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app": "raybert"}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    own, operator = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": {"app": "raybert"}}}]}
    assert operator["ports"] == [{"port": 8265}]


def test_the_jobs_command_is_one():
    words = manifest("RayJob")["spec"]["entrypoint"].split()
    assert words[:2] == ["raybert", "compress"]
    recipe = load_recipe(words[2], words[3:])
    assert recipe.resources.gpu
    assert recipe.resources.wait > 0
    assert recipe.folder.is_relative_to(STORAGE)


def test_the_image_holds_this_wheel_on_the_ray_that_was_tested():
    text = (CLUSTERS / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray.__version__}-py311-gpu" in text
    assert f"-c /tmp/raybert/constraints.txt \\\n    /tmp/raybert/{WHEEL}" in text
    copied = re.findall(r"^COPY \S+ (.*) \S+$", text, re.MULTILINE)
    assert copied == [f"dist/{WHEEL} tests/constraints.txt"]
