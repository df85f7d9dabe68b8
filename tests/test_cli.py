"""The command lines: --help tells units and defaults; what a user can mend is one line, exit code 2, no debris."""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from data.tokenizer import Tokenizer
from model import GPT
from tiny import ENVIRONMENT, ROOT, base, corpus, run_here, tiny_model

HELP = {  # what a reader looks for: the unit, and what happens without the flag
    "train_rpt.py": ["above this entropy, nats (default: 1.0)", "tokens of a response (default: 8192)",
                     "learning rate of AdamW(0.9, 0.999), constant (default: 1e-06)"],
    "train_ntp.py": ["updates (default: 1000)", "documents in an update (default: "],
    "eval.py": ["held-out positions for each split (default: 200)", "thoughts for each position (default: 1)"],
    "sample.py": ["--n ", "default"],
    "demo.py": ["folder for everything (default: runs/demo)"],
    "data/corpus.py": ["problems with solutions (default: "],
    "data/prepare.py": ["checkpoint folder with a tokenizer.json, a tiktoken name (gpt2), or embedded"],
    "data/filter.py": ["this many documents of each split; 0: all (default: 0)"],
    "data/strings.py": ["only positions above this entropy, nats (default: 0.5)", "strings (default: 2000)"],
}


@pytest.mark.parametrize("script", HELP)
def test_help_tells_units_and_defaults(script):
    code, out, err = run_here(script, "--help")
    assert (code, err) == (0, "") and out.startswith("usage: ")
    assert all(words in " ".join(out.split()) for words in HELP[script])


# ---- a broken checkpoint, corpus or file --------------------------------------------------------------------

def copy_base(base, folder):
    shutil.copytree(base, folder)
    return folder


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def with_another_tokenizer(folder):
    known = Tokenizer.load(folder)
    special = {text: id + 1 for text, id in known.special.items()}
    Tokenizer(known.ranks, special, known.pattern).save(folder)


def with_torn_weights(folder):
    os.truncate(folder / "model.safetensors", 3000)


def with_an_unknown_field(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(logit_softcapping=30.0)))


def with_nan(folder):
    model = GPT.from_pretrained(folder)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
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
        "eval.py": ["lm", "--corpus", corpus.folder, "--checkpoints", checkpoint, "--out", out, "--positions", 2,
                    *small],
        "data/filter.py": ["--corpus", corpus.folder, "--proxy", checkpoint],
        "data/strings.py": ["--corpus", corpus.folder, "--proxy", checkpoint, "--out", out, "--count", 3,
                            "--template", "short"],
    }[script]


