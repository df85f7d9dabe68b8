"""Sampling against the plain forward pass, and every way in which rows could disturb each other."""
import json
import math
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

import sample
from data.tokenizer import EMBEDDED_PATTERN, EMBEDDED_SPECIAL, Tokenizer
from model import GPT, GPTConfig
from kernels.attention import make_layout
from kernels.linear import CAN_PACK
from kernels.logprob import BLOCK, draw, logprob
from sample import Cache, generate, mix
from plumbing.truncate import truncation

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [8, 4], [6, 2, 6, 4, 3, 3, 8], [3, 2, 7]]
STOPS = [7, 21, 30]  # of 40 tokens: some rollouts stop at once, some late, some never


def run(model, prompts=PROMPTS, n=4, max_new_tokens=16, temperature=0.8, stop_ids=(), seed=5, **options):
    return generate(model, prompts, n, max_new_tokens, temperature, stop_ids, seed, **options)


def tokens_of(rollouts):
    return [[rollout.tokens for rollout in group] for group in rollouts]


@torch.no_grad()
def logprobs_by_forward(model, prompt, tokens, temperature):
    """Log-prob of each token from one full forward pass."""
    logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1]
    return torch.log_softmax(logits / temperature, dim=-1)[range(len(tokens)), tokens].tolist()


# ---- the cache computes what the model computes ----

def test_greedy_with_the_cache_is_greedy_without_it(tiny_gpt):
    for prompt, group in zip(PROMPTS, run(tiny_gpt, n=2, temperature=0)):
        expected = []
        for _ in range(16):
            expected.append(tiny_gpt(torch.tensor([prompt + expected]))[0, -1].argmax().item())
        logprobs = logprobs_by_forward(tiny_gpt, prompt, expected, 1.0)
        for rollout in group:
            assert rollout.tokens == expected and rollout.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.7])
def test_returned_logprobs_are_those_of_the_full_forward(tiny_gpt, temperature):
    for prompt, group in zip(PROMPTS, run(tiny_gpt, temperature=temperature, stop_ids=STOPS)):
        for rollout in group:
            expected = logprobs_by_forward(tiny_gpt, prompt, rollout.tokens, temperature)
            assert rollout.logprobs == pytest.approx(expected, abs=1e-5)


def test_bf16_activations_stay_close_to_the_full_forward(tiny_gpt):
    tiny_gpt.compute_dtype = torch.bfloat16
    gaps = [abs(a - b) for prompt, group in zip(PROMPTS, run(tiny_gpt)) for rollout in group
            for a, b in zip(rollout.logprobs, logprobs_by_forward(tiny_gpt, prompt, rollout.tokens, 0.8))]
    assert sum(gaps) / len(gaps) < 0.05


def test_ten_thousand_tokens_of_refilled_rows_agree_with_the_trainers_forward(tiny_gpt):
    prompts = PROMPTS * 6
    rollouts = run(tiny_gpt, prompts, n=30, stop_ids=STOPS, max_rows=40)
    layout = make_layout([(len(p), [len(r.tokens) for r in group]) for p, group in zip(prompts, rollouts)])
    tokens = torch.tensor([t for p, group in zip(prompts, rollouts) for t in p + [t for r in group for t in r.tokens]])
    with torch.no_grad():
        hidden = tiny_gpt.hidden(tokens, layout.positions, layout.attend)[layout.predict_rows]
        logprobs, _ = logprob(hidden, tiny_gpt.head, tokens[layout.rollout_rows], 0.8)
    sampled = torch.tensor([p for group in rollouts for r in group for p in r.logprobs])
    assert len(sampled) > 10_000 and (logprobs - sampled).abs().max() < 1e-5


# ---- rows are independent ----

