"""What holds for every command: help, examples, options, messages. A new command is found here."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from mlops.cli import app, console, main
from mlops.registry import ModelStore

# Their help is in the words of a module of its own.
CLUSTER = {"deploy", "status", "scale", "undeploy"}
PRINT_A_RESULT = {
    *("package", "predict", "push", "gc", "doctor", "deploy", "status", "scale", "undeploy"),
    *("models list", "models show"),
}


def find_commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from find_commands(inner, f"{name} {word}".strip())


COMMANDS = dict(find_commands(typer.main.get_command(app)))
LEAVES = {name: one for name, one in COMMANDS.items() if not hasattr(one, "commands")}


class Ended(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`mlops` with these arguments, as a shell would see it end."""
    monkeypatch.delenv("MLOPS_DEBUG", raising=False)

    def run_main(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mlops", *arguments])
        try:
            main()
            status: Any = 0
        except SystemExit as ended:
            status = ended.code or 0
        return Ended(status, *capsys.readouterr())

    return run_main


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_help(run: Run, name: str) -> None:
    short, long = run(*name.split(), "-h"), run(*name.split(), "--help")
    assert short == long
    assert (short.status, short.err) == (0, "")
    assert short.out.startswith(f"Usage: mlops {name}".strip())
    assert "-h, --help" in short.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_wraps_at_the_width_of_a_terminal_and_not_at_all_in_a_pipe(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    help_texts = [one.help for one in COMMANDS[name].params if getattr(one, "help", None)]
    in_a_pipe = run(*name.split(), "-h").out
    for text in help_texts:
        assert text in in_a_pipe
    monkeypatch.setattr(console, "width", lambda: 60)
    in_a_terminal = run(*name.split(), "-h").out.partition("Example")[0]
    assert max(map(len, in_a_terminal.splitlines())) <= 60


def examples_of(name: str, text: str) -> list[list[str]]:
    """The arguments of each example, without what the shell makes of the line's end."""
    lines = [line.strip().removeprefix("Example: ") for line in text.splitlines()]
    found = [line for line in lines if line.startswith(f"mlops {name}")]
    return [shlex.split(re.split(r" (?:<|>|&&|\|) ", line)[0])[1:] for line in found]


@pytest.mark.parametrize("name", LEAVES)
def test_help_has_examples_that_can_be_typed(run: Run, name: str) -> None:
    examples = examples_of(name, run(*name.split(), "-h").out.partition("Example")[2] or "")
    if not examples:  # all on one line
        examples = examples_of(name, LEAVES[name].epilog)
    assert examples
    for arguments in examples:
        words = name.split()
        assert arguments[: len(words)] == words
        # Raises for an option or an argument that there is not; does not call the command.
        LEAVES[name].make_context(name, arguments[len(words) :])


@pytest.mark.parametrize("name", sorted(set(LEAVES) - CLUSTER))
def test_help_names_no_python(run: Run, name: str) -> None:
    usage, *_ = (text := run(*name.split(), "-h").out).splitlines()
    assert not re.search(r"\{[a-z_]+\}", usage), usage
    described = re.sub(r"\b[A-Z]+(_[A-Z]+)+\b", "", text.partition("Example")[0])  # the environment
    assert not re.search(r"\w_\w|Config\b|=True|=False", described)


def test_results_can_be_had_as_json() -> None:
    has_json = {name for name, one in LEAVES.items() if any("--json" in p.opts for p in one.params)}
    assert has_json == PRINT_A_RESULT


@pytest.mark.parametrize("name", [*COMMANDS, "no-such-command"])
def test_a_mistyped_command_line_is_status_2_and_prints_nothing(run: Run, name: str) -> None:
    ended = run(*name.split(), "--no-such-option")
    if name == "run":  # what it does not know belongs to the program that it starts
        assert ended.status == 127
    else:
        assert ended.status == 2
        assert "Try 'mlops" in ended.err
    assert ended.out == ""


def refused(run: Run, *arguments: str) -> str:
    """The one sentence of an error."""
    ended = run(*arguments)
    assert (ended.status, ended.out) == (1, "")
    (sentence,) = ended.err.splitlines()
    return sentence


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a folder that is no model, in the working folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "bad.yaml").write_text("workers: 0\n")
    (tmp_path / "odd.yaml").write_text("worker: 2\nhttp: {}\n")
    (tmp_path / "odder.yaml").write_text("http: {keys: x}\n")
    monkeypatch.chdir(tmp_path)
    return "model"


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (["--framework", "torch"], "--framework 'torch' is not one of mlx, pytorch,"),
        (["--version", "1.0"], "--version '1.0' is not a version: use major.minor.patch"),
        (["--version", "b65e4e139dbe"], "--version 'b65e4e139dbe' is not a version"),
        (["--version", "latest"], "--version 'latest' is not a version"),
        (["--name", "a$b"], "--name 'a$b' is not a name: use letters"),
        (["--service-name", ""], "--service-name '' is not a name"),
        (["--project", "a\tb"], r"--project 'a\tb' is not a name"),
        (["--adapter", "base=x"], "'base' is no name for an adapter"),
        (["--config", "bad.yaml"], "bad.yaml: workers = 0 is not allowed; use a whole number"),
        (["--config", "odd.yaml"], "odd.yaml: there is no setting 'worker' (given as 2); did you"),
        (["--config", "odder.yaml"], "http has no setting 'keys'"),
        (["--config", "none.yaml"], "none.yaml cannot be read"),
    ],
)
def test_package_speaks_of_what_was_typed(
    run: Run, bentoml_home: Path, model: str, options: list[str], begins: str
) -> None:
    sentence = refused(run, "package", model, *options)
    assert sentence.removeprefix("odder.yaml: ").startswith(begins)
    assert not re.search(r"BentoMLConfig|PackageConfig|Options\b|Framework", sentence)


