"""What the documents show is run: Python blocks page by page, and shell lines that take less than a minute.

A block that is not run has a comment before it that says why, `<!-- not run: needs a TPU pod -->`; commands that are
never run have their reason in NOT_RUN. Every other command line is at least read: its flags by tests/test_docs.py, and
the configuration that it trains here.
"""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import castling_jax
from castling_jax.convert.inference_folder import save_inference
from castling_jax.models.attention.kinds import KINDS
from castling_jax.tools import train
from tests.test_docs import DOCUMENTS, ROOT

BLOCK = re.compile(r"^(?:<!-- not run: (.+) -->\n)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (python .*)", re.MULTILINE)  # command lines in docs/performance.md
OTHERS = re.compile(r"text|tree|\{[\w-]+\}.*")  # languages of blocks that are no programs
# They compile whole models.
SLOW_PYTHON = {"README.md", "detection.md", "models.md", "own_loop.md", "pretraining.md", "segmentation.md"}
# The beginning of a command line -> why no test runs it from here.
NOT_RUN = {
    "make": "these tests run inside `make test`, and .ci/run runs `make docs`",
    "pip": "changes the environment that the tests run in",
    "python scripts/launch.py": "two processes compile for minutes; tests/training/test_pod.py starts the script",
    "python -m castling_jax prepare fashion_mnist": "fetches a data set; tests/data/test_prepare.py has small ones",
    "python -m castling_jax compare": "trains several models; tests/training/test_comparison.py compares small ones",
    "python -m castling_jax report": "compiles for minutes with libtpu; tests/compile_report reports on small ones",
    "python -m castling_jax benchmark": "measures for minutes; tests/bench/test_attention.py measures small layers",
    "python -m castling_jax describe": "traces whole models; tests/models/test_description.py holds what it counts",
    "python -m castling_jax feeding": "measures for minutes; tests/bench/test_loader_speed.py measures small ones",
    "python -m castling_jax loader_memory": "measures for minutes",
    "python -m castling_jax plots augment": "reads ImageNet; tests/training/test_contact_sheet.py draws digits",
}
TRAINS = re.compile(r"python (?:main\.py|-m castling_jax train) (.*)")
COMMAND = re.compile(r"python -m castling_jax (.*)")
SMALL = ["--config.model.depth=1", "--config.model.embed_dim=32", "--config.train.batch_size=32"]

# Imports what the commands need once; each line of its input is (folder, arguments), which a child of its own runs.
SERVER = """
import json, os, sys
import castling_jax.training.process, castling_jax.training.run, castling_jax.predictions
from castling_jax import __main__ as commands

for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    out = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["castling-jax", *arguments]
    commands.main()
    sys.stdout.flush()
    os._exit(0)
"""


def blocks(document):
    """(language, code, why it is not run or None) of all fenced blocks of a document."""
    return [(language, code, reason) for reason, language, code in BLOCK.findall(document.read_text())]


def shell_lines(document):
    """All command lines of a document that no comment leaves out."""
    texts = [code for language, code, reason in blocks(document) if language == "bash" and not reason]
    texts += INDENTED.findall(document.read_text().replace("\\\n", " "))
    lines = [shlex.split(line, comments=True) for line in "\n".join(texts).replace("\\\n", " ").splitlines()]
    return [" ".join(words) for words in lines if words]


def reason_of(line):
    """Why NOT_RUN leaves a command line out, or None."""
    return next((reason for start, reason in NOT_RUN.items() if f"{line} ".startswith(f"{start} ")), None)


def python_blocks(document):
    return [code for language, code, reason in blocks(document) if language == "python" and not reason]


