"""Whole runs of both trainers: killed, interrupted, on a full disk, and still the same bits at the end."""
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plumbing import batch, flags, log
from plumbing.checkpoint import load_trainer, save_checkpoint
from data import positions
from data.positions import find_scores, load_positions
from data.tokenizer import Tokenizer
from model import GPT
from plumbing.optimizer import make_optimizer
from reward import extract_prediction
from tiny import ENVIRONMENT, ROOT, base, corpus, run_here, tiny_model


def command(script, corpus, base, run, **flags):
    """The command line of a six-step run in which everything can go wrong."""
    common = {"--corpus": corpus.folder, "--init": base, "--out-dir": run, "--steps": 6, "--save-every": 3,
              "--lr": "1e-3", "--tokens-per-micro-batch": 200, "--seed": 5}
    own = {"train_rpt.py": {"--template": "short", "--batch-size": 5, "--rollouts": 4, "--max-new-tokens": 12,
                            "--temperature": 1.2, "--entropy-threshold": 0.5, "--dynamic-sampling-from": 2},
           "train_ntp.py": {"--strings": corpus.folder / "strings.jsonl", "--documents-per-step": 5,
                            "--strings-per-step": 6, "--max-tokens": 20, "--warmup-steps": 4}}[script]
    flags = {"--" + name.replace("_", "-"): value for name, value in flags.items()}
    return [script] + [str(x) for pair in (common | own | flags).items() for x in pair if x is not True]


def lines(run, name="metrics.jsonl"):
    """Records of a log without the times, which differ from run to run."""
    timing = lambda key: key.startswith("dt_") or key.endswith("_tok_s") or key == "mfu"
    return [{k: v for k, v in json.loads(line).items() if not timing(k)}
            for line in (run / name).read_text().splitlines()]


def contents(run):
    """Everything a run leaves that has to be the same, to the bit."""
    sha = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    last = run / (run / "latest").read_text()
    optimizer = {name: value.numpy().tobytes() for name, value in read_moments(last).items()}
    logs = [lines(run, name) for name in ("metrics.jsonl", "samples.jsonl") if (run / name).exists()]
    weights = {name.name: sha(name / "model.safetensors") for name in sorted(run.glob("step_??????"))}
    return logs, weights, optimizer, json.loads((last / "trainer.json").read_text())


def read_moments(folder):
    """{name: whole tensor}, whatever the number of ranks that wrote them."""
    index = json.loads((folder / "optimizer" / "index.json").read_text())
    return {name: torch.cat([load_file(folder / "optimizer" / file)[name] for file, _, _ in entry["parts"]])
            for name, entry in index.items()}


@pytest.fixture(scope="module", params=["train_rpt.py", "train_ntp.py"])
def whole(request, corpus, base, tmp_path_factory):
    """Six steps without a disturbance, and the script that took them."""
    run = tmp_path_factory.mktemp("whole") / "run [1]"       # brackets mean something to glob
    code, out, err = run_here(*command(request.param, corpus, base, run))
    assert (code, err) == (0, ""), err
    return request.param, run


# Each is a moment in which the process is gone: code that runs before the script and arms the trap.
KILL = "import os, runpy, signal, sys; from plumbing import checkpoint, log; sys.argv = sys.argv[1:]\n" \
       "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
