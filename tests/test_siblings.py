"""The objectives beside RPT: rewards, advantages, token weights and gradients against the papers' formulas."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch

import kernels
import objectives
from data.prompt import stop_ids
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, read_config
from objectives import Group, Question, dsrl, markovian, ra3
from plumbing import likelihood
from plumbing.batch import pack
from plumbing.log import flops_of_run, in_numbers, rollout_metrics
from sample import Rollout, generate
from test_runs import command, contents, lines
from test_scale import assert_same, run_on
from test_train import double, fp64
from tiny import ROOT, base, corpus, run_here, thinker
from train_rpt import group_advantages, policy_update

G, TEMPERATURE = 4, 0.7
THOUGHTS = ["rlp", "gain_n", "ra3", "markovian"]         # thoughts alone, scored by the policy
UPDATES = ["nsr", "nsr_wrong", "prerl", "dsrl"]          # RPT's task, another update
NAMES = THOUGHTS + UPDATES


@pytest.fixture
def tokenizer():
    return Tokenizer.load("embedded")


@pytest.fixture
def model(fp64, tokenizer):
    """Random, with weights large enough that distributions are far from flat."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
                          ffn_width=48, max_positions=128))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return double(model)


@pytest.fixture
def make(base, corpus, tokenizer):
    """make(name, **changes) -> the objective, on the small corpus."""
    def made(name, **changes):
        temperature = 1 if name == "markovian" else TEMPERATURE
        usual = dict(objective=name, init=base, corpus=corpus.folder, proxy=None, data=None, template="short",
                     entropy_threshold=0.5, max_prompt_tokens=100, max_new_tokens=12, seed=0, rollouts=G,
                     tokens_per_micro_batch=60, skip_bad=False, skip_long=False, importance_cap=0.0,
                     temperature=temperature, normalize_advantage=False)
        return objectives.load(name)(SimpleNamespace(**usual | changes), tokenizer, read_config(base))
    return made


def groups_of(objective, tokenizer, n=5):
    """Questions with thoughts that were closed, cut off, ended by a stop token, or empty, and boxes where wanted."""
    encode = lambda text: tokenizer.encode(text, special=True)
    groups = []
    for i, position in enumerate(objective.take(0, n)):
        question = objective.question(position)
        truth = question.truth[0].decode()
        texts = ["7+4=1; odd</think>", "7+4=1;1", "hm<|end|>", "</think>"]
        if objective.args.objective in UPDATES:
            # The second group has no right rollout, the third no wrong one.
            words = {1: [" no"] * G, 2: [truth] * G}.get(i, [truth, " no", truth, " yes"])
            texts = [f"{i};" * j + rf"</think>\boxed{{{word}}}<|end|>" for j, word in enumerate(words)]
        rollouts = [Rollout(encode(text), [], not text.endswith("1")) for text in texts]
        groups.append(Group(question, rollouts))
    return groups


def logprobs(model, prompt, tokens, temperature=1.0):
    """One sequence at a time: the log-prob of each of the tokens behind the prompt."""
    logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def closed(tokenizer, rollout):
    """A thought as text, then closed, then as far as the inside of the box."""
    text = tokenizer.decode_bytes(rollout.tokens).decode().removesuffix("<|end|>").removesuffix("</think>")
    return tokenizer.encode(text + r"</think>\boxed{", special=True)


def true_tokens(corpus, question, n):
    end = next(end for start, _, end, _ in corpus.docs.tolist() if start <= question.position < end)
    return corpus.tokens[question.position:min(end, question.position + n)].tolist()


def targets_of(name, corpus, tokenizer, question):
    tokens = true_tokens(corpus, question, 4 if name == "gain_n" else 32 if name == "ra3" else 1)
    if name == "ra3":  # the sentence
        texts = [tokenizer.decode_bytes(tokens[:i + 1]) for i in range(len(tokens))]
        full = [i for i, text in enumerate(texts) if text.rstrip(b" ").endswith((b".", b"?", b"!", b"\n"))]
        tokens = tokens[:full[0] + 1] if full else tokens
    return tokens


def gain(model, corpus, tokenizer, name, group, rollout):
    """log p(targets | context, thought) - log p(targets | context), in nats."""
    targets = targets_of(name, corpus, tokenizer, group.question)
    seen = closed(tokenizer, rollout)
    if name != "markovian":
        seen = group.question.prompt + seen
    without = logprobs(model, group.question.context, targets).sum().detach()  # a constant
    worth = logprobs(model, seen, targets).sum() - without
    is_empty = tokenizer.decode_bytes(rollout.tokens).startswith(b"</think>")
    return worth - 0.1 if name == "ra3" and not is_empty else worth


