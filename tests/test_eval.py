"""Evaluation: accuracies counted again, positions that do not move, intervals that hold."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from data.positions import SPLITS, choose_positions, find_scores, load_positions
from data.prompt import stop_ids
from data.tokenizer import Tokenizer
from eval import interval, majority_hits, ntp_hits, think, wilson
from model import GPT
from objectives import Group, Question
from objectives.rpt import predictions as read_boxes
from reward import extract_prediction, prefix_match
from sample import Rollout, generate
from tiny import base, corpus, run_here, thinker, tiny_model


def box(content):
    return b"thought" if content is None else b"</think>\\boxed{" + content + b"}"


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
    code, out, err = run_here("eval.py", "lm", "--corpus", corpus.folder, "--checkpoints", base,
                              "--seed", 3, "--positions", 30, "--template", "short",
                              "--max-new-tokens", 12, "--temperature", 0.3,
                              "--out", tmp_path / "results.json", "--dump", tmp_path / "dump.jsonl")
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "results.json").read_text())
    documented = {"checkpoint", "mode", "split", "accuracy", "low", "high", "n", "seed"}
    assert {r["mode"] for r in results} == {"ntp", "reasoning"}
    for r in results:
        assert r.keys() >= documented and r["checkpoint"] == base and r["seed"] == 3
        assert 0 <= r["low"] <= r["accuracy"] <= r["high"] <= 100

    positions, splits = choose_positions(corpus, find_scores(corpus), 30, seed=3)
    tokenizer, hits = Tokenizer.load(base), []
    with open(tmp_path / "dump.jsonl") as file:
        for line, (t, _, end) in zip(file, positions, strict=True):
            truth = [tokenizer.token_bytes(int(id)) for id in corpus.tokens[t:end]]
            response = json.loads(line)["response"].encode()
            hits.append(prefix_match(extract_prediction(response), truth))
    assert 0 < np.mean(hits) < 1
    for r in results:
        if r["mode"] == "reasoning":
            some = np.array(hits)[splits[r["split"]]]
            assert r["accuracy"] == pytest.approx(100 * some.mean(), abs=0.01)
            assert r["n"] == len(some)


def test_pass_at_k_counts_positions_accuracy_rollouts_and_hits_of_several_tokens_stand_apart(
        corpus, base, monkeypatch):
    truth, rollouts = [b" a", b"b", b" c"], [SimpleNamespace(tokens=[1] * 6)] * 4
    cases = [([b" a", None, b"b", b""], [1, 0, 0, 0]), ([None, b"a", b" ", b"x"], [0, 0, 0, 0]),
             ([b" ab", b" ab c", b" a", None], [1, 1, 1, 0])]
    tokenizer, groups = SimpleNamespace(decode_bytes=box), []
    for contents, right in cases:
        boxes = read_boxes(tokenizer, [SimpleNamespace(tokens=content) for content in contents])
        groups.append(Group(Question([], truth, [], 0), rollouts, boxes, right))
    monkeypatch.setattr(evaluation, "think", lambda *_: groups)
    args = SimpleNamespace(device="cpu", dtype=None, mode=["reasoning"], seed=0, samples=4,
                           temperature=1.0, dump=None, hits=None, corpus="C", template="short")
    positions = np.array([[9, 0, 20], [12, 0, 20], [30, 20, 40]])
    line, = evaluation.evaluate(base, corpus, positions, {"easy": [0, 1, 2]}, args)
    assert (line["accuracy"], line["pass_at_k"], line["format_rate"]) == (33.33, 66.67, 75.0)
    assert (line["one_token"], line["multi_token"]) == (16.67, 16.67)  # 2 of 12 rollouts each
    assert (line["len_mean"], line["samples"], line["n"]) == (6.0, 4, 3)
    assert (line["corpus"], line["template"]) == ("C", "short") and line["torch"] == torch.__version__


def sampling_args(**changes):
    usual = dict(template="short", max_prompt_tokens=100, max_new_tokens=10, samples=3, seed=0,
                 temperature=1.0, max_rows=1000, kv_gb=None, top_k=0, top_p=1.0, min_p=0.0)
    return SimpleNamespace(**usual | changes)


@pytest.mark.parametrize("template", ["short", "v6"])
def test_an_empty_thought_is_the_same_prompt_and_what_follows_when_the_thought_is_closed_at_once(
        corpus, base, template):
    tokenizer = Tokenizer.load(base)
    model = tiny_model(tokenizer.vocab_size, 600)
    if template == "short":
        model = GPT.from_pretrained(base)
    positions, _ = choose_positions(corpus, find_scores(corpus), 6, seed=0)
    close = tokenizer.special["</think>"]
    args = sampling_args(template=template, temperature=0, max_prompt_tokens=580, max_new_tokens=12)
    thinking, empty = (think(model, tokenizer, corpus, positions, args, mode)
                       for mode in ("reasoning", "empty"))
    assert [g.question.prompt for g in thinking] == [g.question.prompt for g in empty]
    for group in empty:
        prompt = group.question.prompt
        assert tokenizer.decode_bytes(prompt).endswith((b"<think>", b"<think>\n"))
        [[greedy]] = generate(model, [prompt + [close]], 1, 11, 0, stop_ids(tokenizer), seed=5)
        assert [r.tokens for r in group.rollouts] == [[close] + greedy.tokens] * 3
        response = tokenizer.decode_bytes(group.rollouts[0].tokens)
        assert response.startswith(b"</think>") and len(group.rollouts[0].tokens) <= 12
        assert group.predictions[0] == extract_prediction(response)
    if template == "short":
        assert any(p is not None for g in empty for p in g.predictions)


def test_an_empty_thought_without_room_for_an_answer_is_refused(corpus, base):
    positions, _ = choose_positions(corpus, find_scores(corpus), 2, seed=0)
    with pytest.raises(ValueError, match="1 leaves no room after an empty thought of 1 tokens"):
        think(GPT.from_pretrained(base), Tokenizer.load(base), corpus, positions,
              sampling_args(max_new_tokens=1), "empty")


@pytest.mark.parametrize("forced", [1, 3, 6])
def test_a_forced_greedy_rollout_is_the_likeliest_token_that_is_allowed_one_after_the_other(
        corpus, base, forced):
    tokenizer, model = Tokenizer.load(base), GPT.from_pretrained(base)
    positions, _ = choose_positions(corpus, find_scores(corpus), 4, seed=0)
    ends = stop_ids(tokenizer)
    args = sampling_args(forced=forced, max_new_tokens=9)
    for group in think(model, tokenizer, corpus, positions, args, "forced-greedy"):
        expected = []
        while len(expected) < 9 and not set(expected) & set(ends):
            logits = model(torch.tensor([group.question.prompt + expected]))[0, -1]
            if len(expected) < forced:
                logits[[tokenizer.special["</think>"], *ends]] = -torch.inf
            expected.append(logits.argmax().item())
        [rollout] = group.rollouts
        assert rollout.tokens == expected and len(rollout.logprobs) == len(expected)
        assert rollout.finished == (expected[-1] in ends)


def test_forced_rollouts_close_no_thought_too_early_and_draw_the_rest_as_usual(corpus, base):
    tokenizer, model = Tokenizer.load(base), GPT.from_pretrained(base)
    positions, _ = choose_positions(corpus, find_scores(corpus), 1, seed=0)
    close, n = tokenizer.special["</think>"], 4000
    args = sampling_args(forced=1, max_new_tokens=2, samples=n, max_rows=n)
    group = think(model, tokenizer, corpus, positions[:1], args, "forced")[0]
    logits = model(torch.tensor([group.question.prompt]))[0, -1]
    assert logits.softmax(dim=-1)[close] > 0.05   # as if it were allowed
    logits[[close, *stop_ids(tokenizer)]] = -torch.inf
    first = torch.tensor([rollout.tokens[0] for rollout in group.rollouts])
    shares = torch.bincount(first, minlength=len(logits)) / n
    assert shares[close] == 0 and (shares - logits.softmax(dim=-1)).abs().max() < 0.03
    # After the same first token the second is drawn from the whole distribution.
    id = first.mode().values.item()
    second = torch.tensor([r.tokens[1] for r in group.rollouts if r.tokens[0] == id])
    probs = model(torch.tensor([group.question.prompt + [id]]))[0, -1].softmax(dim=-1)
    shares = torch.bincount(second, minlength=len(probs)) / len(second)
    assert (shares - probs).abs().max() < 4 / np.sqrt(len(second))


def test_forcing_without_room_for_an_answer_is_refused(corpus, base):
    positions, _ = choose_positions(corpus, find_scores(corpus), 2, seed=0)
    with pytest.raises(ValueError, match="10 leaves no room after --forced of 10 tokens"):
        think(GPT.from_pretrained(base), Tokenizer.load(base), corpus, positions,
              sampling_args(forced=10), "forced")


def test_the_majority_is_what_most_rollouts_predict_and_the_first_of_several():
    rng, truth = np.random.default_rng(0), [b" a", b" b", b" c"]
    groups, expected = [], []
    for _ in range(300):
        boxes = [[b" a", b" b", b" a b", None][i] for i in rng.integers(4, size=5)]
        groups.append(Group(Question([], truth, [], 0), [], boxes))
        cast = [box for box in boxes if box is not None]
        most = max((cast.count(box) for box in cast), default=0)
        winner = next((box for box in cast if cast.count(box) == most), None)
        expected.append(winner in (b" a", b" a b"))
    assert majority_hits(groups).tolist() == expected and 0.4 < np.mean(expected) < 0.9


def test_lines_beside_come_first_and_have_to_be_about_the_same_positions(corpus, base, tmp_path):
    tokenizer = Tokenizer.load(base)
    tiny_model(tokenizer.vocab_size).save_pretrained(tmp_path / "other")
    tokenizer.save(tmp_path / "other")

    def measure(checkpoint, out, *more):
        return run_here("eval.py", "lm", "--corpus", corpus.folder, "--checkpoints", checkpoint,
                        "--template", "short", "--max-new-tokens", 8, "--out", tmp_path / out, *more)

    measure(base, "base.json", "--positions", 5)
    beside = ("--beside", tmp_path / "base.json")
    code, out, err = measure(tmp_path / "other", "both.json", "--positions", 5, *beside)
    assert (code, err) == (0, "") and out.index(f"\n{base}\n") < out.index(f"\n{tmp_path}/other\n")
    measure(tmp_path / "other", "other.json", "--positions", 5)
    first, second, both = (json.loads((tmp_path / f"{name}.json").read_text())
                           for name in ("base", "other", "both"))
    assert both == first + second
    for changed in (("--positions", 6), ("--positions", 5, "--seed", 1)):
        code, _, err = measure(tmp_path / "other", "both.json", *changed, *beside)
        assert code == 2 and "base.json is about other positions: it says --seed 0, 5 easy" in err


@pytest.mark.parametrize("asked, modes", [
    ("decodings", ["ntp", "reasoning", "majority", "forced", "forced-majority", "greedy",
                   "forced-greedy", "empty"]), ("majority", ["majority"]),
    ("ntp", ["ntp"]), ("empty", ["empty"]), ("both", ["ntp", "reasoning"]),
    ("all", ["ntp", "reasoning", "empty"]), ("swapped", ["swapped"])])
def test_a_mode_means_what_it_says_and_dumps_say_which_it_was(corpus, base, tmp_path, asked, modes):
    code, out, err = run_here("eval.py", "lm", "--corpus", corpus.folder, "--checkpoints", base,
                              "--mode", asked, "--positions", 3, "--template", "short",
                              "--max-new-tokens", 8, "--temperature", 0,
                              "--out", tmp_path / "out.json", "--dump", tmp_path / "dump.jsonl")
    assert (code, err) == (0, "") and "next-token accuracy, %" in out
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(dict.fromkeys(r["mode"] for r in results)) == modes
    for r in results:
        parts = r["one_token"] + r["multi_token"] if "one_token" in r else r["accuracy"]
        assert ("one_token" in r) == (r["mode"] not in ("ntp", "majority", "forced-majority"))
        assert r["accuracy"] == pytest.approx(parts, abs=0.02)
    if modes != ["ntp"]:
        dumped = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
        # A majority has no thoughts of its own, swapped ones come from others.
        expected = {mode.replace("forced-majority", "forced").replace("majority", "reasoning")
                    for mode in modes} - {"ntp"}
        assert {d["mode"] for d in dumped} == expected | ({"reasoning"} if "swapped" in modes else set())
        assert all(d["response"].startswith("</think>") for d in dumped if d["mode"] == "empty")


def test_every_split_has_its_own_number_of_positions_above_its_own_threshold(corpus):
    scores = find_scores(corpus)
    positions, splits = choose_positions(corpus, scores, 12, seed=0)
    entropy = np.load(scores)[positions[:, 0], 0]
    everywhere = np.load(scores)[all_positions(corpus)[:, 0], 0]
    assert len(splits) >= 2
    for name, threshold in SPLITS.items():
        chosen = splits.get(name, [])
        assert len(chosen) == min(12, (everywhere > threshold).sum())
        assert (entropy[chosen] > threshold).all()
    assert len(np.unique(positions[:, 0])) == len(positions)
    assert not set(positions[:, 0]) & set(load_positions(corpus, scores, -1, "train")[:, 0])


def test_checkpoints_answer_the_same_positions_whatever_else_is_evaluated(corpus, base, tmp_path):
    tokenizer = Tokenizer.load(base)
    tiny_model(tokenizer.vocab_size).save_pretrained(tmp_path / "other")
    tokenizer.save(tmp_path / "other")

    def results(*checkpoints):
        code, _, err = run_here("eval.py", "lm", "--corpus", corpus.folder,
                                "--checkpoints", *checkpoints, "--positions", 20,
                                "--template", "short", "--max-new-tokens", 8, "--samples", 2,
                                "--out", tmp_path / "results.json")
        assert code == 0, err
        lines = json.loads((tmp_path / "results.json").read_text())
        return [line for line in lines if line["checkpoint"] == base]

    assert results(base) == results(tmp_path / "other", base) != []


def test_the_seed_chooses_the_positions_and_the_rows_do_not_choose_the_thoughts(corpus, base):
    scores, model, tokenizer = find_scores(corpus), GPT.from_pretrained(base), Tokenizer.load(base)
    positions, _ = choose_positions(corpus, scores, 8, seed=0)
    assert np.array_equal(positions, choose_positions(corpus, scores, 8, seed=0)[0])
    assert not np.array_equal(positions, choose_positions(corpus, scores, 8, seed=1)[0])

    def thoughts(max_rows):
        groups = think(model, tokenizer, corpus, positions, sampling_args(max_rows=max_rows))
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


def test_documents_of_unequal_size_are_drawn_whole_and_the_interval_still_holds_the_truth():
    rng, held = np.random.default_rng(0), 0
    for case in range(250):
        sizes = rng.integers(1, 12, size=80)
        documents = np.repeat(np.arange(80), sizes)
        chance = rng.beta(2, 3, size=80)[documents]  # some documents are easier; mean 0.4
        hits = (rng.random(len(documents)) < chance).astype(float)
        low, high = interval(hits, documents, seed=case)
        held += low <= 0.4 <= high
    assert 0.91 <= held / 250 <= 0.98


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 10), (57, 200), (200, 200)])
def test_wilson_ends_are_the_shares_that_the_data_just_do_not_contradict(hits, n):
    for p, side in zip(wilson(hits / n, n), (1, -1)):
        assert hits / n - p == pytest.approx(side * 1.96 * (p * (1 - p) / n) ** 0.5, abs=1e-9)


@pytest.mark.parametrize("documents", [1, 2, 9, 10, 40])
@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_documents_that_all_agree_leave_as_much_doubt_as_so_many_trials(documents, right):
    values = np.tile([1.0] * right + [0.0] * (5 - right), documents)
    found = interval(values, np.repeat(np.arange(documents), 5), seed=0)
    assert found == pytest.approx(wilson(right / 5, documents), abs=1e-9)
    # Sums of means over several thoughts round.
    sizes = np.arange(1, documents + 1)
    found = interval(np.full(sizes.sum(), right / 10), np.repeat(sizes, sizes), seed=0)
    assert found == pytest.approx(wilson(right / 10, documents), abs=1e-9)


def test_of_a_few_documents_the_interval_holds_the_truth_too():
    rng = np.random.default_rng(0)
    for documents in (1, 2, 3, 5, 9):
        held = 0
        for case in range(200):
            sizes = rng.integers(1, 12, size=documents)
            where = np.repeat(np.arange(documents), sizes)
            hits = rng.random(len(where)) < rng.beta(2, 3, size=documents)[where]  # mean 0.4
            low, high = interval(hits.astype(float), where, seed=case)
            held += low <= 0.4 <= high
            assert 0 <= low <= hits.mean() <= high <= 1 and high - low > 0.2
        assert held / 200 >= 0.95


def test_from_ten_documents_on_the_interval_is_the_bootstraps_alone():
    rng = np.random.default_rng(3)
    for documents in (10, 47):
        where = np.repeat(np.arange(documents), 3)
        hits = (rng.random(len(where)) < 0.4).astype(float)
        drawn = np.random.default_rng(7).integers(documents, size=(1000, documents))
        means = [np.concatenate([hits[where == d] for d in row]).mean() for row in drawn]
        assert interval(hits, where, seed=7) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)


def test_no_hit_in_100_is_no_certainty_of_zero():
    """Wilson's interval, worked out by hand: 0 of n, n of n."""
    none = interval(np.zeros(200), np.arange(200) // 2, seed=0)
    assert none == pytest.approx([0, 0.03699], abs=1e-5)
    assert interval(np.ones(10), np.arange(10), seed=0) == pytest.approx([0.72246, 1], abs=1e-5)


# ---- thoughts of others ----

def test_a_swapped_thought_comes_from_another_document_and_is_answered_anew(corpus, thinker, tmp_path):
    code, _, err = run_here("eval.py", "lm", "--corpus", corpus.folder, "--checkpoints", thinker,
                            "--mode", "reasoning", "swapped", "--positions", 8, "--template", "short",
                            "--max-new-tokens", 24, "--dump", tmp_path / "dump.jsonl")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    own, swapped = ({r["context"]: r["response"] for r in records if r["mode"] == mode}
                    for mode in ("reasoning", "swapped"))
    thoughts = [response.split("</think>")[0] for response in own.values()]
    others = [response.split("</think>")[0] for response in swapped.values()]
    assert own.keys() == swapped.keys() and set(others) <= set(thoughts) != {""}
    assert thoughts != others and all("</think>" in response for response in swapped.values())


def test_swap_takes_another_document_if_there_is_one():
    groups = [SimpleNamespace(rollouts=[i, None]) for i in range(5)]
    documents = [0, 0, 7, 0, 9]
    swapped = evaluation.swap(groups, [(i, start, 99) for i, start in enumerate(documents)])
    assert all(documents[j] != documents[i] for i, j in enumerate(swapped))
    assert evaluation.swap(groups[:2], [(0, 0, 9), (1, 0, 9)]) == [1, 0]
    assert evaluation.swap(groups[:1], [(0, 0, 9)]) == [0]


def test_a_thought_ends_where_its_last_close_begins():
    pieces = [b"a", b"b</", b"think", b">", b" c", b"</think>", b"<end>"]
    tokenizer = SimpleNamespace(token_bytes=lambda i: pieces[i],
                                decode_bytes=lambda ids: b"".join(pieces[i] for i in ids))
    for tokens, finished, thought in (([0, 0, 1, 2, 3, 4], False, [0, 0]), ([0, 4, 5, 4, 6], True, [0, 4]),
                                      ([0, 5, 4, 5, 0], False, [0, 5, 4]), ([0, 4, 6], True, [0, 4]),
                                      ([5, 0], False, []), ([0, 4], False, [0, 4])):
        assert evaluation.thought_of(tokenizer, Rollout(tokens, finished=finished)) == thought


def test_a_box_that_copies_its_thought_copies_that_of_the_other(monkeypatch):
    """A stand-in for the model: it boxes the first token of the thought that it is given."""
    args = sampling_args(max_new_tokens=20)
    tokenizer = Tokenizer.load("embedded")
    close = tokenizer.encode("</think>", special=True)
    box, end = tokenizer.encode(r"\boxed{"), tokenizer.encode("}")

    def answer(model, ends, args, mode, longer, n, max_new_tokens, number=0, banned=()):
        assert n == 1 and all(prompt[-len(close):] == close for prompt in longer)
        return [[Rollout(box + [prompt[2]] + end)] for prompt in longer]

    monkeypatch.setattr(evaluation, "decode_with_bar", answer)
    digits = [tokenizer.ranks[b"%d" % i] for i in range(4)]
    thoughts = [Rollout([digits[2], digits[0]]), Rollout([digits[1]])]
    prompts = [[digits[0], digits[1]]] * 2                              # two tokens each
    groups = evaluation.behind_thoughts(None, tokenizer, prompts, thoughts, args)
    assert [[extract_prediction(tokenizer.decode_bytes(rollout.tokens)) for rollout in some]
            for some in groups] == [[b"2"], [b"1"]]
