"""bench/gpu_check.py without a GPU: the plan, refusals, and steps that fail, hang or are killed."""
import json

import pytest

from bench import gpu_check
from tiny import run_here


def test_the_plan_names_every_step_and_what_it_asks():
    code, out, _ = run_here("bench/gpu_check.py", "--plan")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == list(gpu_check.STEPS)
    assert all(len(line.split("   ")[-1]) > 20 for line in lines)


def test_it_says_what_is_wrong_before_anything_runs(tmp_path):
    code, _, err = run_here("bench/gpu_check.py", "--steps", "env,nonsense")
    assert code == 2 and "--steps env,nonsense: expected some of env,tests" in err
    if not gpu_check.torch.cuda.is_available():
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
