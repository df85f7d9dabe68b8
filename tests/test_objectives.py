"""Objectives: what is asked, what is right, and what the controls leave out."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import objectives
from data.questions import read_questions
from data.sums import ANSWERS
from data.tokenizer import Tokenizer
from model import GPT, read_config
from objectives import Group, Question
from reward import extract_prediction
from sample import Rollout
from test_runs import command, lines
from tiny import base, corpus, run_here
from plumbing.log import flops_of_run
from train_ntp import document_examples


@pytest.fixture
def tokenizer():
    return Tokenizer.load("embedded")


@pytest.fixture
def objective(base, corpus, tokenizer):
    """objective(name, **changes): the class with the arguments of a small run."""
    def make(name, **changes):
        usual = dict(objective=name, init=base, corpus=corpus.folder, proxy=None, data=None, template="short",
                     entropy_threshold=0.5, max_prompt_tokens=100, max_new_tokens=10, seed=0,
                     tokens_per_micro_batch=100, skip_bad=False, skip_long=False)
        return objectives.load(name)(SimpleNamespace(**usual | changes), tokenizer, read_config(base))
    return make


def group_of(tokenizer, question, *texts):
    return Group(question, [Rollout(tokens=tokenizer.encode(text, special=True)) for text in texts])


def box(prediction):
    return rf"</think>\boxed{{{prediction}}}"


def test_behind_a_closed_thought_a_box_counts_and_a_second_thought_does_not(objective, tokenizer):
    texts = (r"\boxed{ odd}", r"hm</think>\boxed{ odd}", r"\boxed{ even}", r"hm \boxed{ odd}")
    for name, rewards in (("rpt", [0, 1, 0, 0]), ("no_thought", [1, 0, 0, 0])):
        group = group_of(tokenizer, Question([], [b" odd", b","], [], 0), *texts)
        objective(name).score(None, [group])
        assert group.rewards == rewards


def test_each_reward_judges_the_same_predictions_in_its_own_way(objective, tokenizer):
    question = Question([], [b" odd", b","], [], 0)
    for name, rewards in (("rpt", [1, 1, 0, 0]), ("first_token", [1, 1, 1, 0])):
        group = group_of(tokenizer, question, *map(box, (" odd", " odd,", " odd one", " o")))
        objective(name).score(None, [group])
        assert group.rewards == rewards


def test_dense_rewards_are_the_probabilities_of_a_plain_forward(objective, base, tokenizer):
    """A wrong prediction earns P(its first token | context), whatever the group beside it is doing."""
    model = GPT.from_pretrained(base)
    contexts = [tokenizer.encode(text) for text in ("Solution: The digit is", "Problem: Mia")]
    texts = [(" odd", " even", None), (" works", " computes", " zero one")]
    expected, groups = [], []
    for context, row, truth in zip(contexts, texts, (b" odd", b" calculates")):
        probabilities = model(torch.tensor([context]))[0, -1].softmax(dim=-1)
        first = [p and tokenizer.encode(p)[0] for p in row]
        expected.append([1.0 if p and p.encode() == truth else probabilities[i].item() if p else 0.0
                         for p, i in zip(row, first)])
        groups.append(group_of(tokenizer, Question([], [truth], context, 0),
                               *(box(p) if p else "</think>" for p in row)))
    conditional = [Group(group.question, group.rollouts) for group in groups]
    objective("dense", tokens_per_micro_batch=8).score(model, groups)   # one context each
    objective("conditional_dense").score(model, conditional)
    objective("dense").score(model, [])                                 # a rank without positions
    for group, row, context in zip(groups, expected, contexts):
        assert group.rewards == pytest.approx(row, rel=1e-4) and group.scoring_tokens == len(context)
    assert expected[0][0] == 1 and 0 < expected[0][1] < 1 and expected[0][2] == 0
    assert conditional[0].rewards == pytest.approx(expected[0], rel=1e-4) and conditional[1].rewards == [0, 0, 0]


def test_an_exact_question_ends_in_an_open_thought_(objective, questions, tokenizer):
    asked = objective("answers", data=questions)
    question = asked.question(3)
    text, truth = read_questions(questions)[3]
    assert tokenizer.decode_bytes(question.prompt).decode() == text + "<think>"
    assert (question.truth, question.position) == (truth, 3)
    longest = max(len(asked.question(i).prompt) for i in asked.positions)
    assert asked.longest_prompt() == longest
    group = group_of(tokenizer, Question([], "2, 5", [], 0), r"</think>\boxed{5} and \fbox{2}", box("5"), "5")
    asked.score(None, [group])
    assert (group.predictions, group.rewards) == ([b"5, 2", b"5", None], [1, 0, 0])


def test_the_longest_prompt_of_text_is_that_of_the_longest_context(objective):
    for room in (100, 20):
        asked = objective("rpt", max_prompt_tokens=room)
        assert asked.longest_prompt() == max(len(asked.question(p).prompt) for p in asked.positions) <= room


def test_the_truth_is_what_follows_in_the_document_and_nothing_behind_its_end(objective, corpus, tokenizer):
    asked = objective("rpt")
    for position in asked.positions:
        t, start, end = position.tolist()
        question = asked.question(position)
        assert b"".join(question.truth) == tokenizer.decode_bytes(corpus.tokens[t:end].tolist())
        assert question.context == corpus.tokens[start:t].tolist()


@pytest.fixture
def questions(corpus, tokenizer, tmp_path):
    """Documents cut before their last word, which is the answer."""
    path = tmp_path / "questions.jsonl"
    with open(path, "w") as file:
        for start, _, end, _ in corpus.docs[:60].tolist():
            text = tokenizer.decode_bytes(corpus.tokens[start:end].tolist()).decode()
            problem, _, answer = text.removesuffix(".").rpartition(" ")
            file.write(json.dumps(dict(question=problem, answer=answer)) + "\n")
    return path


def test_a_run_on_questions_rewards_exact_answers_and_resumes_to_the_same_bits(corpus, base, questions, tmp_path):
    line = lambda name, **more: [x for x in command("train_rpt.py", corpus, base, tmp_path / name,
                                                    objective="answers", data=questions, **more)]
    assert run_here(*line("whole"))[0] == 0
    assert run_here(*line("halves", steps=3))[0] == 0 and run_here(*line("halves", resume=True))[0] == 0
    assert lines(tmp_path / "whole") == lines(tmp_path / "halves")
    records = lines(tmp_path / "whole", "samples.jsonl")
    assert {r["truth"] for r in records} <= {answer for answers in ANSWERS.values() for answer in answers}
    for record in records:
        said = (record["extracted"] or "").strip()
        assert record["reward"] == float(said == record["truth"])


def test_questions_without_room_are_left_out_of_the_walk_and_stay_out_after_a_resume(
        objective, corpus, base, questions, tmp_path):
    asked = objective("answers", data=questions)
    room = max(len(asked.question(i).prompt) for i in asked.positions) - 1
    long = [i for i in asked.positions if len(asked.question(i).prompt) > room]
    fewer = objective("answers", data=questions, max_prompt_tokens=room, skip_long=True)
    assert fewer.longest_prompt() <= room and {*fewer.positions} == {*asked.positions} - {*long}
    assert {*fewer.take(0, len(fewer.positions))} == {*fewer.positions}
    assert objective("answers", data=questions, skip_long=True).take(7, 99) == asked.take(7, 99)

    line = lambda name, **more: command("train_rpt.py", corpus, base, tmp_path / name, objective="answers",
                                        data=questions, max_prompt_tokens=room, **more)
    code, _, err = run_here(*line("none"))
    assert code == 2 and err.count("\n") == 1 and f"no room for {len(long)} of 60 questions" in err
    assert run_here(*line("whole", skip_long=True))[0] == 0
    assert run_here(*line("halves", skip_long=True, steps=3))[0] == 0
    assert run_here(*line("halves", skip_long=True, resume=True))[0] == 0
    assert lines(tmp_path / "whole") == lines(tmp_path / "halves")


def test_without_a_thought_every_response_is_a_box(corpus, base, tmp_path):
    line = command("train_rpt.py", corpus, base, tmp_path / "run", objective="no_thought")
    assert run_here(*line)[0] == 0
    assert lines(tmp_path / "run")[0]["format_rate"] > 0.5
    assert not any("</think>" in r["response"] for r in lines(tmp_path / "run", "samples.jsonl")[:2])


@pytest.mark.parametrize("name", ["first_token", "dense", "conditional_dense"])
def test_a_run_takes_each_reward(corpus, base, tmp_path, name):
    line = command("train_rpt.py", corpus, base, tmp_path / "run", objective=name)
    code, _, err = run_here(*line)
    assert (code, err) == (0, "")
    rewards = {r["reward"] for r in lines(tmp_path / "run", "samples.jsonl")}
    assert (rewards <= {0.0, 1.0}) == (name == "first_token") or name == "conditional_dense"


@pytest.mark.parametrize("changes, words", [
    (dict(objective="answers"), "--objective answers needs --data"),
    (dict(objective="answers", data="x.jsonl", template="v0"), "--template v0: questions are asked with chat or short"),
    (dict(objective="none"), "--objective: invalid choice: 'none'"),
    (dict(rollouts=1), "--rollouts must be at least 2"), (dict(grad_clip=0), "--grad-clip must be at least 0.001")])
def test_flags_that_do_not_fit_together_are_one_line(corpus, base, tmp_path, changes, words):
    code, _, err = run_here(*command("train_rpt.py", corpus, base, tmp_path / "run", **changes))
    assert code == 2 and err.count("\n") == 1 and words in err


# ---- controls ----------------------------------------------------------------------------------------------

def test_own_strings_are_rollouts_that_the_text_bears_out(corpus, base, tokenizer, tmp_path):
    """As many as there are right ones: every string's box is the beginning of what follows its prompt."""
    out = tmp_path / "own.jsonl"
    code, _, err = run_here("paper/own_rollouts.py", "--corpus", corpus.folder, "--init", base, "--template",
                            "short", "--count", 30, "--rollouts", 3, "--max-new-tokens", 12, "--out", out)
    assert (code, err) == (0, "")
    strings = [json.loads(line) for line in out.read_text().splitlines()]
    texts = [corpus.tokens[start:end].tolist() for start, _, end, is_val in corpus.docs.tolist() if not is_val]
    truths = {tuple(ids[:t]): tokenizer.decode_bytes(ids[t:]) for ids in texts for t in range(len(ids))}
    think = tokenizer.special["<think>"]
    for string in strings:
        *context, last = string["prompt"]
        prediction = extract_prediction(tokenizer.decode_bytes(string["response"]))
        assert last == think and prediction and truths[tuple(context)].startswith(prediction)
    assert 5 < len(strings) < 90 and len({tuple(s["prompt"]) for s in strings}) <= 30


