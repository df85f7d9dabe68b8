"""A tiny corpus, a tiny checkpoint that boxes its predictions, and a way to run scripts in this process.

The fixtures are imported by name, `from tiny import base, corpus`, and made once in a temporary folder.
"""
import gc
import io
import json
import os
import random
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from data.sums import write_document
from data.filter import score_corpus
from data.corpus import load_corpus, write_corpus
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from data.positions import shuffled
from plumbing.batch import pack
from train_ntp import make_example, ntp_update

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def ntp_step(model, optimizer, sequences, tokens_per_micro_batch, grad_clip):
    """One update of next-token prediction on [(prompt, text, weights)] -> loss, gradient norm."""
    batches = pack([make_example(*sequence) for sequence in sequences], tokens_per_micro_batch, model.device)
    return ntp_update(model, optimizer, batches, sum(sum(weights) for _, _, weights in sequences), grad_clip)


def tiny_model(vocab_size, max_positions=128):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=vocab_size, width=32, n_layers=1, n_heads=2, n_kv_heads=1,
                             head_dim=16, ffn_width=64, max_positions=max_positions))


def write_lines(path, *records):
    """Records, or lines as they are -> a file of JSON lines."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def box_string(tokenizer, corpus, doc, rng):
    """A document -> its text up to a token of the solution, <think>; and `</think>\\boxed{that token}`."""
    start, solution, end, _ = doc.tolist()
    t = rng.randrange(solution, end)
    prompt = corpus.tokens[start:t].tolist() + [tokenizer.special["<think>"]]
    box = rf"</think>\boxed{{{tokenizer.token_bytes(int(corpus.tokens[t])).decode()}}}"
    response = tokenizer.encode(box, special=True) + [tokenizer.eos_id]
    return prompt, response, [1.0] * len(response)


def make(folder):
    """corpus/ with strings.jsonl and scores, base/: one layer, width 32, in 100 steps as far as a box that is
    sometimes right, so that most groups of rollouts disagree."""
    if not (folder / "base").exists():
        tokenizer, rng = Tokenizer.load("embedded"), random.Random(0)
        corpus = write_corpus([write_document(rng)[:2] for _ in range(300)], tokenizer, folder / "corpus")
        strings = [box_string(tokenizer, corpus, doc, rng) for doc in corpus.docs if not doc[3]]
        texts = [corpus.tokens[start:end].tolist() for start, _, end, is_val in corpus.docs if not is_val]
        lessons = [lesson for ids, string in zip(texts, strings)
                   for lesson in (string, (ids[:1], ids[1:], [1.0] * len(ids[1:])))]
        model = tiny_model(tokenizer.vocab_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(100):
            batch = [lessons[i] for i in shuffled(len(lessons), 16 * step, 16, 0)]
            ntp_step(model, optimizer, batch, tokens_per_micro_batch=4096, grad_clip=1.0)
        model.save_pretrained(folder / "base.partial")
        tokenizer.save(folder / "base.partial")
        score_corpus(corpus, folder / "base.partial")
        with open(folder / "corpus" / "strings.jsonl", "w") as file:
            file.writelines(json.dumps(dict(prompt=p, response=r)) + "\n" for p, r, _ in strings)
        (folder / "base.partial").rename(folder / "base")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return load_corpus(make(tmp_path_factory.getbasetemp()) / "corpus")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return str(make(tmp_path_factory.getbasetemp()) / "base")


@pytest.fixture(scope="session")
def thinker(tmp_path_factory):
    """The base, taught in 40 steps to think for some tokens before it boxes."""
    folder = make(tmp_path_factory.getbasetemp())
    if not (folder / "thinker").exists():
        tokenizer, rng = Tokenizer.load(folder / "base"), random.Random(1)
        model, corpus = GPT.from_pretrained(folder / "base"), load_corpus(folder / "corpus")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            batch = []
            for doc in rng.sample([doc for doc in corpus.docs if not doc[3]], 16):
                prompt, response, _ = box_string(tokenizer, corpus, doc, rng)
                thought = tokenizer.encode("".join(rng.choice("123+") for _ in range(rng.randrange(6))))
                batch.append((prompt, thought + response, [1.0] * len(thought + response)))
            ntp_step(model, optimizer, batch, tokens_per_micro_batch=4096, grad_clip=1.0)
        model.save_pretrained(folder / "thinker.partial")
        tokenizer.save(folder / "thinker.partial")
        (folder / "thinker.partial").rename(folder / "thinker")
    return str(folder / "thinker")


def run_here(script, *arguments):
    """Run a script as __main__ in this process -> exit code, stdout, stderr; 1 is a traceback."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    with (patch("sys.argv", [script, *map(str, arguments)]), patch("sys.path", sys.path[:]),
          patch("os._exit", sys.exit), patch("sys.excepthook"), redirect_stdout(out), redirect_stderr(err)):
        try:
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
                code = 0
            except Exception:  # as the interpreter would: whatever nobody caught goes to the hook
                sys.excepthook(*sys.exc_info())
                code = 1
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            gc.collect()  # a process that ends would close its files
    return code, out.getvalue(), err.getvalue()
