"""What the data adds to the words of a command line."""

import pytest

from tessera.compose import completed, compose


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder of data sets with one file of conversations."""
    (tmp_path / "talk.jsonl").write_text("")
    monkeypatch.setenv("TESSERA_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("where", ["data.name=talk", "data.path={}/talk.jsonl"])
def test_the_tiny_policy_takes_few_rows_and_steps_of_real_conversations(shared, where):
    words = ["model=sppo", "data=chat", where.format(shared)]
    config, choices = compose(words)
    assert choices["recipe/real"] == "chat_tiny"
    assert (config.data.limit, config.trainer.max_steps, config.rollouts.max_new) == (64, 60, 256)
    assert completed(words) == [*words, "recipe/real=chat_tiny"]
    assert compose([*words, "data.limit=7", "trainer.max_steps=9"])[0].data.limit == 7
    assert compose([*words, "debug=fast"])[0].trainer.max_steps == 12


@pytest.mark.parametrize(
    "words", [["data.name=standin"], ["data.name=elsewhere"], ["data.name=talk", "policy=hf", "policy.name=any"]]
)
def test_generated_rows_and_other_policies_keep_their_own_sizes(shared, words):
    assert compose(["model=sft", "data=chat", *words])[0].data.limit is None
    assert completed(words) == words
