"""Cases about Prometheus, Alertmanager, the blackbox exporter and Jaeger: files that load, alerts that are tested, and
a runbook that has a section for each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import metrics
from report import ROOT, Case, command, require, require_none

COMPOSE = ROOT / "compose"
PROMETHEUS = COMPOSE / "prometheus"
ALERTMANAGER = COMPOSE / "alertmanager/alertmanager.yml"
RUNBOOK = ROOT / "docs/runbook.md"
SEVERITIES = ("critical", "warning")
# What a quoted command begins with.
COMMANDS = {"sanjay", "nginx", "openssl"}
# The labels of an alert, and the receiver that it must come to.
ROUTES = [
    ({"severity": "critical", "alertname": "DependencyDown"}, "at-once"),
    ({"severity": "warning", "alertname": "GapRateHigh"}, "later"),
    ({"alertname": "SomebodyElsesAlert"}, "later"),
]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    """Every rule of every file."""
    return [rule for path in files("rules") for group in load(path)["groups"] for rule in group["rules"]]


def files(folder: str) -> list[Path]:
    found = sorted((PROMETHEUS / folder).glob("*.yml"))
    require(bool(found), f"compose/prometheus/{folder} is empty")
    return found


def alerts() -> dict[str, dict[str, Any]]:
    named = [rule for rule in rules() if "alert" in rule]
    require(bool(named), "compose/prometheus/rules has no alert")
    twice = {rule["alert"] for rule in named if sum(other["alert"] == rule["alert"] for other in named) > 1}
    require_none(f"there are two alerts {name}" for name in sorted(twice))
    return {rule["alert"]: rule for rule in named}


def prometheus_takes_its_files() -> None:
    command("promtool", "check", "config", PROMETHEUS / "prometheus.yml")
    command("promtool", "check", "rules", "--lint=all", "--lint-fatal", *files("rules"))


def alerts_do_what_their_cases_say() -> None:
    command("promtool", "test", "rules", *files("tests"), seconds=300)


def each_alert_has_its_cases() -> None:
    """A case of the alert's name must see it fire, and one must see it stay quiet."""
    fires: set[str] = set()
    quiet: set[str] = set()
    for path in files("tests"):
        for case in load(path)["tests"]:
            for expected in case["promql_expr_test"]:
                alert = case["name"]
                if "ALERTS{alertname" not in expected["expr"] or alert not in selected(expected["expr"]):
                    continue
                labels = [sample["labels"] for sample in expected["exp_samples"]]
                (fires if labels else quiet).add(alert)
    require_none(
        [f"no case of compose/prometheus/tests sees {name} fire" for name in sorted(set(alerts()) - fires)]
        + [f"no case of compose/prometheus/tests sees {name} stay quiet" for name in sorted(set(alerts()) - quiet)]
        + [
            f"compose/prometheus/tests has cases of {name}, which is no alert"
            for name in sorted((fires | quiet) - set(alerts()))
        ]
    )


def selected(expression: str) -> set[str]:
    """The alerts that a test's selector of `ALERTS` names."""
    found = re.search(r'alertname(=~?)"([^"]+)"', expression)
    if found is None:
        return set()
    return {found[2]} if found[1] == "=" else {name for name in alerts() if re.fullmatch(found[2], name)}


def each_alert_says_what_to_do() -> None:
    sections = runbook_sections()
    problems = []
    for name, rule in alerts().items():
        if rule.get("labels", {}).get("severity") not in SEVERITIES:
            problems.append(f"{name}: severity must be one of {', '.join(SEVERITIES)}")
        notes = rule.get("annotations", {})
        problems += [f"{name} has no {key}" for key in ("summary", "description", "runbook_url") if not notes.get(key)]
        if notes.get("runbook_url") != f"docs/runbook.md#{name.lower()}":
            problems.append(f"{name}: runbook_url must be docs/runbook.md#{name.lower()}")
        if name not in sections:
            problems.append(f"docs/runbook.md has no section {name}")
    problems += [
        f"docs/runbook.md has a section {name}, and there is no such alert" for name in sections if name not in alerts()
    ]
    for name, text in sections.items():
        problems += [
            f"docs/runbook.md: {name} does not say **{part}**"
            for part in ("Means", "Look at", "Do", "Over when")
            if part.lower() not in text.lower()
        ]
    require_none(problems)


