"""The model store on a real BentoML store: atomic, verified, nothing written twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from datetime import date, timedelta
from pathlib import Path

import bentoml
import pytest

from mlops.errors import IntegrityError, PackagingError
from mlops.registry import ModelStore, StoredModel
from mlops.registry.manifest import FILE_NAME
from racing import race
from tiny_models import write_language_model


def make_files(folder: Path, **contents: bytes) -> list[tuple[str, Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, data in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files.append((name.replace("__", "/"), path))
    return files


def save(files: list[tuple[str, Path]], tag: str = "demo:1.0.0", **more: object) -> StoredModel:
    name, _, version = tag.partition(":")
    options = {"kind": "language_model", "framework": "mlx", **more}
    return ModelStore().save(name, version or None, files, **options)  # type: ignore[arg-type]


def blobs(home: Path) -> list[Path]:
    return sorted((home / "mlops" / "blobs").iterdir())


def test_entry_is_one_of_bentoml(bentoml_home: Path, tmp_path: Path) -> None:
    files = make_files(tmp_path / "m", weights=b"w" * 1000, sub__config=b"{}")
    entry = save(files, labels={"team": "ml"}, metadata={"date": "2025-10-22"})
    model = bentoml.models.get("demo:latest")
    assert str(model.tag) == entry.tag == "demo:1.0.0"
    assert Path(model.path_of("sub/config")).read_bytes() == b"{}"
    assert model.info.labels == {"team": "ml"}
    assert model.info.metadata["date"] == "2025-10-22"
    assert model.info.metadata["mlops"]["digest"] == entry.digest
    assert [str(found.tag) for found in bentoml.models.list()] == ["demo:1.0.0"]
    bentoml.models.delete("demo:1.0.0")
    assert ModelStore().list() == []


def test_same_input_has_the_same_digest_wherever_it_is(bentoml_home: Path, tmp_path: Path) -> None:
    one = save(make_files(tmp_path / "a", x=b"1", y=b"2"), "one:1.0.0", labels={"a": "b"})
    two = save(make_files(tmp_path / "b", y=b"2", x=b"1"), "two:9.0.0")
    other = save(make_files(tmp_path / "c", x=b"1", z=b"2"), "other:1.0.0")
    assert one.digest == two.digest != other.digest


def test_version_comes_from_the_content_when_none_is_given(
    bentoml_home: Path, tmp_path: Path
) -> None:
    entry = save(make_files(tmp_path / "m", x=b"1"), "demo")
    assert entry.version == entry.digest.removeprefix("sha256:")[:12]


def test_same_content_again_writes_nothing(bentoml_home: Path, tmp_path: Path) -> None:
    files = make_files(tmp_path / "m", weights=b"w" * 5000)
    first = save(files)
    state = {path: path.stat() for path in bentoml_home.rglob("*") if path.name != "lock"}
    again = save(files)
    assert first.created
    assert not again.created
    after = {path: path.stat() for path in bentoml_home.rglob("*") if path.name != "lock"}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items() if p.is_file()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in state.items() if p.is_file()
    }


def test_other_content_under_a_taken_tag_is_refused(bentoml_home: Path, tmp_path: Path) -> None:
    first = save(make_files(tmp_path / "a", x=b"1"))
    with pytest.raises(PackagingError, match="taken by other content") as caught:
        save(make_files(tmp_path / "b", x=b"2"))
    assert caught.value.details["stored"] == first.digest
    ModelStore().verify(ModelStore().get("demo:1.0.0"))
    assert ModelStore().get("demo").digest == first.digest


def test_same_content_keeps_its_labels_and_says_so(
    bentoml_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = make_files(tmp_path / "m", x=b"1")
    save(files, labels={"stage": "production"}, metadata={"by": "ci"})
    entry = save(files, labels={"stage": "staging"})
    assert (entry.labels, entry.metadata) == ({"stage": "production"}, {"by": "ci"})
    assert "demo:1.0.0 keeps the labels and metadata" in caplog.text


@pytest.mark.parametrize("broken", [FILE_NAME, "model.yaml"])
def test_entry_that_cannot_be_read_is_made_again(
    broken: str, bentoml_home: Path, tmp_path: Path
) -> None:
    files = make_files(tmp_path / "m", x=b"1")
    entry = save(files)
    save(make_files(tmp_path / "n", x=b"2"), "other:1.0.0")
    (entry.path / broken).write_text("{")
    assert [found.tag for found in ModelStore().list()] == ["other:1.0.0"]
    with pytest.raises(IntegrityError):
        ModelStore().get("demo:1.0.0")
    assert save(files).digest == entry.digest
    ModelStore().verify(ModelStore().get("demo:1.0.0"))


def test_entry_of_somebody_else_is_left_alone(bentoml_home: Path, tmp_path: Path) -> None:
    with bentoml.models.create("demo:1.0.0") as model:
        Path(model.path_of("theirs")).write_text("theirs")
    with pytest.raises(PackagingError, match="did not make"):
        save(make_files(tmp_path / "m", x=b"1"))
    assert Path(bentoml.models.get("demo:1.0.0").path_of("theirs")).read_text() == "theirs"


def test_stray_files_go_when_the_content_is_packaged_again(
    bentoml_home: Path, tmp_path: Path
) -> None:
    files = make_files(tmp_path / "m", x=b"1")
    entry = save(files)
    (entry.path / ".DS_Store").write_text("Finder")
    ModelStore().verify(entry)
    (entry.path / "extra.py").write_text("x = 1")
    with pytest.raises(IntegrityError):
        ModelStore().verify(entry)
    ModelStore().verify(save(files))


def test_hostile_latest_and_manifest(bentoml_home: Path, tmp_path: Path) -> None:
    entry = save(make_files(tmp_path / "m", x=b"1"))
    (entry.path.parent / "latest").write_bytes(b"\xff\xfe")
    assert ModelStore().get("demo").tag == "demo:1.0.0"
    for path in ("5", '"\\ud800"', '"/etc/hostname"', '""'):
        text = f'{{"digest": "", "files": [{{"path": {path}, "size": 1, "sha256": ""}}], '
        (entry.path / FILE_NAME).write_text(
            text + '"kind": "", "framework": "", "base_digest": null, "base_tag": null}'
        )
        with pytest.raises(IntegrityError):
            ModelStore().get("demo:1.0.0")


@pytest.mark.parametrize(
    "hostile",
    [
        "5",
        "labels: {a: 1}\nmetadata: {}\n",
        "labels: {}\nmetadata: [a]\n",
        "labels: {}\nmetadata: {a: !!set {b}}\n",
        "labels: {}\nmetadata: {a: !!timestamp b}\n",
        'labels: {}\nmetadata: {a: "\\ud800"}\n',
        "labels: {}\nmetadata: !!python/object/apply:os.getcwd []\n",
        "labels: {}\nmetadata: &a {b: *a}\n",
        "labels: {}\nmetadata: {a: " + "[" * 5000 + "]" * 5000 + "}\n",
        "labels: {}\nmetadata: {a: " + "x" * 2**20 + "}\n",
        "labels: {}\nmetadata:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)),
    ],
)
def test_hostile_model_yaml(hostile: str, bentoml_home: Path, tmp_path: Path) -> None:
    entry = save(make_files(tmp_path / "m", x=b"1"))
    (entry.path / "model.yaml").write_text(hostile)
    with pytest.raises(IntegrityError, match=r"its model\.yaml cannot be read"):
        ModelStore().get("demo:1.0.0")
    assert ModelStore().list() == []


def test_metadata_that_could_not_be_read_again_is_refused(
    bentoml_home: Path, tmp_path: Path
) -> None:
    files = make_files(tmp_path / "m", x=b"1")
    with pytest.raises(PackagingError, match="longer than"):
        save(files, metadata={"notes": "x" * 2**20})
    with pytest.raises(PackagingError, match="timedelta is no plain type"):
        save(files, metadata={"took": timedelta(hours=1)})
    with pytest.raises(PackagingError, match="too deep"):
        save(files, metadata=json.loads('{"a":' * 99 + "{}" + "}" * 99))
    with pytest.raises(PackagingError, match="rename the file"):
        save([("a\\b", tmp_path / "m" / "x")])
    assert ModelStore().list() == []


READER = textwrap.dedent("""
    import sys
    from mlops.registry import ModelStore, resolve, verify
    entry = ModelStore().get("demo")
    assert ModelStore().has(entry.tag) and ModelStore().find(entry.digest) == entry
    model = resolve(entry.reference, digest=entry.digest)
    verify(model)
    assert "bentoml" not in sys.modules
    print(model.path, entry.labels, entry.metadata)
    import bentoml
    assert ModelStore().get("demo") == entry
