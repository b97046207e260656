"""T6 has the published sizes and caches, starts where its authors' code does, and generates what it computes."""

import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from lightning_modules.language.attention import Cache
from lightning_modules.language.sampling import generate
from lightning_modules.language.t6 import ATTENTIONS, T6
from tessera.compose import compose
from tests.language.test_gpt2 import tokens, trained_like
from tests.language.test_sampling import plainly

every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
# arXiv 2501.06425: parameters of attention in a layer and of the model, bytes of its bfloat16 cache for a token
PUBLISHED = {
    "small": {
        "mha": (2_359_296, 123_568_128, 3072),
        "mqa": (2_359_296, 123_568_128, 256),
        "gqa": (2_359_296, 123_568_128, 512),
        "mla": (2_319_104, 123_085_824, 576),
        "tpa": (2_423_808, 124_342_272, 784),
        "tpa_kvonly": (2_426_880, 124_379_136, 688),
    },
    "medium": {
        "mha": (4_194_304, 353_452_032, 4096),
        "mqa": (4_194_304, 353_452_032, 256),
        "gqa": (4_194_304, 353_452_032, 512),
        "mla": (4_211_456, 353_863_680, 576),
        "tpa": (4_216_832, 353_992_704, 888),
        "tpa_kvonly": (4_182_016, 353_157_120, 744),
    },
    "large": {
        "mha": (6_553_600, 772_131_840, 5120),
        "mqa": (6_553_600, 772_131_840, 256),
        "gqa": (6_553_600, 772_131_840, 512),
        "mla": (6_595_328, 773_634_048, 576),
        "tpa": (6_597_120, 773_698_560, 1000),
        "tpa_kvonly": (6_579_200, 773_053_440, 808),
    },
    "xl": {
        "mha": (10_240_000, 1_554_892_800, 6400),
        "mqa": (10_240_000, 1_554_892_800, 256),
        "gqa": (10_240_000, 1_554_892_800, 512),
        "mla": (10_312_448, 1_558_370_304, 576),
        "tpa": (10_259_200, 1_555_814_400, 1136),
        "tpa_kvonly": (10_336_000, 1_559_500_800, 888),
    },
}
# multiply-adds per kept token of a decoding step (appendix A.4): width, heads, dimension, latent and turned part of mla
DECODING = {
    (2048, 32, 64, 256, 32): {"mha": 4096, "gqa": 4096, "mla": 17408},
    (4096, 32, 128, 512, 64): {"mha": 8192, "gqa": 8192, "mla": 34816},
    (7168, 64, 128, 512, 64): {"mha": 16384, "gqa": 16384, "mla": 69632},
}
OF_RANKS = {2048: (3584, 7168, 2816, 5632), 4096: (6656, 13312, 5376, 10752), 7168: (11264, 22528, 9728, 19456)}
RANKS = ((16, 1, 1), (16, 2, 2), (8, 1, 1), (8, 2, 2))
SMALL = {
    **{"vocab_size": 97, "context": 32, "layers": 2, "width": 48, "heads": 6, "head_width": 8},
    **{"groups": 2, "ranks": (3, 2, 2), "orders": (4, 2), "latents": (20, 12), "rotary_width": 4},
}


def toy(attention: str = "tpa", **options) -> T6:
    torch.manual_seed(0)
    return T6(**{**SMALL, "attention": attention, **options})


def configured(size: str, *words: str) -> T6:
    """The network of `model=t6_<size>`, without memory for its parameters."""
    config, _ = compose([f"model=t6_{size}", "data.vocab_size=50257", *words])
    with torch.device("meta"):
        return instantiate(config.model.network)()


# ---- sizes


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_and_caches_are_the_published_ones(size):
    for attention, expected in PUBLISHED[size].items():
        network = configured(size, f"model.network.attention={attention}")
        attn = network.blocks[0].attn
        found = (sum(p.numel() for p in module.parameters()) for module in (attn, network))
        assert (*found, attn.cache_bytes_per_token(torch.bfloat16)) == expected
        assert network.cache_bytes_per_token(torch.float32) == 2 * len(network.blocks) * expected[2]


@pytest.mark.parametrize("size", ["tiny", *PUBLISHED])
def test_every_attention_has_about_the_parameters_of_mha(size):
    name = "t6" if size == "tiny" else f"t6_{size}"
    config, _ = compose([f"model={name}", "data.vocab_size=256"])
    counts = {}
    for attention in ATTENTIONS:
        config.model.network.attention = attention
        config.model.network.layers = 1
        with torch.device("meta"):
            network = instantiate(config.model.network)()
        counts[attention] = sum(p.numel() for p in network.blocks[0].attn.parameters())
    assert counts == pytest.approx(dict.fromkeys(ATTENTIONS, counts["mha"]), rel=0.05)


