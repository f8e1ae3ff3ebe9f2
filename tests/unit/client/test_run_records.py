"""Which runs a stored model belongs to, as kept on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlops.client.lineage import RunPlace
from mlops.client.run_records import COMES_FROM, PACKAGED_BY, recall, record_of, remember

DIGEST = "sha256:" + "0" * 64
PLACE = RunPlace("7" * 32, "train\n[a]", "1", "demo")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    return tmp_path


def test_records_come_back_once_and_in_their_order() -> None:
    records = [
        record_of(COMES_FROM, "", "http://mlflow.test/", PLACE),
        record_of(PACKAGED_BY, "svc:1", "sqlite:////a b/mlflow.db", PLACE),
    ]
    for record in (*records, *records):
        remember(DIGEST, record)
    assert recall(DIGEST) == records
    assert recall("sha256:" + "1" * 64) == []
    page = f"http://mlflow.test/#/experiments/1/runs/{PLACE.run_id}"
    assert [record.url for record in records] == [page, None]


def test_damaged_lines_cost_no_record(home: Path) -> None:
    record = record_of(PACKAGED_BY, "svc:1", "http://mlflow.test", PLACE)
    remember(DIGEST, record)
    [path] = (home / "mlops" / "runs").iterdir()
    with path.open("ab") as file:
        file.write(b'{"run_id": 1}\n\xff\nnull\n' + b"[" * 100_000 + b"\n")
    assert recall(DIGEST) == [record]


def test_a_record_that_cannot_be_kept_is_logged(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "mlops").write_text("a file where a folder should be")
    remember(DIGEST, record_of(COMES_FROM, "", "http://mlflow.test", PLACE))
    assert "cannot be kept" in caplog.text
    assert recall(DIGEST) == []


def test_a_link_to_a_run_is_one_whatever_the_run_is_called() -> None:
    assert PLACE.markdown == f"[train (a)](#/experiments/1/runs/{PLACE.run_id})"