""")


def test_reading_does_without_bentoml(bentoml_home: Path, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "m")
    files = [(path.name, path) for path in folder.iterdir()]
    entry = save(files, labels={"team": "ml", "run": "007"}, metadata={"at": date(2025, 10, 22)})
    done = subprocess.run(
        [sys.executable, "-c", READER], capture_output=True, text=True, check=False, timeout=60
    )
    said = f"{entry.path} {{'team': 'ml', 'run': '007'}} {{'at': datetime.date(2025, 10, 22)}}\n"
    assert (done.stderr, done.stdout) == ("", said)


@pytest.mark.parametrize("imports", ["", "import bentoml\n"])
def test_store_that_cannot_be_opened(imports: str, tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.write_text("a file where the store should be")
    code = "from mlops.registry import ModelStore\ntry:\n    ModelStore()\n"
    code += "except Exception as exc:\n    print(type(exc).__name__, exc)\n"
    done = subprocess.run(
        [sys.executable, "-c", imports + code],
        env={**os.environ, "BENTOML_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.startswith("PackagingError the model store cannot be opened: ")
    assert "set BENTOML_HOME" in done.stdout
    assert done.stdout.count("\n") == 1


def test_store_that_a_bento_in_a_container_brings(bentoml_home: Path, tmp_path: Path) -> None:
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore as BundledStore

    (tmp_path / "bento" / "models").mkdir(parents=True)
    BentoMLContainer.model_store.set(BundledStore(tmp_path / "bento" / "models"))
    try:
        entry = save(make_files(tmp_path / "m", x=b"1"))
        assert entry.path == tmp_path / "bento" / "models" / "demo" / "1.0.0"
        assert ModelStore().get("demo").digest == entry.digest
    finally:
        BentoMLContainer.model_store.reset()
    assert ModelStore().list() == []


def test_content_is_stored_once_however_many_entries_have_it(
    bentoml_home: Path, tmp_path: Path
) -> None:
    one = save(make_files(tmp_path / "a", weights=b"w" * 9000, x=b"1"), "one:1.0.0")
    two = save(make_files(tmp_path / "b", weights=b"w" * 9000, x=b"2"), "two:1.0.0")
    assert (one.path / "weights").samefile(two.path / "weights")
    assert len(blobs(bentoml_home)) == 3


def test_blobs_that_nothing_links_to_are_swept(bentoml_home: Path, tmp_path: Path) -> None:
    save(make_files(tmp_path / "a", x=b"old"), "old:1.0.0")
    bentoml.models.delete("old:1.0.0")
    save(make_files(tmp_path / "b", x=b"new"), "new:1.0.0")
    assert [blob.read_bytes() for blob in blobs(bentoml_home)] == [b"new"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def add_file(path: Path) -> None:
    (path.parent / "extra.py").write_text("x = 1")


def claim_other_digest(path: Path) -> None:
    manifest = path.parent / FILE_NAME
    data = json.loads(manifest.read_text())
    data["digest"] = "sha256:" + "0" * 64
    manifest.write_text(json.dumps(data))


def leave_the_folder(path: Path) -> None:
    manifest = path.parent / FILE_NAME
    manifest.write_text(manifest.read_text().replace('"weights"', '"../weights"'))


def link_elsewhere(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, add_file, claim_other_digest, leave_the_folder, link_elsewhere],
)
def test_damage_is_found(damage, bentoml_home: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    entry = save(make_files(tmp_path / "m", weights=b"w" * 5000, config=b"{}"))
    store = ModelStore()
    store.verify(entry)
    damage(entry.path / "weights")
    with pytest.raises(IntegrityError) as caught:
        store.verify(entry, entry.digest)
    assert caught.value.operation
    assert caught.value.details


def test_another_digest_than_the_one_asked_for_is_refused(
    bentoml_home: Path, tmp_path: Path
) -> None:
    entry = save(make_files(tmp_path / "m", weights=b"w"))
    with pytest.raises(IntegrityError, match="its digest is"):
        ModelStore().verify(entry, "sha256:" + "1" * 64)


def test_packaging_a_damaged_entry_again_mends_it(bentoml_home: Path, tmp_path: Path) -> None:
    files = make_files(tmp_path / "m", weights=b"w" * 5000)
    entry = save(files)
    path = entry.path / "weights"
    path.chmod(0o644)
    path.write_bytes(b"v" * 5000)  # in place: the blob is damaged with it
    with pytest.raises(IntegrityError):
        ModelStore().verify(entry)
    ModelStore().verify(save(files))


def test_store_that_cannot_be_written(bentoml_home: Path, tmp_path: Path) -> None:
    bentoml_home.write_text("a file where the store should be")
    with pytest.raises(PackagingError, match="BENTOML_HOME") as caught:
        save(make_files(tmp_path / "m", x=b"1"))
    assert caught.value.details["path"]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of 1 MiB, as Linux can")
def test_disk_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    script = tmp_path / "fill.py"
    script.write_text(
        textwrap.dedent(f"""
        import os
        from pathlib import Path
        from mlops.errors import PackagingError
        from mlops.registry import ModelStore
        weights = Path({str(tmp_path)!r}) / "weights"
        weights.write_bytes(os.urandom(3_000_000))
        try:
            ModelStore().save(
                "big", "1.0.0", [("weights", weights)], kind="language_model", framework="mlx"
            )
        except PackagingError as exc:
            print(exc.operation, "|", exc)
        print(ModelStore().list(), list(Path({str(small)!r}).rglob("*partial*")))
    """)
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m none {small}"
    if subprocess.run([*command, mount], capture_output=True, check=False).returncode != 0:
        pytest.skip(reason="this machine lets nobody mount a small file system to fill")
    done = subprocess.run(
        [*command, f"{mount} && BENTOML_HOME={small} exec {sys.executable} {script}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "create_bento_model | no space left on the disk" in done.stdout, done.stderr
    assert "[] []" in done.stdout


def test_of_eight_writers_of_one_tag_one_wins(bentoml_home: Path, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from mlops.errors import PackagingError
        from mlops.registry import ModelStore
        source = Path(sys.argv[1])
        source.write_bytes(sys.argv[2].encode() * 200_000)
        store = ModelStore()
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            entry = store.save("race", "1.0.0", [("weights", source)], kind="k", framework="mlx")
            print("won", entry.digest)
        except PackagingError as exc:
            print("lost", exc)
    """)
    said = race(script, [[str(tmp_path / f"source{number}"), str(number)] for number in range(8)])
    winners = [line for line in said if line.startswith("won")]
    assert len(winners) == 1, said
    assert sum("lost race:1.0.0 is taken by other content" in line for line in said) == 7
    entry = ModelStore().get("race:1.0.0")
    assert entry.digest == winners[0].split()[1]
    ModelStore().verify(entry)


