"""Both trainers: gradients against sums written out by hand, and runs that are killed, interrupted or spread
over processes and still end with the same bits."""
import copy
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train_ntp
from checkpoint import cut_log, load_trainer, save_checkpoint
from data.tokenizer import Tokenizer
from reward import extract_prediction
from sample import Rollout
from tiny import ENVIRONMENT, ROOT, base, corpus, run_here, tiny_model
from train_ntp import document_sequences, learning_rate, micro_batches, ntp_step, shuffled, weighted_loss
from train_rpt import Group, Question, group_advantages, policy_loss, policy_step

TEMPERATURE = 0.8


@pytest.fixture
def fp64(monkeypatch):
    """Everything that asks for fp32 gets fp64, so that equal formulas agree to 1e-12."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def double(model):
    model.compute_dtype = torch.float64
    return model.double()


# ---- advantages and loss -----------------------------------------------------------------------------------

def test_an_advantage_is_the_reward_above_the_mean_of_its_own_group():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0]])
    assert torch.equal(group_advantages(rewards), expected)


def test_normalised_advantages_divide_by_the_standard_deviation_and_survive_equal_rewards():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [0] * 8])
    advantages = group_advantages(rewards, normalize=True)
    assert advantages[0, 0].item() == pytest.approx(0.875 / math.sqrt(1 / 8), rel=1e-4)  # variance with n - 1
    assert torch.equal(advantages[1], torch.zeros(8))


@pytest.mark.parametrize("ratio, advantage, loss, clipped", [
    (1.0, 2.0, -2.0, False),
    (1.5, 2.0, -2.4, True),       # better than before already: no more credit than 1.2 x
    (0.5, 2.0, -1.0, True),       # worse than before: the full distance counts
    (1.5, -2.0, 3.0, True),
    (0.5, -2.0, 1.6, True),
    (1.1, -2.0, 2.2, False),
])
def test_the_clip_only_takes_credit_away(ratio, advantage, loss, clipped):
    logprobs, advantages = torch.tensor([ratio]).log(), torch.tensor([advantage])
    values, was_clipped = policy_loss(logprobs, torch.zeros(1), advantages, 0.2)
    assert values.item() == pytest.approx(loss, rel=1e-6) and was_clipped.item() is clipped


# ---- the update against a brute-force loop -----------------------------------------------------------------

def random_groups(vocab, n=7, G=4, seed=0):
    """Groups of all lengths; the third has equal rewards."""
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(vocab, size=rng.integers(low, high)).tolist()
    groups = []
    for i in range(n):
        rollouts = [Rollout(tokens=ids(1, 9)) for _ in range(G)]
        rewards = [1.0] * G if i == 2 else [1.0, *rng.integers(2, size=G - 2).astype(float), 0.0]
        groups.append(Group(Question([], ids(1, 12), []), rollouts, [None] * G, rewards))
    return groups


def brute_logprobs(model, group, rollout):
    """One sequence at a time, no packing, no chunks: what the definition says."""
    tokens = torch.tensor(group.question.prompt + rollout.tokens)
    logprobs = (model(tokens[None])[0] / TEMPERATURE).log_softmax(dim=-1)
    return logprobs[len(group.question.prompt) - 1:-1].gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]


def brute_loss(model, groups, advantages, token_loss):
    """sum over rollouts and tokens / tokens of all rollouts, those of dead groups included."""
    losses = [token_loss(brute_logprobs(model, g, r), a, g, r)
              for g, row in zip(groups, advantages) for r, a in zip(g.rollouts, row)]
    return sum(l.sum() for l in losses) / sum(len(l) for l in losses)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step(model, groups, advantages, lr=0.0, **changes):
    """policy_step by plain gradient descent, without a clip, after a sampler that agrees with the trainer."""
    for group in groups:
        for rollout in group.rollouts:
            rollout.logprobs = brute_logprobs(model, group, rollout).tolist()
    args = SimpleNamespace(**dict(tokens_per_micro_batch=50, updates_per_batch=1, temperature=TEMPERATURE,
                                  clip_ratio=0.2, entropy_coef=0.0, grad_clip=math.inf) | changes)
    return policy_step(model, torch.optim.SGD(model.parameters(), lr=lr), groups, advantages, args)


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 50, 10**6])
def test_the_first_update_is_reinforce_whatever_the_micro_batches(fp64, tiny_gpt, tokens_per_micro_batch):
    model, groups = double(tiny_gpt), random_groups(40)
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    brute_loss(model, groups, advantages, lambda logprobs, a, *_: -a * logprobs).backward()
    expected = gradients(model)
    metrics = step(model, groups, advantages, tokens_per_micro_batch=tokens_per_micro_batch)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-10)
    assert metrics["clip_frac"] == 0 and metrics["logp_gap"] < 1e-13
    alive = [g for g in groups if len(set(g.rewards)) > 1]
    assert len(alive) == 6 and metrics["trained_tokens"] == sum(
        len(g.question.prompt) + sum(len(r.tokens) for r in g.rollouts) for g in alive)


def test_fp32_gradients_do_not_depend_on_the_micro_batches(tiny_gpt):
    groups = random_groups(40)
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    found = []
    for tokens in (1, 50, 10**6):
        step(tiny_gpt, groups, advantages, tokens_per_micro_batch=tokens)
        found.append(gradients(tiny_gpt))
    assert all((other - found[0]).norm() < 1e-5 * found[0].norm() for other in found[1:])


def test_a_dead_group_has_no_gradient_but_counts_in_the_normaliser(fp64, tiny_gpt):
    model, groups = double(tiny_gpt), random_groups(40)[:3]
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    tokens = [sum(len(r.tokens) for r in g.rollouts) for g in groups]
    step(model, groups[:2], advantages[:2])
    alone = gradients(model)
    step(model, groups, advantages)
    expected = alone * sum(tokens[:2]) / sum(tokens)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)
    metrics = step(model, groups[2:], advantages[2:])
    assert not gradients(model).any() and metrics["trained_tokens"] == 0 and math.isnan(metrics["clip_frac"])


def test_the_second_update_of_a_batch_is_clipped(fp64, tiny_gpt):
    model, groups, lr = double(tiny_gpt), random_groups(40), 3.0
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    expected = copy.deepcopy(model)
    old = {id(r): brute_logprobs(model, g, r).detach() for g in groups for r in g.rollouts}
    far = []

    def clipped_loss(logprobs, a, g, r):
        ratio = (logprobs - old[id(r)]).exp()
        far.extend(abs(x - 1) > 0.2 for x in ratio.tolist() if len(set(g.rewards)) > 1)
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)

    for _ in range(2):
        expected.zero_grad()
        brute_loss(expected, groups, advantages, clipped_loss).backward()
        with torch.no_grad():
            for p in expected.parameters():
                p -= lr * p.grad
    metrics = step(model, groups, advantages, lr=lr, updates_per_batch=2)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert 0.05 < metrics["clip_frac"] < 0.5 and metrics["clip_frac"] == pytest.approx(np.mean(far))


def test_the_entropy_bonus_reaches_dead_groups_too(fp64, tiny_gpt):
    model, groups = double(tiny_gpt), random_groups(40)[2:3]
    tokens, entropy, prompt = 0, 0, groups[0].question.prompt
    for r in groups[0].rollouts:
        logits = model(torch.tensor([prompt + r.tokens]))[0, len(prompt) - 1:-1]
        logprobs = (logits / TEMPERATURE).log_softmax(dim=-1)
        entropy, tokens = entropy - (logprobs.exp() * logprobs).sum(), tokens + len(r.tokens)
    (-0.1 * entropy / tokens).backward()
    expected = gradients(model)
    step(model, groups, [[0.0] * 4], entropy_coef=0.1)
    assert expected.norm() > 1e-4
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-13)


def test_a_sampler_that_disagrees_shows_in_logp_gap(tiny_gpt, monkeypatch):
    groups = random_groups(40)[:2]
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    honest = brute_logprobs
    monkeypatch.setitem(globals(), "brute_logprobs", lambda *case: honest(*case) - 0.5)
    assert step(tiny_gpt, groups, advantages)["logp_gap"] == pytest.approx(0.5, rel=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tiny_gpt):
    groups = random_groups(40)[:2]
    before = copy.deepcopy(tiny_gpt.state_dict())
    with pytest.raises(ValueError, match="gradient norm is nan: the update was not applied"):
        step(tiny_gpt, groups, [[math.nan] * 4] * 2, lr=1.0)
    assert all(torch.equal(value, before[name]) for name, value in tiny_gpt.state_dict().items())


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 30, 10**6])
def test_next_token_gradients_are_those_of_one_weighted_mean(fp64, tiny_gpt, tokens_per_micro_batch):
    model, rng = double(tiny_gpt), np.random.default_rng(0)
    ids = lambda n: rng.integers(40, size=n).tolist()
    lengths = [(1, 9), (5, 1), (3, 4), (1, 1), (8, 20)]
    sequences = [(ids(p), ids(r), rng.random(r).tolist()) for p, r in lengths]
    total = 0
    for prompt, response, weights in sequences:
        logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none")
        total = total + (losses * torch.tensor(weights)).sum()
    expected_loss = total / sum(sum(weights) for *_, weights in sequences)
    expected_loss.backward()
    expected = gradients(model)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, norm = ntp_step(model, frozen, sequences, tokens_per_micro_batch, grad_clip=math.inf)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-10)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)


def test_nothing_leaks_between_packed_sequences(tiny_gpt):
    sequences = [([1, 2], [3, 4, 5], [1.0] * 3), ([6], [7, 8], [1.0] * 2)]
    together = weighted_loss(tiny_gpt, sequences)
    torch.testing.assert_close(together, sum(weighted_loss(tiny_gpt, [s]) for s in sequences))


# ---- small parts -------------------------------------------------------------------------------------------

def test_micro_batches_fill_the_budget_and_lose_nothing():
    assert list(micro_batches([5, 3, 4, 9, 1, 1], 8, lambda x: x)) == [[5, 3], [4], [9], [1, 1]]
    assert list(micro_batches([], 8, lambda x: x)) == []


def test_the_endless_walk_meets_every_item_once_a_round_and_does_not_depend_on_the_stride():
    walk = shuffled(7, 0, 70, seed=3)
    assert all(sorted(walk[i:i + 7]) == list(range(7)) for i in range(0, 70, 7))
    assert len({tuple(walk[i:i + 7]) for i in range(0, 70, 7)}) > 5
    for stride in (1, 2, 5, 10, 35):
        assert np.array_equal(np.concatenate([shuffled(7, i, stride, 3) for i in range(0, 70, stride)]), walk)
    assert shuffled(7, 21, 0, 3).tolist() == []
    assert not np.array_equal(walk, shuffled(7, 0, 70, seed=4))


def test_a_long_document_gives_every_window_and_the_weights_move_with_it():
    tokens = np.arange(100, 110, dtype=np.uint32)
    corpus = SimpleNamespace(tokens=tokens, docs=np.array([[0, 4, 10, 0]]))
    seen = set()
    for seed in range(60):
        (prompt, response, weights), = document_sequences(corpus, [0], 7, 6, 0.2, np.random.default_rng(seed))
        ids = prompt + response
        seen.add(ids[0])
        assert len(ids) == 6 and weights == [1.0 if id >= 104 or id == 7 else 0.2 for id in response]
        assert ids == [*range(100, 110), 7][ids[0] - 100:][:6]
    assert seen == {100, 101, 102, 103, 104, 105}
    (prompt, response, weights), = document_sequences(corpus, [0], 7, 50, 0.2, np.random.default_rng(0))
    assert prompt + response == [*range(100, 110), 7] and weights == [0.2] * 3 + [1.0] * 7


def test_the_learning_rate_rises_stays_and_ends_near_zero():
    args = SimpleNamespace(lr=2.0, warmup_steps=10, steps=100)
    rates = [learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:51] == [2.0] * 42
    assert rates[75] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 50)
    assert learning_rate(0, SimpleNamespace(lr=2.0, warmup_steps=0, steps=100)) == 2.0


def test_a_torn_last_line_and_later_steps_are_cut_from_a_log(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "x": "é"}\n{"step": 3}\n{"step": 4, "rew')
    cut_log(str(log), 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2, "x": "é"}\n'


# ---- whole runs --------------------------------------------------------------------------------------------

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
    timing = lambda key: key.startswith("dt_") or key.endswith("_tok_s") or key in ("mfu", "occupancy")
    return [{k: v for k, v in json.loads(line).items() if not timing(k)}
            for line in (run / name).read_text().splitlines()]


def contents(run):
    """Everything a run leaves that has to be the same, to the bit."""
    sha = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    last = run / (run / "latest").read_text()
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    optimizer = [value.numpy().tobytes()
                 for moments in trainer["optimizer"]["state"].values() for value in moments.values()]
    logs = [lines(run, name) for name in ("metrics.jsonl", "samples.jsonl") if (run / name).exists()]
    weights = {name.name: sha(name / "model.safetensors") for name in sorted(run.glob("step_??????"))}
    return logs, weights, optimizer, {k: v for k, v in trainer.items() if k != "optimizer"}


@pytest.fixture(scope="module", params=["train_rpt.py", "train_ntp.py"])
def whole(request, corpus, base, tmp_path_factory):
    """Six steps without a disturbance, and the script that took them."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run_here(*command(request.param, corpus, base, run))
    assert (code, err) == (0, ""), err
    return request.param, run


