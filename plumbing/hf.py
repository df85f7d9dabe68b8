"""Hugging Face folders of the Llama, Qwen2 and Qwen3 families: config.json and *.safetensors.

    fields = read_config(folder)       # for GPTConfig; refuses what would change the maths
    load_weights(model, folder)        # each rank reads only its part
    save_folder(model, folder)         # transformers can load it, too

Our parameters have Hugging Face's names without the leading "model.".
"""
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing import parallel
from plumbing.checkpoint import newest_hint

FILE_BYTES = 5 * 10**9  # of one safetensors file; one file is in memory at a time

# Fields of config.json: those that we read, those for which we implement one value only, and those
# that change nothing here. A field in none of the three lists is refused by name.
FIELDS = dict(
    vocab_size="vocab_size", hidden_size="width", num_hidden_layers="n_layers",
    num_attention_heads="n_heads", num_key_value_heads="n_kv_heads", head_dim="head_dim",
    intermediate_size="ffn_width", max_position_embeddings="max_positions", rope_theta="rope_theta",
    rms_norm_eps="norm_eps", tie_word_embeddings="tied_head", model_type="family")
WHOLE_NUMBERS = set("""
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size max_position_embeddings""".split())
ONLY = dict(
    hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False,
    use_mrope=False, rope_interleaved=False, partial_rotary_factor=1.0, use_qk_norm=False,
    num_experts=0, quantization_config=None)
HARMLESS = set("""
    architectures attention_dropout bos_token_id eos_token_id pad_token_id initializer_range
    use_cache dtype torch_dtype transformers_version max_window_layers _name_or_path pretraining_tp
    is_llama_config transformers.js_config unsloth_version unsloth_fixed
    _attn_implementation_autoset output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type tokenizer_class
    auto_map""".split())
DEFAULTS = dict(rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False)
FAMILIES = dict(
    llama=dict(max_position_embeddings=2048), qwen2=dict(max_position_embeddings=32768),
    qwen3=dict(max_position_embeddings=32768, head_dim=128))


def read_config(folder):
    """config.json of a Hugging Face folder -> {field of GPTConfig: value}."""
    path = config_path(folder)
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not implemented; "
                         "llama, qwen2 and qwen3 are")
    given = {name: value for name, value in raw.items() if value is not None}
    raw = DEFAULTS | FAMILIES[family] | given
    read_rope(path, raw)
    refuse_windows(path, raw, family)
    for name, value in raw.items():
        known = name in FIELDS or name in ONLY or name in HARMLESS
        if not known or name in ONLY and value != ONLY[name]:
            raise refusal(path, name, value)
    for name in FIELDS:
        # These two follow from other fields.
        if name not in raw and name not in ("num_key_value_heads", "head_dim"):
            raise ValueError(f"{path}: field {name} is missing")
        value = raw.get(name, 1)
        if name in WHOLE_NUMBERS and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{path}: {name} = {json.dumps(value)} should be a positive whole "
                             "number")
    heads = raw["num_attention_heads"]
    raw = dict(num_key_value_heads=heads, head_dim=raw["hidden_size"] // heads) | raw
    if heads % raw["num_key_value_heads"]:
        raise ValueError(f"{path}: num_attention_heads = {heads} is no multiple of "
                         f"num_key_value_heads = {raw['num_key_value_heads']}")
    return {ours: raw[theirs] for theirs, ours in FIELDS.items()}


def config_path(folder):
    """-> path of config.json; FileNotFoundError where there is none."""
    path = f"{folder}/config.json"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder holds config.json and "
                                f"*.safetensors{newest_hint(folder)}")
    return path


def read_rope(path, raw):
    """Take rope_theta out of the field that holds it; refuse every kind of scaling."""
    for name in ("rope_parameters", "rope_scaling"):  # transformers >= 5 uses the first
        rope = raw.pop(name, {})
        if any(value != "default" for key, value in rope.items() if key != "rope_theta"):
            raise refusal(path, name, rope)
        raw["rope_theta"] = rope.get("rope_theta", raw["rope_theta"])


def refuse_windows(path, raw, family):
    """Drop the fields about sliding windows if no window is used; else refuse."""
    layer_types = raw.pop("layer_types", [])
    if set(layer_types) - {"full_attention"}:
        raise refusal(path, "layer_types", layer_types)
    window = raw.pop("sliding_window", None)
    # Qwen's files name a window that they do not use.
    if window and raw.get("use_sliding_window", family == "llama"):
        raise refusal(path, "sliding_window", window)