def brute_loss(model, corpus, tokenizer, name, groups, step):
    """What each paper's formula says, one rollout at a time."""
    total, size, start = 0.0, 0, [tokenizer.eos_id]
    rollouts = sum(len(group.rollouts) for group in groups)
    for group in groups:
        if name in THOUGHTS:
            rewards = torch.stack([gain(model, corpus, tokenizer, name, group, r) for r in group.rollouts])
        else:
            right = [tokenizer.decode_bytes(r.tokens).split(b"{")[1].split(b"}")[0] == group.question.truth[0]
                     for r in group.rollouts]
            rewards = torch.tensor(right, dtype=torch.float64)
        fixed = rewards.detach()
        advantages = fixed - fixed.mean()
        temperature = 1.0 if name == "markovian" else TEMPERATURE
        for rollout, r, a in zip(group.rollouts, rewards, advantages):
            has_no_prompt = name == "prerl" or name == "dsrl" and step < 20
            prompt = start if has_no_prompt else group.question.prompt
            lp = logprobs(model, prompt, rollout.tokens, temperature)
            if name == "rlp":
                total, size = total - G / (G - 1) * a * lp.mean(), rollouts
            elif name == "markovian":
                std = fixed.std()
                total, size = total - a / std * lp.mean() - r / std, rollouts
            elif name == "nsr" or has_no_prompt and name == "dsrl":
                if a < 0:
                    total, size = total - a * lp.sum(), size + len(lp)
            elif name == "nsr_wrong":
                total, size = total + (1 - fixed[0] * 0 - r) * lp.sum(), size + len(lp)
            else:
                total, size = total - a * lp.sum(), size + len(lp)
    return total / size


