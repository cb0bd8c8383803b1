"""Findings as a person reads them: one line each, printed as soon as the check is done, and a sum at the end."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from train.common.errors import UserError
from train.host.checks import Finding

T = TypeVar("T")
COLOUR = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class Report:
    """Prints findings and counts them. failed: the names of the checks that failed."""

    def __init__(self, as_json: bool = False) -> None:
        """as_json: print nothing before the end, then one JSON object."""
        from rich.console import Console

        self.console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, quiet=as_json)
        self.as_json = as_json
        self.counts = {"ok": 0, "warn": 0, "fail": 0}
        self.failed: set[str] = set()
        self.findings: list[dict[str, str]] = []
        self.title = ""

    def section(self, title: str) -> None:
        from rich.text import Text

        self.title = title
        self.console.print(Text(("\n" if sum(self.counts.values()) else "") + title, style="bold"))

    def add(self, finding: Finding | None) -> None:
        """Print a finding; None is a check that does not apply here."""
        from rich.table import Table
        from rich.text import Text

        if finding is None:
            return
        self.counts[finding.state] += 1
        self.findings.append({"section": self.title, **asdict(finding)})
        self.failed |= {finding.name} if finding.state == "fail" else set()
        line = Table.grid(padding=(0, 2))
        line.add_column(width=6, justify="right")
        line.add_column(width=14)
        line.add_column(overflow="fold")
        line.add_row(Text(finding.state, style=COLOUR[finding.state]), finding.name, Text(finding.text))
        if finding.remedy:
            line.add_row("", "", Text(f"Remedy: {finding.remedy}", style="italic"))
        self.console.print(line)

    def attempt(self, name: str, check: Callable[[], T], describe: Callable[[T], str]) -> T | None:
        """What `check` returns, reported as ok; None where it raises a UserError, reported as a failure."""
        try:
            value = check()
        except UserError as error:
            self.add(Finding(name, "fail", str(error)))
            return None
        self.add(Finding(name, "ok", describe(value)))
        return value

    def end(self, strict: bool = False) -> None:
        """Print the sum, or the JSON object with every finding.

        Args:
            strict: a warning fails too.
        Raises:
            UserError: a check failed.
        """
        checks, warned, failed = sum(self.counts.values()), self.counts["warn"], self.counts["fail"]
        if self.as_json:
            print(
                json.dumps({"checks": checks, **self.counts, "findings": self.findings}, ensure_ascii=False, indent=1)
            )
        self.console.print(f"\n{checks} checks: {self.counts['ok']} ok, {warned} warn, {failed} fail")
        if failed:
            raise UserError(f"{failed} of {checks} checks fail. Nothing was changed.")
        if strict and warned:
            raise UserError(f"{warned} of {checks} checks warn, and strict=on asks for none. Nothing was changed.")