@pytest.mark.parametrize("max_rows", [1, 3, 7, 24])
@pytest.mark.parametrize("prefill_tokens", [1, 20, 8192])
def test_the_size_of_a_batch_changes_nothing(tiny_gpt, monkeypatch, max_rows, prefill_tokens):
    expected = run(tiny_gpt, stop_ids=STOPS)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", prefill_tokens)
    rollouts = run(tiny_gpt, stop_ids=STOPS, max_rows=max_rows)
    assert tokens_of(rollouts) == tokens_of(expected)
    for group, expected_group in zip(rollouts, expected):
        for a, b in zip(group, expected_group):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5) and a.finished == b.finished


def test_a_rank_that_samples_a_part_draws_what_one_process_would_have_drawn(tiny_gpt):
    expected = tokens_of(run(tiny_gpt))
    for i, prompt in enumerate(PROMPTS):
        assert tokens_of(run(tiny_gpt, [prompt], first_prompt=i)) == expected[i:i + 1]
    assert tokens_of(run(tiny_gpt, PROMPTS[2:5], first_prompt=2)) == expected[2:5]


def test_two_rollouts_are_the_first_two_of_eight(tiny_gpt):
    two, eight = tokens_of(run(tiny_gpt, n=2)), tokens_of(run(tiny_gpt, n=8))
    assert two == [group[:2] for group in eight]


def test_a_shorter_run_is_the_beginning_of_a_longer_one(tiny_gpt):
    short, long = tokens_of(run(tiny_gpt, max_new_tokens=3)), tokens_of(run(tiny_gpt))
    assert short == [[tokens[:3] for tokens in group] for group in long]


def test_rows_that_leave_early_disturb_none_of_those_that_stay(tiny_gpt):
    endless, stopped = run(tiny_gpt, n=8), run(tiny_gpt, n=8, stop_ids=STOPS)
    lengths = Counter()
    for group, expected_group in zip(stopped, endless):
        for rollout, expected in zip(group, expected_group):
            ends = [i + 1 for i, token in enumerate(expected.tokens) if token in STOPS]
            length = ends[0] if ends else 16
            assert rollout.tokens == expected.tokens[:length] and rollout.finished == bool(ends)
            assert rollout.logprobs == pytest.approx(expected.logprobs[:length], abs=1e-5)
            assert not expected.finished
            lengths[length] += 1
    assert lengths[1] and lengths[16] and len(lengths) > 6  # at once, never, and at many in between


def test_finished_rows_stop_costing_time(tiny_gpt, monkeypatch):
    decoded, hidden = [], tiny_gpt.hidden
    monkeypatch.setattr(tiny_gpt, "hidden", lambda ids, *rest: decoded.append(len(ids)) or hidden(ids, *rest))
    lengths = [len(tokens) for group in tokens_of(run(tiny_gpt, n=8, stop_ids=STOPS)) for tokens in group]
    live = [sum(length > i for length in lengths) for i in range(1, 16)]
    assert live[-1] < 30  # of 48
    for rows, needed in zip(decoded[1:], live, strict=True):  # the first call is the prefill
        assert needed <= rows <= needed / 0.75


def test_a_row_whose_rollout_ended_takes_the_next_one(tiny_gpt, monkeypatch):
    rows, step = [], sample.step
    monkeypatch.setattr(sample, "step", lambda model, cache, *rest: rows.append(cache.B) or step(model, cache, *rest))
    rollouts = run(tiny_gpt, n=8, stop_ids=STOPS, max_rows=6)
    needed = [len(tokens) - 1 for group in tokens_of(rollouts) for tokens in group]  # the first: by the prefill
    assert sum(needed) / sum(rows) > 0.9
    chunks = [max(needed[i:i + 6]) for i in range(0, 48, 6)]  # six rows that wait for the slowest of them
    assert len(rows) < 0.8 * sum(chunks)


def test_a_prompt_is_computed_once_however_its_rollouts_are_spread(tiny_gpt, monkeypatch):
    computed, real = [], Cache.prefill
    monkeypatch.setattr(Cache, "prefill", lambda cache, model, prompts, slots:
                        computed.extend(map(tuple, prompts)) or real(cache, model, prompts, slots))
    run(tiny_gpt, n=8, stop_ids=STOPS, max_rows=3)
    assert sorted(computed) == sorted(map(tuple, PROMPTS))


