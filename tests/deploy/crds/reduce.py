"""Reduces a CustomResourceDefinition to what a validator needs: `python -m tests.deploy.crds.reduce crd.yaml SOURCE > Kind.json`.

Descriptions, status and Kubernetes' validation rules in CEL are left out, and so is what embeds a whole pod: those parts are
validated against Kubernetes' own schemas (tests/deploy/manifests.py). Objects refuse keys that the definition does not have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = (
    "type",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "format",
    "required",
)
POD_PARTS = {
    "affinity", "containers", "ephemeralContainers", "initContainers", "resources", "securityContext", "tolerations",
    "topologySpreadConstraints", "volumes", "worker", "workerSpec",
}  # fmt: skip
# KServe's way to name a framework, each with a container's fields once more; this project names a runtime instead.
FRAMEWORKS = {
    "explainer", "huggingface", "lightgbm", "logger", "onnx", "paddle", "pmml", "pytorch", "sklearn", "tensorflow", "transformer",
    "triton", "xgboost",
}  # fmt: skip


def reduce_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema with nothing but its constraints."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    reduced: dict[str, Any] = {key: schema[key] for key in KEPT if key in schema}
    if reduced.get("format") in ("int32", "int64"):
        del reduced["format"]
    if "properties" in schema:
        reduced["properties"] = {
            name: {"type": value.get("type", "object")} if name in POD_PARTS | FRAMEWORKS else reduce_schema(value)
            for name, value in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            reduced["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        reduced["additionalProperties"] = reduce_schema(schema["additionalProperties"])
    if "items" in schema:
        reduced["items"] = reduce_schema(schema["items"])
    return reduced


def reduce_definition(definition: dict[str, Any], source: str) -> dict[str, Any]:
    """Every served version of a definition: `{"kind", "group", "source", "versions": {name: schema}}`."""
    spec = definition["spec"]
    versions = {}
    for version in spec["versions"]:
        if not version["served"]:
            continue
        schema = reduce_schema(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schema["properties"].pop("status", None)
        schema["required"] = sorted({*schema.get("required", ()), "metadata"} - {"status"})
        versions[version["name"]] = schema
    return {"kind": spec["names"]["kind"], "group": spec["group"], "source": source, "versions": versions}


if __name__ == "__main__":
    print(json.dumps(reduce_definition(yaml.safe_load(Path(sys.argv[1]).read_text()), sys.argv[2])))
