"""bench/gpu_check.py without a GPU: the plan, refusals, and steps that fail, hang or are killed."""
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from bench import gpu_check
from tiny import run_here, write_lines


def test_the_plan_names_every_step_and_what_it_asks():
    code, out, _ = run_here("bench/gpu_check.py", "--plan")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == list(gpu_check.STEPS)
    assert all(len(line.split("   ")[-1]) > 20 for line in lines)


def test_it_says_what_is_wrong_before_anything_runs(tmp_path):
    code, _, err = run_here("bench/gpu_check.py", "--steps", "env,nonsense")
    assert code == 2 and "--steps env,nonsense: expected some of env,tests" in err
    code, _, err = run_here("bench/gpu_check.py", "--out-dir", tmp_path / "out")
    assert code == 2 and "torch finds none" in err and not (tmp_path / "out").exists()


def facts(folder):
    return [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]


def test_a_fact_is_in_the_file_at_once_and_a_failure_is_one(monkeypatch, tmp_path):
    def broken():
        gpu_check.say("half", number=1.5)
        assert facts(tmp_path) == [dict(what="half", number=1.5)]
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "out_dir", tmp_path)
    monkeypatch.setattr(gpu_check, "STEPS", dict(broken=(broken, 60)))
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


def test_a_step_that_fails_or_hangs_costs_the_others_nothing(monkeypatch, capfd, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text("import sys, time\n"
                      "step = sys.argv[-1]\n"
                      "print('this is', step, flush=True)\n"
                      "time.sleep(60 * (step == 'hangs'))\n"
                      "sys.exit(step == 'broken')\n")
    monkeypatch.setattr(gpu_check, "out_dir", tmp_path)
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    steps = dict(broken=(None, 30), hangs=(None, 2), fine=(None, 30))
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    assert gpu_check.run_steps(["broken", "hangs", "fine"]) == 1
    out = capfd.readouterr().out
    results = [line.split(" | ")[-1] for line in out.splitlines() if line.startswith("| ")][1:]
    assert results == ["failed (1) |", "over its limit |", "ok |"]
    log = (tmp_path / "log.txt").read_text()
    assert log.split("\n") == ["this is broken", "this is hangs", "this is fine", ""]
