"""GPT-2 has the published sizes, starts at chance, sees only the past, and learns."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.language.gpt2 import GPT2

SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
PARAMETERS = {  # vocabulary 50257 with biases, 50304 without
    "small": (124_439_808, 124_373_760),
    "medium": (354_823_168, 354_599_936),
    "large": (774_030_080, 773_582_080),
    "xl": (1_557_611_200, 1_556_840_000),
}
FLOPS = {"small": 854_770_176, "medium": 2_423_298_048, "large": 5_199_859_200, "xl": 10_274_928_000}


def toy(**options) -> GPT2:
    torch.manual_seed(0)
    return GPT2(**{"vocab_size": 97, "context": 32, "layers": 2, "heads": 4, "width": 48, **options})


def trained_like(network: GPT2) -> GPT2:
    """With weights large enough for every part to matter."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def tokens(rows: int = 3, length: int = 16, vocabulary: int = 97, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    return window[:, :-1], window[:, 1:]


VARIANTS = {
    "gpt2": {},
    "bare": {"bias": False, "scale_by_layer": True, "tied": False},
    "modern": {"norm": "rms", "mlp": "swiglu", "position": "rotary", "qk_norm": True, "softcap": 15.0, "bias": False},
    "relu2": {"mlp": "relu2", "gelu": "tanh"},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


# ---- sizes and initialisation


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_flops_are_the_published_ones(size):
    layers, heads, width = SIZES[size]
    with torch.device("meta"):
        biased = GPT2(50257, 1024, layers, heads, width, pad_vocabulary_to=1)
        bare = GPT2(50257, 1024, layers, heads, width, bias=False)
    assert bare.wte.num_embeddings == 50304
    assert tuple(sum(p.numel() for p in network.parameters()) for network in (biased, bare)) == PARAMETERS[size]
    assert bare.flops_per_token(1024) == FLOPS[size]


def test_weights_start_as_in_the_paper():
    network = toy(layers=8, width=128)
    state = network.state_dict()
    deviations = {name: tensor.std().item() for name, tensor in state.items() if tensor.ndim >= 2}
    for name, deviation in deviations.items():
        expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
        assert deviation == pytest.approx(expected, rel=0.05), name
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith("bias"))
    assert all((tensor == 1).all() for name, tensor in state.items() if "ln_" in name and name.endswith("weight"))


def test_zero_init_makes_every_block_the_identity():
    network = toy(zero_init=True).eval()
    ids, _ = tokens()
    x = network.wte(ids) + network.wpe.weight[: ids.shape[1]]
    assert torch.equal(network(ids), F.linear(network.ln_f(x), network.head))


def initial_losses(layers: int, width: int, rows: int) -> tuple[float, float]:
    """On random targets, and on the inputs themselves."""
    torch.manual_seed(0)
    network = GPT2(50257, 1024, layers, width // 64, width, bias=False, loss_chunk=64).eval()
    ids, targets = tokens(rows, 256, 50257)
    with torch.no_grad():
        return network(ids, targets).mean().item(), network(ids, ids).mean().item()


def test_the_loss_starts_at_chance():
    """The measured numbers; the tied head favours the token that went in, so targets that are the inputs cost less."""
    random, same = initial_losses(2, 64, 4)
    assert random == pytest.approx(math.log(50304), abs=0.15)
    assert random == pytest.approx(10.843, abs=0.02)
    assert same == pytest.approx(10.089, abs=0.02)


@pytest.mark.slow
def test_the_loss_of_gpt2_small_starts_at_chance():
    """Above ln V by half the variance of a logit, C * 0.02^2: 10.979, measured 10.906 to 10.955."""
    random, _ = initial_losses(12, 768, 2)
    assert random == pytest.approx(math.log(50304) + 768 * 0.02**2 / 2, abs=0.1)


# ---- who sees what


@every_variant
def test_a_token_changes_nothing_before_it(options):
    network = trained_like(toy(**options))
    ids, _ = tokens()
    for j in (0, 7, 15):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % 97
        before, after = network(ids), network(changed)
        assert torch.equal(before[:, :j], after[:, :j])
        assert not torch.equal(before[:, j], after[:, j])


def test_no_gradient_comes_from_the_future():
    network = trained_like(toy())
    ids, _ = tokens()
    seen = []
    network.wte.register_forward_hook(lambda module, args, out: seen.append(out) or out.retain_grad())
    network(ids)[:, 9].sum().backward()
    gradient = seen[0].grad.abs().sum((0, 2))
    assert (gradient[:10] > 0).all()
    assert not gradient[10:].any()


@every_variant
def test_documents_in_one_row_are_as_if_alone(options):
    network = trained_like(toy(**options))
    ids, targets = tokens(2, 20)
    cuts = (0, 5, 6, 20)
    positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(cuts)]).expand(2, -1)
    together, losses = network(ids, positions=positions), network(ids, targets, positions)
    for begin, end in pairwise(cuts):
        part = slice(begin, end)
        torch.testing.assert_close(together[:, part], network(ids[:, part]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses[:, part], network(ids[:, part], targets[:, part]), rtol=1e-5, atol=1e-5)


def test_positions_from_the_row_s_start_change_nothing():
    network = trained_like(toy())
    ids, _ = tokens()
    torch.testing.assert_close(network(ids, positions=torch.arange(16).expand(3, -1)), network(ids))


# ---- head and loss


@every_variant
def test_the_loss_is_the_cross_entropy_of_the_logits(options):
    network = trained_like(toy(**options))
    ids, targets = tokens()
    expected = F.cross_entropy(network(ids).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(network(ids, targets), expected)


def test_a_tied_weight_is_one_parameter_whose_gradient_is_the_sum_of_both_uses():
    tied, untied = trained_like(toy()), toy(tied=False)
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.wte.weight.detach()})
    ids, targets = tokens()
    assert torch.equal(tied(ids), untied(ids))
    for network in (tied, untied):
        network(ids, targets).mean().backward()
    assert sum(p is tied.wte.weight for p in tied.parameters()) == 1
    assert tied.head is tied.wte.weight
    torch.testing.assert_close(tied.wte.weight.grad, untied.wte.weight.grad + untied.lm_head.weight.grad)


