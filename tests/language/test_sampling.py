"""Generation with a cache is generation without one."""

import pytest
import torch

from lightning_modules.language.sampling import draw, generate
from tests.language.test_gpt2 import VARIANTS, every_variant, tokens, toy, trained_like


def plainly(network, ids, max_new, temperature, top_k=None, generator=None):
    """The whole text through the network for every token."""
    for _ in range(max_new):
        logits = network(ids[:, -network.context :])[:, -1, : network.vocab_size]
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            order = logits.argsort(descending=True)[:, :top_k]
            chosen = torch.multinomial(logits.gather(1, order).softmax(-1), 1, generator=generator)
            token = order.gather(1, chosen)
        ids = torch.cat([ids, token], 1)
    return ids


@every_variant
@pytest.mark.parametrize("prompt", [1, 9, 40])
def test_the_cache_changes_no_token(options, prompt):
    """From within the context (32) to beyond it, and from beyond it."""
    network = trained_like(toy(**options)).eval()
    ids, _ = tokens(2, prompt)
    assert torch.equal(generate(network, ids, 30, temperature=0.0), plainly(network, ids, 30, 0.0))


@every_variant
def test_a_padded_row_goes_on_as_alone(options):
    """Learned positions too count from its first token; until it is beyond the context, and after."""
    network, (ids, _), mask = trained_like(toy(**options)).eval(), tokens(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[1, 8:] = False
    rows = generate(network, ids, 30, temperature=0.0, mask=mask)
    assert torch.equal(rows[:1], generate(network, ids[:1], 30, temperature=0.0))
    assert torch.equal(rows[1:, 12:], generate(network, ids[1:, :8], 30, temperature=0.0))


def test_the_cache_changes_no_draw():
    network, (ids, _) = trained_like(toy()).eval(), tokens(2, 5)
    for top_k in (None, 5):
        ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
        expected = plainly(network, ids, 20, 0.8, top_k, theirs)
        assert torch.equal(generate(network, ids, 20, 0.8, top_k, ours), expected)


def test_only_the_real_vocabulary_is_drawn():
    network = toy()
    with torch.no_grad():
        network.wte.weight[97:] = 50 * network.wte.weight[:1]
        network.wte.weight[:97] *= 0
    assert generate(network, tokens(4, 3)[0], 20, generator=torch.Generator().manual_seed(0)).max() < 97


def test_a_stop_is_repeated():
    network, (ids, _) = trained_like(toy()).eval(), tokens(3, 4)
    free = generate(network, ids, 12, temperature=0.0)
    stop = int(free[0, 6])
    rows = generate(network, ids, 12, temperature=0.0, stop=stop)
    assert rows.shape == (3, 16)
    for row, expected in zip(rows[:, 4:].tolist(), free[:, 4:].tolist()):
        end = expected.index(stop) if stop in expected else len(expected)
        assert row == expected[:end] + [stop] * (12 - end)


def test_frequencies_follow_temperature_and_rank():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    counted = draw(logits, 2.0, 3, generator).bincount(minlength=4) / len(logits)
    expected = (torch.tensor([0.0, 2.0, 1.0, -torch.inf]) / 2).softmax(-1)
    torch.testing.assert_close(counted, expected, rtol=0, atol=0.015)


def test_dropout_is_off_and_the_mode_given_back():
    network, (ids, _) = toy(dropout=0.5), tokens(1, 4)
    assert torch.equal(generate(network, ids, 8, temperature=0.0), generate(network, ids, 8, temperature=0.0))
    assert network.training
    network.eval()
    generate(network, ids, 1)
    assert not network.training


@pytest.mark.parametrize(
    ("length", "settings", "said"),
    [
        (0, {}, "the prompt is empty"),
        (4, {"temperature": -1.0}, "temperature=-1.0"),
        (4, {"top_k": 0}, "top_k=0"),
        (4, {"max_new": -1}, "max_new=-1"),
    ],
)
def test_what_samples_nothing_is_refused(length, settings, said):
    with pytest.raises(ValueError, match=said):
        generate(toy(), tokens(1, 4)[0][:, :length], **{"max_new": 2, **settings})


def test_positions_and_caches_exclude_each_other():
    from lightning_modules.language.attention import Cache

    network, (ids, _) = toy(**VARIANTS["modern"]), tokens()
    with pytest.raises(ValueError, match="positions and caches exclude each other"):
        network(ids, positions=torch.arange(16).expand(3, -1), caches=[Cache(16), Cache(16)])
