"""Who may read what is made of a private model: nobody who could not read the model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlops.registry import ModelStore, StoredModel
from mlops.registry.readers import EVERYONE, GROUP, OWNER, readers_of

MODES = (0o600, 0o640, 0o644)
READERS = {0o600: OWNER, 0o640: GROUP, 0o644: EVERYONE}
ALLOWED_BY = {0o022: EVERYONE, 0o077: OWNER, 0o027: GROUP}

# Each child has a umask and a store of its own: one packages and publishes, another fetches.
PROGRAM = """
    import os, sys
    from pathlib import Path
    from mlops.registry import shared
    from mlops.serving.bentoml.packager import package_model
    from tiny_models import write_language_model, write_lora_adapter
    folder, *umasks = Path(sys.argv[1]), *(int(umask) for umask in sys.argv[2:])

    def in_child(umask, home, work):
        child = os.fork()
        if child == 0:
            try:
                os.umask(umask)
                os.environ["BENTOML_HOME"] = str(home)
                work()
                os._exit(0)
            finally:
                import traceback
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0

    for seed, mode in enumerate((0o600, 0o640, 0o644), 1):
        model = write_language_model(folder / f"m{mode:o}", seed=seed)
        adapter = write_lora_adapter(folder / f"a{mode:o}", model, seed=seed)
        for path in (*model.iterdir(), *adapter.iterdir()):
            path.chmod(mode)

    for umask in umasks:
        place = folder / f"place{umask:o}"
        tags = [f"m{mode:o}:1.0.0" for mode in (0o600, 0o640, 0o644)]
        def package():
            for tag in tags:
                model = folder / tag.partition(":")[0]
                adapters = {"tone": folder / f"a{model.name[1:]}"}
                package_model(model, model_version="1.0.0", adapters=adapters)
                shared.publish(tag, str(place))
        def fetch():
            for tag in tags:
                shared.fetch(tag, None, str(place))
        in_child(umask, folder / f"home{umask:o}", package)
        in_child(umask, folder / f"node{umask:o}", fetch)