def test_solutions_become_thoughts_and_exact_answers_boxes(base, tokenizer, tmp_path):
    gsm8k = {"question": "How much is 2+3?", "answer": "It is <<2+3=5>>5.\n#### 5"}
    omni = {"problem": "How long?", "solution": "Longer than the model has positions. " * 90, "answer": "1"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(gsm8k) + "\n" + json.dumps(omni) + "\n")
    line = ["data/warmstart.py", "--solutions", tmp_path / "questions.jsonl", "--proxy", base, "--template", "short",
            "--out", tmp_path / "strings.jsonl"]
    code, _, err = run_here(*line)
    assert code == 2 and "no room for 1 of 2 questions, longer than 128 tokens: '" in err
    code, text, err = run_here(*line, "--skip-long")
    assert (code, err) == (0, "") and "left out: no room for 1 of 2 questions" in text
    string, = map(json.loads, (tmp_path / "strings.jsonl").read_text().splitlines())
    [response] = string["responses"]
    assert string["texts"] == [r"It is <<2+3=5>>5.</think>\boxed{5}<|end|>"]
    assert [tokenizer.decode_bytes(response).decode()] == string["texts"]
    assert tokenizer.decode_bytes(string["prompt"]) == b"How much is 2+3?<think>"
    code, _, err = run_here(*line, "--corpus", "C")
    assert code == 2 and "either --corpus or --solutions" in err


