"""The updates of both trainers: gradients against sums written out by hand, and the small parts around them."""
import copy
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.positions import shuffled
from model import GPT
from objectives import Base, Group, Question
from plumbing import parallel
from plumbing.batch import Example, cut, pack, split
from plumbing.checkpoint import cut_log
from plumbing.log import RolloutBar, StepLog, in_numbers, rollout_metrics, step_line
from plumbing.optimizer import make_optimizer
from sample import Rollout
from tiny import base, corpus, ntp_step, run_here, write_lines
from train_ntp import document_examples, learning_rate, read_strings
from train_rpt import check_prompts_fit, group_advantages, policy_loss, policy_update

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


def test_the_clip_can_be_wider_above_than_below():
    ratios = torch.tensor([0.7, 0.85, 1.25, 1.35]).log()
    for advantage, expected in ((1.0, [-0.7, -0.85, -1.25, -1.28]), (-1.0, [0.8, 0.85, 1.25, 1.35])):
        losses, _ = policy_loss(ratios, torch.zeros(4), torch.full((4,), advantage), 0.2, 0.28)
        torch.testing.assert_close(losses, torch.tensor(expected))


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
    values, was_clipped = policy_loss(logprobs, torch.zeros(1), advantages, 0.2, 0.2)
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
        question = Question(prompt=ids(1, 12), truth=[], context=[], position=100 + i)
        groups.append(Group(question, rollouts, [None] * G, rewards))
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


