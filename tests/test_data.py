"""Entropies against transformers, prompts id by id, the embedded corpus by other arithmetic."""
import json
import random
import re

import numpy as np
import pytest
import torch

from data import filter as entropy_filter
from data import toy
from data.corpus import load_corpus, write_corpus
from data.filter import score_corpus, score_document
from data.positions import SPLITS, answerable, find_scores, load_positions, scores_path
from data.prompt import TEMPLATES, build_prompt, stop_ids, template_ids
from data.questions import read_questions
from data.sums import ANSWERS, STEPS, write_document
from data.tokenizer import Tokenizer
from data.toy import think, think_string
from data.warmstart import draft_response
from model import GPT
from reward import extract_prediction, prefix_match
from sample import Rollout
from tiny import base, corpus, run_here, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("embedded")


def save_proxy(folder, tokenizer, max_positions=128, seed=0):
    """A random model whose predictions are far from uniform."""
    model = tiny_model(tokenizer.vocab_size, max_positions)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


# ---- filter ----

def test_entropies_are_those_of_transformers_also_beyond_the_models_positions(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    rng, window = random.Random(1), 24
    documents = []
    for n in (1, 3, 12):
        pairs = [write_document(rng)[:2] for _ in range(n)]
        documents.append(("", "".join(problem + solution for problem, solution in pairs)))
    documents.append(write_document(rng)[:2])
    corpus = write_corpus(documents, tokenizer, tmp_path / "corpus")
    proxy = save_proxy(tmp_path / "proxy", tokenizer, max_positions=window)
    scores = np.load(score_corpus(corpus, proxy))
    model = transformers.AutoModelForCausalLM.from_pretrained(proxy, dtype=torch.float32).eval()
    checked = 0
    for start, solution, end, _ in corpus.docs:
        at = solution  # windows: half of context, then what is scored
        while at < end:
            first = max(start, min(at - window // 2, end - window))
            ids = corpus.tokens[first:min(first + window, end)].astype(np.int64)
            with torch.no_grad():
                probs = model(torch.tensor(ids[None])).logits[0].double().softmax(dim=-1)
            for t in range(at, first + len(ids)):
                p = probs[t - 1 - first]
                top = p.sort(descending=True).values[:16]  # they do not add up to 1
                assert scores[t, 0] == pytest.approx(-(top * top.log()).sum().item(), abs=1e-4)
                assert scores[t, 1] == (p.argmax() == corpus.tokens[t])
                checked += 1
            at = first + len(ids)
    assert checked >= 500 and checked == (~np.isnan(scores[:, 0])).sum()
    assert scores[~np.isnan(scores[:, 0]), 0].max() < np.log(16)


def test_a_long_document_is_scored_with_at_least_half_a_window_of_context(tokenizer):
    """Each token depends on exactly the window before it: changing an older one changes nothing."""
    model = tiny_model(tokenizer.vocab_size, max_positions=16)
    tokens = np.arange(50, dtype=np.uint32)
    whole = score_document(model, tokens, 1)
    assert whole.shape == (49, 2) and np.isfinite(whole).all()
    for t in range(1, 50):
        changed = tokens.copy()
        changed[max(0, t - 8):t] += 100  # inside every window
        assert abs(score_document(model, changed, 1)[t - 1, 0] - whole[t - 1, 0]) > 0
        older = tokens.copy()
        older[:max(0, t - 15)] += 100    # outside of any
        assert score_document(model, older, 1)[t - 1, 0] == pytest.approx(whole[t - 1, 0], abs=1e-6)


@pytest.mark.parametrize("piece", [1, 7, 24, 100])  # positions
def test_logits_of_a_long_document_come_in_pieces_and_change_no_score(tokenizer, monkeypatch, piece):
    model, sizes = tiny_model(tokenizer.vocab_size, max_positions=64), []
    tokens = np.arange(150, dtype=np.uint32)
    scores = score_document(model, tokens, 30)

    def logits(hidden):
        sizes.append(len(hidden))
        return GPT.logits(model, hidden)

    monkeypatch.setattr(model, "logits", logits)
    monkeypatch.setattr(entropy_filter, "PIECE", piece * tokenizer.vocab_size)
    assert score_document(model, tokens, 30) == pytest.approx(scores, abs=1e-5)
    assert max(sizes) == min(piece, 34) and sum(sizes) == 120  # 34: the first window's


def test_interrupted_scoring_goes_on_where_it_stopped(corpus, base, tmp_path, monkeypatch):
    folder = load_corpus(corpus.folder)._replace(folder=tmp_path)
    calls = []

    def press_ctrl_c(model, tokens, *rest):
        calls.append(len(tokens))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return score_document(model, tokens, *rest)

    monkeypatch.setattr(entropy_filter, "score_document", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        score_corpus(folder, base)
    partial = np.load(scores_path(folder, base))
    # Training documents come first.
    done = sorted(corpus.docs.tolist(), key=lambda doc: doc[3])[:19]
    assert (~np.isnan(partial[:, 0])).sum() == sum(end - solution for _, solution, end, _ in done)
    path = score_corpus(folder, base)
    assert len(calls) == len(corpus.docs) + 1  # the interrupted one came twice
    assert np.array_equal(np.load(path), np.load(find_scores(corpus)), equal_nan=True)
    score_corpus(folder, base)
    assert len(calls) == len(corpus.docs) + 1  # all there: nothing to do


def test_documents_limits_each_side_of_the_split(corpus, base, tmp_path):
    scores = np.load(score_corpus(corpus._replace(folder=tmp_path), base, documents=3))
    scored = [not np.isnan(scores[s, 0]) for _, s, _, _ in corpus.docs]
    assert [sum(np.array(scored)[corpus.docs[:, 3] == side]) for side in (0, 1)] == [3, 3]


def test_another_proxy_has_another_file_and_a_copy_the_same(corpus, base, tokenizer, tmp_path):
    other = save_proxy(tmp_path / "other", tokenizer)
    model = GPT.from_pretrained(base)
    model.save_pretrained(tmp_path / "copy")
    path = scores_path(corpus, base)
    assert scores_path(corpus, tmp_path / "copy") == path != scores_path(corpus, other)
    with torch.no_grad():
        model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "copy")
    assert scores_path(corpus, tmp_path / "copy") != path


@pytest.mark.parametrize("where", ["first bytes", "last bytes", "length"])
def test_large_weights_are_told_apart_by_both_ends_and_their_size(corpus, tmp_path, monkeypatch, where):
    monkeypatch.setattr("data.positions.END_BYTES", 4)
    weights = b"head, a middle that nobody reads, tail"
    other = {"first bytes": b"HEAD" + weights[4:], "last bytes": weights[:-4] + b"TAIL",
             "length": weights[:4] + weights[8:]}[where]
    for name, content in (("one", weights), ("other", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert scores_path(corpus, tmp_path / "one") != scores_path(corpus, tmp_path / "other")


def test_two_proxies_have_to_be_told_apart(corpus, base, tokenizer, tmp_path):
    own = corpus._replace(folder=tmp_path)
    with pytest.raises(ValueError, match="no entropies yet; run python data/filter.py"):
        find_scores(own)
    first = score_corpus(own, base, documents=1)
    assert find_scores(own) == find_scores(own, base) == first
    other = save_proxy(tmp_path / "other", tokenizer)
    with pytest.raises(ValueError, match="no entropies under"):
        find_scores(own, other)
    second = score_corpus(own, other, documents=1)
    with pytest.raises(ValueError, match="scored by 2 proxies; choose with --proxy"):
        find_scores(own)
    assert (find_scores(own, base), find_scores(own, other)) == (first, second)


@pytest.mark.parametrize("threshold", [-1, 0.3, 1.0])
@pytest.mark.parametrize("split", ["train", "val"])
def test_positions_are_solution_tokens_of_a_split_above_the_threshold(corpus, threshold, split):
    entropy = np.load(find_scores(corpus))[:, 0]
    expected = []
    for start, solution, end, is_val in corpus.docs:
        if is_val == (split == "val"):
            tokens = range(max(solution, start + 1), end)
            expected += [(t, start, end) for t in tokens if entropy[t] > threshold]
    positions = load_positions(corpus, find_scores(corpus), threshold, split)
    assert list(map(tuple, positions)) == expected != []


def test_an_entropy_equal_to_the_threshold_is_not_above_it(corpus):
    path = find_scores(corpus)
    positions = load_positions(corpus, path, 0.3, "train")
    entropy = np.load(path)[positions[:, 0], 0]
    chosen = load_positions(corpus, path, float(entropy[0]), "train")
    assert chosen.tolist() == positions[entropy > entropy[0]].tolist()


def test_nobody_asks_for_a_token_that_no_box_can_hold(tmp_path):
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)} | {b"}{": 256, rb"\}": 257},
                          {"<|im_end|>": 258}, r"\\\}|\}\{|[\s\S]")
    fits = answerable(tokenizer)
    assert [id for id in range(259) if not fits[id]] == [ord("}"), 256]
    for id in np.flatnonzero(fits[:258]):                  # the verifier itself pays for the others
        raw = tokenizer.token_bytes(id)
        assert prefix_match(extract_prediction(rb"</think>\boxed{" + raw + b"}"), [raw]) == 1.0
    corpus = write_corpus([("", "a}b{c}{d\\}e")], tokenizer, tmp_path / "corpus")
    np.save(tmp_path / "scores.npy", np.ones((len(corpus.tokens), 2), dtype=np.float32))
    asked = load_positions(corpus, tmp_path / "scores.npy", 0.5, "train", fits)[:, 0]
    every = load_positions(corpus, tmp_path / "scores.npy", 0.5, "train")[:, 0]
    left_out = sorted(set(every.tolist()) - set(asked.tolist()))
    assert [int(corpus.tokens[t]) for t in left_out] == [ord("}"), 256]


@pytest.mark.parametrize("line", [
    "data/warmstart.py --corpus {corpus} --proxy {base} --template short --count 9 --draft-tokens 2 --out {out}",
    "train_rpt.py --corpus {corpus} --init {base} --template short --steps 1 --batch-size 2 --rollouts 2 "
    "--max-new-tokens 8 --entropy-threshold 0 --out-dir {out}",
    "eval.py lm --corpus {corpus} --checkpoints {base} --mode ntp --out {out}"])
def test_no_script_asks_for_a_token_that_no_box_can_hold(base, tmp_path, monkeypatch, line):
    texts = [("", "".join(f"{{{random.Random(i).random()}}}}}" for i in range(seed, seed + 3))) for seed in range(40)]
    corpus, asked = write_corpus(texts, Tokenizer.load(base), tmp_path / "corpus"), []
    score_corpus(corpus, base)

    def watched(*chosen):
        asked.extend(positions := load_positions(*chosen))
        return positions

    monkeypatch.setattr("data.positions.load_positions", watched)
    monkeypatch.setattr("objectives.rpt.load_positions", watched)
    run_here(*line.format(corpus=corpus.folder, base=base, out=tmp_path / "out").split())
    fits = answerable(Tokenizer.load(base))
    assert len(asked) > 20 and fits[corpus.tokens[[t for t, _, _ in asked]]].all()
    assert (~fits[corpus.tokens]).sum() > 200


def test_in_plain_text_every_position_has_a_context(tokenizer, base, tmp_path):
    texts = [("", "The digit is even, namely zero."), ("", "Problem: three")]
    corpus = write_corpus(texts, tokenizer, tmp_path / "corpus")
    positions = load_positions(corpus, score_corpus(corpus, base), -1, "train")
    start, _, end, _ = corpus.docs[corpus.docs[:, 3] == 0][0]
    assert positions[:, 0].tolist() == list(range(start + 1, end))


def test_a_corpus_of_one_document_has_no_validation_positions(tokenizer, base, tmp_path):
    corpus = write_corpus([("", "The digit is even, namely zero.")], tokenizer, tmp_path / "corpus")
    scores = score_corpus(corpus, base)
    assert len(load_positions(corpus, scores, 0, "train"))
    with pytest.raises(ValueError, match="no val document; the corpus needs two or more"):
        load_positions(corpus, scores, 0, "val")


# ---- prompt ----

@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    texts = ("<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    special = {text: 600 + i for i, text in enumerate(texts)}
    return Tokenizer(tokenizer.ranks, special, tokenizer.pattern)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_context_ids_survive_and_the_thought_is_open(tokenizer, template):
    context = tokenizer.encode("Solution: The dig") + [65, 65, 66]  # no text tokenises to these ids
    before, after = template_ids(tokenizer, template)
    prompt = build_prompt(context, before, after, 1000)
    assert prompt == before + context + after
    assert tokenizer.decode_bytes(after).rstrip(b"\n").endswith(b"<think>")
    assert tokenizer.special["<think>"] in after
    words = tokenizer.decode_bytes(before + after).decode()
    assert (rb"\boxed{" in words.encode()) == (template != "short")
    assert ("```" in words) == (template not in ("v0", "short"))


def test_all_templates_differ(tokenizer):
    assert len({str(template_ids(tokenizer, name)) for name in TEMPLATES}) == len(TEMPLATES) == 8


def test_a_long_context_loses_its_beginning(tokenizer):
    context, before, after = list(range(50)), [100, 101], [102]
    assert build_prompt(context, before, after, 13) == [100, 101, *range(40, 50), 102]
    assert build_prompt(context, before, after, 4) == [100, 101, 49, 102]
    assert build_prompt(context, before, after, 53) == build_prompt(context, before, after, 999)


@pytest.mark.parametrize("longest", [3, 0, -50])
def test_a_template_leaves_room_for_context_or_is_refused(longest):
    complaint = f"takes 3 tokens, the prompt may have {max(0, longest)}: no room for context"
    with pytest.raises(ValueError, match=complaint):
        build_prompt([1, 2], [100, 101], [102], longest)


def test_an_unknown_template_is_named_with_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match="unknown template 'v7'; there are v0, v1, .*, v6, short"):
        template_ids(tokenizer, "v7")


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "short"])
def test_a_chat_model_gets_its_turns_as_special_tokens(chat_tokenizer, template):
    before, after = template_ids(chat_tokenizer, template)
    special = chat_tokenizer.special
    assert before[0] == special["<|im_start|>"] and before.count(special["<|im_start|>"]) == 1
    turn = chat_tokenizer.decode_bytes(after).decode()
    assert turn.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    turns = ("<|im_end|>", "<|im_start|>", "<think>")
    assert [id for id in after if id >= 600] == [special[text] for text in turns]


