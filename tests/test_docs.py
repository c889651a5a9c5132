"""What the docs list is what there is."""

import re
from pathlib import Path

from docutils.core import publish_doctree
from docutils.utils import Reporter

from vllmproxy.reloading import RESTART_ONLY
from vllmproxy.settings_table import TABLE
from vllmproxy.simulator.faults import DIRECTIVES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", ROOT / "CHANGELOG.rst", *sorted((ROOT / "docs").glob("*.rst"))]


def test_every_page_is_well_formed() -> None:
    for page in PAGES:
        publish_doctree(page.read_text(), settings_overrides={"halt_level": Reporter.WARNING_LEVEL, "report_level": 5})


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.rst").read_text()
    for row in TABLE.values():
        assert f"``{row.name}``" in text
        assert all(f"``{name}``" in text for name in row.environment)


def test_every_directive_of_the_simulator_is_documented() -> None:
    text = (ROOT / "docs" / "simulator.rst").read_text()
    assert all(f"``{name}" in text for name in DIRECTIVES if name)


def test_every_setting_that_waits_for_a_restart_is_documented() -> None:
    text = (ROOT / "docs" / "operations.rst").read_text()
    listed = re.search(r"These wait for a restart.*?: (.*?)\.\n", text, re.DOTALL)
    assert listed
    names = re.findall(r"``(.*?)``", listed[1])
    assert names == [row.name for row in TABLE.values() if row.field in RESTART_ONLY]
