"""Oracles: what they say, what they remember, and a real server that misbehaves."""

import json
from types import SimpleNamespace

import pytest
import torch

from datamodules.answers import NumberAnswer
from datamodules.batches import Message, Prompt
from lightning_modules.alignment.endpoint import Endpoint
from lightning_modules.alignment.oracle import Preference, Remembered, Table, Verifier, labels_folder
from tests.judge_server import Judge

ROCK, PAPER, SCISSORS = "rock", "paper", "scissors"
RPS = [[0.5, 0.3, 0.8], [0.7, 0.5, 0.4], [0.2, 0.6, 0.5]]


def prompt(number=0, gold="7"):
    return Prompt(f"p{number}", f"question {number}", gold, [1, 2, 3])


def table(preferences=RPS):
    return Table([ROCK, PAPER, SCISSORS], preferences)


def chat(preference, fingerprint="d0"):
    oracle = Preference()
    oracle.meet(SimpleNamespace(preference=preference, fingerprint=fingerprint, name="chat"))
    return oracle


def test_a_table_says_what_stands_in_it():
    oracle = table()
    assert oracle.prefer([prompt()] * 2, [ROCK, PAPER], [SCISSORS, PAPER]).tolist() == pytest.approx([0.8, 0.5])
    torch.testing.assert_close(oracle.table(prompt(), [ROCK, PAPER, SCISSORS]), torch.tensor(RPS))
    torch.testing.assert_close(
        oracle.score([prompt()], [ROCK], [SCISSORS]), torch.logit(torch.tensor([0.8])), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("preferences", "said"),
    [
        ([[0.5, 1.2], [-0.2, 0.5]], "not all probabilities"),
        ([[0.5, float("nan")], [0.5, 0.5]], "not all probabilities"),
        ([[0.5, 0.7], [0.7, 0.5]], "do not add up to 1"),
        ([[0.5, 0.5]], "2 answers need as many rows and columns"),
    ],
)
def test_a_table_that_is_none_is_refused_when_it_is_made(preferences, said):
    with pytest.raises(ValueError, match=r"^model\.oracle\.preferences.*" + said):
        Table([ROCK, PAPER], preferences)


def test_tables_of_several_prompts_may_differ_in_size():
    two, three = table().tables([prompt(0), prompt(1)], [[ROCK, PAPER], [SCISSORS, ROCK, ROCK]])
    torch.testing.assert_close(two, torch.tensor([[0.5, 0.3], [0.7, 0.5]]))
    torch.testing.assert_close(three, torch.tensor([[0.5, 0.2, 0.2], [0.8, 0.5, 0.5], [0.8, 0.5, 0.5]]))


