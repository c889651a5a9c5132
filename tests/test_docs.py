"""What the docs list is what there is."""

import re
from pathlib import Path

from docutils.core import publish_doctree
from docutils.utils import Reporter
from prometheus_client import CollectorRegistry

from vllmproxy.observers.metrics import MetricsObserver
from vllmproxy.observers.occupancy import Occupancy, OccupancyCollector
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


def test_the_metrics_that_are_documented_are_those_that_there_are() -> None:
    occupancy = OccupancyCollector(lambda: Occupancy(connections=0, evicted=0, requests=0, waiting=0, journal=0))
    families = [*MetricsObserver(CollectorRegistry()).collect(), *occupancy.collect()]
    of_the_parent = {"vllmproxy_workers", "vllmproxy_worker_restarts_total"}
    text = (ROOT / "docs" / "metrics.rst").read_text()
    documented = set(re.findall(r"(?m)^``((?:vllmproxy|litellm)_\w+)``", text))
    assert documented == {each.name + "_total" * (each.type == "counter") for each in families} | of_the_parent


def test_every_directive_of_the_simulator_is_documented() -> None:
    text = (ROOT / "docs" / "simulator.rst").read_text()
    assert all(f"``{name}" in text for name in DIRECTIVES if name)


def test_every_setting_that_waits_for_a_restart_is_documented() -> None:
    text = (ROOT / "docs" / "operations.rst").read_text()
    listed = re.search(r"These wait for a restart.*?: (.*?)\.\n", text, re.DOTALL)
    assert listed
    names = re.findall(r"``(.*?)``", listed[1])
    assert names == [row.name for row in TABLE.values() if row.field in RESTART_ONLY]
