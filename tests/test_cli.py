"""The command lines: --help tells units and defaults; what a user can mend is one line and exit code 2."""
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import kernels
from data.positions import scores_path
from data.tokenizer import Tokenizer
from model import GPT
from tiny import ENVIRONMENT, ROOT, base, corpus, run_here, tiny_model, write_lines

HELP = {  # what a reader looks for: the unit, and what happens without the flag
    "train_rpt.py": ["above this entropy, nats (default: 1.0)", "tokens of a rollout; default: 8192, or half of the model's positions",
                     "learning rate of AdamW, constant (default: 1e-06)"],
    "train_ntp.py": ["updates (default: 1000)", "documents in an update (default: "],
    "eval.py": ["held-out positions for each split (default: 200)", "thoughts for each position (default:"],
    "sample.py": ["--n ", "default"],
    "demo.py": ["folder for everything", "(default: "],
    "data/toy.py": ["problems with solutions (default: "],
    "data/prepare.py": ["checkpoint folder with a tokenizer.json, a tiktoken name (gpt2), or embedded"],
    "data/filter.py": ["this many documents of each split; 0: all (default: 0)"],
    "data/warmstart.py": ["only positions above this entropy, nats (default: 0.5)", "0: a single, greedy one",
                          "length of a draft (default: 10)"],
}


@pytest.mark.parametrize("script", HELP)
def test_help_tells_units_and_defaults(script):
    code, out, err = run_here(script, "--help")
    assert (code, err) == (0, "") and out.startswith("usage: ")
    assert all(words in " ".join(out.split()) for words in HELP[script])


# ---- a broken checkpoint, corpus or file -------------------------------------------------------------------

def copy_base(base, folder):
    shutil.copytree(base, folder)
    return folder


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def with_another_tokenizer(folder):
    known = Tokenizer.load(folder)
    special = dict(zip(known.special, reversed(known.special.values())))
    Tokenizer(known.ranks, special, known.pattern).save(folder)


def with_torn_weights(folder):
    os.truncate(folder / "model.safetensors", 3000)


def with_an_unknown_field(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(logit_softcapping=30.0)))


def with_weight(folder, value):
    model = GPT.from_pretrained(folder)
    with torch.no_grad():
        model.norm.weight[0] = value
    model.save_pretrained(folder)


DAMAGE = {
    without_tokenizer: "there is no tokenizer.json in this folder",
    with_another_tokenizer: "was tokenised with",
    with_torn_weights: "model.safetensors: ",
    with_an_unknown_field: "logit_softcapping = 30.0 is not implemented",
    shutil.rmtree: "o such f",  # ile or folder
}


def arguments(script, corpus, checkpoint, out):
    """A complete small command line of each script."""
    small = ["--template", "short", "--max-new-tokens", 8]
    return {
        "train_rpt.py": ["--init", checkpoint, "--corpus", corpus.folder, "--out-dir", out, "--steps", 1,
                         "--batch-size", 2, "--rollouts", 2, "--entropy-threshold", 0.5, *small],
        "train_ntp.py": ["--init", checkpoint, "--corpus", corpus.folder, "--out-dir", out, "--steps", 1],
        "eval.py": ["lm", "--corpus", corpus.folder, "--checkpoints", checkpoint, "--out", out,
                    "--positions", 2, *small],
        "data/filter.py": ["--corpus", corpus.folder, "--proxy", checkpoint],
        "data/warmstart.py": ["--corpus", corpus.folder, "--proxy", checkpoint, "--out", out, "--count", 3,
                            "--template", "short"],
    }[script]


@pytest.fixture
def fails(corpus, base, tmp_path):
    """fails(complaint, script, more arguments): one line on stderr, exit code 2, nothing written."""
    def run(complaint, script, *more, corpus=corpus, checkpoint=base):
        before = sorted(os.listdir(tmp_path))
        code, _, err = run_here(script, *arguments(script, corpus, checkpoint, tmp_path / "out"), *more)
        assert code == 2 and err.count("\n") == 1 and err.startswith(os.path.basename(script) + ": "), err
        assert complaint in err, err
        assert sorted(os.listdir(tmp_path)) == before
    return run


