"""The cluster files: accepted by Ray's own schema, large enough for their experiment, at the versions of the lock file."""

import copy
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "clusters"
LAUNCHERS = ["aws.yaml", "gcp.yaml"]

# Fields of the ray.io/v1 API, and the few of Kubernetes' own in use; from KubeRay's API reference, version 1.6.
FIELDS = {
    "RayJob": "apiVersion kind metadata spec",
    "RayJobSpec": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
    "submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources "
    "entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend",
    "RayClusterSpec": "authOptions suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs",
    "AuthOptions": "mode secretName enableK8sTokenAuth",
    "HeadGroupSpec": "template headService enableIngress rayStartParams serviceType",
    "PodTemplateSpec": "metadata spec",
    "PodSpec": "containers volumes nodeSelector tolerations",
    "Container": "name image env ports resources volumeMounts",
    "Volume": "name persistentVolumeClaim emptyDir",
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / name).read_text())


@cache
def experiment_gpus() -> float:
    return runpy.run_path(str(ROOT / "experiments" / "minillm_llama13b.py"))["EXPERIMENT"].gpus()


def found(pattern: str, file: Path) -> str:
    match = re.search(pattern, file.read_text(), re.MULTILINE)
    assert match, f"{file.name} holds no {pattern}"
    return match[1]


def locked(package: str) -> str:
    return found(rf"^{package}==(\S+)", ROOT / "requirements" / "gpu.lock")


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return load("kuberay-rayjob.yaml")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_accepts_the_file(name: str):
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_refuses_the_file_with_a_misspelt_field(name: str):
    config = load(name)
    config["file_mount"] = config.pop("file_mounts")
    with pytest.raises(jsonschema.ValidationError, match="file_mount"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_nodes_that_always_run_have_the_gpus_the_experiment_asks_for(name: str):
    config = prepare_config(load(name))
    head = config["head_node_type"]
    types = config["available_node_types"]
    started = {kind: 1 if kind == head else types[kind]["min_workers"] for kind in types}
    assert sum(count * types[kind]["resources"]["GPU"] for kind, count in started.items()) >= experiment_gpus()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_nodes_install_by_the_recipe_of_the_repository(name: str):
    config = prepare_config(load(name))
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert "cd ~/raykd && make install DEVICE=gpu" in commands
    assert config["file_mounts"]["/home/ubuntu/raykd"] == "."
    assert not any("pip install ray" in command or "ray[" in command for command in config["head_setup_commands"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_token_reaches_the_nodes_and_authentication_is_on(name: str):
    config = load(name)
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert not any("RAY_AUTH_MODE=disabled" in str(value) for value in config.values())
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])


@pytest.mark.parametrize("path", sorted(CLUSTERS.iterdir()), ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path: Path):
    text = path.read_text()
    named = set(re.findall(r"\b(?:experiments|clusters|requirements|tools)/[\w./-]+\.\w+", text))
    missing = [name for name in named if not (ROOT / name.removeprefix("opt/raykd/")).is_file()]
    beside = [name for name in re.findall(r"`([\w-]+\.yaml)`", text) if not (CLUSTERS / name).is_file()]
    assert missing + beside == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]{2,})", text)) <= targets


def unknown_fields(job: dict[str, Any]) -> list[str]:
    """Fields of a RayJob that the API does not have."""
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    pod = head["template"]["spec"]
    parts = [("RayJob", job), ("RayJobSpec", job["spec"]), ("RayClusterSpec", cluster), ("AuthOptions", cluster["authOptions"])]
    parts += [("HeadGroupSpec", head), ("PodTemplateSpec", head["template"]), ("PodSpec", pod)]
    parts += [("Container", part) for part in pod["containers"]] + [("Volume", part) for part in pod["volumes"]]
    return [f"{kind}.{field}" for kind, part in parts for field in part if field not in FIELDS[kind].split()]


def test_the_rayjob_has_only_fields_of_the_api(job: dict[str, Any]):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert unknown_fields(job) == []
    misspelt = copy.deepcopy(job)
    misspelt["spec"]["entryPoint"] = misspelt["spec"].pop("entrypoint")
    assert unknown_fields(misspelt) == ["RayJobSpec.entryPoint"]


def test_the_rayjob_has_the_gpus_the_experiment_asks_for_and_the_locked_ray(job: dict[str, Any]):
    cluster = job["spec"]["rayClusterSpec"]
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= experiment_gpus()
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert cluster["rayVersion"] == locked("ray")
    assert cluster["authOptions"]["mode"] == "token"
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())


def test_the_rayjob_runs_a_file_of_the_image_and_writes_to_the_volume(job: dict[str, Any]):
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {"storage": load("kuberay-volume.yaml")["metadata"]["name"]}
    _, script, option, runs, *again = job["spec"]["entrypoint"].split()
    workdir = found(r"^WORKDIR (\S+)", CLUSTERS / "Dockerfile")
    assert (ROOT / Path(script).relative_to(workdir)).is_file()
    assert option == "--runs" and runs.startswith(mounts["storage"])
    assert job["spec"]["backoffLimit"] and again == ["--resume", "auto"], "what is started again goes on"
