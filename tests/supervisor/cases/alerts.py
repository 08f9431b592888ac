"""Prometheus and Alertmanager over the running stack: targets, alerts that come and go, queries that have data."""

from __future__ import annotations

import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from ..stack import COMPOSE
from . import pace
from .place import Place, eventually, get
from .probe import Probe

JOBS = {"sanjay-edge": 3, "sanjay-router": 2, "sanjay-delivery": 2, "certificates": 1}
METRIC = re.compile(r"(?<![\w:.])((?:sanjay|process|probe)_\w+|(?:sanjay|kind):[\w:]+|up\b)(?=[\s{\[)]|$)")


class Monitoring:
    """The two servers."""

    def __init__(self, place: Place):
        self.place = place
        self.prometheus = f"http://{place.address('prometheus')}:9090/api/v1"
        self.alertmanager = f"http://{place.address('alertmanager')}:9093/api/v2"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression has now; AssertionError when it is none."""
        url = f"{self.prometheus}/query?" + urllib.parse.urlencode({"query": expression})
        try:
            return json.loads(get(url))["data"]["result"]
        except OSError as error:
            raise AssertionError(f"{expression}: {error}") from error

    def targets(self) -> list[dict[str, Any]]:
        """All targets."""
        return json.loads(get(f"{self.prometheus}/targets"))["data"]["activeTargets"]

    def alerts(self) -> list[dict[str, str]]:
        """The labels of the alerts that Alertmanager holds, inhibited ones too."""
        return [alert["labels"] for alert in json.loads(get(f"{self.alertmanager}/alerts"))]

    def quiet(self) -> None:
        """Waits until there is no alert."""

        def none() -> bool:
            alerts = self.alerts()
            assert not alerts, [f"{alert['alertname']} of {alert.get('instance')}" for alert in alerts]
            return True

        eventually("no alert is left", 60, none)


def targets(place: Place) -> None:
    """Prometheus scrapes every process, and looks at the certificate; nothing is wrong."""
    monitoring = Monitoring(place)

    def up() -> bool:
        found = monitoring.targets()
        down = [f"{target['labels']}: {target['lastError']}" for target in found if target["health"] != "up"]
        assert not down, down
        count = {job: sum(target["labels"]["job"] == job for target in found) for job in JOBS}
        assert count == JOBS, count
        return True

    eventually("every target is up", 30, up)
    eventually("the certificate is seen", 30, lambda: monitoring.query("probe_ssl_earliest_cert_expiry - time() > 0"))
    monitoring.quiet()


def outage(place: Place) -> None:
    """All of delivery is away: its alerts fire, and end when it is back."""
    print(f"    durations of Prometheus' and Alertmanager's files are multiplied by {pace.FACTOR}")
    monitoring = Monitoring(place)
    monitoring.quiet()
    nodes = [name for name in place.ours() if name.startswith("delivery-")]
    away = {f"{place.address(name)}:8081" for name in nodes}
    for name in nodes:
        place.stack.order("stop", name)
    try:

        def fires() -> bool:
            alerts = monitoring.alerts()
            down = {alert["instance"] for alert in alerts if alert["alertname"] == "TargetDown"}
            assert down == away, f"TargetDown of {down}"
            dependants = {
                alert["job"]
                for alert in alerts
                if alert["alertname"] == "DependencyDown" and alert["dependency"] == "delivery"
            }
            assert dependants == {"sanjay-edge"}, f"DependencyDown of {dependants}; {alerts}"
            return True

        eventually("the outage is an alert", 45, fires)
    finally:
        for name in nodes:
            place.stack.order("start", name)
    monitoring.quiet()


def data(place: Place) -> None:
    """Every query of the rules and dashboards is taken, and every metric in one has data after some traffic."""
    monitoring = Monitoring(place)
    probe = Probe(place, users=2)
    probe.start()
    probe.goes_on(100)
    problems = probe.end()
    assert not problems, problems
    # Turned away: the edge counts it by its status.
    refused = f"http://{place.address('edge-1')}:8080/elsewhere"
    try:
        get(refused)
    except OSError as error:
        assert "404" in str(error), error
    queries = {**rules(COMPOSE.parent), **dashboards(COMPOSE.parent)}
    assert len(queries) > 20, queries
    names = {name for query in queries.values() for name in METRIC.findall(query)}
    assert len(names) > 20, names
    missing: set[str] = set()

    def known() -> bool:
        missing.clear()
        missing.update(name for name in names if not monitoring.query(name))
        assert not missing, f"no data: {sorted(missing)}"
        return True

    eventually("every metric in a query has data", 30, known)
    for where, query in queries.items():
        # A rule's has data when something is wrong, and is only to be understood.
        result = monitoring.query(query)
        assert result or where.startswith("rule "), f"{where}: {query} has no data"
    print(f"    {len(queries)} queries, {len(names)} metrics")


def rules(directory: Path) -> dict[str, str]:
    """The expressions of all rules, by a name for each."""
    found = {}
    for path in sorted(directory.glob("prometheus/rules/*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                found[f"rule {rule.get('alert') or rule['record']}"] = rule["expr"]
    return found


def dashboards(directory: Path) -> dict[str, str]:
    """The queries of all panels, by a name for each."""
    found = {}

    def walk(panels: list[dict[str, Any]], path: Path) -> None:
        for panel in panels:
            for number, target in enumerate(panel.get("targets", [])):
                if query := target.get("expr"):
                    name = f"dashboard {path.stem}, {panel['title']} {number}"
                    found[name] = query.replace("$__rate_interval", "1m").replace("$__interval", "15s")
            walk(panel.get("panels", []), path)

    for path in sorted(directory.glob("grafana/dashboards/*.json")):
        walk(json.loads(path.read_text())["panels"], path)
    return found
