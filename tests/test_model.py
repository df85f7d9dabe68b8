"""The model against transformers, in both directions, and every folder that it must refuse."""
import json
import os
import shutil
from functools import partial

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import model as module
from kernels.attention import make_layout
from kernels.linear import CAN_PACK
from model import GPT
from plumbing import files

FAMILIES = dict(llama=(transformers.LlamaConfig, transformers.LlamaForCausalLM),
                mistral=(transformers.MistralConfig, transformers.MistralForCausalLM),
                qwen2=(transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
                qwen3=(transformers.Qwen3Config, transformers.Qwen3ForCausalLM))
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)
TOKENS = torch.arange(60).view(2, 30) * 37 % 96


def random_model(family, tied=True, **changes):
    """A tiny transformers model in which every weight matters: biases are not 0 and norm weights not 1."""
    Config, Model = FAMILIES[family]
    fields = SIZES | dict(head_dim=12 if family == "qwen3" else 8, max_position_embeddings=64,
                          rope_theta=5000.0, rms_norm_eps=1e-5, tie_word_embeddings=tied)
    torch.manual_seed(0)
    oracle = Model(Config(**fields | changes)).eval()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            noise = torch.randn(weight.shape)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return oracle


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A good folder of its own for each test to damage."""
    return shutil.copytree(llama_folder, tmp_path / "copy")


def edit_config(folder, **changes):
    """Change fields of config.json; a field set to `...` is removed."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def assert_same_logits(ours, theirs, atol=1e-4, tokens=TOKENS):
    logits = theirs(tokens).logits
    assert logits.std() > 0.1  # weights that do nothing would agree, too
    torch.testing.assert_close(ours(tokens), logits, rtol=0, atol=atol)


def assert_refused(folder, *words, error=ValueError):
    """Refused in one line that holds all the words."""
    with pytest.raises(error) as caught:
        GPT.from_pretrained(folder)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


# ---- the same function as transformers ----

@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers_both_ways(family, tied, tmp_path):
    oracle = random_model(family, tied)
    oracle.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert_same_logits(ours, oracle)
    ours.save_pretrained(tmp_path / "ours")
    again, info = FAMILIES[family][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(TOKENS).logits, oracle(TOKENS).logits)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied) and len(stored) == len(list(ours.parameters()))
    for name, weight in oracle.state_dict().items():
        assert name not in stored or torch.equal(stored[name], weight)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (8, 2)])
def test_query_heads_find_their_key_heads(heads, kv_heads, tmp_path):
    oracle = random_model("llama", num_attention_heads=heads, num_key_value_heads=kv_heads)
    oracle.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path), oracle)


def test_a_fresh_model_survives_saving_and_opens_in_transformers(tiny_gpt, tmp_path):
    tiny_gpt.save_pretrained(tmp_path)
    tokens = torch.arange(20).view(2, 10)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == tiny_gpt.config and torch.equal(again(tokens), tiny_gpt(tokens))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(tiny_gpt, oracle, tokens=tokens)


def test_saving_over_the_folder_a_model_came_from_damages_neither(folder):
    ours = GPT.from_pretrained(folder)
    before = ours(TOKENS)
    ours.save_pretrained(folder)
    assert torch.equal(ours(TOKENS), before) and torch.equal(GPT.from_pretrained(folder)(TOKENS), before)


def test_a_sharded_folder_is_read_whole(tmp_path):
    oracle = random_model("qwen2", tied=False)
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(GPT.from_pretrained(tmp_path), oracle)


def test_a_bf16_folder_becomes_fp32_masters(tmp_path):
    random_model("qwen3").bfloat16().save_pretrained(tmp_path)
    oracle = FAMILIES["qwen3"][1].from_pretrained(tmp_path, dtype=torch.float32)
    ours = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and ours.compute_dtype == torch.float32
    assert_same_logits(ours, oracle)


def test_bf16_compute_returns_fp32_logits_near_those_of_fp32(folder):
    exact, rounded = GPT.from_pretrained(folder)(TOKENS), GPT.from_pretrained(folder, torch.bfloat16)(TOKENS)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_packed_weights_are_those_of_the_model(tmp_path, family, tied, rows):
    """On a CPU: each product, with its bias and residual, and that of the head."""
    random_model(family, tied).save_pretrained(tmp_path)
    layout = make_layout([(rows, [])])
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        model = GPT.from_pretrained(tmp_path, compute_dtype=dtype)
        run = partial(model.hidden, torch.arange(rows), layout.positions, layout.attend)
        expected = run()
        model.pack_weights(rows)
        packed = [model.packed_head, *(layers[0].packed for layers in model.by_input())]
        assert [x is not None for x in packed] == [bool(CAN_PACK[dtype])] * 13
        hidden, logits = run(), model.logits(expected)
        model.unpack_weights()
        packed = [model.packed_head, *(layers[0].packed for layers in model.by_input())]
        assert packed == [None] * 13 and hidden.dtype == dtype and logits.dtype == torch.float32
        assert (hidden - expected).float().norm() < limit * expected.float().norm()
        exact = exact_logits(model, expected)
        torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-4)