def gradients(model):
    """All of them, flat; 0 where a rank without work computed none."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in model.parameters()])


def update(model, objective, groups, size=None, budget=50, step=0):
    """Score, and take a step of size 0 -> its metrics, the size of the batch; gradients are left in the model."""
    for group in groups:
        for rollout in group.rollouts:
            rollout.logprobs = logprobs(model, group.question.prompt, rollout.tokens,
                                        objective.args.temperature).tolist()
    objective.score(model, groups)
    for group in groups:
        group.hits = [objective.is_right(p, group.question.truth) for p in group.predictions]
    advantages = group_advantages(torch.tensor([group.rewards for group in groups])).tolist()
    examples, own_size = objective.examples(groups, advantages, step)
    args = SimpleNamespace(updates_per_batch=1, temperature=objective.args.temperature, clip_low=0.2, clip_high=0.2,
                           importance_cap=0.0, grad_clip=math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = pack(examples, budget, model.device)
    return policy_update(model, optimizer, batches, size or own_size, args), own_size


CASES = [(name, 0) for name in NAMES] + [("dsrl", 19), ("dsrl", 20)]


@pytest.mark.parametrize("name, step", CASES)
def test_gradients_are_those_of_the_formula_whatever_the_micro_batches_and_ranks(
        model, make, corpus, tokenizer, name, step):
    objective = make(name)
    groups = groups_of(objective, tokenizer)
    brute_loss(model, corpus, tokenizer, name, groups, step).backward()
    expected = gradients(model)
    assert expected.norm() > 1e-3
    for budget in (40, 10**6):
        fresh = [Group(group.question, group.rollouts) for group in groups]
        metrics, size = update(model, objective, fresh, budget=budget, step=step)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-8, atol=1e-12)
        # Sampler and trainer agree where they speak of the same tokens behind the same prompt.
        other_prompt = name == "prerl" or name == "dsrl" and step < 20
        assert math.isnan(metrics["logp_gap"]) if other_prompt else metrics["logp_gap"] < 1e-12
    for ranks in (2, 4):  # gradients are summed over them
        parts = []
        for rank in range(ranks):
            some = groups[len(groups) * rank // ranks:len(groups) * (rank + 1) // ranks]
            update(model, objective, [Group(g.question, g.rollouts) for g in some], size=size, step=step)
            parts.append(gradients(model))
        torch.testing.assert_close(sum(parts), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", THOUGHTS)
def test_rewards_are_gains_at_temperature_1_of_closed_thoughts(model, make, corpus, tokenizer, name):
    objective = make(name)
    groups = groups_of(objective, tokenizer)
    objective.score(model, groups)
    for group in groups:
        expected = [gain(model, corpus, tokenizer, name, group, r).item() for r in group.rollouts]
        assert group.rewards == pytest.approx(expected, rel=1e-10)
        targets = targets_of(name, corpus, tokenizer, group.question)
        plain = logprobs(model, group.question.context, targets).sum().item()
        assert group.measures["plain_logprob"] == pytest.approx([plain] * G, rel=1e-10)
        # What the policy would have said: the likeliest token, for thoughts that were closed.
        seen = [] if name == "markovian" else group.question.prompt
        said = [tokenizer.token_bytes(model(torch.tensor([seen + closed(tokenizer, r)]))[0, -1].argmax().item())
                for r in group.rollouts]
        assert group.predictions == [said[0], None, None, said[3]]
        read = [len(seen) + len(closed(tokenizer, r)) + len(targets) for r in group.rollouts]
        shared = 0 if name == "markovian" else (G - 1) * len(seen)
        assert group.scoring_tokens == sum(read) - shared + len(group.question.context) + len(targets)
        drawn = sum(len(rollout.tokens) for rollout in group.rollouts)
        assert in_numbers(group)["read"] == len(group.question.prompt) + drawn + group.scoring_tokens


def test_by_hand(make, tokenizer, monkeypatch):
    """Log-probs are given; rewards, advantages and the weight of each token are what one gets with a pencil."""
    question = Question([5, 6], [b" odd", b"."], [5], 0)
    rollouts = [Rollout(tokenizer.encode(text, special=True), [-1.0] * 9, True)
                for text in ("7+4=1;</think>", "1;</think>", "</think>", "1;</think>")]
    lengths = [len(rollout.tokens) for rollout in rollouts]
    table = {1: [-1.0, -2.0, -3.0, -2.0]}

    def read(policy, texts, budget):
        rows = iter(table[1])
        return [[([next(rows) if len(texts) * len(pairs) > 1 else -2.5], 0) for _ in pairs] for _, pairs in texts]

    monkeypatch.setattr(objectives.rlp, "read", read)
    expected = dict(
        rlp=([1.5, 0.5, -0.5, 0.5], [4 / 3 / lengths[0], 0, -4 / 3, 0], 4),
        gain_n=([1.5, 0.5, -0.5, 0.5], [1.0, 0, -1.0, 0], sum(lengths)),
        # Three pay 0.1 for a thought: 1.4, 0.4, -0.5, 0.4, with mean 0.425.
        ra3=([1.4, 0.4, -0.5, 0.4], [0.975, -0.025, -0.925, -0.025], sum(lengths)),
        # The standard deviation of 1, 0, -1, 0 is sqrt(2 / 3).
        markovian=([1.5, 0.5, -0.5, 0.5], [1.5**0.5 / lengths[0], 0, -1.5**0.5, 0], 4))
    for name, (rewards, weights, size) in expected.items():
        objective, group = make(name), Group(question, rollouts)
        objective.score(None, [group])
        assert group.rewards == pytest.approx(rewards)
        advantages = group_advantages(torch.tensor([group.rewards], dtype=torch.float64)).tolist()
        examples, found = objective.examples([group], advantages, 0)
        thoughts = examples[0]
        by_tokens = {tuple(ids): w for ids, w in zip(thoughts.rollouts, thoughts.advantages)}
        for rollout, weight in zip(rollouts, weights):
            values = by_tokens.get(tuple(rollout.tokens), [0.0])
            assert values == pytest.approx([weight] * len(values), abs=1e-9)
        assert found == size
        if name == "markovian":  # each target has the weight 1 / std, behind its thought alone
            assert len(examples) == 1 + G
            for example, rollout in zip(examples[1:], rollouts):
                assert example.prompt == rollout.tokens + objective.predict
                assert example.advantages == [[pytest.approx(1.5**0.5)]] and example.logprobs[0][0] in table[1]


def test_advantages_of_updates_by_hand(make, tokenizer):
    question = Question([5, 6], [b" odd", b"."], [5], 0)
    texts = [r"</think>\boxed{ odd}", r"</think>\boxed{ no}", r"1</think>\boxed{ odd}", r"22</think>\boxed{ no}"]
    rollouts = [Rollout(tokenizer.encode(text, special=True), [-1.0] * 9, True) for text in texts]
    a, b, c, d = (len(rollout.tokens) for rollout in rollouts)
    expected = dict(nsr=([-0.5] * b + [-0.5] * d, b + d), nsr_wrong=([-1.0] * b + [-1.0] * d, a + b + c + d),
                    prerl=([0.5] * a + [-0.5] * b + [0.5] * c + [-0.5] * d, a + b + c + d),
                    dsrl=([-0.5] * b + [-0.5] * d, b + d))
    for name, (weights, size) in expected.items():
        objective, group = make(name), Group(question, rollouts)
        objective.score(None, [group])
        group.hits = [objective.is_right(p, question.truth) for p in group.predictions]
        assert group.rewards == [1, 0, 1, 0] and group.hits == [True, False, True, False]
        [example], found = objective.examples([group], [[0.5, -0.5, 0.5, -0.5]], 0)
        assert sum(example.advantages, []) == weights and found == size
        assert example.prompt == ([tokenizer.eos_id] if name in ("prerl", "dsrl") else [5, 6])
    # An all-wrong group speaks in one reading of NSR alone.
    group = Group(question, rollouts, [None] * G, [0.0] * G, [False] * G)
    assert make("nsr").examples([group], [[0.0] * G], 0) == ([], 0)
    [example], _ = make("nsr_wrong").examples([group], [[0.0] * G], 0)
    assert {w for weights in example.advantages for w in weights} == {-1.0}
    # After the warm-up DSRL is ordinary.
    ordinary, size = make("dsrl").examples([group], [[0.5, -0.5, 0.5, -0.5]], dsrl.WARM_UP)
    assert ordinary[0].prompt == [5, 6] and len(ordinary[0].rollouts) == G and size == a + b + c + d


def test_a_moving_average_as_baseline_changes_no_advantage(model, make, tokenizer):
    """RLP's equation 5 with the average of the policy's weights, kept in fp32, over ten updates."""
    objective = make("rlp")
    average = copy.deepcopy(model).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    apart = 0.0
    for step in range(10):
        groups = groups_of(objective, tokenizer)
        objective.score(model, groups)
        ours = group_advantages(torch.tensor([group.rewards for group in groups]))
        papers = []
        for group in groups:
            targets = objective.targets(group.question)
            with torch.no_grad():
                before = logprobs(average, group.question.context, targets).sum()
            now = group.measures["plain_logprob"][0]
            papers.append([reward + now - before.item() for reward in group.rewards])
            apart = max(apart, abs(before.item() - now))
        torch.testing.assert_close(group_advantages(torch.tensor(papers)), ours, rtol=1e-9, atol=1e-12)
        loss = sum(logprobs(model, g.question.prompt, g.rollouts[0].tokens).sum() for g in groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for slow, fast in zip(average.parameters(), model.parameters()):
            slow.data.lerp_(fast.data, 0.001)  # the paper's 0.999
    assert apart > 0.5  # nats: the two baselines are not the same


def test_the_rewards_own_gradient_vanishes_if_mean_and_std_are_not_constants(model, make, corpus, tokenizer):
    """The trap of the authors' parallel code: minus the sum of standardised rewards is 0, whatever the weights."""
    [group] = groups_of(make("markovian"), tokenizer, n=1)
    rewards = torch.stack([gain(model, corpus, tokenizer, "markovian", group, r) for r in group.rollouts])
    found = {}
    for name, centre in (("naive", rewards), ("constants", rewards.detach())):
        loss = -((rewards - centre.mean()) / centre.std()).sum()
        found[name] = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found[name] = sum(gradient.norm()**2 for gradient in found[name])**0.5
    assert found["naive"] < 1e-10 and found["constants"] > 0.1