# ---- memory ----

@pytest.fixture
def caches(monkeypatch):
    """The caches that `generate` makes, and the bytes of their keys and values at first."""
    made, real = [], sample.Cache

    def make(*args):
        cache = real(*args)
        tensors = cache.prompt_k + cache.prompt_v + cache.row_k + cache.row_v
        made.append((cache, sum(x.numel() * x.itemsize for x in tensors)))
        return cache

    monkeypatch.setattr(sample, "Cache", make)
    return made


def test_the_cache_takes_what_the_formula_says(tiny_gpt, caches):
    run(tiny_gpt, [[1] * 40], n=20, max_new_tokens=9)
    [(cache, size)] = caches
    prompts = sum(x.numel() for x in cache.prompt_k + cache.prompt_v)
    assert prompts == 2 * 2 * 40 * 2 * 8            # k and v, layers, tokens: one copy, heads, size
    assert size == 2 * 2 * (40 + 20 * 8) * 2 * 8 * 4  # 8 of 9 new tokens are read again; fp32


def test_a_small_budget_costs_rows_and_no_token(tiny_gpt, caches):
    expected = run(tiny_gpt, stop_ids=STOPS)
    token_bytes = 2 * 2 * 2 * 8 * 4
    four, three = (4 * 11 + 4 * 15) * token_bytes, (3 * 11 + 3 * 15) * token_bytes  # rows, and slots of 11
    for budget, bytes in ((four + 1, four), (four - 1, three)):
        assert tokens_of(run(tiny_gpt, stop_ids=STOPS, kv_gb=budget / 1e9)) == tokens_of(expected)
        assert caches[-1][1] == bytes


def test_a_budget_below_one_rollout_is_refused_with_the_numbers(tiny_gpt):
    with pytest.raises(ValueError, match=r"takes 6.66e-06 GB \(a prompt of 11 and 15 new .*room for 6e-06 GB"):
        run(tiny_gpt, kv_gb=6e-6)


# ---- stopping ----

def test_a_stop_at_the_first_token_is_the_whole_rollout(tiny_gpt):
    for group in run(tiny_gpt, stop_ids=range(40)):
        for rollout in group:
            assert len(rollout.tokens) == len(rollout.logprobs) == 1 and rollout.finished


def test_a_stop_at_the_very_last_token_counts_as_finished(tiny_gpt):
    [[endless]] = run(tiny_gpt, PROMPTS[:1], n=1)
    first = {token: i + 1 for i, token in reversed(list(enumerate(endless.tokens)))}
    stop, length = max(first.items(), key=lambda item: item[1])
    [[rollout]] = run(tiny_gpt, PROMPTS[:1], n=1, max_new_tokens=length, stop_ids=[stop])
    assert rollout.tokens == endless.tokens[:length] and rollout.finished
    [[rollout]] = run(tiny_gpt, PROMPTS[:1], n=1, max_new_tokens=length - 1, stop_ids=[stop])
    assert rollout.tokens == endless.tokens[:length - 1] and not rollout.finished


def test_a_stop_that_nobody_draws_runs_to_the_full_length(tiny_gpt):
    drawn = {token for group in tokens_of(run(tiny_gpt)) for tokens in group for token in tokens}
    never = min(set(range(40)) - drawn)
    rollouts = run(tiny_gpt, stop_ids={never})
    assert tokens_of(rollouts) == tokens_of(run(tiny_gpt))
    assert not any(rollout.finished for group in rollouts for rollout in group)


def test_a_stop_id_inside_the_prompt_means_nothing(tiny_gpt):
    [[rollout]] = run(tiny_gpt, [[7, 21, 30]], n=1, stop_ids=STOPS)
    [[endless]] = run(tiny_gpt, [[7, 21, 30]], n=1)
    assert len(rollout.tokens) > 1 and rollout.tokens == endless.tokens[:len(rollout.tokens)]


