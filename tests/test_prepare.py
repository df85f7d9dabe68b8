"""Text to tokens: what is in a corpus, what is refused and how; nothing is ever half-written."""
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.corpus import Document, load_corpus, split_by_hash, write_corpus
from data.prepare import list_files, read_documents
from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data" / "prepare.py"


class ByteTokenizer:
    """One id per byte, so that token offsets can be counted by hand; it knows no byte 0x07."""
    fingerprint, bos = "bytes", []

    def encode(self, text):
        if "\a" in text:
            raise ValueError("the tokenizer has no token for byte 0x07")
        return list(text.encode())

    def save(self, folder):
        Path(folder).mkdir()


def jsonl(path, *records):
    """Each record is an object, or the raw bytes of a line."""
    lines = []
    for record in records:
        lines.append(record if isinstance(record, bytes) else json.dumps(record).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def prepare(folder, *paths, skipped=None):
    documents = read_documents(list_files(paths), skipped)
    return write_corpus(documents, ByteTokenizer(), folder / "corpus", skipped)


def texts(corpus):
    return [bytes(corpus.tokens[start:end].astype(np.uint8)) for start, _, end, _ in corpus.docs]


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


# What is in a corpus

def test_the_solution_begins_exactly_at_its_own_first_token(tmp_path):
    worked = {"problem": "1+1?", "solution": "It is 2."}
    corpus = prepare(tmp_path, jsonl(tmp_path / "a.jsonl", worked, {"text": "Plain."}))
    assert texts(corpus) == [b"Problem:\n1+1?\n\nSolution:\nIt is 2.", b"Plain."]
    given = len("Problem:\n1+1?\n\nSolution:\n")
    end = given + 8
    assert corpus.docs[:, :3].tolist() == [[0, given, end], [end, end + 1, end + 6]]
    assert corpus.docs.dtype == np.int64 and corpus.tokens.dtype == np.dtype("<u4")


def test_no_token_crosses_the_start_of_the_solution(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256}
    tokenizer = Tokenizer(ranks, {"<|end|>": 257}, r"[\s\S]+")
    corpus = write_corpus([("a", "bab"), ("ab<|end|>", "é")], tokenizer, tmp_path / "corpus")
    (_, first, _, _), (start, second, end, _) = corpus.docs
    assert corpus.tokens[:start].tolist() == [97, 98, 256] and first == 1
    assert tokenizer.decode_bytes(corpus.tokens[start:second].tolist()) == b"ab<|end|>"
    assert 257 not in corpus.tokens  # text, not the special token
    assert tokenizer.decode_bytes(corpus.tokens[second:end].tolist()) == "é".encode()
    saved = Tokenizer.load(tmp_path / "corpus" / "tokenizer")
    assert saved.fingerprint == tokenizer.fingerprint == corpus.meta["fingerprint"]


def test_gsm8k_names_and_extra_fields_are_understood(tmp_path):
    short = {"question": "Q", "answer": "A"}
    long = {"problem": "P", "solution": "S", "answer": "4", "text": "no"}
    assert texts(prepare(tmp_path, jsonl(tmp_path / "a.jsonl", short, long))) == [
        b"Problem:\nQ\n\nSolution:\nA", b"Problem:\nP\n\nSolution:\nS"]


def test_only_line_feeds_end_a_line(tmp_path):
    text = "one\u2028two\u0085three\x0b\r\nfour"
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": text}, ensure_ascii=False)
    path.write_bytes(line.encode() + b"\r\n\r\n\n")  # CRLF and blank lines
    assert texts(prepare(tmp_path, path)) == [text.encode()]


def test_txt_keeps_its_line_ends_and_loses_only_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one\r\ntwo \n\n")
    assert texts(prepare(tmp_path, tmp_path / "a.txt")) == [b" one\r\ntwo \n\n"]


def test_a_folder_is_read_in_sorted_order_whatever_the_disk_says(tmp_path):
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for name in ("c.txt", "b/z.txt", "a.txt"):
        (source / name).write_text(name)
    (source / "ignored.md").write_text("no")
    assert texts(prepare(tmp_path, source)) == [b"a.txt", b"b/z.txt", b"c.txt"]


def test_of_the_same_problem_only_the_first_document_counts(tmp_path):
    records = [dict(problem=problem, solution=solution) for problem, solution in ("P1", "P2", "p1")]
    corpus = prepare(tmp_path, jsonl(tmp_path / "a.jsonl", *records, {"text": "P"}, {"text": "P"}))
    assert corpus.meta["documents"] == 3 and corpus.meta["duplicates"] == 2
    assert texts(corpus)[0].endswith(b"1")


def test_the_split_depends_on_the_document_and_on_nothing_else(tmp_path):
    pairs = [(f"problem {i}", "solution") for i in range(400)]
    sides = []
    for name, documents in [("forward", pairs), ("backward", pairs[::-1]), ("half", pairs[::2])]:
        corpus = write_corpus(documents, ByteTokenizer(), tmp_path / name)
        sides.append(dict(zip(texts(corpus), corpus.docs[:, 3])))
    assert sides[0] == sides[1] and sides[2].items() <= sides[0].items()
    assert 7 <= sum(sides[0].values()) <= 33  # 5 % of 400, give or take three sigma
    digest = hashlib.sha256(b"problem 0").digest()  # the rule by hand
    assert sides[0][b"problem 0solution"] == (int.from_bytes(digest[:8], "big") / 2**64 < 0.05)


def test_two_documents_give_one_to_each_side():
    assert split_by_hash(np.array([2**63], dtype=np.uint64)).tolist() == [False]
    assert split_by_hash(np.array([2**63, 2**62], dtype=np.uint64)).tolist() == [False, True]
    assert split_by_hash(np.array([1, 2], dtype=np.uint64)).tolist() == [True, False]
    assert split_by_hash(np.array([2**63, 1, 2], dtype=np.uint64)).tolist() == [False, True, True]


# What is refused

BAD_LINES = [
    (b'["text"]', "expected an object with 'text', 'problem' and 'solution', or 'question' and 'answer', got a list"),
    (b"7", "expected an object with 'text', 'problem' and 'solution', or 'question' and 'answer', got a number"),
    (b"null", "expected an object with 'text', 'problem' and 'solution', or 'question' and 'answer', got null"),
    (b"{}", "got an object"),
    (b'{"problem": "P", "id": 3}', "got one with 'problem', 'id'"),
    (b'{"text": 5}', "'text' must be a string, got a number"),
    (b'{"text": {}}', "'text' must be a string, got an object"),
    (b'{"problem": "P", "solution": null}', "'solution' must be a string, got null"),
    (b'{"problem": "", "solution": "S"}', "'problem' is empty"),
    (b'{"text": "a}', "broken JSON at column 10"),
    (b'{"text": "a\x00b"}', "broken JSON at column 12"),
    (b'{"text": "a\\u0000b"}', "'text' holds a NUL byte"),
    (b'{"text": "\xff"}', "can't decode byte 0xff in position 10"),
    (b'{"text": "\\ud800"}', "surrogates not allowed"),
    (b'{"text": "\\u0007"}', "no token for byte 0x07"),
    (b"[" * 100_000, "recursion"),
]


@pytest.mark.parametrize("line, complaint", BAD_LINES, ids=[case[1] for case in BAD_LINES])
def test_a_bad_line_is_named_by_file_and_number_or_counted(tmp_path, line, complaint):
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, b"", line, {"text": "good too"})
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, path)
    assert str(error.value).startswith(f"{path} line 3: ") and complaint in str(error.value)
    assert os.listdir(tmp_path) == ["a.jsonl"]  # nothing is left behind

    skipped = []
    corpus = prepare(tmp_path, path, skipped=skipped)
    assert texts(corpus) == [b"good", b"good too"] and corpus.meta["skipped"] == 1
    assert skipped == [str(error.value)]