def exact_logits(model, hidden):
    """The logits of these hidden states in fp64, with the head rounded to their dtype."""
    return hidden.double() @ model.head.detach().to(hidden.dtype).double().T


@pytest.mark.parametrize("is_packed", [False, True])
def test_logits_of_bf16_hidden_states_are_summed_and_kept_in_fp32(tiny_gpt, is_packed):
    tiny_gpt.compute_dtype = torch.bfloat16
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        if is_packed:
            tiny_gpt.pack_weights(9)
        logits = tiny_gpt.logits(hidden)
    assert logits.dtype == torch.float32
    # Rounded to bf16 they would be off by 0.01.
    torch.testing.assert_close(logits.double(), exact_logits(tiny_gpt, hidden), rtol=0, atol=1e-5)


def test_fp32_masters_with_bf16_activations_get_fp32_gradients(tiny_gpt):
    tiny_gpt.compute_dtype = torch.bfloat16
    tiny_gpt(torch.arange(10)[None]).logsumexp(-1).sum().backward()
    for name, weight in tiny_gpt.named_parameters():
        assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0, name


def test_an_older_folder_with_inv_freq_and_a_second_copy_of_the_tied_head_loads(folder):
    expected, path = GPT.from_pretrained(folder)(TOKENS), folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path, metadata={"format": "pt"})
    assert torch.equal(GPT.from_pretrained(folder)(TOKENS), expected)


@pytest.mark.skipif("NANORPT_TEST_CHECKPOINT" not in os.environ, reason="NANORPT_TEST_CHECKPOINT is not set")
def test_a_real_checkpoint_matches_transformers():
    folder = os.environ["NANORPT_TEST_CHECKPOINT"]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(128).view(2, 64) * 7919 % oracle.config.vocab_size
    assert_same_logits(GPT.from_pretrained(folder), oracle, atol=1e-3, tokens=tokens)


def test_the_initialisation_scales_down_what_writes_to_the_residual_stream(tiny_gpt):
    config = tiny_gpt.config
    weights = dict(GPT(module.GPTConfig(**vars(config) | dict(width=256, ffn_width=256))).named_parameters())
    assert weights["layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        expected = 0.02 / (2 * config.n_layers) ** 0.5
        assert weights[f"layers.0.{name}.weight"].std().item() == pytest.approx(expected, rel=0.05)


def test_more_tokens_than_positions_are_refused(tiny_gpt):
    assert tiny_gpt(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 64, 40)
    with pytest.raises(ValueError, match="65 tokens.* 64 positions"):
        tiny_gpt(torch.zeros(1, 65, dtype=torch.long))


# ---- config.json ----

LONGROPE = dict(rope_type="longrope", short_factor=[1.0], long_factor=[2.0])
MROPE = dict(type="mrope", rope_type="default", mrope_section=[1, 1, 2])


@pytest.mark.parametrize("scaling", [
    LONGROPE, MROPE, dict(type="dynamic", factor=2.0), dict(factor=2.0), dict(type="linear"),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0), dict(type="yarn", factor=4.0, attn_factor=2.0),
    dict(type="linear", rope_type="yarn", factor=2.0), dict(type="linear", factor=2.0, partial_rotary_factor=0.5)],
    ids=str)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_a_scaled_rope_that_is_not_implemented_is_refused_in_the_old_form_and_the_new(folder, field, scaling):
    edit_config(folder, **{field: scaling | dict(rope_theta=5000.0)})
    assert_refused(folder, field, *map(str, scaling), str(scaling.get("rope_type", scaling.get("type", "factor"))))


@pytest.mark.parametrize("name, value", [
    ("factor", 0), ("factor", "4"), ("factor", [4]), ("beta_fast", -1), ("attention_factor", float("nan")),
    ("truncate", 1), ("rope_theta", "1e6"), ("original_max_position_embeddings", "64")])
def test_a_field_of_scaled_rope_that_is_no_number_is_named(folder, name, value):
    edit_config(folder, rope_parameters=dict(rope_type="yarn", factor=4.0) | {name: value})
    assert_refused(folder, "config.json", "rope_parameters", name, json.dumps(value))


def test_two_forms_of_rope_that_differ_are_refused(folder):
    linear = dict(rope_type="linear", factor=2.0)
    edit_config(folder, rope_parameters=linear, rope_scaling=dict(rope_type="default"))
    assert_refused(folder, "rope_parameters", "rope_scaling", "linear")
    edit_config(folder, rope_parameters=linear, rope_scaling=dict(type="linear", factor=3.0))
    assert_refused(folder, "rope_parameters", "rope_scaling", "2.0", "3.0")
    edit_config(folder, rope_parameters=linear, rope_scaling=dict(type="linear", factor=2.0))
    assert dict(module.read_config(folder).rope_scaling) == linear


