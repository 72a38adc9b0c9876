"""A tiny study from its start to its report, in a repository of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from castling_jax.convert.checkpoint import CHECKPOINTS, checkpoint_steps
from castling_jax.convert.weights import read
from castling_jax.data.sources import load_dataset
from castling_jax.training.config_files import run_config
from castling_jax.training.evaluate import configured_evaluator
from castling_jax.training.sharding import make_mesh
from experiments import results, run, study
from experiments.results import unpack
from experiments.study import ROOT, STUDIES

RUNS = [f"{arm}-lr0.002-seed{seed}" for arm in ("castling", "softmax") for seed in (0, 1)]
PAGE = """# Evidence

<!-- report: tiny -->
<!-- end -->

Castling had <!-- report: tiny/castling/accuracy --><!-- end --> %.

<!-- report: tiny/castling/mask --><!-- end -->
"""
TIMEOUT_SECONDS = 1200  # for a machine that is busy with other work too


@pytest.fixture
def repository(tmp_path):
    """A repository that has the code as it is here, committed or not, and one study."""
    folder = tmp_path / "repository"
    for part in ("castling_jax", "experiments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results", "studies"))
    (folder / STUDIES).mkdir()
    shutil.copy(ROOT / "tests" / "experiments" / "tiny.py", folder / STUDIES)
    (folder / "docs").mkdir()
    (folder / "docs" / "evidence.md").write_text(PAGE)
    (folder / "README.md").write_text("castling <!-- report: tiny/castling/accuracy --><!-- end -->\n")
    shutil.copy(ROOT / ".gitignore", folder)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder, *arguments):
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=state")


def start(folder, module, *arguments):
    """Starts a command in the repository, as the leader of a process group."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(process):
    """What a command has printed when it ends, and its status."""
    try:
        return process.communicate(timeout=TIMEOUT_SECONDS)[0], process.returncode
    finally:
        kill(process)


