"""Text to token ids and back, exactly as a checkpoint's own tokenizer does it; ids to raw bytes.

    Tokenizer.load("gpt2")      an encoding that tiktoken knows (downloaded once)
    Tokenizer.load("folder")    a Hugging Face tokenizer.json: GPT-2, SmolLM2, Qwen2/3, Llama-3, R1
    Tokenizer.load("embedded")  a few hundred tokens, trained in milliseconds on data/sums.py

All three run on tiktoken. A tokenizer.json is converted only if the result is exact; else a
ValueError names the field that prevents it. One difference stays: NFC is Python's, and Hugging
Face's older Unicode tables order a hundred marks of recent scripts differently.

encode() gives the ids of the text alone. Where the post_processor of tokenizer.json puts a BOS in
front (Llama-3, R1), as in transformers whatever tokenizer_config.json says, it is in `bos`, and
goes in front of documents and prompts; a window that lost its beginning has it again. Not done
here: truncation, padding, and the EOS that some post-processors put behind a text, because a
prompt goes on and train_ntp.py ends a document itself. Chat templates: data/prompt.py.
"""
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from functools import cached_property
from itertools import groupby
from pathlib import Path

import regex  # comes with tiktoken; unlike `re` it knows \p{L}
import tiktoken

from data.sums import tokenizer_corpus
from plumbing.files import newest_hint, read_json

# How text is cut into pieces; no token crosses a cut.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out each digit, then applies GPT-2's pattern to what lies between. In one pattern: a
# digit stands alone, and to white space before it a digit looks like the end of the text.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Ours: `\boxed{` is one piece, a word keeps its leading space, digits and punctuation stand alone.
EMBEDDED_PATTERN = r"\\\p{L}+\{?| ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
EMBEDDED_SPECIAL = ("<think>", "</think>", "<|end|>")

