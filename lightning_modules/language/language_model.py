"""Language modelling: predict every token of a stream of text from those before it."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from datamodules.batches import WindowBatch
from lightning_modules.language.flops import mfu
from lightning_modules.language.perplexity import TokenLoss
from lightning_modules.language.sampling import generate
from lightning_modules.method import Method
from lightning_modules.sharding import unsharded


class LanguageModel(Method):
    """Cross-entropy of the next token, in nats; validation goes over the whole held-out stream.

    The datamodule says how many bytes of text a token is, which makes losses comparable between tokenizers (bits per
    byte), and turns tokens into text. `samples` has the number of continuations that a test leaves, their length in
    tokens, and temperature and top_k of the sampling. `context` is the number of tokens in a window. `compile` has
    torch.compile make programs of the network.
    """

    batch_type: ClassVar[type] = WindowBatch
    headline: ClassVar[tuple[str, str]] = ("val/loss", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "loss": "{:.4f}".format,
        "perplexity": "{:.2f}".format,
        "bits_per_byte": "{:.4f}".format,
        "parameters": "{:,.0f}".format,
        "attention_mflops": "{:.3f}".format,
        "cache_bytes": "{:,.0f}".format,
    }
    caption: ClassVar[str] = "held-out text; loss in nats, MFLOPs of training and bytes of the bfloat16 cache per token"

    def __init__(
        self,
        network: Callable[[], nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., float],
        samples: dict[str, Any],
        context: int,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.build = network
        self.network = network()
        self.leaves = (
            f"The network in `export/` loads with `{self.network.loaded_by}`; `samples.jsonl` has continuations."
        )
        if compile:
            self.network.compile()  # in place, so that checkpoints keep their names
        self.samples = samples
        self.context = context
        if context > self.network.context:
            raise ValueError(
                f"data.context={context} exceeds the network's context of {self.network.context}: lower it"
            )
        self.held_out = TokenLoss(context)

    def networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def shard_units(self) -> list[nn.Module]:
        return self.network.shard_units()

    def count(self, batch: WindowBatch) -> int:
        return batch["mask"].numel()

    def rates(self, units_per_s: float) -> dict[str, float]:
        """Tokens per second, and the share of the device's peak that they are, where that is known."""
        flops = self.network.flops_per_token(self.context)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        dtype = torch.bfloat16 if self.trainer.precision.startswith("bf16") else torch.float32
        used = mfu(units_per_s / self.trainer.world_size, flops, name, dtype)
        return {"tokens_per_s": units_per_s} | ({} if used is None else {"mfu": used})

    def nll(self, batch: WindowBatch) -> Tensor:
        """Negative log-likelihood of every token after the first, (batch, length - 1), in nats."""
        positions = batch.get("positions")
        ids = batch["ids"]
        return self.network(ids[:, :-1], ids[:, 1:], None if positions is None else positions[:, :-1])

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        loss = (self.nll(batch) * batch["mask"]).sum() / batch["token_share"]
        self.log_step(loss)
        return loss

    # Evaluation

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: WindowBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: WindowBatch) -> None:
        self.held_out.update(self.nll(batch), batch["mask"])

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")
        for name, value in self.network.costs(self.context).items():
            self.log(self.metric(f"test/{name}"), value)
        self._write_samples()

    def _report(self, stage: str) -> None:
        loss, *self.losses = self.held_out.compute().tolist()
        self.unigram = self.trainer.datamodule.unigram_entropy(stage)
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if (size := self.trainer.datamodule.bytes_per_token(stage)) is not None:
            values["bits_per_byte"] = loss / (math.log(2) * size)
        for name, value in values.items():
            self.log(self.metric(f"{stage}/{name}"), value, prog_bar=name == "loss")
        self.held_out.reset()

    def figures(self) -> dict[str, Figure]:
        """How the loss falls with the length of the context."""
        figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
        axis.plot(range(1, len(self.losses) + 1), self.losses, label=f"{type(self.network).__name__}")
        axis.axhline(self.unigram, color="gray", linestyle=":", label="unigram entropy")
        axis.set(xscale="log", xlabel="tokens of context", ylabel="loss, nats per token", title="held-out text")
        axis.legend(fontsize=7)
        return {"loss_by_context": figure}

    def _write_samples(self) -> None:
        settings, data = dict(self.samples), self.trainer.datamodule
        generator = torch.Generator(self.device).manual_seed(0)
        starts = data.prompts(settings.pop("count"), settings.pop("prompt_tokens")).to(self.device)
        watched = self.trainer.is_global_zero and sys.stderr.isatty()
        with Progress(console=Console(stderr=True), transient=True, disable=not watched) as bar:
            task = bar.add_task("sampling", total=settings["max_new"])
            settings["on_token"] = lambda token: bar.advance(task)
            rows = generate(unsharded(self.network, self.build), starts, generator=generator, **settings)
        if self.trainer.is_global_zero:
            texts = [(data.decode(s.tolist()), data.decode(r[len(s) :].tolist())) for s, r in zip(starts, rows)]
            lines = [json.dumps({"prompt": p, "continuation": c}, ensure_ascii=False) for p, c in texts]
            Path(self.trainer.default_root_dir, "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def export(self, folder: Path) -> None:
        network = unsharded(self.network, self.build)
        if self.trainer.is_global_zero:
            network.export(folder)
