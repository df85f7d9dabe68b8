"""GPT from scratch: RMSNorm, rotary positions (half-split), grouped-query attention, SwiGLU.

One class covers the Llama, Qwen2 (bias on q, k, v) and Qwen3 (RMSNorm on q and k) families: it reads and
writes their Hugging Face folders (config.json, *.safetensors) and keeps their parameter names.

    model = GPT.from_pretrained("Qwen2.5-0.5B")        # a folder; GPT(config) starts at random
    logits = model(tokens)                             # (B, T) -> (B, T, V)
    model.save_pretrained("my-model")                  # loads again here and in transformers

Tokens are rows: inside the model every tensor is (T, ...), whoever the T rows belong to. `hidden` takes the
rows, their positions and a function `attend` that says which rows see which. Training passes packed
attention, sampling passes attention over a cache, and the layers do not know the difference.
"""
import json
import os
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from plumbing import parallel
from kernels.attention import attention, make_layout
from kernels.logprob import logprob
from kernels.linear import linear, rms_norm, swiglu

FILE_BYTES = 5 * 10**9  # save_pretrained begins a new file before this; one file is in memory at a time


@dataclass
class GPTConfig:
    vocab_size: int
    width: int                     # D
    n_layers: int
    n_heads: int                   # H, query heads
    n_kv_heads: int                # Hkv, key and value heads; H / Hkv query heads share one
    head_dim: int                  # K; Qwen3 has K != D / H
    ffn_width: int
    max_positions: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True         # the output head is the embedding matrix
    family: str = "llama"          # llama | qwen2 | qwen3


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """Weights may be fp32 masters while activations are bf16: cast to the activations, explicitly."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


@lru_cache(maxsize=4)
def rope_table(max_positions, K, theta, device):
    """cos and sin of every angle, (max_positions, 1, K / 2) each, fp32.

    Computed once: a vectorised cosine may round differently at the end of a tensor, and a position must have
    the same angle in every batch.
    """
    frequencies = 1 / theta ** (torch.arange(0, K, 2, device=device).float() / K)
    angles = torch.arange(max_positions, device=device)[:, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + K/2]) of x (T, H, K): the half-split order of Hugging Face weights."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, H, Hkv, K = config.width, config.n_heads, config.n_kv_heads, config.head_dim
        self.head_dim, bias = K, config.family == "qwen2"
        self.q_proj = Linear(D, H * K, bias=bias)
        self.k_proj = Linear(D, Hkv * K, bias=bias)
        self.v_proj = Linear(D, Hkv * K, bias=bias)
        self.o_proj = Linear(H * K, D, bias=False)
        qk_norm = config.family == "qwen3"
        self.q_norm = RMSNorm(K, config.norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, rope, attend):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim))                       # (T, H * K) -> (T, H, K)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        return self.o_proj(attend(q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype   # bf16 on a GPU: matmuls only, see Linear
        self.checkpoint_activations = False   # True: the backward computes each block again from its input
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied_head:
            self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # GPT-2's initialisation: what writes to the residual stream starts smaller
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layers) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def head(self):
        """(V, D) weights of the output head."""
        return self.embed_tokens.weight if self.config.tied_head else self.lm_head.weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def cast(self):
        """A copy on this rank alone, its whole weights in compute_dtype, as each use would cast them; itself if
        it is that. All ranks call this."""
        if not parallel.is_sharded(self) and self.embed_tokens.weight.dtype == self.compute_dtype:
            return self
        with torch.device("meta"):
            model = GPT(self.config, self.compute_dtype)
        for name, weight in self.named_parameters():
            module, leaf = name.rsplit(".", 1)
            weight = parallel.whole(weight.detach().to(self.compute_dtype))
            setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=False))
        return model

    def hidden(self, tokens, positions, attend):
        """tokens (T,), positions (T,) -> hidden states (T, D) after the last norm.

        attend(layer, q (T, H, K), k (T, Hkv, K), v (T, Hkv, K)) -> (T, H, K)
        """
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        config = self.config
        cos, sin = rope_table(config.max_positions, config.head_dim, config.rope_theta, x.device)
        rope = cos[positions], sin[positions]                                            # (T, 1, K / 2)
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for i, block in enumerate(self.layers):
            if again:
                x = checkpoint(block, x, rope, partial(attend, i), use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, partial(attend, i))
        return self.norm(x)

    def packed_hidden(self, tokens, layout):
        """tokens (T,) of groups [prompt][rollout 1]...[rollout G] -> hidden states (T, D)."""
        return self.hidden(tokens, layout.positions, lambda i, q, k, v: attention(q, k, v, layout))

    def logprobs(self, tokens, layout, temperature=1.0):
        """tokens (T,) of groups -> log-probs and entropy of their S response tokens, (S,) each, fp32."""
        hidden = self.packed_hidden(tokens, layout)[layout.predict_rows]                 # (S, D)
        return logprob(hidden, self.head, tokens[layout.response_rows], temperature)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V), fp32."""
        B, T = tokens.shape
        if T > self.config.max_positions:
            raise ValueError(f"{T} tokens, but the model has {self.config.max_positions} positions")
        hidden = self.packed_hidden(tokens.flatten(), make_layout([(T, [])] * B, tokens.device))
        return linear(hidden, self.head).float().view(B, T, -1)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", compute_dtype=None, shard=None):
        """Load a Hugging Face folder of the Llama, Qwen2 or Qwen3 family, its weights stored as `dtype`.

        compute_dtype: of matrix products and activations; default: dtype. shard: called with the model before
        it has memory (parallel.shard); each rank then reads no more than its rows.
        ValueError names the file and the field or tensor that is missing, damaged or not implemented here.
        """
        config = read_config(folder)
        with torch.device("meta"):
            model = cls(config, compute_dtype or dtype).to(dtype)
        if shard:
            shard(model)
        model.to_empty(device=device)
        missing, head = dict(model.named_parameters()), None
        for path in weight_files(folder):
            for name, tensor in read_tensors(path):
                if name.endswith("rotary_emb.inv_freq"):  # old folders store what follows from config.json
                    continue
                if name == "lm_head.weight" and config.tied_head:
                    head = path, tensor
                    continue
                if name not in missing:
                    raise ValueError(f"{path}: tensor {name} has no place in this model, or comes twice")
                weight = missing.pop(name)
                check_shape(path, name, tensor, weight)
                with torch.no_grad():
                    parallel.local(weight).copy_(tensor[parallel.rows(weight)])
        if missing:
            raise ValueError(f"{folder}: tensor {next(iter(missing))} is in no safetensors file")
        if head is not None:
            check_shape(head[0], "lm_head.weight", head[1], model.head)
            if not torch.equal(head[1][parallel.rows(model.head)].to(model.head), parallel.local(model.head)):
                raise ValueError(f"{folder}: lm_head.weight differs from the embedding, yet config.json ties it")
        return model

    def save_pretrained(self, folder):
        """Write config.json and the weights with Hugging Face names; tied heads are stored once.

        All ranks call this, rank 0 writes: model.safetensors, or numbered files of 5 GB and their index.
        OSError, after all ranks have done their part, when a file cannot be written.
        """
        files = split_files({name if name == "lm_head.weight" else f"model.{name}": weight.detach()
                             for name, weight in self.named_parameters()})
        error = None
        try:
            if parallel.RANK == 0:
                os.makedirs(folder, exist_ok=True)
                with open(f"{folder}/config.json", "w") as file:
                    json.dump(huggingface_config(self.config, self.embed_tokens.weight.dtype), file, indent=2)
                if len(files) > 1:
                    with open(f"{folder}/model.safetensors.index.json", "w") as file:
                        json.dump(index_of(files), file, indent=2)
        except OSError as reason:  # a full disk; the other ranks still count on us
            error = reason
        for path, weights in files.items():
            tensors = {}
            for name, weight in weights.items():
                weight = parallel.whole(weight)
                if parallel.RANK == 0 and not error:
                    tensors[name] = weight.cpu().contiguous()
            try:
                if tensors:
                    save_file(tensors, f"{folder}/{path}", metadata={"format": "pt"})
            except SafetensorError as reason:  # the same disk
                error = OSError(f"{folder}/{path}: cannot write ({reason})")
        if error:
            raise error