def test_a_verifier_lets_right_beat_wrong_and_ties_the_rest():
    oracle = Verifier()
    oracle.meet(SimpleNamespace(scorer=NumberAnswer("strict"), name="gsm8k"))
    texts = ["#### 7", "#### 8", "none"]
    expected = torch.tensor([[0.5, 1.0, 1.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(oracle.table(prompt(), texts), expected)
    with pytest.raises(ValueError, match="oracle=verifier: the answers of data=chat cannot be checked"):
        oracle.meet(SimpleNamespace(scorer=None, name="chat"))


def test_the_true_preference_is_the_datas_own():
    oracle = chat(lambda prompt, first, second: len(first) / (len(first) + len(second)))
    assert oracle.prefer([prompt()], ["aaa"], ["b"]).tolist() == [0.75]
    with pytest.raises(ValueError, match="nobody knows the true preference of data=mt_bench"):
        Preference().meet(SimpleNamespace(preference=None, fingerprint="", name="mt_bench"))


@pytest.mark.parametrize("value", [1.2, -0.1, float("nan")])
def test_what_is_no_probability_is_refused_with_the_prompt(value):
    with pytest.raises(ValueError, match=r"prompt p3: the oracle preference gives P=.*no probability in \[0, 1\]"):
        chat(lambda *_: value).prefer([prompt(3)], ["a"], ["b"])


def test_preferences_that_do_not_add_up_to_one_are_refused_with_the_prompt():
    with pytest.raises(
        ValueError, match=r"prompt p3: the oracle preference gives 0\.7 and, the answers exchanged, 0\.7"
    ):
        chat(lambda *_: 0.7).prefer([prompt(3)], ["a"], ["b"])
    with pytest.raises(ValueError, match="the two orders of a pair do not add up to 1"):
        table([[0.5, 0.3, 0.8], [0.6, 0.5, 0.4], [0.2, 0.6, 0.5]]).table(prompt(), [ROCK, PAPER])


class Counting(Table):
    """A table that fails after a number of comparisons."""

    def __init__(self, lives=10**9):
        super().__init__([ROCK, PAPER, SCISSORS], RPS)
        self.lives = self.asked = 0
        self.lives = lives

    def compare(self, prompts, first, second):
        for row, value in super().compare(prompts, first, second):
            if self.asked >= self.lives:
                raise ConnectionError("gone")
            self.asked += 1
            yield row, value


def test_no_comparison_is_asked_twice_also_by_another_process(tmp_path):
    oracle = Counting()
    answers = [[ROCK, PAPER, SCISSORS], [ROCK, PAPER, ROCK]]
    first = Remembered(oracle, tmp_path).tables([prompt(0), prompt(1)], answers)
    assert oracle.asked == 6
    again = Remembered(oracle, tmp_path).tables([prompt(0), prompt(1)], answers)
    assert oracle.asked == 6
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_finished_labels_survive_a_failure_and_a_half_written_line(tmp_path):
    failing = Counting(lives=2)
    with pytest.raises(ConnectionError):
        Remembered(failing, tmp_path).table(prompt(), [ROCK, PAPER, SCISSORS])
    (path,) = tmp_path.iterdir()
    with open(path, "a") as file:
        file.write('["half')
    oracle = Counting()
    found = Remembered(oracle, tmp_path).table(prompt(), [ROCK, PAPER, SCISSORS])
    assert oracle.asked == 1
    torch.testing.assert_close(found, torch.tensor(RPS))


def test_a_damaged_label_is_named(tmp_path):
    (tmp_path / "labels-0.jsonl").write_text('["k", 0.5]\n[broken\n')
    with pytest.raises(ValueError, match=r"labels-0\.jsonl, line 2 is damaged"):
        Remembered(table(), tmp_path)


def test_labels_of_another_oracle_or_other_data_are_kept_apart(tmp_path):
    folders = {
        labels_folder(tmp_path, oracle)
        for oracle in (table(), table([[0.5] * 3] * 3), chat(None or len), chat(len, "d1"))
    }
    assert len(folders) == 4


# ---- a language model behind an address


@pytest.fixture
def judge():
    made = Judge()
    yield made
    made.server.shutdown()
    made.server.server_close()


def endpoint(judge, **changes):
    settings = {
        "url": judge.url, "model": "m", "template": "{context}|{first}|{second}", "key_env": "TESSERA_TEST_KEY",
        "logprobs": False, "timeout": 5.0, "retries": 3, "pause": 0.01, "threads": 2,
    }  # fmt: skip
    return Endpoint(**settings | changes)


def test_a_judge_is_asked_in_both_orders_and_its_liking_for_a_place_cancels(judge):
    oracle = endpoint(judge)
    assert oracle.prefer([prompt()] * 3, ["long one", "x", "ab"], ["x", "long one", "cd"]).tolist() == [1.0, 0.0, 0.5]
    assert len(judge.questions) == 6
    assert judge.questions[0]["messages"][0]["content"].startswith("question 0|")


def test_log_probabilities_make_soft_labels(judge):
    value = endpoint(judge, logprobs=True).prefer([prompt()], ["longer"], ["x"])
    assert value.item() == pytest.approx(1 / (1 + 2.718281828**-2.0), abs=1e-6)


def test_a_judge_reads_the_whole_conversation(judge):
    turns = (Message("user", "hello"), Message("assistant", "hi"), Message("user", "and?"))
    endpoint(judge).prefer([Prompt("p", "q", "", [1], turns)], ["a"], ["b"])
    assert judge.questions[0]["messages"][0]["content"].startswith("user: hello\n\nassistant: hi\n\nuser: and?|")


@pytest.mark.parametrize("how", [500, 429, "garbage", "empty", "evasive", "hang"])
def test_a_failure_that_may_pass_is_tried_again(judge, how):
    judge.plan = [how, how]
    assert endpoint(judge, timeout=0.3).prefer([prompt()], ["longer"], ["x"]).tolist() == [1.0]
    assert len(judge.questions) == 4


def test_a_nan_in_a_reply_is_tried_again(judge):
    judge.plan = ["nan"]
    assert endpoint(judge, logprobs=True).prefer([prompt()], ["longer"], ["x"]).item() > 0.8


def test_a_judge_that_stays_away_loses_no_finished_label(judge, tmp_path):
    judge.plan = ["well"] * 3 + [503] * 8
    prompts, first, second = [prompt(n) for n in range(4)], ["longer"] * 4, ["x"] * 4
    with pytest.raises(ConnectionError, match=r"prompt p3: .* gave no verdict in 4 attempts, at last: HTTP 503"):
        Remembered(endpoint(judge, threads=1), tmp_path).prefer(prompts, first, second)
    judge.plan, judge.questions = [], []
    values = Remembered(endpoint(judge), tmp_path).prefer(prompts, first, second)
    assert values.tolist() == [1.0] * 4
    assert len(judge.questions) == 5


def test_a_missing_key_is_refused_at_once_and_no_key_is_ever_told(judge, monkeypatch, tmp_path):
    judge.plan = [401]
    monkeypatch.setenv("TESSERA_TEST_KEY", "sk-secret")
    oracle = endpoint(judge, threads=1)
    with pytest.raises(ConnectionError, match="set the environment variable TESSERA_TEST_KEY to a valid key") as error:
        Remembered(oracle, tmp_path).prefer([prompt()], ["a"], ["b"])
    assert judge.keys == ["Bearer sk-secret"]
    assert "sk-secret" not in str(error.value) + repr(vars(oracle)) + json.dumps(oracle.identity)


def test_nobody_at_the_address_is_one_sentence():
    oracle = endpoint(SimpleNamespace(url="http://127.0.0.1:9"), retries=1)
    with pytest.raises(ConnectionError, match="gave no verdict in 2 attempts"):
        oracle.prefer([prompt()], ["a"], ["b"])
    with pytest.raises(ValueError, match=r"model\.oracle\.url must begin with http"):
        endpoint(SimpleNamespace(url="http://user:word@host"))


def test_a_judge_of_another_run_is_an_oracle(tmp_path):
    from functools import partial

    from lightning_modules.alignment import policies
    from lightning_modules.alignment.judge_export import export
    from lightning_modules.alignment.judge_heads import EmbeddingHead
    from lightning_modules.alignment.judges import EmbeddingJudge
    from lightning_modules.alignment.learned_oracle import Learned

    policy = policies.tiny(width=16, layers=1, heads=2, hidden=16, context=64)
    judge = EmbeddingJudge(policy, partial(EmbeddingHead, dim=4, normalise=True, gate=True), tau=0.1)
    ids = policy.tokenizer.encode("question 0")
    asked = [Prompt(f"p{number}", "question 0", "", ids) for number in range(2)]
    export(judge.about, policy, judge.head, tmp_path / "export")
    oracle = Learned(str(tmp_path / "export"))
    first, second = ["Tom", "Ana", "Tom"], ["Ana", "Ben", "Tom"]
    prompts = [asked[0], asked[1], asked[0]]
    torch.testing.assert_close(oracle.prefer(prompts, first, second), judge.prefer(prompts, first, second))
    assert oracle.prefer(prompts, first, first).tolist() == pytest.approx([0.5] * 3)
    backward = oracle.prefer(prompts, second, first)
    torch.testing.assert_close(oracle.prefer(prompts, first, second) + backward, torch.ones(3))
    assert Learned(str(tmp_path / "export")).identity == oracle.identity
    with pytest.raises(FileNotFoundError, match="is no export of a judge"):
        Learned(str(tmp_path))
