"""A transformers model from a folder with an adapter on it, through the command line: pairs, games and a judge."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.parity import ROOT, launched

pytest.importorskip("peft")

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SMALL = (
    *("policy=hf", "policy.lora={r: 4, alpha: 8}", "start=null", "compare=null", "data=chat"),
    *("data.batch_size=8", "data.max_prompt=400", "data.max_response=100", "trainer.log_every_n_steps=1"),
    *("trainer.max_steps=4", "trainer.val_check_interval=2", "optimizer.lr=1e-2"),
    *("rollouts.k=4", "rollouts.max_new=40", "evaluation.k=1", "evaluation.max_new=12"),
)
GAME = ("model.iterations=2", "data.standin={train: 24, val: 4, test: 4, turns: 2, things: 2, cyclic: 0.5}")


def random_llama(folder: Path) -> Path:
    """A folder as `save_pretrained` leaves it: byte-level BPE learned from this project's pages, random weights.

    The vocabulary is small so that some answers end by chance: one that is cut off beats none, and ties make no pair.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    pages = [str(path) for path in sorted((ROOT / "docs").glob("*.md"))]
    backend.train(pages, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(("bos_token", "eos_token", "pad_token"), special))
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"))


def run(output: Path, llama: Path, *words: str) -> Path:
    """The folder of a run that has ended with figures and results."""
    model = words[0].removeprefix("model=")
    (found,) = launched(output, *SMALL, f"policy.name={llama}", *words).glob(f"{model}/*/*/results.json")
    assert json.loads(found.read_text())["metrics"]
    assert (found.parent / "figures/learning_curves.png").exists()
    return found.parent


def learns_into_the_matrices(folder: Path, llama: Path) -> bool:
    """Whether the export is a plain model whose layers, and nothing but them, differ from those of the start."""
    before, after = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (llama, folder / "export"))
    moved = {name for name in before if not before[name].equal(after[name])}
    return before.keys() == after.keys() and bool(moved) and all("proj" in name for name in moved)


@pytest.mark.slow
def test_pairs_of_a_file_move_an_adapter_and_leave_a_plain_model(llama, tmp_path):
    rows = [{"prompt": f"Say {n}", "chosen": f"It is {n}.", "rejected": f"Not {n}, no."} for n in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder = run(tmp_path / "out", llama, "model=dpo", f"data.path={file}")
    assert learns_into_the_matrices(folder, llama)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reference_only", "logits"])
def test_a_game_with_momentum_moves_an_adapter(llama, tmp_path, mode):
    words = ("data.name=standin", f"model.mode={mode}", "oracle=preference", *GAME)
    assert learns_into_the_matrices(run(tmp_path, llama, "model=apo", *words), llama)


@pytest.mark.slow
def test_a_judge_on_an_adapter_judges_a_game_of_its_own_policy(llama, tmp_path):
    standin = (*GAME[1:], "data.name=standin")
    judge = run(tmp_path, llama, "model=gpm", *standin)
    assert {"head.safetensors", "judge.json"} <= {path.name for path in (judge / "export").iterdir()}
    words = ("oracle=gpm", f"model.oracle.export={judge}/export", "data.name=standin", *GAME)
    assert learns_into_the_matrices(run(tmp_path, llama, "model=sppo", *words), llama)