@pytest.mark.parametrize(
    "arguments",
    [
        ["package", "model", "--adapter", "formal"],
        ["package", "model", "--adapter", "=x"],
        ["package", "model", "--adapter", "formal="],
        ["package", "model", "--adapter", "a=x", "--adapter", "a=y"],
        ["package", "model", "--label", "stage"],
        ["package", "model", "--label", "stage=a", "--label", "stage=b"],
        ["package", "model", "--docker", "--no-bento"],
        ["serve", "model", "--adapter", "formal"],
        ["serve", "model", "--adapter", "a=x", "--adapter", "a=y"],
        ["serve", "model", "--max-batch-size", "0"],
        ["serve", "model", "--port", "65536"],
        ["serve", "model", "--workers", "0"],
        ["predict", "Hello", "--json", "--stream"],
        ["predict", "Hello", "--max-tokens", "0"],
        ["predict", "Hello", "--temperature", "-1"],
        ["chat", "--max-tokens", "0"],
    ],
)
def test_options_that_cannot_be(run: Run, model: str, arguments: list[str]) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.splitlines()[-1].startswith("Error: Invalid value")


@pytest.fixture
def stored(bentoml_home: Path, tmp_path: Path) -> Path:
    """`chat:2.0.0` and then `chat:1.0.0` in the store, of the projects `one` and `two`."""
    for version, project in (("2.0.0", "one"), ("1.0.0", "two")):
        file = tmp_path / f"weights-{version}"
        file.write_text(version)
        ModelStore().save(
            "chat",
            version,
            [("weights", file)],
            kind="language_model",
            framework="mlx",
            labels={"project": project},
        )
    return tmp_path


@pytest.mark.parametrize("name", ["chat", "chat:latest"])
def test_a_name_is_the_version_that_was_made_last(run: Run, stored: Path, name: str) -> None:
    assert '"tag": "chat:1.0.0"' in run("models", "show", name, "--json").out
    assert '"tag": "chat:1.0.0"' in run("push", name, str(stored / "shared"), "--json").out
    planned = run("deploy", name, "--backend", "ray_serve", "--dry-run")
    assert "tag: chat:1.0.0" in planned.out, planned.err
    file = stored / "weights-2.0.0"  # stored again: made no later than before
    ModelStore().save("chat", "2.0.0", [("weights", file)], kind="language_model", framework="mlx")
    assert ModelStore().get(name).tag == "chat:1.0.0"


