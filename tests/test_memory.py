"""bench/memory.py against what it counts: tensors that autograd saves, and the memory of a process.

    python tests/test_memory.py CONFIG --max-prompt-tokens 128 ...     measure update and sampling

CONFIG: a checkpoint folder, or the fields of GPTConfig as JSON; then flags of bench/memory.py.
"""
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train_rpt
from bench import memory, train
from kernels.attention import make_layout
from model import GPT, GPTConfig
from plumbing.batch import Example, pack
from plumbing.optimizer import make_optimizer
from plumbing import memory as process_memory, parallel
from sample import generate, kv_budget

SHAPES = [
    GPTConfig(vocab_size=31, width=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16,
              ffn_width=112, max_positions=256),
    GPTConfig(vocab_size=90, width=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=16,
              ffn_width=96, max_positions=256, family="qwen2", tied_head=False),
    GPTConfig(vocab_size=50, width=32, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=32,
              ffn_width=160, max_positions=256, family="qwen3")]
GROUPS = [(9, [5, 8, 2]), (4, [7])], [(9, [60] * 5)], [(64, [64] * 2), (60, [8] * 8)]
SEVEN = memory.SHAPES["7B"]


def flags(words=""):
    return memory.parse_args(f"--gpus 1 {words}".split())


# ---- formulas against counted tensors ----

def saved_bytes(config, groups, layers, dtype=torch.float32, again=False):
    """Bytes of all storages that autograd saves in a forward, without weights and indices."""
    model, layout = GPT(replace(config, n_layers=layers), dtype), make_layout(groups)
    model.checkpoint_activations = again
    weights, storages = {weight.data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.dtype.is_floating_point and storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage         # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.zeros_like(layout.positions), layout.positions, layout.attend)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("config", SHAPES, ids=["llama", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_model(config):
    model = GPT(config)
    block, total = (sum(weight.numel() for weight in module.parameters())
                    for module in (model.layers[0], model))
    assert memory.count_parameters(config) == (block, total)


def test_qwen_shapes_have_the_published_number_of_parameters():
    sizes = [memory.count_parameters(config)[1] for config in memory.SHAPES.values()]
    assert sizes == [494_032_768, 1_543_714_304, 7_615_616_512, 14_770_033_664, 32_763_876_352]


@pytest.mark.parametrize("config", SHAPES, ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("bitwise", marks=pytest.mark.slow)])
def test_a_third_block_saves_what_is_planned_for_one(config, backend, use_kernels):
    use_kernels(backend)
    for groups in GROUPS[:1] if backend == "bitwise" else GROUPS:  # the interpreter is slow
        more = saved_bytes(config, groups, 3) - saved_bytes(config, groups, 2)
        assert more == pytest.approx(memory.block_saved(config, groups, backend, 4), rel=0.01)


def test_a_checkpointed_block_saves_its_input():
    for groups in GROUPS:
        two, three = (saved_bytes(SHAPES[0], groups, layers, again=True) for layers in (2, 3))
        assert three - two == 4 * memory.count_tokens(groups)[0] * 48


def test_in_bf16_a_block_also_saves_the_cast_weights_of_its_products():
    for groups in GROUPS:
        two, three = (saved_bytes(SHAPES[0], groups, layers, torch.bfloat16) for layers in (2, 3))
        expected = memory.block_saved(SHAPES[0], groups, "torch", 2)
        expected += 2 * memory.count_parameters(SHAPES[0])[0]
        assert three - two == pytest.approx(expected, rel=0.01)


def test_packed_tokens_are_all_tensors_of_the_micro_batches_on_the_gpu():
    args = flags("--max-prompt-tokens 90 --max-new-tokens 70 --batch-size 3 --rollouts 5 "
                 "--tokens-per-micro-batch 250")                           # two rollouts a part
    example = Example([0] * 90, [[0] * 70] * 5, [[0.5] * 70] * 5, [[0.0] * 70] * 5)
    counted = 0
    for batch in pack([example] * 3, args.tokens_per_micro_batch, "cpu"):
        batch.old_logprobs = torch.zeros_like(batch.sampled_logprobs)  # as policy_update sets it
        fields = vars(batch) | vars(batch.layout)
        del fields["segments"]                                         # stays on the CPU
        counted += sum(x.nbytes for x in fields.values() if isinstance(x, torch.Tensor))
    assert memory.packed_bytes(SHAPES[0], args) == pytest.approx(counted, rel=0.01)


# ---- the plan ----

