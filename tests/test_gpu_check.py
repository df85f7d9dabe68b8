"""bench/gpu_check.py without a GPU: a rehearsal, and steps that fail, hang or are killed."""
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from bench import gpu_check
from tiny import ENVIRONMENT, ROOT, run_here, write_lines


def test_the_plan_names_every_step_and_what_it_asks():
    code, out, _ = run_here("bench/gpu_check.py", "--plan")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0].rstrip("*") for line in lines] == [*gpu_check.STEPS, "together"]
    assert all(len(line.split("   ")[-1]) > 20 for line in lines)
    assert int(lines[-1].split()[1]) <= 480  # seconds on an H100


def test_it_says_what_is_wrong_before_anything_runs(tmp_path):
    code, _, err = run_here("bench/gpu_check.py", "--steps", "env,nonsense")
    assert code == 2 and "--steps env,nonsense: expected some of env,tests" in err
    code, _, err = run_here("bench/gpu_check.py", "--out-dir", tmp_path / "out")
    assert code == 2 and "torch finds none" in err and "--tiny rehearses it" in err
    assert not (tmp_path / "out").exists()


def facts(folder):
    return [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]


def test_a_fact_is_in_the_file_at_once_and_a_failure_is_one(monkeypatch, tmp_path):
    def broken():
        gpu_check.say("half", number=1.5)
        assert facts(tmp_path) == [dict(what="half", number=1.5)]
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "out_dir", tmp_path)
    monkeypatch.setattr(gpu_check, "STEPS", dict(broken=(broken, 1, 60)))
    with pytest.raises(RuntimeError):
        gpu_check.run_step("broken")
    [_, failure] = facts(tmp_path)
    assert failure == dict(what="FAILED", step="broken", error="RuntimeError: no such kernel")


@pytest.mark.parametrize("code", [0, 1])
def test_failing_tests_fail_their_step(monkeypatch, tmp_path, code):
    monkeypatch.setattr(gpu_check, "out_dir", tmp_path)
    out = "FAILED tests/test_x.py::test_y\n1 failed, 2 passed in 3 s\n"
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code, stdout=out))
    with pytest.raises(AssertionError, match="tests fail") if code else nullcontext():
        gpu_check.tests()
    [fact] = facts(tmp_path)
    assert fact["result"] == "1 failed, 2 passed in 3 s" and fact["failed"] == ["FAILED tests/test_x.py::test_y"]


@pytest.mark.parametrize("changes, complaint", [
    ({}, None), (dict(logp_gap=1e-7), "logp_gap"), (dict(reward=0.05), "reward"), (dict(missing=True), "resumed")])
def test_a_run_of_rpt_that_is_not_right_fails_its_step(monkeypatch, tmp_path, changes, complaint):
    def train(command, **_):
        steps = int(command[command.index("--steps") + 1])
        rows = [dict(step=i, reward=i / 50, logp_gap=0.0) for i in range(steps)]
        if steps == 45:
            rows[-10:] = [row | changes for row in rows[-10:]]
            rows = rows[:-1] if "missing" in changes else rows
        (tmp_path / "rpt").mkdir(exist_ok=True)
        write_lines(tmp_path / "rpt/metrics.jsonl", *rows)

    monkeypatch.setattr(gpu_check, "out_dir", tmp_path)
    monkeypatch.setattr(gpu_check, "latest_checkpoint", lambda _: "base")
    monkeypatch.setattr(gpu_check.subprocess, "run", train)
    with pytest.raises(AssertionError, match=complaint) if complaint else nullcontext():
        gpu_check.rpt()


# A check whose steps go wrong in every way that a step can.
DRIVER = """
import os, sys, time
sys.path.insert(0, {root!r})
from bench import gpu_check

def fails():
    raise RuntimeError("no such kernel")

def hangs():
    time.sleep(60)

def fine():
    gpu_check.say("fine", number=1.5)

def kills_everything():
    gpu_check.say("last words")
    os.kill(os.getppid(), 9)
    os.kill(os.getpid(), 9)

gpu_check.STEPS = dict(fails=(fails, 1, 60), hangs=(hangs, 1, 1), fine=(fine, 1, 60),
                       kills_everything=(kills_everything, 1, 60))
gpu_check.__file__ = __file__
sys.exit(gpu_check.main())
"""


def rehearse(script, folder, *words):
    """-> exit code, the table as {step: result}"""
    command = [sys.executable, script, "--tiny", "--out-dir", folder / "out", *words]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    _, _, table = ran.stdout.partition("| step | seconds | result |\n|---|---|---|\n")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return ran.returncode, {name: result for name, _, result in rows}


@pytest.fixture
def driver(tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER.format(root=str(ROOT)))
    return path


def test_a_step_that_fails_or_hangs_costs_the_others_nothing(driver, tmp_path):
    code, table = rehearse(driver, tmp_path, "--steps", "fails,hangs,fine")
    assert code == 1
    assert table == dict(fails="failed (1)", hangs="over its limit", fine="ok")
    assert [(fact["what"], fact.get("result")) for fact in facts(tmp_path / "out")] == [
        ("FAILED", None), ("step", "failed (1)"), ("step", "over its limit"), ("fine", None),
        ("step", "ok")]
    assert "RuntimeError: no such kernel" in (tmp_path / "out/log.txt").read_text()


def test_a_kill_leaves_the_facts_so_far(driver, tmp_path):
    code, table = rehearse(driver, tmp_path, "--steps", "fine,kills_everything,fine")
    assert code == -9 and table == {}
    assert [fact["what"] for fact in facts(tmp_path / "out")] == ["fine", "step", "last words"]


@pytest.mark.slow
def test_every_step_of_the_rehearsal_ends_well(tmp_path):
    # Side by side, because each process uses one core.
    long = ["rpt", "rollouts", "launches"]
    short = [name for name in gpu_check.STEPS if name not in long]
    rehearsals = []
    with ThreadPoolExecutor() as pool:
        for folder, names in dict(long=long, short=short).items():
            words = "bench/gpu_check.py", tmp_path / folder, "--steps", ",".join(names)
            rehearsals.append(pool.submit(rehearse, *words))
    (code, table), (other_code, other_table) = (done.result() for done in rehearsals)
    assert table | other_table == dict.fromkeys(gpu_check.STEPS, "ok")
    assert code == other_code == 0
    whats = {fact["what"] for name in ("long", "short") for fact in facts(tmp_path / name / "out")}
    assert {"env", "logp_gap", "FSDP2, one rank", "RPT run", "decode step", "micro-batch", "head",
            "sampling", "pytest", "launches", "sanitizer", "step"} <= whats