"""

# Somebody else, who belongs to no group of ours: the files that he can read.
STRANGER = """
    import os, sys
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for folder, _, names in os.walk(sys.argv[1]):
        for name in names:
            path = os.path.join(folder, name)
            try:
                open(path, "rb").close()
                print(path)
            except PermissionError:
                pass
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stored() -> Iterator[Path]:
    """Where `PROGRAM` ran; not below pytest's own folder, which nobody else may look into."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        run(PROGRAM, folder, *ALLOWED_BY)
        yield folder
    finally:
        shutil.rmtree(folder)


def places(stored: Path, umask: int, mode: int) -> list[Path]:
    """All files and folders that were made of the model whose files have this mode."""
    found = []
    for store in (stored / f"home{umask:o}", stored / f"node{umask:o}"):
        for kind in ("models", "bentos"):
            for version in (store / kind).glob(f"m{mode:o}*/*"):
                if version.is_dir():
                    found += [version, *version.rglob("*")]
    place = stored / f"place{umask:o}"
    weights = {path.read_bytes() for path in stored.glob(f"[ma]{mode:o}/*.safetensors")}
    everything = [path for path in stored.glob(f"*{umask:o}/**/*-*") if path.is_file()]
    found += [path for path in everything if path.read_bytes() in weights]
    return [*found, *(place / "index" / f"m{mode:o}").iterdir()]


@pytest.mark.parametrize("umask", ALLOWED_BY)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_made_has_the_readers_of_the_source(stored: Path, umask: int, mode: int) -> None:
    made = places(stored, umask, mode)
    assert len(made) > 60
    wanted = READERS[mode] & ALLOWED_BY[umask]
    assert {path: readers_of(path.lstat()) for path in made} == dict.fromkeys(made, wanted)
    own = [path for path in made if path.is_file() and "bentos" not in path.parts]
    assert not [path for path in own if path.stat().st_mode & 0o022]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else for a moment")
def test_somebody_else_reads_what_he_may(stored: Path) -> None:
    readable = {Path(line) for line in run(STRANGER, stored).splitlines()}
    for umask in ALLOWED_BY:
        for mode in MODES:
            files = {path for path in places(stored, umask, mode) if path.is_file()}
            is_open = (umask, mode) == (0o022, 0o644)
            assert files & readable == (files if is_open else set()), (umask, mode)


def make(folder: Path, mode: int, content: bytes = b"w" * 1000) -> list[tuple[str, Path]]:
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_bytes(content)
    (folder / "weights").chmod(mode)
    return [("weights", folder / "weights")]


def save(files: list[tuple[str, Path]], tag: str) -> StoredModel:
    name, _, version = tag.partition(":")
    return ModelStore().save(name, version, files, kind="language_model", framework="mlx")


@pytest.mark.parametrize("order", [MODES, MODES[::-1]])
def test_entries_with_the_same_bytes_keep_their_own_readers(
    order: tuple[int, ...], bentoml_home: Path, tmp_path: Path
) -> None:
    entries = {mode: save(make(tmp_path / f"{mode:o}", mode), f"m{mode:o}:1") for mode in order}
    assert len({entry.digest for entry in entries.values()}) == 1
    for mode, entry in entries.items():
        assert readers_of((entry.path / "weights").stat()) == READERS[mode]
        assert readers_of(entry.path.stat()) == READERS[mode]
        ModelStore().verify(entry)


def test_entry_keeps_its_readers_and_says_so(
    bentoml_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = make(tmp_path / "m", 0o644)
    entry = save(files, "demo:1")
    files[0][1].chmod(0o600)
    assert not save(files, "demo:1").created
    assert readers_of(entry.path.stat()) == EVERYONE
    assert "demo:1 stays readable to everyone, as it was stored" in caplog.text


def test_mending_a_private_entry_keeps_it_private(bentoml_home: Path, tmp_path: Path) -> None:
    files = make(tmp_path / "m", 0o600)
    entry = save(files, "demo:1")
    (entry.path / "weights").unlink()
    files[0][1].chmod(0o644)
    save(files, "demo:1")
    ModelStore().verify(entry)
    assert readers_of((entry.path / "weights").stat()) == OWNER


def test_folder_and_group_of_the_source_count(bentoml_home: Path, tmp_path: Path) -> None:
    closed = make(tmp_path / "closed", 0o644)
    (tmp_path / "closed").chmod(0o700)
    assert readers_of(save(closed, "closed:1").path.stat()) == OWNER
    if os.getuid() == 0:  # only root can give a file to any group
        theirs = make(tmp_path / "theirs", 0o640)
        os.chown(theirs[0][1], -1, 65534)
        assert readers_of(save(theirs, "theirs:1").path.stat()) == OWNER


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else for a moment")
def test_entry_that_may_not_be_read_is_said_to_be_so(stored: Path) -> None:
    said = run(
        """
        import os, sys, yaml
        from mlops.errors import PackagingError
        from mlops.registry import ModelStore
        os.environ["BENTOML_HOME"] = sys.argv[1]
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        print(*(entry.tag for entry in ModelStore().list() if "tone" not in entry.tag))
        try:
            ModelStore().get("m600:1.0.0")
        except PackagingError as exc:
            print(exc)
        """,
        stored / "home22",
    )
    listed, refused = said.splitlines()
    assert listed == "m644:1.0.0"
    assert refused.startswith("this user may not read m600:1.0.0 in the store at")


# Two users who trust a folder to each other, and not their models.
TWO_USERS = """
    import os, sys
    from pathlib import Path
    from bentoml_store import look_again
    from mlops.errors import PackagingError
    from mlops.registry import ModelStore, shared

    def at_home(work):
        os.environ["BENTOML_HOME"] = str(folder / f"home{os.getuid()}")
        look_again()
        work()

    def in_child(uid, work):
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            try:
                at_home(work)
                os._exit(0)
            except PackagingError as refused:
                print(refused, flush=True)
                os._exit(3)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    folder = Path(sys.argv[1])
    place = folder / "root's"

    def push(tag, mode):
        weights = folder / f"home{os.getuid()}.bin"
        weights.write_bytes(b"the same for both")
        weights.chmod(mode)
        files = [("weights.bin", weights)]
        ModelStore().save(*tag.split(":"), files, kind="custom", framework="custom")
        shared.publish(tag, str(place))

    # First as root: the others may not be able to read what is imported.
    at_home(lambda: push("zero:1.0.0", 0o644))
    at_home(lambda: shared.fetch("zero:1.0.0", None, str(place)))

    place = folder / "place"
    for shared_folder in (place, place / "blobs", place / "index"):
        shared_folder.mkdir()
        shared_folder.chmod(0o777)

    folder.chmod(0o777)
    print([
        in_child(3001, lambda: push("one:1.0.0", 0o600)),
        in_child(3002, lambda: push("two:1.0.0", 0o600)),
        in_child(3001, lambda: shared.fetch("one:1.0.0", None, str(place))),
        in_child(3002, lambda: push("two:2.0.0", 0o644)),
    ])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else for a moment")
def test_a_push_that_its_user_could_not_fetch_is_refused() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        refused, codes = run(TWO_USERS, folder).splitlines()
    finally:
        shutil.rmtree(folder)
    assert "another user has pushed weights.bin" in refused
    assert codes == "[0, 3, 0, 0]"
