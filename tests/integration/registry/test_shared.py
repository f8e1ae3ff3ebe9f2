"""Publishing to a shared folder and fetching from it, each store as on a machine of its own."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from datetime import date
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import bentoml
import pytest
import typer
from published_bento import TAG, Published
from typer.testing import CliRunner

from mlops.cli.push import push
from mlops.errors import BentoMLError, IntegrityError, PackagingError
from mlops.registry import ModelStore, resolve, shared, verify
from mlops.registry.location import Location
from racing import race


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def run(code: str, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "BENTOML_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


def fetch(published: Published, digest: str | None = None) -> int:
    """Fetch into the store of this process; returns the bytes that came."""
    counted: list[int] = []
    shared.fetch(TAG, digest, str(published.place), progress=counted.append)
    return sum(counted)


def size_of(published: Published) -> int:
    return sum(blob.stat().st_size for blob in (published.place / "blobs").iterdir())


def test_round_trip_into_another_store(published: Published, tmp_path: Path) -> None:
    done = run(
        """
        import sys
        from mlops.registry import ModelStore, resolve, shared, verify
        tag, digest, place = sys.argv[1:]
        shared.fetch(tag, digest, place)
        for entry in ModelStore().list():
            verify(resolve(entry.reference))
            print(entry.tag, dict(entry.labels))
        assert shared.local_digest(tag) == digest
        import bentoml
        bento = bentoml.bentos.get(tag)
        print(bento.tag, bentoml.bentos.get("demo").tag, len(bento.info.all_models))
        print(bentoml.load(tag).name)
        assert shared.local_digest(tag) == digest  # what Python compiled in it does not count
        """,
        tmp_path / "other",
        TAG,
        published.digest,
        published.place,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["demo", "demo-style", "demo-tone"]
    assert lines[0] == f"{TAG} {{'project': 'default'}}"
    assert lines[3:] == [f"{TAG} {TAG} 3", "demo"]
    for path in ("bentos/demo/1.0.0/src/service.py", "models/demo/1.0.0/model.safetensors"):
        assert (tmp_path / "other" / path).read_bytes() == (published.home / path).read_bytes()
    assert not list((tmp_path / "other" / "mlops" / "staging").glob("*"))


def test_what_is_here_is_neither_downloaded_nor_asked_for(
    bentoml_home: Path, published: Published
) -> None:
    assert fetch(published, published.digest) == size_of(published)
    before = state(bentoml_home)
    assert fetch(published) == 0
    shutil.rmtree(published.place)
    assert fetch(published, published.digest) == 0
    assert state(bentoml_home) == before


def test_fetching_what_is_here_does_without_bentoml(
    bentoml_home: Path, published: Published
) -> None:
    fetch(published)
    done = run(
        """
        import sys
        from mlops.registry import shared
        shared.fetch(sys.argv[1], sys.argv[2], sys.argv[3])
        print([name for name in ("bentoml", "fsspec") if name in sys.modules])
        """,
        bentoml_home,
        TAG,
        published.digest,
        published.place,
    )
    assert (done.stderr, done.stdout) == ("", "[]\n")


def test_publishing_again_writes_nothing_and_counts_everything(
    bentoml_home: Path, published: Published, tmp_path: Path
) -> None:
    fetch(published)
    before = state(published.place)
    counted: list[int] = []
    digest = shared.publish(TAG, str(published.place), progress=counted.append)
    assert digest == published.digest
    assert sum(counted) == size_of(published)
    assert state(published.place) == before
    counted.clear()
    assert shared.publish(TAG, f"file://{tmp_path}/new", progress=counted.append) == digest
    assert sum(counted) == size_of(published)
    assert {path.name for path in (tmp_path / "new" / "blobs").iterdir()} == {
        path.name for path in (published.place / "blobs").iterdir()
    }


def test_blob_of_another_size_is_written_again(bentoml_home: Path, published: Published) -> None:
    fetch(published)
    blob = published.blob("model.safetensors")
    content = blob.read_bytes()
    blob.write_bytes(content[:-1])
    shared.publish(TAG, str(published.place))
    assert blob.read_bytes() == content


def save(tag: str, folder: Path, **contents: bytes) -> str:
    """Store a model of a few files; returns its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = [(path.name, path) for path in sorted(folder.iterdir())]
    name, _, version = tag.partition(":")
    return ModelStore().save(name, version, files, kind="language_model", framework="mlx").digest


