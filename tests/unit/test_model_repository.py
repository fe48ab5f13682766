"""The schemas of the four models agree with each other and with the code that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"
MODELS = ("ensemble", "preprocessing", "mistral_nemo", "postprocessing")
ADAPTER = "\n".join(path.read_text() for path in sorted((ROOT / "backend" / "triton_adapter").glob("*.py")))
ACCEPTED_AND_IGNORED = {"pad_id", "return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics"}
"""What TensorRT-LLM's clients send and that makes no difference here; the configuration says so."""


def config(model: str) -> Any:
    text = (REPOSITORY / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors(declared: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in declared}


@pytest.mark.parametrize("model", MODELS)
def test_folder_name_and_batch(model: str) -> None:
    assert config(model).name == model
    assert config(model).max_batch_size == 1
    assert config(model).model_transaction_policy.decoupled is (model != "preprocessing")


@pytest.mark.parametrize("model", ["ensemble", "preprocessing", "mistral_nemo"])
def test_all_inputs_are_optional(model: str) -> None:
    assert [tensor.name for tensor in config(model).input if not tensor.optional] == []


def test_every_tensor_has_the_same_type_and_shape_everywhere() -> None:
    seen: dict[str, tuple[int, tuple[int, ...]]] = {}
    for model in MODELS:
        for name, kind in (tensors(config(model).input) | tensors(config(model).output)).items():
            assert seen.setdefault(name, kind) == kind, f"{name} of {model} differs from another model's"


def test_ensemble_routes_every_tensor_under_one_name() -> None:
    ensemble = config("ensemble")
    used: set[str] = set()
    made: set[str] = set()
    for step in ensemble.ensemble_scheduling.step:
        model = config(step.model_name)
        assert set(step.input_map) <= set(tensors(model.input)), step.model_name
        assert set(step.output_map) <= set(tensors(model.output)), step.model_name
        for name, routed in (*step.input_map.items(), *step.output_map.items()):
            assert routed.lstrip("_") == name, f"{name} is called {routed} in the ensemble"
        used |= set(step.input_map.values())
        made |= set(step.output_map.values())
    assert set(tensors(ensemble.input)) <= used, "an input that no step uses makes the load fail"
    assert used - made == set(tensors(ensemble.input))
    assert set(tensors(ensemble.output)) <= made


@pytest.mark.parametrize("model", ["preprocessing", "mistral_nemo"])
def test_code_looks_at_every_input(model: str) -> None:
    ignored = [name for name in tensors(config(model).input) if f'"{name}"' not in ADAPTER]
    assert set(ignored) <= ACCEPTED_AND_IGNORED


def test_postprocessing_has_a_single_instance_and_no_batcher() -> None:
    postprocessing = config("postprocessing")
    assert [group.count for group in postprocessing.instance_group] == [1]
    assert not postprocessing.HasField("dynamic_batching")
