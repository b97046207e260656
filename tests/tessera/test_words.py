import re
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.compose import CONF, compose
from tessera.words import groups, help_text, phase, problems

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("model=dqq", "did you mean dqo"),
        ("optimiser=adamw", "did you mean optimizer"),
        ("trainer.max_step=3", "did you mean trainer.max_steps"),
        ("lr=3", "did you mean optimizer.lr"),
        ("trainer.max_steps=abc", "expected a number"),
        ("data.strip_annotations=3", "expected true or false"),
        ("data.path=/no/such/folder", "there is no such file or folder"),
        ("ckpt_path=nowhere.ckpt", "there is no such file or folder"),
        ("policy=hf", "policy.name needs a value"),
        ("model=sft,dqo", "needs -m"),
        ("nonsense", "not of the form key=value"),
    ],
)
def test_a_wrong_word_is_named_with_the_word_to_change(word, remedy):
    found = problems([word])
    assert len(found) == 1
    assert remedy in found[0]
    assert "\n" not in found[0]


def test_a_model_on_data_that_lacks_what_it_needs_is_a_sentence():
    (reason,) = problems(["model=gpt2", "data=gsm8k"])
    assert reason.startswith("model.network.vocab_size takes the value of data.vocab_size, which is not there")


def test_all_problems_of_a_command_line_are_found_together():
    assert len(problems(["model=dqq", "optimizer.lrr=1", "trainer.max_steps=many", "data.path=/none"])) == 4


def test_sound_words_have_no_problems():
    assert problems(["model=rft", "data=math", "policy=smollm2", "optimizer.lr=1e-4", "trainer.max_steps=20"]) == []
    assert problems(["model=sft,rft", "seed=1,2"], multirun=True) == []
    assert problems(["model=gpt2", "network@model.network=gpt2_small"]) == []


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_choice_composes(path):
    group = path.parent.name
    if group in ("reading", "recipe", "sweep", "tuning"):
        pytest.skip("chosen through others")
    # of which the group is a part
    owners = {"algorithm": "markov_game", "network": "gpt2", "objective": "dqo", "oracle": "apo", "pairwise": "dpo"}
    owners |= dict.fromkeys(("bonus", "decision", "instance", "regularizer"), "kl_ucb") | {"feedback": "kl_pcb"}
    owners |= dict.fromkeys(("against", "kernel", "noise", "target"), "ctmc")
    owners |= dict.fromkeys(("path", "sampler", "study"), "ode_samplers") | {"grid": "learned_score"}
    model = owners.get(group)
    word = f"{group}@model.{group}" if group in ("objective", "network") else group
    compose([f"model={model}", f"{word}={path.stem}"] if model else [f"{group}={path.stem}"])


def test_every_choice_says_what_it_is():
    chosen = {group: words for group, words in groups().items() if group not in ("reading", "recipe", "tuning")}
    assert [f"{group}={word}" for group, words in chosen.items() for word, text in words.items() if not text] == []


def test_a_run_that_prepares_takes_the_shared_words_and_leaves_the_methods_own():
    user = ["model=dqo", "data=math", "model.kl=0.1", "optimizer.lr=3", "trainer.max_steps=7", "seed=2", "resume=x"]
    assert phase(["model=sft"], user) == ["model=sft", "data=math", "trainer.max_steps=7", "seed=2", "compare=null"]
    assert compose(phase(["model=sft"], user))[0].trainer.max_steps == 7


def test_games_that_are_compared_have_the_users_oracle():
    user = ["model=apo", "oracle=gpm", "model.oracle.export=outputs/judge", "model.alpha=0.5"]
    judged = user[1:3]
    assert phase(["model=iterative_dpo"], user) == ["model=iterative_dpo", *judged, "compare=null"]
    assert compose(phase(["model=iterative_dpo"], user))[0].model.oracle.export == "outputs/judge"
    assert phase(["model=sft"], user) == ["model=sft", "compare=null"]
    assert phase(["model=sppo", "oracle=known"], user) == ["model=sppo", "oracle=known", "compare=null"]


def test_a_policy_sets_the_sizes_that_suit_it_and_an_experiment_overrules_it():
    small = compose(["policy=smollm2"])[0]
    assert (small.rollouts.k, small.evaluation.k, small.data.batch_size) == (2, 2, 4)
    large = compose(["experiment=dqo_gsm8k_smollm2"])[0]
    assert (large.rollouts.k, large.evaluation.k, large.data.batch_size) == (8, 4, 64)


def test_the_games_of_ompo_chat_differ_in_nothing_but_the_game():
    words = ["experiment=ompo_chat"]
    compared = compose(words)[0].compare
    games = [compose([*own, *words])[0] for own in ([], *compared.values())]
    assert len({(str(c.start), c.model.iterations, c.model.loss.beta, c.optimizer.lr) for c in games}) == 1
    assert len({(str(c.data.standin), c.data.batch_size, c.trainer.max_steps, c.rollouts.k) for c in games}) == 1
    start = compose(phase(list(games[0].start), words))[0]
    assert (start.trainer.max_steps, start.data.standin.train) == (800, 2000)


def test_help_names_every_word():
    text = help_text()
    assert all(re.search(rf"^  {re.escape(word)}\b", text, re.M) for word in groups()["model"])


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["modell=dqo"]])
def test_answers_about_the_command_line_never_import_torch(words):
    """What makes --help, --cfg job and a typo answer at once, without asserting a time."""
    code = f"""
import runpy, sys
sys.argv = ['train.py', *{words!r}]
try:
    runpy.run_path({str(TRAIN)!r}, run_name='__main__')
except SystemExit:
    pass
assert not {{'torch', 'lightning'}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TRAIN.parent)
    assert done.returncode == 0, done.stderr