def test_tag_that_is_published_does_not_change(
    bentoml_home: Path, published: Published, tmp_path: Path
) -> None:
    save(TAG, tmp_path / "m", weights=b"w")
    before = state(published.place)
    with pytest.raises(PackagingError, match=r"demo:1\.0\.0 is published at .* other content"):
        shared.publish(TAG, str(published.place))
    assert state(published.place) == before


def test_tag_that_the_store_has_does_not_change(
    bentoml_home: Path, published: Published, tmp_path: Path
) -> None:
    digest = save(TAG, tmp_path / "m", weights=b"w")
    before = state(bentoml_home)
    with pytest.raises(PackagingError, match=r"has another demo:1\.0\.0 than .*; delete it there"):
        fetch(published, published.digest)
    assert state(bentoml_home) == before
    assert ModelStore().get(TAG).digest == digest


def test_changed_code_of_a_bento_is_noticed(bentoml_home: Path, published: Published) -> None:
    fetch(published)
    service = bentoml_home / "bentos" / "demo" / "1.0.0" / "src" / "service.py"
    source = service.read_bytes()
    service.unlink()
    service.write_bytes(source + b"#")
    assert shared.local_digest(TAG) != published.digest
    with pytest.raises(PackagingError, match=r"has another demo:1\.0\.0"):
        fetch(published, published.digest)
    assert service.read_bytes() == source + b"#"


def test_damaged_model_is_mended(bentoml_home: Path, published: Published) -> None:
    fetch(published)
    weights = bentoml_home / "models" / "demo" / "1.0.0" / "model.safetensors"
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-1])  # in place: the blob is damaged with it
    with pytest.raises(IntegrityError, match=r"model\.safetensors has changed"):
        shared.local_digest(TAG)
    came = fetch(published, published.digest)
    assert came < size_of(published)
    verify(resolve(TAG))
    assert fetch(published, published.digest) == 0


def test_adapter_comes_with_its_base(
    bentoml_home: Path, packaged: Published, tmp_path: Path
) -> None:
    (tone,) = (packaged.home / "models" / "demo-tone").glob("*/model.yaml")
    tag = f"demo-tone:{tone.parent.name}"
    done = run(
        "import sys; from mlops.registry import shared; print(shared.publish(*sys.argv[1:]))",
        packaged.home,
        tag,
        tmp_path / "place",
    )
    shared.fetch(tag, done.stdout.strip(), str(tmp_path / "place"))
    model = resolve(tag)
    verify(model)
    assert model.base is not None
    assert model.base.tag == TAG
    assert bentoml.bentos.list() == []


def test_model_that_this_toolkit_did_not_make(bentoml_home: Path, tmp_path: Path) -> None:
    with bentoml.models.create("theirs:1", labels={"team": "ml"}) as model:
        (Path(model.path) / "deep").mkdir()
        Path(model.path_of("deep/weights")).write_bytes(b"w" * 1000)
    digest = shared.publish("theirs:1", str(tmp_path / "place"))
    bentoml.models.delete("theirs:1")
    for _ in range(2):
        shared.fetch("theirs:1", digest, str(tmp_path / "place"))
    assert bentoml.models.get("theirs").info.labels == {"team": "ml"}
    assert shared.local_digest("theirs:1") == digest
    (bentoml_home / "models" / "theirs" / "1" / "link").symlink_to("/etc/hostname")
    with pytest.raises(PackagingError, match="'link' in .* is a link"):
        shared.publish("theirs:1", str(tmp_path / "place"))