@pytest.mark.parametrize("sizes", DECODING, ids=str)
def test_a_decoding_step_costs_what_the_paper_says(sizes):
    width, heads, dim, latent, rotary = sizes
    options = {"layers": 1, "width": width, "heads": heads, "head_width": dim, "rotary_width": rotary}
    cases = [({"attention": kind}, expected) for kind, expected in DECODING[sizes].items()]
    cases += [({"ranks": ranks}, expected) for ranks, expected in zip(RANKS, OF_RANKS[width])]
    for chosen, expected in cases:
        with torch.device("meta"):
            network = T6(256, 64, latents=(512, latent), **options, **chosen)
        assert network.blocks[0].attn.decode_multiply_adds == expected


def test_flops_are_counted_by_the_true_width_of_the_heads():
    """47 heads of 64 are 3008, not the width of 1024; of mla the mean of 96 in the scores and 64 in the sum."""
    network = configured("medium")
    assert network.flops_per_token(1024) == 6 * 353_992_704 + 12 * 24 * 47 * 64 * 1024
    assert configured("medium", "model.network.attention=mla").blocks[0].attn.score_width == 23 * 80
    assert network.costs(1024) == {
        "parameters": 353_992_704,
        "attention_mflops": pytest.approx(12 * 24 * 47 * 64 * 1024 / 1e6),
        "cache_bytes": 24 * 888,
    }


@pytest.mark.parametrize(
    ("size", "peak", "least"),
    [("small", 6e-4, 3e-5), ("medium", 6e-4, 3e-5), ("large", 2e-4, 1e-5), ("xl", 1e-4, 1e-5)],
)
def test_the_learning_rate_is_the_published_one(size, peak, least):
    config, _ = compose([f"model=t6_{size}"])
    factor = instantiate(config.scheduler)
    found = [config.optimizer.lr * factor(step, config.trainer.max_steps) for step in (0, 1, 2000, 51_000, 100_000)]
    assert found == pytest.approx([0, peak / 2000, peak, (peak + least) / 2, least])


# ---- the beginning


@pytest.mark.parametrize(("width", "expected"), [(768, 16.0), (1600, 23.1)])
def test_the_first_loss_is_that_of_predicting_the_input(width, expected):
    """log(exp(sqrt(d / 3)) + V exp(1 / 6)): blocks put out nothing, and the tied head finds the token that went in."""
    torch.manual_seed(0)
    network = T6(50257, 64, 1, width, 4, loss_chunk=64)
    loss = network(*tokens(2, 64, 50257)).mean().item()
    assert loss == pytest.approx(math.log(math.exp(math.sqrt(width / 3)) + 50304 * math.exp(1 / 6)), abs=0.15)
    assert loss == pytest.approx(expected, abs=0.15)


@every_attention
def test_blocks_start_as_the_identity_and_only_their_outputs_learn_at_first(attention):
    network = toy(attention)
    ids, targets = tokens()
    assert torch.equal(network(ids), F.linear(network.ln_f(network.wte(ids)), network.head))
    network(ids, targets).mean().backward()
    for name, parameter in network.blocks.named_parameters():
        assert parameter.grad.any() == name.endswith("c_proj.weight"), name


@every_attention
def test_one_batch_is_learned_by_heart(attention):
    torch.manual_seed(0)
    network = toy(attention, vocab_size=256, context=64, width=64, head_width=16, heads=4, orders=(8, 2), groups=2)
    ids, targets = tokens(4, 64, 256)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(300):
        loss = network(ids, targets).mean()
        if loss < 0.1:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"the loss is {loss} after 300 steps")


# ---- who sees what


@every_attention
def test_a_token_changes_nothing_before_it(attention):
    network, (ids, _) = trained_like(toy(attention)), tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 97
    before, after = network(ids), network(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


@every_attention
def test_documents_in_one_row_are_as_if_alone(attention):
    network, (ids, targets) = trained_like(toy(attention)), tokens(2, 20)
    cuts = (0, 5, 6, 20)
    positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(cuts)]).expand(2, -1)
    together = network(ids, targets, positions)
    for begin, end in pairwise(cuts):
        part = slice(begin, end)
        torch.testing.assert_close(together[:, part], network(ids[:, part], targets[:, part]), rtol=1e-4, atol=1e-4)


