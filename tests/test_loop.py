"""The loop of train_rpt.py beside the same loop written out plainly: no ranks, no packing, no micro-batches."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from data.positions import find_scores, load_positions, shuffled
from data.tokenizer import Tokenizer
from model import GPT
from reward import extract_prediction, prefix_match
from sample import generate
from test_runs import command, lines
from tiny import base, corpus, run_here

POSITIONS, G, LENGTH, TEMPERATURE, SEED, CLIP, LR = 5, 4, 12, 1.2, 5, 0.2, 1e-3  # as in `command`, clip the default


def think_about(model, tokenizer, corpus, rows, seed):
    """Positions -> [(prompt, rollouts, rewards)]"""
    prompts = [corpus.tokens[start:t].tolist() + [tokenizer.special["<think>"]] for t, start, _ in rows]
    groups = generate(model, prompts, G, LENGTH, TEMPERATURE, [tokenizer.eos_id], seed)
    found = []
    for (t, _, end), prompt, rollouts in zip(rows, prompts, groups):
        truth = [tokenizer.token_bytes(id) for id in corpus.tokens[t:end].tolist()]
        said = [extract_prediction(tokenizer.decode_bytes(rollout.tokens)) for rollout in rollouts]
        found.append((prompt, rollouts, [prefix_match(box, truth) for box in said]))
    return found


def surrogate(model, groups, normalize):
    """Mean of -advantage x ratio over the tokens of all rollouts, one sequence at a time; the ratio is 1."""
    loss, tokens = 0.0, 0
    for prompt, rollouts, rewards in groups:
        mean = sum(rewards) / G
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (G - 1))
        for rollout, reward in zip(rollouts, rewards):
            advantage = (reward - mean) / ((deviation + 1e-6) if normalize else 1.0)
            ids = torch.tensor(prompt + rollout.tokens)
            logprobs = (model(ids[None])[0, len(prompt) - 1:-1] / TEMPERATURE).log_softmax(dim=-1)
            logprobs = logprobs.gather(1, ids[len(prompt):, None])
            loss = loss - advantage * (logprobs - logprobs.detach()).exp().sum()
            tokens += len(rollout.tokens)
    return loss / tokens


def plain_run(corpus, base, steps, dynamic_from, normalize):
    """-> {name: weight}, cursor, [(reward, loss, gradient norm) of each step], draws of each step"""
    tokenizer, model = Tokenizer.load(base), GPT.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.01)
    positions = load_positions(corpus, find_scores(corpus), 0.5, "train")
    cursor, log, draws = 0, [], []
    for step in range(steps):
        dynamic, kept, everything = step >= dynamic_from, [], []
        for draw in range(4 if dynamic else 1):
            rows = positions[shuffled(len(positions), cursor, POSITIONS, SEED)].tolist()
            cursor += POSITIONS
            drawn = think_about(model, tokenizer, corpus, rows, (SEED, step, draw))
            everything += drawn
            kept += [group for group in drawn if len(set(group[2])) > 1 or not dynamic]
            if len(kept) >= POSITIONS:
                break
        draws.append(draw + 1)
        loss = surrogate(model, kept[:POSITIONS], normalize)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        optimizer.step()
        rewards = [reward for _, _, group in everything for reward in group]
        log.append((sum(rewards) / len(rewards), loss.item(), norm))
    return dict(model.named_parameters()), cursor, log, draws


@pytest.mark.parametrize("flags", [dict(), dict(dynamic_sampling_from=1, normalize_advantage=True)])
def test_a_run_is_the_algorithm_written_out_plainly(corpus, base, tmp_path, flags):
    steps, flags = 4, dict(dynamic_sampling_from=500) | flags
    code, _, err = run_here(*command("train_rpt.py", corpus, base, tmp_path / "run", steps=steps, **flags))
    assert (code, err) == (0, "")
    weights, cursor, log, draws = plain_run(corpus, base, steps, flags["dynamic_sampling_from"],
                                            flags.get("normalize_advantage", False))
    assert max(draws[1:]) > 1 or flags["dynamic_sampling_from"] == 500
    found = [(record["reward"], record["loss"], record["grad_norm"]) for record in lines(tmp_path / "run")]
    assert found == [pytest.approx(expected, rel=1e-4, abs=1e-7) for expected in log]

    last = tmp_path / "run" / f"step_{steps:06d}"
    assert json.loads((last / "trainer.json").read_text()) == dict(step=steps, cursor=cursor)
    before, after = load_file(f"{base}/model.safetensors"), load_file(last / "model.safetensors")
    for name, weight in weights.items():
        weight, ours = weight.detach(), after[f"model.{name}"]
        moved = (weight - before[f"model.{name}"]).norm()
        assert (ours - weight).norm() < 1e-3 * moved, name