@pytest.mark.parametrize("fields", [
    dict(rope_parameters=dict(rope_type="default", rope_theta=777.0)),
    dict(rope_parameters=dict(rope_theta=777.0), rope_scaling=None),
    dict(rope_parameters=..., rope_theta=777.0, rope_scaling=dict(type="default")),
    dict(rope_parameters=None, rope_theta=777.0),
])
def test_theta_is_found_wherever_it_stands(folder, fields):
    edit_config(folder, **fields)
    assert GPT.from_pretrained(folder).config.rope_theta == 777.0
    assert_same_logits(GPT.from_pretrained(folder), transformers.LlamaForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("name, value", [
    ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("use_sliding_window", True),
    ("layer_types", ["sliding_attention"] * 3), ("layer_types", ["full_attention", "linear_attention"]),
    ("sliding_window", 63), ("quantization_config", dict(bits=4)), ("partial_rotary_factor", 0.5),
    ("attn_logit_softcapping", 30.0), ("num_experts", 8), ("model_type", "gemma2"), ("model_type", ...),
])
def test_a_field_that_changes_the_maths_is_refused_by_name(folder, name, value):
    edit_config(folder, **{name: value})
    assert_refused(folder, "config.json", name, "" if value is ... else json.dumps(value).strip('"'))


@pytest.mark.parametrize("family, fields", [
    ("llama", dict(sliding_window=64)), ("llama", dict(layer_types=["full_attention"] * 3)),
    ("mistral", dict(sliding_window=None)), ("mistral", dict(sliding_window=64)), ("mistral", dict(sliding_window=...)),
    ("qwen2", dict(sliding_window=4)), ("qwen2", dict(sliding_window=4, use_sliding_window=False)),
    ("qwen2", dict(sliding_window=None, use_sliding_window=True)),
    ("qwen2", dict(sliding_window=64, use_sliding_window=True, max_window_layers=0)),
    ("qwen2", dict(sliding_window=4, use_sliding_window=True, max_window_layers=3)),
    ("qwen3", dict(sliding_window=4, use_sliding_window=True)),
    ("qwen3", dict(sliding_window=64, use_sliding_window=True, layer_types=["sliding_attention"] * 3)),
], ids=str)
def test_a_window_that_no_token_can_leave_is_fine(tmp_path, family, fields):
    random_model(family).save_pretrained(tmp_path)
    edit_config(tmp_path, **dict(layer_types=...) | fields)
    tokens = torch.arange(64)[None] * 37 % 96
    assert_same_logits(GPT.from_pretrained(tmp_path), FAMILIES[family][1].from_pretrained(tmp_path), tokens=tokens)


@pytest.mark.parametrize("family, name, fields", [
    ("llama", "sliding_window", dict(sliding_window=63)), ("mistral", "sliding_window", dict(sliding_window=63)),
    ("mistral", "sliding_window", dict(sliding_window=..., max_position_embeddings=4097)),
    ("mistral", "sliding_window", dict(sliding_window=4, layer_types=["full_attention"] * 3)),
    ("qwen2", "sliding_window", dict(sliding_window=63, use_sliding_window=True, max_window_layers=2)),
    ("qwen3", "sliding_window", dict(sliding_window=..., use_sliding_window=True, max_window_layers=0,
                                     max_position_embeddings=4097)),
    ("qwen3", "layer_types", dict(sliding_window=63, use_sliding_window=True,
                                  layer_types=["full_attention"] * 2 + ["sliding_attention"])),
    *[("llama", "layer_types", dict(layer_types=damage)) for damage in (5, "full_attention", [["full_attention"]])],
], ids=str)
def test_a_window_that_a_token_can_leave_is_refused(tmp_path, family, name, fields):
    random_model(family).save_pretrained(tmp_path)
    edit_config(tmp_path, **dict(layer_types=...) | fields)
    assert_refused(tmp_path, "config.json", name)


CHUNKS = dict(chunk_size=48, local_size=8, original_max_position_embeddings=64)


def test_a_model_that_attends_in_chunks_goes_no_further_than_the_first(tmp_path):
    oracle = random_model("qwen2")
    oracle.save_pretrained(tmp_path)
    edit_config(tmp_path, dual_chunk_attention_config=CHUNKS)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.max_positions == 48 - 8
    assert_same_logits(ours, oracle, tokens=torch.arange(40)[None])
    ours.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 64 and saved["dual_chunk_attention_config"] == CHUNKS
    edit_config(tmp_path, dual_chunk_attention_config=CHUNKS | dict(original_max_position_embeddings=32))
    assert module.read_config(tmp_path).max_positions == 32


@pytest.mark.parametrize("chunks", [dict(chunk_size=48), CHUNKS | dict(local_size=48), [48, 8],
                                    CHUNKS | dict(sparse_attention_enabled=True), CHUNKS | dict(chunk_size="48")], ids=str)
def test_chunks_that_are_not_understood_are_refused(folder, chunks):
    edit_config(folder, dual_chunk_attention_config=chunks)
    assert_refused(folder, "dual_chunk_attention_config")


@pytest.mark.parametrize("fields", [
    dict(anything=None), dict(anything={}, something=[]), dict(quantization_config=None, rope_scaling={}),
    dict(_name_or_path="a/b", do_sample=True, temperature=0.6, task_specific_params=dict(a=1), is_decoder=False),
], ids=str)
def test_a_field_that_says_nothing_about_the_maths_is_kept(folder, fields):
    edit_config(folder, **fields)
    ours = GPT.from_pretrained(folder)
    ours.save_pretrained(folder / "ours")
    assert (json.loads((folder / "ours" / "config.json").read_text())
            == json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                  "intermediate_size"])