# A folder's files are kept as they are; we read the first three.
FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt tokenizer.model chat_template.jinja chat_template.json""".split()
# Without a tokenizer_config.json, the first of these that is there ends a text.
KNOWN_EOS = "<|end|> <|endoftext|> <|end_of_text|> <|im_end|> <｜end▁of▁sentence｜> </s>".split()

# tokenizer.json writes each byte as one character: itself if it prints, else one from U+0100 on.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}

# Characters. tiktoken's engine runs out of stack in a piece of a million, white space above all.
LONG = 1 << 16


class Tokenizer:
    def __init__(self, ranks, special, pattern, nfc=False, bos=(), eos=None, config=None,
                 files=None, stops=(), rows=math.inf):
        """ranks: {token bytes: id}, the lowest merges first; special: {text: id}."""
        self.ranks, self.special = ranks, special
        self.pattern, self.nfc = pattern, nfc
        self.bos = list(bos)         # ids in front of every text, mostly one or none
        self.config = config or {}   # tokenizer_config.json, with the chat template
        self.stops = set(stops)      # ids that end a text for the model in the same folder
        self.rows = rows             # of that model's embedding
        self.eos = eos or next((text for text in KNOWN_EOS if text in special), None)
        self.files = files  # {name: bytes}
        self.vocab_size = 1 + max([*ranks.values(), *special.values()])
        self._bytes = {id: text.encode() for text, id in special.items()}
        self._bytes |= {id: token for token, id in ranks.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self._special_texts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # tiktoken needs all 256 bytes; encode() refuses those that the vocabulary lacks.
        lacking = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        # Hugging Face makes a piece of what the pattern leaves over; tiktoken would drop it.
        self._pieces = rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"
        self._encoding = tiktoken.Encoding(
            "nanorpt",
            pat_str=self._pieces,
            mergeable_ranks=ranks | {byte: self.vocab_size + i for i, byte in enumerate(lacking)},
            special_tokens={})  # encode() places them itself

    @classmethod
    def load(cls, name_or_folder, for_model=False):
        """for_model: refuse a checkpoint whose embedding lacks ids of the tokenizer."""
        name, folder = str(name_or_folder), Path(name_or_folder)
        if name == "embedded":
            ranks = train_bpe(tokenizer_corpus(), vocab_size=512)
            special = {text: len(ranks) + i for i, text in enumerate(EMBEDDED_SPECIAL)}
            return cls(ranks, special, EMBEDDED_PATTERN)
        if folder.is_dir():
            tokenizer = cls(**read_folder(folder))
            last = tokenizer.vocab_size - 1
            if for_model and last >= tokenizer.rows:
                text = tokenizer.decode_bytes([last]).decode("utf-8", "replace")
                raise ValueError(
                    f"{folder}: the tokenizer has ids up to {last} ({text!r}), config.json says "
                    f"vocab_size {tokenizer.rows}: a token was added and the embedding not "
                    "resized; resize it (resize_token_embeddings in transformers) or bring the "
                    "tokenizer that the model was trained with")
            return tokenizer
        if name not in tiktoken.list_encoding_names():
            known = ", ".join(["embedded", *tiktoken.list_encoding_names()])
            raise ValueError(f"tokenizer '{name}': no such folder, and not one of {known}; what "
                             "is on a hub has to be downloaded first")
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError:
            raise ValueError(
                f"tokenizer '{name}': tiktoken cannot download it; load it once on a network with "
                "TIKTOKEN_CACHE_DIR set, and bring that folder here") from None
        # Without the + of cl100k_base's {1,3}+, which means ({1,3})+ in Hugging Face's engine.
        pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")
        return cls(encoding._mergeable_ranks, encoding._special_tokens, pattern)

    def encode(self, text, special=False):
        """Text -> ids. A special token's text is plain text unless `special` is set (templates)."""
        text.encode()  # refuses a lone surrogate
        parts = self._special_texts.split(text) if special and self.special else [text]
        ids = []
        for i, part in enumerate(parts):
            if i % 2:  # the odd parts are special tokens
                ids.append(self.special[part])
            else:
                part = to_nfc(part) if self.nfc else part
                ids += self._encode_plain(part)
        if max(ids, default=0) >= self.vocab_size:
            i = next(i for i, id in enumerate(ids) if id >= self.vocab_size)
            byte = self._encoding.decode_single_token_bytes(ids[i])
            offset = len(self.decode_bytes(ids[:i]))
            raise ValueError(f"byte 0x{byte.hex()} at offset {offset} of the text: the tokenizer "
                             "lacks it")
        return ids

    def _encode_plain(self, text):
        """Text without special tokens -> ids. One with a very long piece is cut by another engine.

        A piece of 2 x LONG covers a block of LONG, in which it is white space or one piece.
        """
        blocks = range(0, len(text) - LONG + 1, LONG)
        if not any(text[i:i + LONG].isspace()
                   or regex.match(self._pieces, text, pos=i, endpos=i + LONG).end() == i + LONG
                   for i in blocks):
            return self._encoding.encode_ordinary(text)
        for char in set(text):
            if unicodedata.category(char) == "Cn":
                raise ValueError(f"the character U+{ord(char):04X}, which is not in Unicode "
                                 f"{unicodedata.unidata_version}, beside a run of more than {LONG} "
                                 "characters: there is no exact way to cut such a text")
        pieces = regex.finditer(self._pieces, text)
        return [id for piece in pieces for id in self._encoding._encode_single_piece(piece[0])]

    def token_bytes(self, id):
        """Raw bytes, never str: a token may be half of a UTF-8 character."""
        if id not in self._bytes:
            raise ValueError(f"token id {id} is not in the tokenizer's vocabulary of "
                             f"{self.vocab_size}")
        return self._bytes[id]

    def decode_bytes(self, ids):
        """Raw bytes; U+FFFD for an id that only the model has, which may have more rows."""
        return b"".join(self._bytes.get(id, b"\xef\xbf\xbd") for id in ids)

    @property
    def eos_id(self):
        if self.eos is None:
            raise ValueError("no known end of text: name one of the added tokens in "
                             "tokenizer_config.json")
        return self.special[self.eos]

    @cached_property
    def fingerprint(self):
        """Equal fingerprints mean equal ids for every text; a corpus keeps its tokenizer's."""
        ranks = sorted((id, token.hex()) for token, id in self.ranks.items())
        bos = [self.bos] if self.bos else []  # without one, as in corpora of earlier versions
        canonical = json.dumps([self.pattern, self.nfc, ranks, sorted(self.special.items()), *bos])
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder):
        """Write the files that load() and Hugging Face read; those of a loaded folder unchanged."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in (self.files or hugging_face_files(self)).items():
            (Path(folder) / name).write_bytes(content)


def to_nfc(text):
    """NFC in linear time: Python needs minutes to order 500,000 marks on one letter."""
    if len(text) >= LONG:
        text = regex.sub(r"\p{M}{1000,}+", in_order, text)
    return unicodedata.normalize("NFC", text)


def in_order(marks):
    """A match of combining marks -> each run of those with a class above 0 sorted by class."""
    runs = groupby(marks[0], key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join(mark for _, run in runs for mark in sorted(run, key=unicodedata.combining))


def read_folder(folder):
    """A Hugging Face folder -> the arguments of Tokenizer; ValueError with file and field."""
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    if "tokenizer.json" not in files:
        raise FileNotFoundError(f"{folder}: there is no tokenizer.json in this folder"
                                f"{newest_hint(folder)}")
    source, config, older = (read_json(folder / name) if name in files else {}
                             for name in FILES[:3])
    if "added_tokens_decoder" not in config:  # else transformers does not read the older file
        config |= older
    try:
        name = "chat_template.jinja"
        if name in files:
            config["chat_template"] = files[name].decode()
        name = "tokenizer.json"
        arguments = convert(source)
    except ValueError as error:
        raise ValueError(f"{folder / name}: {error}") from None
    eos = config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos and eos not in arguments["special"]:
        raise ValueError(f"{folder}: tokenizer_config.json or special_tokens_map.json: eos_token: "
                         f"{eos!r} is not among tokenizer.json's added_tokens")
    return arguments | dict(eos=eos, config=config, files=files) | read_model(folder)


def read_model(folder):
    """-> what config.json and generation_config.json of this folder say, if they are there."""
    names = ("config.json", "generation_config.json")
    configs = [read_json(folder / name) for name in names if (folder / name).exists()]
    sizes = [config["vocab_size"] for config in configs if type(config.get("vocab_size")) is int]
    rows, stops = min(sizes, default=math.inf), set()
    for config in configs:
        named = config.get("eos_token_id")  # one, or a list
        named = named if isinstance(named, list) else [named]
        # What is no row cannot be drawn, so it ends nothing.
        stops |= {id for id in named if type(id) is int and 0 <= id < rows}
    return dict(stops=stops, rows=rows)


def convert(source):
    """A tokenizer.json -> arguments of Tokenizer; ValueError with the field if not exact."""
    model, normalizer = source["model"], source.get("normalizer")
    if model.get("type") != "BPE":
        raise ValueError("model.type: only BPE is supported")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise ValueError(f"model.{field}: must be unset")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError("normalizer: only null and NFC are supported")
    pattern = read_pattern(source.get("pre_tokenizer") or {})
    special = read_added_tokens(source.get("added_tokens", []), model["vocab"])
    ranks = read_ranks(model, special)
    bos = read_bos(source.get("post_processor"))
    return dict(ranks=ranks, special=special, pattern=pattern, nfc=bool(normalizer), bos=bos)


def read_pattern(pre_tokenizer):
    """-> the regex that cuts text into the same pieces as these steps."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    first, last = steps[0], steps[-1]
    own_regex = last.get("use_regex", True)
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True):
        if kinds == ["ByteLevel"] and own_regex:
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and own_regex and first.get("individual_digits"):
            return DIGITS_PATTERN
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        if kinds == ["Split", "ByteLevel"] and not own_regex and isolated:
            if "Regex" in first["pattern"]:
                return first["pattern"]["Regex"]
    raise ValueError(
        "pre_tokenizer: only ByteLevel without prefix space is supported: alone, after Digits "
        "(individual), or with use_regex false after Split (Regex, Isolated)")


