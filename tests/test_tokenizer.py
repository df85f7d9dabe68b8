"""The tokenizer against Hugging Face's `tokenizers`, on small ones of each family, trained here."""
import hashlib
import json
import random
import shutil
import unicodedata

import pytest
import regex
import requests
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from data import tokenizer
from data.prompt import stop_ids
from data.tokenizer import BYTE_TO_CHAR, Tokenizer, train_bpe
from tiny import base, corpus, run_here, write_lines

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
QWEN = CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| "
          r"?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
SAMPLES = [
    "Let x = 12 + 345; then 2x = 714.\n\n"
    "So the answer is \\boxed{714}, isn't it? They're sure, I'LL check.",
    "def f(n):\r\n    return [i ** 2 for i in range(n)]  # squares\r\n\t\tpass\n",
    "Die Größe ist 3,5 m. Où est-ce ? Москва — столица. 数学の答えは 42 です。 한국어 각 👩‍🚀🙂🙂",
    "<think>The next word is likely \" the\".</think>\\boxed{ the}  ",
    "     white   space \u2003 \u00a0 runs\u2028",
] * 3
FRAGMENTS = [
    *"aZé0189٣²Ⅷ=+;*\\{}'\"<>|_-ſK", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u0085",
    "\x1c", "   x", "'s", "'S", "'ſ", "'LL", " the", "The answer", "quixotry", "\\boxed{", "12345",
    "<think>", "<|im_end|>", "e\u0301", "\u0323\u0307", "\u1112\u1161\u11ab", "한", "数学", "ﬁ", "👩‍🚀",
]
# All of Unicode that has a meaning, without the marks that are newer than Hugging Face's tables.
OLD = unicodedata.ucd_3_2_0
ASSIGNED = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
CHARS = [char for char in ASSIGNED if unicodedata.combining(char) == OLD.combining(char)]
MARKS = [char for char in CHARS if unicodedata.combining(char)]


def random_text(rng):
    kinds = [FRAGMENTS] * 5 + [CHARS, CHARS, MARKS, [chr(i) for i in range(128)]]
    return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 25)))


RNG = random.Random(0)
TEXTS = SAMPLES[:5] + ["", " ", "\n", "0", " 5", "  5", "a  5\n 6"]
TEXTS += [random_text(RNG) for _ in range(3000)]


def split(pattern, behavior="isolated"):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), byte_level])


def byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def trained(pre_tokenizer, normalizer=None, alphabet=None, special=("<|im_end|>",)):
    """-> the content of a tokenizer.json, trained on SAMPLES."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet,
                                  special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(SAMPLES, trainer)
    tags = ("<think>", "</think>")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in tags])
    return json.loads(tokenizer.to_str())


def llama3():
    """Llama-3's traits: ignore_merges, and a whole word in the vocabulary that no merge reaches."""
    source = trained(split(LLAMA3))
    vocab = source["model"]["vocab"]
    vocab["quixotry"] = len(vocab)
    source["model"]["ignore_merges"] = True
    for token in source["added_tokens"]:
        token["id"] += token["content"] not in vocab  # behind the new word
    return source


def smollm2():
    """Cuts out each digit, and lacks some bytes."""
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    missing = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    alphabet = [char for byte, char in BYTE_TO_CHAR.items() if byte not in missing]
    return trained(digits, alphabet=alphabet)


def gpt2():
    return trained(byte_level())


def qwen():
    return trained(split(QWEN), normalizers.NFC())


def leftovers():
    """Its pattern does not cover digits, spaces and punctuation."""
    return trained(split(r"\p{L}+"))


def lines():
    """A piece of many lines, in which no line is one."""
    return trained(split(r"\s*[\r\n]+(?!\p{N})|\s+(?!\S)|\s+|\S+"))


FAMILIES = {family.__name__: family for family in (gpt2, smollm2, qwen, llama3, leftovers, lines)}


@pytest.fixture(scope="module")
def sources():
    return {name: build() for name, build in FAMILIES.items()}


def write(folder, source, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(source))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def oracle(source):
    """Hugging Face without added tokens: everything is plain text, as for encode(special=False)."""
    return tokenizers.Tokenizer.from_str(json.dumps(source | {"added_tokens": []}))


