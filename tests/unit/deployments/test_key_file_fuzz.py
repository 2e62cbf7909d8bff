"""Whatever stands in a file of keys: it is taken or refused in one line that quotes nothing of it, and never breaks."""

import contextlib
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from deployments.accounts_config import KeyLimits, Role
from deployments.config import AppConfig
from deployments.router.key_file import KeyFile
from deployments.router.keys import KeyEntry, KeySource, find_keys, parse_keys
from llm.errors import ConfigError

PATH = Path("keys.yaml")
SECRET = "sk-secret-9f8e7d"
FIELDS = (*KeyEntry.model_fields, "unknown", "")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.datetimes(),
    st.sampled_from([SECRET, "admin", "user", "a" * 64, "2030-01-31", "2030-01-31T00:00:00Z", "1893456000000"]),
    st.sampled_from(["\x00", "\ud800"]),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=3),
    st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))])),
)  # fmt: skip
ENTRIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8)


def parse(content: bytes) -> tuple | None:
    """The keys; None where the file is refused as it should be."""
    try:
        keys = parse_keys(PATH, content, KeyLimits())
    except ConfigError as error:
        says = str(error)
        if "\n" in says or SECRET in says:
            pytest.fail(says)
        return None
    for key in keys:
        assert 1 <= len(key.name) <= 64
        assert len(key.digest) == 32
        assert isinstance(key.role, Role)
        assert key.limits.min_priority <= key.limits.max_priority
        assert key.is_expired(float("inf")) == (key.expires_at is not None)
        if key.expires_at is not None:
            datetime.fromtimestamp(key.expires_at, UTC)
        key.name.encode()
    return keys


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
)
def test_any_bytes(content: bytes):
    parse(content)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.lists(ENTRIES, max_size=3), ENTRIES, VALUES))
def test_any_values(value: object):
    parse(yaml.dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UnicodeEncodeError):
        parse(json.dumps(value, default=str).encode())


@pytest.mark.parametrize(
    "text",
    [
        "- {name: a, key: !!timestamp abc}", "- {name: a, key: b, expires_at: 2030-13-01T00:00:00Z}",
        "- {name: a, key: b, expires_at: !!python/object:os.system x}", "- {name: !!bool x, key: b}", "- !!int abc",
        "a: &a [*a]", "- &a {name: x, key: *a}", "- {name: a, key: b, expires_at: 99999999999999999999}",
        "- {? [1, 2] : 3}", "[" * 3000,
        "- {name: a, key: b, requests_per_min: " + "9" * 5000 + "}", "!!binary x", "- {<<: 3}",
        "- {name: a, key: b, expires_at: 0000-01-01T00:00:00Z}",
    ],
)  # fmt: skip
def test_what_yaml_itself_stumbles_over(text: str):
    assert parse(text.encode()) is None


@pytest.mark.parametrize(
    ("value", "ends"),
    [
        ("2030-01-31T12:00:00Z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31T12:00:00+02:00", datetime(2030, 1, 31, 10, tzinfo=UTC)),
        ("2030-01-31 12:00:00", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ('"2030-01-31T12:00:00-01:30"', datetime(2030, 1, 31, 13, 30, tzinfo=UTC)),
        ('"2030-01-31T12:00"', datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("null", None),
    ],
)
def test_when_a_key_expires(value: str, ends: datetime | None):
    [key] = parse_keys(PATH, f"- {{name: a, key: b, expires_at: {value}}}".encode(), KeyLimits())
    assert key.expires_at == (ends.timestamp() if ends else None)
    if ends is not None:
        assert not key.is_expired(ends.timestamp() - 0.001)
        assert key.is_expired(ends.timestamp())


@pytest.mark.parametrize("value", ["2030-01-31", "1893456000", '"1893456000000"', "tomorrow", "[]", "1.5", "true"])
def test_what_names_no_moment_is_refused_with_an_example(value: str):
    with pytest.raises(ConfigError, match=r"entry 1: expires_at: .*"):
        parse_keys(PATH, f"- {{name: a, key: b, expires_at: {value}}}".encode(), KeyLimits())


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"role": "root"}, "role: Input should be 'user' or 'admin'"),
        ({"models": "demo"}, "models: "),
        ({"models": [""]}, "models.0: "),
        ({"tokens_per_day": 0}, "tokens_per_day: "),
        ({"max_priority": 101}, "max_priority: "),
        ({"max_priority": -1}, "min_priority 0 is above max_priority -1"),
        ({"token_per_day": 5}, "a setting is unknown; known are .*tokens_per_day"),
    ],
)
def test_a_wrong_setting_is_named(settings_: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        parse_keys(PATH, yaml.safe_dump([{"name": "a", "key": "b", **settings_}]).encode(), KeyLimits())


def test_limits_of_a_key_and_of_all_are_checked_together():
    defaults = KeyLimits(min_priority=-10)
    [key] = parse_keys(PATH, b"- {name: a, key: b, max_priority: -5}", defaults)
    assert (key.limits.min_priority, key.limits.max_priority) == (-10, -5)
    with pytest.raises(ConfigError, match=r"limits\.per_key: min_priority 0 is above max_priority -5"):
        find_keys(AppConfig.model_validate({"limits": {"per_key": {"max_priority": -5}}}))


def test_a_budget_needs_a_record(tmp_path: Path):
    """At the start, and when the file changes; otherwise a restart would forget what has been used."""
    path = tmp_path / "keys.yaml"
    path.write_text("- {name: a, key: b, tokens_per_month: 5}")
    with pytest.raises(ConfigError, match=r"'a' has a budget .* accounts\.record"):
        find_keys(AppConfig.model_validate({"api_keys_file": str(path)}))
    find_keys(AppConfig.model_validate({"api_keys_file": str(path), "accounts": {"record": "usage.jsonl"}}))
    path.write_text("- {name: a, key: b}")
    source = find_keys(AppConfig.model_validate({"api_keys_file": str(path)}))
    file = KeyFile(source)
    file.look(is_first=True)
    path.write_text("- {name: a, key: b, tokens_per_month: 5}")
    assert (file.look(), file.look()) == (None, None)
    assert "accounts.record" in (file.error or "")
    assert KeySource(source.fixed, has_record=True).keys_with(parse_keys(path, path.read_bytes(), KeyLimits()))
