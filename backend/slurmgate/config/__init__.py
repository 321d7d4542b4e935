"""The configuration file: read, checked as a whole, turned into specifications.

No state beyond the compiled schema. Every function here may be called from any thread. A file with
problems yields all of them at once, one line each: JSON path, what is wrong, what would be right.
"""

from __future__ import annotations

from pathlib import Path

from slurmgate.config.document import oddities, parse, read
from slurmgate.config.listen import listen_problem, parse_listen
from slurmgate.config.report import Findings, Report
from slurmgate.config.rules import apply_rules
from slurmgate.config.specs import build
from slurmgate.config.structure import check_structure
from slurmgate.config.tls import tls_problem
from slurmgate.errors import ConfigError
from slurmgate.model import Config

__all__ = [
    "Findings",
    "examine",
    "listen_problem",
    "load",
    "load_with_content",
    "parse_listen",
    "tls_problem",
    "validate",
]


def load(path: Path) -> Config:
    """Read and validate the file; raise ConfigError with every problem."""
    return load_with_content(path)[0]


def load_with_content(path: Path) -> tuple[Config, bytes]:
    """Like ``load``; give also the bytes that were read, to keep a copy of just this version."""
    content = read(path)
    report = Report()
    return _config(_examine_document(parse(content, path, report), path, report)), content


def validate(document: object, path: Path) -> Config:
    """Validate a parsed JSON document; ``path`` is the file it is from or would be in."""
    return _config(_examine_document(document, path, Report()))


def examine(path: Path) -> Findings:
    """Read and validate the file; give problems and warnings both (``slurmgate check``)."""
    report = Report()
    try:
        document = parse(read(path), path, report)
    except ConfigError as error:
        return Findings(None, tuple(error.problems), ())
    return _examine_document(document, path, report)


def _examine_document(document: object, path: Path, report: Report) -> Findings:
    if oddities(document, report):
        return report.findings(None)
    folder = path.absolute().parent
    sound = check_structure(document, report)
    apply_rules(sound, folder, report)
    if report.count:
        return report.findings(None)
    return report.findings(build(sound, path, report.warning_lines()))


def _config(findings: Findings) -> Config:
    if findings.config is None:
        raise ConfigError(list(findings.problems))
    return findings.config
