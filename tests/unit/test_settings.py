"""Settings: where a value comes from, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from backend.errors import ConfigError
from backend.settings import (
    TABLE_BEGIN,
    TABLE_END,
    Settings,
    read_model_parameters,
    settings_table,
    write_settings_table,
)

GIVEN = {"checkpoint": "/models/nemo"}


def load(parameters: dict[str, str], environment: dict[str, str] | None = None) -> Settings:
    return Settings.load(GIVEN | parameters, environment or {})


def test_defaults() -> None:
    assert load({}) == Settings(checkpoint="/models/nemo")


def test_parameters_override_defaults_and_the_environment_overrides_both() -> None:
    settings = load({"max_num_seqs": "8", "max_model_len": "64"}, {"NEMO_MAX_NUM_SEQS": "16", "PATH": "/bin"})
    assert (settings.max_num_seqs, settings.max_model_len, settings.max_step_tokens) == (16, 64, 512)


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_CHECKPOINT", "/from/environment")
    assert Settings.load({}).checkpoint == "/from/environment"


def test_values_are_parsed_by_type() -> None:
    settings = load({"gpu_memory_fraction": " 0.5 ", "kv_cache_tokens": "128", "runner": " fake "})
    assert (settings.gpu_memory_fraction, settings.kv_cache_tokens, settings.runner) == (0.5, 128, "fake")


@pytest.mark.parametrize(
    ("parameters", "environment", "source"),
    [({"max_seqs": "1"}, {}, "parameter"), ({}, {"NEMO_MAX_SEQS": "1"}, "environment variable NEMO_MAX_SEQS")],
)
def test_an_unknown_setting_lists_those_that_exist(
    parameters: dict[str, str], environment: dict[str, str], source: str
) -> None:
    names = ", ".join(field.name for field in dataclasses.fields(Settings))
    with pytest.raises(ConfigError, match=re.escape(f"unknown setting 'max_seqs' ({source}); there are: {names}")):
        load(parameters, environment)


def test_the_run_folder_is_no_setting() -> None:
    assert load({}, {"NEMO_RUN_DIR": "/run/nemo", "NEMO_KERNEL_CACHE": "/var/cache/nemo"}) == load({})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_num_seqs", "many", "setting max_num_seqs: must be a whole number, got 'many'"),
        ("max_num_seqs", "1.5", "setting max_num_seqs: must be a whole number, got '1.5'"),
        ("gpu_memory_fraction", "half", "setting gpu_memory_fraction: must be a number, got 'half'"),
        ("max_num_seqs", "0", "setting max_num_seqs: must be in [1, 4096], got 0"),
        ("max_num_seqs", "4097", "setting max_num_seqs: must be in [1, 4096], got 4097"),
        ("max_model_len", "15", "setting max_model_len: must be in [16, 2147483648], got 15"),
        ("default_deadline_ms", "-1", "setting default_deadline_ms: must be in [0, 2147483648], got -1"),
        ("gpu_memory_fraction", "nan", "setting gpu_memory_fraction: must be in [0.05, 1], got nan"),
        ("gpu_memory_fraction", "1.01", "setting gpu_memory_fraction: must be in [0.05, 1], got 1.01"),
        ("log_level", "INFO", "setting log_level: must be one of debug, info, warning, error, got 'INFO'"),
        ("runner", "cuda12", "setting runner: must be one of "),
    ],
)
def test_a_wrong_value_is_refused_with_field_bound_and_value(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        load({name: value})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings) if field.type != "str"])
def test_every_number_has_both_bounds(name: str) -> None:
    metadata = {field.name: field.metadata for field in dataclasses.fields(Settings)}[name]
    for outside in (metadata["low"] - 1, metadata["high"] + 1):
        with pytest.raises(ConfigError, match=f"setting {name}: must be in "):
            dataclasses.replace(Settings(), **{name: outside})


def test_every_running_sequence_must_fit_into_a_step() -> None:
    with pytest.raises(ConfigError, match="setting max_num_seqs: must be at most max_step_tokens = 32, got 33"):
        load({"max_num_seqs": "33", "max_step_tokens": "32"})
    assert load({"max_num_seqs": "32", "max_step_tokens": "32"}).max_num_seqs == 32


@pytest.mark.parametrize("parameters", [{}, {"checkpoint": ""}, {"checkpoint": "  "}])
def test_a_checkpoint_must_be_named(parameters: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="setting checkpoint: must name a checkpoint folder, got none"):
        Settings.load(parameters, {})


def test_a_hostile_value_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"max_num_seqs": "x" * 10_000})
    assert len(str(caught.value)) < 300


def test_parameters_are_read_from_a_model_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text('name: "m"\nparameters { key: "max_num_seqs" value { string_value: "4" } }\n')
    assert read_model_parameters(path) == {"max_num_seqs": "4"}


@pytest.mark.parametrize("content", [b"name: ", b"no_such_field: 1", b'name: "\xff"'])
def test_a_damaged_model_configuration_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: cannot be read as a model configuration")):
        read_model_parameters(path)


def test_a_missing_model_configuration_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pbtxt: cannot be read as a model configuration"):
        read_model_parameters(tmp_path / "none.pbtxt")


def test_the_table_has_a_row_for_every_setting() -> None:
    header, rule, *rows = settings_table().splitlines()
    assert header.count("|") == rule.count("|") == 5
    assert all(row.count("|") == 5 for row in rows)
    assert [row.split("`")[1] for row in rows] == [field.name for field in dataclasses.fields(Settings)]
    assert "| `max_num_seqs` | 256 | 1 to 4,096 | most sequences that run at once |" in rows


def test_the_table_is_written_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{TABLE_BEGIN}\nold\n{TABLE_END}\nafter\n")
    for _ in range(2):
        write_settings_table(readme)
        assert readme.read_text() == f"before\n{TABLE_BEGIN}\n\n{settings_table()}\n\n{TABLE_END}\nafter\n"


def test_the_projects_readme_has_the_table() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert f"{TABLE_BEGIN}\n\n{settings_table()}\n\n{TABLE_END}" in readme.read_text()


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    with pytest.raises(AssertionError, match="lacks the markers"):
        write_settings_table(readme)
