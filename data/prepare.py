"""Text to tokens: JSONL or plain text in, a corpus folder out.

    python data/prepare.py omni_math.jsonl --tokenizer Qwen3-1.7B --out corpora/omni [--skip-bad]

A source is a .jsonl file, one object a line with `text`, or with `problem` and `solution` (`question` and
`answer` are the same thing: GSM8K); a .txt file, which is one document; or a folder of these. The corpus:

    tokens.bin    all documents one after the other, uint32 little-endian, nothing between them (no end token)
    docs.npy      int64 (documents, 4): start, solution, end as offsets into tokens.bin; is_val (0 or 1)
    meta.json     format version, counts, sha256 of the sources, name and fingerprint of the tokenizer
    tokenizer/    the tokenizer itself

tokens[solution:end] may be predicted. A problem and its solution are tokenised apart, so that the solution
begins with a token of its own; for plain text it begins with the second token, because a prediction needs a
context. Documents are deduplicated on the problem (or text), and its hash chooses the side of the train / val
split, no matter what else the corpus holds. Nothing is stripped or cut here; line ends stay as they are.
"""
import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # imports start at the repository, not at data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing.flags import speak_once
from data.tokenizer import Tokenizer

FORMAT, VERSION = "nanorpt corpus", 1
VAL_SHARE = 0.05  # of the documents
TEMPLATE = "Problem:\n{}\n\nSolution:\n"
ENDINGS = (".jsonl", ".txt")
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number",
              float: "a number", type(None): "null"}


class Document(NamedTuple):
    problem: str   # all that stands before the solution; "" for plain text
    solution: str  # what may be predicted
    where: str = "document"  # for error messages


class Corpus(NamedTuple):
    folder: Path
    tokens: np.memmap  # (tokens,) uint32
    docs: np.ndarray   # (documents, 4) int64: start, solution, end, is_val
    meta: dict

    def check(self, tokenizer, name):
        """Stops when the checkpoint `name`, by its tokenizer, would read these tokens as another text."""
        if tokenizer.fingerprint != self.meta["fingerprint"]:
            used = self.meta.get("tokenizer", "another one")
            raise ValueError(f"corpus {self.folder} was tokenised with {used}, not the tokenizer of {name}; "
                             f"prepare it again with --tokenizer {name}")


def list_files(sources):
    """Files and folders -> files; those of a folder in sorted order."""
    files = []
    for source in map(Path, sources):
        found = [source]
        if source.is_dir():
            found = sorted(path for path in source.rglob("*") if path.suffix in ENDINGS)
        elif not source.exists():
            raise ValueError(f"{source}: no such file or folder")
        if not found or found[0].suffix not in ENDINGS:
            raise ValueError(f"{source}: expected a .jsonl or .txt file, or a folder of them")
        files += found
    return files


def read_documents(files, skipped=None):
    """Yields Documents. A bad line raises, or its complaint goes to the list `skipped` where there is one."""
    for path in files:
        with open(path, "rb") as file:  # bytes: text mode changes \r\n, splitlines breaks at U+2028
            lines = file if path.suffix == ".jsonl" else [file.read()]
            for number, line in enumerate(lines, start=1):
                where = f"{path} line {number}" if path.suffix == ".jsonl" else str(path)
                try:
                    text = line.decode("utf-8-sig")  # -sig: some editors put a byte order mark in front
                    if path.suffix == ".txt":
                        yield Document("", check_text(text, "the file"), where)
                    elif text.strip():
                        yield Document(*parse_line(text.rstrip()), where)
                except (ValueError, RecursionError) as error:
                    complain(f"{where}: {error}", skipped)


