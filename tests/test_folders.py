"""Folders of Hugging Face: what they say survives, ten shapes from loading to saving, and copies in another dtype.

    pytest -s tests/test_folders.py     prints the table of the ten shapes
"""
import json
import os
import shutil
import stat
import weakref
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.tokenizer import Tokenizer
from kernels.attention import make_layout
from model import GPT
from objectives import rpt
from plumbing import hf
from sample import generate
from test_model import edit_config
from test_runs import command
from tiny import base, corpus, run_here

TOKENS = torch.arange(48)[None] * 37 % 405


def write_folder(folder, fields):
    """What transformers writes for this config.json, with weights that all matter and the embedded tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    model.save_pretrained(folder)
    Tokenizer.load("embedded").save(folder)
    return folder


def read_json(path):
    return json.loads(path.read_text())


def run_one_step(corpus, source, run, **flags):
    """A step of train_rpt.py whose rewards differ -> the folder that it saves."""
    flags = dict(steps=1, batch_size=2, rollouts=3, max_new_tokens=6, dynamic_sampling_from=-1) | flags
    with patch.object(rpt.Objective, "score", score_by_last_token):
        code, out, err = run_here(*command("train_rpt.py", corpus, source, run, **flags))
    assert code == 0, err
    return run / (run / "latest").read_text()


def score_by_last_token(self, policy, groups):
    for group in groups:
        group.predictions = [None] * len(group.rollouts)
        group.rewards = [rollout.tokens[-1] / 405 for rollout in group.rollouts]


# ---- ten shapes --------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=405, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, hidden_act="silu", use_cache=True, initializer_range=0.02)
LLAMA = SIZES | dict(
    model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, mlp_bias=False, pretraining_tp=1,
    attention_dropout=0.0, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
LLAMA3 = LLAMA | dict(
    max_position_embeddings=131072, rope_theta=500000.0, eos_token_id=[380, 388, 389], bos_token_id=379,
    rope_scaling=dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0,
                      original_max_position_embeddings=8192, rope_type="llama3"))
QWEN = SIZES | dict(
    model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=387, eos_token_id=389,
    max_position_embeddings=32768, max_window_layers=28, rms_norm_eps=1e-6, rope_theta=1000000.0,
    sliding_window=131072, tie_word_embeddings=False, use_sliding_window=False)
SHAPES = {
    "Llama 2": (4096, LLAMA | dict(max_position_embeddings=4096, num_key_value_heads=4, rope_scaling=None)),
    "Llama 3.1": (8192, LLAMA3),
    "Llama 3.2": (8192, LLAMA3 | dict(head_dim=16, tie_word_embeddings=True,
                                      rope_scaling=LLAMA3["rope_scaling"] | dict(factor=32.0))),
    "Mistral": (32768, SIZES | dict(
        model_type="mistral", architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False)),
    "Qwen2.5": (32768, QWEN | dict(tie_word_embeddings=True)),
    "Qwen2.5 long": (32768, QWEN | dict(rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768,
                                                          type="yarn"))),
    "Qwen3": (40960, QWEN | dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=16,
        max_position_embeddings=40960, rope_scaling=None, sliding_window=None, tie_word_embeddings=True)),
    "R1-Distill-Qwen": (131072, QWEN | dict(max_position_embeddings=131072, rope_theta=10000, sliding_window=4096,
                                            use_mrope=False, bos_token_id=388, eos_token_id=388)),
    "R1-Distill-Llama": (8192, LLAMA3 | dict(eos_token_id=388)),
    "SmolLM2": (8192, LLAMA | dict(max_position_embeddings=8192, rope_theta=130000, tie_word_embeddings=True,
                                   num_attention_heads=3, num_key_value_heads=1, rope_interleaved=False,
                                   is_llama_config=True)),
}


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print("\nshape              load   short    long     greedy  RPT step  opens in transformers")
    for name, short, long in rows:
        print(f"{name:18} yes    {short:.0e}    {long:.0e}    same    yes       same logits, same fields")


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def logits_at(model, positions):
    """Ours or transformers' logits for tokens that stand at these places."""
    if isinstance(model, GPT):
        layout = make_layout([(TOKENS.shape[1], [])], TOKENS.device)
        return model.hidden(TOKENS[0], positions, layout.attend) @ model.head.T
    # The mask says that the tokens are one sequence, although their positions have a gap.
    return model(TOKENS, position_ids=positions[None], attention_mask=torch.ones_like(TOKENS)).logits[0]


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_shape_loads_samples_trains_and_opens_in_transformers(name, corpus, tmp_path, table):
    original, fields = SHAPES[name]
    source = write_folder(tmp_path / "source", fields)
    (source / "config.json").write_text(json.dumps(fields))     # as it is published: transformers 5 rewrites it
    ours, theirs = GPT.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    errors, seen = [], []
    for end in (48, ours.config.max_positions):
        positions = torch.cat([torch.arange(24), torch.arange(end - 24, end)])
        expected = logits_at(theirs, positions)
        seen.append(expected)
        errors.append(relative_error(logits_at(ours, positions), expected))
    assert max(errors) < 1e-4 and relative_error(*seen) > 1e-2     # and it matters where a token stands
    stretched = fields.get("rope_scaling")
    assert ours.config.max_positions >= 4 * original if stretched else ours.config.max_positions == original

    prompt = TOKENS[0, :20].tolist()
    [[rollout]] = generate(ours, [prompt], 1, 12, 0, [], seed=0)
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=399)
    assert theirs.generate(TOKENS[:, :20], generation_config=greedy)[0, 20:].tolist() == rollout.tokens

    with torch.enable_grad():
        step = run_one_step(corpus, source, tmp_path / "run")
    [line] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["grad_norm"] > 0 and metrics["logp_gap"] < 1e-4
    trained, opened = GPT.from_pretrained(step), AutoModelForCausalLM.from_pretrained(step)
    assert not torch.equal(trained(TOKENS), ours(TOKENS)) and type(opened) is type(theirs)
    assert relative_error(trained(TOKENS), opened(TOKENS).logits) < 1e-4
    assert read_json(step / "config.json") == fields | dict(torch_dtype="float32")
    table.append((name, *errors))


