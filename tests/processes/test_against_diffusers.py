"""Our DDIM against the scheduler of diffusers, an independent implementation (extra `oracles`)."""

import pytest
import torch

from lightning_modules.processes.ode import DDIM, sample
from lightning_modules.processes.paths import VP
from lightning_modules.processes.prediction import Prediction

diffusers = pytest.importorskip("diffusers", reason="pip install 'tessera[oracles]'")
KINDS = {"noise": "epsilon", "data": "sample", "velocity": "v_prediction"}


def clock(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Our time of a DDPM's step: alpha^2 = e^-2t."""
    return -alphas_cumprod.double().log() / 2


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_steps_are_those_of_diffusers(kind):
    theirs = diffusers.DDIMScheduler(
        num_train_timesteps=1000, clip_sample=False, prediction_type=KINDS[kind], timestep_spacing="leading"
    )
    theirs.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 4, generator=generator), torch.randn(4, 4, generator=generator) / 4
    ours = Prediction(VP(), lambda x, t: torch.tanh(x @ weight), kind)
    y = x
    for step, following in zip(theirs.timesteps[:-1], theirs.timesteps[1:]):
        t, u = clock(theirs.alphas_cumprod[step]), clock(theirs.alphas_cumprod[following])
        expected = theirs.step(torch.tanh(x @ weight), int(step), x, eta=0.0).prev_sample
        torch.testing.assert_close(DDIM().step(ours, x, t, u, None)[0], expected, rtol=1e-6, atol=1e-6)
        x = expected
    whole = sample(DDIM(), ours, y, clock(theirs.alphas_cumprod[theirs.timesteps]))
    torch.testing.assert_close(whole, x, rtol=1e-5, atol=1e-5)


def test_the_last_step_of_diffusers_is_our_step_onto_the_data():
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(10)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ours = Prediction(VP(), lambda x, t: torch.tanh(x), "noise")
    t = clock(theirs.alphas_cumprod[theirs.timesteps[-1]])
    expected = theirs.step(torch.tanh(x), int(theirs.timesteps[-1]), x, eta=0.0).prev_sample
    torch.testing.assert_close(DDIM().step(ours, x, t, 0 * t, None)[0], expected, rtol=1e-6, atol=1e-6)