def read_bos(post_processor):
    """-> the ids that this step puts in front of a text."""
    kind = post_processor["type"] if post_processor else "ByteLevel"
    if kind == "ByteLevel":  # is about offsets
        return []
    if kind == "Sequence":   # the last step is the outermost
        return [id for step in reversed(post_processor["processors"]) for id in read_bos(step)]
    pieces = post_processor["single"] if kind == "TemplateProcessing" else []
    texts = [i for i, piece in enumerate(pieces) if "Sequence" in piece]
    if len(texts) != 1:
        raise ValueError("post_processor: only ByteLevel, TemplateProcessing with the text once, "
                         "and a Sequence of these are supported")
    special = post_processor["special_tokens"]
    names = [piece["SpecialToken"]["id"] for piece in pieces[:texts[0]]]
    return [id for name in names for id in special[name]["ids"]]


def read_added_tokens(added_tokens, vocab):
    """-> {text: id}, of tokens marked special and of the others (Qwen3's <think>) alike."""
    special = {}
    for token in added_tokens:
        text, id = token["content"], token["id"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"added_tokens: {text!r} has lstrip, rstrip or single_word set")
        # Whatever the file says, Hugging Face takes the id in the vocabulary or the next free one.
        expected = vocab.get(text, 1 + max([len(vocab) - 1, *special.values()]))
        if id != expected:
            raise ValueError(f"added_tokens: {text!r} has id {id}, but Hugging Face would number "
                             f"it {expected}")
        special[text] = id
    return special


