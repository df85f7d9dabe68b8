"""A tokenizer that puts BOS in front: every text that a model reads begins with it, once."""
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.corpus import load_corpus
from data.filter import score_corpus
from data.positions import load_positions
from data.sums import write_document
from data.tokenizer import Tokenizer
from eval import ntp_hits
from model import GPT
from objectives import Group
from objectives.dense import Objective
from paper.choices import Choice, likelihood_hits
from tiny import run_here, tiny_model, write_lines
from train_ntp import document_examples

WINDOW = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of few positions, and a corpus of short and long documents of both kinds."""
    folder = tmp_path_factory.mktemp("bos")
    embedded = Tokenizer.load("embedded")
    bos = embedded.vocab_size
    plain = Tokenizer(embedded.ranks, embedded.special | {"<s>": bos}, embedded.pattern)
    model = tiny_model(plain.vocab_size, WINDOW)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    model.save_pretrained(folder / "base")
    plain.save(folder / "base")
    path = folder / "base" / "tokenizer.json"
    source = json.loads(path.read_text())
    text = {"Sequence": dict(id="A", type_id=0)}
    source["post_processor"] = dict(
        type="TemplateProcessing", special_tokens={"<s>": dict(id="<s>", ids=[bos], tokens=["<s>"])},
        single=[{"SpecialToken": dict(id="<s>", type_id=0)}, text], pair=[text, text])
    path.write_text(json.dumps(source))
    rng = random.Random(3)
    records = []
    for n in (1, 1, 1, 3, 4, 5):
        problem, solution, *_ = write_document(rng)
        records.append(dict(problem=problem, solution=solution * n * 25))
        records.append(dict(text=f"{n} {rng.random()} " + problem * n * 3))
    write_lines(folder / "text.jsonl", *records)
    done = run_here("data/prepare.py", folder / "text.jsonl", "--tokenizer", folder / "base",
                    "--out", folder / "corpus")
    assert (done[0], done[2]) == (0, "")
    score_corpus(load_corpus(folder / "corpus"), folder / "base")
    return folder


@pytest.fixture
def parts(folder):
    corpus, base = load_corpus(folder / "corpus"), folder / "base"
    return SimpleNamespace(corpus=corpus, base=base, tokenizer=Tokenizer.load(base),
                           model=GPT.from_pretrained(base), path=folder,
                           positions=load_positions(corpus, score_corpus(corpus, base), 0, "train"))


@pytest.fixture
def read(monkeypatch):
    """-> the sequences that a model reads from now on."""
    sequences, hidden = [], GPT.hidden

    def record(model, tokens, positions, attend):
        for token, position in zip(tokens.flatten().tolist(), positions.flatten().tolist()):
            if position == 0:
                sequences.append([])
            sequences[-1].append(token)
        return hidden(model, tokens, positions, attend)

    monkeypatch.setattr(GPT, "hidden", record)
    return sequences


def check(sequences, bos, at_least):
    assert len(sequences) >= at_least
    for sequence in sequences:
        assert sequence[0] == bos and sequence.count(bos) == 1 and len(sequence) <= WINDOW


def test_documents_are_the_ids_of_transformers_and_bos_is_never_predicted(parts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(parts.base)
    expected = {tuple(theirs(json.loads(line)["text"]).input_ids)
                for line in (parts.path / "text.jsonl").open() if '"text"' in line}
    tokens, [bos] = parts.corpus.tokens, parts.tokenizer.bos
    assert expected <= {tuple(tokens[start:end].tolist()) for start, _, end, _ in parts.corpus.docs}
    for start, solution, end, _ in parts.corpus.docs:
        assert tokens[start] == bos and bos not in tokens[start + 1:end]
        assert solution >= start + 2  # a prediction needs a text before it
    assert bos not in tokens[parts.positions[:, 0]]


def test_entropies_are_those_of_transformers_behind_bos(parts):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(parts.base, dtype=torch.float32).eval()
    scores = np.load(score_corpus(parts.corpus, parts.base))
    checked = 0
    for start, solution, end, _ in parts.corpus.docs:
        if end - start <= WINDOW:
            ids = parts.corpus.tokens[start:end].astype(np.int64)
            with torch.no_grad():
                probs = model(torch.tensor(ids[None])).logits[0].softmax(dim=-1)
            top = probs.topk(16).values
            entropy = -(top * top.log()).sum(dim=-1)[solution - start - 1:-1]
            assert scores[solution:end, 0] == pytest.approx(entropy.numpy(), abs=1e-4)
            checked += len(entropy)
    assert checked > 50


def test_every_window_of_a_long_document_has_it(parts, read, tmp_path):
    score_corpus(parts.corpus._replace(folder=tmp_path), parts.base)
    check(read, parts.tokenizer.bos[0], at_least=2 * len(parts.corpus.docs))


@pytest.mark.parametrize("longest", [8, WINDOW])
def test_guessing_has_it_also_where_the_context_lost_its_beginning(parts, read, longest):
    ntp_hits(parts.model, parts.corpus, parts.positions, longest, parts.tokenizer.bos)
    check(read, parts.tokenizer.bos[0], at_least=len(parts.positions))
    for sequence, (t, start, _) in zip(read, parts.positions, strict=True):
        assert sequence[1:] == parts.corpus.tokens[max(start + 1, t - longest + 1):t].tolist()


def test_likelihoods_of_options_have_it(parts, read):
    likelihood_hits(parts.model, parts.tokenizer, [Choice("Is it?", ["one", "two"], 0, "")])
    check(read, parts.tokenizer.bos[0], at_least=1)


def test_prompts_and_dense_rewards_have_it(parts, read):
    args = SimpleNamespace(corpus=parts.corpus.folder, init=parts.base, proxy=None, template="short",
                           entropy_threshold=0, max_prompt_tokens=30, max_new_tokens=10, seed=0,
                           tokens_per_micro_batch=100, objective="dense")
    objective = Objective(args, parts.tokenizer, parts.model.config)
    [bos], think = parts.tokenizer.bos, parts.tokenizer.special["<think>"]
    questions = [objective.question(position) for position in objective.positions]
    for question, (t, start, _) in zip(questions, objective.positions):
        context = parts.corpus.tokens[max(start + 1, t - 28):t].tolist()
        assert question.prompt == [bos, *context, think] and bos not in question.context[-28:]
    wrong = SimpleNamespace(tokens=parts.tokenizer.encode(r"</think>\boxed{?}", special=True))
    objective.score(parts.model, [Group(question, [wrong]) for question in questions])
    check(read, bos, at_least=len(questions))


def test_training_windows_have_it_and_no_loss_on_it(parts):
    rng, [bos] = np.random.default_rng(0), parts.tokenizer.bos
    for _ in range(20):
        documents = range(len(parts.corpus.docs))
        for example in document_examples(parts.corpus, documents, 1, 16, 1.0, rng, bos=[bos]):
            assert example.prompt == [bos] and bos not in example.rollouts[0]
    # Two of them: the second is in the text, and has no loss.
    for example in document_examples(parts.corpus, documents, 1, 16, 1.0, rng, bos=[bos, 7]):
        assert example.rollouts[0][0] == 7 and example.advantages[0][:2] == [0, 1]


@pytest.mark.parametrize("command", [
    "data/warmstart.py --corpus {corpus} --proxy {base} --template short --count 9 "
    "--entropy-threshold 0 --draft-tokens 1 --out {out}/strings.jsonl",
    "train_ntp.py --corpus {corpus} --init {base} --steps 1 --documents-per-step 9 --out-dir {out}",
    "eval.py lm --corpus {corpus} --checkpoints {base} --mode ntp --positions 9 "
    "--max-prompt-tokens 9",
    "sample.py --model {base} --prompt <s> --max-new-tokens 1"])
def test_all_that_a_command_reads_begins_with_it(parts, read, tmp_path, command):
    words = command.format(corpus=parts.corpus.folder, base=parts.base, out=tmp_path).split()
    code, _, error = run_here(*words)
    assert code == 0, error
    [bos] = parts.tokenizer.bos
    check(read, bos, at_least=1 if "sample" in command else 9)
    strings = tmp_path / "strings.jsonl"
    if not strings.exists():
        return
    for string in map(json.loads, strings.open()):
        assert string["prompt"][0] == bos and string["prompt"].count(bos) == 1


def test_a_corpus_without_it_is_refused(parts, tmp_path):
    source = json.loads((parts.base / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(source | dict(post_processor=None)))
    with pytest.raises(ValueError, match="was tokenised with .* prepare it again with --tokenizer"):
        parts.corpus.check(Tokenizer.load(tmp_path), tmp_path)