def assert_same_ids(ours, theirs, texts):
    compared = 0
    for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
        normal = unicodedata.normalize("NFC", text) if ours.nfc else text
        try:
            ids = ours.encode(text)
        except ValueError:  # a missing byte: Hugging Face drops it
            assert len(ours.decode_bytes(encoding.ids)) < len(normal.encode())
            continue
        assert ids == encoding.ids, repr(text)
        assert ours.decode_bytes(ids) == normal.encode()
        compared += 1
    return compared


@pytest.fixture
def fake_corpus(monkeypatch):
    monkeypatch.setattr(tokenizer, "tokenizer_corpus", SAMPLES.copy)


@pytest.fixture
def fake_cl100k(monkeypatch, sources, tmp_path):
    """What tiktoken would download, small: cl100k_base's pattern, and its gap in the ids."""
    ranks = Tokenizer.load(write(tmp_path / "ranks", sources["gpt2"])).ranks
    ranks |= {b"quixotry": 599}  # out of reach of merging
    special = {"<|endoftext|>": 600, "<|fim_prefix|>": 603}
    encoding = tiktoken.Encoding(
        "fake", pat_str=CL100K, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"cl100k_base": encoding}.get)
    return encoding


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_those_of_hugging_face(sources, tmp_path, family):
    ours, theirs = Tokenizer.load(write(tmp_path, sources[family])), oracle(sources[family])
    compared = assert_same_ids(ours, theirs, TEXTS)
    assert compared == len(TEXTS) if family != "smollm2" else 2000 < compared < len(TEXTS)


def test_white_space_before_a_digit_is_a_piece_of_its_own(sources, tmp_path):
    smollm2 = Tokenizer.load(write(tmp_path, sources["smollm2"]))
    pieces = [smollm2.token_bytes(id) for id in smollm2.encode("a   5 12")]
    assert b"".join(pieces) == b"a   5 12" and [b"5", b" ", b"1", b"2"] == pieces[-4:]


def test_special_texts_in_a_document_are_plain_text(sources, tmp_path):
    qwen = Tokenizer.load(write(tmp_path, sources["qwen"]))
    # One is marked special, two are added without the mark, as in Qwen3.
    text = "x<|im_end|><think>y</think>"
    assert not set(qwen.encode(text)) & set(qwen.special.values())
    x, y = qwen.encode("x"), qwen.encode("y")
    ids = [qwen.special[name] for name in ("<|im_end|>", "<think>", "</think>")]
    assert qwen.encode(text, special=True) == [*x, *ids[:2], *y, ids[2]]
    for special in (False, True):
        assert qwen.decode_bytes(qwen.encode(text, special)) == text.encode()


def test_special_tokens_in_a_prompt_are_found_before_nfc(sources, tmp_path):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(sources["qwen"]))
    ours = Tokenizer.load(write(tmp_path, sources["qwen"]))
    # NFC would melt ">" and U+0338 into one character if it came before the split.
    texts = ["<think>\u0338", "<|im_end|>e\u0301</think>"]
    for text in texts + [text + "<think>" + text for text in TEXTS[:500]]:
        assert ours.encode(text, special=True) == theirs.encode(text).ids, repr(text)


def test_the_longer_of_two_special_tokens_wins(sources, tmp_path):
    source = trained(byte_level(), special=("<|a|>", "<|a|><|b|>"))
    ours = Tokenizer.load(write(tmp_path, source))
    assert ours.encode("<|a|><|b|>", special=True) == [1]


def test_an_added_token_that_merges_make_is_merged_in_plain_text(sources, tmp_path):
    source = json.loads(json.dumps(sources["gpt2"]))
    again = dict(content="an", id=source["model"]["vocab"]["an"])
    source["added_tokens"].append(source["added_tokens"][-1] | again)
    ours = Tokenizer.load(write(tmp_path, source))
    assert ours.encode("an") == ours.encode("an", special=True) == [ours.special["an"]]
    assert_same_ids(ours, oracle(source), TEXTS[:300])


