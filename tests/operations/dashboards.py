"""Cases about Grafana: dashboards that it can load, with queries that Prometheus can parse, and its data sources."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import metrics
from monitoring import recorded
from report import ROOT, Case, Failure, command, require, require_none

GRAFANA = ROOT / "compose/grafana"
TYPES = {"row", "stat", "timeseries"}
COLUMNS = 24


def dashboards() -> dict[str, dict[str, Any]]:
    found = sorted((GRAFANA / "dashboards").glob("*.json"))
    require(bool(found), "compose/grafana/dashboards is empty")
    loaded = {}
    for path in found:
        try:
            loaded[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Failure(f"{path.name} is no JSON: {error}") from error
    return loaded


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel with its dashboard's and its own name."""
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            yield f"{name}: {panel.get('title')}", panel


def queries() -> Iterator[tuple[str, str]]:
    """Every query, of panels and of annotations, as Prometheus gets it."""
    for name, panel in panels():
        for target in panel.get("targets", []):
            yield name, target["expr"].replace("$__rate_interval", "5m")
    for name, dashboard in dashboards().items():
        for annotation in dashboard["annotations"]["list"]:
            if "expr" in annotation:
                yield f"{name}: annotation {annotation['name']}", annotation["expr"]


def sources() -> list[dict[str, Any]]:
    path = GRAFANA / "provisioning/datasources/sanjay.yaml"
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    return found


def dashboards_are_well_formed() -> None:
    problems = []
    for name, dashboard in dashboards().items():
        for key in ("uid", "title", "schemaVersion", "time", "panels", "annotations", "templating"):
            problems += [] if key in dashboard else [f"{name} has no {key}"]
        if dashboard.get("id") is not None:
            problems.append(f"{name}: id must be null; Grafana gives it")
        ids = [panel["id"] for panel in dashboard["panels"]]
        problems += [f"{name}: two panels have the id {one}" for one in {one for one in ids if ids.count(one) > 1}]
        problems += [f"{name}: {problem}" for problem in overlaps(dashboard["panels"])]
    uids = [dashboard["uid"] for dashboard in dashboards().values()]
    require(len(set(uids)) == len(uids), f"two dashboards have one uid: {uids}")
    require_none(problems)


def overlaps(all_panels: list[dict[str, Any]]) -> Iterator[str]:
    taken: dict[tuple[int, int], str] = {}
    for panel in all_panels:
        place = panel["gridPos"]
        if place["x"] + place["w"] > COLUMNS:
            yield f"{panel['title']} is wider than the page"
        cells = [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        other = {taken[cell] for cell in cells if cell in taken}
        if other:
            yield f"{panel['title']} lies over {', '.join(sorted(other))}"
        taken.update(dict.fromkeys(cells, panel["title"]))


def panels_are_complete() -> None:
    known = {(source["type"], source["uid"]) for source in sources()}
    problems = []
    for name, panel in panels():
        if panel["type"] not in TYPES:
            problems.append(f"{name}: the type {panel['type']} is none of {', '.join(sorted(TYPES))}")
        if panel["type"] == "row":
            continue
        targets = panel.get("targets", [])
        problems += [] if targets and panel.get("description") else [f"{name} has no query or no description"]
        problems += [] if panel["fieldConfig"]["defaults"].get("unit") else [f"{name} has no unit"]
        letters = [target["refId"] for target in targets]
        problems += [] if len(set(letters)) == len(letters) else [f"{name}: two queries have one refId"]
        for used in (panel, *targets):
            if (used["datasource"]["type"], used["datasource"]["uid"]) not in known:
                problems.append(f"{name} uses a data source that is not provisioned: {used['datasource']}")
    require_none(problems)


def queries_are_valid() -> None:
    """promtool parses rules, so each query becomes one; a query alone it could only send to a server."""
    asked = list(queries())
    require(len(asked) > 20, "the dashboards have next to no query")
    rules = [{"record": f"query:{number}", "expr": expression} for number, (_, expression) in enumerate(asked)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "queries.yml")
        path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
        try:
            command("promtool", "check", "rules", path)
        except Failure as failure:
            names = "\n".join(
                f"query:{number} is of {name}"
                for number, (name, _) in enumerate(asked)
                if f'query:{number}"' in str(failure)
            )
            raise Failure(f"{failure}\n{names}") from failure


def queries_use_metrics_that_exist() -> None:
    require_none(
        f"{name}: {problem}" for name, expression in queries() for problem in metrics.problems(expression, recorded())
    )


def provisioning_fits() -> None:
    services = yaml.safe_load((ROOT / "compose/compose.yaml").read_text(encoding="utf-8"))["services"]
    problems = []
    for source in sources():
        host = source["url"].removeprefix("http://").split(":")[0]
        problems += [] if host in services else [f"the data source {source['name']} is at {host}, which is no service"]
    uids = [source["uid"] for source in sources()]
    problems += [] if len(set(uids)) == len(uids) else [f"two data sources have one uid: {uids}"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/sanjay.yaml").read_text(encoding="utf-8"))[
        "providers"
    ]
    mounts = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    problems += (
        [] if provider["options"]["path"] in mounts else [f"nothing is mounted at {provider['options']['path']}"]
    )
    require_none(problems)


CASES = [
    Case("grafana: dashboards are well formed", dashboards_are_well_formed),
    Case("grafana: panels have queries, units, descriptions and data sources", panels_are_complete),
    Case("grafana: queries are valid", queries_are_valid),
    Case("grafana: queries use metrics that exist", queries_use_metrics_that_exist),
    Case("grafana: what is provisioned is in the stack", provisioning_fits),
]