def test_weights_gradients_and_moments_are_spread_over_the_ranks_of_a_copy():
    """4 bytes a parameter each (moments in bf16), over the 4 ranks that share a copy."""
    args = flags("--gpus 8 --ranks-per-copy 4 --bf16-moments")
    update, sampling = memory.update(SEVEN, args), memory.sampling(SEVEN, args)[0]
    for parts in (update, sampling):
        assert parts["weights, fp32"] == parts["moments, bf16"] == 7_615_616_512
    assert update["gradients"] == 7_615_616_512
    assert "gradients" not in sampling  # they are freed after the update
    assert sampling["gathered weights"] == 2 * 7_615_616_512
    with pytest.raises(ValueError, match="--ranks-per-copy 3 does not divide --gpus 8"):
        memory.state(SEVEN, flags("--gpus 8 --ranks-per-copy 3"))


def test_each_memory_flag_makes_its_part_smaller():
    words, peaks = "--gpus 8", []
    for more in ("", "--checkpoint-activations", "--reshard", "--bf16-moments",
                 "--tokens-per-micro-batch 12288"):
        words += f" {more}"
        peaks.append(sum(memory.update(SEVEN, flags(words)).values()))
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 5
    assert peaks[2] - peaks[3] == 4 * 7_615_616_512 / 8  # moments of 4 bytes instead of 8


def test_the_leanest_flags_fit_and_fewer_do_not():
    args = flags("--gpus 8 --gpu-gb 80")
    assert not memory.fits(SEVEN, args)[0]
    assert memory.leanest(SEVEN, args) == dict(checkpoint_activations=True)
    assert memory.fits(SEVEN, flags("--gpus 8 --gpu-gb 80 --checkpoint-activations"))[0]
    assert memory.leanest(SEVEN, flags("--gpu-gb 24")) is None


def test_a_kv_cache_without_room_for_one_rollout_does_not_fit():
    """A prompt and its rollout have 12,287 tokens of 12,288 bytes."""
    config, args = memory.SHAPES["0.5B"], flags("--gpus 8 --kv-gb 0.1")
    parts, rows = memory.sampling(config, args)
    assert rows == 0 and parts["KV cache, 0 of 256 rows"] == 0 and not memory.fits(config, args)[0]
    assert memory.sampling(config, flags("--gpus 8 --kv-gb 0.152"))[1] == 1


def test_a_gpu_decodes_as_many_rows_as_85_percent_of_what_is_free_can_hold():
    """1.5B: 80 GB less 6 %, 1 GB, 14 bytes a parameter; a row has 8,191 tokens of 28,672 bytes,
    and 4.08 / 8 slots of 4,096."""
    free = 0.94 * 80e9 - 1e9 - (4 + 8 + 2) * 1_543_714_304
    row = 28_672 * (8191 + (2 + math.log(8)) / 8 * 4096)
    rows = memory.sampling(memory.SHAPES["1.5B"], flags())[1]
    assert rows == pytest.approx(0.85 * free / row, abs=1) and rows == 151
    assert memory.sampling(SEVEN, flags("--gpus 8 --checkpoint-activations"))[1] == 70


@pytest.mark.parametrize("kernels", ["bitwise", "torch"])
@pytest.mark.parametrize("gpus, lean", [(1, ""), (1, "--bf16-moments"), (8, ""),
                                        (8, "--bf16-moments --reshard")])
def test_the_share_of_the_cache_leaves_room_for_all_other_buffers(gpus, lean, kernels):
    for config, gb in product(memory.SHAPES.values(), (24, 80, 141)):
        args = flags(f"--gpus {gpus} --gpu-gb {gb} --kernels {kernels} {lean}")
        parts, rows = memory.sampling(config, args)
        assert rows == 0 or sum(parts.values()) + memory.reserve(args) <= gb * 1e9