@pytest.mark.parametrize("script", ["train_rpt.py", "train_ntp.py", "eval.py", "data/filter.py"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(fails, corpus, base, tmp_path, script, damage):
    checkpoint, before = copy_base(base, tmp_path / "checkpoint"), sorted(os.listdir(corpus.folder))
    damage(checkpoint)
    fails(DAMAGE[damage], script, checkpoint=checkpoint)
    assert sorted(os.listdir(corpus.folder)) == before


ALL = ["train_rpt.py", "train_ntp.py", "eval.py", "data/filter.py", "data/warmstart.py"]
PROMPTING = ["train_rpt.py", "eval.py", "data/warmstart.py"]


@pytest.mark.parametrize("script", [*ALL, "sample.py", "paper/own_rollouts.py"])
def test_every_script_computes_in_the_dtype_that_is_asked_for(monkeypatch, corpus, base, tmp_path,
                                                               script):
    dtypes, real = set(), GPT.hidden

    def watched(*inputs):
        hidden = real(*inputs)
        dtypes.add(hidden.dtype)
        return hidden

    monkeypatch.setattr(GPT, "hidden", watched)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), (None, torch.float32)):
        folder = tmp_path / str(name)
        shutil.copytree(corpus.folder, folder / "corpus",
                        ignore=shutil.ignore_patterns("scores-*") if "filter" in script else None)
        here = corpus._replace(folder=folder / "corpus")
        if script == "sample.py":
            line = ["--model", base, "--prompt", "1+1", "--n", 2, "--max-new-tokens", 4]
        elif script == "paper/own_rollouts.py":
            line = ["--init", base, "--corpus", here.folder, "--out", folder / "out", "--count", 8,
                    "--rollouts", 2, "--template", "short", "--max-new-tokens", 8,
                    "--entropy-threshold", 0]
        else:
            line = arguments(script, here, base, folder / "out")
        code, _, err = run_here(script, *line, *(["--dtype", name] if name else []))
        assert code == 0, err
        assert dtypes == {dtype}
        dtypes.clear()


@pytest.mark.parametrize("script", ALL)
def test_a_missing_corpus_is_one_line(fails, corpus, tmp_path, script):
    fails("nowhere: no such folder", script, corpus=corpus._replace(folder=tmp_path / "nowhere"))


@pytest.mark.parametrize("script", PROMPTING)
def test_a_corpus_without_scores_names_the_command_that_makes_them(fails, corpus, tmp_path, script):
    shutil.copytree(corpus.folder, tmp_path / "corpus", ignore=shutil.ignore_patterns("scores-*"))
    fails("run python data/filter.py --corpus", script, corpus=corpus._replace(folder=tmp_path / "corpus"))


BAD_NUMBERS = [
    ("train_rpt.py", "0 -1", "steps batch-size rollouts max-new-tokens max-prompt-tokens max-rows "
                             "updates-per-batch tokens-per-micro-batch save-every temperature"),
    ("train_rpt.py", "-1", "lr seed entropy-threshold clip-low"),
    ("train_rpt.py", "nan inf", "temperature lr entropy-threshold"),
    ("train_ntp.py", "0", "steps tokens-per-micro-batch save-every max-tokens"),
    ("train_ntp.py", "-1", "documents-per-step strings-per-step lr seed warmup-steps"),
    ("train_ntp.py", "nan", "lr grad-clip"),
    ("eval.py", "0", "positions samples max-new-tokens max-rows"),
    ("eval.py", "-1 nan", "temperature"),
    ("data/filter.py", "-1", "documents"),
    ("data/warmstart.py", "0", "count max-prompt-tokens drafts draft-tokens"),
]


@pytest.mark.parametrize("script, value, flag", [
    (script, value, flag) for script, values, flags in BAD_NUMBERS
    for flag in flags.split() for value in values.split()])
def test_a_number_out_of_range_is_named_with_its_flag(fails, script, value, flag):
    fails(f"--{flag} must be at least", script, f"--{flag}={value}")


def test_kernels_that_do_not_exist_or_cannot_run_here_are_refused(fails, use_kernels, monkeypatch):
    fails("'quick' is none of torch, fast, bitwise", "train_rpt.py", "--kernels", "quick")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    fails("fast: Triton kernels need a GPU, the device is cpu", "train_rpt.py", "--kernels", "fast")
    kernels.requested = "bitwise"  # as the environment would have it
    fails("NANORPT_KERNELS) bitwise: Triton kernels need a GPU", "train_rpt.py")