def pages(select, slow=()):
    """The documents for which `select` gives something, as parameters of a test."""
    return [
        pytest.param(document, marks=[pytest.mark.slow] if document.name in slow else [], id=document.name)
        for document in DOCUMENTS
        if select(document)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that has what the pages' Python reads: a run's inference folder and two images."""
    model = castling_jax.create_model("deit_micro", num_classes=2, form="inference")
    preprocessing = castling_jax.Preprocessing(image_size=8)
    save_inference(
        tmp_path / "runs/mine/inference",
        model,
        castling_jax.get_variables(model),
        preprocessing=preprocessing,
        classes=["cat", "dog"],
    )
    for name in ("cat.jpg", "dog.png"):
        Image.fromarray(np.full((12, 10, 3), 99, np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def kinds():
    """KINDS as it was, after a page has registered attentions."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


@pytest.mark.parametrize("document", pages(python_blocks, SLOW_PYTHON))
def test_the_python_of_a_page_runs_from_top_to_bottom(document, folder, kinds):
    namespace = {}
    for number, code in enumerate(python_blocks(document), start=1):
        exec(compile(code, f"{document.name}, block {number}", "exec"), namespace)


def test_every_block_is_run_or_says_why_not():
    for document in DOCUMENTS:
        assert not re.search(r"^ +```", document.read_text(), re.MULTILINE), f"{document.name} has an indented block"
        for language, code, reason in blocks(document):
            assert language in ("python", "bash") or OTHERS.fullmatch(language), f"{document.name}: {language}"
            if reason:
                print(f"{document.name}: {code.splitlines()[0]} ({reason})")
                assert len(reason.split()) > 2, f"{document.name} leaves out {code!r} and does not say why"
        for line in shell_lines(document):
            known = reason_of(line) or COMMAND.fullmatch(line) or TRAINS.fullmatch(line)
            assert known, f"{document.name} shows {line!r}, which no test runs: add its reason"


def test_reasons_are_of_lines_that_are_there():
    lines = [f"{line} " for document in DOCUMENTS for line in shell_lines(document)]
    for start in NOT_RUN:
        assert any(line.startswith(f"{start} ") for line in lines), f"no document shows {start!r} any more"


def test_blocks_lines_and_reasons_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n<!-- not run: needs a pod -->\n```bash\ngcloud\n```\n"
        "```bash\nmake run  # now\npython main.py \\\n  --config=digits\n```\n\n"
        "    python -m castling_jax report layer\n"
    )
    assert python_blocks(page) == ["x = 1\n"]
    assert [reason for *_, reason in blocks(page)] == ["", "needs a pod", ""]
    lines = ["make run", "python main.py --config=digits", "python -m castling_jax report layer"]
    assert shell_lines(page) == lines
    assert [bool(reason_of(line)) for line in lines] == [True, False, True]


def training_lines(document):
    return [found[1].split() for line in shell_lines(document) if (found := TRAINS.fullmatch(line))]


@pytest.mark.parametrize("document", pages(training_lines))
def test_configurations_that_are_trained_are_valid(document, capsys):
    for words in training_lines(document):
        train.main([*words, "--check"])
        assert capsys.readouterr().out == "The configuration is valid.\n", words


def made_small(line):
    """The arguments of a command line, for seconds on a CPU; None where it needs more or has a reason in NOT_RUN."""
    if reason_of(line):
        return None
    found = TRAINS.fullmatch(line)
    if found is None:
        return (found := COMMAND.fullmatch(line)) and found[1].split()
    words = [word for word in found[1].split() if not word.startswith("--config.train.epochs=")]
    if not {"--config=digits", "--config=folder:64"} & set(words):
        return None  # test_configurations_that_are_trained_are_valid has read it
    return ["train", *words, f"--config.train.epochs={1 + ('--extend' in words)}", *SMALL]


def runnable(document):
    """Whether a page's commands are run: a run on the digits as castle.md's is enough for distillation.md."""
    return document.name != "distillation.md" and any(made_small(line) for line in shell_lines(document))


@pytest.fixture(scope="module")
def run_command():
    """run_command(folder, arguments) runs `castling-jax ARGUMENTS` there and returns its status and its output."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:

        def run(folder, arguments):
            print(json.dumps([str(folder), arguments]), file=server.stdin, flush=True)
            return int(server.stdout.readline()), (folder / "output").read_text()

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_command):
    """A folder with what the pages' commands read: images in folders, and runs on them and on the digits."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for split, count in (("flowers/train", 16), ("flowers/val", 4), ("field/test", 4)):
        for name in ("daisy", "tulip"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    pages_lines = [line for document in DOCUMENTS for line in shell_lines(document)]
    for name in ("runs/mine", "runs/flowers"):  # as the README and folder.md train them
        line = next(line for line in pages_lines if f" --workdir={name}" in line and made_small(line))
        status, output = run_command(folder, made_small(line))
        assert not status, output
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("document", pages(runnable))
def test_the_commands_of_a_page_run_one_after_another(document, trained, run_command):
    for line in shell_lines(document):
        if (arguments := made_small(line)) is not None:
            status, output = run_command(trained, arguments)
            assert not status, f"{line}\n{output}"
