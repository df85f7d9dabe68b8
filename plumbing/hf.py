"""Hugging Face folders of the Llama, Mistral, Qwen2 and Qwen3 families.

    fields = read_config(folder)       # for GPTConfig; refuses what would change the maths
    load_weights(model, folder)        # each rank reads only its part
    save_folder(model, folder)         # transformers can load it, too

What config.json says beside the shapes survives, and so does generation_config.json. Our parameters
have Hugging Face's names without the leading "model.".

    python plumbing/hf.py --to bf16 runs/mine/step_001000 my-model    # half the size of our fp32
"""
import json
import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch

from plumbing import flags, parallel
from plumbing.files import newest_hint, open_tensors, read_json, save_tensors, write

FILE_BYTES = 5 * 10**9  # of one safetensors file; one file is in memory at a time

# Fields of config.json: those that we read, those for which we implement one value only, and those
# that change nothing here. A field in none of the three lists is refused by name.
FIELDS = dict(
    vocab_size="vocab_size", hidden_size="width", num_hidden_layers="n_layers",
    num_attention_heads="n_heads", num_key_value_heads="n_kv_heads", head_dim="head_dim",
    intermediate_size="ffn_width", max_position_embeddings="max_positions", rope_theta="rope_theta",
    rope_scaling="rope_scaling", rms_norm_eps="norm_eps", tie_word_embeddings="tied_head",
    model_type="family")
WHOLE_NUMBERS = set("""
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size max_position_embeddings""".split())
ONLY = dict(
    hidden_act="silu", attention_bias=False, mlp_bias=False, use_mrope=False,
    rope_interleaved=False, partial_rotary_factor=1.0, use_qk_norm=False, num_experts=0,
    quantization_config=None)
HARMLESS = set("""
    architectures attention_dropout bos_token_id eos_token_id pad_token_id initializer_range
    use_cache dtype torch_dtype transformers_version max_window_layers _name_or_path pretraining_tp
    is_llama_config transformers.js_config unsloth_version unsloth_fixed
    _attn_implementation_autoset output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type tokenizer_class
    auto_map name_or_path _commit_hash _attn_implementation attn_implementation
    keys_to_ignore_at_inference gradient_checkpointing max_sequence_length model_max_length
    sep_token_id unk_token_id decoder_start_token_id is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder torchscript use_bfloat16 tf_legacy_loss
    finetuning_task task_specific_params prefix num_labels
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens""".split())
DEFAULTS = dict(rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False)
# Here null means that there is no window, and a file without the field has transformers' window.
FAMILIES = dict(
    llama=dict(max_position_embeddings=2048, sliding_window=None),
    mistral=dict(max_position_embeddings=131072, sliding_window=4096),
    qwen2=dict(max_position_embeddings=32768, sliding_window=4096),
    qwen3=dict(max_position_embeddings=32768, sliding_window=4096, head_dim=128))

# The fields that each kind of rotary positions needs, and those that it may have.
ORIGINAL = "original_max_position_embeddings"
ROPE = dict(
    default=("", ""), linear=("factor", ""),
    llama3=("factor low_freq_factor high_freq_factor", ORIGINAL),
    yarn=("", f"factor {ORIGINAL} attention_factor beta_fast beta_slow mscale mscale_all_dim "
              "truncate"))


def read_config(folder):
    """config.json of a Hugging Face folder -> {field of GPTConfig: value}."""
    path = config_path(folder)
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in list(FAMILIES):  # it may be something that has no hash
        raise ValueError(f"{path}: model_type {family!r} is not implemented; "
                         f"{', '.join(FAMILIES)} are")
    given = {name: value for name, value in raw.items()
             if name == "sliding_window" or value not in (None, {}, [])}
    raw = DEFAULTS | FAMILIES[family] | given
    check_sizes(path, raw)
    read_rope(path, raw)
    refuse_windows(path, raw, family)
    read_chunks(path, raw)
    for name, value in raw.items():
        known = name in FIELDS or name in ONLY or name in HARMLESS
        if not known or name in ONLY and value != ONLY[name]:
            raise refusal(path, name, value)
    heads = raw["num_attention_heads"]
    raw = dict(num_key_value_heads=heads, head_dim=raw["hidden_size"] // heads) | raw
    if heads % raw["num_key_value_heads"]:
        raise ValueError(f"{path}: num_attention_heads = {heads} is no multiple of "
                         f"num_key_value_heads = {raw['num_key_value_heads']}")
    return {ours: raw[theirs] for theirs, ours in FIELDS.items()}


def check_sizes(path, raw):
    for name in FIELDS:
        # The first two follow from other fields, and most models have no third.
        optional = ("num_key_value_heads", "head_dim", "rope_scaling")
        if name not in raw and name not in optional:
            raise ValueError(f"{path}: field {name} is missing")
        value = raw.get(name, 1)
        if name in WHOLE_NUMBERS and not (type(value) is int and value > 0):
            raise ValueError(f"{path}: {name} = {json.dumps(value)} should be a positive whole "
                             "number")
        if name in ("rope_theta", "rms_norm_eps") and not is_positive(value):
            raise ValueError(f"{path}: {name} = {json.dumps(value)} should be a positive number")


def is_positive(value):
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def config_path(folder):
    """-> path of config.json; FileNotFoundError where there is none."""
    path = f"{folder}/config.json"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder holds config.json and "
                                f"*.safetensors{newest_hint(folder)}")
    return path