def test_training_refuses_to_truncate_the_distribution(base, corpus):
    required = ["--init", base, "--corpus", corpus.folder, "--out-dir", "nowhere"]
    for flag in ("--top-k=3", "--top-p=0.9", "--min-p=0.1"):
        code, _, err = run_here("train_rpt.py", *required, flag)
        assert code == 2 and f"unrecognized arguments: {flag}" in err


@pytest.mark.parametrize("script", PROMPTING)
def test_an_unknown_template_is_named(fails, script):
    fails("unknown template 'v9'; there are v0,", script, "--template", "v9")


@pytest.mark.parametrize("script", PROMPTING)
def test_a_template_longer_than_the_models_positions_is_refused_before_the_run_starts(fails, script):
    fails("no room for context", script, "--template", "v4")


def test_more_new_tokens_than_positions_are_refused_before_the_run_starts(fails):
    fails("no room for context", "train_rpt.py", "--max-new-tokens", 8192)


@pytest.mark.parametrize("script", ["train_rpt.py", "data/warmstart.py"])
def test_a_filter_that_leaves_nothing_says_how_high_the_entropies_are(fails, script):
    fails("no train position has an entropy above 99.0 nats", script, "--entropy-threshold", 99)


@pytest.mark.parametrize("line", [
    '{"prompt": [1]}', '{"prompt": [], "response": [1]}', '{"prompt": [1], "response": "a"}', "[1, 2]",
    "null", '{"prompt": [1], "response": [1.5]}', '{"prompt": [1], "response": [99999]}', '{"prompt": [1], "',
    '{"prompt": [-1], "response": [1]}', "\udcff"])
def test_a_bad_line_of_strings_is_named_by_file_and_number(fails, tmp_path, line):
    path = tmp_path / "strings.jsonl"
    path.write_text('{"prompt": [1], "response": [2]}\n' + line + "\n", errors="surrogateescape")
    fails("strings.jsonl line 2: expected an object with 'prompt' and", "train_ntp.py", "--strings", path)


def test_a_string_longer_than_the_models_positions_is_named(fails, tmp_path):
    path = tmp_path / "strings.jsonl"
    path.write_text(json.dumps(dict(prompt=[1] * 120, response=[2] * 9)) + "\n")
    fails("line 1: 129 tokens, but the model has 128 positions", "train_ntp.py", "--strings", path)


def test_nothing_to_train_on_is_said(fails):
    fails("nothing to train on: --documents-per-step is 0", "train_ntp.py", "--documents-per-step", 0)


