"""The list of features is whole, its tests exist, and the table says what list and record say."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from backend.settings import Settings
from client.gateway import generation_routes, page_routes, service_routes, text_routes
from client.gateway.chat_request import ChatRequest
from client.gateway.completion_request import CompletionRequest
from tests.conformance.features import Feature, problems, read_features
from tests.conformance.record import Outcome, outcome_of, read_record, write_record
from tests.conformance.table import README, answer, table, written
from tests.triton_stub import MetricFamily, triton_stub

TEST = "conformance/test_conformance.py::test_every_row_has_a_test_that_exists"
FEATURE = Feature("Section", "name", (TEST,))
PASSED = Outcome("passed", 1, "2026-01-01", "abc1234")


def names(section: str) -> set[str]:
    return {feature.name for feature in read_features() if feature.section == section}


def test_every_row_has_a_test_that_exists() -> None:
    assert problems(read_features()) == []


def test_rows_without_a_test_are_found(tmp_path: Path) -> None:
    path = tmp_path / "features.toml"
    path.write_text(
        f'[Section]\n"none" = []\n"gone" = ["conformance/test_conformance.py::test_gone", "{TEST}"]\n'
        f'"no file" = ["conformance/test_none.py::test_x"]\n"not kept" = {{ no = "why", tests = [] }}\n"good" = ["{TEST}"]\n'
    )
    features = read_features(path)
    assert problems(features) == [
        "Section / none: names no test",
        "Section / gone: there is no conformance/test_conformance.py::test_gone",
        "Section / no file: there is no conformance/test_none.py::test_x",
    ]
    assert problems([FEATURE, FEATURE]) == ["Section / name: stands twice"]
    assert features[3].reason == "why"


def test_the_table_is_what_list_and_record_say() -> None:
    text = README.read_text()
    assert written(text, read_features(), read_record()) == text, "run `python -m tests.conformance --missing`"


def test_what_is_not_recorded_as_passed_is_no_yes(tmp_path: Path) -> None:
    assert answer(FEATURE, {TEST: PASSED}) == "yes"
    assert answer(FEATURE, {}) == "no: test_every_row_has_a_test_that_exists was not run"
    for outcome in ("failed", "skipped"):
        record = {TEST: dataclasses.replace(PASSED, outcome=outcome)}
        assert answer(FEATURE, record) == f"no: test_every_row_has_a_test_that_exists {outcome}"
    assert answer(dataclasses.replace(FEATURE, reason="why"), {TEST: PASSED}) == "no: why"
    assert outcome_of(["passed", "failed", "skipped"]) == "failed"
    assert outcome_of(["passed", "skipped"]) == "skipped"
    assert "Recorded on 2026-01-01 at commit abc1234: 1 tests, 1 cases." in table([FEATURE], {TEST: PASSED})
    with pytest.raises(ValueError, match="no marks"):
        written("nothing", [FEATURE], {})
    write_record({TEST: PASSED}, tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == {TEST: PASSED}


def test_every_tensor_has_its_row() -> None:
    text = (README.parents[2] / "model_repository" / "ensemble" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert names("Ensemble: inputs") == {each.name for each in config.input}
    assert names("Ensemble: outputs") == {each.name for each in config.output}


def test_every_setting_has_its_row() -> None:
    assert {field.name for field in dataclasses.fields(Settings)} <= names("Settings")


def test_every_route_and_field_has_its_row() -> None:
    modules: tuple[Any, ...] = (generation_routes, text_routes, page_routes, service_routes)
    paths = {route.path.replace(":path", "") for module in modules for route in module.router.routes}
    assert names("Gateway: routes") == paths - {"/page/{name}"}
    assert names("Gateway: fields") == {*ChatRequest.model_fields, *CompletionRequest.model_fields}


def test_every_metric_has_its_row() -> None:
    with triton_stub():
        importlib.import_module("backend.triton_adapter.metrics").Metrics().publish_description({})
        seen = set(MetricFamily.made)
    step_time = {f"nemo_step_time_seconds_{part}" for part in ("bucket", "sum", "count")}
    assert step_time <= seen
    assert (seen - step_time) | {"nemo_step_time_seconds"} <= names("Metrics")
    assert len(seen) > 20