def test_a_rollout_may_fill_the_last_position(tiny_gpt):
    [[rollout]] = run(tiny_gpt, [[1] * 60], n=1, max_new_tokens=4)
    assert len(rollout.tokens) == 4


def test_no_prompts_give_no_rollouts(tiny_gpt):
    assert run(tiny_gpt, []) == []


def test_every_token_is_reported_as_it_comes_and_every_end_once(tiny_gpt):
    seen, ends = {}, []

    def watch(drawn, ended):
        ends.append(ended)
        for prompt, i, token in drawn:
            seen.setdefault((prompt, i), []).append(token)

    rollouts = run(tiny_gpt, n=3, stop_ids=STOPS, max_rows=5, on_tokens=watch)
    assert seen == {(i, s): tokens for i, group in enumerate(tokens_of(rollouts)) for s, tokens in enumerate(group)}
    assert ends == sorted(ends) and ends[-1] == 18


# ---- randomness ----

def chi_square_limit(cells):
    """Five standard deviations above the mean of chi-square: one honest sampler in 10^5 is beyond."""
    return cells - 1 + 5 * math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("temperature", [0.8, 1.5])
@pytest.mark.parametrize("N, n", [(1, 6000), (6000, 1), (60, 100)])
def test_pairs_of_tokens_have_the_probabilities_of_the_model(tiny_gpt, N, n, temperature):
    prompt, total = PROMPTS[0], 6000
    rollouts = run(tiny_gpt, [prompt] * N, n=n, max_new_tokens=2, temperature=temperature, max_rows=total)
    counts = torch.zeros(40, 40)
    for a, b in (rollout.tokens for group in rollouts for rollout in group):
        counts[a, b] += 1
    with torch.no_grad():
        logits = tiny_gpt(torch.tensor([prompt + [a] for a in range(40)]))[:, -2:]       # (40, 2, V)
    first, second = (logits / temperature).softmax(dim=-1).unbind(dim=1)
    expected = total * first[0, :, None] * second                                        # (40, 40)
    often = expected >= 5  # chi-square wants full cells: all the rare pairs together are one
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    assert len(seen) > 50
    assert ((seen - wanted) ** 2 / wanted).sum() < chi_square_limit(len(seen))


def test_rollouts_prompts_positions_and_seeds_all_get_their_own_numbers(tiny_gpt):
    first_tokens = lambda rollouts: [tokens[0] for group in tokens_of(rollouts) for tokens in group]
    options = dict(temperature=3.0, max_new_tokens=8)
    runs = {seed: run(tiny_gpt, [[1, 2]] * 4, n=8, seed=seed, **options)
            for seed in (0, 1, (0, 1), (1, 0), (0, 0, 1))}
    for rollouts in runs.values():
        assert len({tuple(tokens) for group in tokens_of(rollouts) for tokens in group}) == 32
        assert len(set(first_tokens(rollouts))) > 10  # one draw for all rows would give 1, 4 or 8
    drawn = {tuple(first_tokens(rollouts)) for rollouts in runs.values()}
    assert len(drawn) == len(runs)
    assert tokens_of(run(tiny_gpt, [[1, 2]] * 4, n=8, seed=(1,), **options)) == tokens_of(runs[1])


def test_the_global_random_state_is_neither_read_nor_moved(tiny_gpt):
    torch.manual_seed(1)
    before, rollouts = torch.get_rng_state(), run(tiny_gpt)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert tokens_of(run(tiny_gpt)) == tokens_of(rollouts)


def test_greedy_takes_the_most_probable_token_whatever_the_seed(tiny_gpt):
    assert tokens_of(run(tiny_gpt, temperature=0, seed=1)) == tokens_of(run(tiny_gpt, temperature=0, seed=2))


def test_a_token_of_probability_zero_is_never_drawn_not_even_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-300.0, 2.0, -300.0, 1.0, -300.0]] * 3)
    tokens, logprobs = draw(logits, 1.0, torch.tensor([0, -1, 1 << 62]))  # uniform 0, just below 1, 1/4
    assert tokens.tolist() == [1, 3, 1]
    assert logprobs.exp().tolist() == pytest.approx([0.7311, 0.2689, 0.7311], abs=1e-4)