# Each is a moment in which the process is gone: code that runs before the script and arms the trap.
KILL = "import os, runpy, signal, sys; import checkpoint; sys.argv = sys.argv[1:]\n" \
       "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
MOMENTS = {
    "while step 5 is logged": """
append = checkpoint.append
def torn(path, records):
    if records[0]["step"] == 5:
        with open(path, "a") as file:
            file.write('{"step": 5, "rew')
        die()
    append(path, records)
checkpoint.append = torn""",
    "before step 6 has its name": """
rename = os.rename
os.rename = lambda old, new: die() if new.endswith("step_000006") else rename(old, new)""",
    "before latest moves to step 6": """
write = checkpoint.write
checkpoint.write = lambda path, text: die() if text == "step_000006" else write(path, text)""",
    "in the first save": """
import torch; torch.save = lambda state, path: die()""",
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


def test_ctrl_c_ends_the_step_saves_and_a_resumed_run_is_the_same(whole, corpus, base, tmp_path, monkeypatch):
    script, undisturbed = whole
    line, run = command(script, corpus, base, tmp_path / "run"), tmp_path / "run"
    append = checkpoint.append

    def press(path, records):  # in step 1, too late for it: step 2 is the last one
        append(path, records)
        if path.endswith("metrics.jsonl") and records[0]["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint, "append", press)
    code, out, err = run_here(*line)
    assert code == 130 and (run / "latest").read_text() == "step_000002" and "--resume continues" in out
    monkeypatch.undo()
    assert run_here(*line, "--resume")[0] == 0
    (run / "step_000002").rename(tmp_path / "extra")   # the one folder that the undisturbed run does not have
    assert contents(run) == contents(undisturbed)


def test_only_the_newest_checkpoint_keeps_its_optimizer(whole):
    _, run = whole
    assert [p.parent.name for p in run.glob("step_*/trainer.pt")] == ["step_000006"]
    assert {p.name for p in run.glob("step_*")} == {"step_000003", "step_000006"}


def test_a_run_moves_the_weights_and_logs_what_is_documented(whole, base):
    script, run = whole
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, run / "step_000006"))
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-3
    names = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]).keys()
    assert names >= {"step", "loss", "grad_norm", "lr", "train_tok_s", "flops", "dt_train"}
    if script == "train_rpt.py":
        assert names >= {"reward", "reward_std", "frac_zero_std", "format_rate", "len_mean", "frac_truncated",
                         "entropy", "clip_frac", "logp_gap", "occupancy", "gen_tok_s", "mfu", "dt_gen", "dt_reward"}
        assert max(line["logp_gap"] for line in lines(run)) < 1e-5


