"""The commands of paper/controls.py without running them, and its table from results by hand."""
import importlib
import json
import shlex
import sys
from argparse import Namespace

import pytest

import demo
from paper import controls

RUN = "controls/seed-3"
WORDS = demo.names(Namespace(out_dir=RUN, seed=3))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder RUN below the current one; each of its runs has stopped at step 7."""
    monkeypatch.chdir(tmp_path)
    for name in [*controls.TRAINED, *(f"tuned-{name}" for name in controls.TUNED)]:
        folder = tmp_path / RUN / name
        folder.mkdir(parents=True)
        (folder / "latest").write_text("step_000007")


def commands_of(names):
    """Script and words of each command, from the corpus to the table."""
    stages = sum((make(RUN, 3, names) for make in (
        controls.training, controls.imitating, controls.calibrating, controls.measuring, controls.tuning, controls.asking)), [])
    return [shlex.split(command.format(**WORDS)) for _, command, *_ in stages]


def parsed(script, words, monkeypatch):
    """What the script makes of these words."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return vars(module.parse_args())


def runs_of(names, monkeypatch):
    """{run: its parsed command} of everything that is trained."""
    runs = {}
    for script, *words in commands_of(names):
        if "--out-dir" in words:
            args = parsed(script, words, monkeypatch)
            runs[args["out_dir"].removeprefix(f"{RUN}/")] = args
    return runs


def test_every_command_parses(finished, monkeypatch):
    for script, *words in commands_of(controls.TRAINED):
        assert parsed(script, words, monkeypatch)


def test_every_control_starts_from_the_base_and_is_evaluated(finished, monkeypatch):
    runs = runs_of(controls.TRAINED, monkeypatch)
    assert set(runs) == {"base", *controls.TRAINED, *(f"tuned-{name}" for name in controls.TUNED)}
    for name in controls.TRAINED:
        calibrated = f"{RUN}/calibrated/step_000300"
        assert runs[name]["init"] == (calibrated if name in controls.CALIBRATED else WORDS["base"])
    evaluated = next(words for words in commands_of(controls.TRAINED) if words[0] == "eval.py")
    assert evaluated[evaluated.index("--checkpoints") + 1:][:1 + len(controls.TRAINED)] == [
        WORDS["base"], *(f"{RUN}/{name}/step_000007" for name in controls.TRAINED)]


def test_questions_are_asked_of_each_start_and_of_what_rl_made_of_it(finished, monkeypatch):
    runs = runs_of(["rpt", "ntp"], monkeypatch)
    starts = {name: (runs[f"tuned-{name}"]["init"], runs[f"tuned-{name}"]["steps"])
              for name in controls.TUNED}
    assert starts == dict(base=(WORDS["base"], 50), ntp=(f"{RUN}/ntp/step_000007", 50),
                          rpt=(f"{RUN}/rpt/step_000007", 50), longer=(WORDS["base"], 50 + demo.RPT_STEPS))
    asked = commands_of(["rpt", "ntp"])[-1]
    names = "tuned-base ntp tuned-ntp rpt tuned-rpt tuned-longer".split()
    assert asked[asked.index("--checkpoints") + 1:] == [
        WORDS["base"], *(f"{RUN}/{name}/step_000007" for name in names)]


def test_a_variant_differs_from_rpt_in_what_its_flags_say(finished, monkeypatch):
    runs = runs_of(controls.TRAINED, monkeypatch)
    differs = {}
    for name in controls.VARIANTS:
        differs[name] = {key: value for key, value in runs[name].items()
                         if value != runs["rpt"][key] and key not in ("out_dir", "save_every")}
    assert differs == {
        "no-thought": dict(objective="no_thought", steps=800),
        "first-token": dict(objective="first_token"),
        "dense": dict(objective="dense"),
        "conditional-dense": dict(objective="conditional_dense"),
        "G-4": dict(rollouts=4, batch_size=64),
        "G-16": dict(rollouts=16, batch_size=16),
        "all-positions": dict(entropy_threshold=0),
        "hard-positions": dict(entropy_threshold=1.5),
        "dynamic": dict(dynamic_sampling_from=0),
        "normalised": dict(normalize_advantage=True),
        **{name: dict(objective=name, match_compute=f"{RUN}/rpt", steps=steps)
           for name, steps in controls.OBJECTIVES.items()}}


def test_every_fitted_checkpoint_is_one_that_rpt_saves(finished, monkeypatch):
    rpt = runs_of(["rpt"], monkeypatch)["rpt"]
    for step in controls.FITTED:
        assert step % rpt["save_every"] == 0 and step <= rpt["steps"]


