"""The boxes to look at as what CI shows: GitHub's workflow commands, JUnit XML, SARIF. Failed images are there too."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree as Xml

from detxai.output.ranking import LOOK, Finding
from detxai.output.summary import Failure
from detxai.review.listing import Selection
from detxai.text import xml_text

#: Verdict -> (level, what it means). Levels are SARIF's; GitHub says notice for note.
RULES: dict[str, tuple[str, str]] = {
    "unsupported": ("error", "A rule objects strongly: look again."),
    "weak": ("warning", "A rule objects a little: look again."),
    "unknown": ("warning", "The map did not converge, or promises nothing: look again."),
    "supported": ("note", "No rule objects. It clears nothing."),
    "none": ("note", "Explained without evidence."),
}


def github(chosen: Selection, folder: str = "") -> str:
    """A workflow command a finding, `::warning file=…::reason`; `folder` stands before the paths."""
    levels = {"note": "notice"}
    lines = [_command("error", folder + f.path, "not explained", f"{f.message} ({f.code})") for f in chosen.failures]
    for f in chosen.findings:
        level = RULES[f.verdict][0]
        lines.append(_command(levels.get(level, level), folder + f.path, _title(f), _why(f)))
    return "".join(lines)


def junit(chosen: Selection, folder: str = "") -> str:
    """One suite, a case a finding: failed where its verdict asks for another look; an error for a failed image."""
    looked = sum(f.verdict in LOOK for f in chosen.findings)
    counts = {"tests": len(chosen.findings) + len(chosen.failures), "failures": looked, "errors": len(chosen.failures)}
    plain = {"name": "detxai"} | {name: str(count) for name, count in counts.items()}
    suites = Xml.Element("testsuites", plain)
    suite = Xml.SubElement(suites, "testsuite", plain)
    for failure in chosen.failures:
        case = _case(suite, folder + failure.path, "image")
        Xml.SubElement(case, "error", type=failure.code, message=xml_text(failure.message))
    for f in chosen.findings:
        case = _case(suite, folder + f.path, _title(f))
        if f.verdict in LOOK:
            Xml.SubElement(case, "failure", type=f.verdict, message=xml_text(_why(f))).text = xml_text(
                "\n".join(f.reasons)
            )
    Xml.indent(suites)
    text: bytes = Xml.tostring(suites, encoding="utf-8", xml_declaration=True)
    return text.decode() + "\n"


def sarif(chosen: Selection, folder: str = "") -> str:
    """One SARIF 2.1.0 log: a result a finding, a rule a verdict; failed images are notifications of the run.

    See https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.
    """
    rules = [
        {"id": verdict, "shortDescription": {"text": text}, "defaultConfiguration": {"level": level}}
        for verdict, (level, text) in RULES.items()
    ]
    driver = {"name": "detxai", "rules": rules}
    failures = [_notification(f, folder) for f in chosen.failures]
    invocation = {"executionSuccessful": not failures, "toolExecutionNotifications": failures}
    results = [_result(f, folder) for f in chosen.findings]
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, ensure_ascii=False, indent=1) + "\n"


#: What `detxai list --annotate` takes.
FORMATS: dict[str, Callable[[Selection, str], str]] = {"github": github, "junit": junit, "sarif": sarif}


def _title(f: Finding) -> str:
    return f"#{f.id} {f.class_name} {f.score:.2f} {f.verdict}"


def _why(f: Finding) -> str:
    return f.reason or RULES[f.verdict][1]


def _command(level: str, path: str, title: str, message: str) -> str:
    return f"::{level} file={_property(path)},title={_property(title)}::{_data(message)}\n"


def _data(text: str) -> str:
    """As GitHub's own toolkit escapes a message."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _case(suite: Xml.Element, path: str, name: str) -> Xml.Element:
    return Xml.SubElement(suite, "testcase", classname=xml_text(path), name=xml_text(name), file=xml_text(path))


def _place(path: str) -> list[dict[str, Any]]:
    """Where a picture lies. It has no lines, but code scanning shows nothing without one."""
    return [{"physicalLocation": {"artifactLocation": {"uri": quote(path)}, "region": {"startLine": 1}}}]


def _result(f: Finding, folder: str) -> dict[str, Any]:
    plain = f.plain()
    kept = ("id", "kind", "class_name", "score", "trust", "box", "reasons", "overlay")
    return {
        "ruleId": f.verdict,
        "ruleIndex": list(RULES).index(f.verdict),
        "level": RULES[f.verdict][0],
        "message": {"text": f"{_title(f)}: {_why(f)}"},
        "locations": _place(folder + f.path),
        "partialFingerprints": {"box/v1": f"{f.path}#{f.id}"},
        "properties": {name: plain[name] for name in kept},
    }


def _notification(failure: Failure, folder: str) -> dict[str, Any]:
    message = {"text": f"not explained: {failure.message}"}
    return {
        "descriptor": {"id": failure.code},
        "level": "error",
        "message": message,
        "locations": _place(folder + failure.path),
    }
