"""plan.py against what it counts: tensors that autograd saves, the memory of a process that does the work.

    python tests/test_memory.py '{"config": {...}, "prompt": 128, ...}'     measure one update and one sampling
"""
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from unittest.mock import patch

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench import memory as plan
from kernels.attention import make_layout
from model import GPT, GPTConfig
from plumbing.optimizer import make_optimizer
from sample import Rollout, generate
from task import Group, Question
from train_rpt import parse_args, policy_step

SHAPES = [
    dict(vocab_size=31, width=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, ffn_width=112),
    dict(vocab_size=90, width=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=16, ffn_width=96,
         family="qwen2", tied_head=False),
    dict(vocab_size=50, width=32, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=32, ffn_width=160,
         family="qwen3")]
GROUPS = [(9, [5, 8, 2]), (4, [7])], [(9, [60] * 5)], [(64, [64] * 2), (60, [8] * 8)]


def flags(more=""):
    return parse_args(f"--plan --init . --gpus 1 --device cpu {more}".split())


def saved_bytes(config, groups, layers, dtype=torch.float32, again=False):
    """Bytes of all storages that autograd saves in a forward, without weights and indices."""
    model, layout = GPT(replace(config, n_layers=layers), dtype), make_layout(groups)
    model.checkpoint_activations = again
    weights, storages = {weight.data_ptr() for weight in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.dtype.is_floating_point and storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage         # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.packed_hidden(torch.zeros(layout.positions.shape, dtype=torch.long), layout)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("shape", SHAPES, ids=["llama", "qwen2", "qwen3"])
def test_parameters_are_miscounted_for_biases_norms_or_an_untied_head(shape):
    model = GPT(GPTConfig(max_positions=256, **shape))
    count = lambda module: sum(weight.numel() for weight in module.parameters())
    assert plan.count_parameters(model.config) == (count(model.layers[0]), count(model))


def test_qwen_shapes_have_the_published_number_of_parameters():
    sizes = [plan.count_parameters(plan.qwen(name))[1] for name in ("0.5B", "1.5B", "7B", "14B", "32B")]
    assert sizes == [494_032_768, 1_543_714_304, 7_615_616_512, 14_770_033_664, 32_763_876_352]


@pytest.mark.parametrize("shape", SHAPES, ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["torch", "bitwise"])
def test_a_tensor_that_a_block_saves_is_missing(shape, kind, use_kernels):
    """A third block saves what is planned for one."""
    use_kernels(kind)
    config = GPTConfig(max_positions=256, **shape)
    for groups in GROUPS[:1] if kind == "bitwise" else GROUPS:                 # the interpreter is slow
        more = saved_bytes(config, groups, 3) - saved_bytes(config, groups, 2)
        assert more == pytest.approx(plan.block_saved(config, groups, kind, 4), rel=0.01)


def test_a_checkpointed_block_is_planned_to_save_more_than_its_input():
    config = GPTConfig(max_positions=256, **SHAPES[0])
    for groups in GROUPS:
        T = sum(P + sum(rollouts) for P, rollouts in groups)
        two, three = (saved_bytes(config, groups, layers, again=True) for layers in (2, 3))
        assert three - two == 4 * T * 48


def test_bf16_activations_are_taken_for_fp32_or_their_fp32_parts_forgotten():
    config = GPTConfig(max_positions=256, **SHAPES[0])
    for groups in GROUPS:  # the weights of matrix products are cast, and the casts are kept
        more = saved_bytes(config, groups, 3, torch.bfloat16) - saved_bytes(config, groups, 2, torch.bfloat16)
        expected = plan.block_saved(config, groups, "torch", 2) + 2 * plan.count_parameters(config)[0]
        assert more == pytest.approx(expected, rel=0.01)


def test_weights_gradients_or_moments_are_divided_by_the_wrong_number_of_ranks():
    """Weights 4, moments 4 (bf16), gradients 4 bytes a parameter, over the 4 ranks that share a copy."""
    args = flags("--gpus 8 --ranks-per-copy 4 --device cuda --bf16-moments")
    config = plan.qwen("7B")
    update, sampling = plan.update(config, args), plan.sampling(config, args)[0]
    for parts in (update, sampling):
        assert parts["weights, fp32"] == parts["moments, bf16"] == update["gradients"] == 7_615_616_512
    assert "gradients" not in sampling                                   # they are freed after the update
    assert plan.sampling(config, args)[0]["gathered weights"] == 2 * 7_615_616_512
    with pytest.raises(ValueError, match="--ranks-per-copy 3 does not divide --gpus 8"):
        plan.state(config, flags("--gpus 8 --ranks-per-copy 3"))


def test_each_memory_flag_makes_its_part_smaller():
    config, base = plan.qwen("7B"), "--gpus 8 --device cuda"
    peak = lambda more: sum(plan.update(config, flags(f"{base} {more}")).values())
    ladder = ["", "--checkpoint-activations", "--checkpoint-activations --reshard",
              "--checkpoint-activations --reshard --bf16-moments",
              "--checkpoint-activations --reshard --bf16-moments --tokens-per-micro-batch 12288"]
    peaks = [peak(more) for more in ladder]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 5
    assert peaks[2] - peaks[3] == 4 * 7_615_616_512 / 8                  # moments of 4 bytes instead of 8


def test_advice_names_flags_that_fit_and_no_fewer_do():
    config, args = plan.qwen("7B"), flags("--gpus 8 --device cuda --gpu-gb 80")
    assert not plan.fits(config, args)[0]
    assert plan.leanest(config, args) == dict(checkpoint_activations=True)
    assert plan.fits(config, flags("--gpus 8 --device cuda --gpu-gb 80 --checkpoint-activations"))[0]
    assert plan.leanest(config, flags("--device cuda --gpu-gb 24")) is None
    assert plan.advice(config, flags("--device cuda --gpu-gb 24")).endswith(" it does")


def test_a_kv_cache_without_room_for_one_rollout_is_said_to_fit():
    config, args = plan.qwen("0.5B"), flags("--gpus 8 --device cuda --kv-gb 0.1")
    parts, rows = plan.sampling(config, args)                            # a row: 12,287 tokens x 12,288 bytes
    assert rows == 0 and parts["KV cache, 0 of 256 rows"] == 0 and not plan.fits(config, args)[0]
    assert plan.sampling(config, flags("--gpus 8 --device cuda --kv-gb 0.152"))[1] == 1


def test_the_plan_says_which_prompts_it_counts_and_that_the_cache_is_too_small(tmp_path, capsys):
    config = plan.qwen("0.5B")
    with patch.object(plan, "read_config", lambda _: config):
        plan.report(flags("--device cuda --tokens-per-micro-batch 8200"))
        assert "prompts of 8 tokens, responses of 8,192; a longer prompt would be refused" in capsys.readouterr().out
        plan.report(flags("--device cuda --kv-gb 0.1"))
        said = capsys.readouterr().out
    assert "prompts of 4,096 tokens, responses of 8,192\n" in said
    assert "it does not fit; --kv-gb 0.1 has no room for one prompt with its response" in said


def test_plan_asks_for_a_corpus_or_for_weights(tmp_path, capsys):
    with open(tmp_path / "config.json", "w") as file:
        json.dump(dict(model_type="qwen2", vocab_size=151936, hidden_size=896, num_hidden_layers=24,
                       num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                       max_position_embeddings=32768, tie_word_embeddings=True), file)
    from tiny import run_here
    code, out, err = run_here("train_rpt.py", "--plan", "--init", tmp_path, "--gpus", 1, "--gpu-gb", 24)
    assert (code or 0, err) == (0, "") and "it does not fit; with --checkpoint-activations it does" in out
    rows = {line[:30].strip(): line.split()[-2:] for line in out.splitlines()}
    assert rows["weights, fp32"] == ["1.98"] * 2 and rows["moments, fp32"] == ["3.95"] * 2
    summed = [sum(float(row[i]) for name, row in rows.items() if name != "peak" and row[i] != "-"
                  and row[i].replace(".", "").isdigit()) for i in (0, 1)]
    assert summed == pytest.approx([float(x) for x in rows["peak"]], abs=0.06)


# ---- the memory of a process -------------------------------------------------------------------------------
MEASURED = dict(vocab_size=8000, width=256, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=64, ffn_width=704)


@pytest.mark.parametrize("more", ["", "--checkpoint-activations"])
def test_the_plan_is_more_than_a_tenth_off_what_a_process_takes(more):
    """Two micro-batches of 512 tokens. malloc gives memory back at once, so that the peak is that of live
    tensors; what comes with the first use of torch is paid in a first, tiny run."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("no /proc: the peak of a phase cannot be read")
    flag = ("--max-prompt-tokens 128 --max-new-tokens 48 --rollouts 8 --batch-size 2 --kv-gb 4 "
            f"--kernels torch --tokens-per-micro-batch 512 {more}")
    config = GPTConfig(max_positions=1024, **MEASURED)
    malloc = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_TOP_PAD_="0")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, json.dumps(asdict(config)), *flag.split()], text=True,
                          capture_output=True, env=environment | malloc | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    args = flags(flag)
    assert sum(plan.update(config, args).values()) == pytest.approx(measured["update"], rel=0.1)
    assert sum(plan.sampling(config, args)[0].values()) == pytest.approx(measured["sampling"], rel=0.1)


def status(field):
    """Bytes of VmRSS (now) or VmHWM (most since it was reset) of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_of(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again here
    call()
    return status("VmHWM")


def measure(model, args):
    """One update, then sampling -> resident bytes at the peak of each."""
    model.checkpoint_activations = args.checkpoint_activations
    optimizer, V = make_optimizer(model, args.lr, (0.9, 0.999), args.weight_decay), model.config.vocab_size
    ids, n = (lambda n: torch.randint(V, (n,)).tolist()), args.max_new_tokens
    groups = [Group(Question([], ids(args.max_prompt_tokens), [], 0),
                    [Rollout(ids(n), [-5.0] * n) for _ in range(args.rollouts)], [], [])
              for _ in range(args.batch_size)]
    advantages = [[(-1.0) ** i for i in range(args.rollouts)]] * args.batch_size
    update = peak_of(lambda: policy_step(model, optimizer, groups, advantages, args))
    optimizer.zero_grad()                                                # as train_rpt.py does
    sampling = peak_of(lambda: generate(model, [g.question.prompt for g in groups], args.rollouts, n,
                                        args.temperature, [], 0, 0, args.max_rows, args.kv_gb))
    return dict(update=update, sampling=sampling)


if __name__ == "__main__":  # CONFIG as JSON or a checkpoint folder, then flags of train_rpt.py
    source, args = sys.argv[1], flags(" ".join(sys.argv[2:]))
    torch.set_num_threads(1)
    measure(GPT(GPTConfig(max_positions=64, **SHAPES[0])),
            flags("--max-prompt-tokens 8 --max-new-tokens 4 --batch-size 2 --tokens-per-micro-batch 32"))
    base = status("VmRSS")
    model = GPT.from_pretrained(source) if os.path.isdir(source) else GPT(GPTConfig(**json.loads(source)))
    print(json.dumps({name: size - base for name, size in measure(model, args).items()}))