def test_a_byte_without_a_token_is_named(sources, tmp_path):
    smollm2 = Tokenizer.load(write(tmp_path, sources["smollm2"]))
    with pytest.raises(ValueError, match="0x06 at offset 3 "):
        smollm2.encode("é \x06 x")
    with pytest.raises(ValueError, match="0x06 at offset 8 "):
        smollm2.encode("<think>a\x06", special=True)
    # The id that tiktoken has for such a byte.
    with pytest.raises(ValueError, match=f"token id {smollm2.vocab_size} "):
        smollm2.token_bytes(smollm2.vocab_size)


def test_a_lone_surrogate_is_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="position 2"):
        Tokenizer.load(write(tmp_path, sources["gpt2"])).encode("ab\ud800")


def test_half_a_character_comes_back_as_raw_bytes(sources, tmp_path):
    gpt2 = Tokenizer.load(write(tmp_path, sources["gpt2"]))
    ids = gpt2.encode("\U00010300")  # not in the samples: four tokens of one byte
    assert [gpt2.token_bytes(id) for id in ids] == [b"\xf0", b"\x90", b"\x8c", b"\x80"]
    with pytest.raises(UnicodeDecodeError):
        gpt2.token_bytes(ids[0]).decode()


NUMBERS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level()])


def lowercase(source): source["normalizer"] = {"type": "Lowercase"}
def wordpiece(source): source["model"]["type"] = "WordPiece"
def dropout(source): source["model"]["dropout"] = 0.1
def suffix(source): source["model"]["end_of_word_suffix"] = "</w>"
def no_steps(source): source["pre_tokenizer"] = None
def whole_numbers(source): source["pre_tokenizer"] = json.loads(NUMBERS.__getstate__())
def whitespace(source): source["pre_tokenizer"] = {"type": "Whitespace"}
def prefix_space(source): source["pre_tokenizer"]["add_prefix_space"] = True
def removed(source): source["pre_tokenizer"] = json.loads(split(r"\s+", "removed").__getstate__())
def swapped_merges(source): source["model"]["merges"][5:7] = source["model"]["merges"][6:4:-1]
def unmade_token(source): source["model"]["vocab"]["qqqq"] = 499
def foreign_letter(source): source["model"]["vocab"]["▁the"] = 499
def repeated_id(source): source["model"]["vocab"]["an"] = source["model"]["vocab"]["hi"]
def strip(source): source["added_tokens"][-1]["lstrip"] = True
def renumbered(source): source["added_tokens"][-1]["id"] += 5


@pytest.mark.parametrize("spoil, field", [
    (lowercase, "normalizer"),
    (wordpiece, "model.type"),
    (dropout, "model.dropout"),
    (suffix, "model.end_of_word_suffix"),
    (no_steps, "pre_tokenizer"),
    (whitespace, "pre_tokenizer"),
    (prefix_space, "pre_tokenizer"),
    (removed, "pre_tokenizer"),
    (swapped_merges, "model.merges"),
    (unmade_token, "model.vocab"),
    (foreign_letter, "model.vocab"),
    (repeated_id, "model.vocab: two tokens have the same id"),
    (whole_numbers, "pre_tokenizer"),
    (strip, "added_tokens"),
    (renumbered, "added_tokens"),
])
def test_what_cannot_be_converted_exactly_is_refused_by_field(sources, tmp_path, spoil, field):
    source = json.loads(json.dumps(sources["gpt2"]))
    if spoil in (unmade_token, foreign_letter):
        del source["added_tokens"][1:]  # their ids would be wrong
    spoil(source)
    with pytest.raises(ValueError, match=f"tokenizer.json: {field}") as error:
        Tokenizer.load(write(tmp_path, source))
    assert "\n" not in str(error.value)


def test_a_token_that_no_merge_makes_needs_ignore_merges(sources, tmp_path):
    source = json.loads(json.dumps(sources["llama3"]))
    assert len(Tokenizer.load(write(tmp_path, source)).encode("quixotry")) == 1
    source["model"]["ignore_merges"] = False
    with pytest.raises(ValueError, match="model.vocab: no merge makes 'quixotry'"):
        Tokenizer.load(write(tmp_path, source))