def test_probabilities_that_round_to_a_sum_below_one_still_give_a_token():
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    sums = logits.log_softmax(dim=-1).exp().sum(dim=-1, dtype=torch.float64)
    tokens, logprobs = draw(logits, 1.0, torch.full((200,), -1))  # just below 1
    assert sums.min() < 1 - 1e-9 and tokens.tolist() == [999] * 200 and logprobs.isfinite().all()


@pytest.mark.parametrize("V", [7, BLOCK, 2 * BLOCK + 88])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_distribution_within_blocks_and_across_them(V, temperature):
    """Tokens expected less than 20 times count together."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(V))
    logits[1::3] -= 4
    logits[::5] = -torch.inf  # what truncation leaves
    p, N = (logits.double() / temperature).softmax(dim=0), 1 << 16
    counts = torch.zeros(V)
    for bits in mix(torch.arange(N)).split(1 << 13):
        tokens, logprobs = draw(logits.repeat(len(bits), 1), temperature, bits)
        counts += tokens.bincount(minlength=V)
        torch.testing.assert_close(logprobs.double(), p.log()[tokens], rtol=0, atol=1e-5)
    rare = N * p < 20
    expected, seen = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (N * p, counts.double()))
    expected, seen = expected[expected > 0], seen[expected > 0]
    assert counts[logits == -torch.inf].sum() == 0 and seen.sum() == N
    assert ((seen - expected) ** 2 / expected).sum() < chi_square_limit(len(expected))


def test_a_block_without_any_token_is_never_drawn():
    for only in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 87):
        logits = torch.full((64, 2 * BLOCK + 88), -torch.inf)
        logits[:, only] = 3.0
        tokens, logprobs = draw(logits, 1.0, mix(torch.arange(64)))
        assert set(tokens.tolist()) == {only} and logprobs.tolist() == [0.0] * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ValueError])
def test_no_packed_weights_outlive_a_call_however_it_ends(tiny_gpt, dtype, end):
    tiny_gpt.compute_dtype = dtype
    layers = [layers[0] for layers in tiny_gpt.by_input()]
    packed = lambda: [x for x in (tiny_gpt.packed_head, *(layer.packed for layer in layers)) if x]
    most = []

    def watch(drawn, ended):
        most.append(len(packed()))
        if end and most[-1]:
            raise end

    with pytest.raises(end) if end else nullcontext():
        run(tiny_gpt, on_tokens=watch)
    assert most[-1] == (1 + len(layers) if CAN_PACK[dtype] else 0) and not packed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollouts_after_an_update_are_those_of_the_new_weights(tiny_gpt, dtype):
    tiny_gpt.compute_dtype = dtype
    before = tokens_of(run(tiny_gpt))
    with torch.no_grad():
        for weight in tiny_gpt.parameters():
            weight.mul_(0.7)
    fresh = GPT(tiny_gpt.config, dtype)
    fresh.load_state_dict(tiny_gpt.state_dict())
    assert before != tokens_of(run(tiny_gpt)) == tokens_of(run(fresh))


def test_mix_is_splitmix64():
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + i * gamma) * pow(31, -1, 2**64) & mask for i in range(4)]  # mix multiplies by 31
    keys = torch.tensor([state - 2**64 if state >> 63 else state for state in states])
    assert [bits & mask for bits in mix(keys).tolist()] == published


@pytest.mark.parametrize("bits", [
    mix(torch.arange(1 << 16)),
    mix(mix(torch.arange(1 << 8))[:, None] + torch.arange(1 << 8)),
    torch.cat([mix(torch.arange(1 << 8), seed) for seed in range(1 << 8)]),
], ids=["neighbours", "two levels", "seeds"])
def test_neighbouring_keys_give_independent_uniform_numbers(bits):
    uniform = (bits.flatten() >> 11 & (1 << 53) - 1).double() / (1 << 53)
    counts = torch.histc(uniform, bins=256, min=0, max=1)
    assert ((counts - 256) ** 2 / 256).sum() < chi_square_limit(256)
    for distance in (1, 2, 256):
        pairs = torch.stack([uniform[:-distance], uniform[distance:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / math.sqrt(len(uniform))
    assert len(bits.unique()) == bits.numel()


def test_each_bit_of_a_key_flips_half_of_the_bits():
    keys = torch.arange(200)[:, None] * 7919
    flipped = mix(keys) ^ mix(keys ^ (torch.ones(63, dtype=torch.long) << torch.arange(63)))    # (200, 63)
    share = torch.stack([flipped >> bit & 1 for bit in range(64)]).double().mean(dim=1)         # (64, 63)
    assert (share - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(200)  # 4,032 shares of 200 coins each


# ---- truncation: for the command line and for eval ----

@pytest.mark.parametrize("options", [dict(top_k=5), dict(top_p=0.7), dict(min_p=0.1), dict(top_k=1),
                                     dict(top_k=30, top_p=0.95, min_p=0.02), dict(top_p=1e-6)])
def test_truncation_keeps_the_tokens_that_transformers_keeps(options):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    theirs = logits
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in options:
            theirs = warper(options[name])(None, theirs)
    ours = truncation(**options)(logits.clone())
    assert torch.equal(ours, theirs) and 1 <= (ours > -math.inf).sum(dim=1).min() < 200


def test_truncated_rollouts_stay_inside_and_keep_the_temperature(tiny_gpt):
    prompt, truncate = PROMPTS[0], truncation(top_k=3)
    with torch.no_grad():
        top = (tiny_gpt(torch.tensor([prompt]))[0, -1] / 2.0).topk(3)
    [group] = run(tiny_gpt, [prompt], n=3000, max_new_tokens=1, temperature=2.0, truncate=truncate, max_rows=3000)
    counts = Counter(rollout.tokens[0] for rollout in group)
    for token, p in zip(top.indices.tolist(), top.values.softmax(dim=0).tolist()):
        assert counts.pop(token) == pytest.approx(3000 * p, abs=5 * math.sqrt(3000 * p * (1 - p)))
    assert not counts


def test_greedy_is_greedy_under_truncation(tiny_gpt):
    assert tokens_of(run(tiny_gpt, temperature=0, truncate=truncation(top_p=0.5))) == tokens_of(
        run(tiny_gpt, temperature=0))


@pytest.mark.parametrize("options", [dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=-0.1),
                                     dict(min_p=math.nan)])
def test_a_truncation_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="top-k must be at least 0, top-p"):
        truncation(**options)


# ---- requests that cannot be met ----

@pytest.mark.parametrize("change, words", [
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[1], [2] * 49]), "prompt 1 has 49 tokens.*16 new.*64 positions"),
    (dict(prompts=[[1, 40]]), "prompt 0 .*40.*vocabulary"),
    (dict(prompts=[[-1, 4]]), "prompt 0 .*-1.*vocabulary"),
    (dict(n=0), "n and max_new_tokens must be at least 1, got 0 and 16"),
    (dict(max_new_tokens=0), "n and max_new_tokens must be at least 1, got 4 and 0"),
    (dict(temperature=-1), "temperature must be .*-1"),
    (dict(temperature=math.nan), "temperature must be .*nan"),
    (dict(temperature=math.inf), "temperature must be .*inf"),
    (dict(stop_ids=[40]), "stop id 40 .*vocabulary of 40"),
    (dict(stop_ids=[-1]), "stop id -1 "),
])
def test_a_bad_request_is_one_clear_line(tiny_gpt, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        run(tiny_gpt, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [1, 256])
def test_nan_weights_name_the_first_bad_prompt(tiny_gpt, batch):
    model = GPT(GPTConfig(**vars(tiny_gpt.config) | dict(tied_head=False)))
    with torch.no_grad():
        model.embed_tokens.weight[17] = math.nan
    assert run(model, [[1, 2]], n=1, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"NaN.* 0 tokens after prompt 1 \(\[3, 17, 4\]"):
        run(model, [[1, 2], [3, 17, 4], [17], [5, 5, 5, 2]], n=2, max_new_tokens=1, max_rows=batch)


# ---- the command line ----

@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a random model over bytes and its tokenizer."""
    special = {text: 256 + i for i, text in enumerate(EMBEDDED_SPECIAL)}
    Tokenizer({bytes([byte]): byte for byte in range(256)}, special, EMBEDDED_PATTERN).save(tmp_path)
    GPT(GPTConfig(vocab_size=259, width=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, ffn_width=16,
                  max_positions=64)).save_pretrained(tmp_path)
    return str(tmp_path)


