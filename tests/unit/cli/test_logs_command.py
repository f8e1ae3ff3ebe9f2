"""`mlops logs`, where `bentoml` is not on PATH."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from mlops.cli import app


def test_logs_prints_what_bentoml_logs_prints(bentoml_home: Path) -> None:
    log = bentoml_home / "mlops" / "logs" / "helpdesk.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\nthree\n")
    assert CliRunner().invoke(app, ["logs", "helpdesk"]).output == "one\ntwo\nthree\n"
    assert CliRunner().invoke(app, ["logs", "helpdesk", "-n", "1"]).output == "three\n"


def test_a_service_without_a_log_is_an_error(bentoml_home: Path) -> None:
    result = CliRunner().invoke(app, ["logs", "nobody"])
    assert (result.exit_code, "no log of 'nobody'" in result.output) == (1, True)