def test_a_run_that_is_there_is_not_overwritten(fails, corpus, base, tmp_path):
    assert run_here("train_ntp.py", *arguments("train_ntp.py", corpus, base, tmp_path / "out"))[0] == 0
    files = lambda: {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    before = files()
    fails("out already holds a run; --resume continues it", "train_ntp.py")
    fails("out already holds a run; --resume continues it", "train_rpt.py")
    assert files() == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("line", [
    *[f"eval.py lm --corpus CORPUS --proxy BASE --positions 2 --mode {mode} --checkpoints BAD --out OUT"
      for mode in ("ntp", "reasoning", "greedy", "forced", "empty", "decodings")],
    *[f"paper/choices.py --data CHOICES --mode {mode} --checkpoints BAD --out OUT --dump OUT"
      for mode in ("likelihood", "reasoning")],
    "paper/answers.py --data ANSWERS --checkpoints BAD --out OUT --dump OUT --top-k 2",
    "data/filter.py --corpus CORPUS --proxy BAD", "sample.py --model BAD --prompt 1+1= --n 3",
    "data/warmstart.py --corpus CORPUS --proxy BAD --out OUT --count 3",
    "train_rpt.py --init BAD --corpus CORPUS --proxy BASE --out-dir RUN --entropy-threshold 0.5 --batch-size 2",
    "train_ntp.py --init BAD --corpus CORPUS --out-dir RUN"])
def test_logits_that_are_not_finite_are_one_line_and_leave_nothing_that_looks_like_a_result(
        corpus, base, tmp_path, line, value):
    bad, own = copy_base(base, tmp_path / "bad"), shutil.copytree(corpus.folder, tmp_path / "corpus")
    with_weight(bad, value)
    corpus = corpus._replace(folder=own)
    if "warmstart" in line:  # scores of before
        shutil.copy(scores_path(corpus, base), scores_path(corpus, bad))
    write_lines(tmp_path / "choices", dict(question="Is one odd?", options=["yes", "no"], answer="A"))
    write_lines(tmp_path / "answers", dict(question="1+1=", answer="2"))
    paths = dict(CORPUS=own, BASE=base, BAD=bad, OUT=tmp_path / "out", RUN=tmp_path / "run",
                 CHOICES=tmp_path / "choices", ANSWERS=tmp_path / "answers")
    small = () if "filter" in line or "ntp.py" in line else ("--template", "short")
    if small and "warmstart" not in line:
        small += ("--max-new-tokens", 8)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run_here(*[paths.get(word, word) for word in line.split()], *small)
    assert code == 2 and err.count("\n") == 1 and f"{bad}: logits are not finite" in err, err
    written = {path.name for path in {*tmp_path.rglob("*")} - {*before}}
    # A run has opened its folder by then, but holds no step.
    assert written - {"run", "args.json", "lock"} == set()


# ---- hours of evaluation -----------------------------------------------------------------------------------

@pytest.fixture(params=["eval.py lm --corpus CORPUS --proxy BASE --positions 3", "paper/choices.py --data CHOICES",
                        "paper/answers.py --data ANSWERS"])
def evaluates(request, corpus, base, tmp_path):
    """evaluates(checkpoint, ...) -> exit code, stdout, stderr of one of the three commands."""
    write_lines(tmp_path / "choices", *[dict(question=f"Is {i} odd?", options=["yes", "no"], answer="A") for i in (1, 3)])
    write_lines(tmp_path / "answers", *[dict(question=f"{i}+1=", answer="2") for i in (1, 3)])
    paths = dict(CORPUS=corpus.folder, BASE=base, CHOICES=tmp_path / "choices", ANSWERS=tmp_path / "answers")
    words = [paths.get(word, word) for word in request.param.split()]

    def run(*checkpoints, out="out/results.json"):
        return run_here(*words, "--checkpoints", *checkpoints, "--template", "short", "--max-new-tokens", 8,
                        "--out", tmp_path / out, "--dump", tmp_path / "out/dump.jsonl")
    return run


@pytest.mark.parametrize("damage", [shutil.rmtree, without_tokenizer, with_an_unknown_field,
                                    lambda folder: os.remove(folder / "model.safetensors"),
                                    lambda folder: os.truncate(folder / "model.safetensors", 9000)])
def test_the_last_checkpoint_is_looked_at_before_the_first_is_asked(evaluates, base, tmp_path, damage):
    damage(copy_base(base, tmp_path / "other"))
    code, out, err = evaluates(base, tmp_path / "other")
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{tmp_path}/other" in err
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_in_the_last_checkpoint_is_seen_before_the_first_is_asked(fails, base, tmp_path):
    with_another_tokenizer(copy_base(base, tmp_path / "other"))
    fails("was tokenised with", "eval.py", "--checkpoints", base, tmp_path / "other")


@pytest.mark.parametrize("where, complaint", [
    ("out", "cannot be written"), ("file/results.json", "file"), ("results.json", "dump.jsonl line 2: not a line")])
def test_a_place_for_results_that_will_not_do_is_refused_before_any_work(evaluates, base, tmp_path, where, complaint):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    if complaint.startswith("dump"):
        (tmp_path / "out" / "dump.jsonl").write_text("{}\n[1]\n")
    code, out, err = evaluates(base, out=where)
    assert (code, out, err.count("\n")) == (2, "", 1) and complaint in err


@pytest.mark.parametrize("content", ["", "{", "3", "[1]", '[{"checkpoint": "a"}]', '{"a": 1}'])
def test_results_beside_that_cannot_be_read_are_named(fails, tmp_path, content):
    (tmp_path / "beside.json").write_text(content)
    fails("beside.json: not a results.json of eval.py", "eval.py", "--beside", tmp_path / "beside.json")


def test_what_ends_the_second_checkpoint_leaves_the_results_of_the_first(evaluates, base, tmp_path):
    _, whole, _ = evaluates(base)    # makes the folder
    results, dump = (tmp_path / "out" / name for name in ("results.json", "dump.jsonl"))
    expected, thoughts = results.read_text(), dump.read_text()
    results.unlink(), dump.unlink()
    with_weight(copy_base(base, tmp_path / "nan"), math.nan)
    code, out, err = evaluates(base, tmp_path / "nan")
    assert (code, err.count("\n")) == (2, 1) and f"written to {results}" in out
    table = [line for line in whole.splitlines() if "[" in line]
    assert table and [line for line in out.splitlines() if "[" in line] == table
    assert (results.read_text(), dump.read_text()) == (expected, thoughts)


def test_a_repeated_command_replaces_its_own_lines_of_a_dump_and_no_others(evaluates, base, tmp_path):
    other, dump = copy_base(base, tmp_path / "other"), tmp_path / "out" / "dump.jsonl"
    evaluates(base)
    first = dump.read_text()
    evaluates(other)
    both = dump.read_text()
    assert len(first.splitlines()) > 1 and both == first + first.replace(json.dumps(base), json.dumps(str(other)))
    evaluates(base)
    assert sorted(dump.read_text().splitlines()) == sorted(both.splitlines())


def test_a_dump_may_go_into_a_pipe(evaluates, base, tmp_path):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "dump.jsonl")
    reader = os.open(tmp_path / "out" / "dump.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    assert evaluates(base)[0] == 0
    assert json.loads(os.read(reader, 10**6).splitlines()[0])["checkpoint"] == base
    os.close(reader)


# ---- as a user types it ------------------------------------------------------------------------------------

def typed(cwd, *arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_run_from_another_folder_trains_and_evaluates(corpus, base, tmp_path):
    code, out, err = typed(tmp_path, ROOT / "train_rpt.py", *arguments("train_rpt.py", corpus, base, "run"))
    assert (code, err) == (0, "") and "step 00001/00001 | reward " in out and "done: run/step_000001" in out
    line = arguments("eval.py", corpus, "run/step_000001", "results.json")
    code, out, err = typed(tmp_path, ROOT / "eval.py", *line)
    assert (code, err) == (0, "") and "written to results.json" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {r["checkpoint"] for r in results} == {"run/step_000001"}


@pytest.mark.parametrize("script", ["train_rpt.py", "data/filter.py"])
def test_a_missing_checkpoint_is_one_line_for_a_user_too(corpus, tmp_path, script):
    code, out, err = typed(tmp_path, ROOT / script, *arguments(script, corpus, "no/such/folder", "out"))
    assert code == 2 and out == "" and err.count("\n") == 1 and "no/such/folder" in err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("line", [
    "train_rpt.py --init RUN --corpus CORPUS --out-dir OUT", "train_ntp.py --init RUN --corpus CORPUS --out-dir OUT",
    "train_rpt.py --init BASE --proxy RUN --corpus CORPUS --out-dir OUT", "eval.py lm --checkpoints RUN --corpus CORPUS",
    "sample.py --prompt x --model RUN", "data/filter.py --proxy RUN --corpus CORPUS",
    "data/warmstart.py --proxy RUN --corpus CORPUS --out OUT", "bench/memory.py --init RUN"])
def test_a_run_in_place_of_a_checkpoint_is_told_its_newest(corpus, base, tmp_path, line):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("step_000150")
    paths = dict(RUN=tmp_path / "run", BASE=base, CORPUS=corpus.folder, OUT=tmp_path / "out")
    code, _, err = run_here(*[paths.get(word, word) for word in line.split()])
    assert code == 2 and err.count("\n") == 1
    assert err.endswith(f"; its newest checkpoint is {tmp_path}/run/step_000150\n")


@pytest.mark.parametrize("line", [
    "eval.py lm --corpus NOWHERE", "paper/answers.py --data NOWHERE", "paper/choices.py --data NOWHERE"])
def test_impossible_sampling_is_refused_before_anything_is_loaded(line):
    code, _, err = run_here(*line.split(), "--checkpoints", "NOWHERE", "--top-p", "2")
    assert code == 2 and err.count("\n") == 1 and "top-p in (0, 1]" in err


# ---- text in every locale ----------------------------------------------------------------------------------

TEXTS = ["Ответ: семь. 答えは七です。", "الجواب سبعة 🙂 é", "κάθε γλώσσα έχει λέξεις", "ทุกภาษามีคำ", "모든 언어에는 단어가 있다"]
DRIVER = """
import json, runpy, sys
for script, *words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    print("\\n>", script, flush=True)
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(params=["C", "en_US.ISO-8859-1"])
def locale(request, tmp_path):
    """Variables of a locale that has no UTF-8."""
    if request.param != "C":
        if not shutil.which("localedef"):
            pytest.skip("no localedef: this locale cannot be made")
        if subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", tmp_path / request.param],
                          capture_output=True).returncode:
            pytest.skip("localedef has no sources")
    return ENVIRONMENT | dict(LC_ALL=request.param, LOCPATH=str(tmp_path), PYTHONUTF8="0",
                              PYTHONCOERCECLOCALE="0")


def test_any_text_is_prepared_trained_on_sampled_and_dumped_in_any_locale(tmp_path, locale):
    pytest.importorskip("matplotlib")
    tokenizer = Tokenizer.load("embedded")
    base = tmp_path / "моя модель"   # a path that the locale cannot print
    model = tiny_model(tokenizer.vocab_size, 600)   # random: it prints all kinds of bytes
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)   # else all entropies are alike
    model.save_pretrained(base)
    tokenizer.save(base)
    lines = [json.dumps(dict(text=TEXTS[i % 5] + f" {i}"), ensure_ascii=False) for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    question = json.dumps(dict(question=TEXTS[0], answer="7"), ensure_ascii=False)
    (tmp_path / "questions.jsonl").write_text(question, encoding="utf-8")
    small = "--template short --max-new-tokens 16 --temperature 1"
    commands = [line.split() for line in f"""
        data/prepare.py texts.jsonl --tokenizer embedded --out corpus
        data/filter.py --corpus corpus --proxy BASE
        train_rpt.py --init BASE --corpus corpus --out-dir run --steps 1 --batch-size 4 --rollouts 2 {small}
        eval.py lm --corpus corpus --checkpoints BASE --positions 9 --out results.json --dump dump.jsonl {small}
        paper/answers.py --data questions.jsonl --checkpoints BASE --dump answers.jsonl {small}
        plot.py run --out run.png
        sample.py --model BASE --prompt PROMPT --n 3
        sample.py --model BASE --prompt PROMPT --n 1
        sample.py --model BASE --prompt PROMPT --n 16 --json""".split("\n")[1:]]
    swap = dict(BASE=str(base), PROMPT=TEXTS[1])
    commands = [[str(ROOT / line[0]), *[swap.get(word, word) for word in line[1:]]] for line in commands]
    # Without escapes, so that the child reads all words as the locale would have it.
    words = json.dumps(commands, ensure_ascii=False)
    done = subprocess.run([sys.executable, "-c", DRIVER, words], cwd=tmp_path, env=locale, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    for log in ("dump.jsonl", "run/samples.jsonl", "answers.jsonl"):
        for line in (tmp_path / log).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            about = record.get("question") or record["context"].removeprefix("...")
            whole = re.sub(r"\\x..", "", about).rstrip(" 0123456789")  # no ends of characters, no number
            assert any(whole in text for text in TEXTS)
        assert not (tmp_path / log).read_text(encoding="utf-8").isascii()
    # The last command as it is where all is UTF-8.
    _, expected, _ = run_here("sample.py", *commands[-1][1:])
    printed = done.stdout.decode("iso-8859-1").rpartition("sample.py\n")[2].splitlines()
    assert list(map(json.loads, printed)) == list(map(json.loads, expected.splitlines()))
    assert re.search("[\xa0-\xff]", expected) and "\ufffd" in expected


# ---- threads -----------------------------------------------------------------------------------------------

WATCH = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("asked, found", [(None, "10000"), ("7", "7")])
@pytest.mark.parametrize("command", ["train_rpt", "train_ntp", "eval", "sample", "data/filter", "data/warmstart",
                                     "paper/choices", "bench/sample", "bench/train", "bench/cpu",
                                     "bench/growth"])
def test_how_threads_wait_is_said_before_torch_is_loaded(command, asked, found):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": asked} if asked else {}
    ran = subprocess.run([sys.executable, "-c", WATCH, f"{command}.py", "--help"], cwd=ROOT,
                         env=environment, capture_output=True, encoding="utf-8")
    assert ran.stdout.strip() == found, ran.stderr