def test_padded_rows_take_part_in_the_softmax_and_learn_from_nothing_else():
    network = trained_like(toy())
    ids, targets = tokens()
    logits = network(ids)
    assert logits.shape[-1] == network.head.shape[0] == 128
    network(ids, targets).sum().backward()
    probability = logits.softmax(-1)[..., 97:].flatten(0, 1)
    hidden = network.ln_f.register_forward_hook(lambda module, args, out: setattr(network, "seen", out))
    network(ids)
    hidden.remove()
    torch.testing.assert_close(network.wte.weight.grad[97:], probability.T @ network.seen.flatten(0, 1))


def test_soft_capped_logits_stay_below_the_cap():
    network = toy(softcap=3.0)
    with torch.no_grad():
        network.wte.weight.mul_(100)
    ids, targets = tokens()
    assert network(ids).abs().max() <= 3
    assert network(ids, targets).max() <= math.log(128) + 6


def test_swiglu_keeps_the_number_of_parameters():
    plain, gated = (
        sum(p.numel() for p in toy(width=96, mlp=mlp, bias=False).parameters()) for mlp in ("gelu", "swiglu")
    )
    assert plain == gated


# ---- precision, accumulation, compilation


@every_variant
def test_norms_residual_stream_and_loss_are_float32_under_autocast(options):
    network = trained_like(toy(**options, loss_chunk=16))
    ids, targets = tokens()
    seen = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        losses, logits = network(ids, targets), network(ids)
    assert losses.dtype == logits.dtype == torch.float32
    assert {dtype for name, dtype in seen.items() if "ln_" in name or name.startswith("blocks.0.ln")} == {torch.float32}
    assert seen["blocks.1"] == torch.float32
    assert seen["blocks.0.attn.c_attn"] == seen["blocks.1.mlp.c_proj"] == torch.bfloat16
    torch.testing.assert_close(losses, network(ids, targets), rtol=0.05, atol=0.1)


def gradients(network: GPT2, micro: int, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Of the mean loss over 8 rows, in `micro` parts."""
    ids, targets = tokens(8)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    network.zero_grad()
    share = mask.sum() / micro
    for part in torch.arange(8).chunk(micro):
        loss = (network(ids[part], targets[part]) * mask[part]).sum() / share
        (loss / micro).backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("masked", [False, True])
def test_four_micro_batches_have_the_gradient_of_one_batch(masked):
    network = trained_like(toy())
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) > torch.linspace(0, 0.9, 8)[:, None]
    mask = mask if masked else None
    torch.testing.assert_close(gradients(network, 4, mask), gradients(network, 1, mask), rtol=1e-5, atol=1e-6)


def test_dropout_is_on_in_training_only():
    network = toy(dropout=0.5)
    ids, targets = tokens()
    assert not torch.equal(network(ids, targets), network(ids, targets))
    network.eval()
    assert torch.equal(network(ids, targets), network(ids, targets))


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    network = GPT2(64, 32, layers=2, heads=4, width=64)
    ids, targets = tokens(4, 32, 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(200):
        loss = network(ids, targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# ---- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "width=48 cannot be dealt out to heads=5"),
        ({"heads": 16, "position": "rotary"}, "width=48 / heads=16 is odd"),
        ({"dropout": 1.0}, r"dropout=1.0 .* \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"layers": 0}, "layers=0"),
        ({"context": 0}, "context=0"),
        ({"pad_vocabulary_to": 0}, "pad_vocabulary_to=0"),
        ({"loss_chunk": 0}, "loss_chunk=0"),
        ({"gelu": "exact"}, "gelu='exact' is none of erf, tanh"),
        ({"norm": "batch"}, "norm='batch' is none of layer, rms"),
        ({"position": "alibi"}, "position='alibi'"),
    ],
)
def test_what_cannot_be_built_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        toy(**options)


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="a sequence of 33 tokens exceeds the network's context of 32"):
        toy()(tokens(1, 33)[0])