def test_dynamic_sampling_trains_full_batches_of_live_groups(corpus, base, tmp_path, monkeypatch):
    alive, cut = [], train_ntp.micro_batches

    def spy(groups, tokens, size):
        alive.append(len(groups))
        return cut(groups, tokens, size)

    monkeypatch.setattr(train_ntp, "micro_batches", spy)
    for start in (0, -1):
        flags = dict(dynamic_sampling_from=start, max_rounds=20)
        line = command("train_rpt.py", corpus, base, tmp_path / str(start), **flags)
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
    before = (run / "step_000003" / "trainer.pt").read_bytes()
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
    assert (run / "step_000003" / "trainer.pt").read_bytes() == before
    assert run_here(*line, "--resume")[0] == 0 and (run / "latest").read_text() == "step_000006"


def test_a_changed_learning_rate_counts_after_resume(tmp_path):
    tokenizer = Tokenizer.load("embedded")
    model = tiny_model(tokenizer.vocab_size)
    optimizer = lambda lr: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=lr)
    first = optimizer(1e-3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    first.step()
    save_checkpoint(str(tmp_path), 1, model, tokenizer, first, cursor=8)
    second = optimizer(5e-4)
    assert load_trainer(f"{tmp_path}/step_000001", second) == dict(step=1, cursor=8)
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


@pytest.mark.parametrize("script", ["train_rpt.py", "train_ntp.py"])
def test_two_processes_take_the_same_steps_as_one(corpus, base, tmp_path, script):
    """Dynamic sampling from the first step on, and a batch of five: the ranks never have equal work."""
    runs, flags = [tmp_path / "one", tmp_path / "two"], dict(steps=3, lr=1e-4)
    flags |= dict(dynamic_sampling_from=0) if script == "train_rpt.py" else {}
    assert run_here(*command(script, corpus, base, runs[0], **flags))[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*torchrun, *command(script, corpus, base, runs[1], **flags)]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(run / "step_000003" / "model.safetensors") for run in runs)
    start = load_file(f"{base}/model.safetensors")
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-4
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    for a, b in zip(lines(runs[0]), lines(runs[1]), strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6) for k in a), (a, b)
    if script == "train_rpt.py":
        assert lines(runs[0], "samples.jsonl") == lines(runs[1], "samples.jsonl")
        assert [r["tokens"] for r in lines(runs[0])] == [r["tokens"] for r in lines(runs[1])]