def test_short_has_no_turns_and_every_end_of_turn_stops(chat_tokenizer, tokenizer):
    assert template_ids(chat_tokenizer, "short") == ([], [600])
    assert stop_ids(chat_tokenizer) == [603, 604]
    assert stop_ids(tokenizer) == [tokenizer.eos_id]


# ---- the embedded corpus ----

def left_to_right(expression):
    """'5+3*7' -> (5 + 3) * 7 mod 10, by another route than the generator's."""
    first, *operations = re.findall(r"^\d|[+*]\d+", expression)
    assert first + "".join(operations) == expression
    value = int(first)
    for sign, *digits in operations:
        operand = int("".join(digits))
        value = value + operand if sign == "+" else value * operand
    return value % 10


WORDS = "zero one two three four five six seven eight nine".split()
ASKED = {  # the question, and its right answer
    "small or large": lambda digit: "large" if digit > 4 else "small",
    "zero, low, middle or high": lambda digit: ("zero low low low middle middle middle "
                                                "high high high").split()[digit],
    "Which digit": lambda digit: WORDS[digit]}


def right_answer(problem, digit=None):
    """What a problem asks for, worked out by other means; digit: in place of the right one."""
    if digit is None:
        digit = left_to_right(re.search(r"\d[\d+*]+", problem)[0])
    [answer] = [answer(digit) for question, answer in ASKED.items() if question in problem]
    return answer


