"""Text to token ids and back, exactly as a checkpoint's own tokenizer does it, with raw bytes for every id.

    Tokenizer.load("gpt2")          an encoding that tiktoken knows (downloaded once)
    Tokenizer.load("some/folder")   a Hugging Face tokenizer.json: GPT-2, SmolLM2, Qwen2/3, Llama-3, R1
    Tokenizer.load("embedded")      a few hundred tokens, trained in milliseconds on the corpus of this repo

All three run on tiktoken. A tokenizer.json is converted only where that is exact, else refused by field. NFC
is Python's; Hugging Face's Unicode tables are older and order a hundred marks of recent scripts differently.
Not done here: chat templates, truncation, padding, and the BOS that some post-processors put in front.
"""
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from functools import cached_property
from pathlib import Path

import regex  # comes with tiktoken; unlike `re` it knows \p{L}
import tiktoken

# How text is cut into pieces; no token crosses a cut.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out each digit, then applies GPT-2's pattern to what lies between. As one pattern: a digit
# stands alone, and to the white space before it a digit looks like the end of the text.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Ours: `\boxed{` is one piece, a word keeps its leading space, digits and punctuation stand alone.
EMBEDDED_PATTERN = r"\\\p{L}+\{?| ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
EMBEDDED_SPECIAL = ("<think>", "</think>", "<|end|>")

FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# The end of a text where no tokenizer_config.json names it: the first of these that the tokenizer has.
KNOWN_EOS = ("<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<｜end▁of▁sentence｜>", "</s>")

# tokenizer.json writes bytes as printable characters: those that are stay, the rest become U+0100 and up.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte if byte in PRINTABLE else 256 + OTHERS.index(byte)) for byte in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


