"""Judges of pairs on a small trunk: what they read, what changes no verdict, and that they say cycles."""

import functools
import itertools
import json

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from datamodules.batches import Message, Pair, Prompt
from datamodules.collation import preference_batch
from datamodules.tournaments import Tournaments
from lightning_modules.alignment import policies
from lightning_modules.alignment.gpm import PreferenceModel
from lightning_modules.alignment.judge_export import load
from lightning_modules.alignment.judge_heads import EmbeddingHead, Gate, RewardHead
from lightning_modules.alignment.judges import EmbeddingJudge, ended
from lightning_modules.alignment.pairwise_judge import PairwiseJudge, swap_averaged
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.preference_embedding import cross_entropy, regression
from lightning_modules.alignment.reward_bench import SUBSETS
from lightning_modules.optimizers.schedules import warmup_cosine

EOS, PAD = 1, 0
CLOSE = {"rtol": 0, "atol": 2e-6}
GPM = functools.partial(EmbeddingHead, dim=4, normalise=True, gate=True)
BT = RewardHead


def small_policy(seed: int = 0) -> Policy:
    return policies.tiny(width=32, layers=2, heads=2, hidden=32, context=256, seed=seed)


def embedding_judge(head=GPM, tau: float = 0.1, policy: Policy | None = None, **settings) -> EmbeddingJudge:
    torch.manual_seed(0)
    return EmbeddingJudge(policy or small_policy(), head, tau, **settings).eval()


@pytest.fixture
def judge() -> EmbeddingJudge:
    return embedding_judge()


def answers(n: int, seed: int = 0) -> list[list[int]]:
    """Of different lengths, the end token last."""
    generator = torch.Generator().manual_seed(seed)
    return [[*torch.randint(2, 500, (3 + i % 4,), generator=generator).tolist(), EOS] for i in range(n)]


def pairs(n: int = 6) -> list[Pair]:
    given = answers(2 * n)
    return [Pair(f"p{i}", [*range(10, 14 + i)], (given[2 * i], given[2 * i + 1]), label=float(i % 2)) for i in range(n)]


def batch_of(rows: list[Pair], multiple: int = 1) -> dict:
    return preference_batch(rows, PAD, 1.0, multiple)


def judged(judge, rows: list[Pair], **how) -> torch.Tensor:
    batch = batch_of(rows, **how)
    return judge(batch["ids"], batch["mask"]).detach()


# What is read


def test_an_end_token_is_appended_where_it_is_missing_and_overwrites_nothing():
    turn = 99  # ends a turn under another name
    rows = [Pair("a", [7, 8], ([5, EOS], [5, 6, 9])), Pair("b", [7], ([4, 4, turn], [3]))]
    batch = batch_of(rows)
    ids, end = ended(batch["ids"], batch["mask"], EOS, [EOS, turn])
    assert ids.tolist() == [
        [[7, 8, 5, EOS, 0, 0, 0], [7, 8, 5, 6, 9, EOS, 0]],
        [[7, 4, 4, EOS, 0, 0, 0], [7, 3, EOS, 0, 0, 0, 0]],
    ]
    assert end.tolist() == [[3, 5], [3, 2]]


def test_an_answer_means_the_same_with_and_without_its_end_token(judge):
    rows = pairs()
    cut = [Pair(p.prompt_id, p.prompt_ids, (p.responses[0][:-1], p.responses[1])) for p in rows]
    torch.testing.assert_close(judged(judge, cut), judged(judge, rows), **CLOSE)


def test_vectors_are_read_at_the_end_and_weights_at_the_prompts_last_token(judge):
    row = pairs()[2]
    embedded = judge.embed(*itemgetter(batch_of([row])))
    for place, response in enumerate(row.responses):
        tokens = torch.tensor([[*row.prompt_ids, *response]])
        hidden = judge.policy.model.base_model(input_ids=tokens).last_hidden_state[0]
        expected = F.normalize(judge.head.linear(hidden[-1]), dim=0)
        torch.testing.assert_close(embedded.vectors[0, place], expected, **CLOSE)
        weights = torch.softmax(judge.head.gate.linear(hidden[len(row.prompt_ids) - 1]), 0)
        torch.testing.assert_close(embedded.scale[0], weights, **CLOSE)


