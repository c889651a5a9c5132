"""Settings that another process makes of what this one was told."""

import json
from pathlib import Path

import pytest

from vllmproxy.said import Said, read_now
from vllmproxy.settings import SettingsError


def test_the_same_settings_whatever_has_become_of_the_files(tmp_path: Path) -> None:
    key, config = tmp_path / "key", tmp_path / "c.toml"
    key.write_text("sk-a-key\n")
    config.write_text(f"master-key-file = '{key}'\nlisten = ['tcp:1', 'tcp:2']\nmax-head = 1000\nopen = true\n")
    options = {"upstream": "http://gpu1:8000", "config": str(config), "trusted-proxy": ["10.0.0.0/8"]}
    environ = {"HOME": "/home/x", "REDIS_URL": "redis://r"}
    said, settings = read_now(options, environ)
    key.unlink()
    config.write_text("max-head = 'many'\n")
    assert Said.of_json(json.loads(json.dumps(said.as_json()))).settings(environ) == settings
    assert "sk-a-key" not in repr(said)


def test_a_file_that_was_not_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-a-key\n")
    with pytest.raises(SettingsError, match="cannot read"):
        Said({"upstream": "http://h", "master-key-file": str(tmp_path / "key")}, {}).settings({"HOME": "/home/x"})
    assert Said({"upstream": "http://h"}, {}).settings({"HOME": "/", "CREDENTIALS_DIRECTORY": "/c"}).master_key is None