@every_attention
def test_padding_is_not_seen(attention):
    """Neither by tokens that are read together nor by those that find it in a cache; whatever it is."""
    network, (ids, _) = trained_like(toy(attention)).eval(), tokens(2, 20)
    padding = torch.tensor([0, 7])
    alone = network(ids[1:, 7:])
    for parts in ([20], [5, 1, 1, 13], [10, 10]):
        caches = [Cache(20) for _ in network.blocks]
        pieces = [network(part, caches=caches, padding=padding) for part in ids.split(parts, 1)]
        found = torch.cat(pieces, 1)
        assert found.isfinite().all()
        torch.testing.assert_close(found[1:, 7:], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:1], network(ids[:1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(ids, padding=padding)[1:, 7:], alone, rtol=1e-4, atol=1e-4)


# ---- generation


@every_attention
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_generation_from_a_cache_in_chunks_is_generation_without_one(attention, chunk):
    """From within the context (32) to beyond it."""
    network, (ids, _) = trained_like(toy(attention)).eval(), tokens(2, 20)
    assert torch.equal(generate(network, ids, 16, 0.0, chunk=chunk), plainly(network, ids, 16, 0.0))


@every_attention
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_several_lengths_go_on_as_alone(attention, side):
    """Until the padded rows are beyond the context, and before."""
    network, lengths = trained_like(toy(attention)).eval(), (3, 20, 11)
    prompts = [tokens(1, length, seed=length)[0] for length in lengths]
    pads = [(20 - length, 0) if side == "left" else (0, 20 - length) for length in lengths]
    ids = torch.cat([F.pad(prompt, pad, value=5) for prompt, pad in zip(prompts, pads)])
    mask = torch.cat([F.pad(torch.ones_like(prompt), pad) for prompt, pad in zip(prompts, pads)]).bool()
    rows = generate(network, ids, 16, 0.0, mask=mask)
    for row, prompt in zip(rows, prompts):
        assert torch.equal(row[-16 - prompt.shape[1] :], generate(network, prompt, 16, 0.0)[0])


def test_every_new_token_is_told():
    network, (ids, _), told = trained_like(toy()).eval(), tokens(2, 5), []
    rows = generate(network, ids, 4, 0.0, on_token=told.append)
    assert torch.equal(torch.stack(told, 1), rows[:, 5:])


# ---- its folder


@every_attention
def test_an_exported_network_is_the_same_again(attention, tmp_path):
    network, (ids, _) = trained_like(toy(attention, tied=False, norm_gain=True, norm_eps=1e-5, hidden=100)), tokens()
    network.export(tmp_path)
    again = T6.load(tmp_path)
    assert torch.equal(again(ids), network(ids))
    assert again.config == network.config


def test_what_is_no_folder_of_a_t6_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        T6.load(tmp_path)
    toy().export(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    refusals = {
        "is no JSON object": "{",
        "is not of a T6": json.dumps(config | {"model_type": "gpt2"}),
        "do not fit.*size mismatch": json.dumps(config | {"width": 40}),
        "do not fit.*unexpected keyword argument 'biases'": json.dumps(config | {"biases": 3}),
    }
    for said, text in refusals.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            T6.load(tmp_path)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "flash"}, "attention='flash' is none of mha, mqa, gqa, mla, tpa"),
        ({"attention": "gqa", "groups": 4}, "heads=6 cannot be dealt out to groups=4"),
        ({"ranks": (0, 2, 2)}, r"ranks=\[0, 2, 2\]"),
        ({"head_width": 7}, "head_width=7"),
        ({"heads": {"mha": 3}}, "heads has no number for attention=tpa"),
        ({"heads": 0}, "heads=0"),
        ({"layers": 0}, "layers=0"),
        ({"rope_sign": 0}, "rope_sign=0 is none of -1, 1"),
        ({"rope_table": "float16"}, "rope_table='float16' is none of float32, bfloat16"),
        ({"impl": "cuda"}, "impl='cuda' is none of auto, triton, torch"),
        ({"attention": "mha", "head_width": 7}, "head_width=7 is odd"),
        ({"attention": "mla", "rotary_width": 3}, "rotary_width=3: take latents of at least 1, and an even"),
    ],
)
def test_what_cannot_be_built_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        toy(**options)


def test_kernels_that_cannot_run_are_refused_by_name():
    network, (ids, _) = toy(impl="triton"), tokens()
    with pytest.raises(ValueError, match=r"kernel of attention cannot run: .*; impl=auto takes the PyTorch reference"):
        network(ids)


def test_what_does_not_fit_is_refused():
    network, (ids, _) = toy(), tokens(3, 33)
    with pytest.raises(ValueError, match="a sequence of 33 tokens exceeds the network's context of 32"):
        network(ids)
    with pytest.raises(ValueError, match="position 36 is beyond the network's context of 32"):
        network(ids[:, :10], positions=torch.arange(27, 37).expand(3, -1))
    with pytest.raises(ValueError, match="room for 8 tokens cannot keep 10"):
        network(ids[:, :10], caches=[Cache(8), Cache(8)])
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(network, ids[:, :4], 2, mask=torch.tensor([[True] * 4, [False] * 4, [True] * 4]))
    with pytest.raises(ValueError, match="chunk=0"):
        generate(network, ids[:, :4], 2, chunk=0)
    with pytest.raises(ValueError, match="positions and padding"):
        network(ids[:, :4], positions=torch.arange(4).expand(3, -1), padding=torch.zeros(3, dtype=torch.long))
