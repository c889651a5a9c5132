"""What an installation holds."""

from importlib.metadata import version
from pathlib import Path

import vllmproxy
from vllmproxy.settings_table import TABLE

CHECKOUT = Path(__file__).resolve().parent.parent


def test_the_version_is_the_packages_own() -> None:
    assert version("vllmproxy") == vllmproxy.__version__


def test_the_plugin_folder_does_not_hide_twisted() -> None:
    found = sorted(path.name for path in CHECKOUT.joinpath("twisted").rglob("*.py"))
    assert found == ["vllmproxy_plugin.py"]


def test_the_unit_starts_the_command_with_the_names_the_settings_read() -> None:
    unit = CHECKOUT.joinpath("systemd/vllmproxy.service").read_text(encoding="utf-8").splitlines()
    assert "ExecStart=/opt/vllmproxy/bin/twistd --nodaemon --pidfile= vllmproxy" in unit
    credential = TABLE["master-key-file"].credential
    assert f"LoadCredential={credential}:/etc/vllmproxy/{credential}" in unit
    assert "StateDirectory=vllmproxy" in unit