def command_line(*arguments, stdin=""):
    command = [sys.executable, sample.__file__, "--device", "cpu", *arguments]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.run(command, input=stdin.encode(), capture_output=True, env=env)


def test_the_command_line_prints_what_generate_returns(checkpoint):
    options = ("--model", checkpoint, "--n", "3", "--max-new-tokens", "9", "--seed", "4", "--json")
    ran = command_line(*options, stdin="caf\u00e9\r\n")
    assert ran.returncode == 0, ran.stderr
    prompt = list("caf\u00e9\r\n".encode())  # as it stands: a byte is a token here
    [expected] = generate(GPT.from_pretrained(checkpoint), [prompt], 3, 9, 0.8, [258], 4)
    for line, rollout in zip(ran.stdout.splitlines(), expected, strict=True):
        printed = json.loads(line)
        assert printed["tokens"] == rollout.tokens and printed["finished"] == rollout.finished
        assert printed["logprobs"] == pytest.approx(rollout.logprobs, abs=1e-6)


def test_a_rollout_ends_at_what_generation_config_names(checkpoint):
    options = ("--model", checkpoint, "--n", "3", "--prompt", "ab", "--temperature", "5", "--json")
    with open(f"{checkpoint}/generation_config.json", "w") as file:
        json.dump(dict(eos_token_id=list(range(256))), file)
    ran = command_line(*options)
    assert ran.returncode == 0, ran.stderr
    for rollout in map(json.loads, ran.stdout.splitlines()):
        *thought, last = rollout["tokens"]
        assert rollout["finished"] and set(thought) <= {256, 257} and last not in (256, 257)