def itemgetter(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["ids"], batch["mask"]


@pytest.mark.parametrize("kind", ["gpm", "bt", "pairpm"])
def test_padding_and_the_order_of_the_batch_change_nothing(kind):
    policy = small_policy()
    judges = {"gpm": embedding_judge(), "bt": embedding_judge(BT, 1.0), "pairpm": PairwiseJudge(policy)}
    judge, rows = judges[kind], pairs()
    together = judged(judge, rows)
    torch.testing.assert_close(judged(judge, rows, multiple=64), together, **CLOSE)
    torch.testing.assert_close(judged(judge, rows[::-1]).flip(0), together, **CLOSE)
    torch.testing.assert_close(torch.cat([judged(judge, [row]) for row in rows]), together, **CLOSE)
    exchanged = [Pair(p.prompt_id, p.prompt_ids, p.responses[::-1]) for p in rows]
    torch.testing.assert_close(judged(judge, exchanged), -together, **CLOSE)


def test_left_padding_is_right_padding_where_positions_say_where_a_sequence_begins(judge):
    batch = batch_of(pairs()[:1])
    ids, mask, front = batch["ids"], batch["mask"], 5
    left, marked = F.pad(ids, (front, 0), value=PAD), F.pad(mask, (front, 0))
    positions = torch.cat([torch.arange(front), torch.arange(ids.shape[-1])]).expand_as(left)
    padded, plain = judge.embed(left, marked, positions), judge.embed(ids, mask)
    torch.testing.assert_close(padded.vectors, plain.vectors, **CLOSE)
    torch.testing.assert_close(padded.scale, plain.scale, **CLOSE)


def test_pairpm_reads_as_many_tokens_of_a_pair_as_it_says():
    judge = PairwiseJudge(small_policy())
    ids, mask = torch.full((1, 2, 12), 7), torch.zeros(1, 2, 11, dtype=torch.bool)
    mask[0, 0, 4:7], mask[0, 1, 4:11] = True, True
    text, _ = judge._texts(ids[0].tolist(), mask[0].tolist())
    assert len(text) + 1 == judge.length(5, [3, 7])


@pytest.mark.parametrize("kind", ["gpm", "pairpm"])
def test_a_table_of_k_answers_is_all_pairwise_calls(kind):
    judge = embedding_judge() if kind == "gpm" else PairwiseJudge(small_policy())
    prompt, given = [20, 21, 22], answers(5)
    with torch.no_grad():
        table = judge.matrix(prompt, given)
    assert torch.equal(table, -table.T)
    for i, j in itertools.permutations(range(5), 2):
        one = judged(judge, [Pair("p", prompt, (given[i], given[j]))])[0]
        torch.testing.assert_close(table[i, j], one, rtol=0, atol=1e-5)


def test_k_answers_take_k_passes_of_an_embedding_judge_and_k_times_k_minus_1_of_pairpm():
    for judge, expected in ((embedding_judge(), 5), (PairwiseJudge(small_policy()), 20)):
        rows = []
        judge.policy.register_forward_hook(lambda module, args, out, rows=rows: rows.append(len(args[0])))
        judge.matrix([20, 21], answers(5))
        assert sum(rows) == expected


def test_log_odds_of_unit_vectors_are_bounded_by_the_temperature(judge):
    with torch.no_grad():
        judge.head.linear.weight.mul_(1e4)
    assert (judged(judge, pairs()).abs() <= 10 + 1e-5).all()


def test_a_gate_sums_to_one_or_to_the_number_of_planes():
    hidden = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    for scale, total in (("sum1", 1.0), ("mean1", 3.0)):
        weights = Gate(8, 3, scale)(hidden)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.full((7,), total))


def test_a_zero_vector_is_even_with_everything():
    head = EmbeddingHead(8, 2, normalise=True, gate=False)
    vectors = head(torch.zeros(1, 2, 8), torch.zeros(1, 8)).vectors
    assert torch.equal(vectors, torch.zeros(1, 2, 2))


def test_heads_stay_in_float32_under_autocast_and_on_a_bfloat16_trunk(judge):
    with torch.autocast("cpu", torch.bfloat16):
        assert judge.embed(*itemgetter(batch_of(pairs()))).vectors.dtype == torch.float32
    exact = judged(judge, pairs(40))
    judge.policy.to(torch.bfloat16)
    rounded = judged(judge, pairs(40))
    assert rounded.dtype == torch.float32
    clear = exact.abs() > 0.3
    assert clear.sum() >= 10
    assert torch.equal(rounded[clear] > 0, exact[clear] > 0)


# PairPM