def fails(complaint, script, *arguments, debris=None):
    """One line on stderr, exit code 2, nothing written."""
    code, _, err = run_here(script, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith(script.split("/")[-1] + ": "), err
    assert complaint in err, err
    assert debris is None or not list(debris.parent.glob(debris.name + "*"))


@pytest.mark.parametrize("script", ["train_rpt.py", "train_ntp.py", "eval.py", "data/filter.py"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(corpus, base, tmp_path, script, damage):
    checkpoint, before = copy_base(base, tmp_path / "checkpoint"), sorted(os.listdir(corpus.folder))
    damage(checkpoint)
    fails(DAMAGE[damage], script, *arguments(script, corpus, checkpoint, tmp_path / "out"), debris=tmp_path / "out")
    assert sorted(os.listdir(corpus.folder)) == before


@pytest.mark.parametrize("script", ["train_rpt.py", "train_ntp.py", "eval.py", "data/filter.py", "data/strings.py"])
def test_a_missing_corpus_is_one_line(corpus, base, tmp_path, script):
    missing = corpus._replace(folder=tmp_path / "nowhere")
    fails("nowhere: no such folder", script, *arguments(script, missing, base, tmp_path / "out"), debris=tmp_path / "out")


@pytest.mark.parametrize("script", ["train_rpt.py", "eval.py", "data/strings.py"])
def test_a_corpus_without_scores_names_the_command_that_makes_them(corpus, base, tmp_path, script):
    shutil.copytree(corpus.folder, tmp_path / "corpus", ignore=shutil.ignore_patterns("scores-*"))
    fails("run python data/filter.py --corpus", script,
          *arguments(script, corpus._replace(folder=tmp_path / "corpus"), base, tmp_path / "out"), debris=tmp_path / "out")


BAD_NUMBERS = [(script, flag, value)
               for script, flags, values in [
                   ("train_rpt.py", "steps batch-size rollouts max-new-tokens max-prompt-tokens max-rounds max-rows "
                                    "updates-per-batch tokens-per-micro-batch save-every temperature", ("0", "-1")),
                   ("train_rpt.py", "lr seed entropy-threshold weight-decay clip-ratio", ("-1",)),
                   ("train_rpt.py", "temperature lr entropy-threshold", ("nan", "inf")),
                   ("train_ntp.py", "steps tokens-per-micro-batch save-every max-tokens", ("0",)),
                   ("train_ntp.py", "documents-per-step strings-per-step lr seed warmup-steps", ("-1",)),
                   ("train_ntp.py", "lr grad-clip", ("nan",)),
                   ("eval.py", "positions samples max-new-tokens max-rows", ("0",)),
                   ("eval.py", "temperature seed", ("-1",)),
                   ("data/filter.py", "documents", ("-1",)),
                   ("data/strings.py", "count max-prompt-tokens", ("0",)),
               ] for flag in flags.split() for value in values]


@pytest.mark.parametrize("script, flag, value", BAD_NUMBERS)
def test_a_number_out_of_range_is_named_with_its_flag(corpus, base, tmp_path, script, flag, value):
    fails(f"--{flag} must be at least", script,
          *arguments(script, corpus, base, tmp_path / "out"), f"--{flag}={value}", debris=tmp_path / "out")


@pytest.mark.parametrize("script", ["train_rpt.py", "eval.py", "data/strings.py"])
def test_an_unknown_template_is_named(corpus, base, tmp_path, script):
    fails("unknown template 'v9'; there are v0,", script,
          *arguments(script, corpus, base, tmp_path / "out"), "--template", "v9", debris=tmp_path / "out")


@pytest.mark.parametrize("script", ["train_rpt.py", "eval.py", "data/strings.py"])
def test_a_template_longer_than_the_models_positions_is_refused_before_the_run_starts(corpus, base, tmp_path, script):
    fails("no room for context", script,
          *arguments(script, corpus, base, tmp_path / "out"), "--template", "v4", debris=tmp_path / "out")


def test_more_new_tokens_than_positions_are_refused_before_the_run_starts(corpus, base, tmp_path):
    line = arguments("train_rpt.py", corpus, base, tmp_path / "out")
    fails("no room for context", "train_rpt.py", *line, "--max-new-tokens", 8192, debris=tmp_path / "out")


@pytest.mark.parametrize("script", ["train_rpt.py", "data/strings.py"])
def test_a_filter_that_leaves_nothing_says_how_high_the_entropies_are(corpus, base, tmp_path, script):
    fails("no train position has an entropy above 99.0 nats", script,
          *arguments(script, corpus, base, tmp_path / "out"), "--entropy-threshold", 99, debris=tmp_path / "out")


@pytest.mark.parametrize("line", ['{"prompt": [1]}', '{"prompt": [], "response": [1]}', '{"prompt": [1], "response": "a"}',
                                  '{"prompt": [1], "response": [1.5]}', '{"prompt": [1], "response": [99999]}',
                                  '{"prompt": [-1], "response": [1]}', "[1, 2]", "null", '{"prompt": [1], "resp', "\udcff"])
def test_a_bad_line_of_strings_is_named_by_file_and_number(corpus, base, tmp_path, line):
    path = tmp_path / "strings.jsonl"
    path.write_text('{"prompt": [1], "response": [2]}\n' + line + "\n", errors="surrogateescape")
    fails("strings.jsonl line 2: expected an object with 'prompt' and 'response'", "train_ntp.py",
          *arguments("train_ntp.py", corpus, base, tmp_path / "out"), "--strings", path, debris=tmp_path / "out")


def test_a_string_longer_than_the_models_positions_is_named(corpus, base, tmp_path):
    (tmp_path / "strings.jsonl").write_text(json.dumps(dict(prompt=[1] * 120, response=[2] * 9)) + "\n")
    fails("strings.jsonl line 1: 129 tokens, but the model has 128 positions", "train_ntp.py",
          *arguments("train_ntp.py", corpus, base, tmp_path / "out"), "--strings", tmp_path / "strings.jsonl",
          debris=tmp_path / "out")


def test_nothing_to_train_on_is_said(corpus, base, tmp_path):
    fails("nothing to train on: --documents-per-step is 0", "train_ntp.py",
          *arguments("train_ntp.py", corpus, base, tmp_path / "out"), "--documents-per-step", 0, debris=tmp_path / "out")


def test_a_run_that_is_there_is_not_overwritten(corpus, base, tmp_path):
    line = arguments("train_ntp.py", corpus, base, tmp_path / "out")
    assert run_here("train_ntp.py", *line)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    fails("out already holds a run; --resume continues it", "train_ntp.py", *line)
    fails("out already holds a run; --resume continues it", "train_rpt.py",
          *arguments("train_rpt.py", corpus, base, tmp_path / "out"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_evaluating_weights_that_are_nan_is_one_line(corpus, base, tmp_path):
    checkpoint = copy_base(base, tmp_path / "nan")
    with_nan(checkpoint)
    fails("logits are NaN", "eval.py", *arguments("eval.py", corpus, checkpoint, tmp_path / "out"), debris=tmp_path / "out")


# ---- as a user types it -------------------------------------------------------------------------------------

def typed(cwd, *arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_run_from_another_folder_trains_and_evaluates(corpus, base, tmp_path):
    code, out, err = typed(tmp_path, ROOT / "train_rpt.py", *arguments("train_rpt.py", corpus, base, "run"))
    assert (code, err) == (0, "") and "step 00001/00001 | reward " in out and "done: run/step_000001" in out
    code, out, err = typed(tmp_path, ROOT / "eval.py", *arguments("eval.py", corpus, "run/step_000001", "results.json"))
    assert (code, err) == (0, "") and "written to results.json" in out
    assert {r["checkpoint"] for r in json.loads((tmp_path / "results.json").read_text())} == {"run/step_000001"}


@pytest.mark.parametrize("script", ["train_rpt.py", "data/filter.py"])
def test_a_missing_checkpoint_is_one_line_for_a_user_too(corpus, tmp_path, script):
    code, out, err = typed(tmp_path, ROOT / script, *arguments(script, corpus, "no/such/folder", "out"))
    assert code == 2 and out == "" and err.count("\n") == 1 and "no/such/folder" in err
    assert not os.listdir(tmp_path)
