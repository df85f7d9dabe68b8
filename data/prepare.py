"""Text to tokens: JSONL or plain text in, a corpus folder out (data/corpus.py describes it).

    python data/prepare.py omni_math.jsonl --tokenizer Qwen3-1.7B --out corpora/omni [--skip-bad]

A source is a .jsonl file, whose lines are objects with `text`, or with `problem` and `solution` (or
`question` and `answer`, as in GSM8K); a .txt file, which is one document; or a folder of these.
"""
import hashlib
import sys
from pathlib import Path

if __name__ == "__main__":  # imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.corpus import (JSON_NAMES, VAL_SHARE, Document, check_text, parse_json, raise_or_skip,
                         write_corpus)
from data.tokenizer import Tokenizer
from plumbing import flags

TEMPLATE = "Problem:\n{}\n\nSolution:\n"
ENDINGS = (".jsonl", ".txt")


def list_files(sources):
    """Files and folders -> files; those of a folder in sorted order."""
    files = []
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"{source}: no such file or folder")
        there = sorted(source.rglob("*")) if source.is_dir() else [source]
        found = [path for path in there if path.suffix in ENDINGS]
        if not found:
            raise ValueError(f"{source}: expected a .jsonl or .txt file, or a folder of them")
        files += found
    return files


def read_documents(files, skipped=None):
    """Yield Documents. A bad line is a ValueError or, if there is a list `skipped`, put there."""
    for path in files:
        is_jsonl = path.suffix == ".jsonl"
        # As bytes, because text mode changes \r\n and str.splitlines breaks lines at U+2028.
        with open(path, "rb") as file:
            for number, line in enumerate(file if is_jsonl else [file.read()], start=1):
                where = f"{path} line {number}" if is_jsonl else str(path)
                try:
                    text = line.decode("utf-8-sig")  # drops a byte order mark
                    if not is_jsonl:
                        yield Document("", check_text(text, "the file"), where)
                    elif text.strip():
                        yield Document(*parse_line(text.rstrip()), where)
                except (ValueError, RecursionError) as error:
                    raise_or_skip(f"{where}: {error}", skipped)


def parse_line(line):
    """A line of JSONL -> problem (in TEMPLATE; "" for plain text), solution."""
    record = parse_json(line)
    fields = record if isinstance(record, dict) else {}
    for problem, solution in (("problem", "solution"), ("question", "answer")):
        if problem in fields and solution in fields:
            return (TEMPLATE.format(check_text(fields[problem], f"'{problem}'")),
                    check_text(fields[solution], f"'{solution}'"))
    if "text" in fields:
        return "", check_text(fields["text"], "'text'")
    got = f"one with {', '.join(map(repr, fields))}" if fields else JSON_NAMES[type(record)]
    raise ValueError(f"expected an object with 'text', 'problem' and 'solution', or 'question' "
                     f"and 'answer', got {got}")


def parse_args():
    parser = flags.Parser("Tokenise text into a corpus folder. One document in "
                          f"{1 / VAL_SHARE:.0f}, chosen by its hash, is for validation.")
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE",
        help=".jsonl ('text', 'problem' and 'solution', or 'question' and 'answer') or .txt file, "
             "or a folder of them")
    add("--tokenizer", required=True, metavar="NAME_OR_FOLDER",
        help="checkpoint folder with a tokenizer.json, a tiktoken name (gpt2), or embedded")
    add("--out", required=True, metavar="FOLDER",
        help="corpus folder to write; a corpus that is there already is replaced")
    add("--skip-bad", action="store_true",
        help="leave out bad lines and count them; by default the first one stops the run")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    files = list_files(args.sources)
    tokenizer = Tokenizer.load(args.tokenizer)
    sources = {}
    for path in files:
        with open(path, "rb") as file:
            sources[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    skipped = [] if args.skip_bad else None
    corpus = write_corpus(read_documents(files, skipped), tokenizer, args.out, skipped,
                          tokenizer=args.tokenizer, sources=sources)

    meta = corpus.meta
    print(f"{meta['documents']:,} documents ({meta['val_documents']:,} for validation), "
          f"{meta['tokens']:,} tokens, {meta['bytes'] / meta['tokens']:.2f} bytes per token")
    print(f"{meta['duplicates']:,} duplicates dropped, {meta['skipped']:,} bad lines skipped"
          + (f", the first: {skipped[0]}" if skipped else ""))
    print(f"written to {args.out}; next: python data/filter.py --corpus {args.out} "
          "--proxy CHECKPOINT")