# ---- what a folder says survives ---------------------------------------------------------------------------

SAID = {
    "generation_config.json": '{"eos_token_id": [404, 7], "do_sample": true, "temperature": 0.6, "pad_token_id": 403}',
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}<think>",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "special_tokens_map.json": '{"eos_token": "<|end|>", "pad_token": "</think>"}',
    "added_tokens.json": '{"<think>": 402}', "vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "pieces",
}


@pytest.fixture
def talkative(tmp_path):
    """A folder that says all that a folder may say, with a tied head that is stored twice."""
    fields = LLAMA3 | dict(tie_word_embeddings=True, num_hidden_layers=1, _name_or_path="someone/something",
                           pad_token_id=403, eos_token_id=[404, 7], unheard_of=None, top_p=0.9, layer_types=None)
    folder = write_folder(tmp_path / "talkative", fields)
    (folder / "config.json").write_text(json.dumps(fields))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in SAID.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    config = read_json(folder / "tokenizer_config.json") | dict(chat_template="{{ messages }}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def said(folder):
    """{path: contents} of everything but weights and trainer; config.json without its dtype."""
    config = read_json(folder / "config.json")
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    names = [*SAID, "tokenizer.json", "tokenizer_config.json"]
    return {name: (folder / name).read_bytes() for name in names} | dict(config=config)


def test_all_that_a_folder_says_survives_steps_and_resuming(talkative, corpus, tmp_path):
    first = run_one_step(corpus, talkative, tmp_path / "run", save_every=1)
    second = run_one_step(corpus, talkative, tmp_path / "run", steps=2, resume=True)
    other = run_one_step(corpus, second, tmp_path / "other")
    assert [step.name for step in (first, second, other)] == ["step_000001", "step_000002", "step_000001"]
    for step in (first, second, other):
        assert said(step) == said(talkative)
        assert not torch.equal(GPT.from_pretrained(step)(TOKENS), GPT.from_pretrained(talkative)(TOKENS))
    tokenizer = AutoTokenizer.from_pretrained(other)
    assert tokenizer.apply_chat_template([dict(role="user", content="Hello")], tokenize=False) == "Hello<think>"


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", [int, list])
def test_transformers_stops_where_it_stopped_with_the_source(tmp_path, where, kind):
    source = write_folder(tmp_path / "source", LLAMA)
    (source / "generation_config.json").unlink()
    greedy = dict(max_new_tokens=30, do_sample=False)
    free = AutoModelForCausalLM.from_pretrained(source).generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), eos_token_id=-1, pad_token_id=0, **greedy)[0, 48:].tolist()
    stop = free[5]
    eos = dict(eos_token_id=stop if kind is int else [404, stop], pad_token_id=9)
    if where == "config.json":
        edit_config(source, **eos)
    else:
        edit_config(source, eos_token_id=..., bos_token_id=...)
        (source / where).write_text(json.dumps(eos))
    GPT.from_pretrained(source).save_pretrained(tmp_path / "once")
    GPT.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for folder in (source, tmp_path / "once", tmp_path / "twice"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **greedy)[0, 48:].tolist()
        assert ids == free[:free.index(stop) + 1]