def test_the_sampler_takes_the_share_that_is_counted(monkeypatch):
    """Of 10 GB that are free and 3 that torch's allocator keeps; on a CPU at most half of all."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5e9)
    assert kv_budget(None, torch.device("cuda")) == pytest.approx(0.85 * 13e9)
    assert kv_budget(2.5, torch.device("cuda")) == kv_budget(2.5, torch.device("cpu")) == 2.5e9
    for free, budget in ((7e9, 4e9), (2e9, 1.7e9)):
        monkeypatch.setattr(process_memory, "available", lambda: (free, 8e9))
        assert kv_budget(None, torch.device("cpu")) == budget
    monkeypatch.setattr(parallel, "LOCAL_WORLD", 4)
    assert kv_budget(None, torch.device("cpu")) == pytest.approx(1.7e9 / 4)


GB = 10**9
MEMINFO = {"proc/meminfo": "MemTotal: 23437500 kB\nMemFree: 1 kB\nMemAvailable: 19531250 kB\nHugePages: 0\n"}


@pytest.mark.parametrize("files, free", [
    (MEMINFO, 20),
    # Version 2: the files lie in the group, around it, or at the mount of a container.
    (MEMINFO | {"proc/self/cgroup": "0::/a/b\n", "a/b/memory.max": 3, "a/b/memory.current": 1}, 2),
    (MEMINFO | {"proc/self/cgroup": "0::/a/b\n", "a/b/memory.max": "max", "a/b/memory.current": 1,
                "a/memory.max": 5, "a/memory.current": 4.5}, 0.5),
    (MEMINFO | {"proc/self/cgroup": "0::/\n", "memory.max": 3, "memory.current": 1}, 2),
    (MEMINFO | {"proc/self/cgroup": "0::/../x\n", "memory.max": 3, "memory.current": 1}, 2),
    (MEMINFO | {"proc/self/cgroup": "0::/a\n", "a/memory.max": 30, "a/memory.current": 2}, 20),
    (MEMINFO | {"proc/self/cgroup": "0::/a\n", "a/memory.high": 3, "a/memory.max": 8, "a/memory.current": 2}, 1),
    (MEMINFO | {"proc/self/cgroup": "0::/a\n", "a/memory.max": 3, "a/memory.current": 4}, 0),
    # Cached files will make room.
    (MEMINFO | {"proc/self/cgroup": "0::/a\n", "a/memory.max": 3, "a/memory.current": 2.5,
                "a/memory.stat": f"anon {GB}\ninactive_file {GB}\nactive_file {GB // 2}\n"}, 1.5),
    # Version 1, alone or beside an empty version 2; no limit is a huge number.
    (MEMINFO | {"proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n", "memory/a/b/memory.limit_in_bytes": 4,
                "memory/a/b/memory.usage_in_bytes": 2, "memory/a/b/memory.stat": f"total_inactive_file {GB}\n",
                "memory/a/memory.limit_in_bytes": 2**63 / GB, "memory/a/memory.usage_in_bytes": 2}, 3),
    (MEMINFO | {"proc/self/cgroup": "4:memory:/docker/1f\n", "memory/memory.limit_in_bytes": 3,
                "memory/memory.usage_in_bytes": 1}, 2),
    (MEMINFO | {"proc/self/cgroup": "4:cpu:/a\n", "memory/a/memory.limit_in_bytes": 3,
                "memory/a/memory.usage_in_bytes": 1}, 20)])  # another process's group
def test_free_is_what_the_machine_has_and_every_group_around_the_process_leaves(tmp_path, files, free):
    for name, content in files.items():
        path = tmp_path / (name if name.startswith("proc") else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else f"{int(content * GB)}\n")
    assert process_memory.available(tmp_path) == (free * GB, 24 * GB)


def test_without_such_files_the_whole_machine_is_free(tmp_path):
    free, total = process_memory.available(tmp_path)
    assert free == total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_prompt_without_room_is_refused():
    with pytest.raises(ValueError, match="12288 is the least that would do"):
        memory.update(SEVEN, flags("--tokens-per-micro-batch 12287"))
    with pytest.raises(ValueError, match="--max-new-tokens 256 leaves no room for a prompt"):
        memory.update(SHAPES[0], flags("--max-new-tokens 256"))


@pytest.mark.parametrize("words, share, fuller", [
    ("--max-prompt-tokens 1024 --max-new-tokens 1024", 9 / 16, 2 * 9216),        # one group of 9
    ("--max-prompt-tokens 1024 --max-new-tokens 1024 --rollouts 4", 15 / 16, 4 * 5120),
    ("--max-prompt-tokens 1024", 9 / 16, 1024 + 2 * 8192),                       # one rollout
    ("", 12 / 16, 4096 + 2 * 8192)])
def test_micro_batches_that_groups_do_not_fill_are_named(capsys, words, share, fuller):
    args = flags(f"--init . {words}")
    assert memory.filled(SEVEN, args) == (share, fuller)
    args.tokens_per_micro_batch = fuller
    assert memory.filled(SEVEN, args)[0] == 1
    memory.print_plan(SEVEN, flags(f"--init . --gpu-gb 300 {words}"))
    line = f"micro-batches are {share:.0%} full; --tokens-per-micro-batch {fuller} would fill them, and fits\n"
    assert (line in capsys.readouterr().out) == (share < 0.75)


def test_flags_have_the_defaults_of_train_rpt():
    theirs = vars(train_rpt.parse_args(["--init", ".", "--out-dir", ".", "--device", "cuda"]))
    for name, value in vars(memory.parse_args(["--init", "."])).items():
        assert name in ("gpus", "gpu_gb") or theirs[name] == value, name


def test_the_plan_needs_config_json_only_and_its_columns_add_up(tmp_path):
    with open(tmp_path / "config.json", "w") as file:
        json.dump(dict(model_type="qwen2", vocab_size=151936, hidden_size=896, num_hidden_layers=24,
                       num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                       max_position_embeddings=32768, tie_word_embeddings=True), file)
    from tiny import run_here
    code, out, err = run_here("bench/memory.py", "--init", tmp_path, "--gpus", 1, "--gpu-gb", 24)
    assert (code or 0, err) == (0, "")
    assert "it does not fit; with --checkpoint-activations it does" in out
    rows = {line[:32].strip(): line[32:].split() for line in out.splitlines()[3:-1]}
    assert rows["weights, fp32"] == ["1.98"] * 2 and rows["moments, fp32"] == ["3.95"] * 2
    peak = [float(cell) for cell in rows.pop("peak")]
    for column in (0, 1):
        cells = [row[column] for row in rows.values() if row[column] != "-"]
        assert sum(map(float, cells)) == pytest.approx(peak[column], abs=0.06)


def test_the_table_is_the_one_in_the_docs():
    from tiny import ROOT, run_here
    code, out, err = run_here("bench/memory.py")
    docs = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert (code or 0, err) == (0, "") and out.startswith("| Qwen2.5 |") and out in docs


# ---- the memory of a process ----

MEASURED = GPTConfig(vocab_size=8000, width=256, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=64,
                     ffn_width=704, max_positions=1024)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--checkpoint-activations"])
def test_a_process_takes_what_is_planned_to_a_tenth(more):
    """Two micro-batches of 512 tokens. malloc gives memory back at once, so that the peak is that
    of live tensors; what comes with the first use of torch is paid in a first, tiny run."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("no /proc: the peak of a phase cannot be read")
    words = ("--device cpu --kernels torch --max-prompt-tokens 128 --max-new-tokens 48 "
             f"--batch-size 2 --kv-gb 4 --tokens-per-micro-batch 512 {more}")
    malloc = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536",
                  MALLOC_TOP_PAD_="0")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, json.dumps(asdict(MEASURED)), *words.split()],
                          text=True, capture_output=True,
                          env=environment | malloc | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    measured, args = json.loads(done.stdout), flags(words)
    assert sum(memory.update(MEASURED, args).values()) == pytest.approx(measured["update"], rel=0.1)
    sampling, _ = memory.sampling(MEASURED, args)
    assert sum(sampling.values()) == pytest.approx(measured["sampling"], rel=0.1)


