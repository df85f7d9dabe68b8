"""A corpus folder: text as token ids, and where its documents begin and end.

    tokens.bin    all documents one after the other, uint32 little-endian, nothing between them
    docs.npy      int64 (documents, 4): start, solution, end (offsets into tokens.bin), is_val
    meta.json     version, counts, sha256 of the sources, name and fingerprint of the tokenizer
    tokenizer/    the tokenizer itself

A document begins with the BOS of its tokenizer, if that puts one in front of a text. Only tokens of
a solution are predicted. It is tokenised apart from its problem, so that it begins with a token of
its own; in plain text it begins with the second token, because a prediction needs a context. Of
documents with the same problem (or plain text) the first is kept, and the hash of that alone
decides between training and validation. Text stays as it is, line ends included.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

FORMAT, VERSION = "nanorpt corpus", 1
PARTS = ("tokens.bin", "docs.npy", "meta.json", "tokenizer", "scores-")  # see data/filter.py
VAL_SHARE = 0.05  # of the documents
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
              int: "a number", float: "a number", type(None): "null"}


def parse_json(text, **options):
    """json.loads(text, **options); a ValueError names the column where the JSON is broken."""
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}") from None


def check_text(text, name):
    """-> text; ValueError, in which it is called `name`, if it is empty or no text."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {JSON_NAMES[type(text)]}")
    if not text or "\0" in text:
        problem = "holds a NUL byte, which is no text" if text else "is empty"
        raise ValueError(f"{name} {problem}")
    return text


def raise_or_skip(message, skipped):
    """A bad document is a ValueError or, if there is a list `skipped`, an entry in it."""
    if skipped is None:
        raise ValueError(message)
    skipped.append(message)


class Document(NamedTuple):
    problem: str             # text before the solution, or ""
    solution: str            # what may be predicted
    where: str = "document"  # its source, for error messages


class Corpus(NamedTuple):
    folder: Path
    tokens: np.memmap  # (tokens,) uint32
    docs: np.ndarray   # (documents, 4) int64: start, solution, end, is_val
    meta: dict

    def check(self, tokenizer, name):
        """ValueError if the tokenizer of checkpoint `name` would read these ids as another text."""
        if tokenizer.fingerprint != self.meta["fingerprint"]:
            used = self.meta.get("tokenizer", "another one")
            raise ValueError(f"corpus {self.folder} was tokenised with {used}, not the tokenizer "
                             f"of {name}; prepare it again with --tokenizer {name}")


def write_corpus(documents, tokenizer, out, skipped=None, /, **about):
    """Documents, or plain (problem, solution) pairs -> the Corpus in folder `out`.

    The folder is written whole or not at all, and replaces a corpus that is there already. A bad
    document is a ValueError or an entry in the list `skipped`; `about` goes into meta.json.
    """
    out = Path(out).resolve()
    names = [path.name for path in out.iterdir()] if out.exists() else []
    if names and not (read_meta(out) and all(name.startswith(PARTS) for name in names)):
        raise ValueError(f"{out}: holds other things than a corpus; choose another --out or move "
                         "them away")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        docs, hashes, counts = write_tokens(partial, documents, tokenizer, skipped)
        is_val = split_by_hash(np.array(hashes, dtype=np.uint64))
        np.save(partial / "docs.npy", np.column_stack([np.array(docs, dtype=np.int64), is_val]))
        tokenizer.save(partial / "tokenizer")
        meta = dict(format=FORMAT, version=VERSION, fingerprint=tokenizer.fingerprint,
                    documents=len(docs), val_documents=int(is_val.sum()), **counts, **about)
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:  # also after Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
    return load_corpus(out)


def write_tokens(folder, documents, tokenizer, skipped):
    """Write tokens.bin -> [(start, solution, end)], [64-bit hash of the text], {what: count}."""
    docs, hashes = [], {}
    counts = dict(tokens=0, bytes=0, duplicates=0, skipped=0)
    with open(folder / "tokens.bin", "wb") as file:
        for document in tqdm(documents, desc="tokenise", unit=" documents", disable=None):
            problem, solution, where = Document(*document)
            try:
                raw = (problem + solution).encode()
                problem_ids = tokenizer.bos + tokenizer.encode(problem)
                solution_ids = tokenizer.encode(solution)
            except ValueError as error:  # a lone surrogate, or an unknown byte
                raise_or_skip(f"{where}: {error}", skipped)
                continue
            digest = hashlib.sha256((problem or solution).encode()).digest()
            if digest in hashes:
                counts["duplicates"] += 1
                continue
            hashes[digest] = int.from_bytes(digest[:8], "big")
            np.array(problem_ids + solution_ids, dtype="<u4").tofile(file)
            start = counts["tokens"]
            end = start + len(problem_ids) + len(solution_ids)
            docs.append((start, start + len(problem_ids) + (not problem), end))
            counts["tokens"] = end
            counts["bytes"] += len(raw)
    if not docs:
        first = f"; first bad line: {skipped[0]}" if skipped else ""
        raise ValueError(f"no document is left{first}")
    counts["skipped"] = len(skipped or [])
    return docs, list(hashes.values()), counts


def split_by_hash(hashes):
    """(documents,) uint64 -> (documents,) bool, True for validation."""
    is_val = hashes < VAL_SHARE * 2**64
    if is_val.all() or not is_val.any():  # one at least on each side
        is_val = (hashes == hashes.min()) & (len(hashes) > 1)
    return is_val


def read_meta(folder):
    """-> meta.json, or None if the folder is no corpus."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta if meta["format"] == FORMAT else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def load_corpus(folder):
    """A folder written by write_corpus, memory-mapped; ValueError if it is none, or damaged."""
    folder = Path(folder)
    meta = read_meta(folder)
    if not meta:
        problem = "not a corpus" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {problem}; make one with python data/prepare.py SOURCE "
                         f"--out {folder}")
    if meta["version"] != VERSION:
        raise ValueError(f"{folder}: format version {meta['version']}, not {VERSION}; prepare it "
                         "again")
    try:
        tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        docs = np.load(folder / "docs.npy")
        start, solution, end, _ = docs.T
        if len(tokens) != meta["tokens"]:
            raise ValueError(f"tokens.bin holds {len(tokens):,} tokens, meta.json says "
                             f"{meta['tokens']:,}")
        in_order = (start < solution) & (solution <= end)
        if start.min() < 0 or end.max() > len(tokens) or not in_order.all():
            raise ValueError("docs.npy does not fit tokens.bin")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder}: damaged corpus ({error}); prepare it again") from None
    return Corpus(folder, tokens, docs, meta)
