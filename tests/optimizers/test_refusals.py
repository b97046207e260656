"""Words about optimizers that do not fit together are refused in one sentence, before anything is loaded."""

import pytest

from tessera.check import problems
from tessera.compose import compose


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer=mars_exact", "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=1, or"),
        (["optimizer=mars", "optimizer.exact=true", "trainer.precision=16-mixed"], "its gradient scaler"),
        (["optimizer=prodigy", "trainer=fsdp", "trainer.accelerator=cpu"], "take optimizer=adam_pp, or trainer=ddp"),
        (["trainer.on_nonfinite=ignore"], "trainer.on_nonfinite=ignore: there are stop, skip"),
    ],
)
def test_what_does_not_fit_is_refused(words, said):
    found = problems(*compose(["model=sft", "data=gsm8k", *words]))
    assert len([sentence for sentence in found if said in sentence]) == 1


@pytest.mark.parametrize("name", ["mars_exact", "prodigy", "schedule_free"])
def test_what_fits_is_not(name):
    assert problems(*compose(["model=sft", "data=gsm8k", f"optimizer={name}"])) == []