def test_a_segment_does_not_end_with_white_space(make):
    """Tokens of spaces alone, as in the indentation of code: each of them once ended a segment."""
    objective = make("ra3")
    cases = {(b"  ", b"return", b" x", b"\n", b"y"): 4, (b" ", b"odd", b".", b" 7"): 3, (b" no", b"?)", b" so"): 3,
             (b" a", b".\n\n", b"b"): 2, (b" Hm", b"! ", b"b"): 2}
    for truth, n in cases.items():
        t = int(objective.positions[0][0])
        question = Question([5], list(truth), [5], t)
        assert objective.targets(question) == objective.corpus.tokens[t:t + n].tolist()


# ---- the ends of thoughts -----------------------------------------------------------------------------------

def test_a_thought_ends_where_it_is_closed_also_by_several_tokens(make, tokenizer):
    objective = make("rlp")
    plain = tokenizer.encode("</think>")          # not as the special token
    assert len(plain) > 1
    assert objective.is_end(plain) and objective.is_end([5] + plain) and objective.is_end(objective.close)
    assert not objective.is_end(plain[:-1]) and not objective.is_end(plain + [5] * 8)
    rollout = Rollout([5, *plain], [], True)
    assert objective.closed(rollout) == [5, *plain] + objective.predict
    # Its last token may hold more than the end, as ">\n" of many tokenizers does.
    tokenizer._bytes[999] = b">\n"
    rollout.tokens[-1] = 999
    assert objective.is_end(rollout.tokens) and objective.thought(rollout) == tokenizer.decode_bytes([5])
    assert objective.closed(rollout) == [5, *plain[:-1], 999] + objective.predict


