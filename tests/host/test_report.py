"""Findings as they are printed: a line each, a remedy below it, and the sum."""

import pytest

from train.common.errors import UserError
from train.host.checks import Finding
from train.host.report import Report


def test_findings_are_printed_as_they_come_and_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.section("this machine")
    report.add(Finding("card", "ok", "NVIDIA H100"))
    report.add(Finding("Triton", "warn", "no C compiler", "apt-get install gcc"))
    report.add(None)
    report.end()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["this", "machine"],
        ["ok", "card", "NVIDIA", "H100"],
        ["warn", "Triton", "no", "C", "compiler"],
    ]
    assert "Remedy: apt-get install gcc" in lines[3]
    assert lines[-1] == "2 checks: 1 ok, 1 warn, 0 fail"


def test_a_failure_is_named_and_raised_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise UserError("no such file")

    report = Report()
    assert report.attempt("folder", lambda: "models/x", str.upper) == "models/x"
    assert report.attempt("rows", fail, str.upper) is None
    assert report.failed == {"rows"}
    with pytest.raises(UserError, match=r"1 of 2 checks fail\. Nothing was changed\."):
        report.end()
    out = capsys.readouterr().out
    assert "MODELS/X" in out
    assert "no such file" in out