@pytest.mark.parametrize("value", [..., None], ids=["absent", "null"])
def test_a_missing_field_is_named(folder, name, value):
    edit_config(folder, head_dim=..., num_key_value_heads=..., **{name: value})
    assert_refused(folder, "config.json", name, "missing")


@pytest.mark.parametrize("name, value", [
    ("hidden_size", "32"), ("num_hidden_layers", 0), ("vocab_size", 96.5), ("num_attention_heads", -4),
    ("num_key_value_heads", True), ("rms_norm_eps", "1e-5"), ("rms_norm_eps", float("nan")), ("model_type", [3])])
def test_a_number_that_is_no_number_is_named(folder, name, value):
    edit_config(folder, **{name: value})
    assert_refused(folder, "config.json", name, json.dumps(value))


@pytest.mark.parametrize("absent", [..., None], ids=["absent", "null"])
def test_head_dim_and_kv_heads_follow_from_the_rest(tmp_path, absent):
    oracle = random_model("llama", num_key_value_heads=4)
    oracle.save_pretrained(tmp_path)
    edit_config(tmp_path, head_dim=absent, num_key_value_heads=absent)
    assert_same_logits(GPT.from_pretrained(tmp_path), oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_left_out_have_the_defaults_of_transformers(family, tmp_path):
    Config, _ = FAMILIES[family]
    (tmp_path / "config.json").write_text(json.dumps(SIZES | dict(model_type=family, sliding_window=None)))
    ours, theirs = module.read_config(tmp_path), Config(**SIZES)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32 // 4)


def test_kv_heads_that_do_not_divide_the_heads_are_refused(folder):
    edit_config(folder, num_key_value_heads=3)
    assert_refused(folder, "num_attention_heads = 4", "num_key_value_heads = 3")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b'{"vocab_size": ', b"[1, 2]", b'"llama"', b"", b"\xff\xfe\x00"])
def test_json_that_is_no_object_is_refused_with_the_files_name(folder, name, content):
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    assert_refused(folder, name)


@pytest.mark.parametrize("weight_map", [[1], None, {}, {"norm.weight": 3}, {"norm.weight": ["model.safetensors"]}])
def test_an_index_that_maps_no_tensors_to_files_is_refused(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    assert_refused(folder, "model.safetensors.index.json", "weight_map")


# ---- weights ----

@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, name, error=FileNotFoundError)


def test_a_missing_shard_is_named(tmp_path):
    random_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(tmp_path, shard.name, error=FileNotFoundError)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_named_wherever_it_was_cut(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_refused(folder, "model.safetensors")


def rewrite(folder, **changes):
    """Replace tensors of model.safetensors; `...` removes one."""
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not ...}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, model__layers__1__mlp__up_proj__weight=...)
    assert_refused(folder, "layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("name", [
    "model.layers.1.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight", "junk"])
def test_a_tensor_without_a_place_is_named(folder, name):
    rewrite(folder, **{name: torch.ones(32)})
    assert_refused(folder, "model.safetensors", name.removeprefix("model."))


def test_a_tensor_of_the_wrong_shape_is_named(folder):
    rewrite(folder, model__norm__weight=torch.ones(33))
    assert_refused(folder, "norm.weight", "(33,)", "(32,)")


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(folder):
    rewrite(folder, lm_head__weight=torch.zeros(96, 32))
    assert_refused(folder, "lm_head.weight")


def test_an_untied_folder_without_its_head_is_refused(folder):
    edit_config(folder, tie_word_embeddings=False)
    assert_refused(folder, "lm_head.weight")


def test_a_full_disk_while_saving_is_one_line(tiny_gpt, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: .*No space left on device") as caught:
        tiny_gpt.save_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
