"""MPO and OMPO in the loop: which answers are compared where, what they are worth, and that a run goes on exactly."""

import functools

import lightning as L
import pytest
import torch

from datamodules.chat import Chat
from lightning_modules.alignment import pairwise, policies
from lightning_modules.alignment.markov_preference import MarkovPreference
from lightning_modules.alignment.oracle import Preference
from lightning_modules.alignment.policy import Policy
from lightning_modules.optimizers.schedules import warmup_constant
from tessera.saving import Newest
from tessera.stopping import Stop

ITERATIONS, EACH, K = 2, 2, 3


@pytest.fixture(autouse=True)
def ending(monkeypatch):
    monkeypatch.delenv("TESSERA_DATA", raising=False)
    # untrained policies hardly ever end: every fourth token does
    monkeypatch.setattr(Policy, "stop_ids", property(lambda self: list(range(0, len(self.tokenizer), 4))))


def conversations(tmp_path) -> Chat:
    standin = {"train": 4, "val": 2, "test": 2, "turns": 2, "things": 2, "cyclic": 1.0, "strength": 1.0}
    return Chat(
        name="standin", path=None, download=False, turns="script", template="plain", limit=None, held_out=0.2,
        val_size=2, batch_size=2, packed=False, pad_to_multiple=1, max_prompt=200, max_response=60, drop_ties=True,
        standin={**standin, "soft_labels": False}, on_error="stop", seed=1, workers=0, cache=str(tmp_path / "rollouts"),
    )  # fmt: skip


class Watched(MarkovPreference):
    """Keeps what it made of every iteration."""

    def _values(self, number, states, *others):
        found = super()._values(number, states, *others)
        self.__dict__.setdefault("seen", {})[number] = (states, found)
        return found


def method(**changes) -> Watched:
    return Watched(**{
        "policy": policies.tiny(width=16, layers=1, heads=2, hidden=16, context=512),
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        "scheduler": functools.partial(warmup_constant, warmup=2),
        "evaluation": {"k": 2, "temperature": 1.0, "top_p": 1.0, "max_new": 8, "seed": 0, "batch_rows": 64},
        "rollouts": {
            "k": K, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new": 12, "seed": 1, "batch_rows": 64,
        },
        "loss": functools.partial(pairwise.mpo, beta=0.1), "oracle": Graded(), "iterations": ITERATIONS,
        "reference": "previous", "ema": 0.5, "pairs": "best_worst", "label": "hard", "winrate": "raw",
        "value": "win_rate", "restart_optimizer": True, "optimistic": True, "returns": "rollout",
        "opponent_states": "regenerate", "tau": "center",
    } | changes)  # fmt: skip


class Graded(Preference):
    """Fewer letters a and e are better: in the game all that an untrained policy says is malformed, and so alike."""

    def compare(self, prompts, first, second):
        for row, texts in enumerate(zip(first, second)):
            one, other = (sum(map(text.count, "ae")) - len(text) / 9 for text in texts)
            yield row, torch.sigmoid(torch.tensor(other - one)).item()


def play(method, tmp_path, until=None, resume=None, validated=0) -> L.Trainer:
    """Train to the end, or leave with a checkpoint of step `until`."""

    class Leave(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == until:
                raise KeyboardInterrupt

    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=ITERATIONS * EACH, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path / "run", use_distributed_sampler=False,
        callbacks=[Newest(tmp_path / "run" / "checkpoints", 1, 0, Stop()), Leave()], num_sanity_val_steps=0,
        limit_val_batches=validated, check_val_every_n_epoch=1,
    )  # fmt: skip
    data = conversations(tmp_path)
    method.meet(data)
    method.train()
    try:
        trainer.fit(method, datamodule=data, ckpt_path=resume, weights_only=True)
    except (SystemExit, KeyboardInterrupt):
        assert until is not None
    return trainer


@pytest.mark.parametrize(("optimistic", "returns"), [(False, "one_step"), (True, "rollout")])
def test_every_turn_is_a_state_and_its_answers_are_worth_what_they_win(tmp_path, optimistic, returns):
    made = method(optimistic=optimistic, returns=returns)
    play(made, tmp_path)
    for number in range(ITERATIONS):
        states, found = made.seen[number]
        assert [state.left for state in states] == [2] * 4 + [1] * 4
        for first, second in zip(states[:4], states[4:]):
            assert second.prompt.messages[-2].content == first.answers[0].response
            assert second.prompt.messages[-1].content == first.prompt.script[0]
        for state, (rates, value) in zip(states, found):
            assert all(("\n\nHuman: " in text) == (returns == "rollout" and state.left == 2) for text in state.texts)
            turns = state.left if returns == "rollout" else 1
            if not optimistic or number == 0:
                torch.testing.assert_close(value, turns * (rates - 0.5))
            assert rates.mean() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("opponent_states", ["regenerate", "match"])