def test_the_answer_of_every_document_is_right():
    rng, answers, steps = random.Random(7), set(), set()
    for _ in range(500):
        document = write_document(rng)
        assert document.solution == f" It is {right_answer(document.problem)}."
        answers.add(document.solution)
        steps.add(len(document.operations))
    assert len(answers) == 2 + 4 + 10 - 1  # two questions share a zero
    assert steps == set(range(STEPS[0], STEPS[1] + 1))


def test_the_questions_are_harder_to_guess_from_one_to_the_next():
    entropies = []
    for answers in ANSWERS.values():
        shares = np.unique(answers, return_counts=True)[1] / 10
        entropies.append(-(shares * np.log(shares)).sum())
    easy, medium, hard = entropies
    assert SPLITS["easy"] < easy < SPLITS["medium"] < medium < SPLITS["hard"] < hard


def steps_of(thought):
    """[("5+4", "9"), ...]: what a thought computes, and what comes out."""
    return re.findall(r"(\d[+*]\d)=(\d);", thought)


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_a_thought_is_right_or_slips_once(monkeypatch, wrong):
    monkeypatch.setattr(toy, "WRONG", wrong)
    monkeypatch.setattr(toy, "STOPPED", 0.0)
    rng, slips = random.Random(3), []
    for _ in range(200):
        document = write_document(rng)
        thought, digit = think(rng, document)
        steps = steps_of(thought)
        assert len(steps) == len(document.operations) and steps[-1][1] == str(digit)
        befores = [str(document.start)] + [result for _, result in steps[:-1]]
        assert [step[0] for step, _ in steps] == befores
        assert [step[1:] for step, _ in steps] == document.operations
        slips.append(sum(left_to_right(step) != int(result) for step, result in steps))
        assert slips[-1] or digit == left_to_right(re.search(r"\d[\d+*]+", document.problem)[0])
    assert set(slips) == {0} if wrong == 0 else set(slips) == {0, 1} and np.mean(slips) > 0.8