def test_load_errors_say_what_to_do(tmp_path, monkeypatch):
    complaint = "'gpt-2': no such folder, and not one of embedded, .*gpt2"
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.load("gpt-2")
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in this folder$"):
        Tokenizer.load(tmp_path)
    (tmp_path / "latest").write_text("step_000150")
    with pytest.raises(FileNotFoundError, match="its newest checkpoint is .*/step_000150"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="/tokenizer.json: broken JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer.json: expected a JSON object"):
        Tokenizer.load(tmp_path)

    def offline(name):
        raise requests.exceptions.ConnectionError("Max retries exceeded")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.load("gpt2")


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", "[]"), ("tokenizer.json", "[" * 200_000), ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", "[]"), ("chat_template.jinja", b"\xff")])
def test_a_damaged_file_is_named(sources, tmp_path, name, content):
    write(tmp_path, sources["qwen"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"/{name}: "):
        Tokenizer.load(tmp_path)


def test_config_names_the_eos_before_any_guess(sources, tmp_path):
    def load(**config):
        return Tokenizer.load(write(tmp_path, sources["qwen"], **config))

    assert load().eos_id == 0  # <|im_end|> is a known one
    assert load(eos_token="</think>").eos_id == load().special["</think>"]
    assert load(eos_token={"content": "<think>"}).eos_id == load().special["<think>"]
    with pytest.raises(ValueError, match="tokenizer_config.json or .*: eos_token: '</s>'"):
        load(eos_token="</s>")
    nameless = Tokenizer.load(write(tmp_path / "nameless", trained(byte_level(), special=())))
    with pytest.raises(ValueError, match="no known end of text"):
        nameless.eos_id


def test_a_loaded_folder_is_saved_byte_for_byte_after_it_has_moved(sources, tmp_path):
    config = dict(eos_token="</think>", model_max_length=8192)
    source = write(tmp_path / "source", sources["qwen"], **config)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = Tokenizer.load(source)
    names = sorted(path.name for path in source.iterdir())
    contents = [(source / name).read_bytes() for name in names]
    source.rename(tmp_path / "moved")
    tokenizer.save(tmp_path / "copy")
    assert [(tmp_path / "copy" / name).read_bytes() for name in names] == contents
    again = Tokenizer.load(tmp_path / "copy")
    assert (again.fingerprint, again.eos_id) == (tokenizer.fingerprint, tokenizer.eos_id)


# ---- long runs ----

@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_cut_by_the_other_engine_has_the_same_ids(sources, tmp_path, monkeypatch, family):
    ours, theirs = Tokenizer.load(write(tmp_path, sources[family])), oracle(sources[family])
    monkeypatch.setattr(tokenizer, "LONG", 1)  # every text has a long run
    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary", None)
    assert assert_same_ids(ours, theirs, [text for text in TEXTS if text]) > 2000
    # Where runs are long and short, as with a real limit.
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "LONG", 4)
    runs = ["".join(RNG.choice(FRAGMENTS) * RNG.randint(1, 12) for _ in range(6)) for _ in range(800)]
    assert assert_same_ids(ours, theirs, runs) > 200


def check_long_run(source, folder, run):
    text = f"So {run * (1_100_000 // len(run))}x 5"
    ours, theirs = Tokenizer.load(write(folder, source)), oracle(source)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("family, run", [
    ("gpt2", " "), ("smollm2", "\u2003"), ("qwen", "\t"), ("llama3", "\n "), ("leftovers", "=!"),
    ("lines", " " * 999 + "\n")])
def test_a_million_characters_of_a_kind_are_encoded(sources, tmp_path, family, run):
    check_long_run(sources[family], tmp_path, run)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", [" ", "\n", " \n\t", "\r\n", "a", "the", "-", "7", "数", "\u0301"])
def test_a_million_characters_of_any_kind_are_encoded(sources, tmp_path, family, run):
    check_long_run(sources[family], tmp_path, run)


def test_a_letter_with_very_many_marks_is_normalised_in_linear_time():
    rng = random.Random(2)
    for _ in range(300):
        some = rng.sample(MARKS, 5) + ["\u0903", "\u034f"]  # these two are of class 0
        text = "e" + "".join(rng.choice(some) for _ in range(30))
        ordered = regex.sub(r"\p{M}{2,}+", tokenizer.in_order, text)
        assert unicodedata.normalize("NFC", ordered) == unicodedata.normalize("NFC", text)
    assert tokenizer.to_nfc("e" + "\u0301\u0323" * 500_000) == "\u1eb9" + "\u0323" * 499_999 + "\u0301" * 500_000


