"""The queries of dashboard and rules, as a Prometheus on this machine can be asked them."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.deploy.helm import CHART, PROJECT

RULES_TEST = PROJECT / "docker" / "prometheus" / "rules_test.yaml"
RULES = CHART / "files" / "rules.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
_WINDOW_S = 30


def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return made


def panel_queries() -> dict[str, str]:
    """Every query of every panel, with its variables filled in."""
    queries = {}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", f"{_WINDOW_S}s").replace("$job", "mistral-nemo")
            queries[f"{panel['title']} {target['refId']}"] = text.replace("$instance", ".*")
    return queries


def rules(kind: str) -> dict[str, str]:
    """The expressions of all rules of a kind, `record` or `alert`, by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule[kind]: rule["expr"] for group in groups for rule in group["rules"] if kind in rule}


def metric_names(expression: str) -> set[str]:
    """The metrics an expression reads."""
    return set(re.findall(r"\b([a-z_][\w:]*)\{", expression)) | set(re.findall(r"\b(nemo:[\w:]+)", expression))
