"""What happens to the store when somebody deletes, interrupts or kills at the worst moment.

A program of ours is forked again and again. Each child does one operation, and at its first,
second, third, … use of a file something happens to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HARNESS = """
    # Counts how often a process uses a file under `folder`; at the chosen moment calls `strike`.
    import os, sys
    EVENTS = {"open", "os.listdir", "os.scandir", "os.rename", "os.link", "os.mkdir", "os.remove",
              "os.rmdir", "os.chmod", "shutil.rmtree"}

    def in_child(work):
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = work() or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def strike_at(moment, folder, strike):
        left = moment
        def used(path):
            nonlocal left
            if left > 0 and str(path).startswith(str(folder)):
                left -= 1
                if left == 0:
                    strike()
        sys.addaudithook(lambda event, args: event in EVENTS and used(args[0]))
        for name in ("stat", "lstat", "access"):  # of these Python tells no hook
            def counted(path, *args, real=getattr(os, name), **options):
                used(path)
                return real(path, *args, **options)
            setattr(os, name, counted)
        return lambda: left == 0  # whether it came to that
"""


def run(code: str, home: Path, *arguments: object) -> str:
    """Run a program over `HARNESS`; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HARNESS) + textwrap.dedent(code)]
        + [str(argument) for argument in arguments],
        env={
            **os.environ,
            "BENTOML_HOME": str(home),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


DELETE = """
    import shutil
    from pathlib import Path
    import bentoml, fsspec.implementations.local
    from mlops.errors import MLOpsError
    from mlops.hardware import ensure_blas
    ensure_blas()
    from mlops.registry import ModelStore, references, shared
    from mlops.serving.bentoml.packager import package_model
    from mlops.serving.runner import LoRAModelRunner, MLXModelRunner
    from tiny_models import write_language_model, write_lora_adapter

    work, *wanted = Path(sys.argv[1]), *sys.argv[2:]
    home = Path(os.environ["BENTOML_HOME"])
    base, tone, place = work / "base", work / "tone", str(work / "place")

    def make():  # in a child, too: MLX's threads do not survive a fork
        write_language_model(base)
        write_lora_adapter(tone, base)
        without = {"model_version": "1.0.0", "build_bento": False}
        package_model(base, "demo", **without)
        package_model(tone, "tone", base_model="demo:1.0.0", **without)
        shared.publish("tone:1.0.0", place)

    def list_models():
        assert "tone:1.0.0" in [entry.tag for entry in ModelStore().list()]

    def show():
        store = ModelStore()
        store.verify(store.get("demo"))

    def find():
        store = ModelStore()
        store.find(store.get("tone:1.0.0").manifest.base_digest)

    def collect():
        ModelStore().collect_garbage()

    def fetch():
        shared.fetch("tone:1.0.0", None, place)

    def save():
        files = [(path.name, path) for path in base.iterdir()]
        ModelStore().save("demo", "1.0.0", files, kind="language_model", framework="mlx")

    operations = {
        "list": list_models,
        "show": show,
        "find": find,
        "resolve": lambda: references.verify(references.resolve("tone:1.0.0")),
        "gc": collect,
        "digest": lambda: shared.local_digest("tone:1.0.0"),
        "push": lambda: shared.publish("tone:1.0.0", str(work / "elsewhere")),
        "fetch": fetch,
        "save": save,
        "package": lambda: package_model(base, "demo", model_version="1.0.0"),
        "package-adapter": lambda: package_model(tone, "other", base_model="demo:1.0.0"),
        "load": lambda: MLXModelRunner("demo:1.0.0").load_model(),
        "load-adapter": lambda: LoRAModelRunner("tone:1.0.0").load_model(),
    }
    assert in_child(make) == 0
    home.rename(work / "whole")

    def attempt(operation, moment):
        def delete():  # as `bentoml models delete demo:1.0.0` does with the last version
            shutil.rmtree(home / "models" / "demo", ignore_errors=True)
        came_to_it = strike_at(moment, home, delete)
        try:
            operations[operation]()
        except MLOpsError as exc:
            assert operation != "list", exc
            assert str(exc) and "\\n" not in str(exc), exc
            print(type(exc).__name__, exc, file=sys.stderr)
        return 0 if came_to_it() else 7

    for item in wanted:
        operation, stride = item.split("=")
        moment, outcome = 1, 0
        while outcome == 0:
            shutil.rmtree(home, ignore_errors=True)
            shutil.rmtree(work / "elsewhere", ignore_errors=True)
            shutil.copytree(work / "whole", home)
            outcome = in_child(lambda: attempt(operation, moment))
            assert outcome in (0, 7), (operation, moment)
            moment += int(stride)
        print(operation, moment, flush=True)
"""


SOME = "list=13 show=17 push=37"
ALL = (
    "list=1 show=3 find=3 resolve=17 gc=5 digest=17 push=11 fetch=17 save=17 package=151 "
    "package-adapter=151 load=41 load-adapter=41"
)


@pytest.mark.parametrize("sweeps", [SOME, pytest.param(ALL, marks=pytest.mark.long)])
def test_model_deleted_while_it_is_used(sweeps: str, tmp_path: Path) -> None:
    said = run(DELETE, tmp_path / "home", tmp_path, *sweeps.split())
    assert len(said.splitlines()) == len(sweeps.split())


INTERRUPT = """
    import logging, shutil, signal, time
    from pathlib import Path
    import bentoml
    from mlops.registry import ModelStore, references
    from mlops.serving.bentoml.packager import package_model
    from tiny_models import write_language_model, write_lora_adapter

    work, stride = Path(sys.argv[1]), int(sys.argv[2])
    home = Path(os.environ["BENTOML_HOME"])
    base = write_language_model(work / "base")
    tone = write_lora_adapter(work / "tone", base, base_reference=str(base))

    def package():
        package_model(tone, "demo", model_version="1.0.0")

    def attempt(moment):
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("mlops").addHandler(handler)
        before = {entry.tag for entry in ModelStore().list()}
        came_to_it = strike_at(moment, home, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            package()
            time.sleep(0)  # what came at the last moment is noticed here
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for tag in {entry.tag for entry in ModelStore().list()} - before:
            references.verify(references.resolve(tag))
        for bento in bentoml.bentos.list():
            assert all(bentoml.models.get(model.tag) for model in bento.info.all_models)
        package()
        ModelStore().collect_garbage()
        left = [path for path in (home / "mlops").rglob("*") if "partial" in path.name]
        assert not left and not list((home / "mlops" / "staging").glob("*")), left
        assert not list((home / "tmp").glob("*")), "BentoML's own"
        return 0 if came_to_it() else 7

    moment, outcome = 1, 0
    while outcome == 0:
        shutil.rmtree(home, ignore_errors=True)
        outcome = in_child(lambda: attempt(moment))
        assert outcome in (0, 7), moment
        moment += stride
    print(moment)
"""


@pytest.mark.long
def test_packaging_that_is_interrupted_leaves_whole_entries(tmp_path: Path) -> None:
    assert int(run(INTERRUPT, tmp_path / "home", tmp_path, 97)) > 200