@pytest.mark.parametrize("names, source, saved", [
    (["torch_dtype"], "bfloat16", "float32"), (["dtype"], "float16", "float32"), ([], "", "float32"),
    (["dtype", "torch_dtype"], "bfloat16", "float32")])
def test_the_dtype_is_that_of_the_saved_weights(tmp_path, names, source, saved):
    folder = write_folder(tmp_path / "source", LLAMA)
    edit_config(folder, **dict(dtype=..., torch_dtype=...) | dict.fromkeys(names, source))
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    config = read_json(tmp_path / "ours" / "config.json")
    assert {name: config[name] for name in config if "dtype" in name} == dict.fromkeys(names or ["torch_dtype"], saved)


# ---- permissions -------------------------------------------------------------------------------------------

def modes(folder):
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids=oct)
def test_the_umask_decides_for_every_file_that_is_written(base, tmp_path, umask, mask, expected):
    umask(mask)
    with patch.object(hf, "FILE_BYTES", 30_000):
        GPT.from_pretrained(base).save_pretrained(tmp_path / "parts")
    Tokenizer.load(base).save(tmp_path / "parts")
    assert run_here("plumbing/hf.py", "--to", "bf16", tmp_path / "parts", tmp_path / "bf16")[0] == 0
    found = modes(tmp_path / "parts")
    assert len([name for name in found if name.endswith(".safetensors")]) > 1 and "tokenizer.json" in found
    assert set(found.values()) == {oct(expected)} and modes(tmp_path / "bf16") == found


def test_the_umask_decides_for_every_file_of_a_run(base, corpus, tmp_path, umask):
    umask(0o027)
    run_one_step(corpus, base, tmp_path / "run")
    assert set(modes(tmp_path / "run").values()) == {oct(0o640)}


# ---- copies in another dtype -------------------------------------------------------------------------------