def test_a_run_that_goes_on_ends_with_the_same_weights(tmp_path, opponent_states):
    whole = method(opponent_states=opponent_states)
    play(whole, tmp_path / "whole")
    play(method(opponent_states=opponent_states), tmp_path / "parts", until=3)
    again = method(opponent_states=opponent_states)
    play(again, tmp_path / "parts", resume=max((tmp_path / "parts/run/checkpoints").glob("step-*.ckpt")))
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), again.policy.parameters()))


@pytest.mark.parametrize("opponent_states", ["regenerate", "match"])
def test_a_conversation_ends_where_its_next_prompt_is_too_long(tmp_path, opponent_states, monkeypatch):
    made = conversations(tmp_path)
    monkeypatch.setattr(made, "max_prompt", 33)  # tokens: two of the second prompts have 34 and 37
    monkeypatch.setitem(globals(), "conversations", lambda _: made)
    learner = method(opponent_states=opponent_states)
    with pytest.warns(UserWarning, match=r"^2 of 4 conversations end before the user's script does, .*max_prompt=33"):
        play(learner, tmp_path)
    for states, _ in learner.seen.values():
        assert all(len(state.prompt.ids) <= 33 for state in states)
    turns = [len(state.prompt.script) for state in learner.seen[0][0]]
    assert turns == [1, 1, 1, 1, 0, 0]


def test_the_previous_policys_answers_are_taken_off_what_counts_twice(tmp_path):
    made = method(opponent_states="match")
    play(made, tmp_path)
    earlier = {state.prompt.id: state for state in made.seen[0][0]}
    for state, (rates, value) in zip(*made.seen[1]):
        rival = earlier[state.prompt.id]
        previous = torch.tensor(
            [[chance(state, i, rival, j) for j in range(K)] for i in range(K)], dtype=torch.float32
        ).mean(1)
        torch.testing.assert_close(value, state.left * (2 * rates - previous - 0.5), rtol=0, atol=1e-5)


def chance(state, i, rival, j) -> float:
    if state.ended[i] and rival.ended[j]:
        return next(Graded().compare([state.prompt], [state.texts[i]], [rival.texts[j]]))[1]
    return (1 + state.ended[i] - rival.ended[j]) / 2


def test_whole_conversations_are_held_against_those_of_the_starting_policy(tmp_path):
    evaluation = {"k": 40, "temperature": 1.0, "top_p": 1.0, "max_new": 8, "seed": 0, "batch_rows": 64}
    made = method(optimizer=functools.partial(torch.optim.SGD, lr=0.0), evaluation=evaluation)
    trainer = play(made, tmp_path, validated=1.0)
    for prompt in trainer.datamodule.test:
        for answer, line in made.opponents[prompt.id]:
            assert line.replies[0] == answer.response
            whole = line.ended and len(line.replies) == 2
            assert whole or not line.ended
            assert line.text.count("\n\nHuman: " + prompt.script[0]) == len(line.replies) - 1
    trainer.test(made, datamodule=trainer.datamodule, verbose=False)
    found = {name.removeprefix("test-standin/"): float(value) for name, value in trainer.callback_metrics.items()}
    assert found["win_rate"] == pytest.approx(0.5, abs=0.15)
    assert found["exploitability_prompts"] == 2
    # hardly anything that it says is well formed: the best response wins both turns
    assert found["exploitability"] == pytest.approx(1.0, abs=1e-3)
    again = method(evaluation=evaluation)
    opponents = made.opponents
    play(again, tmp_path, resume=max((tmp_path / "run/checkpoints").glob("step-*.ckpt")))
    assert again.opponents == opponents


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"opponent_states": "none"}, r"model\.opponent_states=none: there are regenerate, match"),
        ({"reference": "initial"}, "a step of mirror descent is from the previous policy"),
        ({"rollouts": {"k": 1}}, r"rollouts\.k=1: a pair needs two answers"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sampled(changes, said):
    with pytest.raises(ValueError, match=said):
        method(**changes)