def refusal(path, name, value):
    return ValueError(f"{path}: {name} = {json.dumps(value)} is not implemented and may change "
                      "the maths")


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


# ---- weights ----

def load_weights(model, folder):
    """Copy the weights of a folder into a model that has memory but no values.

    ValueError names the file and the tensor that is missing, damaged, or has no place in the model.
    """
    missing = dict(model.named_parameters())
    head = None
    for path in weight_files(folder):
        for name, tensor in read_tensors(path):
            # Old folders store rotary frequencies, although they follow from config.json.
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight" and model.config.tied_head:
                head = path, tensor
                continue
            if name not in missing:
                raise ValueError(f"{path}: tensor {name} has no place in this model, or comes "
                                 "twice")
            weight = missing.pop(name)
            check_shape(path, name, tensor, weight)
            with torch.no_grad():
                parallel.local(weight).copy_(tensor[parallel.local_slice(weight)])
    if missing:
        raise ValueError(f"{folder}: tensor {next(iter(missing))} is in no safetensors file")
    if head is not None:
        check_tied_head(model, folder, *head)


def check_tied_head(model, folder, path, tensor):
    """Some folders store a tied head as well; it has to equal the embedding."""
    check_shape(path, "lm_head.weight", tensor, model.head)
    stored = tensor[parallel.local_slice(model.head)].to(model.head)
    if not torch.equal(stored, parallel.local(model.head)):
        raise ValueError(f"{folder}: lm_head.weight differs from the embedding, yet config.json "
                         "ties it")


def check_shape(path, name, tensor, weight):
    shape, expected = tuple(tensor.get_shape()), tuple(weight.shape)
    if shape != expected:
        raise ValueError(f"{path}: {name} has shape {shape}, config.json asks for {expected}")


def read_tensors(path):
    """Yield (our name, tensor) of a safetensors file; slicing the tensor reads its values."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key.removeprefix("model."), file.get_slice(key)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or incomplete ({error}); copy or download it "
                         "again") from None


def weight_files(folder):
    """The safetensors files of a folder: one, or those that model.safetensors.index.json lists."""
    single, index = f"{folder}/model.safetensors", f"{folder}/model.safetensors.index.json"
    if os.path.exists(single):
        return [single]
    if not os.path.exists(index):
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor "
                                "model.safetensors.index.json")
    names = set(read_json(index).get("weight_map", {}).values())
    paths = [f"{folder}/{name}" for name in sorted(names)]
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: listed in model.safetensors.index.json, but not "
                                    "there")
    return paths


# ---- saving ----

def save_folder(model, folder):
    """Write config.json and the weights; a tied head is stored once.

    All ranks call this, rank 0 writes: model.safetensors, or numbered files of 5 GB and their
    index. OSError, after all ranks have done their part, when a file cannot be written.
    """
    named = {}
    for name, weight in model.named_parameters():
        named[name if name == "lm_head.weight" else f"model.{name}"] = weight.detach()
    files = split_files(named)
    error = None
    if parallel.RANK == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            write_json(f"{folder}/config.json", huggingface_config(model))
            if len(files) > 1:
                write_json(f"{folder}/model.safetensors.index.json", index_of(files))
        except OSError as reason:  # a full disk; the other ranks still wait for this one
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
        except SafetensorError as reason:  # a full disk, too
            error = OSError(f"{folder}/{path}: cannot write ({reason})")
    if error:
        raise error


def huggingface_config(model):
    """The contents of config.json."""
    config = model.config
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    return fields | dict(architectures=[f"{config.family.title()}ForCausalLM"], hidden_act="silu",
                         attention_bias=False, torch_dtype=dtype)


def split_files(weights):
    """{name: weight} -> {file: {name: weight}}, as few files as FILE_BYTES allows in this order."""
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
    count = f"{len(parts):05d}"
    return {f"model-{i:05d}-of-{count}.safetensors": part for i, part in enumerate(parts, start=1)}


def index_of(files):
    """The contents of model.safetensors.index.json."""
    total, weight_map = 0, {}
    for path, part in files.items():
        for name, weight in part.items():
            total += weight.numel() * weight.itemsize
            weight_map[name] = path
    return dict(metadata=dict(total_size=total), weight_map=weight_map)


def write_json(path, content):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