def to_bf16(x):
    """fp32 -> bf16 by hand: of the two neighbours the nearer, and half way the one whose last bit is 0."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def test_a_bf16_copy_of_a_step_keeps_all_but_the_trainer(talkative, corpus, tmp_path):
    step = run_one_step(corpus, talkative, tmp_path / "run")
    (step / "training_args.bin").write_bytes(b"x")
    (step / "LICENSE").write_text("free")
    code, out, err = run_here("plumbing/hf.py", "--to", "bf16", step, tmp_path / "bf16")
    assert (code, err) == (0, "") and "bf16" in out
    there = {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()}
    copied = {path.relative_to(tmp_path / "bf16").as_posix() for path in (tmp_path / "bf16").rglob("*")
              if path.is_file()}
    left = {"trainer.json", "training_args.bin", *(name for name in there if name.startswith("optimizer/"))}
    assert copied == there - left and len(left) > 2 and said(tmp_path / "bf16") == said(talkative)
    assert read_json(tmp_path / "bf16" / "config.json")["torch_dtype"] == "bfloat16"
    before, after = load_file(step / "model.safetensors"), load_file(tmp_path / "bf16" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        expected = to_bf16(before[name].numpy())
        assert np.array_equal(weight.view(torch.int16).numpy().view(np.uint16), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        assert relative_error(GPT.from_pretrained(tmp_path / "bf16")(TOKENS), theirs.float()(TOKENS).logits) < 1e-4
    # And back: what is in bf16 is in fp32.
    assert run_here("plumbing/hf.py", "--to", "fp32", tmp_path / "bf16", tmp_path / "fp32")[0] == 0
    for name, weight in load_file(tmp_path / "fp32" / "model.safetensors").items():
        assert weight.dtype == torch.float32 and torch.equal(weight, after[name].float())


def test_rounding_half_way_goes_to_the_even_neighbour():
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000], dtype=np.uint32).view(np.float32)
    assert to_bf16(halves).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF80]
    assert torch.tensor(halves).bfloat16().view(torch.int16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF80 - 65536]


def test_a_folder_in_parts_is_copied_part_by_part(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", LLAMA)
    os.remove(source / "model.safetensors")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(source, max_shard_size="60KB")
    parts, alive = sorted(source.glob("model-*.safetensors")), []
    assert len(parts) > 3
    read = hf.read_tensors

    def counted(path):
        still_there.append(sum(ref() is not None for ref in alive))
        for name, part in read(path):
            yield name, Counted(part)

    class Counted:
        def __init__(self, part):
            self.part = part

        def __getitem__(self, rows):
            alive.append(weakref.ref(tensor := self.part[rows]))
            return tensor

    still_there = []
    monkeypatch.setattr(hf, "read_tensors", counted)
    hf.convert(str(source), str(tmp_path / "fp32"), torch.float32)
    assert still_there == [0] * len(parts) and len(alive) > len(parts)    # tensors of earlier files
    monkeypatch.undo()
    size = hf.convert(str(source), str(tmp_path / "bf16"), torch.bfloat16)
    index, before = [read_json(tmp_path / name / "model.safetensors.index.json") for name in ("bf16", "source")]
    assert index["weight_map"] == before["weight_map"] and size == index["metadata"]["total_size"]
    assert 2 * size == before["metadata"]["total_size"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    with torch.no_grad():
        assert relative_error(GPT.from_pretrained(tmp_path / "bf16")(TOKENS), theirs.float()(TOKENS).logits) < 1e-4


def test_an_index_of_a_single_file_is_copied_and_a_slash_at_the_end_means_nothing(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    name = "model-00001-of-00001.safetensors"
    os.rename(source / "model.safetensors", source / name)
    weights = load_file(source / name)
    (source / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict.fromkeys(weights, name))))
    assert run_here("plumbing/hf.py", "--to", "bf16", f"{source}/", f"{tmp_path}/new/out/")[0] == 0
    assert os.listdir(tmp_path / "new") == ["out"]
    ours = GPT.from_pretrained(tmp_path / "new" / "out")
    for weight, expected in zip(ours.parameters(), GPT.from_pretrained(base).parameters()):
        assert torch.equal(weight, expected.bfloat16().float())


def test_a_copy_that_cannot_be_made_is_one_line_and_leaves_nothing(base, corpus, tmp_path):
    run_one_step(corpus, base, tmp_path / "run")
    shutil.copytree(base, tmp_path / "damaged")
    with open(tmp_path / "damaged" / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    (tmp_path / "full").mkdir()
    shutil.copytree(base, tmp_path / "gemma")
    edit_config(tmp_path / "gemma", model_type="gemma2")
    for words, message in (
            (("--to", "bf16", base, tmp_path / "full"), "full is there already"),
            (("--to", "bf16", tmp_path / "run", tmp_path / "out"), "its newest checkpoint is"),
            (("--to", "bf16", tmp_path / "gone", tmp_path / "out"), "gone/config.json: no such file"),
            (("--to", "bf16", tmp_path / "damaged", tmp_path / "out"), "model.safetensors: damaged"),
            (("--to", "bf16", tmp_path / "gemma", tmp_path / "out"), "gemma2"),
            (("--to", "int4", base, tmp_path / "out"), "--to"), ((base, tmp_path / "out"), "--to"),
            (("--to", "bf16", base), "out")):
        code, out, err = run_here("plumbing/hf.py", *words)
        assert code == 2 and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    code, out, _ = run_here("plumbing/hf.py", "--help")
    assert code == 0 and "--to" in out and "bf16" in out