def test_labels_and_metadata_come_along(bentoml_home: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w" * 20_000_000)  # several reads
    entry = ModelStore().save(
        "big",
        "1",
        [("weights", tmp_path / "weights")],
        kind="language_model",
        framework="mlx",
        labels={"team": "ml"},
        metadata={"date": date(2025, 10, 22), "loss": {"train": [0.5, 1]}},
    )
    digest = shared.publish("big:1", str(tmp_path / "place"))
    bentoml.models.delete("big:1")
    shared.fetch("big:1", digest, str(tmp_path / "place"))
    again = ModelStore().get("big:1")
    ModelStore().verify(again, entry.digest)
    assert (again.digest, again.labels) == (entry.digest, {"team": "ml"})
    assert again.metadata == {"date": "2025-10-22", "loss": {"train": [0.5, 1]}}
    assert shared.local_digest("big:1") == digest


def test_of_four_processes_one_downloads(published: Published, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from mlops.registry import shared
        print("ready", flush=True)
        sys.stdin.readline()
        counted = []
        shared.fetch(*sys.argv[1:], progress=counted.append)
        print(sum(counted), shared.local_digest(sys.argv[1]))
    """)
    given = [TAG, published.digest, str(published.place)]
    env = {**os.environ, "BENTOML_HOME": str(tmp_path / "home")}
    said = [told.split() for told in race(script, [given] * 4, env)]
    assert sorted(int(num_bytes) for num_bytes, _ in said) == [0, 0, 0, size_of(published)]
    assert {digest for _, digest in said} == {published.digest}


KILLED = """
    # Kills a process at every so many-th file operation below a folder, until it comes through.
    import os, shutil, signal, sys
    from pathlib import Path
    import bentoml
    from mlops.registry import ModelStore, shared

    EVENTS = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.chmod", "shutil.rmtree"}
    tag, digest, place = sys.argv[1:]
    home = Path(os.environ["BENTOML_HOME"])

    def in_child(work):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def killed_at(moment, folder, work):
        def killed():
            count = 0
            def hook(event, args):
                nonlocal count
                if event in EVENTS and str(args[0]).startswith(str(folder)):
                    count += 1
                    if count >= moment:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            work()
        return in_child(killed) == -signal.SIGKILL
"""
KILLED_FETCH = """
    def fetch():
        shared.fetch(tag, digest, place)

    moment = 1
    while killed_at(moment, home, fetch):
        listed = [str(bento.tag) for bento in bentoml.bentos.list()]
        assert listed in ([], [tag]), listed
        assert not listed or shared.local_digest(tag) == digest
        for entry in ModelStore().list():
            ModelStore().verify(entry)
        had = {blob: blob.stat().st_ino for blob in (home / "mlops" / "blobs").glob("[0-9]*")}
        assert in_child(fetch) == 0, moment
        assert shared.local_digest(tag) == digest
        assert had == {blob: blob.stat().st_ino for blob in had}, "it went on with what it had"
        ModelStore().collect_garbage()
        left = [path for path in (home / "mlops").rglob("*") if "partial" in path.name]
        assert not left and not list((home / "mlops" / "staging").glob("*")), left
        shutil.rmtree(home / "mlops")
        for folder in [*(home / "models").iterdir(), *(home / "bentos").iterdir()]:
            shutil.rmtree(folder)
        moment += 9
    print(moment)
"""
KILLED_PUBLISH = """
    place = Path(place)

    def publish():
        shared.publish(tag, str(place))

    moment = 1
    while killed_at(moment, place, publish):
        for blob in (place / "blobs").glob("[0-9]*"):
            assert blob.stat().st_size == int(blob.name.partition("-")[0]), blob
        indexes = list((place / "index").rglob("*.json"))
        assert not indexes or shared.publish(tag, str(place)) == digest
        assert in_child(publish) == 0, moment
        assert shared.publish(tag, str(place)) == digest
        assert not list(place.rglob("partial-*")), moment
        shutil.rmtree(place)
        moment += 9
    print(moment)
"""


def test_fetch_that_is_killed_is_found_and_finished(published: Published, tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED) + textwrap.dedent(KILLED_FETCH)
    done = run(code, tmp_path / "home", TAG, published.digest, published.place)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


def test_publish_that_is_killed_leaves_no_index(packaged: Published, tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED) + textwrap.dedent(KILLED_PUBLISH)
    done = run(code, packaged.home, TAG, packaged.digest, tmp_path / "place")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def fails(published: Published, kind: type[BentoMLError], digest: str | None = None) -> str:
    """What a fetch that must fail says; nothing of it may stay."""
    with pytest.raises(kind) as caught:
        fetch(published, digest)
    assert type(caught.value) is kind
    assert caught.value.details["tag"] == TAG
    message = str(caught.value)
    assert TAG in message
    assert "\n" not in message
    store = ModelStore()
    assert not [*store.models.iterdir(), *store.bentos.iterdir()]
    assert not list(store.blobs.folder.glob("*"))
    return message


def flip(blob: Path) -> None:
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)


def truncate(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes()[:-1])


def lengthen(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes() + b"0")


def link_elsewhere(blob: Path) -> None:
    blob.rename(blob.with_name("elsewhere"))
    blob.symlink_to(blob.with_name("elsewhere"))


def make_pipe(blob: Path) -> None:
    blob.unlink()
    os.mkfifo(blob)


@pytest.mark.parametrize(
    "damage", [flip, truncate, lengthen, Path.unlink, link_elsewhere, make_pipe]
)
def test_damaged_blob(
    damage: Callable[[Path], None], bentoml_home: Path, published: Published
) -> None:
    blob = published.blob("model.safetensors")
    damage(blob)
    message = fails(published, IntegrityError, published.digest)
    assert f"blobs/{blob.name}, for model.safetensors" in message


def test_index_with_another_digest(bentoml_home: Path, published: Published) -> None:
    wanted = "sha256:" + "0" * 64
    message = fails(published, IntegrityError, wanted)
    assert f"index/demo/1.0.0.json has the digest {published.digest}, not {wanted}" in message


def change(path: str, value: Any) -> Callable[[Path], None]:
    """A change to one place of the index, such as `models/0/tag`."""

    def change_index(index: Path) -> None:
        content = json.loads(index.read_text())
        place, *parts = content, *path.split("/")
        for part in parts[:-1]:
            place = place[int(part) if isinstance(place, list) else part]
        place[int(parts[-1]) if isinstance(place, list) else parts[-1]] = value
        index.write_text(json.dumps(content))

    return change_index


def write(text: str) -> Callable[[Path], None]:
    return lambda index: index.write_text(text) and None


def repeat_a_model(index: Path) -> None:
    content = json.loads(index.read_text())
    content["models"].append(content["models"][0])
    index.write_text(json.dumps(content))


def make_huge(index: Path) -> None:
    os.truncate(index, 2**40)  # a sparse file


DEEP = json.loads("[" * 100 + "]" * 100)


@pytest.mark.parametrize(
    "damage",
    [
        *(
            change(f"{where}/path", path)
            for where in ("files/0", "models/0/manifest/files/0")
            for path in (
                "../x",
                "/etc/x",
                "a\\b",
                "a\nb",
                "",
                ".",
                "a/../x",
                "./a",
                "a//b",
                5,
                None,
            )
        ),
        *(
            change(f"files/0/{name}", value)
            for name, value in (("size", -1), ("size", "1"), ("size", True), ("sha256", "../" * 22))
        ),
        change("files/0/more", 1),
        change("files/0", {"path": "bento.yaml", "size": 0, "sha256": "0" * 64}),
        change("files", []),
        change("files", None),
        change("format", 2),
        change("tag", "other:1.0.0"),
        change("tag", "../x:1"),
        change("kind", "model"),
        change("kind", None),
        change("models", {}),
        change("models/0/tag", "../../x:1"),
        change("models/0/tag", "demo:latest"),
        change("models/0/tag", None),
        change("models/0/manifest", None),
        change("models/0/manifest", []),
        change("models/0/manifest/kind", 5),
        change("models/0/manifest/base_digest", 5),
        change("models/0/manifest/files/0/path", "model.yaml"),
        change("models/0/manifest/files/0/path", "MLOPS-manifest.json"),
        change("models/0/labels", {"a": 1}),
        change("models/0/labels", {"a": "\ud800"}),
        change("models/0/metadata", []),
        change("models/0/metadata", {"a": "\ud800"}),
        change("models/0/metadata", {"a": DEEP}),
        repeat_a_model,
        make_huge,
        write(""),
        write("[]"),
        write("[" * 100_000),
        write('{"format": ' + "9" * 5000 + "}"),
    ],
)
def test_hostile_index(
    damage: Callable[[Path], None], bentoml_home: Path, published: Published
) -> None:
    damage(published.index)
    message = fails(published, IntegrityError)
    assert "index/demo/1.0.0.json" in message


def test_index_or_place_that_is_not_there(bentoml_home: Path, published: Published) -> None:
    link_elsewhere(published.index)
    message = fails(published, PackagingError)
    assert f"publish it with `mlops push {TAG} {published.place}`" in message
    shutil.rmtree(published.place)
    assert "has no demo:1.0.0" in fails(published, PackagingError)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("", "no path and no URL"),
        ("nowhere://bucket", "Protocol not known"),
        ("ftp://user:secret@127.0.0.1:1/models?token=secret", "Connection refused"),
        ("/dev/null", "Not a directory"),
        ("/proc/models", "No such file|Read-only|denied"),
    ],
)
def test_place_that_cannot_be_used(
    location: str, reason: str, bentoml_home: Path, tmp_path: Path
) -> None:
    save(TAG, tmp_path / "m", weights=b"w")
    with pytest.raises(PackagingError, match=reason) as caught:
        shared.publish(TAG, location)
    assert str(caught.value).startswith("the shared store at ")
    assert "\n" not in str(caught.value)
    assert "secret" not in f"{caught.value} {caught.value.details}"


class Failing(SimpleHTTPRequestHandler):
    """Serves a folder; how often each file is still to be refused, and what was read."""

    refusals: ClassVar[dict[str, int]] = {}
    reads: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        left = self.refusals.get(self.path, self.refusals.get("", 0))
        if left:
            self.refusals[self.path] = left - 1
            self.send_error(503)
        else:
            self.reads.append(self.path)
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def failing(published: Published) -> Iterator[str]:
    Failing.refusals.clear()
    Failing.reads.clear()
    handler = functools.partial(Failing, directory=str(published.place))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_read_that_fails_twice_is_tried_again(
    bentoml_home: Path, published: Published, failing: str
) -> None:
    Failing.refusals[""] = 2
    shared.fetch(TAG, published.digest, failing)
    assert shared.local_digest(TAG) == published.digest


def test_read_that_fails_for_good_keeps_what_came(
    bentoml_home: Path, published: Published, failing: str
) -> None:
    blob = f"/blobs/{published.blob('model.safetensors').name}"
    Failing.refusals[blob] = 3
    with pytest.raises(PackagingError, match="cannot be used: 503") as caught:
        shared.fetch(TAG, published.digest, failing)
    assert "\n" not in str(caught.value)
    assert ModelStore().list() == bentoml.bentos.list() == []
    first = set(Failing.reads)
    Failing.reads.clear()
    shared.fetch(TAG, published.digest, failing)
    assert blob in Failing.reads
    assert {path for path in first & set(Failing.reads) if "/blobs/" in path} == set()


def test_library_that_is_not_installed(bentoml_home: Path) -> None:
    code = """
        import sys
        sys.modules["s3fs"] = None  # as if it were not
        from mlops.errors import MissingDependencyError
        from mlops.registry import shared
        try:
            shared.fetch("demo:1.0.0", None, "s3://bucket/models")
        except MissingDependencyError as exc:
            print(exc)
    """
    done = run(code, bentoml_home)
    assert done.stdout.startswith("s3fs is not installed; install it with: "), done.stderr
    assert done.stdout.endswith("pip install 's3fs>=2026.1'\n") or "--python" in done.stdout


@pytest.mark.parametrize("tag", ["demo", "demo:latest", "../x:1", "demo:1.0.0@sha256:0", ""])
def test_tag_that_names_no_version(tag: str, bentoml_home: Path, tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match="give NAME:VERSION|there is no Bento and no model"):
        shared.publish(tag, str(tmp_path))
    for call in (
        lambda: shared.fetch(tag, None, str(tmp_path)),
        lambda: shared.local_digest(tag),
    ):
        with pytest.raises(PackagingError, match="give NAME:VERSION"):
            call()
    with pytest.raises(PackagingError, match="no model 'nothing:1'"):
        shared.local_digest("nothing:1")


def test_of_two_writers_of_an_index_the_first_wins(tmp_path: Path) -> None:
    place = Location(str(tmp_path / "place"))
    place.create("index/demo/1.json", b"first", 0o444)
    place.create("index/demo/1.json", b"second", 0o444)
    assert b"".join(place.read("index/demo/1.json", 100)) == b"first"
    assert [path.name for path in (tmp_path / "place").rglob("*.*")] == ["1.json"]


def test_push_on_the_command_line(bentoml_home: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(push)
    save(TAG, tmp_path / "m", weights=b"w")
    done = CliRunner().invoke(app, [TAG, f"file://{tmp_path}/place?token=secret"])
    assert done.exit_code == 0, done.output
    digest = shared.local_digest(TAG)
    assert done.stdout.splitlines() == [
        f"pushed  {TAG}",
        f"        {digest}",
        f"to      file://{tmp_path}/place",
    ]
