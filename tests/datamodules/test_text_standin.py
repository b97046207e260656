"""The embedded text, and streams whose best possible loss is known."""

import math

import numpy as np

from datamodules.text_standin import MarkovChain, induction, standard_library, uniform


def test_the_standard_library_is_some_megabytes_of_python():
    text = standard_library()
    assert 3e6 < len(text) < 8e6
    assert text == standard_library()
    assert "def " in text


def test_the_entropy_rate_of_the_chain_is_what_its_own_predictions_cost():
    chain = MarkovChain(vocab_size=16, seed=3)
    x = chain.sample(100_000, seed=1).astype(int)
    nll = -np.log(chain.transition[x[:-2], x[1:-1], x[2:]])
    assert abs(nll.mean() - chain.entropy_rate) < 4 * nll.std() / math.sqrt(len(nll))


def test_the_entropy_rate_of_a_chain_without_memory_is_that_of_its_distribution():
    assert math.isclose(MarkovChain(vocab_size=64, scale=0.0).entropy_rate, math.log(64), rel_tol=1e-12)


def test_the_stationary_distribution_stays():
    chain = MarkovChain()
    np.testing.assert_allclose(np.einsum("ab,abx->bx", chain.pairs, chain.transition), chain.pairs, atol=1e-12)
    np.testing.assert_allclose(chain.pairs.sum(0), chain.pairs.sum(1), atol=1e-10)


def test_a_model_that_sees_one_token_cannot_reach_the_entropy_rate():
    chain = MarkovChain()
    last = chain.pairs.sum(0)
    bigram = np.einsum("ab,abx->bx", chain.pairs, chain.transition) / last[:, None]
    one_token = -(last[:, None] * bigram * np.log(bigram)).sum()
    assert chain.entropy_rate + 0.3 < one_token < math.log(64)


def test_samples_depend_on_their_seed_alone():
    chain = MarkovChain(8)
    assert (chain.sample(500, 1) == MarkovChain(8).sample(500, 1)).all()
    assert (chain.sample(500, 1) != chain.sample(500, 2)).any()
    assert chain.sample(500, 1).max() < 8


def test_induction_repeats_its_prefix():
    rows = induction(5, 20, 50, seed=0)
    assert rows.shape == (5, 40)
    assert (rows[:, :20] == rows[:, 20:]).all()


def test_uniform_tokens_are_uniform():
    counts = np.bincount(uniform(64_000, 64, seed=0), minlength=64)
    assert abs(((counts - 1_000) ** 2 / 1_000).sum() - 63) < 4 * math.sqrt(2 * 63)
