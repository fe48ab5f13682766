"""Every profile and a matrix of values renders, by helm 3 and 4 alike, into objects that clusters of several versions accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from backend.container.environment import read_environment
from backend.settings import Settings
from tests.deploy.helm import (
    CHART,
    HELM3,
    PROFILES,
    Values,
    environment,
    one,
    profile,
    render,
    render_with_helm3,
    server_container,
)  # fmt: skip
from tests.deploy.manifests import KUBERNETES_VERSIONS, pod_specs, problems, restricted_violations

HUB = "hf://mistralai/Mistral-Nemo-Instruct-2407"
ROUTE: Values = {
    "enabled": True,
    "parentRefs": [{"name": "gateway", "namespace": "infra"}],
    "hostnames": ["nemo.example.com"],
}
VALUES: dict[str, Values] = {
    "defaults": {},
    "stateful": {"statefulSet": {"enabled": True}, "replicaCount": 3},
    "stateful with a claim": {"statefulSet": {"enabled": True}, "persistence": {"existingClaim": "models"}},
    "existing claim": {
        "persistence": {"existingClaim": "models"},
        "model": {"name": "/models/nemo", "download": False},
    },
    "hostPath": {"persistence": {"enabled": False}, "hostPath": {"enabled": True, "path": "/srv/models"}},
    "nfs": {
        "persistence": {"enabled": False},
        "nfs": {"enabled": True, "server": "nas.example.com", "path": "/models", "readOnly": True},
        "model": {"download": False},
    },
    "no store": {"persistence": {"enabled": False}},
    "secrets": {
        "model": {"hfTokenSecret": "hf", "servedName": "nemo", "maxModelLen": 32768},
        "imagePullSecrets": [{"name": "r"}],
    },
    "tls for gRPC": {
        "openai": {"enabled": False},
        "tls": {"grpc": {"enabled": True, "secretName": "grpc-tls", "clientCaKey": "ca.crt"}},
    },
    "tls for the gateway": {"tls": {"openai": {"enabled": True, "secretName": "openai-tls"}}},
    "no gateway": {"openai": {"enabled": False}},
    "hpa": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 6}},
    "hpa without KV": {"autoscaling": {"enabled": True, "targetKvUsage": 0}},
    "keda": {"keda": {"enabled": True}, "statefulSet": {"enabled": True}},
    "ingress": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
            "tls": [{"secretName": "web", "hosts": ["nemo.example.com"]}],
        }
    },
    "routes": {"httpRoute": ROUTE, "grpcRoute": ROUTE},
    "monitored": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True, "interval": "5s"},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True},
        }
    },
    "load balancer": {
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "metrics": {"podMonitor": {"enabled": True}},
    },
    "scheduling": {
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
        "topologySpread": {"enabled": False},
        "podAnnotations": {"a": "b"},
        "podLabels": {"team": "search"},
    },
    "closed": {
        "networkPolicy": {"from": [{"podSelector": {"matchLabels": {"app": "front"}}}], "extraEgress": [{"to": []}]}
    },
    "bare": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False, "name": "robot"},
        "tests": {"enabled": False},
        "startupProbe": {"enabled": False},
    },
    "extras": {
        "env": [{"name": "EXTRA", "value": "1"}],
        "extraVolumes": [{"name": "more", "configMap": {"name": "more"}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "settings": {"max_num_seqs": 64, "prefix_cache": False, "gpu_memory_fraction": 0.85},
    },
    "names": {"fullnameOverride": "nemo-a", "nameOverride": "nemo"},
}
MATRIX = VALUES | {f"profile {name}": profile(name) for name in PROFILES}

REFUSED: list[tuple[Values, str]] = [
    ({"replicas": 2}, "replicas"),
    ({"model": {"nmae": "x"}}, "nmae"),
    ({"model": {"name": "mistralai/Mistral-Nemo-Instruct-2407"}}, "model.name|/model/name"),
    ({"model": {"logLevel": "TRACE"}}, "logLevel"),
    ({"replicaCount": 0}, "replicaCount"),
    ({"service": {"httpPort": 80}}, "httpPort"),
    ({"settings": {"checkpoint": "/x"}}, "checkpoint"),
    ({"settings": {"max_num_seqs": [1]}}, "max_num_seqs"),
    ({"persistence": {"size": "lots"}}, "size"),
    ({"drain": {"marginSeconds": 5}}, "marginSeconds"),
    ({"networkPolicy": {"metricsFrom": []}}, "metricsFrom"),
    ({"hostPath": {"enabled": True}}, "persistence, hostPath, nfs: enable at most one"),
    ({"persistence": {"enabled": False}, "nfs": {"enabled": True}}, "nfs.server: must be given"),
    (
        {"persistence": {"enabled": False}, "nfs": {"enabled": True, "server": "a", "readOnly": True}},
        "nfs.readOnly: cannot be true while model.download",
    ),
    ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}, "autoscaling.enabled, keda.enabled"),
    ({"keda": {"minReplicas": 9}}, "keda.minReplicas: must be at most maxReplicas = 4, got 9"),
    ({"persistence": {"accessMode": "ReadWriteOncePod"}, "replicaCount": 2}, "ReadWriteOncePod serves one pod"),
    ({"updateStrategy": {"maxSurge": 0}}, "must not both be 0"),
    ({"tls": {"grpc": {"enabled": True}}, "openai": {"enabled": False}}, "tls.grpc.secretName: must name a Secret"),
    (
        {"tls": {"grpc": {"enabled": True, "secretName": "x"}}},
        "tls.grpc.enabled: the OpenAI gateway speaks gRPC without TLS",
    ),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: must name a Gateway"),
    ({"openai": {"enabled": False}, "httpRoute": ROUTE}, "httpRoute.enabled: leads to the OpenAI gateway"),
    ({"openai": {"enabled": False}, "ingress": {"enabled": True}}, "a path leads to port openai"),
    ({"service": {"httpPort": 8001}}, "must differ"),
    (
        {"service": {"type": "NodePort"}, "metrics": {"serviceMonitor": {"enabled": True}}},
        "use metrics.podMonitor",
    ),
]
needs_helm3 = pytest.mark.skipif(not HELM3.exists(), reason="no helm 3 (npm) in .venv/tools: run `make tools`")


def sorted_objects(manifests: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(each, sort_keys=True) for each in manifests)


@pytest.mark.parametrize("name", MATRIX)
def test_objects_are_valid_in_every_version(name: str) -> None:
    manifests = render(MATRIX[name])  # for a new version, so the oldest is tried with helm 3 below
    assert [each for version in KUBERNETES_VERSIONS[1:] for m in manifests for each in problems(m, version)] == []
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", MATRIX)
@needs_helm3
def test_helm_3_renders_the_same(name: str, tmp_path: Path) -> None:
    assert sorted_objects(render_with_helm3(MATRIX[name], tmp_path)) == sorted_objects(render(MATRIX[name]))


@needs_helm3
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_rendered_for_its_version_it_is_valid_there(version: str, tmp_path: Path) -> None:
    for values in (MATRIX["monitored"], MATRIX["profile replicas"]):
        manifests = render_with_helm3(values, tmp_path, f"{version}.0")
        assert [each for m in manifests for each in problems(m, version)] == []


@needs_helm3
def test_too_old_clusters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"incompatible with Kubernetes"):
        render_with_helm3({}, tmp_path, "1.24.0")


@pytest.mark.parametrize("name", ["defaults", *(f"profile {name}" for name in PROFILES)])
def test_lint(name: str) -> None:
    report = helm_python.lint(CHART, MATRIX[name], strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_wrong_values_are_refused_by_name(values: Values, words: str) -> None:
    with pytest.raises(helm_python.HelmError) as refused:
        render(values)
    assert any(each in str(refused.value) for each in words.split("|"))


@needs_helm3
@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_helm_3_refuses_them_too(values: Values, words: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as refused:
        render_with_helm3(values, tmp_path)
    assert any(each in str(refused.value) for each in words.split("|"))


@pytest.mark.parametrize("name", MATRIX.keys() - {"hostPath", "nfs"})
def test_pods_satisfy_restricted_pod_security(name: str) -> None:
    manifests = render(MATRIX[name])
    pods = [pod for m in manifests for pod in pod_specs(m)]
    assert pods
    assert [each for pod in pods for each in restricted_violations(pod)] == []
    assert all(pod["automountServiceAccountToken"] is False for pod in pods)


def test_volumes_that_restricted_pod_security_forbids_are_seen() -> None:
    for name in ("hostPath", "nfs"):
        pods = [pod for m in render(MATRIX[name]) for pod in pod_specs(m)]
        assert f"volume models is of type {name}" in [each for pod in pods for each in restricted_violations(pod)]


def test_schema_names_every_value() -> None:
    """Each key of values.yaml is in the schema, and the schema has no key that values.yaml lacks."""

    def compare(values: Any, schema: dict[str, Any], path: str) -> None:
        if schema.get("additionalProperties") is False and isinstance(values, dict):
            assert set(values) == set(schema["properties"]) - {"global"}, path
            for key, value in values.items():
                compare(value, schema["properties"][key], f"{path}.{key}")

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["additionalProperties"] is False
    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")


@pytest.mark.parametrize("name", MATRIX)
def test_settings_are_accepted_by_the_server(name: str) -> None:
    """What the chart passes as NEMO_* are settings that exist, with values in range."""
    variables = environment(server_container(render(MATRIX[name])))
    read_environment(variables)
    own = {key: value for key, value in variables.items() if key.startswith("NEMO_")}
    assert len(own) == len(MATRIX[name].get("settings", {}))
    Settings.load({}, own | {"NEMO_CHECKPOINT": "/models/x"})


@pytest.mark.parametrize("name", MATRIX)
def test_probes_ask_ports_and_paths_that_exist(name: str) -> None:
    container = server_container(render(MATRIX[name]))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    variables = environment(container)
    assert {ports["http"], ports["grpc"], ports["metrics"]} == {
        int(variables[key]) for key in ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    }
    assert ports.get("openai", 0) == int(variables["NIM_SERVER_PORT"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            assert container[probe]["httpGet"]["port"] == "http"
            assert container[probe]["httpGet"]["path"] in ("/v2/models/ensemble/ready", "/v2/health/live")


@pytest.mark.parametrize("name", MATRIX)
def test_the_grace_period_holds_delay_drain_and_margin(name: str) -> None:
    manifests = render(MATRIX[name])
    (workload,) = [m for m in manifests if m["kind"] in ("Deployment", "StatefulSet")]
    container = server_container(manifests)
    delay_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace_s = int(environment(container)["GRACE_S"])
    assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= delay_s + grace_s + 20


def test_no_secret_is_in_the_objects() -> None:
    """Tokens come by reference: there is no value that would take one."""
    manifests = render(MATRIX["secrets"] | MATRIX["tls for the gateway"])
    (download,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["initContainers"]
    (token,) = [each for each in download["env"] if each["name"] == "HF_TOKEN"]
    assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "HF_TOKEN"}}}
    assert "HF_TOKEN" not in json.dumps(server_container(manifests))
    assert not any(m["kind"] == "Secret" for m in manifests)


def test_what_scales_has_no_fixed_number_of_replicas() -> None:
    for name in ("hpa", "keda"):
        (workload,) = [m for m in render(MATRIX[name]) if m["kind"] in ("Deployment", "StatefulSet")]
        assert "replicas" not in workload["spec"]
    hpa = one(render(MATRIX["hpa"]), "HorizontalPodAutoscaler")
    assert [m["pods"]["metric"]["name"] for m in hpa["spec"]["metrics"]] == [
        "num_requests_waiting",
        "gpu_cache_usage_perc",
    ]
    assert hpa["spec"]["metrics"][1]["pods"]["target"]["averageValue"] == "850m"
    scaled = one(render(MATRIX["keda"]), "ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    selector = '{namespace="inference",pod=~"release-mistral-nemo-.*"}'
    assert queries == [f"sum(num_requests_waiting{selector})", f"sum(gpu_cache_usage_perc{selector})"]


def test_without_gpu_none_is_asked_for() -> None:
    assert "nvidia.com/gpu" not in json.dumps(render(MATRIX["profile cpu-demo"]))
    assert server_container(render())["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_only_downloads_may_leave_the_pod() -> None:
    def egress_ports(values: Values) -> set[int]:
        policy = one(render(values), "NetworkPolicy")
        return {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}

    assert egress_ports({}) == {53, 443}
    assert egress_ports({"model": {"download": False}}) == {53}


def test_unknown_kinds_and_fields_are_found() -> None:
    """The validators can fail."""
    deployment = one(render(), "Deployment")
    assert problems(deployment | {"kind": "Deploiment"}, "1.31") != []
    assert problems(deployment | {"spec": deployment["spec"] | {"replica": 1}}, "1.31") != []
    monitor = one(render(MATRIX["monitored"]), "ServiceMonitor")
    assert problems(monitor | {"apiVersion": "monitoring.coreos.com/v9"}, "1.31") != []
    assert problems(monitor | {"spec": monitor["spec"] | {"endpoint": []}}, "1.31") != []
