"""Evaluation: accuracies counted again, positions that do not move, intervals that hold what they promise."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from data.filter import SPLITS, find_scores, load_positions
from data.prompt import stop_ids
from data.tokenizer import Tokenizer
from eval import choose_positions, interval, ntp_hits, reasoning_groups
from model import GPT
from reward import extract_prediction, prefix_match
from tiny import base, corpus, run_here, tiny_model


def all_positions(corpus):
    return load_positions(corpus, find_scores(corpus), -1, "val")


@pytest.mark.parametrize("room", [128, 20])  # 20: contexts lose their beginning
def test_next_token_hits_are_those_of_one_context_at_a_time(corpus, base, room):
    model, positions = GPT.from_pretrained(base), all_positions(corpus)
    contexts = [corpus.tokens[max(start, t - room):t].tolist() for t, start, _ in positions]
    expected = [model(torch.tensor([context]))[0, -1].argmax().item() == corpus.tokens[t]
                for context, t in zip(contexts, positions[:, 0])]
    assert 0.2 < np.mean(expected) < 1
    assert ntp_hits(model, corpus, positions, room).tolist() == expected


def test_reasoning_accuracy_is_that_of_the_dumped_responses(corpus, base, tmp_path):
    code, out, err = run_here("eval.py", "lm", "--corpus", corpus.folder, "--checkpoints", base, "--seed", 3,
                              "--positions", 30, "--template", "short", "--max-new-tokens", 12,
                              "--temperature", 1.3, "--out", tmp_path / "results.json",
                              "--dump", tmp_path / "dump.jsonl")
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "results.json").read_text())
    documented = {"checkpoint", "mode", "split", "accuracy", "low", "high", "n", "seed"}
    assert all(r.keys() >= documented and r["checkpoint"] == base and r["seed"] == 3 for r in results)
    assert {r["mode"] for r in results} == {"ntp", "reasoning"}
    assert all(0 <= r["low"] <= r["accuracy"] <= r["high"] <= 100 for r in results)

    positions, splits = choose_positions(corpus, find_scores(corpus), 30, seed=3)
    tokenizer, hits = Tokenizer.load(base), []
    with open(tmp_path / "dump.jsonl") as file:
        for line, (t, _, end) in zip(file, positions, strict=True):
            truth = [tokenizer.token_bytes(int(id)) for id in corpus.tokens[t:end]]
            hits.append(prefix_match(extract_prediction(json.loads(line)["response"].encode()), truth))
    assert 0 < np.mean(hits) < 1
    for r in results:
        if r["mode"] == "reasoning":
            assert r["accuracy"] == pytest.approx(100 * np.mean(np.array(hits)[splits[r["split"]]]), abs=0.01)
            assert r["n"] == len(splits[r["split"]])


def test_pass_at_k_counts_positions_and_accuracy_counts_rollouts(corpus, base, monkeypatch):
    rewards = [[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    rollouts, predictions = [SimpleNamespace(tokens=[1] * 6)] * 4, [b"x", None, b"y", b"z"]
    groups = [SimpleNamespace(rewards=r, predictions=predictions, rollouts=rollouts) for r in rewards]
    monkeypatch.setattr(evaluation, "reasoning_groups", lambda *_: groups)
    args = SimpleNamespace(device="cpu", mode="reasoning", seed=0, samples=4, temperature=1.0, dump=None)
    positions = np.array([[9, 0, 20], [12, 0, 20], [30, 20, 40]])
    line, = evaluation.evaluate(base, corpus, positions, {"easy": [0, 1, 2]}, args)
    assert (line["accuracy"], line["pass_at_k"], line["format_rate"]) == (33.33, 66.67, 75.0)
    assert (line["len_mean"], line["samples"], line["n"]) == (6.0, 4, 3)


def test_every_split_has_its_own_number_of_positions_above_its_own_threshold(corpus):
    scores = find_scores(corpus)
    positions, splits = choose_positions(corpus, scores, 12, seed=0)
    entropy, everywhere = (np.load(scores)[some[:, 0], 0] for some in (positions, all_positions(corpus)))
    there = {name: min(12, (everywhere > threshold).sum()) for name, threshold in SPLITS.items()}
    assert {name: len(chosen) for name, chosen in splits.items()} == {k: n for k, n in there.items() if n}
    assert len(splits) >= 2 and all((entropy[chosen] > SPLITS[name]).all() for name, chosen in splits.items())
    assert len(np.unique(positions[:, 0])) == len(positions)
    assert not set(positions[:, 0]) & set(load_positions(corpus, scores, -1, "train")[:, 0])


def test_checkpoints_answer_the_same_positions_whatever_else_is_evaluated(corpus, base, tmp_path):
    tokenizer = Tokenizer.load(base)
    tiny_model(tokenizer.vocab_size).save_pretrained(tmp_path / "other")
    tokenizer.save(tmp_path / "other")

    def results(*checkpoints):
        code, _, err = run_here("eval.py", "lm", "--corpus", corpus.folder, "--checkpoints", *checkpoints,
                                "--positions", 20, "--template", "short", "--max-new-tokens", 8,
                                "--samples", 2, "--out", tmp_path / "results.json")
        assert code == 0, err
        return [r for r in json.loads((tmp_path / "results.json").read_text()) if r["checkpoint"] == base]

    assert results(base) == results(tmp_path / "other", base) != []


def test_the_seed_chooses_the_positions_and_the_rows_do_not_choose_the_thoughts(corpus, base):
    scores, model, tokenizer = find_scores(corpus), GPT.from_pretrained(base), Tokenizer.load(base)
    positions, _ = choose_positions(corpus, scores, 8, seed=0)
    assert np.array_equal(positions, choose_positions(corpus, scores, 8, seed=0)[0])
    assert not np.array_equal(positions, choose_positions(corpus, scores, 8, seed=1)[0])

    def thoughts(max_rows):
        args = SimpleNamespace(template="short", max_prompt_tokens=100, max_new_tokens=10, samples=3,
                               temperature=1.0, seed=0, max_rows=max_rows, kv_gb=None,
                               top_k=0, top_p=1.0, min_p=0.0)
        groups = reasoning_groups(model, tokenizer, corpus, positions, args)
        return [[r.tokens for r in group.rollouts] for group in groups]

    many, few = thoughts(1000), thoughts(3)
    assert many == few and len(set(map(str, many))) > 1
    assert all(r[-1] in stop_ids(tokenizer) or len(r) == 10 for group in many for r in group)


def test_the_interval_holds_the_truth_in_about_95_of_100_cases():
    rng, held = np.random.default_rng(0), 0
    for case in range(300):
        documents = rng.integers(60, size=200)
        low, high = interval((rng.random(200) < 0.3).astype(float), documents, seed=case)
        held += low <= 0.3 <= high
    assert 0.90 <= held / 300 <= 0.99


def test_correlated_documents_make_the_interval_wider_and_it_still_holds():
    rng, held, widths = np.random.default_rng(0), 0, []
    for case in range(200):
        documents = np.repeat(np.arange(60), 5)
        together = (rng.random(60) < 0.3).astype(float)[documents]  # all five are right, or none
        low, high = interval(together, documents, seed=case)
        alone_low, alone_high = interval(together, np.arange(300), seed=case)
        widths.append((high - low) / (alone_high - alone_low))
        held += low <= 0.3 <= high
    assert 0.88 <= held / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(5 ** 0.5, rel=0.1)  # 60 independent values, not 300


def test_without_variance_the_interval_is_a_point():
    assert interval(np.ones(10), np.arange(10), seed=0).tolist() == [1, 1]