def test_a_thought_gives_up_after_any_step_but_the_last_and_believes_the_digit_it_has(monkeypatch):
    monkeypatch.setattr(toy, "WRONG", 0.0)
    rng, went_on = random.Random(4), {done: [] for done in range(1, STEPS[1])}
    for _ in range(5000):
        document = write_document(rng)
        thought, digit = think(rng, document)
        steps = steps_of(thought)
        assert [step[1:] for step, _ in steps] == document.operations[:len(steps)]
        assert steps[-1][1] == str(digit) and thought.endswith("; " + document.answers[digit])
        for done in range(1, len(document.operations)):
            if done <= len(steps):
                went_on[done].append(done < len(steps))
    for cases in went_on.values():
        error = np.sqrt(toy.STOPPED * (1 - toy.STOPPED) / len(cases))
        assert len(cases) > 30 and abs(1 - np.mean(cases) - toy.STOPPED) < 4 * error


def test_the_share_of_strings_that_skip_give_up_and_are_about_the_answer(tokenizer):
    rng, skipped, computed, complete = random.Random(6), [], [], []
    for _ in range(4000):
        document = write_document(rng)
        prompt, response = think_string(rng, tokenizer, document)
        text = tokenizer.decode_bytes(response).decode()
        thought, box = text.split("</think>")
        skipped.append(not thought)
        computed.append(tokenizer.decode_bytes(prompt).endswith(b" It is<think>"))
        if thought:
            complete.append(len(steps_of(thought)) == len(document.operations))
        if thought and computed[-1]:
            # The answer is that of the digit the thought ends with, right or not.
            digit = int(steps_of(thought)[-1][1])
            assert box == rf"\boxed{{ {right_answer(document.problem, digit)}}}<|end|>"
        elif computed[-1]:
            assert box == rf"\boxed{{ {right_answer(document.problem)}}}<|end|>"
    steps = np.arange(STEPS[0], STEPS[1] + 1)
    for cases, share in ((skipped, toy.SKIPPED), (computed, toy.COMPUTED + (1 - toy.COMPUTED) / 4),
                         (complete, ((1 - toy.STOPPED) ** (steps - 1)).mean())):
        assert np.mean(cases) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_the_box_is_the_truth_where_nobody_slipped_or_gave_up(tokenizer, monkeypatch, skipped):
    monkeypatch.setattr(toy, "SKIPPED", skipped)
    monkeypatch.setattr(toy, "WRONG", 0.0)
    monkeypatch.setattr(toy, "STOPPED", 0.0)
    rng = random.Random(5)
    for _ in range(200):
        document = write_document(rng)
        prompt, response = think_string(rng, tokenizer, document)
        ids = tokenizer.encode(document.problem) + tokenizer.encode(document.solution)
        t = len(prompt) - 1
        assert prompt == ids[:t] + [tokenizer.special["<think>"]]
        assert response[-1] == tokenizer.eos_id
        assert t >= len(tokenizer.encode(document.problem))
        text = tokenizer.decode_bytes(response)
        assert text.startswith(b"</think>") == (skipped == 1)
        assert extract_prediction(text) == tokenizer.token_bytes(ids[t])