class Tokenizer:
    def __init__(self, ranks, special, pattern, nfc=False, eos=None, files=None):
        """ranks: {token bytes: id}, the lowest id merges first; special: {text: id}; files: {name: bytes}."""
        self.ranks, self.special, self.pattern, self.nfc, self.files = ranks, special, pattern, nfc, files
        self.eos = eos or next((text for text in KNOWN_EOS if text in special), None)
        self.vocab_size = 1 + max([*ranks.values(), *special.values()])
        self._bytes = {id: text.encode() for text, id in special.items()}
        self._bytes |= {id: token for token, id in ranks.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self._special_texts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # tiktoken wants all 256 bytes: those the vocabulary lacks get ids above it, which encode() refuses.
        absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        self._encoding = tiktoken.Encoding(
            "nanorpt",
            # What the pattern leaves over is a piece for Hugging Face; tiktoken alone would drop it.
            pat_str=rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+",
            mergeable_ranks=ranks | {byte: self.vocab_size + i for i, byte in enumerate(absent)},
            special_tokens={},  # encode() places them itself
        )

    @classmethod
    def load(cls, name_or_folder):
        name, folder = str(name_or_folder), Path(name_or_folder)
        if name == "embedded":
            from data.toy import tokenizer_corpus  # here: the other two do not need the corpus
            ranks = train_bpe(tokenizer_corpus(), vocab_size=512)
            special = {text: len(ranks) + i for i, text in enumerate(EMBEDDED_SPECIAL)}
            return cls(ranks, special, EMBEDDED_PATTERN)
        if folder.is_dir():
            return cls(**read_folder(folder))
        if name not in tiktoken.list_encoding_names():
            known = ", ".join(["embedded", *tiktoken.list_encoding_names()])
            raise ValueError(f"tokenizer '{name}': no such folder, and not one of {known}")
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError:
            raise ValueError(f"tokenizer '{name}': tiktoken cannot download it; load it once on a network "
                             "with TIKTOKEN_CACHE_DIR set, and bring that folder here") from None
        # cl100k_base has {1,3}+, in Hugging Face's regex engine ({1,3})+; without the + both mean the same.
        pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")
        return cls(encoding._mergeable_ranks, encoding._special_tokens, pattern)

    def encode(self, text, special=False):
        """Text -> ids. A special token's text is plain text unless `special` is set (prompt templates)."""
        text.encode()  # a lone surrogate stops here with its position; tiktoken would make it U+FFFD
        ids = []
        for i, part in enumerate(self._special_texts.split(text) if special and self.special else [text]):
            if i % 2:  # the odd parts are what the split matched
                ids.append(self.special[part])
            else:
                part = unicodedata.normalize("NFC", part) if self.nfc else part
                ids += self._encoding.encode_ordinary(part)
        if max(ids, default=0) >= self.vocab_size:
            at = next(i for i, id in enumerate(ids) if id >= self.vocab_size)
            byte, offset = self._encoding.decode_single_token_bytes(ids[at]), len(self.decode_bytes(ids[:at]))
            raise ValueError(f"byte 0x{byte.hex()} at offset {offset} of the text: the tokenizer lacks it")
        return ids

    def token_bytes(self, id):
        """Raw bytes, never str: one token may hold half of a UTF-8 character."""
        if id not in self._bytes:
            raise ValueError(f"token id {id} is not in the tokenizer's vocabulary of {self.vocab_size}")
        return self._bytes[id]

    def decode_bytes(self, ids):
        """Raw bytes. A model with more rows than its tokenizer has ids may draw one of those: U+FFFD."""
        return b"".join(self._bytes.get(id, b"\xef\xbf\xbd") for id in ids)

    @property
    def eos_id(self):
        if self.eos is None:
            raise ValueError("no known end of text: name one of the added tokens in tokenizer_config.json")
        return self.special[self.eos]

    @cached_property
    def fingerprint(self):
        """Corpora and checkpoints carry it: equal fingerprints mean equal ids for every text."""
        ranks = sorted((id, token.hex()) for token, id in self.ranks.items())
        canonical = json.dumps([self.pattern, self.nfc, ranks, sorted(self.special.items())])
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder):
        """Write the files that load() and Hugging Face read, those of a loaded folder byte for byte."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in (self.files or hugging_face_files(self)).items():
            (Path(folder) / name).write_bytes(content)


def read_folder(folder):
    """A Hugging Face folder -> the arguments of Tokenizer, or an error that names the file and the field."""
    files = {name: (folder / name).read_bytes() for name in FOLDER_FILES if (folder / name).exists()}
    if "tokenizer.json" not in files:
        raise FileNotFoundError(f"{folder}: there is no tokenizer.json in this folder")

    def refuse(field, why, name="tokenizer.json"):
        raise ValueError(f"{folder / name}: {field}: {why}")

    try:
        source, config = (json.loads(files.get(name, "{}")) for name in FOLDER_FILES[:2])
    except ValueError as error:
        raise ValueError(f"{folder}: tokenizer.json or tokenizer_config.json is not JSON: {error}") from None
    model, normalizer = source["model"], source.get("normalizer")
    if model.get("type") != "BPE":
        refuse("model.type", "only BPE is supported")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            refuse(f"model.{field}", "must be unset")
    if normalizer not in (None, {"type": "NFC"}):
        refuse("normalizer", "only null and NFC are supported")
    pattern = read_pattern(source.get("pre_tokenizer") or {}, refuse)
    special = read_added_tokens(source.get("added_tokens", []), model["vocab"], refuse)
    ranks = read_ranks(model, special, refuse)
    eos = config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos and eos not in special:
        refuse("eos_token", f"{eos!r} is not among tokenizer.json's added_tokens", "tokenizer_config.json")
    return dict(ranks=ranks, special=special, pattern=pattern, nfc=bool(normalizer), eos=eos, files=files)


def read_pattern(pre_tokenizer, refuse):
    """-> the regex that cuts text into the same pieces as these steps."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds, first, last = [step.get("type") for step in steps], steps[0], steps[-1]
    own_regex = last.get("use_regex", True)
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True):
        if kinds == ["ByteLevel"] and own_regex:
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and own_regex and first.get("individual_digits"):
            return DIGITS_PATTERN
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        if kinds == ["Split", "ByteLevel"] and not own_regex and isolated and "Regex" in first["pattern"]:
            return first["pattern"]["Regex"]
    refuse("pre_tokenizer", "only ByteLevel without prefix space is supported: alone, after Digits "
           "(individual), or with use_regex false after Split (Regex, Isolated)")


