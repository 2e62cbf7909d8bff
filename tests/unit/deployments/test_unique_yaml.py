"""YAML that says one thing twice is refused, as everywhere else the last one would win without a word."""

from pathlib import Path

import pytest
import yaml

from deployments.cli.settings import read_content
from deployments.serve.config_file import read_config_file
from deployments.unique_yaml import load_yaml
from llm.errors import ConfigError


def test_what_is_there_once_is_read_as_ever():
    text = "a: &a {x: 1, y: [2, {x: 3}]}\nb: {<<: *a, x: 4}\n1: one\ntrue: yes\n? [1]\n: 2\n"
    with pytest.raises(yaml.YAMLError, match="unhashable"):
        load_yaml(text)
    text = text.partition("?")[0]
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("") is None


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "a: 1\nb: {c: 1, d: 2, c: 3}\n", "- a: 1\n  'a': 1\n"])
def test_what_is_there_twice_is_named_with_its_line(text: str):
    with pytest.raises(yaml.YAMLError, match=r"a key is there twice[\s\S]*line \d"):
        load_yaml(text)


def test_a_configuration_that_sets_something_twice_starts_nothing(tmp_path: Path):
    path = tmp_path / "serve_config.yaml"
    path.write_text("applications:\n- import_path: deployments.app:build_app\n  args:\n    model: a\n    model: b\n")
    for read in (read_config_file, read_content):
        with pytest.raises(ConfigError, match=r"a key is there twice.*line 5"):
            read(path)