def test_all_documents_are_scored_and_rollouts_are_as_many_as_in_rpt(finished, monkeypatch):
    rpt = runs_of(["rpt"], monkeypatch)["rpt"]
    words_of = {script: words for script, *words in commands_of(["rpt", "sft-own"])}
    assert parsed("data/filter.py", words_of["data/filter.py"], monkeypatch)["documents"] == 0
    own = parsed("paper/own_rollouts.py", words_of["paper/own_rollouts.py"], monkeypatch)
    assert own["init"] == WORDS["base"] and own["count"] == rpt["steps"] * rpt["batch_size"]
    for same in ("rollouts", "max_new_tokens", "temperature", "entropy_threshold", "template"):
        assert own[same] == rpt[same]


@pytest.mark.parametrize("name", controls.TRAINED)
def test_one_control_alone_needs_no_other(finished, name, monkeypatch):
    made = set(runs_of(list(dict.fromkeys(["rpt", name])), monkeypatch))
    if name in controls.CALIBRATED:
        made.remove("calibrated")
    questions = {"tuned-base", "tuned-rpt", "tuned-longer"}
    if name == "ntp":
        questions.add("tuned-ntp")
    assert made == {"base", "rpt", name} | questions


def results_line(run, name, accuracy, **more):
    return dict(checkpoint=f"{run}/{name}/step_000001", mode="reasoning", accuracy=accuracy) | more


def write_results(run, shift):
    """Base and rpt, guessing and thinking, on two splits; questions before and after RL."""
    (run / "rpt").mkdir(parents=True)
    (run / "rpt" / "metrics.jsonl").write_text('{"flops": 1e9, "dt_gen": 90}\n{"flops": 2e9, "dt_train": 30}\n')
    results = []
    for split in ("medium", "hard"):
        for name, guessing, thinking in (("base", 20, 50), ("rpt", 21, 97)):
            more = dict(split=split, pass_at_k=90, len_mean=thinking / 2)
            results += [results_line(run, name, guessing + shift, mode="ntp", **more),
                        results_line(run, name, thinking + shift, **more)]
    (run / "results.json").write_text(json.dumps(results))
    answers = {"base": 10, "tuned-base": 30, "rpt": 40}
    thoughts = [dict(checkpoint=f"{run}/{name}/step_000001", mode="reasoning", response=text)
                for name, text in (("base", "a b c</think>d"), ("rpt", "a a a a</think>d"))]
    (run / "thoughts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in thoughts))
    (run / "answers.json").write_text(json.dumps(
        [results_line(run, name, accuracy + shift) for name, accuracy in answers.items()]))


def test_the_table_has_the_mean_of_the_seeds_and_each_of_them(tmp_path):
    write_results(tmp_path / "seed-0", shift=0)
    write_results(tmp_path / "seed-1", shift=2)
    blocks = [block.splitlines() for block in controls.table(tmp_path, [0, 1]).split("\n\n")]
    title, easy, medium, hard, questions, thoughts = blocks
    assert title == ["Seeds 0, 1"] and len(easy) == 2  # nothing was measured there
    assert medium[2:] == hard[2:] == [
        "| base | 21.0 (20.0, 22.0) | 51.0 (50.0, 52.0) | 90.0 (90.0, 90.0) | - | 0.0e+00 |",
        "| rpt | 22.0 (21.0, 23.0) | 98.0 (97.0, 99.0) | 90.0 (90.0, 90.0) | - | 3.0e+09 |"]
    assert questions == [
        "| questions, from | before RL | after RL | FLOPs after the base |",
        "|---|---|---|---|",
        "| base | 11.0 (10.0, 12.0) | 31.0 (30.0, 32.0) | 0.0e+00 |",
        "| ntp | - | - | 0.0e+00 |",
        "| rpt | 41.0 (40.0, 42.0) | - | 3.0e+09 |",
        "| longer | - | - | 0.0e+00 |"]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in thoughts[2:]]
    assert [row[:4] for row in cells] == [["base", "25", "3.0", "1.000"], ["rpt", "48", "4.0", "0.667"]]
    assert [row[5:] for row in cells] == [["0.0e+00", "0.0"], ["3.0e+09", "2.0"]]


def test_a_table_of_fewer_controls_is_made_again_and_a_complete_one_is_kept(tmp_path):
    def write(file, *names):
        lines = [results_line(tmp_path, name, 50) for name in names]
        (tmp_path / file).write_text(json.dumps(lines))

    def left():
        return {path.name for path in tmp_path.iterdir()}

    write("results.json", "base", "rpt", "ntp")
    write("answers.json", "base", "tuned-base", "rpt", "tuned-rpt", "tuned-longer")
    controls.forget_tables(tmp_path, ["rpt"])
    assert left() == {"results.json", "answers.json"}
    # From ntp RL on questions is to start too.
    controls.forget_tables(tmp_path, ["rpt", "ntp"])
    assert left() == {"results.json"}
    controls.forget_tables(tmp_path, ["rpt", "ntp", "G-4"])
    assert left() == set()