def make_toy(folder, documents, seed):
    done = run_here("data/toy.py", "--out", folder, "--documents", documents, "--seed", seed)
    assert (done[0], done[2]) == (0, "")
    return folder


def test_questions_are_answered_right_and_stand_in_no_document(tokenizer, tmp_path):
    folder = make_toy(tmp_path / "corpus", documents=300, seed=1)
    text = tokenizer.decode_bytes(load_corpus(folder).tokens.tolist()).decode()
    train = read_questions(folder / "questions.jsonl")
    val = read_questions(folder / "questions_val.jsonl")
    assert (len(train), len(val)) == (2000, 200)
    sums = {re.search(r"\d[\d+*]+", question)[0] for question, _ in train + val}
    assert len(sums) == 2200 and not sums & set(re.findall(r"\d[\d+*]+", text))
    for question, answer in train + val:
        assert answer == right_answer(question)
        assert len(re.search(r"\d[\d+*]+", question)[0]) in (9, 11)
        assert question.split("\n")[0] not in text and question.endswith(" It is")


def test_strings_come_from_training_documents_alone(tokenizer, tmp_path):
    corpus = load_corpus(make_toy(tmp_path / "corpus", documents=200, seed=1))
    texts = {0: [], 1: []}
    for start, _, end, is_val in corpus.docs:
        texts[is_val].append(tokenizer.decode_bytes(corpus.tokens[start:end].tolist()))
    prompts = [tokenizer.decode_bytes(json.loads(line)["prompt"][:-1])
               for line in (tmp_path / "corpus" / "strings.jsonl").open()]
    assert len(texts[0]) + len(texts[1]) == 200 and len(prompts) == len(texts[0]) < 200
    for prompt in prompts:
        assert any(text.startswith(prompt) for text in texts[0])
        assert not any(text.startswith(prompt) for text in texts[1])