@pytest.mark.parametrize("content, complaint", [
    (b"\x7fELF\x00\x01", "NUL byte"),
    (b"caf\xe9", "can't decode byte 0xe9"),
    (b"", "the file is empty"),
])
def test_a_txt_that_is_no_text_is_refused(tmp_path, content, complaint):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt: .*{complaint}"):
        prepare(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize("source, complaint", [
    ("nowhere.jsonl", "no such file or folder"),
    ("a.parquet", "expected a .jsonl or .txt file"),
    ("empty", "expected a .jsonl or .txt file, or a folder of them"),
])
def test_a_wrong_source_is_refused_before_any_work(tmp_path, source, complaint):
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{source}: {complaint}"):
        list_files([tmp_path / source])


def test_a_corpus_without_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no document is left$"):
        prepare(tmp_path, jsonl(tmp_path / "a.jsonl", b""))
    with pytest.raises(ValueError, match="no document is left; first bad line: .*a.jsonl line 1: "):
        prepare(tmp_path, jsonl(tmp_path / "a.jsonl", b"1", b"2"), skipped=[])


# Nothing is half-written, nothing of the user's is deleted

def test_a_failure_in_the_middle_leaves_the_old_corpus_as_it_was(tmp_path):
    write_corpus([("", "old text")], ByteTokenizer(), tmp_path / "corpus")
    before = snapshot(tmp_path)

    def documents():
        yield Document("", "new text")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(documents(), ByteTokenizer(), tmp_path / "corpus")
    assert snapshot(tmp_path) == before and os.listdir(tmp_path) == ["corpus"]


def test_a_corpus_is_replaced_whole(tmp_path):
    write_corpus([("", "old text")], ByteTokenizer(), tmp_path / "corpus")
    (tmp_path / "corpus" / "scores-0.npy").write_bytes(b"entropies of the old text")
    write_corpus([("", "new")], ByteTokenizer(), tmp_path / "corpus")
    assert texts(load_corpus(tmp_path / "corpus")) == [b"new"]
    names = sorted(os.listdir(tmp_path / "corpus"))
    assert names == ["docs.npy", "meta.json", "tokenizer", "tokens.bin"]
    assert os.listdir(tmp_path) == ["corpus"]


@pytest.mark.parametrize("name, content", [
    ("thesis.txt", "text"), ("meta.json", "{}"), ("meta.json", "[")])
def test_a_folder_with_other_things_is_not_overwritten(tmp_path, name, content):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_text(content)
    with pytest.raises(ValueError, match="holds other things than a corpus"):
        write_corpus([("", "text")], ByteTokenizer(), tmp_path / "home")
    assert (tmp_path / "home" / name).read_text() == content


def test_a_corpus_in_which_somebody_keeps_the_source_is_not_overwritten(tmp_path):
    write_corpus([("", "text")], ByteTokenizer(), tmp_path / "corpus")
    source = jsonl(tmp_path / "corpus" / "source.jsonl", {"text": "the only copy"})
    with pytest.raises(ValueError, match="holds other things than a corpus"):
        prepare(tmp_path, source)
    assert source.exists()


# Reading it again

def test_a_corpus_of_another_tokenizer_is_refused(tmp_path):
    corpus = write_corpus([("", "text")], ByteTokenizer(), tmp_path / "corpus", tokenizer="gpt2")
    corpus.check(ByteTokenizer(), "runs/warm")
    other = ByteTokenizer()
    other.fingerprint = "other"
    complaint = "with gpt2, not .* of runs/warm; .* --tokenizer runs/warm"
    with pytest.raises(ValueError, match=complaint):
        corpus.check(other, "runs/warm")


def edit_meta(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# (complaint, what is done, to which file, with what)
DAMAGES = [
    ("not a corpus", os.remove, "meta.json"),
    ("not a corpus", Path.write_text, "meta.json", '{"form'),
    ("format version 99, not 1", edit_meta, "meta.json", dict(version=99)),
    ("holds 1 tokens, meta.json says 11", os.truncate, "tokens.bin", 4),
    ("damaged", os.truncate, "tokens.bin", 7),
    ("damaged", os.truncate, "tokens.bin", 0),
    ("damaged", os.truncate, "docs.npy", 150),
    ("damaged", os.remove, "docs.npy"),
    ("damaged", np.save, "docs.npy", np.zeros((2, 3), dtype=np.int64)),
    ("docs.npy does not fit", np.save, "docs.npy", np.array([[0, 1, 12, 0]])),
    ("docs.npy does not fit", np.save, "docs.npy", np.array([[0, 0, 11, 0]])),
    ("docs.npy does not fit", np.save, "docs.npy", np.array([[-1, 1, 11, 0]])),
    ("docs.npy does not fit", np.save, "docs.npy", np.array([[5, 9, 8, 0]])),
]


@pytest.mark.parametrize("case", DAMAGES, ids=[case[0] for case in DAMAGES])
def test_a_damaged_corpus_is_refused(tmp_path, case):
    complaint, damage, name, *content = case
    folder = write_corpus([("", "hello world")], ByteTokenizer(), tmp_path / "corpus").folder
    damage(folder / name, *content)
    with pytest.raises(ValueError, match=complaint):
        load_corpus(folder)


def test_a_missing_corpus_is_refused(tmp_path):
    complaint = "nowhere: no such folder; make one with python data/prepare.py"
    with pytest.raises(ValueError, match=complaint):
        load_corpus(tmp_path / "nowhere")


# The command line

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tokenizer.json of 257 tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    Tokenizer({bytes([b]): b for b in range(256)}, {"<|end|>": 256}, r"[\s\S]+").save(folder)
    return folder


def run(cwd, *args):
    done = subprocess.run([sys.executable, SCRIPT, *args], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_script_runs_from_any_folder_and_says_what_it_did(tmp_path, checkpoint):
    source = jsonl(tmp_path / "a.jsonl", {"text": "one"}, b"[", {"text": "two"}, {"text": "two"})
    args = ["a.jsonl", "--tokenizer", checkpoint, "--out", "new/corpus", "--skip-bad"]
    code, stdout, stderr = run(tmp_path, *args)
    assert (code, stderr) == (0, "")
    assert "2 documents (1 for validation), 6 tokens, 1.00 bytes per token" in stdout
    left_out = ("1 duplicates dropped, 1 bad lines skipped, the first: "
                "a.jsonl line 2: broken JSON")
    assert left_out in stdout
    corpus = load_corpus(tmp_path / "new" / "corpus")
    assert corpus.meta["tokenizer"] == str(checkpoint)
    assert corpus.meta["sources"] == {"a.jsonl": hashlib.sha256(source.read_bytes()).hexdigest()}
    corpus.check(Tokenizer.load(checkpoint), "checkpoint")


def test_an_error_is_one_line_and_exit_code_2(tmp_path, checkpoint):
    jsonl(tmp_path / "a.jsonl", {"text": "one"}, [1])
    expected = "expected an object with 'text', 'problem' and 'solution', or 'question' and 'answer', got a list"
    for source, complaint in [
        ("a.jsonl", f"a.jsonl line 2: {expected}"),
        ("b.jsonl", "b.jsonl: no such file or folder"),
    ]:
        done = run(tmp_path, source, "--tokenizer", checkpoint, "--out", "corpus")
        assert done == (2, "", f"prepare.py: {complaint}\n")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_ctrl_c_leaves_nothing_behind_and_says_how_to_go_on(tmp_path, checkpoint):
    # A source that can be hashed once, and then keeps its reader waiting.
    os.mkfifo(tmp_path / "a.txt")
    command = [sys.executable, SCRIPT, "a.txt", "--tokenizer", checkpoint, "--out", "corpus"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    open(tmp_path / "a.txt", "wb").close()
    while not list(tmp_path.glob(".corpus.partial-*/tokens.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    # A signal just before the read begins is seen when the read ends, and this one never does.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert stderr == "interrupted: start the same command again\n"
    assert process.returncode == 130 and os.listdir(tmp_path) == ["a.txt"]


def speak(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom plumbing.flags import speak_once\n"
                      f"sys.excepthook = speak_once\n{body}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_bug_has_a_traceback_and_what_a_user_can_mend_is_one_line(tmp_path):
    assert speak(tmp_path, f"raise OSError({errno.ENOSPC}, 'No space left on device')") == (
        2, f"script.py: [Errno {errno.ENOSPC}] No space left on device\n")
    assert speak(tmp_path, "open('/nowhere/file')") == (
        2, "script.py: [Errno 2] No such file or directory: '/nowhere/file'\n")
    list_files = "from data.prepare import list_files\nlist_files"
    assert speak(tmp_path, f"{list_files}(['/nowhere'])") == (
        2, "script.py: /nowhere: no such file or folder\n")
    # A ValueError that this repository has not raised, and a TypeError.
    for bug in ("int('x')", f"{list_files}(7)"):
        code, stderr = speak(tmp_path, bug)
        assert code == 1 and "Traceback" in stderr
