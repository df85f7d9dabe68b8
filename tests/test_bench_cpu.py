"""bench/cpu.py at tiny shapes: each side does the work that its row names, ratios are those of the cells."""
import dataclasses
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import common, cpu
from model import GPT
from test_bench import MODEL, cells
from tiny import run_here

TINY = dataclasses.replace(MODEL, n_layers=1)


def planted(monkeypatch, *seconds):
    """Every call is made once and is said to have taken the next of these seconds."""
    seconds = iter(seconds)

    def clocked(repeats, *calls):
        for call in calls:
            call()
        return [(wall, 1000 * wall) for wall in itertools.islice(seconds, len(calls))]
    monkeypatch.setattr(cpu, "timed", clocked)


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", cpu.DTYPES.values())
def test_the_fastest_products_are_right_and_those_of_every_matrix(dtype, monkeypatch):
    x, weight = torch.randn(8, 32, dtype=dtype), torch.randn(24, 32, dtype=dtype)
    for way in cpu.ways_to_multiply(x, weight):
        torch.testing.assert_close(way(), x @ weight.T, atol=0.1, rtol=0.01)
    monkeypatch.setattr(cpu, "medians", lambda repeats, *calls: list(range(len(calls))))  # F.linear
    model = GPT(MODEL)
    calls, numbers = cpu.fastest_products(model, 8, dtype), [w.numel() for w in model.parameters() if w.ndim == 2]
    assert len(calls) == len(numbers)
    assert flops_of(lambda: cpu.run_all(calls)) == 2 * 8 * sum(numbers)


def test_a_decode_step_is_the_difference_of_two_lengths(monkeypatch, capsys):
    # Each dtype: 3 tokens, 5 tokens, the floor.
    planted(monkeypatch, 1.0, 5.0, 0.5, 1.0, 2.0, 0.25)
    cpu.against_products(1, 1, TINY, 8, prompt=4, new=(3, 5))
    row, = cells(capsys)
    assert row == ["1", "decode step, 1 layers of 32, 8 rows", "2.00 s", "500.0 ms", "500.0 ms", "250.0 ms", "",
                   "", "0.25", "0.50", "", ""]


def test_transformers_draws_as_many_tokens(monkeypatch, capsys):
    pytest.importorskip("transformers")
    planted(monkeypatch, 4.0, 6.0, 2.0, 3.0)
    cpu.against_transformers(1, TINY, lengths=(5,), count=2, G=2, new=4)
    row, = cells(capsys)
    assert row[2:] == ["4.00 s", "2.00 s", "", "", "6.00 s", "3.00 s", "", "", "0.75", "1.50"]


def test_the_floor_of_an_update_has_its_flops(monkeypatch, capsys):
    products = cpu.products_of_update([torch.zeros(24, 32), torch.zeros(8, 24)], 5, torch.float32)
    assert flops_of(products) == 6 * 5 * (24 * 32 + 8 * 24)
    # 2 prompts of 5 and 4 rollouts of 3: a chunk of the head has 6 of 12 tokens.
    monkeypatch.setattr(cpu, "CHUNK_LOGITS", 6 * MODEL.vocab_size)
    planted(monkeypatch, 10.0, 1.0, 0.5, 8.0, 0.5, 0.5)
    cpu.against_update(1, MODEL, count=2, prompt=5, G=2, new=3)
    row, = cells(capsys)
    assert row[1] == "update, 2 layers of 32, 2 prompts of 5 x 2 x 3 tokens"
    assert row[2:6] == ["10.00 s", "8.00 s", "3.00 s", "2.00 s"] and row[8:10] == ["0.30", "0.25"]


def test_a_step_is_taken_in_a_process_of_its_own(monkeypatch, capsys):
    """Also the other library's, where it is installed."""
    cpu.against_trl(1, TINY, count=2, prompt=5, G=2, new=3)
    seconds, memory = cells(capsys)
    assert seconds[1].startswith("step of 2 x 2 x 3 tokens, contexts of 5; ")
    assert 0.1 < float(memory[2].split(" GB")[0]) < 2
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cpu, "alone", lambda function, *arguments: (1.0, 1e9, 2.0))
    cpu.against_trl(1, TINY)
    seconds, memory = cells(capsys)
    assert seconds[1].endswith(f"TRL is not installed: pip install {cpu.TRL}")
    assert seconds[2:] == ["1.00 s", "1.00 s", *[""] * 8] and memory[2] == "2.00 GB"


def test_seconds_that_the_threads_did_not_work_are_named():
    threads = torch.get_num_threads()
    assert cpu.in_words((2.0, 1.9 * threads)) == "2.00 s"
    assert cpu.in_words((2.0, 1.0 * threads)) == f"2.00 s ({threads}.00 s of CPU)"
    assert cpu.in_words((0.002, 0.001)) == "2.0 ms (1.0 ms of CPU)"


def test_the_head_names_the_machine_and_rows_that_do_not_exist():
    assert "torch uses" in cpu.machine() and "transformers" in cpu.machine()
    code, _, err = run_here("bench/cpu.py", "--rows", "6")
    assert code == 2 and "--rows 6: expected numbers from 1 to 5" in err


def test_alone_runs_in_another_process():
    assert common.alone(common.held_gb, "VmRSS") > 0