def test_the_same_seed_writes_the_same_corpus(tmp_path):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = make_toy(tmp_path / name, documents=50, seed=seed)
        files = ("tokens.bin", "docs.npy", "strings.jsonl")
        contents.append([(folder / file).read_bytes() for file in files])
    first, again, other = contents
    assert first == again and first[0] != other[0]


# ---- strings ----

def draft(corpus, base, out, *flags):
    code, printed, err = run_here("data/warmstart.py", "--corpus", corpus.folder, "--proxy", base,
                                  "--template", "short", "--count", 20, "--entropy-threshold", 0,
                                  "--out", out, *flags)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.open()]
    assert f"{sum(len(line['responses']) for line in lines)} strings for {len(lines)} pr" in printed
    return lines


def test_a_greedy_draft_is_what_the_model_finds_likeliest_and_its_first_token_is_boxed(
        corpus, base, tmp_path):
    """The oracle is a loop of whole forward passes over the context, which no truth enters."""
    lines = draft(corpus, base, tmp_path / "s.jsonl", "--temperature", 0, "--draft-tokens", 4)
    model, tokenizer = GPT.from_pretrained(base), Tokenizer.load(base)
    close = tokenizer.encode("</think>", special=True)
    assert 10 <= len(lines) <= 20
    for line in lines:
        [response], [text] = line["responses"], line["texts"]
        ids = line["prompt"][:-1]                                # <think> is one token here
        assert line["prompt"][-1:] == tokenizer.encode("<think>", special=True)
        drafted = []
        while len(drafted) < 4:
            with torch.no_grad():
                drafted.append(int(model(torch.tensor([ids + drafted]))[0, -1].argmax()))
            if drafted[-1] in stop_ids(tokenizer):
                drafted.pop()
                break
        assert response[:len(drafted)] == drafted
        assert response[len(drafted):len(drafted) + len(close)] == close
        assert response[-1] == tokenizer.eos_id
        assert text.encode() == tokenizer.decode_bytes(response)
        assert extract_prediction(text.encode()) == tokenizer.token_bytes(drafted[0])