# ---- Hugging Face folders ---------------------------------------------------------------------------------
# config.json fields: ours, those that must have one value because anything else changes the maths, and those
# that change nothing here. Whatever is in none of the three lists is refused by name.
FIELDS = dict(
    vocab_size="vocab_size", hidden_size="width", num_hidden_layers="n_layers", num_attention_heads="n_heads",
    num_key_value_heads="n_kv_heads", head_dim="head_dim", intermediate_size="ffn_width",
    max_position_embeddings="max_positions", rope_theta="rope_theta", rms_norm_eps="norm_eps",
    tie_word_embeddings="tied_head", model_type="family")
ONLY = dict(
    hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False, use_mrope=False,
    rope_interleaved=False, partial_rotary_factor=1.0, use_qk_norm=False, num_experts=0,
    quantization_config=None)
HARMLESS = set("""
    architectures attention_dropout bos_token_id eos_token_id pad_token_id initializer_range use_cache dtype
    torch_dtype transformers_version max_window_layers _name_or_path pretraining_tp is_llama_config
    transformers.js_config unsloth_version unsloth_fixed _attn_implementation_autoset output_attentions
    output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type
    tokenizer_class auto_map""".split())
DEFAULTS = dict(rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False)  # for fields left out
FAMILIES = dict(
    llama=dict(max_position_embeddings=2048), qwen2=dict(max_position_embeddings=32768),
    qwen3=dict(max_position_embeddings=32768, head_dim=128))


