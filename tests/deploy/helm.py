"""Renders the chart with real helms: version 4 as a library, version 3 as the command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import helm_python
import yaml

from tests.deploy.manifests import Manifest, documents

PROJECT = Path(__file__).resolve().parents[2]
CHART = PROJECT / "docker" / "helm" / "mistral-nemo"
PROFILES = sorted(path.stem for path in (CHART / "profiles").glob("*.yaml"))
TOOLS = PROJECT / ".venv" / "tools" / "bin"
HELM3 = TOOLS / "helm"
RELEASE, NAMESPACE = "release", "inference"
Values = dict[str, Any]


def profile(name: str) -> Values:
    """The values of one of the chart's profiles."""
    values: Values = yaml.safe_load((CHART / "profiles" / f"{name}.yaml").read_text())
    return values


def render(values: Values | None = None) -> list[Manifest]:
    """The chart's objects by helm 4; `helm_python.HelmError` when it refuses the values."""
    with helm_python.Chart.load(CHART) as chart:
        values = values or {}
        chart.validate_schema(chart.merge_values(values))
        texts = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    return [each for path, text in sorted(texts.items()) if path.endswith(".yaml") for each in documents(text)]


def render_with_helm3(values: Values, folder: Path, kube_version: str = "1.31.0") -> list[Manifest]:
    """The same by helm 3; RuntimeError with its words when it refuses."""
    path = folder / "values.yaml"
    path.write_text(json.dumps(values))
    command: list[str | Path] = [
        HELM3,
        "template",
        RELEASE,
        CHART,
        "--namespace",
        NAMESPACE,
        "--values",
        path,
        "--kube-version",
        kube_version,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return documents(done.stdout)


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only object of a kind (and name)."""
    (found,) = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return found


def server_container(manifests: list[Manifest]) -> dict[str, Any]:
    """The container of the server in the workload."""
    (workload,) = [m for m in manifests if m["kind"] in ("Deployment", "StatefulSet")]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert container["name"] == "server"
    return dict(container)


def environment(container: dict[str, Any]) -> dict[str, str]:
    """A container's plain environment variables."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}