def test_the_two_engines_agree_about_every_assigned_character():
    single = {bytes([byte]): byte for byte in range(256)}
    for kind in (r"\s", r"\p{L}", r"\p{N}", r"\p{M}", r"\p{P}", r"\p{S}"):
        encoding = tiktoken.Encoding("kind", pat_str=f"{kind}+", mergeable_ranks=single,
                                     special_tokens={})
        found = bytes(encoding.encode_ordinary("".join(ASSIGNED))).decode()
        assert found == "".join(regex.findall(kind, "".join(ASSIGNED))), kind


def test_an_unassigned_character_beside_a_long_run_is_refused(sources, tmp_path):
    gpt2 = Tokenizer.load(write(tmp_path, sources["gpt2"]))
    assert gpt2.decode_bytes(gpt2.encode("\u0378" + " " * 1000)).decode() == "\u0378" + " " * 1000
    with pytest.raises(ValueError, match=r"U\+0378, .* no exact way"):
        gpt2.encode("\u0378" + " " * 200_000)


# ---- what the folder says beside the vocabulary ----

TEXT = {"Sequence": dict(id="A", type_id=0)}
OFFSETS = dict(type="ByteLevel", add_prefix_space=True, trim_offsets=False, use_regex=True)


def around(*pieces):
    """A TemplateProcessing; pieces: TEXT, or the text of a special token."""
    single = [piece if piece is TEXT else {"SpecialToken": dict(id=piece, type_id=0)}
              for piece in pieces]
    ids = {"<|im_end|>": 0, "<|bos|>": 1}
    special = {text: dict(id=text, ids=[id], tokens=[text]) for text, id in ids.items()}
    pair = [*single, {"Sequence": dict(id="B", type_id=1)}]
    return dict(type="TemplateProcessing", single=single, pair=pair, special_tokens=special)


def in_turn(*steps):
    return dict(type="Sequence", processors=list(steps))


@pytest.mark.parametrize("post_processor, bos", [
    (None, []),
    (OFFSETS, []),
    (around(TEXT), []),
    (around("<|bos|>", TEXT), [1]),
    (around("<|bos|>", TEXT, "<|im_end|>"), [1]),
    (around(TEXT, "<|im_end|>"), []),
    (in_turn(OFFSETS, around("<|bos|>", TEXT)), [1]),
    (in_turn(around("<|bos|>", TEXT), around("<|im_end|>", "<|bos|>", TEXT)), [0, 1, 1]),
])
@pytest.mark.parametrize("asked", [None, True, False])
def test_bos_is_what_transformers_puts_in_front(tmp_path, post_processor, bos, asked):
    transformers = pytest.importorskip("transformers")
    source = trained(split(LLAMA3), special=("<|im_end|>", "<|bos|>"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|bos|>",
                  eos_token="<|im_end|>", **({} if asked is None else dict(add_bos_token=asked)))
    folder = write(tmp_path, source | dict(post_processor=post_processor), **config)
    ours = Tokenizer.load(folder)
    assert ours.bos == bos
    for text in ("", "Hi", SAMPLES[0]):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
        # An EOS behind the text is not for texts that go on.
        behind = len(theirs) - len(ours.bos + ours.encode(text))
        assert ours.bos + ours.encode(text) + [0] * behind == theirs and behind in (0, 1)


@pytest.mark.parametrize("post_processor", [
    dict(type="RobertaProcessing", sep=["x", 0], cls=["x", 0]),
    dict(type="BertProcessing", sep=["x", 0], cls=["x", 0]),
    around("<|bos|>"), around(TEXT, TEXT), in_turn(OFFSETS, around(TEXT, TEXT))])
def test_other_post_processors_are_refused(sources, tmp_path, post_processor):
    folder = write(tmp_path, sources["gpt2"] | dict(post_processor=post_processor))
    with pytest.raises(ValueError, match="tokenizer.json: post_processor: only ByteLevel, "):
        Tokenizer.load(folder)


@pytest.mark.parametrize("config, generation, stops", [
    ({}, None, []),
    (dict(eos_token_id=7), None, [7]),
    (dict(eos_token_id=[7, 9]), dict(eos_token_id=11), [7, 9, 11]),
    (dict(eos_token_id=None), dict(eos_token_id=[11, 7]), [7, 11]),
    (dict(eos_token_id=[-1, 899, 900, True, "x"]), {}, [899]),  # of 900 rows
    (None, dict(eos_token_id=[7]), [7]),
])
def test_every_id_that_a_config_names_stops(sources, tmp_path, config, generation, stops):
    folder = write(tmp_path, sources["qwen"], eos_token="</think>")
    for name, content in (("config", config), ("generation_config", generation)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(dict(vocab_size=900) | content))
    ours = Tokenizer.load(folder)
    known = [ours.special["<|im_end|>"], ours.special["</think>"]]
    assert stop_ids(ours) == sorted({*known, *stops})


@pytest.mark.parametrize("config", [{}, dict(eos_token="<think>"), dict(added_tokens_decoder={})])
def test_an_older_file_names_the_eos_where_transformers_reads_it(sources, tmp_path, config):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path, sources["qwen"], **config)
    older = dict(eos_token=dict(content="</think>", lstrip=False, rstrip=False, normalized=False))
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    expected = transformers.AutoTokenizer.from_pretrained(folder).eos_token
    assert Tokenizer.load(folder).eos == (expected or "<|im_end|>")  # else a guess


