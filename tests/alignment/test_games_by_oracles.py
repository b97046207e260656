"""Every game under every oracle, by one word of the command line: a fit from a trained start, with real labels."""

import json
from functools import partial
from pathlib import Path

import pytest

from lightning_modules.alignment.judge_export import export
from lightning_modules.alignment.judge_heads import EmbeddingHead, RewardHead
from lightning_modules.alignment.judges import EmbeddingJudge
from lightning_modules.alignment.pairwise_judge import PairwiseJudge
from lightning_modules.alignment.policies import pretrained
from tessera.folder import RunFolder
from tessera.run import carry_out, prepare
from tests.judge_server import Judge

SMALLEST = (
    *("compare=null", "policy.width=32", "policy.layers=1", "policy.hidden=32", "trainer.val_check_interval=0"),
    *("trainer.log_every_n_steps=1", "data.val_size=2"),
)
LEARNING = ("optimizer.lr=1e-2", "data.batch_size=32", "stages=[fit]")
PLAYING = (
    *("trainer.max_steps=4", "model.iterations=2", "data.batch_size=4", "rollouts.k=4", "evaluation.k=1"),
    *("data.max_response=8", "optimizer.lr=1e-3"),
)
CHAT = ("data=chat", "data.name=standin", "data.standin.val=2", "data.standin.test=2")
GAMES = ("iterative_dpo", "sppo", "gpo", "apo", "mpo", "ompo")
ORACLES = ("known", "preference", "verifier", "table", "bradley_terry", "gpm", "pairwise_prompt", "endpoint")
TEMPLATE = "{context}|{first}|{second}"
# each word of both at least once; the rest of the grid is slow
ALWAYS = {*zip(GAMES, ("preference", "known", "gpm", "endpoint", "bradley_terry", "verifier"))}
ALWAYS |= {("sppo", "table"), ("apo", "pairwise_prompt")}
GRID = [
    pytest.param(game, oracle, marks=() if (game, oracle) in ALWAYS else pytest.mark.slow)
    for game in GAMES
    for oracle in ORACLES
]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder for everything, away from the data of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TESSERA_DATA", raising=False)
        yield tmp_path_factory.mktemp("games")


def play(folder: Path, *words: str) -> RunFolder:
    return carry_out(prepare([*SMALLEST, *words, f"output={folder}"]))


@pytest.fixture(scope="module")
def replies(outside):
    """Words of the game of replies, and of a start of which some replies are well formed."""
    words = (*CHAT, "data.standin.train=300")
    start = play(outside, "model=sft", *words, *LEARNING, "trainer.max_steps=60", "optimizer.lr=2e-2")
    return (*CHAT, "data.standin.train=6", f"policy_weights={start.path / 'export'}")


@pytest.fixture(scope="module")
def coins(outside):
    """Words of problems whose answer is 0 or 1, and of a start that says one of these, whatever it is asked."""
    file = outside / "coins.jsonl"
    rows = [{"question": f"Toss {number}.", "answer": f"#### {number % 2}"} for number in range(32)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("data=gsm8k", f"data.path={file}", "data.val_size=4")
    start = play(outside, "model=sft", *words, *LEARNING, "trainer.max_steps=30")
    # the rest of the vocabulary is not said at all, so that a table can know every answer
    sure = ("rollouts.top_p=0.8", "evaluation.top_p=0.8", "data.limit=6")
    return (*words, *sure, f"policy_weights={start.path / 'export'}")


@pytest.fixture(scope="module")
def judges(outside, replies):
    """Export folders of judges of every kind, on the trunk of the start."""
    policy = pretrained(replies[-1].partition("=")[2])
    heads = {"gpm": partial(EmbeddingHead, dim=4, normalise=True, gate=True), "bradley_terry": RewardHead}
    made = {name: EmbeddingJudge(policy, head, tau=0.1) for name, head in heads.items()}
    made["pairwise_prompt"] = PairwiseJudge(policy)
    return {
        name: export(judge.about, policy, getattr(judge, "head", None), outside / name) for name, judge in made.items()
    }


@pytest.fixture(scope="module")
def server():
    judge = Judge()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()


@pytest.mark.parametrize(("game", "oracle"), GRID)
def test_any_oracle_labels_any_game(tmp_path, game, oracle, replies, coins, judges, server):
    own = {
        "table": ("model.oracle.answers=['#### 0','#### 1']", "model.oracle.preferences=[[0.5,0.2],[0.8,0.5]]"),
        "endpoint": (f"model.oracle.url={server.url}", "model.oracle.model=m", f"model.oracle.template='{TEMPLATE}'"),
    } | {name: (f"model.oracle.export={folder}",) for name, folder in judges.items()}
    data = coins if oracle in ("verifier", "table") else replies
    run = play(tmp_path, f"model={game}", f"oracle={oracle}", *data, *own.get(oracle, ()), *PLAYING)
    assert 0 <= run.results["headline"]["value"] <= 1
    labels = [json.loads(line) for path in tmp_path.rglob("labels-*.jsonl") for line in path.open()]
    assert {value for _, value in labels} - {0.5}