@pytest.mark.parametrize("name", ["nobody", "nobody:latest", "nobody:1.0.0", "chat:", "a b"])
def test_a_name_that_nothing_has(run: Run, stored: Path, name: str) -> None:
    assert repr(name) in refused(run, "models", "show", name)
    assert repr(name) in refused(run, "push", name, str(stored / "shared"))


def test_a_project_that_there_is_not(run: Run, stored: Path) -> None:
    for more in ((), ("--json",)):
        sentence = refused(run, "models", "list", "--project", "nope", *more)
        assert sentence == "there is no project 'nope'; there are one, two"
    assert run("models", "list", "--project", "two").out.splitlines()[1].startswith("chat:1.0.0")


def test_an_empty_store_has_no_project_and_no_result(run: Run, bentoml_home: Path) -> None:
    assert "no model is stored yet" in refused(run, "models", "list", "--project", "nope")
    listed = run("models", "list")
    assert (listed.status, listed.out) == (0, "")
    assert run("models", "list", "--json").out == "[]\n"


def test_lines_stay_whole_in_a_pipe(run: Run, bentoml_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("x")
    labels = {"project": "a-project-with-a-long-name-" * 5}
    ModelStore().save(
        "n" * 60, None, [("weights", file)], kind="language_model", framework="mlx", labels=labels
    )
    heading, row = run("models", "list").out.splitlines()
    assert heading.startswith("tag")
    assert "n" * 60 in row
    assert labels["project"] in row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_streamed_text_wraps_between_words_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    said = (
        "A list is a row some things.\n\n    x = [1]  # code\r\n"
        "Everybody\u00a0knows: 列表是一行东西 \x1b[2J"
    )
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(console, "width", lambda: 20)
    text = console.StreamedText()
    for start in range(0, len(said), size):
        text.write(said[start : start + size])
    text.close()
    shown = terminal.getvalue()
    assert shown.splitlines() == [
        "A list is a row some",  # as wide as the terminal
        "things.",
        "",
        "    x = [1]  # code",
        "Everybody knows:",
        "列表是一行东西 [2J",
    ]


def test_streamed_text_is_left_alone_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    text = console.StreamedText()
    for piece in ("long " * 100, "\x1b[2J"):
        text.write(piece)
    text.close()
    assert capsys.readouterr().out == "long " * 100 + "\x1b[2J\n"


MLOPS = (sys.executable, "-c", "from mlops.cli import main; main()")


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; from mlops.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'bentoml', 'mlx', 'mlflow', 'numpy', 'ray', 'httpx', 'yaml', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "chat", "-h"], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("arguments", [["-h"], ["models", "list"]])
def test_a_reader_that_leaves_is_no_error(stored: Path, arguments: list[str]) -> None:
    with subprocess.Popen(
        [*MLOPS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) in {0, 1}


@pytest.mark.parametrize(
    ("shell", "environment", "said"),
    [
        ("bash", {"COMP_WORDS": "mlops serve --ad", "COMP_CWORD": "2"}, "--adapter"),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "mlops mod"}, "models"),
    ],
)
def test_shells_complete_commands_and_options(
    shell: str, environment: dict[str, str], said: str
) -> None:
    script = Path(sys.executable).with_name("mlops")
    done = subprocess.run(
        [script],
        env={**environment, "_MLOPS_COMPLETE": f"complete_{shell}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["-h", "doctor --json"])
def test_output_that_cannot_be_written_is_one_sentence(command: str) -> None:
    shell = f"from mlops.cli import main; main()' {command}"
    both = (
        f"{shlex.quote(sys.executable)} -c '{shell} >/dev/full; echo $?; "
        f"{shlex.quote(sys.executable)} -c '{shell} >&-; echo $?"
    )
    full = subprocess.run(
        ["sh", "-c", both], capture_output=True, text=True, check=True, timeout=120
    )
    assert full.stdout.split() == ["1", "0"]
    (said,) = full.stderr.splitlines()
    assert said == "the output cannot be written: No space left on device"