def test_generate_ends_a_rollout_where_it_is_told_to_and_disturbs_no_other(tiny_gpt):
    prompts, ends = [[3, 1, 4], [1, 5], [9, 2, 6, 5]], lambda tokens: sum(tokens) % 7 == 3
    whole = generate(tiny_gpt, prompts, 4, 16, 0.8, [21], seed=5)
    for rows in (1, 3, 12):
        ended = generate(tiny_gpt, prompts, 4, 16, 0.8, [21], seed=5, max_rows=rows, is_end=ends)
        cut = 0
        for some, all_of_it in zip(sum(ended, []), sum(whole, [])):
            n = next((i for i in range(1, len(all_of_it.tokens) + 1) if ends(all_of_it.tokens[:i])), None)
            cut += n is not None
            assert some.tokens == all_of_it.tokens[:n]
            assert some.finished == (n is not None or all_of_it.finished)
        assert 3 < cut < 12


def test_reading_is_the_same_whatever_the_budget(model):
    groups = [([1, 2, 3], [([4], [5, 6]), ([], [7])]), ([8], [([9, 10], [11])])]
    for budget in (1, 1000):
        found = likelihood.read(model, groups, budget)
        for (prompt, pairs), some in zip(groups, found, strict=True):
            for (given, targets), (values, guess) in zip(pairs, some, strict=True):
                assert values == pytest.approx(logprobs(model, prompt + given, targets).tolist(), rel=1e-10)
                assert guess == model(torch.tensor([prompt + given]))[0, -1].argmax().item()
    assert likelihood.read(model, [], 10) == []


def test_no_text_that_is_scored_is_longer_than_the_model(make, monkeypatch):
    """Prompt, rollout, what closes it and what is scored: the longest of all have to fit its 128 positions."""
    seen = []

    def read(policy, texts, budget):
        seen.extend(len(prompt + given + targets) for prompt, pairs in texts for given, targets in pairs)
        return [[([-1.0], 0) for _ in pairs] for _, pairs in texts]

    monkeypatch.setattr(objectives.rlp, "read", read)
    for name, n in (("ra3", 80), ("gain_n", 105), ("rlp", 105)):
        objective = make(name, max_prompt_tokens=128, max_new_tokens=n)
        groups = [Group(objective.question(position), [Rollout([5] * n)]) for position in objective.positions[:200]]
        objective.score(None, groups)
    assert max(seen) == 128


def test_a_model_may_expect_an_id_that_its_tokenizer_lacks(make, tokenizer, monkeypatch):
    """Embeddings are often padded, and a row without a token can be the likeliest one."""
    lacking = tokenizer.vocab_size + 3
    monkeypatch.setattr(objectives.rlp, "read", lambda policy, texts, budget: [
        [([-1.0], lacking) for _ in pairs] for _, pairs in texts])
    group = Group(Question([5, 6], [b" odd"], [5], 0), [Rollout(tokenizer.encode("</think>", special=True), [], True)])
    make("rlp").score(None, [group])
    assert group.predictions == ["\ufffd".encode()]


def test_equal_rewards_are_no_advantage_whatever_their_mean_is_rounded_to():
    """In fp32 the mean of eight equal gains was off by 1e-7 in two groups of five, and A / std was noise of size 1."""
    torch.manual_seed(0)
    rewards = torch.randn(500, 1).expand(500, 7)
    for normalize in (False, True):
        assert group_advantages(rewards, normalize).abs().max() == 0
    groups = [dict(rewards=some, hits=[0], boxes=[None], tokens=[1], logprobs=[0], truncated=[0], measures={})
              for some in torch.randn(500, 1).double().div(3).expand(500, 7).tolist()]
    assert rollout_metrics(groups)["frac_zero_std"] == 1


def test_rewards_that_differ_by_rounding_train_nothing(make):
    """Markovian divides by their standard deviation: 1e-7 nats gave a group the weight of ten million."""
    group = Group(Question([5, 6], [b" odd"], [5], 0), [Rollout([7], [-1.0])] * G, scored=[([-1.0], 0)] * G)
    for spread, n in ((1e-7, 0), (1e-3, 0), (0.1, 1 + G)):
        examples, size = make("markovian").examples([group], [[spread, -spread, spread, -spread]], 0)
        assert len(examples) == n and size == G