def parse_line(line):
    """One line of JSONL -> problem (with its template; "" for plain text), solution."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}") from None
    fields = record if isinstance(record, dict) else {}
    for problem, solution in (("problem", "solution"), ("question", "answer")):
        if problem in fields and solution in fields:
            return (TEMPLATE.format(check_text(fields[problem], f"'{problem}'")),
                    check_text(fields[solution], f"'{solution}'"))
    if "text" in fields:
        return "", check_text(fields["text"], "'text'")
    got = f"one with {', '.join(map(repr, fields))}" if fields else JSON_NAMES[type(record)]
    raise ValueError(f"expected an object with 'text' or 'problem' and 'solution', got {got}")


def check_text(text, name):
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {JSON_NAMES[type(text)]}")
    if not text or "\0" in text:
        raise ValueError(f"{name} holds a NUL byte, which is no text" if text else f"{name} is empty")
    return text


def complain(message, skipped):
    if skipped is None:
        raise ValueError(message)
    skipped.append(message)


def write_corpus(documents, tokenizer, out, skipped=None, /, **about):
    """Documents, or plain (problem, solution) pairs -> the Corpus in folder `out`, complete or not at all.

    The problem of a pair is all that stands before its solution. `about` goes into meta.json.
    """
    out = Path(out).resolve()
    if out.exists() and not is_replaceable(out):
        raise ValueError(f"{out}: holds other things than a corpus; choose another --out or move them away")
    partial, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    partial.mkdir(parents=True)
    docs, hashes, size, text_bytes, duplicates = [], {}, 0, 0, 0
    try:
        with open(partial / "tokens.bin", "wb") as file:
            for document in tqdm(documents, desc="tokenise", unit=" documents", disable=None):
                problem, solution, where = Document(*document)
                try:
                    text_size = len((problem + solution).encode())
                    given, asked = tokenizer.encode(problem), tokenizer.encode(solution)
                except ValueError as error:  # a lone surrogate, or a byte that the vocabulary lacks
                    complain(f"{where}: {error}", skipped)
                    continue
                digest = hashlib.sha256((problem or solution).encode()).digest()
                if digest in hashes:
                    duplicates += 1
                    continue
                hashes[digest] = int.from_bytes(digest[:8], "big")
                np.array(given + asked, dtype="<u4").tofile(file)
                docs.append((size, size + max(len(given), 1), size + len(given) + len(asked)))
                size, text_bytes = docs[-1][2], text_bytes + text_size
        if not docs:
            raise ValueError("no document is left" + (f"; first bad line: {skipped[0]}" if skipped else ""))

        is_val = split_by_hash(np.array([*hashes.values()], dtype=np.uint64))
        np.save(partial / "docs.npy", np.column_stack([np.array(docs, dtype=np.int64), is_val]))
        tokenizer.save(partial / "tokenizer")
        counts = dict(documents=len(docs), val_documents=int(is_val.sum()), tokens=size, bytes=text_bytes,
                      duplicates=duplicates, skipped=len(skipped or []))
        meta = dict(format=FORMAT, version=VERSION, fingerprint=tokenizer.fingerprint, **counts, **about)
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:  # also after Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
    return load_corpus(out)


def split_by_hash(hashes):
    """(documents,) uint64 -> (documents,) bool, True for validation."""
    is_val = hashes < VAL_SHARE * 2**64
    if is_val.all() or not is_val.any():  # two documents or more give at least one to each side
        is_val = (hashes == hashes.min()) & (len(hashes) > 1)
    return is_val


def is_replaceable(folder):
    """Is it empty, or a corpus in which nobody keeps other files? (data/filter.py adds the scores.)"""
    names = [path.name for path in folder.iterdir()]
    ours = ("tokens.bin", "docs.npy", "meta.json", "tokenizer", "scores-")
    return not names or is_corpus(folder) and all(name.startswith(ours) for name in names)


def is_corpus(folder):
    try:
        return json.loads((folder / "meta.json").read_text())["format"] == FORMAT
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def load_corpus(folder):
    """The folder that write_corpus wrote, memory-mapped; ValueError when it is none, or damaged."""
    folder = Path(folder)
    if not folder.is_dir() or not is_corpus(folder):
        problem = "not a corpus" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {problem}; make one with python data/prepare.py SOURCE --out {folder}")
    meta = json.loads((folder / "meta.json").read_text())
    if meta["version"] != VERSION:
        raise ValueError(f"{folder}: format version {meta['version']}, not {VERSION}; prepare it again")
    try:
        tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        docs = np.load(folder / "docs.npy")
        start, solution, end, _ = docs.T
        if len(tokens) != meta["tokens"]:
            raise ValueError(f"tokens.bin holds {len(tokens):,} tokens, meta.json says {meta['tokens']:,}")
        if start.min() < 0 or (start >= solution).any() or (solution > end).any() or end.max() > len(tokens):
            raise ValueError("docs.npy does not fit tokens.bin")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder}: damaged corpus ({error}); prepare it again") from None
    return Corpus(folder, tokens, docs, meta)


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(
        description="Tokenise text into a corpus folder. "
                    f"One document in {1 / VAL_SHARE:.0f}, chosen by its hash, is for validation.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help=".jsonl ('text', or 'problem' and 'solution') or .txt file, or a folder of them")
    parser.add_argument("--tokenizer", required=True, metavar="NAME_OR_FOLDER",
                        help="checkpoint folder with a tokenizer.json, a tiktoken name (gpt2), or embedded")
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="corpus folder to write; a corpus that is there already is replaced")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave out bad lines and count them; by default the first one stops the run")
    args = parser.parse_args()

    files = list_files(args.sources)
    tokenizer = Tokenizer.load(args.tokenizer)
    skipped = [] if args.skip_bad else None
    sources = {str(path): hashlib.file_digest(open(path, "rb"), "sha256").hexdigest() for path in files}
    corpus = write_corpus(read_documents(files, skipped), tokenizer, args.out, skipped,
                          tokenizer=args.tokenizer, sources=sources)

    meta = corpus.meta
    print(f"{meta['documents']:,} documents ({meta['val_documents']:,} for validation), "
          f"{meta['tokens']:,} tokens, {meta['bytes'] / meta['tokens']:.2f} bytes per token")
    print(f"{meta['duplicates']:,} duplicates dropped, {meta['skipped']:,} bad lines skipped"
          + (f", the first: {skipped[0]}" if skipped else ""))
    print(f"written to {args.out}; next: python data/filter.py --corpus {args.out} --proxy CHECKPOINT")
