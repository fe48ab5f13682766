"""Rules, dashboard, compose and Prometheus' configuration by themselves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.helm import PROJECT, one, render
from tests.deploy.prometheus import CONFIGURATION, PROMTOOL
from tests.deploy.promql import RULES, RULES_TEST, dashboard, panel_queries, rules

needs_promtool = pytest.mark.skipif(not PROMTOOL.exists(), reason="no promtool in .venv/tools: run `make tools`")


def promtool(*arguments: str) -> str:
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_rules_are_valid_and_pass_their_tests() -> None:
    assert "17 rules found" in promtool("check", "rules", str(RULES))
    promtool("test", "rules", str(RULES_TEST))


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    fired = set()
    for test in yaml.safe_load(RULES_TEST.read_text())["tests"]:
        for each in test["alert_rule_test"]:
            if each["exp_alerts"]:
                fired.add(each["alertname"])
    assert fired == set(rules("alert"))


@needs_promtool
def test_every_panel_s_query_is_promql(tmp_path: Path) -> None:
    queries = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(panel_queries().values())]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": queries}]}))
    promtool("check", "rules", str(path))


def test_dashboard_is_what_grafana_reads() -> None:
    made = dashboard()
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {each["name"] for each in made["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    for panel in made["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= 24 - place["w"]
        if panel["type"] != "row":
            assert panel["targets"]
            assert {target["refId"] for target in panel["targets"]}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in made["panels"]]
    assert len(set(places)) == len(places)


def test_the_chart_ships_the_same_rules_and_dashboard() -> None:
    monitoring = {"metrics": {"prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}}}
    manifests = render(monitoring)
    assert one(manifests, "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())
    shipped = one(manifests, "ConfigMap")["data"]["mistral-nemo.json"]
    assert json.loads(shipped) == dashboard()
    renamed = one(render(monitoring | {"nameOverride": "other"}), "PrometheusRule")
    assert 'job="mistral-nemo"' not in json.dumps(renamed)
    assert 'job=\\"other\\"' in json.dumps(renamed)


@needs_promtool
def test_configuration_of_prometheus(tmp_path: Path) -> None:
    path = tmp_path / "prometheus.yaml"
    path.write_text(CONFIGURATION.read_text().replace("/etc/prometheus/rules.yaml", str(RULES)))
    promtool("check", "config", str(path))


def test_compose_mounts_files_that_exist_and_keeps_to_this_machine() -> None:
    compose = yaml.safe_load((PROJECT / "docker" / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service["volumes"]:
            if volume.startswith("."):
                assert (PROJECT / "docker" / volume.split(":")[0]).is_file(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "latest" not in service["image"]
    server = compose["services"]["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert int(server["environment"]["GRACE_S"]) + 20 <= int(server["stop_grace_period"].removesuffix("s"))