def read_rope(path, raw):
    """Set rope_theta and rope_scaling (sorted pairs), in whichever layout config.json has them."""
    # transformers >= 5 writes the second field, but prefers the first where both are there.
    forms = {name: raw.pop(name) for name in ("rope_scaling", "rope_parameters") if name in raw}
    found = [read_rope_field(path, raw, name, form) for name, form in forms.items()]
    theta, pairs = found[0] if found else (raw["rope_theta"], ())
    if found and found[-1] not in ((theta, pairs), (theta, ())):
        raise ValueError(f"{path}: rope_scaling and rope_parameters differ: {json.dumps(forms)}")
    raw.pop(ORIGINAL, None)
    raw["rope_theta"], raw["rope_scaling"] = theta, pairs
    scaling = dict(pairs)
    if scaling.get("rope_type") == "yarn":
        # Qwen2.5's instructions add YaRN to a file whose positions are those before stretching.
        stretched = int(scaling["factor"] * scaling[ORIGINAL])
        raw["max_position_embeddings"] = max(raw["max_position_embeddings"], stretched)


def read_rope_field(path, raw, name, rope):
    """-> rope_theta, sorted pairs of the fields that `plumbing.rope.frequencies` takes."""
    if not isinstance(rope, dict):
        raise refusal(path, name, rope)
    fields = {key: value for key, value in rope.items() if value is not None}
    kinds = {str(fields.pop(key)) for key in ("type", "rope_type") if key in fields}
    kind = " ".join(kinds) or "default"
    needed, optional = ROPE.get(kind, ("", ""))
    # `finetuned` is a note; a rotation of all pairs is what we do.
    fields.pop("finetuned", None)
    partial = fields.pop("partial_rotary_factor", 1) != 1
    unknown = fields.keys() - {"rope_theta", *needed.split(), *optional.split()}
    if kind not in ROPE or partial or unknown or set(needed.split()) - fields.keys():
        raise refusal(path, name, rope)
    if ORIGINAL in optional:
        positions = raw["max_position_embeddings"]
        # transformers prefers the field that stands outside.
        fields[ORIGINAL] = raw.get(ORIGINAL, fields.get(ORIGINAL, positions))
    theta = fields.pop("rope_theta", raw["rope_theta"])
    for key, value in dict(fields, rope_theta=theta).items():
        if not (isinstance(value, bool) if key == "truncate" else is_positive(value)):
            raise ValueError(f"{path}: {name}: {key} = {json.dumps(value)} should be a positive "
                             "number (truncate: true or false)")
    if kind == "yarn":
        fields.setdefault("factor", positions / fields[ORIGINAL])
    if kind != "default":
        fields["rope_type"] = kind
    return theta, tuple(sorted(fields.items()))


def refuse_windows(path, raw, family):
    """Drop the fields about sliding windows if no token can lie outside of one; else refuse."""
    window, used = raw.pop("sliding_window"), raw.pop("use_sliding_window", False)
    layer_types = raw.pop("layer_types", [])
    if not isinstance(layer_types, list) or {*map(type, layer_types)} - {str}:
        raise refusal(path, "layer_types", layer_types)
    others = set(layer_types) - {"full_attention"}
    is_wide = isinstance(window, int) and window >= raw["max_position_embeddings"]
    if is_wide and others <= {"sliding_attention"}:
        return
    if others:
        raise refusal(path, "layer_types", layer_types)
    if family in ("qwen2", "qwen3"):
        # Qwen's files name a window that they do not use, or that begins above the last layer.
        above = raw.get("max_window_layers", 28) >= raw["num_hidden_layers"]
        if not (used and window) or layer_types or above:
            return
    for name, value in (("sliding_window", window), ("use_sliding_window", used)):
        if value:
            raise refusal(path, name, value)


def read_chunks(path, raw):
    """Qwen2.5-1M attends in chunks, which changes nothing within the first: go no further."""
    name = "dual_chunk_attention_config"
    chunks = raw.pop(name, None)
    if chunks is None:
        return
    sizes = dict(chunks) if isinstance(chunks, dict) else {}
    if {*map(type, sizes.values())} != {int}:
        raise refusal(path, name, chunks)
    longest = sizes.pop(ORIGINAL, float("inf"))
    if sizes.keys() != {"chunk_size", "local_size"} or sizes["chunk_size"] <= sizes["local_size"]:
        raise refusal(path, name, chunks)
    longest = min(longest, sizes["chunk_size"] - sizes["local_size"])
    raw["max_position_embeddings"] = min(raw["max_position_embeddings"], longest)