def test_a_config_names_the_stop_where_the_tokenizer_has_no_end(tmp_path):
    folder = write(tmp_path, trained(byte_level(), special=()))
    with pytest.raises(ValueError, match="no known end of text"):
        stop_ids(Tokenizer.load(folder))
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert stop_ids(Tokenizer.load(folder)) == [5]


def test_an_embedding_without_rows_for_all_ids_is_refused(sources, tmp_path):
    folder = write(tmp_path, sources["qwen"])
    ids = Tokenizer.load(folder, for_model=True).vocab_size  # no model is there
    (folder / "config.json").write_text(json.dumps(dict(vocab_size=ids)))
    Tokenizer.load(folder, for_model=True)
    (folder / "config.json").write_text(json.dumps(dict(vocab_size=ids - 1)))
    assert Tokenizer.load(folder).vocab_size == ids
    complaint = f"ids up to {ids - 1} \\('</think>'\\), config.json says vocab_size {ids - 1}: a token"
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.load(folder, for_model=True)


@pytest.mark.parametrize("command", [
    "data/filter.py --corpus {corpus} --proxy {bad}",
    "data/warmstart.py --corpus {corpus} --proxy {bad} --out {out}",
    "data/warmstart.py --solutions {data} --proxy {bad} --template chat --out {out}",
    "train_ntp.py --corpus {corpus} --init {bad} --out-dir {out}",
    "train_rpt.py --corpus {corpus} --init {bad} --out-dir {out}",
    "train_rpt.py --objective answers --data {data} --template chat --init {bad} --out-dir {out}",
    "eval.py lm --corpus {corpus} --checkpoints {bad} --out {out}",
    "sample.py --model {bad} --prompt x",
    "paper/answers.py --data {data} --checkpoints {bad} --out {out}",
    "paper/choices.py --data {data} --checkpoints {bad} --out {out}",
    "paper/own_rollouts.py --corpus {corpus} --init {bad} --out {out}"])
def test_every_command_says_in_one_line_that_rows_are_missing(corpus, base, tmp_path, command):
    bad, out = shutil.copytree(base, tmp_path / "bad"), tmp_path / "out"
    source = json.loads((bad / "tokenizer.json").read_text())
    last = max(token["id"] for token in source["added_tokens"])
    source["added_tokens"].append(source["added_tokens"][-1] | dict(id=last + 1, content="<|pad|>"))
    (bad / "tokenizer.json").write_text(json.dumps(source))
    data = write_lines(tmp_path / "data.jsonl", dict(question="Q", options=["a", "b"], answer="a"))
    words = command.format(bad=bad, out=out, data=data, corpus=corpus.folder).split()
    code, _, error = run_here(*words)
    assert code == 2 and error.count("\n") == 1 and f"ids up to {last + 1} ('<|pad|>')" in error
    assert not out.exists()


