"""Checks Kubernetes objects against the schemas of Kubernetes and of the custom resources in use; unknown kinds are errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

CRDS = Path(__file__).parent / "crds"
KUBERNETES_VERSIONS = ("1.25", "1.28", "1.31", "1.34", "1.37")
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    """The objects of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document]


def problems(manifest: Manifest, version: str) -> list[str]:
    """What is wrong with an object for a cluster of this Kubernetes version; empty when nothing is."""
    api_version, kind = manifest.get("apiVersion", ""), manifest.get("kind", "")
    where = f"{kind}/{manifest.get('metadata', {}).get('name')} ({version})"
    schema = crd_schema(api_version, kind)
    if schema is not None:
        errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
        found = [f"{where}: {'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
        return found + [each for pod in embedded_pods(manifest) for each in problems(pod, version)]
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{where}: unknown kind {kind} of {api_version}"]
    except kubernetes_validate.ValidationError as error:
        return [f"{where}: {'/'.join(map(str, error.path))}: {error.message}"]
    return []


@cache
def crd_schema(api_version: str, kind: str) -> dict[str, Any] | None:
    """The schema of a custom resource, or None when there is none of that name."""
    path = CRDS / f"{kind}.json"
    if not path.exists():
        return None
    definition = json.loads(path.read_text())
    group, _, version = api_version.rpartition("/")
    schema: dict[str, Any] | None = definition["versions"].get(version) if group == definition["group"] else None
    return schema


def embedded_pods(manifest: Manifest) -> list[Manifest]:
    """The pods inside a custom resource (KServe's), as pods of their own, so that Kubernetes' schema judges them."""
    spec = manifest["spec"]
    found = [{"containers": spec["containers"], "volumes": spec.get("volumes", [])}] if "containers" in spec else []
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "embedded"}, "spec": pod} for pod in found]


def pod_specs(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The specs of the pods that an object makes."""
    if manifest["kind"] == "Pod":
        yield manifest["spec"]
    elif manifest["kind"] in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
        yield manifest["spec"]["template"]["spec"]
    elif manifest["kind"] == "ServingRuntime":
        yield manifest["spec"]


def restricted_violations(pod: dict[str, Any]) -> list[str]:
    """What the profile `restricted` of the Pod Security Standards forbids (kubernetes.io/docs/concepts/security), and a
    root file system that can be written to."""
    found = [f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for volume in pod.get("volumes", []):
        found += [
            f"volume {volume['name']} is of type {kind}" for kind in volume.keys() - {"name"} - RESTRICTED_VOLUMES
        ]
    shared = pod.get("securityContext", {})
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        own = container.get("securityContext", {})
        both = shared | own
        wanted = {
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "runAsUser": both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities": own.get("capabilities", {}) == {"drop": ["ALL"]},
            "privileged": not own.get("privileged"),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
        }
        found += [f"{container['name']}: {name}" for name, is_right in wanted.items() if not is_right]
    return found