def status(field):
    """Bytes of VmRSS (now) or VmHWM (most since it was reset) of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(model, args):
    """One update, then sampling -> resident bytes at the peak of each."""
    model.checkpoint_activations = args.checkpoint_activations
    optimizer = make_optimizer(model, 0.0, (0.9, 0.999), bf16_moments=args.bf16_moments)
    groups = train.random_groups(model.config, args.batch_size, args.max_prompt_tokens,
                                 [args.max_new_tokens] * args.rollouts)
    reset_peak()
    train.update(model, optimizer, groups, args.tokens_per_micro_batch)
    update = status("VmHWM")
    optimizer.zero_grad()  # as train_rpt.py does
    reset_peak()
    generate(model, train.prompts_of(groups), args.rollouts, args.max_new_tokens, 1.0, [], seed=0,
             max_rows=args.max_rows, kv_gb=args.kv_gb)
    return dict(update=update, sampling=status("VmHWM"))


if __name__ == "__main__":
    source, args = sys.argv[1], memory.parse_args(sys.argv[2:])
    torch.set_num_threads(1)
    measure(GPT(SHAPES[0]), Namespace(**vars(args) | dict(
        max_prompt_tokens=8, max_new_tokens=4, batch_size=2, tokens_per_micro_batch=32)))
    base = status("VmRSS")
    if os.path.isdir(source):
        model = GPT.from_pretrained(source)
    else:
        model = GPT(GPTConfig(**json.loads(source) | dict(rope_scaling=())))
    print(json.dumps({name: size - base for name, size in measure(model, args).items()}))