def read_ranks(model, special):
    """-> {token bytes: id}, once it is certain that tiktoken will merge as Hugging Face does.

    tiktoken knows no merges: it joins the neighbours whose joint bytes have the lowest id, and
    takes a piece that is a token as it is. The two agree on every text if merging the bytes of each
    token ends in a listed merge and these merges are listed in the order of the ids: in any text
    the bytes of a token go through the same steps as alone, unless a merge crosses their border.
    Tokens that merging cannot reach need ignore_merges.
    """
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    made = {left + right for left, right in merges}
    ranks = {}
    for text, id in model["vocab"].items():
        if text in special and text not in made and text not in CHAR_TO_BYTE:
            continue  # some vocabularies list special tokens
        if not CHAR_TO_BYTE.keys() >= set(text):
            raise ValueError(f"model.vocab: {text!r} is not written in the byte-level alphabet")
        ranks[bytes(CHAR_TO_BYTE[char] for char in text)] = id
    ids = [*ranks.values(), *(id for text, id in special.items() if text not in model["vocab"])]
    if len(set(ids)) < len(ids):
        raise ValueError("model.vocab: two tokens have the same id")

    places = {merge: i for i, merge in enumerate(merges)}
    previous = -1
    for token in sorted(ranks, key=ranks.get):
        parts = tuple(map(to_text, merge(ranks, token, 2)))
        if len(parts) == 1 or len(parts) > 2 and model.get("ignore_merges"):
            continue
        if parts not in places:
            raise ValueError(f"model.vocab: no merge makes {to_text(token)!r}, which is no byte "
                             "and no added token")
        if places[parts] < previous:
            raise ValueError(f"model.merges: {' '.join(parts)!r} is not in the order of the ids")
        previous = places[parts]
    return ranks


def merge(ranks, piece, until):
    """Merge bytes until so many parts are left, or more if no two neighbours make a token."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > until:
        joined = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
        if min(joined) == math.inf:
            break
        i = joined.index(min(joined))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def to_text(token):
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def hugging_face_files(tokenizer):
    """-> {name: bytes} for a tokenizer that does not come from a folder."""
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    # With the special tokens, which then keep their ids where there are gaps (cl100k_base).
    vocab = {to_text(token): tokenizer.ranks[token] for token in tokens} | tokenizer.special
    parts = [list(map(to_text, merge(tokenizer.ranks, token, 2))) for token in tokens]
    merges = [pair for pair in parts if len(pair) == 2]
    model = dict(type="BPE", ignore_merges=True, vocab=vocab, merges=merges)
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=id, content=text, **plain) for text, id in tokenizer.special.items()]
    split = dict(type="Split", pattern={"Regex": tokenizer.pattern}, behavior="Isolated",
                 invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    steps = dict(type="Sequence", pretokenizers=[split, byte_level])
    source = dict(version="1.0", added_tokens=added, pre_tokenizer=steps, decoder=byte_level,
                  model=model)
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=tokenizer.eos)
    return {name: json.dumps(content).encode() for name, content in zip(FILES, (source, config))}


def train_bpe(texts, vocab_size):
    """Byte-pair encoding -> {token bytes: id}: from 256 bytes on, join the most frequent pair."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(EMBEDDED_PATTERN, text))
    while len(ranks) < vocab_size:
        pairs = Counter()
        for piece, count in counts.items():
            parts = merge(ranks, piece.encode(), 1)
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties: the larger bytes
        ranks[b"".join(best)] = len(ranks)
    return ranks