def test_swap_averaging_makes_any_judge_antisymmetric():
    logits = 5 * torch.randn(200, 2, 2, generator=torch.Generator().manual_seed(0))
    ours = torch.sigmoid(swap_averaged(logits))
    p = logits.softmax(-1)
    torch.testing.assert_close(ours, (p[:, 0, 0] + p[:, 1, 1]) / 2)
    torch.testing.assert_close(ours + torch.sigmoid(swap_averaged(logits.flip(1))), torch.ones(200))


def test_pairpm_reads_both_answers_in_both_orders():
    judge, row = PairwiseJudge(small_policy()), Pair("p", [20, 21], ([5, 6, EOS], [7, EOS]))
    context, a, b, end = judge.pieces
    ids, mask = itemgetter(batch_of([row]))
    texts = judge._texts(ids[0].tolist(), mask[0].tolist())
    assert texts == (
        [*context, 20, 21, *a, 5, 6, *b, 7, *end],
        [*context, 20, 21, *a, 7, *b, 5, 6, *end],
    )
    logits = judge.logits(ids, mask)
    for text, ours in zip(texts, logits[0]):
        theirs = judge.policy.model(input_ids=torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    loss, log_odds = judge.fit(ids, mask, torch.tensor([1.0]))
    label_a, label_b = judge.labels
    expected = -(logits[0, 0].log_softmax(-1)[label_a] + logits[0, 1].log_softmax(-1)[label_b]) / 2
    torch.testing.assert_close(loss[0], expected)
    torch.testing.assert_close(log_odds, judge(ids, mask))


# Losses and training


@pytest.mark.parametrize("loss", [cross_entropy, functools.partial(cross_entropy, margin=0.1), regression])
def test_the_loss_of_a_judge_is_that_of_its_scores(loss):
    judge, batch = embedding_judge(loss=loss), batch_of(pairs())
    losses, log_odds = judge.fit(*itemgetter(batch), batch["label"])
    torch.testing.assert_close(losses, loss(0.1 * log_odds, batch["label"], 0.1))
    losses.sum().backward()
    silent = [name for name, parameter in judge.named_parameters() if parameter.grad is None]
    assert silent == []  # DDP wants a gradient for each


def tournaments(tmp_path, **changes) -> Tournaments:
    settings = {
        "tournaments": {"cycle": [1, 3], "random": [1, 4]}, "strength": 4.0, "label": "hard", "pairs": 1000,
        "held_out": 60, "limit": None,
        "batch_size": 32, "max_prompt": 64, "max_response": 64, "seed": 1, "workers": 0, "download": False,
        "cache": str(tmp_path),
    }  # fmt: skip
    return Tournaments(**settings | changes)


def fitted(kind, data: Tournaments, tmp_path, steps: int = 150) -> tuple[PreferenceModel, dict]:
    torch.manual_seed(1)  # a balanced cycle begins at a saddle, which not every start leaves in time
    method = PreferenceModel(
        small_policy(),
        kind,
        functools.partial(torch.optim.AdamW, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
        functools.partial(warmup_cosine, warmup=10),
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        use_distributed_sampler=False, inference_mode=False,
    )  # fmt: skip
    method.meet(data)
    trainer.fit(method.train(), datamodule=data)
    return method, trainer.test(method.eval(), datamodule=data, verbose=False)[0]


def test_planes_say_a_cycle_that_no_scalar_can_and_the_export_is_an_oracle(tmp_path):
    plane = functools.partial(EmbeddingHead, dim=2, normalise=False, gate=False)
    data = tournaments(tmp_path)
    method, found = fitted(functools.partial(EmbeddingJudge, head=plane, tau=1.0), data, tmp_path)
    assert found["test-standin/pair_accuracy/cycle"] > 0.99
    assert found["test-standin/pair_accuracy/cycle_low"] < 1
    assert {"accuracy", "score_matrices", "embeddings"} == method.figures().keys()
    method.export(tmp_path / "export")
    oracle = load(tmp_path / "export")
    game = data.tournaments[0]
    prompt = Prompt(game.id, method.policy.tokenizer.decode(game.prompt_ids), "", game.prompt_ids)
    texts = [method.policy.tokenizer.decode(answer[:-1]) for answer in game.answers]
    table = oracle.table(prompt, texts)
    assert torch.equal(table > 0.5, game.log_odds > 0)
    torch.testing.assert_close(table + table.T, torch.ones(3, 3))
    first, second = zip(*[(texts[i], texts[j]) for i in range(3) for j in range(3)])
    known = oracle.prefer([prompt] * 9, list(first), list(second)).view(3, 3)
    torch.testing.assert_close(known, table, rtol=0, atol=1e-5)
    assert oracle.identity == load(tmp_path / "export").identity

    scalar = functools.partial(EmbeddingJudge, head=BT, tau=1.0)
    _, found = fitted(scalar, tournaments(tmp_path), tmp_path)
    assert data.ceilings["cycle"] == 2 / 3
    assert found["test-standin/pair_accuracy/cycle"] < 2 / 3 + 0.01


def test_subsets_are_reported_each_and_those_of_rewardbench_by_section():
    method = PreferenceModel(small_policy(), PairwiseJudge, torch.optim.AdamW, lambda step, total: 1.0)
    logged = {}
    method.log_dict = logged.update
    right, wrong = (torch.tensor([x, x]) for x in (1.0, -1.0))
    method.judged = {name: [(wrong, torch.ones(2))] for name in SUBSETS} | {
        "xstest-should-refuse": [(right, torch.ones(2)), (wrong, torch.ones(2))]
    }
    method.on_test_epoch_end()
    assert logged["test/pair_accuracy/xstest-should-refuse"] == 0.5
    assert logged["test/reward_bench/Safety"] == pytest.approx(0.5 * 154 / 740)
    assert logged["test/pair_accuracy"] == pytest.approx(2 / (2 * len(SUBSETS) + 2))
    method.judged = {}
    with pytest.raises(ValueError, match="no held-out pair to judge"):
        method.on_test_epoch_end()


# Disk and refusals


@pytest.mark.parametrize("kind", ["gpm", "bt", "pairpm"])
def test_a_judge_comes_back_from_its_folder(kind, tmp_path):
    built = {
        "gpm": functools.partial(EmbeddingJudge, head=GPM, tau=0.1),
        "bt": functools.partial(EmbeddingJudge, head=functools.partial(BT, dim=3, gate=True), tau=0.7),
        "pairpm": PairwiseJudge,
    }
    method = PreferenceModel(small_policy(), built[kind], torch.optim.AdamW, lambda step, total: 1.0)
    method._trainer = type("T", (), {"is_global_zero": True})()
    method.export(tmp_path / "judge")
    again = load(tmp_path / "judge")
    assert not again.training
    torch.testing.assert_close(judged(again, pairs()), judged(method.judge.eval(), pairs()), **CLOSE)
    assert again.about == method.judge.about
    assert json.loads((tmp_path / "judge" / "judge.json").read_text()) == again.about
    assert [path.name for path in tmp_path.iterdir()] == ["judge"]


def test_an_adapted_trunk_is_trained_by_its_adapter_and_exported_whole(tmp_path):
    pytest.importorskip("peft")
    small_policy().export(tmp_path / "base")
    policy = policies.pretrained(str(tmp_path / "base"), lora={"r": 2, "alpha": 4})
    method = PreferenceModel(
        policy, functools.partial(EmbeddingJudge, head=GPM, tau=0.1), torch.optim.AdamW, lambda step, total: 1.0
    )
    batch = batch_of(pairs())
    losses, _ = method.judge.fit(*itemgetter(batch), batch["label"])
    losses.mean().backward()
    trained = {name for name, p in method.named_parameters() if p.grad is not None}
    assert all("lora_" in name or "head" in name for name in trained)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    method._trainer = type("T", (), {"is_global_zero": True})()
    method.export(tmp_path / "judge")
    ours, theirs = judged(method.judge.eval(), pairs()), judged(load(tmp_path / "judge"), pairs())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_folder_without_a_judge_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no export of a judge"):
        load(tmp_path)


def test_a_prompt_in_another_vocabulary_is_read_by_the_chat_template_or_refused(judge):
    prompt = Prompt("p", "How many apples?", "", [400, 401], (Message("user", "How many apples?"),))
    with pytest.raises(ValueError, match="prompt p are not of the judge's tokenizer"):
        judge.encode_prompt(prompt)
    judge.policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert judge.policy.tokenizer.decode(judge.encode_prompt(prompt)) == "How many apples?"


@pytest.mark.parametrize("make", [
    (lambda: EmbeddingHead(8, 3, normalise=True, gate=False), r"model\.judge\.head\.dim=3"),
    (lambda: RewardHead(8, 2), r"model\.judge\.head\.dim=2"),
    (lambda: Gate(8, 2, "sum2"), "gate_scale=sum2"),
    (lambda: embedding_judge(tau=0.0), r"model\.judge\.tau=0"),
])  # fmt: skip
def test_settings_that_make_no_judge_are_refused(make):
    with pytest.raises(ValueError, match=make[1]):
        make[0]()