def test_a_gain_compares_the_same_context(model, make, tokenizer):
    """A prompt may lose its beginning, and then the score without a thought must not see it either."""
    objective = make("rlp", max_prompt_tokens=6)
    for group in groups_of(objective, tokenizer):
        assert len(group.question.prompt) <= 6 and group.question.prompt[-1] == tokenizer.special["<think>"]
        objective.score(model, [group])
        targets = objective.targets(group.question)
        plain = logprobs(model, group.question.prompt[:-1], targets).sum().item()
        assert group.measures["plain_logprob"] == pytest.approx([plain] * G, rel=1e-10)


def test_a_text_without_its_prompt_begins_with_the_bos_of_the_tokenizer(make, tokenizer):
    rollout = Rollout(tokenizer.encode("1</think>", special=True), [-1.0] * 2, True)
    objectives_by_name = {name: make(name) for name in ("rlp", "markovian", "prerl")}
    tokenizer.bos = [9]
    for name, objective in objectives_by_name.items():
        group = Group(Question([9, 5, 6], [b" odd"], [5], 0), [rollout] * G)
        if name == "rlp":
            objective.template = [9], [6]
            assert objective.without(group.question)[0] == [9, 5]
        elif name == "markovian":
            assert [prompt[:2] for prompt, _ in objective.with_thoughts(group)] == [[9, rollout.tokens[0]]] * G
        else:
            [example], _ = objective.examples([group], [[0.5, -0.5] * 2], 0)
            assert example.prompt == [9]


def test_what_ends_a_thought_is_no_part_of_it(model, make, tokenizer):
    """RA3's price was due for a stop token alone, and Markovian's overlap fell with each </think>."""
    for name in ("ra3", "markovian"):
        objective = make(name)
        question = objective.question(objective.take(0, 9)[-1])
        copied = tokenizer.decode_bytes(question.context)[:12].decode()
        texts = ["</think>", "<|end|>", copied + "</think>", copied + "<|end|>"]
        rollouts = [Rollout(tokenizer.encode(text, special=True), [], True) for text in texts]
        assert [objective.thought(r) for r in rollouts] == [b"", b"", copied.encode(), copied.encode()]
        group = Group(question, rollouts)
        objective.score(model, [group])
        assert group.rewards[1] == pytest.approx(group.rewards[0]), name
    assert group.measures["overlap"] == [0, 0, 1, 1]


def test_overlap_is_the_share_of_pieces_that_the_context_holds():
    assert markovian.overlap(b"abcdefgh", b"xabcdefghx") == 1
    assert markovian.overlap(b"abcdefghi", b"abcdefgh") == 0.5
    assert markovian.overlap(b"abc", b"abc") == 0


# ---- whole runs ---------------------------------------------------------------------------------------------

def line_of(name, corpus, base, run, **more):
    temperature = 1 if name == "markovian" else 1.2
    return command("train_rpt.py", corpus, base, run, objective=name, **dict(temperature=temperature) | more)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_moves_and_its_halves_are_the_whole(corpus, thinker, tmp_path, monkeypatch, name):
    monkeypatch.setattr(dsrl, "WARM_UP", 4)
    line = lambda run, **more: line_of(name, corpus, thinker, tmp_path / run, **more)
    code, _, err = run_here(*line("whole"))
    assert (code, err) == (0, "")
    assert run_here(*line("halves", steps=3))[0] == 0 and run_here(*line("halves", resume=True))[0] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "halves")
    steps = lines(tmp_path / "whole")
    assert sum(step["grad_norm"] > 0 for step in steps) > 3
    for step in steps:
        assert step["format_rate"] > 0.3
        if name not in ("prerl", "dsrl"):
            assert (step["logp_gap"] or 0) < 1e-5
        if name in THOUGHTS:
            assert step["plain_logprob"] < 0 and step["frac_zero_std"] < 1
        assert ("overlap" in step) == (name == "markovian")
    if name in THOUGHTS:  # nothing comes behind a thought
        assert all(sample["response"].split("</think>")[1:] in ([""], []) for sample in
                   lines(tmp_path / "whole", "samples.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks", [("rlp", 2), ("markovian", 2), ("nsr", 4), ("dsrl", 4)])
def test_ranks_take_the_same_steps(corpus, thinker, tmp_path, name, ranks):
    line = lambda run: line_of(name, corpus, thinker, tmp_path / run, steps=5, save_every=5, lr="1e-4")
    for n in (1, ranks):
        code, _, err = run_on(n, line(str(n)))
        assert code == 0, err
    assert_same(tmp_path / "1", tmp_path / str(ranks), thinker)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["markovian", "nsr"])