KILLED = textwrap.dedent("""
    # Kills a writer at its first, second, third, … file operation, until one comes through.
    import os, shutil, signal, sys
    from pathlib import Path
    import bentoml
    from mlops.registry import ModelStore

    events = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.chmod", "shutil.rmtree"}
    home, source = Path(os.environ["BENTOML_HOME"]), Path(sys.argv[1])
    store = ModelStore()

    def save():
        files = [("weights", source / "weights"), ("config", source / "config")]
        return store.save("killed", "1.0.0", files, kind="language_model", framework="mlx")

    def in_child(work):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def save_until(moment):
        count = 0
        def hook(event, args):
            nonlocal count
            if event in events and str(args[0]).startswith(str(home)):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        save()

    moment = 1
    while in_child(lambda: save_until(moment)) == -signal.SIGKILL:
        listed = [str(model.tag) for model in bentoml.models.list()]
        assert listed in ([], ["killed:1.0.0"]), listed
        for entry in store.list():
            store.verify(entry)
        assert in_child(lambda: store.verify(save())) == 0, moment
        assert str(bentoml.models.get("killed:latest").tag) == "killed:1.0.0"
        left = [p for p in (home / "mlops").rglob("*") if "partial" in p.name]
        assert not left and not list((home / "mlops" / "staging").glob("*")), left
        shutil.rmtree(home / "models" / "killed")
        shutil.rmtree(home / "mlops")
        moment += 1
    print("survived", moment - 1)
""")


def test_killed_at_any_moment_the_store_lists_and_a_retry_works(
    bentoml_home: Path, tmp_path: Path
) -> None:
    make_files(tmp_path / "m", weights=b"w" * 300_000, config=b"{}")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "m")],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 10