def runbook_sections() -> dict[str, str]:
    """The runbook's sections of the third level, by their heading."""
    parts = re.split(r"(?m)^### (.+)$", RUNBOOK.read_text(encoding="utf-8"))
    return {name.strip(): re.split(r"(?m)^## ", text)[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def runbook_links_lead_somewhere() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = RUNBOOK.parent / name if name else RUNBOOK
        if not file.is_file():
            problems.append(f"docs/runbook.md links {target}, and there is no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            problems.append(f"docs/runbook.md links {target}, and that file has no such heading")
    require_none(problems)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def rules_use_metrics_that_exist() -> None:
    require_none(
        f"{rule.get('alert') or rule['record']}: {problem}"
        for rule in rules()
        for problem in metrics.problems(rule["expr"], recorded())
    )


def runbook_names_metrics_that_exist() -> None:
    quoted = " ".join(re.findall(r"`([^`]+)`", RUNBOOK.read_text(encoding="utf-8")))
    require_none(f"docs/runbook.md: {problem}" for problem in metrics.problems(quoted, recorded()))


def runbook_names_log_lines_that_exist() -> None:
    """A quoted phrase of three words or more is a log line, a command, or a label that the rules set."""
    known = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    known += "".join(path.read_text(encoding="utf-8") for path in files("rules"))
    phrases = {" ".join(phrase.split()) for phrase in re.findall(r"`([^`]+)`", RUNBOOK.read_text(encoding="utf-8"))}
    require_none(
        f"docs/runbook.md quotes {phrase!r}, which is no log line of docs/operations.md"
        for phrase in sorted(phrases)
        if len(phrase.split()) > 2 and phrase.split()[0] not in COMMANDS and phrase not in known
    )


def alertmanager_routes_by_severity() -> None:
    command("amtool", "check-config", ALERTMANAGER)
    problems = []
    for labels, receiver in ROUTES:
        words = [f"{key}={value}" for key, value in labels.items()]
        said = command("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", *words)
        chosen = said.strip().splitlines()[-1]  # Where amtool has a configuration of its own, a warning comes first.
        if chosen != receiver:
            problems.append(f"an alert with {' '.join(words)} goes to {chosen}, not to {receiver}")
    require_none(problems)


def inhibition_names_alerts_that_exist() -> None:
    problems = []
    for rule in load(ALERTMANAGER)["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            named = re.fullmatch(r'alertname(=~?)"(.*)"', matcher)
            if named is None:
                continue
            for pattern in named[2].split("|"):
                exact = pattern if named[1] == "=~" else re.escape(pattern)
                if not any(re.fullmatch(exact, name) for name in alerts()):
                    problems.append(f"an inhibition rule names {pattern}, which is no alert")
    require_none(problems)


def blackbox_takes_its_file() -> None:
    command("prometheus-blackbox-exporter", "--config.check", f"--config.file={COMPOSE / 'blackbox/blackbox.yml'}")
    modules = set(load(COMPOSE / "blackbox/blackbox.yml")["modules"])
    for job in load(PROMETHEUS / "prometheus.yml")["scrape_configs"]:
        asked = set(job.get("params", {}).get("module", []))
        require(asked <= modules, f"the job {job['job_name']} asks for the modules {asked}, and there are {modules}")


def jaeger_uses_what_it_configures() -> None:
    """Jaeger itself is not at hand, so this looks at what its file refers to."""
    config = load(COMPOSE / "jaeger/jaeger.yaml")
    service, problems = config["service"], []
    used = {"extensions": set(service["extensions"])}
    for kind in ("receivers", "processors", "exporters"):
        used[kind] = {name for pipeline in service["pipelines"].values() for name in pipeline[kind]}
    for kind, names in used.items():
        configured = set(config[kind])
        problems += [f"jaeger.yaml uses {name} and does not configure it in {kind}" for name in names - configured]
        problems += [f"jaeger.yaml configures {name} in {kind} and does not use it" for name in configured - names]
    backends = set(config["extensions"]["jaeger_storage"]["backends"])
    for user in (
        config["extensions"]["jaeger_query"]["storage"]["traces"],
        config["exporters"]["jaeger_storage_exporter"]["trace_storage"],
    ):
        problems += (
            [] if user in backends else [f"jaeger.yaml refers to the storage {user}, which it does not configure"]
        )
    require(
        config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317"),
        "OTLP must be taken on port 4317",
    )
    require_none(problems)


CASES = [
    Case("prometheus: configuration and rules load", prometheus_takes_its_files),
    Case("prometheus: each alert has a case that fires and one that does not", each_alert_has_its_cases),
    Case("prometheus: alerts do what their cases say", alerts_do_what_their_cases_say),
    Case("prometheus: rules use metrics that exist", rules_use_metrics_that_exist),
    Case("runbook: each alert has a severity, its texts and a section", each_alert_says_what_to_do),
    Case("runbook: links lead somewhere", runbook_links_lead_somewhere),
    Case("runbook: it names metrics that exist", runbook_names_metrics_that_exist),
    Case("runbook: it names log lines that exist", runbook_names_log_lines_that_exist),
    Case("alertmanager: alerts are routed by severity", alertmanager_routes_by_severity),
    Case("alertmanager: inhibition names alerts that exist", inhibition_names_alerts_that_exist),
    Case("blackbox: its file loads and has the modules that are asked for", blackbox_takes_its_file),
    Case("jaeger: its file uses what it configures", jaeger_uses_what_it_configures),
]