def with_bos(source): source["post_processor"] = around("<|im_end|>", TEXT)
def without_bos(source): source["post_processor"] = around(TEXT)
def no_nfc(source): source["normalizer"] = None
def without_added(source): del source["added_tokens"][1:]
def fewer_special(source): source["added_tokens"].pop()


def other_pattern(source):
    source["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA3


def without_added_and_rank(source):
    without_added(source)
    source["model"]["vocab"].pop("".join(source["model"]["merges"].pop()))


def test_every_difference_changes_the_fingerprint(sources, tmp_path):
    same = Tokenizer.load(write(tmp_path, sources["qwen"])).fingerprint
    fingerprints = {same}
    changes = [no_nfc, other_pattern, fewer_special, without_added, without_added_and_rank,
               with_bos]
    for change in changes:
        source = json.loads(json.dumps(sources["qwen"]))
        change(source)
        fingerprints.add(Tokenizer.load(write(tmp_path, source)).fingerprint)
    assert len(fingerprints) == 1 + len(changes)
    source = json.loads(json.dumps(sources["qwen"]))
    without_bos(source)
    assert Tokenizer.load(write(tmp_path, source)).fingerprint == same
    # Without a BOS it is the one that corpora had before BOS counted.
    ours = Tokenizer.load(tmp_path)
    ranks = sorted((id, token.hex()) for token, id in ours.ranks.items())
    canonical = json.dumps([ours.pattern, ours.nfc, ranks, sorted(ours.special.items())])
    assert same == hashlib.sha256(canonical.encode()).hexdigest()
    # The same ids, another end.
    other_end = Tokenizer.load(write(tmp_path, sources["qwen"], eos_token="</think>"))
    assert other_end.fingerprint == same


def test_embedded_saved_and_loaded_is_the_same_here_and_in_hugging_face(fake_corpus, tmp_path):
    embedded = Tokenizer.load("embedded")
    embedded.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == embedded.fingerprint == Tokenizer.load("embedded").fingerprint
    assert again.eos_id == embedded.eos_id == embedded.special["<|end|>"] == embedded.vocab_size - 1
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert again.encode(text) == embedded.encode(text)
        assert embedded.encode(text, special=True) == theirs.encode(text).ids, repr(text)
    plain = oracle(json.loads((tmp_path / "tokenizer.json").read_text()))
    assert assert_same_ids(embedded, plain, TEXTS) == len(TEXTS)


def test_named_encoding_keeps_its_pattern_and_its_id_gaps_in_hugging_face(fake_cl100k, tmp_path):
    named = Tokenizer.load("cl100k_base")
    named.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == named.fingerprint and again.eos_id == named.eos_id == 600
    assert again.vocab_size == named.vocab_size == 604
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    for text in [*TEXTS, "1234567", "quixotry", "x<|endoftext|>y<|fim_prefix|>"]:
        assert named.encode(text) == again.encode(text) == fake_cl100k.encode_ordinary(text)
        assert named.encode(text, special=True) == theirs.encode(text).ids, repr(text)
    with pytest.raises(ValueError, match="token id 601 "):  # in the gap
        named.token_bytes(601)


def test_embedded_keeps_digits_and_punctuation_apart_and_boxed_together(fake_corpus):
    embedded = Tokenizer.load("embedded")
    pieces = [embedded.token_bytes(id) for id in embedded.encode("the answer =; +12*\\boxed{7}")]
    assert pieces == b"the| answer| |=|;| |+|1|2|*|\\boxed{|7|}".split(b"|")


def test_bpe_merges_computed_by_hand():
    # "ab" x3 and " ab" x2: a+b is seen 5 times, then " "+"ab" twice; no words or digits are joined.
    ranks = train_bpe(["ab", "ab", "ab12 ab12 ab"], vocab_size=512)
    assert {token: id for token, id in ranks.items() if id >= 256} == {b"ab": 256, b" ab": 257}
    # All pairs once: ties go to the larger bytes, so "cd" comes before "ab", and " cd" last.
    ranks = train_bpe(["ab cd"], vocab_size=512)
    learnt = {token: id for token, id in ranks.items() if id >= 256}
    assert learnt == {b"cd": 256, b"ab": 257, b" cd": 258}