def step(model, groups, advantages, lr=0.0, optimizer=None, **changes):
    """policy_update by plain gradient descent, without a clip, after a sampler that agrees with the trainer."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    for group in groups:
        for rollout in group.rollouts:
            rollout.logprobs = brute_logprobs(model, group, rollout).tolist()
    args = SimpleNamespace(**dict(tokens_per_micro_batch=50, updates_per_batch=1, temperature=TEMPERATURE,
                                  clip_low=0.2, clip_high=0.2, importance_cap=0.0, grad_clip=math.inf)
                             | changes)
    examples, size = Base.examples(None, groups, advantages, 0)
    batches = pack(examples, args.tokens_per_micro_batch, model.device)
    return policy_update(model, optimizer, batches, size, args)


@pytest.mark.parametrize("tokens_per_micro_batch", [19, 50, 10**6])
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
    once = sum(len(g.question.prompt) + sum(len(r.tokens) for r in g.rollouts) for g in alive)
    assert len(alive) == 6 and (metrics["trained_tokens"] > once if tokens_per_micro_batch == 19 else
                                metrics["trained_tokens"] == once)  # 19 splits groups: some prompts run again


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_packed_gradients_are_those_of_separate_sequences(request, tiny_gpt, dtype, error):
    model, groups = tiny_gpt, random_groups(40)
    if dtype == torch.float64:
        request.getfixturevalue("fp64")
        model = double(model)
    advantages = group_advantages(torch.tensor([g.rewards for g in groups], dtype=dtype)).tolist()
    brute_loss(model, groups, advantages, lambda logprobs, a, *_: -a * logprobs).backward()
    expected = gradients(model)
    step(model, groups, advantages, tokens_per_micro_batch=10**6)
    found = ((gradients(model) - expected).norm() / expected.norm()).item()
    print(f"{dtype}: relative error {found:.1e}")
    assert found < error


def test_fp32_gradients_do_not_depend_on_the_micro_batches(tiny_gpt):
    groups = random_groups(40)
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    found = []
    for tokens in (19, 50, 10**6):
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
    assert all(p.grad is None for p in model.parameters()) and metrics["grad_norm"] == 0
    assert metrics["trained_tokens"] == 0 and math.isnan(metrics["clip_frac"])


def test_a_step_without_a_gradient_leaves_the_weights_alone_whatever_the_momentum(tiny_gpt, monkeypatch):
    # Idle micro-batches turn gradients that are not there into zeros.
    monkeypatch.setattr("plumbing.parallel.padded", lambda batches, idle: batches + [idle])
    groups, optimizer = random_groups(40)[:3], make_optimizer(tiny_gpt, 1e-3, (0.9, 0.999))
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    before = copy.deepcopy(tiny_gpt.state_dict())
    step(tiny_gpt, groups[:2], advantages[:2], optimizer=optimizer)
    moved = copy.deepcopy(tiny_gpt.state_dict())
    assert not torch.equal(moved["norm.weight"], before["norm.weight"])
    step(tiny_gpt, groups[2:], advantages[2:], optimizer=optimizer)
    assert all(torch.equal(value, moved[name]) for name, value in tiny_gpt.state_dict().items())


def test_idle_micro_batches_change_neither_gradient_nor_metrics(tiny_gpt, monkeypatch):
    groups = random_groups(40)
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    alone, gradient = step(tiny_gpt, groups, advantages), gradients(tiny_gpt)
    monkeypatch.setattr("plumbing.parallel.padded", lambda batches, idle: batches + [idle, idle])
    assert step(tiny_gpt, groups, advantages) == alone
    assert torch.equal(gradients(tiny_gpt), gradient)


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
    once = step(copy.deepcopy(model), groups, advantages)["trained_tokens"]
    metrics = step(model, groups, advantages, lr=lr, updates_per_batch=2)
    assert metrics["trained_tokens"] == 2 * once
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert 0.05 < metrics["clip_frac"] < 0.5 and metrics["clip_frac"] == pytest.approx(np.mean(far))


def test_importance_weights_undo_a_sampler_that_drew_something_too_often_up_to_the_cap(fp64, tiny_gpt, monkeypatch):
    model, groups, cap = double(tiny_gpt), random_groups(40), 1.25
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    honest, shift = brute_logprobs, lambda n: torch.linspace(-1, 1, n) if n > 1 else torch.tensor([0.1])
    brute_loss(model, groups, advantages,
               lambda logprobs, a, *_: -a * logprobs * shift(len(logprobs)).exp().clamp(max=cap)).backward()
    expected = gradients(model)
    monkeypatch.setitem(globals(), "brute_logprobs", lambda *case: honest(*case) - shift(len(case[2].tokens)))
    metrics = step(model, groups, advantages, importance_cap=cap)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-13)
    assert metrics["logp_gap"] > 0.1


def test_a_sampler_that_disagrees_shows_in_logp_gap(tiny_gpt, monkeypatch):
    groups = random_groups(40)[:2]
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    honest = brute_logprobs
    monkeypatch.setitem(globals(), "brute_logprobs", lambda *case: honest(*case) - 0.5)
    assert step(tiny_gpt, groups, advantages)["logp_gap"] == pytest.approx(0.5, rel=1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_saves_the_batch(tiny_gpt, tmp_path):
    groups = random_groups(40)
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    advantages[4][1] = math.inf
    before = copy.deepcopy(tiny_gpt.state_dict())
    with pytest.raises(ValueError) as error:
        step(tiny_gpt, groups, advantages, lr=1.0, out_dir=tmp_path)
    assert "gradient norm is nan: the update was not applied, the last checkpoint is good" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in tiny_gpt.state_dict().items())
    saved = [json.loads(line) for line in (tmp_path / "bad_batch.jsonl").read_text().splitlines()]
    alive = [group for group in groups if group.has_signal]
    assert sum((record["tokens"] for record in saved), []) == [
        id for g in alive for id in g.question.prompt + [id for r in g.rollouts for id in r.tokens]]
    assert sum((record["rollout_lens"] for record in saved), []) == [len(r.tokens) for g in alive for r in g.rollouts]
    bad = groups[4].rollouts[1]
    assert [math.isinf(a) for record in saved for a in record["advantages"]].count(True) == len(bad.tokens)


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
    frozen = torch.optim.SGD(tiny_gpt.parameters(), lr=0.0)
    together, _ = ntp_step(tiny_gpt, frozen, sequences, 10**6, grad_clip=math.inf)
    apart = [ntp_step(tiny_gpt, frozen, [sequence], 10**6, grad_clip=math.inf)[0] for sequence in sequences]
    assert together * 5 == pytest.approx(apart[0] * 3 + apart[1] * 2, rel=1e-6)


# ---- small parts -------------------------------------------------------------------------------------------

def test_runs_fill_the_budget_and_lose_nothing():
    assert cut([5, 3, 4, 9, 1, 1], 8, int) == [[5, 3], [4], [9], [1, 1]]
    assert cut([5, 3, 1], 8, int) == [[5, 3], [1]]
    assert cut([], 8, int) == []


def examples_of(*shapes):
    """(prompt length, rollout lengths) -> Examples whose advantages number the rollouts."""
    examples = []
    for prompt, lengths in shapes:
        advantages = [[float(i)] * n for i, n in enumerate(lengths)]
        examples.append(Example([0] * prompt, [[1] * n for n in lengths], advantages, advantages))
    return examples


def test_a_group_longer_than_the_budget_is_split_by_rollouts_and_takes_its_prompt_along():
    examples = examples_of((10, [5, 5, 5, 9]), (3, [2, 2]), (4, [1]))
    shape = lambda part: (len(part.prompt), list(map(len, part.rollouts)), [a[0] for a in part.advantages])
    assert [shape(part) for part in split(examples[0], 20)] == [
        (10, [5, 5], [0.0, 1.0]), (10, [5], [2.0]), (10, [9], [3.0])]
    batches = pack(examples, 20, "cpu")
    lengths = lambda layout: (layout.prompt_lens.tolist(), layout.rollout_lens.tolist())
    assert [lengths(batch.layout) for batch in batches] == [
        ([10], [5, 5]), ([10], [5]), ([10], [9]), ([3, 4], [2, 2, 1])]
    assert [len(batch.tokens) for batch in batches] == [20, 15, 19, 12]
    assert batches[3].advantages.tolist() == batches[3].sampled_logprobs.tolist() == [0, 0, 1, 1, 0]
    assert pack([], 20, "cpu") == []


def test_a_rollout_alone_may_be_longer_than_the_budget():
    assert [len(batch.tokens) for batch in pack(examples_of((10, [5, 11])), 12, "cpu")] == [15, 21]


def test_examples_leave_out_groups_without_a_gradient():
    groups = random_groups(40)
    advantages = group_advantages(torch.tensor([g.rewards for g in groups])).tolist()
    examples, _ = Base.examples(None, groups, advantages, 0)
    alive = [i for i, group in enumerate(groups) if group.has_signal]
    assert len(alive) == 6 and [e.prompt for e in examples] == [groups[i].question.prompt for i in alive]
    for i, example in zip(alive, examples):
        assert example.advantages == [[a] * len(r.tokens) for a, r in zip(advantages[i], groups[i].rollouts)]


def test_a_rollout_that_may_not_fit_names_the_numbers():
    args = SimpleNamespace(max_new_tokens=11, tokens_per_micro_batch=21)
    check_prompts_fit(10, args)
    args.tokens_per_micro_batch = 20
    with pytest.raises(ValueError, match=r"prompt of 10 and a rollout of 11 tokens .* 20: 21 is the least"):
        check_prompts_fit(10, args)


HEALTHY = dict(frac_zero_std=0.5, format_rate=0.9, logp_gap=1e-6, len_mean=10.0)


def watcher(max_new_tokens):
    args = SimpleNamespace(device="cpu", max_new_tokens=max_new_tokens)
    return StepLog(args, torch.nn.Linear(1, 1), None).warnings


@pytest.mark.parametrize("changes, words", [
    (dict(format_rate=0.04), "4% of the rollouts hold a prediction"), (dict(logp_gap=0.051), "logp_gap is 0.051"),
    (dict(len_mean=96.0), "96 tokens on average and --max-new-tokens is 100")])
def test_each_alarm_speaks_once_and_only_when_it_should(changes, words):
    watch = watcher(100)
    assert [watch(HEALTHY) for _ in range(30)] == [[]] * 30
    (text,), again = watch(HEALTHY | changes), watch(HEALTHY | changes)
    assert words in text and again == [] and watch(HEALTHY | dict(logp_gap=math.nan)) == []


def test_twenty_dead_steps_in_a_row_are_an_alarm_nineteen_are_not():
    watch, dead = watcher(100), HEALTHY | dict(frac_zero_std=1.0)
    assert not any(watch(m) for m in [dead] * 19 + [HEALTHY] + [dead] * 19)
    (text,) = watch(dead)
    assert "for 20 steps" in text and not any(watch(dead) for _ in range(50))


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
        [example] = document_examples(corpus, [0], 7, 6, 0.2, np.random.default_rng(seed))
        [response], [weights], ids = example.rollouts, example.advantages, example.prompt + example.rollouts[0]
        seen.add(ids[0])
        assert len(ids) == 6 and weights == [1.0 if id >= 104 or id == 7 else 0.2 for id in response]
        assert ids == [*range(100, 110), 7][ids[0] - 100:][:6]
    assert seen == {100, 101, 102, 103, 104, 105}
    [example] = document_examples(corpus, [0], 7, 50, 0.2, np.random.default_rng(0))
    assert example.prompt + example.rollouts[0] == [*range(100, 110), 7]
    assert example.advantages == [[0.2] * 3 + [1.0] * 7]


def test_strings_of_a_prompt_share_it_and_each_of_their_tokens_counts_the_same(corpus, base, tmp_path):
    """The oracle is a forward pass over each string alone."""
    lines = [([5, 6, 7], [[8, 9], [9, 8, 4]]), ([5, 6], [[9]]), ([5, 6, 7], [[3, 2]])]
    path = write_lines(tmp_path / "strings.jsonl", dict(prompt=[5, 6, 7], responses=lines[0][1]),
                       dict(prompt=[5, 6], response=[9]), dict(prompt=[5, 6, 7], responses=[[3, 2]]))
    examples = read_strings(path, SimpleNamespace(vocab_size=99, max_positions=99))
    assert [(example.prompt, example.rollouts) for example in examples] == lines
    code, out, err = run_here("train_ntp.py", "--corpus", corpus.folder, "--init", base, "--strings", path,
                              "--documents-per-step", 0, "--strings-per-step", 3, "--steps", 1,
                              "--out-dir", tmp_path / "run")
    assert (code, err) == (0, "") and " 4 strings for 3 prompts, " in out
    model, losses = GPT.from_pretrained(base), []
    for prompt, responses in lines:
        for response in responses:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
            losses += F.cross_entropy(logits, torch.tensor(response), reduction="none").tolist()
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert metrics["tokens"] == 3 + 5 + 2 + 1 + 3 + 2


def test_the_learning_rate_rises_stays_and_ends_near_zero():
    args = SimpleNamespace(lr=2.0, warmup_steps=10, steps=100)
    rates = [learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:51] == [2.0] * 42
    assert rates[75] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 50)
    assert learning_rate(0, SimpleNamespace(lr=2.0, warmup_steps=0, steps=100)) == 2.0


def test_the_bar_shows_rollouts_that_have_ended_and_tokens_a_second(capsys):
    with RolloutBar(4, "thoughts", disable=False) as bar:
        bar([(0, 0, 5), (1, 0, 5)], 1)
        bar([(1, 0, 6)], 4)
        assert (bar.bar.n, bar.tokens) == (4, 3)
        bar.bar.refresh()
    shown = capsys.readouterr().err
    assert "thoughts: 100%" in shown and "4/4" in shown and "tok/s" in shown
    assert bar.bar.disable  # closed


@pytest.mark.parametrize("device, seconds", [("cuda:0", dict(gen=0, reward=0, train=7)),
                                             ("cpu", dict(gen=0, reward=0, train=0))])
def test_a_lap_waits_for_what_the_gpu_still_has_to_do(monkeypatch, device, seconds):
    """Launches return at once; seven seconds in line belong to the phase that has put them there."""
    now, line = [0], []
    monkeypatch.setattr(parallel, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.append(now.pop() + sum(line)) or line.clear())
    monkeypatch.setattr(parallel, "device_of_rank", device)
    log = StepLog(SimpleNamespace(device="cpu"), torch.nn.Linear(1, 1), None)
    log.start()
    line.append(7)
    log.lap("train")
    log.lap("gen")
    assert log.seconds == seconds


def test_the_length_of_a_match_is_that_of_right_predictions_whatever_they_earn():
    question = Question(prompt=[1], truth=[], context=[], position=0)
    rollouts = [Rollout(tokens=[1, 2], logprobs=[-1.0, -2.0], finished=True) for _ in range(4)]
    hits = [True, False, False, False]
    predictions = [b"ab", b"abcd", b"abcdefgh", None]
    group = Group(question, rollouts, predictions, [1.0, 1.0, 0.5, 0.0], hits, scoring_tokens=5)
    assert in_numbers(group)["read"] == 1 + 8 + 5
    metrics = rollout_metrics([in_numbers(group)])
    assert metrics["reward"] == 0.625 and metrics["accuracy"] == 0.25
    assert metrics["match_len"] == 2 and metrics["format_rate"] == 0.75 and metrics["entropy"] == 1.5


def test_ranks_exchange_numbers_and_not_rollouts(monkeypatch, tmp_path):
    """256 groups of 8 rollouts of 1,000 tokens; then rank 1 has all of them and rank 0 none."""
    def write(name, groups):
        (tmp_path / name).mkdir()
        args = SimpleNamespace(device="cpu", out_dir=tmp_path / name, lr=1.0, steps=1, max_new_tokens=2000)
        log = StepLog(args, torch.nn.Linear(1, 1), SimpleNamespace(decode_bytes=lambda ids: b"x" * len(ids)))
        log.seconds = dict(gen=1.0, reward=1.0, train=1.0)
        log.write(1, groups, dict(trained_tokens=10, logp_gap=0.0, grad_norm=1.0))
        return [(tmp_path / name / file).read_text() for file in ("metrics.jsonl", "samples.jsonl")]

    rollouts = [Rollout(list(range(1000)), [-0.123456789 - i for i in range(1000)]) for _ in range(8)]
    question = Question(prompt=[1] * 500, truth=[b" a"], context=[1] * 500, position=0)
    group = Group(question, rollouts, [b" a"] * 8, [1.0] + [0.0] * 7, [True] + [False] * 7)
    sent, gather = [], parallel.gather_lists
    monkeypatch.setattr(parallel, "gather_lists", lambda items: sent.append(items) or gather(items))
    alone = write("alone", [group] * 256)
    assert len(pickle.dumps(sent)) < 60_000
    monkeypatch.setattr(parallel, "gather_lists", lambda items: items + sent.pop(0))
    assert write("rank 0 of 2", []) == alone


def test_a_torn_last_line_and_later_steps_are_cut_from_a_log(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "x": "é"}\n{"step": 3}\n{"step": 4, "rew')
    cut_log(str(log), 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2, "x": "é"}\n'


METRICS = dict(step=7, reward=0.5, format_rate=1.0, frac_zero_std=0.25, entropy=0.125, len_mean=27.4, grad_norm=0.5,
               logp_gap=3.5e-7, gen_tok_s=21_000.0, train_tok_s=14_000.0, dt_gen=0.2, dt_reward=0.0, dt_train=0.2)


def test_a_narrow_terminal_shows_what_matters_most():
    whole = step_line(250, METRICS)
    assert whole == ("step 00007/00250 | reward 0.500 | fmt 1.00 | zero_std 0.25 | ent 0.12 | len 27 | gnorm 0.50 | "
                     "gap 3.5e-07 | gen 21,000 tok/s | train 14,000 tok/s | dt 0.4s")
    assert step_line(250, METRICS, len(whole) + 1) == whole
    assert len(step_line(250, METRICS, len(whole))) < len(whole)
    narrow = step_line(250, METRICS, 80)
    assert narrow == "step 00007/00250 | reward 0.500 | zero_std 0.25 | len 27 | gap 3.5e-07"
    for word in ("step", "reward", "zero_std", "len", "gap"):
        assert f"{word} " in narrow and f"{word} " in step_line(250, METRICS, 10)


def test_on_a_terminal_ten_lines_of_a_run_stay_and_a_file_gets_all(monkeypatch, capsys):
    args = SimpleNamespace(steps=30, device="cpu", max_new_tokens=64)
    for is_terminal in (False, True):
        log = StepLog(args, torch.nn.Linear(1, 1), None)
        monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
        for step in range(1, 31):
            log.show(step, METRICS | dict(step=step))
        screen = []
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("\x1b[A\x1b[K"):  # one up, clear
                screen.pop()
            screen.append(line.removeprefix("\x1b[A\x1b[K"))
        steps = [int(line.split("/")[0].split()[1]) for line in screen]
        assert steps == (list(range(3, 31, 3)) if is_terminal else list(range(1, 31)))