def kill(process):
    """SIGKILL of a command and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def results_in(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*seed*.json")}


@pytest.mark.slow
def test_a_killed_study_ends_with_all_results_and_its_report(repository):
    results, runs = repository / "experiments" / "results" / "tiny", repository / "runs" / "experiments" / "tiny"
    first_commit = git(repository, "rev-parse", "HEAD").strip()

    # Kill it when at least one run is finished, and another one has saved two checkpoints, of which the first is whole.
    runner = start(repository, "experiments.run", "tiny", "--jobs=2")
    deadline = time.monotonic() + TIMEOUT_SECONDS

    def is_in_the_middle():
        unfinished = [runs / name for name in RUNS if not (runs / name / "summary.json").exists()]
        return results_in(results) and any(
            len(checkpoint_steps(epath.Path(folder / CHECKPOINTS))) > 1 for folder in unfinished
        )

    try:
        while not is_in_the_middle():
            assert runner.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        kill(runner)
    finished = results_in(results)
    assert 0 < len(finished) < 4

    # The checkout moves on meanwhile. The study does not.
    with (repository / "castling_jax" / "errors.py").open("a") as file:
        file.write("\n# changed\n")
    commit(repository)
    output, status = end_of(start(repository, "experiments.run", "tiny", "--jobs=2"))
    assert status == 0, output
    assert f"{len(finished)} of 4 runs are finished" in output
    found = results_in(results)
    assert found.keys() == set(RUNS)
    assert finished.items() <= found.items()
    resumed = {name for name in RUNS if "Going on from step" in (runs / name / "log.txt").read_text()}
    assert resumed and resumed.isdisjoint(finished)
    assert {result["commit"] for result in found.values()} == {first_commit}
    assert all(result["environment"]["JAX_PLATFORMS"] == "cpu" for result in found.values())
    assert {result["code"] for result in found.values()} == {json.loads((results / "origin.json").read_text())["code"]}

    # The accuracies are those of the library's own evaluator on the test split.
    for name, result in found.items():
        checkpoint = read(epath.Path(runs / name))
        config = run_config(checkpoint.config)
        assert (config.dataset.eval_split, result["data"]["test_split"]) == ("minival", "test")
        dataset = load_dataset("digits", "test")
        evaluate = configured_evaluator(config, checkpoint.model, dataset, make_mesh(config.mesh))
        figures = evaluate(checkpoint.variables, checkpoint.mask_threshold).figures()
        for measure in ("accuracy_train_form", "accuracy_inference_form"):
            assert result[measure] == figures[measure], name  # whole numbers of images, over 360
        assert unpack(result["correct"], len(dataset)).mean() == result["accuracy_inference_form"]

    # Nothing is left to do, so nothing is done.
    output, status = end_of(start(repository, "experiments.run", "tiny"))
    assert (output, status) == ("tiny: 4 of 4 runs are finished.\n", 0)
    assert results_in(results) == found

    # The report stands, committed or not, until a number is edited.
    def report(*arguments):
        return end_of(start(repository, "experiments.report", *arguments))

    page = repository / "docs" / "evidence.md"
    assert report("--check")[1] == 1
    assert report()[1] == 0
    written = page.read_text()
    assert all([one["epoch"] for one in result["mask"]] == [1] * name.startswith("c") for name, result in found.items())
    assert "| 1 | 1.000 | 0.0 | 0.00 ± 0.00 |" in written
    assert (repository / "docs" / "evidence_tiny_castling_mask.png").exists()
    accuracy = sum(found[name]["accuracy_inference_form"] for name in RUNS[:2]) / 2
    assert f"| castling | 0.002 | {100 * accuracy:.2f} ± " in written
    commit(repository)
    assert report("--check") == ("The pages and the pictures agree with the results.\n", 0)
    readme = (repository / "README.md").read_text()
    assert f"accuracy -->{100 * accuracy:.2f} ± " in readme

    page.write_text(written.replace("| castling | 0.002 | ", "| castling | 0.002 | 9"))
    output, status = report("--check")
    assert "docs/evidence.md" in output and status == 1
    page.write_text(written)

    result = results / f"{RUNS[0]}.json"
    result.write_text(json.dumps(found[RUNS[0]] | {"accuracy_inference_form": 0.999}))
    output, status = report("--check")
    assert "accuracy_inference_form = 0.999" in output and status == 1
    git(repository, "checkout", "--", str(result))

    # A study that has results stays as it is.
    with (repository / STUDIES / "tiny.py").open("a") as file:
        file.write("# changed\n")
    for command in (("experiments.run", "tiny"), ("experiments.report", "--check")):
        output, status = end_of(start(repository, *command))
        assert "tiny.py" in output and status == 1


def test_a_second_runner_waits_for_what_the_first_one_left_training(tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(run, "RUNS", tmp_path)
    with run._one_runner("tiny") as lock:
        training = subprocess.Popen(["sleep", "600"], pass_fds=[lock])
        with refuses("tiny is being run by another process"), run._one_runner("tiny"):
            pass
    try:
        with refuses("tiny is being run by another process"), run._one_runner("tiny"):
            pass
    finally:
        training.kill()
        training.wait()
    with run._one_runner("tiny"):
        pass


def test_what_is_not_committed_or_unknown_is_not_run(repository, monkeypatch, refuses):
    monkeypatch.setattr(run, "ROOT", repository)
    for module in (run, results, study):
        monkeypatch.setattr(module, "RESULTS", repository / "experiments" / "results")
    with (repository / "castling_jax" / "errors.py").open("a") as file:
        file.write("# changed\n")
    with refuses("commit the code before cifar10_pilot is first run with it", "castling_jax/errors.py"):
        run.origin_of("cifar10_pilot")
    assert not (repository / "experiments" / "results").exists()
    git(repository, "checkout", "--", ".")
    monkeypatch.setattr(run, "RUNS", repository / "runs")
    (repository / "runs" / "cifar10_pilot" / RUNS[0]).mkdir(parents=True)
    with refuses("cifar10_pilot' holds runs of an earlier start of cifar10_pilot: remove it first."):
        run.origin_of("cifar10_pilot")
    assert not (repository / "experiments" / "results").exists()
    with refuses("cifar10_pilot and cifar10_main: no run is called 'nobody-*'"):
        run.run(["cifar10_pilot", "cifar10_main"], jobs=1, only="nobody-*")
    with refuses("--jobs", "0"):
        run.run(["cifar10_pilot"], jobs=0)
    shutil.rmtree(repository / "runs")
    with refuses("cifar10_pilot reads 'data_local/cifar10', which is missing"):
        run.run(["cifar10_pilot"], jobs=1)
    assert not (repository / "experiments" / "results").exists()


def test_a_worktree_that_was_changed_is_made_anew(repository, monkeypatch):
    monkeypatch.setattr(run, "ROOT", repository)
    monkeypatch.setattr(run, "RUNS", repository / "runs")
    (repository / "data_local").mkdir()
    origin = {"commit": git(repository, "rev-parse", "HEAD").strip(), "code": run.code_hash("tiny", repository)}
    code = run.code_of("tiny", origin)
    kept = code / "kept"
    kept.touch()
    assert run.code_of("tiny", origin) == code and kept.exists()
    # Neither file is in the hash.
    for changed in (code / "experiments" / "mask.py", code / "experiments" / "new.py"):
        with changed.open("a") as file:
            file.write("# changed\n")
        assert run.code_of("tiny", origin) == code and not kept.exists()
        assert "# changed" not in (code / "experiments" / "mask.py").read_text()
        kept.touch()
    # The study begins anew at a later commit, whose package and study are the same.
    (repository / "experiments" / "mask.py").write_text("# another\n")
    commit(repository)
    run.code_of("tiny", origin | {"commit": git(repository, "rev-parse", "HEAD").strip()})
    assert (code / "experiments" / "mask.py").read_text() == "# another\n"


def test_a_worktree_whose_making_was_killed_is_made_anew(repository, monkeypatch, refuses):
    monkeypatch.setattr(run, "ROOT", repository)
    monkeypatch.setattr(run, "RUNS", repository / "runs")
    origin = {"commit": git(repository, "rev-parse", "HEAD").strip(), "code": run.code_hash("tiny", repository)}
    code = run.code_of("tiny", origin)
    # Killed after git had finished, and within git, which then leaves a lock and some of the files.
    (code / "data_local").unlink()
    assert (run.code_of("tiny", origin) / "data_local").is_symlink()
    (repository / ".git" / "worktrees" / "code" / "locked").write_text("initializing")
    (code / ".git").unlink()
    assert run.code_of("tiny", origin) == code
    assert not git(code, "status", "--porcelain", "experiments")
    monkeypatch.setenv("PATH", "")
    with refuses("needs git"):
        run.code_of("tiny", origin | {"commit": "another"})


@pytest.mark.slow
def test_runs_of_two_studies_that_fail_are_counted_and_say_why(repository):
    text = (repository / STUDIES / "tiny.py").read_text().replace('test_split="test"', 'test_split="nothing"')
    for name, other in (("tiny", "castling"), ("tiny_too", "castling"), ("another", "linear_angular")):
        (repository / STUDIES / f"{name}.py").write_text(text.replace('"castling"', repr(other)))
    commit(repository)
    command = ["experiments.run", "tiny", "tiny_too", "another", "--jobs=2", "--only=castling-*-seed0"]
    output, status = end_of(start(repository, *command))
    assert status == 1 and output.endswith("\n2 failed.\n")
    for name in ("tiny", "tiny_too"):
        assert re.search(f"{RUNS[0]}: failed; '.*/{name}/.*log.txt' ends with: .*'nothing'", output)
        assert not list((repository / "experiments" / "results" / name).glob("*seed*"))
    assert not (repository / "experiments" / "results" / "another").exists()  # it has no such run


def test_a_copy_without_git_runs_its_own_code(repository, monkeypatch, refuses):
    monkeypatch.setattr(run, "ROOT", repository)
    origin = {"commit": "a", "code": run.code_hash("tiny", repository)}
    shutil.rmtree(repository / ".git")
    assert run.code_of("tiny", origin) == repository
    with (repository / "castling_jax" / "errors.py").open("a") as file:
        file.write("# changed\n")
    with refuses("is not the code of commit a"):
        run.code_of("tiny", origin)