def refusal(path, name, value):
    return ValueError(f"{path}: {name} = {json.dumps(value)} is not implemented and may change "
                      "the maths")


# ---- weights ----

def load_weights(model, folder):
    """Copy the weights of a folder into a model that has memory but no values.

    ValueError names the file and the tensor that is missing, damaged, or has no place in the model.
    """
    missing = dict(model.named_parameters())
    head = None
    for path in weight_files(folder):
        for key, tensor in read_tensors(path):
            name = key.removeprefix("model.")
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
    """Yield (name, tensor) of a safetensors file; slicing the tensor reads its values."""
    with open_tensors(path) as file:
        for key in file.keys():
            yield key, file.get_slice(key)


def weight_files(folder):
    """The safetensors files of a folder: one, or those that model.safetensors.index.json lists."""
    single, index = f"{folder}/model.safetensors", f"{folder}/model.safetensors.index.json"
    if os.path.exists(single):
        return [single]
    if not os.path.exists(index):
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor "
                                "model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
        raise ValueError(f"{index}: expected weight_map, an object of tensors and their files")
    paths = [f"{folder}/{name}" for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: listed in model.safetensors.index.json, but not "
                                    "there")
    return paths


# ---- saving ----

def read_files(folder):
    """-> {path in the folder: bytes} of what a model keeps beside its weights and tokenizer."""
    names = ["config.json", "generation_config.json", "additional_chat_templates/*.jinja"]
    paths = [path for name in names for path in Path(folder).glob(name)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def save_folder(model, folder):
    """Write config.json, what came with it, and the weights; a tied head is stored once.

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
            for name, content in model.files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
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
                save_tensors(tensors, f"{folder}/{path}")
        except OSError as reason:
            error = reason
    if error:
        raise error


def huggingface_config(model):
    """The contents of config.json: as it was read, or made from the model's shapes."""
    if "config.json" in model.files:
        return with_dtype(json.loads(model.files["config.json"]), model.embed_tokens.weight.dtype)
    config = model.config
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    scaling = dict(fields.pop("rope_scaling"))
    fields |= dict(architectures=[f"{config.family.title()}ForCausalLM"], hidden_act="silu",
                   attention_bias=False)
    if scaling:
        fields["rope_scaling"] = scaling
    if config.family == "mistral":
        fields["sliding_window"] = None
    return with_dtype(fields, model.embed_tokens.weight.dtype)


def with_dtype(fields, dtype):
    """config.json's fields for weights of this dtype, under the name that the file has for it."""
    names = {"dtype", "torch_dtype"} & fields.keys() or {"torch_dtype"}
    return fields | dict.fromkeys(names, str(dtype).removeprefix("torch."))


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
    write(path, json.dumps(content, indent=2))


# ---- the command ----

DTYPES = dict(bf16=torch.bfloat16, fp32=torch.float32)
# What stays behind: weights in any format, their indices, and a trainer's state.
LEFT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json",
        "trainer.json")


def convert(source, out, dtype):
    """Write a copy of a folder with weights of this dtype; one file is in memory at a time."""
    read_config(source)
    paths = weight_files(source)
    if os.path.exists(out):
        raise ValueError(f"{out} is there already: choose another folder, or remove it")
    partial = Path(f"{Path(out)}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        copy_files(Path(source), partial)
        config = read_json(config_path(source))
        write_json(f"{partial}/config.json", with_dtype(config, dtype))
        total = sum(convert_file(path, partial / Path(path).name, dtype) for path in paths)
        if not (partial / "model.safetensors").exists():
            name = "model.safetensors.index.json"
            index = read_json(f"{source}/{name}")
            write_json(f"{partial}/{name}", index | dict(metadata=dict(total_size=total)))
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def convert_file(source, out, dtype):
    """Write a safetensors file with floats of this dtype, the nearest or the even one -> bytes."""
    tensors = {}
    for name, part in read_tensors(source):
        tensor = part[:]
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    save_tensors(tensors, out)
    return sum(tensor.nbytes for tensor in tensors.values())


def copy_files(source, out):
    """Everything but hidden files and what is LEFT; the umask decides on permissions."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        left = path.name.endswith(LEFT) or name.parts[0] == "optimizer"
        if path.is_file() and not hidden and not left:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)


def parse_args():
    parser = flags.Parser("Copy a checkpoint folder with its weights in another dtype.")
    add = parser.add_argument
    add("--to", required=True, choices=DTYPES, help="dtype of the copy's weights")
    add("source", help="checkpoint folder; one of a run is copied without its trainer's state")
    add("out", help="folder to write, which must not exist")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    size = convert(args.source, args.out, DTYPES[args.to])
    print(f"{args.out}: {size / 1e9:.2f} GB of weights in {args.to}")