def read_config(folder):
    """config.json of a Hugging Face folder -> GPTConfig. What would change the maths is refused by name."""
    path = f"{folder}/config.json"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: not there; a checkpoint folder holds config.json and *.safetensors")
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not implemented; llama, qwen2 and qwen3 are")
    raw = DEFAULTS | FAMILIES[family] | {name: value for name, value in raw.items() if value is not None}
    refuse = lambda name, value: ValueError(
        f"{path}: {name} = {json.dumps(value)} is not implemented and may change the maths")
    for name in ("rope_parameters", "rope_scaling"):  # transformers >= 5 keeps theta and scaling in the first
        rope = raw.pop(name, {})
        if any(value != "default" for key, value in rope.items() if key != "rope_theta"):
            raise refuse(name, rope)
        raw["rope_theta"] = rope.get("rope_theta", raw["rope_theta"])
    layer_types = raw.pop("layer_types", [])
    if set(layer_types) - {"full_attention"}:
        raise refuse("layer_types", layer_types)
    window = raw.pop("sliding_window", None)
    if window and raw.get("use_sliding_window", family == "llama"):  # Qwen names one it does not use
        raise refuse("sliding_window", window)
    for name, value in raw.items():
        if name in ONLY and value != ONLY[name] or name not in FIELDS.keys() | ONLY.keys() | HARMLESS:
            raise refuse(name, value)
    for name, ours in FIELDS.items():
        if name not in raw and name not in ("num_key_value_heads", "head_dim"):  # these follow from others
            raise ValueError(f"{path}: field {name} is missing")
        whole = isinstance(raw.get(name, 1), int) and raw.get(name, 1) > 0
        if GPTConfig.__annotations__[ours] is int and not whole:
            raise ValueError(f"{path}: {name} = {json.dumps(raw[name])} should be a positive whole number")
    heads = raw["num_attention_heads"]
    raw = dict(num_key_value_heads=heads, head_dim=raw["hidden_size"] // heads) | raw
    if heads % raw["num_key_value_heads"]:
        raise ValueError(f"{path}: num_attention_heads = {heads} is no multiple of num_key_value_heads = "
                         f"{raw['num_key_value_heads']}")
    return GPTConfig(**{ours: raw[theirs] for theirs, ours in FIELDS.items()})


def read_json(path):
    """The JSON object in a file; ValueError for anything else."""
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {json.dumps(content)[:40]}")
    return content


def huggingface_config(config, dtype):
    """GPTConfig -> the contents of config.json."""
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    return fields | dict(architectures=[f"{config.family.title()}ForCausalLM"], hidden_act="silu",
                         attention_bias=False, torch_dtype=str(dtype).removeprefix("torch."))


def read_tensors(path):
    """The tensors of one safetensors file: (our parameter name, tensor that is read where it is sliced)."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key.removeprefix("model."), file.get_slice(key)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or incomplete ({error}); copy or download it again") from None


def check_shape(path, name, tensor, weight):
    shape, expected = tuple(tensor.get_shape()), tuple(weight.shape)
    if shape != expected:
        raise ValueError(f"{path}: {name} has shape {shape}, config.json asks for {expected}")


def split_files(weights):
    """{name: weight} -> {file name: {name: weight}}, as few files as FILE_BYTES allows in this order."""
    parts, total = [{}], 0
    for name, weight in weights.items():
        size = weight.numel() * weight.itemsize
        if parts[-1] and total + size > FILE_BYTES:
            parts.append({})
            total = 0
        parts[-1][name] = weight
        total += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def index_of(files):
    """The contents of model.safetensors.index.json."""
    size = sum(weight.numel() * weight.itemsize for part in files.values() for weight in part.values())
    return dict(metadata=dict(total_size=size),
                weight_map={name: path for path, part in files.items() for name in part})


def weight_files(folder):
    """The safetensors files of a folder: one, or those that model.safetensors.index.json lists."""
    single, index = f"{folder}/model.safetensors", f"{folder}/model.safetensors.index.json"
    if os.path.exists(single):
        return [single]
    if not os.path.exists(index):
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    paths = sorted({f"{folder}/{name}" for name in read_json(index).get("weight_map", {}).values()})
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: listed in model.safetensors.index.json, but not there")
    return paths