def test_bitwise_kernels_leave_no_gap(corpus, thinker, tmp_path, name):
    """Thoughts as sampled and as trained, and what follows them as scored and as trained."""
    line = line_of(name, corpus, thinker, tmp_path / "run", kernels="bitwise", steps=2, batch_size=3, rollouts=3,
                   max_new_tokens=8)
    code, _, err = run_here(*line)
    kernels.set_backend("torch")
    assert code == 0, err
    gaps = [step["logp_gap"] for step in lines(tmp_path / "run")]  # null where no group had a signal
    assert {gap for gap in gaps if gap is not None} == {0.0}


def test_a_run_ends_with_the_flops_of_another(corpus, base, tmp_path):
    line = lambda run, **more: command("train_rpt.py", corpus, base, tmp_path / run, **more)
    assert run_here(*line("rpt", steps=4))[0] == 0
    budget = flops_of_run(tmp_path / "rpt")
    matched = line("nsr", objective="nsr", steps=99, match_compute=tmp_path / "rpt")
    code, out, err = run_here(*matched)
    assert (code, err) == (0, "") and "done: " in out
    steps = [step["flops"] for step in lines(tmp_path / "nsr")]
    assert sum(steps[:-1]) < budget <= sum(steps) and (tmp_path / "nsr" / f"step_{len(steps):06d}").exists()
    before = contents(tmp_path / "nsr")
    code, out, _ = run_here(*matched, "--resume")
    assert code == 0 and "done: " in out and contents(tmp_path / "nsr") == before
    code, _, err = run_here(*line("other", match_compute=tmp_path / "none"))
    assert code == 2 and err.count("\n") == 1 and "not the folder of a training run" in err
    assert not (tmp_path / "other").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    for script in ("train_rpt.py", "train_ntp.py"):
        code, _, err = run_here(*command(script, corpus, base, tmp_path / "other", match_compute=tmp_path))
        assert code == 2 and err.count("\n") == 1 and "metrics.jsonl: step 1 has no 'flops'" in err
    code, out, _ = run_here(*line("few", steps=1, match_compute=tmp_path / "rpt"))
    assert code == 0 and "--steps 1 came first: " in out and "--steps" not in run_here(*matched, "--resume")[1]


@pytest.mark.parametrize("changes, words", [
    (dict(objective="markovian", temperature=0.8), "--objective markovian needs --temperature 1, got 0.8"),
    (dict(objective="markovian", temperature=1, normalize_advantage=True),
     "--objective markovian cannot take --normalize-advantage"),
    (dict(objective="nsr_wrong", normalize_advantage=True),
     "--objective nsr_wrong cannot take --normalize-advantage"),
    (dict(objective="prerl", importance_cap=2), "--objective prerl cannot take --importance-cap"),
    (dict(objective="dsrl", importance_cap=2), "--objective dsrl cannot take --importance-cap"),
    (dict(objective="nsr", data="x.jsonl"), "--objective nsr needs either --corpus or --data"),
    (dict(objective="rlp", max_new_tokens=126), "the template takes")])
def test_what_does_not_fit_an_objective_is_one_line(corpus, base, tmp_path, changes, words):
    code, _, err = run_here(*command("train_rpt.py", corpus, base, tmp_path / "run", **changes))
    assert code == 2 and err.count("\n") == 1 and words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", THOUGHTS)
def test_objectives_about_text_ask_for_a_corpus(base, tmp_path, name):
    words = ["train_rpt.py", "--objective", name, "--init", base, "--out-dir", tmp_path / "run", "--data", "x.jsonl",
             "--temperature", 1]
    code, _, err = run_here(*words)
    assert code == 2 and err.count("\n") == 1 and f"--objective {name} needs --corpus" in err