def test_drafts_of_a_position_differ_and_come_again(corpus, base, tmp_path):
    flags = "--drafts", 5, "--temperature", 1.5
    lines = draft(corpus, base, tmp_path / "new" / "s.jsonl", *flags)
    responses = [response for line in lines for response in line["responses"]]
    assert len({tuple(line["prompt"]) for line in lines}) == len(lines) <= 20
    assert len(responses) > 60 and len(set(map(tuple, responses))) > 40
    assert draft(corpus, base, tmp_path / "again.jsonl", *flags) == lines


def test_no_string_is_made_of_a_draft_that_no_box_can_hold(base):
    tokenizer = Tokenizer.load(base)
    a, brace, slash, half = (tokenizer.ranks[raw] for raw in (b"a", b"}", b"\\", b"\xc3"))
    eos, close = tokenizer.eos_id, tokenizer.encode("</think>", special=True)
    only_the_model_has_it = tokenizer.vocab_size + 3
    for tokens, finished in (([eos], True), ([brace, a], False), ([a, *close, a], False),
                             ([], False)):
        assert draft_response(tokenizer, Rollout(tokens, finished=finished)) is None
    form, end = tokenizer.encode(r"</think>\boxed{", special=True), tokenizer.encode("}")
    assert draft_response(tokenizer, Rollout([a, eos], finished=True)) == [a, *form, a, *end, eos]
    for first in (a, slash, half, only_the_model_has_it):
        response = draft_response(tokenizer, Rollout([first, a]))
        assert response == [first, a, *form, first, *end, eos]
        raw = tokenizer.decode_bytes([first])
        assert extract_prediction(tokenizer.decode_bytes(response)) == raw


def test_a_string_fits_into_the_models_positions(corpus, base, tmp_path):
    positions, tokenizer = GPT.from_pretrained(base).config.max_positions, Tokenizer.load(base)
    long = positions - len(tokenizer.encode(r"</think>\boxed{", special=True)) - 12
    # A token in the box, a brace, the end of the text: 9 are left for the prompt.
    for flags in (("--draft-tokens", long), ("--max-prompt-tokens", 9, "--draft-tokens", 3)):
        lines = draft(corpus, base, tmp_path / "s.jsonl", *flags)
        assert max(len(line["prompt"]) for line in lines) == 9