MOMENTS = {
    "while step 5 is logged": """
append = log.append
def torn(path, records):
    if records[0]["step"] == 5:
        with open(path, "a") as file:
            file.write('{"step": 5, "rew')
        die()
    append(path, records)
log.append = torn""",
    "before step 6 has its name": """
rename = os.rename
os.rename = lambda old, new: die() if str(new).endswith("step_000006") else rename(old, new)""",
    "before latest moves to step 6": """
write = checkpoint.write
checkpoint.write = lambda path, text: die() if text == "step_000006" else write(path, text)""",
    "in the first save": """
checkpoint.save_moments = lambda *_: die()""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_resume_give_the_same_bits(whole, corpus, base, tmp_path, moment):
    script, undisturbed = whole
    if script == "train_ntp.py" and moment != "while step 5 is logged":
        return  # the rest is checkpoint.py, the same for both
    line = command(script, corpus, base, tmp_path / "run")
    trap = KILL + MOMENTS[moment] + '\nrunpy.run_path(sys.argv[0], run_name="__main__")'
    done = subprocess.run([sys.executable, "-c", trap, *line], cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    complete = {"step_000003"} if moment != "in the first save" else set()
    assert complete <= {p.name for p in (tmp_path / "run").glob("step_*")}
    if complete:
        assert (tmp_path / "run" / "latest").read_text() == "step_000003"
        code, _, err = run_here(*line)
        assert code == 2 and "already holds a run" in err
    code, out, err = run_here(*line, "--resume")
    assert (code, err) == (0, "") and ("resuming from" in out) == bool(complete)
    assert contents(tmp_path / "run") == contents(undisturbed)
    assert not list((tmp_path / "run").glob("*.partial"))


def run_under_fire(line, run, kills, seed):
    """Start and kill -9 a script `kills` times, every second time while it saves, then let it finish -> how many
    of the kills left an unfinished save behind. line: ends in --resume and saves after every step."""
    rng, in_saves, saving = random.Random(seed), 0, lambda: bool(list(run.glob("step_*.partial")))
    for kill in range(kills):
        process = subprocess.Popen([sys.executable, *line], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, start_new_session=True)
        first = process.stdout.readline()  # the run's folder is open: what follows is steps and saves
        time.sleep(rng.uniform(0, 0.8))
        while kill % 2 and process.poll() is None:
            time.sleep(rng.uniform(0, 0.04) if saving() else 0.0005)
            process.send_signal(signal.SIGSTOP)  # so that the save cannot end between the look and the kill
            if saving():
                break
            process.send_signal(signal.SIGCONT)
        assert process.poll() is None, (first, process.stderr.read())
        process.kill()
        process.communicate()
        in_saves += saving()
        if (run / "latest").exists():
            GPT.from_pretrained(run / (run / "latest").read_text())
    done = subprocess.run([sys.executable, *line], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return in_saves


@pytest.mark.slow
def test_kill_9_at_random_moments_gives_the_same_bits(corpus, base, tmp_path):
    """NANORPT_KILLS=30 for a siege; each kill costs a start of some seconds."""
    kills = int(os.environ.get("NANORPT_KILLS", 4))
    flags = dict(steps=30 * kills, save_every=1)
    line = lambda name: command("train_rpt.py", corpus, base, tmp_path / name, **flags)
    assert run_here(*line("whole"))[0] == 0
    in_saves = run_under_fire([*line("killed"), "--resume"], tmp_path / "killed", kills, seed=0)
    print(f"{kills} kills, {in_saves} of them during a save")
    killed, whole = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert in_saves >= kills // 2 and all(ours == theirs for ours, theirs in zip(killed, whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_a_resumed_run_is_the_same(whole, corpus, base, tmp_path, monkeypatch, number):
    script, undisturbed = whole
    line, run = command(script, corpus, base, tmp_path / "run"), tmp_path / "run"
    append = log.append

    # While step 1 is logged. One trainer looks for signals before its log, and takes another step.
    last = {"train_rpt.py": "step_000001", "train_ntp.py": "step_000002"}[script]

    def press(path, records):
        append(path, records)
        if path.endswith("metrics.jsonl") and records[0]["step"] == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(log, "append", press)
    code, out, err = run_here(*line)
    assert code == 0 and (run / "latest").read_text() == last and "--resume continues" in out
    monkeypatch.undo()
    assert run_here(*line, "--resume")[0] == 0
    (run / last).rename(tmp_path / "extra")   # the one folder that the undisturbed run does not have
    assert contents(run) == contents(undisturbed)


@pytest.mark.parametrize("number", [bool, int, np.bool_, np.float32, torch.tensor])
def test_a_reward_may_be_any_number(corpus, base, tmp_path, monkeypatch, number):
    monkeypatch.setattr("objectives.rpt.Objective.reward",
                        lambda self, prediction, truth: number(prediction in truth))
    code, _, err = run_here(*command("train_rpt.py", corpus, base, tmp_path / "run", steps=1))
    assert code == 0, err
    assert 0 < lines(tmp_path / "run")[0]["reward"] < 1
    assert all(type(r["reward"]) is float for r in lines(tmp_path / "run", "samples.jsonl"))


@pytest.mark.parametrize("objective", ["rpt", "first_token", "dense", "no_thought"])
def test_accuracy_is_that_of_the_verifier_whatever_is_paid(corpus, base, tmp_path, monkeypatch, objective):
    def first_step(folder):
        line = command("train_rpt.py", corpus, base, tmp_path / folder, steps=1, objective=objective)
        assert run_here(*line)[0] == 0
        return lines(tmp_path / folder)[0]

    usual = first_step("usual")
    monkeypatch.setattr(f"objectives.{objective}.Objective.reward",
                        lambda self, prediction, truth: 0.125 * len(prediction or b""))
    edited = first_step("edited")
    assert edited["reward"] != usual["reward"] and edited["tokens"] == usual["tokens"]
    assert usual["accuracy"] == edited["accuracy"] < 1
    if objective == "rpt":
        assert usual["accuracy"] == usual["reward"] > 0


def test_a_save_removes_what_an_earlier_one_left_unfinished(corpus, base, tmp_path):
    (tmp_path / "run" / "step_000001.partial" / "optimizer").mkdir(parents=True)
    assert run_here(*command("train_rpt.py", corpus, base, tmp_path / "run", steps=2))[0] == 0
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_000002"]


def test_only_the_newest_checkpoint_keeps_its_optimizer(whole):
    _, run = whole
    assert [p.parent.name for p in run.glob("step_*/optimizer")] == ["step_000006"]
    assert {p.name for p in run.glob("step_*")} == {"step_000003", "step_000006"}


def test_a_run_of_the_other_trainer_is_not_resumed(whole, corpus, base):
    script, run = whole
    other = "train_ntp.py" if script == "train_rpt.py" else "train_rpt.py"
    times = lambda: {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}
    before = times()
    code, _, err = run_here(*command(other, corpus, base, run), "--resume")
    assert code == 2 and "is a run of the other trainer: take --init" in err and err.count("\n") == 1
    assert times() == before


def test_auto_asks_once_and_a_run_keeps_the_answer(monkeypatch, corpus, base, tmp_path):
    asked = []
    for dtype in ("bf16", "fp32"):
        run, plain = tmp_path / "auto" / dtype, tmp_path / "plain" / dtype
        line = command("train_rpt.py", corpus, base, run, dtype="auto")
        monkeypatch.setattr(flags, "bf16_is_faster", lambda: asked.append(dtype) or dtype == "bf16")
        assert run_here(*line, "--steps", 3)[0] == 0
        # From here on the answer would be another.
        monkeypatch.setattr(flags, "bf16_is_faster",
                            lambda: asked.append("twice") or dtype == "fp32")
        code, out, err = run_here(*line, "--resume")
        assert (code, err) == (0, "") and "changed: steps 3 -> 6\n" in out
        assert json.loads((run / "args.json").read_text())["dtype"] == dtype
        assert run_here(*command("train_rpt.py", corpus, base, plain, dtype=dtype))[0] == 0
        assert contents(run) == contents(plain)
    assert asked == ["bf16", "fp32"]
    assert contents(tmp_path / "auto" / "bf16")[1] != contents(tmp_path / "auto" / "fp32")[1]


def test_auto_continues_a_run_that_names_no_dtype_as_it_was(monkeypatch, corpus, base, tmp_path):
    line = command("train_ntp.py", corpus, base, tmp_path / "run")
    assert run_here(*line, "--steps", 3)[0] == 0
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args.pop("dtype") == "fp32"
    (tmp_path / "run" / "args.json").write_text(json.dumps(args))
    monkeypatch.setattr(flags, "bf16_is_faster", lambda: True)
    assert run_here(*line, "--resume", "--dtype", "auto")[0] == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["dtype"] == "fp32"


def test_a_run_that_is_done_says_where_it_ended(whole, corpus, base):
    script, run = whole
    code, out, _ = run_here(*command(script, corpus, base, run), "--resume", "--steps", "4")
    assert code == 0 and f"done: {run}/step_000006" in out


def test_a_run_moves_the_weights_and_logs_what_is_documented(whole, base):
    script, run = whole
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, run / "step_000006"))
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-3
    names = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]).keys()
    assert names >= {"step", "loss", "grad_norm", "lr", "train_tok_s", "flops", "dt_train"}
    if script == "train_rpt.py":
        assert names >= {"reward", "accuracy", "reward_std", "frac_zero_std", "format_rate", "len_mean",
                         "frac_truncated", "entropy", "clip_frac", "logp_gap", "gen_tok_s", "mfu", "dt_gen", "dt_reward"}
        assert max(line["logp_gap"] for line in lines(run)) < 1e-5


def test_flops_are_2_a_parameter_and_read_token_and_6_a_trained_one_prompts_once(corpus, base, tmp_path):
    """Dense rewards make every group train, so both counts are lengths; scoring reads each context once more."""
    run = tmp_path / "run"
    flags = dict(steps=2, save_every=2, dynamic_sampling_from=-1, objective="dense")
    assert run_here(*command("train_rpt.py", corpus, base, run, **flags))[0] == 0
    rows = load_positions(corpus, find_scores(corpus, base), 0.5, "train")
    order = np.random.default_rng((5, 0)).permutation(len(rows))
    parameters = sum(weight.numel() for weight in load_file(f"{base}/model.safetensors").values())
    for step, line in enumerate(lines(run)):
        contexts = sum(int(t - start) for t, start, _ in rows[order[5 * step:5 * step + 5]])
        prompts, tokens = contexts + 5, round(line["len_mean"] * 5 * 4)  # each ends in <think>
        assert line["tokens"] == tokens and line["trained_tokens"] >= prompts + tokens
        assert line["flops"] == parameters * (
            2 * (prompts + tokens + contexts) + 6 * line["trained_tokens"])


def test_dynamic_sampling_trains_full_batches_of_live_groups(corpus, base, tmp_path, monkeypatch):
    alive, pack = [], batch.pack

    def spy(examples, *rest):
        alive.append(len(examples))
        return pack(examples, *rest)

    monkeypatch.setattr(batch, "pack", spy)
    for start in (0, -1):
        line = command("train_rpt.py", corpus, base, tmp_path / str(start), dynamic_sampling_from=start)
        assert run_here(*line)[0] == 0
    assert alive[:6] == [5] * 6 and len(alive) == 12 and min(alive[6:]) < 5


def test_samples_hold_the_words_and_the_reward_that_follows_from_them(whole):
    script, run = whole
    records = lines(run, "samples.jsonl") if script == "train_rpt.py" else []
    for record in records:
        prediction = extract_prediction(record["response"].encode())
        assert record["extracted"] == (None if prediction is None else prediction.decode())
        assert not record["reward"] or record["truth"].startswith(record["extracted"])
    assert not records or {record["reward"] for record in records} == {0.0, 1.0}
    assert not records or len({record["context"] for record in records}) >= 4  # each step has new questions


@pytest.mark.parametrize("limit", [0.5, 1.5])  # x size of the weights: full in these, or in the optimizer
def test_a_full_disk_keeps_the_old_checkpoint_and_says_one_line(corpus, base, tmp_path, limit):
    line, run = command("train_ntp.py", corpus, base, tmp_path / "run"), tmp_path / "run"
    assert run_here(*line, "--steps", "3")[0] == 0
    before = contents(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = (run / "step_000003" / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit * weights), hard))
    try:
        code, _, err = run_here(*line, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and err.count("\n") == 1
    assert "is the disk full? The checkpoint before this one is intact" in err
    assert (run / "latest").read_text() == "step_000003" and not list(run.glob("*.partial"))
    assert contents(run)[1:] == before[1:]  # the log is ahead, until --resume cuts it
    assert run_here(*line, "--resume")[0] == 0 and (run / "latest").read_text() == "step_000006"


def test_a_changed_learning_rate_counts_after_resume(tmp_path):
    tokenizer = Tokenizer.load("embedded")
    model = tiny_model(tokenizer.vocab_size)
    optimizer = lambda lr: make_optimizer(model, lr, (0.9, 0.95), weight_decay=lr)
    first = optimizer(1e-3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    first.step()
    save_checkpoint(str(tmp_path), 1, model, tokenizer, first, cursor=8)
    second = optimizer(5e-4)
    assert load_trainer(f"{tmp_path}/step_000001", model, second) == dict(step=1, cursor=8)
    assert second.param_groups[0]["lr"] == second.param_groups[0]["weight_decay"] == 5e-4
    weight = model.embed_tokens.weight
    assert torch.equal(second.state[weight]["exp_avg"], first.state[weight]["exp_avg"])


@pytest.mark.parametrize("script", ["train_rpt.py", "train_ntp.py"])
def test_weights_that_are_nan_stop_before_the_update(corpus, base, tmp_path, script):
    tokenizer = Tokenizer.load(base)
    model = tiny_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save(tmp_path / "nan")
    code, _, err = run_here(*command(script, corpus, tmp_path / "nan", tmp_path / "run"))
    assert code == 2 and err.count("\n") == 1 and "nan" in err.lower()
    assert not (tmp_path / "run" / "latest").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_number_of_documents_after_a_resume_skips_and_repeats_none(corpus, base, tmp_path, monkeypatch):
    taken, shuffled = [], positions.shuffled

    def spy(n, start, count, seed):
        taken.append((start, count))
        return shuffled(n, start, count, seed)

    monkeypatch.setattr(positions, "shuffled", spy)
    line = command("train_ntp.py", corpus, base, tmp_path / "run")  # 5 documents and 6 strings a step
    assert run_here(*line, "--steps", 3)[0] == 0
    assert run_here(*line, "--resume", "--documents-per-step", 2, "--strings-per-step", 7)[0] == 0
    documents, strings = taken[::2], taken[1::2]
    assert documents == [(0, 5), (5, 5), (10, 5), (15, 2), (17, 2), (19, 2)]
    assert strings == [(0, 6), (6, 6), (12, 6), (18, 7), (25, 7), (32, 7)]
    state = json.loads((tmp_path / "run" / "step_000006" / "trainer.json").read_text())
    assert state == dict(step=6, cursor=dict(documents=21, strings=39))


def test_a_checkpoint_without_a_cursor_resumes_as_before(corpus, base, tmp_path):
    lines = [command("train_ntp.py", corpus, base, tmp_path / name) for name in ("with", "without")]
    assert run_here(*lines[0], "--steps", 3)[0] == 0
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    (tmp_path / "without" / "step_000003" / "trainer.json").write_text('{"step": 3}')
    assert [run_here(*line, "--resume")[0] for line in lines] == [0, 0]
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