def test_the_command_line_speaks_once_about_a_wrong_folder(tmp_path):
    ran = command_line("--model", str(tmp_path / "nowhere"), "--prompt", "x")
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and b"nowhere" in ran.stderr


def test_a_single_rollout_is_written_as_it_comes_and_ends_with_its_box(checkpoint):
    options = ("--model", checkpoint, "--max-new-tokens", "20", "--prompt", "ab", "--temperature", "2")
    ran, as_json = command_line(*options), command_line(*options, "--json")
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(as_json.stdout)
    assert ran.stdout.decode().startswith(printed["text"].rstrip("\ufffd"))  # a torn character waits for its end
    end = "finished" if printed["finished"] else "cut off"
    assert ran.stdout.decode().endswith(f"\n--- rollout 1 of 1: {len(printed['tokens'])} tokens, {end}, box None\n")


def test_a_device_has_its_own_share_of_busy_rows(tiny_gpt, monkeypatch):
    def widths(share):
        monkeypatch.setitem(sample.BUSY_SHARE, "cpu", share)
        kept, keep = [], sample.Cache.keep
        monkeypatch.setattr(sample.Cache, "keep", lambda cache, rows: kept.append(len(rows)) or keep(cache, rows))
        generate(tiny_gpt, [[1, 2]], 12, 20, 1.0, range(4), 0)
        monkeypatch.setattr(sample.Cache, "keep", keep)
        return kept
    assert widths(0) == [] and len(widths(0.5)) < len(widths(1.0))


def test_slots_are_rounded_up_on_a_gpu():
    assert [sample.slot_size(n, "cuda") for n in (1, 256, 257)] == [256, 256, 512] and sample.slot_size(7, "cpu") == 7