def test_a_loss_on_chosen_tokens_alone_is_the_mean_over_these(corpus, tokenizer, tmp_path):
    """Of a document only the tokens that RPT trains on count, wherever the window begins; never the end."""
    start, solution, end, _ = corpus.docs[0].tolist()
    counts = np.zeros(len(corpus.tokens), dtype=bool)
    counts[[start + 3, end - 2]] = True
    rng = np.random.default_rng(0)
    [example] = document_examples(corpus, [0], tokenizer.eos_id, 1000, 0.5, rng, counts)
    [response], [weights] = example.rollouts, example.advantages
    assert [i for i, w in enumerate(weights) if w] == [2, end - 2 - start - 1] and weights[2] == 0.5
    assert response[2] == corpus.tokens[start + 3]
    for _ in range(20):
        [example] = document_examples(corpus, [0], tokenizer.eos_id, 8, 0.5, rng, counts)
        [response], [weights] = example.rollouts, example.advantages
        chosen = {int(corpus.tokens[start + 3]), int(corpus.tokens[end - 2])}
        assert {id for id, w in zip(response, weights) if w} <= chosen


def test_updates_alone_cost_less_than_the_whole_run(corpus, base, tmp_path):
    line = command("train_rpt.py", corpus, base, tmp_path / "run")
    assert run_here(*line)[0] == 0
    steps = lines(tmp_path / "run")
    assert flops_of_run(tmp_path / "run", 10, updates_only=True) == 60 * sum(s["trained_tokens"] for s in steps)
    assert flops_of_run(tmp_path / "run", 10) == sum(s["flops"] for s in steps)