def read_added_tokens(added_tokens, vocab, refuse):
    """-> {text: id}, for tokens marked special and for the others (Qwen3's <think>) alike."""
    special = {}
    for token in added_tokens:
        text, id = token["content"], token["id"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            refuse("added_tokens", f"{text!r} has lstrip, rstrip or single_word set")
        # Hugging Face takes the id from the vocabulary, else the next free one, whatever the file says.
        expected = vocab.get(text, 1 + max([len(vocab) - 1, *special.values()]))
        if id != expected:
            refuse("added_tokens", f"{text!r} has id {id}, but Hugging Face would number it {expected}")
        special[text] = id
    return special


def read_ranks(model, special, refuse):
    """-> {token bytes: id}, after making sure that tiktoken will merge as Hugging Face does.

    tiktoken knows no merges: it joins the neighbours whose joint bytes have the lowest id, and takes a piece
    that is a token as it is. The two agree on every text if merging the bytes of each token ends in a listed
    merge and these merges stand in the order of the ids: in any text the bytes of a token go through the same
    steps as alone, unless a merge crosses their border. Tokens that merging cannot reach need ignore_merges.
    """
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    made = {left + right for left, right in merges}
    ranks = {}
    for text, id in model["vocab"].items():
        if text in special and text not in made and text not in CHAR_TO_BYTE:
            continue  # some vocabularies list the special tokens too
        if not CHAR_TO_BYTE.keys() >= set(text):
            refuse("model.vocab", f"{text!r} is not written in the byte-level alphabet")
        ranks[bytes(CHAR_TO_BYTE[char] for char in text)] = id
    ids = [*ranks.values(), *(id for text, id in special.items() if text not in model["vocab"])]
    if len(set(ids)) < len(ids):
        refuse("model.vocab", "two tokens have the same id")

    position, previous = {merge: i for i, merge in enumerate(merges)}, -1
    for token in sorted(ranks, key=ranks.get):
        parts = tuple(map(to_text, last_merge(ranks, token)))
        if len(parts) == 1 or len(parts) > 2 and model.get("ignore_merges"):
            continue
        if parts not in position:
            refuse("model.vocab", f"no merge makes {to_text(token)!r}, which is no byte and no added token")
        if position[parts] < previous:
            refuse("model.merges", f"{' '.join(parts)!r} is not in the order of the ids")
        previous = position[parts]
    return ranks


def last_merge(ranks, token):
    """Merge a token's bytes until two parts are left, or more if no two neighbours make a token."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
        if min(joined) == math.inf:
            break
        i = joined.index(min(joined))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def to_text(token):
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def hugging_face_files(tokenizer):
    """-> {name: bytes} for a tokenizer that did not come from a folder."""
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    merges = [list(map(to_text, last_merge(tokenizer.ranks, token))) for token in tokens]
    model = dict(
        type="BPE",
        ignore_merges=True,  # as tiktoken: a piece that is a token is taken as it is
        # The special tokens are listed too, which keeps their ids where there are gaps (cl100k_base).
        vocab={to_text(token): tokenizer.ranks[token] for token in tokens} | tokenizer.special,
        merges=[parts for parts in merges if len(parts) == 2],
    )
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    split = dict(type="Split", pattern={"Regex": tokenizer.pattern}, behavior="Isolated", invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    source = dict(
        version="1.0",
        added_tokens=[dict(id=id, content=text, **plain) for text, id in tokenizer.special.items()],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        decoder=byte_level,
        model=model,
    )
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=tokenizer.eos)
    return {name: json.dumps(content).encode() for name, content in zip(FOLDER_FILES, (source, config))}


def train_bpe(texts, vocab_size):
    """Byte-pair encoding: from the 256 bytes on, join the most frequent pair, repeat. -> {token bytes: id}"""
    ranks = {bytes([byte]): byte for byte in range(256)}
    counts = Counter(piece for text in texts for piece in regex.findall(EMBEDDED_PATTERN, text))
    words = {tuple(bytes([byte]) for byte in piece.encode()): count for piece, count in counts.items()}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties go to the larger bytes, not to chance
        ranks[b"".join(best)] = len(ranks)
        words = {join(word, best): count for word, count in words.items()}
    return ranks


def join(word, pair):
    joined = []
    for part in word:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