def test_dynamic_sampling_keeps_the_groups_that_are_all_wrong_for_those_who_train_on_them(
        make, corpus, thinker, tmp_path):
    """nsr_wrong trains most on groups whose rewards are all 0, and the default drops these from step 500 on."""
    kept = {name: [make(name).trains(Group(None, [], [], [float(hit) for hit in hits], hits))
                   for hits in ([False] * G, [True] * G, [False, True] * 2)] for name in UPDATES + ["rlp"]}
    assert kept.pop("nsr_wrong") == [True, False, True]
    assert all(some == [False, False, True] for some in kept.values())
    sampled = {}
    for name in ("nsr", "nsr_wrong"):
        code, _, err = run_here(*line_of(name, corpus, thinker, tmp_path / name, steps=3, dynamic_sampling_from=0))
        assert code == 0, err
        sampled[name] = [round(step["tokens"] / step["len_mean"]) for step in lines(tmp_path / name)]
    assert sum(sampled["nsr_wrong"]) < sum(sampled["nsr"])  # rollouts; fewer groups are replaced


def test_updates_can_be_about_questions(corpus, base, tokenizer, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "2+3 is", "answer": "five"}\n' * 3)
    for name in UPDATES:
        line = [word for word in command("train_rpt.py", corpus, base, tmp_path / name, objective=name, data=path,
                                         steps=1)]
        at = line.index("--corpus")
        del line[at:at + 2]
        code, _, err = run_here(*line)
        assert code == 0, err
        assert lines(tmp_path / name, "samples.jsonl")[0]["truth"] == "five"


def test_thoughts_that_are_taught_have_one_box(corpus, base, tmp_path):
    """own_rollouts.py samples as training does: a rollout ends with its thought."""
    line = ["paper/own_rollouts.py", "--objective", "rlp", "--corpus", corpus.folder, "--init", base, "--template",
            "short", "--count", 5, "--rollouts", 2, "--max-new-tokens", 12, "--out", tmp_path / "own.jsonl"]
    code, _, err = run_here(*line)
    assert code == 0, err
    texts = [string["text"] for string in lines(tmp_path, "own.jsonl")]
    assert len(texts) == 10 and all(text.count("\\boxed{") == text.count("</think>") == 1 for text in texts)


def test_without_a_box_a_lesson_closes_none(make, tokenizer, monkeypatch):
    monkeypatch.setattr(objectives.rlp, "PREDICT", "")
    objective = make("rlp")
    [group] = groups_of(objective, tokenizer, n=1)
    truth = group.question.truth[0]
    assert tokenizer.decode_bytes(objective.lessons(group)[0]) == b"7+4=1; odd</think>" + truth + b"<|end|>"


def test_ra3_teaches_its_best_thoughts_and_the_segment_behind_them(make, tokenizer):
    objective = make("ra3")
    [group] = groups_of(objective, tokenizer, n=1)
    group.rewards = [-1.0, 0.5, 0.2, 0.0]
    [response] = objective.lessons(group)
    segment = tokenizer.decode_bytes(objective.targets(group.question))
    assert tokenizer.decode_bytes(response) == rb"7+4=1;1</think>\boxed{" + segment + b"}<|end|>"
    group.rewards = [-1.0, -0.5, -0.2, 0.0]
    assert objective.lessons(group) == []  # no thought pays
    assert ra3.PRICE == 0.1


def test_the_examples_in_the_docs_do_what_is_said_of_them(model, make, corpus, tokenizer):
    """Both objectives of docs/objectives.md: a fine for length; surprise, and rollouts above the mean alone."""
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    short, surprise = ({} for _ in range(2))
    for name, names in (("short", short), ("surprise", surprise)):
        code = text.split(f"`objectives/{name}.py`:")[1].split("```python")[1].split("```")[0]
        exec(code, names)
        made = make("nsr")  # for its arguments
        names["groups"] = groups_of(made, tokenizer)
        names["objective"] = names["Objective"](made.args, tokenizer, read_config(made.args.init))
        names["objective"].score(model, names["groups"])
    for group, other in zip(short["groups"], surprise["groups"]):
        right = [p == group.question.truth[0] for p in group.predictions]
        fines = [0.001 * len(rollout.tokens) for rollout in group.rollouts]
        assert group.rewards == pytest.approx([r - fine for r, fine in zip(right, fines)])
        assert group.measures["fine"] == pytest.approx(fines)
        [target] = true_tokens(corpus, group.question, 1)
        worth = -logprobs(model, group.question.context, [target]).item()
        assert other.rewards == pytest.approx([worth * r for r in right])
        assert other.scoring_tokens == len(group.question.context) + 1
    groups = surprise["groups"]
    advantages = group_advantages(torch.tensor([group.rewards for group in groups])).tolist()
    examples, size = surprise["objective"].examples(groups, advantages, 0)
    above = [r.tokens for group, row in zip(groups, advantages) for r, a in zip(group.rollouts, row) if a > 0]
    assert [ids for example in examples for ids in example.rollouts] == above and size == sum(map(len, above))
