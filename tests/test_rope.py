"""Stretched rotary positions against transformers, in both layouts of config.json and through the sampler."""
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model import GPT, read_config, rope_table
from sample import generate
from test_model import FAMILIES, edit_config, random_model

ORIGINAL = "original_max_position_embeddings"
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=0.3, high_freq_factor=4.0) | {ORIGINAL: 32}
YARN = dict(rope_type="yarn", factor=4.0)
SCALINGS = [
    dict(rope_type="linear", factor=2.5), LLAMA3, LLAMA3 | dict(factor=32, low_freq_factor=0.05, high_freq_factor=1.5), YARN,
    YARN | {ORIGINAL: 32}, YARN | {ORIGINAL: 32, "beta_slow": 0.1, "truncate": False},
    YARN | {ORIGINAL: 32, "beta_fast": 0.5, "beta_slow": 0.05}, YARN | {ORIGINAL: 32, "beta_slow": 6},
    YARN | {ORIGINAL: 32, "attention_factor": 1.7},
    YARN | {ORIGINAL: 32, "mscale": 2.0, "mscale_all_dim": 0.5}, YARN | {ORIGINAL: 32, "mscale": 2.0},
    YARN | {ORIGINAL: 32, "factor": None}, YARN | {ORIGINAL: 32, "factor": 0.5, "finetuned": True}]
TOKENS = torch.arange(256).view(2, 128) * 37 % 96


def write_config(folder, family, scaling, layout, **changes):
    """A folder of a tiny model whose config.json says this about rotary positions."""
    changes = dict(max_position_embeddings=128) | changes
    random_model(family, **changes).save_pretrained(folder)
    if layout == "rope_parameters":
        fields = dict(rope_parameters=scaling | dict(rope_theta=5000.0))
    else:
        kind = {layout: scaling["rope_type"]}
        rest = {name: value for name, value in scaling.items() if name != "rope_type"}
        fields = dict(rope_parameters=..., rope_scaling=kind | rest, rope_theta=5000.0)
    edit_config(folder, **fields)
    return folder


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("layout", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_logits_match_below_and_above_the_original_context(tmp_path, scaling, layout):
    folder = write_config(tmp_path, "qwen2", scaling, layout)
    ours, theirs = GPT.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    plain = random_model("qwen2", max_position_embeddings=128)
    with torch.no_grad():
        for length in (20, 128):
            expected = theirs(TOKENS[:, :length]).logits
            assert relative_error(ours(TOKENS[:, :length]), expected) < 1e-5
        assert relative_error(plain(TOKENS).logits, expected) > 1e-3   # so the stretching is felt


@pytest.mark.parametrize("theta, original, K", [(500_000.0, 8192, 128), (1e6, 32_768, 64), (10_000.0, 4096, 96)])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "default"])
def test_every_angle_of_a_real_context_is_that_of_transformers(tmp_path, kind, theta, original, K):
    fields = dict(linear=dict(factor=4.0), llama3=LLAMA3, yarn=dict(factor=4.0), default={})[kind]
    rope = fields | dict(rope_type=kind, rope_theta=theta)
    if kind in ("llama3", "yarn"):
        rope[ORIGINAL] = original
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", vocab_size=96, hidden_size=2 * K, num_hidden_layers=1, num_attention_heads=2, head_dim=K,
        intermediate_size=16, max_position_embeddings=4 * original, rope_parameters=rope)))
    config = read_config(tmp_path)
    cos, sin = rope_table(config.max_positions, K, config.rope_theta, config.rope_scaling, torch.device("cpu"))
    oracle = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    their_cos, their_sin = oracle(torch.zeros(1), torch.arange(4 * original)[None])
    assert config.max_positions == 4 * original
    # The last digit of a frequency would be seen: far out it turns an angle by 0.0001.
    torch.testing.assert_close(cos[:, 0], their_cos[0, :, :K // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[:, 0], their_sin[0, :, :K // 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fields, positions, original", [
    ({ORIGINAL: 32}, 128, 32), ({ORIGINAL: 64}, 256, 64), ({}, 512, 128), ({ORIGINAL: 16}, 128, 16)])
def test_yarn_reaches_as_far_as_its_factor_says(tmp_path, fields, positions, original):
    """Qwen2.5's instructions add YaRN to a config.json whose max_position_embeddings is the original one."""
    config = read_config(write_config(tmp_path, "qwen2", YARN | fields, "type"))
    assert config.max_positions == positions and dict(config.rope_scaling)[ORIGINAL] == original


def test_the_original_context_outside_of_the_rope_field_wins_as_in_transformers(tmp_path):
    folder = write_config(tmp_path, "llama", YARN | {ORIGINAL: 64}, "type")
    edit_config(folder, **{ORIGINAL: 32})
    ours, theirs = GPT.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert relative_error(ours(TOKENS), theirs(TOKENS).logits) < 1e-5
    assert dict(ours.config.rope_scaling)[ORIGINAL] == 32


def test_a_rope_scaling_added_to_a_file_of_transformers_5_wins(tmp_path):
    folder = write_config(tmp_path, "llama", dict(rope_type="default"), "rope_parameters")
    edit_config(folder, rope_scaling=LLAMA3 | dict(rope_theta=5000.0))
    ours, theirs = GPT.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert relative_error(ours(TOKENS), theirs(TOKENS).logits) < 1e-5
    assert dict(ours.config.rope_scaling)["rope_type"] == "llama3"


@pytest.mark.parametrize("backend", ["torch", "bitwise"])
def test_sampler_and_trainer_turn_by_the_same_angles(tmp_path, use_kernels, backend):
    """Rollouts across the original context: the log-probs of sampler, trainer and transformers agree."""
    folder = write_config(tmp_path, "qwen3", YARN | {ORIGINAL: 16, "attention_factor": 1.4}, "type", head_dim=16,
                          num_hidden_layers=1, max_position_embeddings=64)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    use_kernels(backend)
    ours = GPT.from_pretrained(folder)
    prompt = TOKENS[0, :14].tolist()
    [[rollout]] = generate(ours, [prompt], 1, 4, 1.0, [], seed=0)
    whole = torch.tensor([prompt + rollout.tokens])
    with torch.no_grad():
        for logits in (ours(whole), theirs(whole).logits):
            logprobs = logits[0].log_softmax(-1)[13:-1].gather(1, whole[0, 14:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", ["torch", "bitwise"])
def test_gradients_pass_a_rotation_that_also_enlarges(tmp_path, use_kernels, backend):
    folder = write_config(tmp_path, "llama", YARN | {ORIGINAL: 32, "attention_factor": 1.4}, "type", head_dim=16)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    use_kernels(backend)
    ours = GPT.from_pretrained(folder)
    tokens = TOKENS[:1, :20]
    ours(tokens).logsumexp(-1).sum().backward()
    theirs(tokens).logits.logsumexp(-1).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert relative_error(weight.grad, expected[f"model.{name}"].grad) < 1e-4, name


def test_a_model_from_a_config_alone_writes_its_rope(tmp_path):
    config = read_config(write_config(tmp_path, "llama", LLAMA3, "rope_parameters"))
    ours = GPT(config)
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert relative_error(ours(TOKENS), theirs(TOKENS).logits) < 1e-5
    assert read_config(tmp_path / "ours") == config and FAMILIES["llama"][1] is type(theirs)
