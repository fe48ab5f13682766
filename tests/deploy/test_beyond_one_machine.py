"""KServe's and the Inference Extension's manifests are valid, and what they ask of the server is there."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from backend.container.environment import read_environment
from tests.deploy.helm import PROJECT, one, render
from tests.deploy.manifests import (
    KUBERNETES_VERSIONS,
    Manifest,
    documents,
    pod_specs,
    problems,
    restricted_violations,
)
from tests.triton.calls import post
from tests.triton.live_server import LiveServer, http_get
from tests.triton.metrics import wait_for_metric
from tests.triton.running import PROMPT, running

FILES = sorted((PROJECT / "docker").glob("kserve/*.yaml")) + sorted(
    (PROJECT / "docker").glob("inference-extension/*.yaml")
)


def manifests(folder: str) -> list[Manifest]:
    return [each for path in FILES if path.parent.name == folder for each in documents(path.read_text())]


def picker_config() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(one(manifests("inference-extension"), "ConfigMap")["data"]["config.yaml"])
    return made


def parameters(kind: str) -> dict[str, Any]:
    (plugin,) = [each for each in picker_config()["plugins"] if each["type"] == kind]
    return dict(plugin["parameters"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_are_valid(path: Any) -> None:
    found = documents(path.read_text())
    assert found
    # The picker's gRPC probe exists since 1.27 in its final form; older clusters have it behind a gate.
    assert [each for version in KUBERNETES_VERSIONS[1:] for m in found for each in problems(m, version)] == []
    assert [each for m in found for pod in pod_specs(m) for each in restricted_violations(pod)] == []


def test_the_pool_selects_the_chart_s_pods_and_port() -> None:
    pool = one(manifests("inference-extension"), "InferencePool")["spec"]
    template = one(render(), "Deployment")["spec"]["template"]
    labels = template["metadata"]["labels"] | {"app.kubernetes.io/instance": "nemo"}
    assert pool["selector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert [port["number"] for port in pool["targetPorts"]] == [ports["openai"]]
    service = one(manifests("inference-extension"), "Service")
    assert service["metadata"]["name"] == pool["endpointPickerRef"]["name"]
    assert pool["endpointPickerRef"]["port"]["number"] in [port["port"] for port in service["spec"]["ports"]]
    route = one(manifests("inference-extension"), "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]
    assert (route["kind"], route["name"]) == ("InferencePool", "mistral-nemo")


def test_the_picker_s_profile_names_plugins_that_exist() -> None:
    config = picker_config()
    types = {plugin["type"] for plugin in config["plugins"]}
    assert {each["pluginRef"] for profile in config["schedulingProfiles"] for each in profile["plugins"]} <= types


def test_the_picker_reads_the_load_of_a_live_server(monitored: LiveServer) -> None:
    """What its metrics extractor looks for is on the page it reads: gauges without labels, one sample each."""
    source = parameters("metrics-data-source")
    (engine,) = parameters("core-metrics-extractor")["engineConfigs"]
    assert engine["name"] == parameters("core-metrics-extractor")["defaultEngine"]

    def read() -> dict[str, float]:
        _, body = http_get(monitored.openai_port, source["path"])
        families = {family.name: family for family in text_string_to_metric_families(body.decode())}
        values = {}
        for name, metric in engine.items():
            if name.endswith("Spec") and metric:
                family = families[metric]
                assert family.type == "gauge"
                (sample,) = family.samples
                values[name] = sample.value
        return values

    with running(monitored, max_tokens=500, count=5):
        wait_for_metric(monitored, "gpu_cache_usage_perc", 1e-6)
        busy = read()
    assert busy["runningRequestsSpec"] == 5
    assert busy["queuedRequestsSpec"] == 0
    assert 0 < busy["kvUsageSpec"] <= 1
    assert busy["cacheBlockSizeSpec"] == 64
    assert busy["cacheNumBlocksSpec"] >= 1


def test_kserve_s_runtime_is_what_the_container_understands() -> None:
    runtime = one(manifests("kserve"), "ServingRuntime")["spec"]
    (container,) = runtime["containers"]
    assert container["name"] == "kserve-container"
    variables = {each["name"]: each["value"] for each in container["env"]}
    options = read_environment(variables).options
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    assert (variables["HTTP_PORT"], variables["NIM_SERVER_PORT"]) == (ports["http1"], ports["openai"])
    assert "--openai-port" in options
    service = one(manifests("kserve"), "InferenceService")["spec"]["predictor"]
    assert service["model"]["runtime"] == "nemo-triton"
    assert service["model"]["modelFormat"]["name"] == runtime["supportedModelFormats"][0]["name"]
    delay_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert service["terminationGracePeriodSeconds"] >= delay_s + int(variables["GRACE_S"]) + 20


def test_kserve_s_probes_and_protocol_on_a_live_server(monitored: LiveServer) -> None:
    (container,) = one(manifests("kserve"), "ServingRuntime")["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert http_get(monitored.http_port, container[probe]["httpGet"]["path"])[0] == 200
    status, body = http_get(monitored.http_port, "/v2/models/ensemble")
    assert status == 200
    assert b"text_output" in body
    assert post(monitored, "ensemble/generate", PROMPT | {"max_tokens": 2})[0] == 200


def test_both_scale_on_metrics_that_the_server_has(monitored: LiveServer) -> None:
    queries = [
        metric["external"]["metric"]["query"]
        for metric in one(manifests("kserve"), "InferenceService")["spec"]["predictor"]["autoScaling"]["metrics"]
    ]
    scaled = one(render({"keda": {"enabled": True}}), "ScaledObject")["spec"]["triggers"]
    queries += [trigger["metadata"]["query"] for trigger in scaled]
    hpa = one(render({"autoscaling": {"enabled": True}}), "HorizontalPodAutoscaler")["spec"]["metrics"]
    names = {query.partition("(")[2].partition("{")[0] for query in queries} | {
        m["pods"]["metric"]["name"] for m in hpa
    }
    _, body = http_get(monitored.metrics_port, "/metrics")
    gauges = {family.name for family in text_string_to_metric_families(body.decode()) if family.type == "gauge"}
    assert names == {"num_requests_waiting", "gpu_cache_usage_perc"}
    assert names <= gauges
