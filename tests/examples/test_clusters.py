"""The files for Kubernetes and Ray: they are YAML, fit together, and their commands are understood."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from acestep_jax import cli
from tests.imports import ROOT

pytestmark = pytest.mark.unit
EXAMPLES = ROOT / "examples"


def documents(path: Path):
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def options(command):
    """Return what the program reads of a command in a file."""
    words = shlex.split(re.sub(r"\$\w+", "1", command))
    return cli.parser().parse_args(words[next(i for i, w in enumerate(words) if w.endswith("acestep-jax")) + 1 :]).serve


def test_every_yaml_file_can_be_read():
    files = sorted(EXAMPLES.rglob("*.y*ml"))
    assert len(files) >= 2 and all(documents(path) for path in files)


def test_a_leader_worker_set():
    group, service = documents(EXAMPLES / "kubernetes/slice.yaml")
    assert (group["apiVersion"], group["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart" and template["size"] == 2
    pods = [template[name]["spec"] for name in ("leaderTemplate", "workerTemplate")]
    leader, worker = ([container] for container in (pods[0]["containers"][0], pods[1]["containers"][0]))
    (leads,), (follows,) = ([options(container["args"][0])] for (container,) in (leader, worker))
    for name in ("mesh", "checkpoint", "dtype", "lora", "distributed"):  # what must be the same everywhere
        assert leads[name] == follows[name], name
    assert "$LWS_LEADER_ADDRESS:8476,$LWS_GROUP_SIZE,$LWS_WORKER_INDEX" in leader[0]["args"][0]
    chips = int(leader[0]["resources"]["limits"]["google.com/tpu"]) * template["size"]
    sizes = dict(part.split("=") for part in leads.mesh.split(","))
    assert chips == int(sizes["data"]) * int(sizes["tensor"])
    assert pods[0]["nodeSelector"] == pods[1]["nodeSelector"]
    for pod in pods:
        claimed = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == claimed
        assert pod["terminationGracePeriodSeconds"] > leads.grace
    assert leader[0]["startupProbe"]["httpGet"] == {"path": "/ready", "port": leads.port}
    assert service["spec"]["ports"][0]["targetPort"] == leads.port == leader[0]["ports"][0]["containerPort"]
    assert service["spec"]["selector"]["role"] == template["leaderTemplate"]["metadata"]["labels"]["role"]
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/name"] == group["metadata"]["name"]
    assert service["metadata"]["name"] in leads.public_host


def test_a_ray_cluster():
    (cluster,) = documents(EXAMPLES / "ray/cluster.yaml")
    workers = cluster["provider"]["worker_ips"]
    assert cluster["provider"]["type"] == "local" and cluster["max_workers"] == cluster["min_workers"] == len(workers)
    assert any("acestep-jax[serve,ray," in command for command in cluster["setup_commands"])
    starts = [cluster[f"{name}_start_ray_commands"][-1] for name in ("head", "worker")]
    assert "ray start --head" in starts[0] and "$RAY_HEAD_IP:6379" in starts[1]
    assert all("RAY_AUTH_MODE=token" in start for start in starts) and "~/.ray/auth_token" in cluster["file_mounts"]
    text = (EXAMPLES / "ray/cluster.yaml").read_text(encoding="utf-8")
    (command,) = re.findall(r"ray exec \S+ '(.*?)'", text.replace("\n#", ""), re.DOTALL)
    serves = options(command)
    assert serves.replicas == len(workers) + 1 and serves.replica_resources == "GPU=1" and serves.host == "0.0.0.0"
