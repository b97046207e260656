"""A causal language model and its tokenizer as one module: log-probabilities, a frozen reference, fingerprint, export.

Everything that touches parameters in training goes through `Policy.__call__`, because that is where the hooks of FSDP2
and DDP fire.
"""

import copy
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules import sharding

# positions x vocabulary held at once by the head: 64 MB of float32
LOGITS_AT_ONCE = 2**24


class Scores(NamedTuple):
    """What a policy says about given sequences; position t speaks about `ids[:, t + 1]`.

    `log_probs` (nats, float32) and `entropy` (nats, float32, None unless asked) are zero outside the mask. `hidden` is
    the last hidden state that predicts each token. `logits` (float32, None unless asked) are those of the masked
    positions only, in row-major order.
    """

    log_probs: Float[Tensor, "batch length-1"]
    hidden: Float[Tensor, "batch length-1 width"]
    entropy: Float[Tensor, "batch length-1"] | None
    logits: Float[Tensor, "masked vocabulary"] | None


class Policy(nn.Module):
    """A transformers causal language model with its tokenizer, without dropout.

    `model` may carry a PEFT adapter. With `checkpointing` the backward pass computes every layer's activations again
    instead of keeping them. Raises ValueError when the logits of the architecture are not `head(hidden)` (soft-capped
    or scaled logits), since the head is applied here only where a log-probability is wanted.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, checkpointing: bool = False):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.is_frozen = False
        _silence_dropout(self.causal_lm)
        _check_head(self.causal_lm)
        if checkpointing:
            _recompute_layers(self.causal_lm)

    @property
    def adapted(self) -> bool:
        """Whether the model carries a PEFT adapter."""
        return not isinstance(self.model, PreTrainedModel)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model itself, adapter layers included."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.causal_lm.device

    @property
    def context(self) -> int:
        """Longest sequence (tokens)."""
        return self.causal_lm.config.max_position_embeddings

    @property
    def width(self) -> int:
        """Size of the hidden state."""
        return self.causal_lm.config.hidden_size

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response: those of the tokenizer and of the model's generation settings."""
        stops = self.causal_lm.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops or ())
        return sorted(stops | {self.tokenizer.eos_token_id} - {None})

    def forward(
        self,
        ids: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length-1"],
        positions: Int[Tensor, "batch length"] | None = None,
        branch: Int[Tensor, "batch length"] | None = None,
        *,
        entropy: bool = False,
        logits: bool = False,
    ) -> Scores:
        """Log-probabilities (nats) of `ids[:, 1:]` where `mask` is set.

        Right padding needs no attention mask: no unmasked position of a causal model looks at what follows it. Where
        `positions` begin anew a new sequence does, and transformers builds the block-causal mask from them; with
        `branch`, as in `PackedPreferenceBatch`, pairs of responses share their prompts. Raises ValueError when the rows
        exceed the context.
        """
        if ids.shape[1] > self.context:
            raise ValueError(f"A sequence of {ids.shape[1]} tokens exceeds the model's context of {self.context}.")
        positions = None if positions is None else positions[:, :-1]
        hidden = _hidden(self.causal_lm, ids[:, :-1], positions, None if branch is None else branch[:, :-1])
        packed = self._score(hidden[mask], ids[:, 1:][mask], entropy, logits)
        spread = [
            None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)
            for values in packed[:2]
        ]
        return Scores(spread[0], hidden, spread[1], packed[2])

    def _score(
        self, hidden: Float[Tensor, "masked width"], targets: Int[Tensor, " masked"], entropy: bool, logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-probabilities, entropy, logits) of the masked positions, a chunk of the positions at a time."""
        head = self.causal_lm.get_output_embeddings()
        size = max(1, LOGITS_AT_ONCE // self.causal_lm.config.vocab_size)
        # recomputing a chunk's logits in the backward pass is what keeps them from all being alive at its start
        recompute = torch.is_grad_enabled() and len(hidden) > size and not logits
        parts = []
        for chunk, target in zip(hidden.split(size), targets.split(size)):
            args = (head, chunk, target, entropy, logits)
            part = checkpoint(_head_scores, *args, use_reentrant=False, preserve_rng_state=False) if recompute else None
            parts.append(part or _head_scores(*args))
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts))

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise ValueError when a sequence sees the one before it in its row, although its positions begin anew."""
        ids = torch.arange(8, device=self.device).repeat(2, 1) % self.causal_lm.config.vocab_size
        ids[1, :4] = ids[1, :4].flip(0)
        one, other = _hidden(self.causal_lm, ids, torch.arange(8, device=self.device).repeat(2, 1) % 4)[:, 4:].float()
        self._refuse_packing(one, other)

    @torch.no_grad()
    def check_sharing(self) -> None:
        """Raise ValueError when two responses behind one prompt see each other or miss the prompt."""
        size, device = self.causal_lm.config.vocab_size, self.device
        # the prompt 0 1 2 with its last token in front of both responses
        ids, positions, branch = torch.tensor(
            [[0, 1, 2, 3, 4, 2, 5, 6], [0, 1, 2, 3, 4, 2, 3, 4], [0, 0, 1, 1, 1, 2, 2, 2]], device=device
        ).unsqueeze(1)
        alone = _hidden(self.causal_lm, torch.tensor([[0, 1, 2, 5, 6]], device=device) % size)[0, 2:].float()
        try:
            shared = _hidden(self.causal_lm, ids % size, positions, branch)[0, 5:].float()
        except (ValueError, RuntimeError):  # an architecture that expects a mask of two axes
            shared = torch.full_like(alone, torch.nan)
        self._refuse_packing(shared, alone)

    def _refuse_packing(self, one: Tensor, other: Tensor) -> None:
        if not torch.allclose(one, other, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"data.packed=true: {type(self.causal_lm).__name__} does not keep sequences in one row apart; take "
                "data.packed=false"
            )

    def train(self, mode: bool = True) -> "Policy":
        """Training mode, which a frozen policy does not enter."""
        return super().train(mode and not self.is_frozen)

    def frozen(self) -> "Policy | AdapterOff":
        """The reference: a copy that is not trained and stays in eval mode, or these weights with the adapter off."""
        if self.adapted:
            return AdapterOff(self)
        plain = unsharded(self)
        reference = copy.deepcopy(self, {id(self.tokenizer): self.tokenizer}) if plain is self else plain
        reference.is_frozen = True
        return reference.requires_grad_(False).eval()

    def fingerprint(self) -> str:
        """Hash of the weights: names, types, shapes and bytes. Every rank calls it when the weights are sharded."""
        return fingerprint(self.model.state_dict())

    def shard_units(self) -> list[nn.Module]:
        """What FSDP2 shards one by one: the decoder layers, then the policy itself."""
        names = set(self.causal_lm._no_split_modules or ())
        stacks = [module for module in self.causal_lm.modules() if isinstance(module, nn.ModuleList)]
        return [layer for stack in stacks for layer in stack if _class_names(layer) & names] + [self]

    def export(self, folder: str | Path) -> Path:
        """Write weights (safetensors, adapter merged) and tokenizer as transformers loads them; complete or absent.

        An existing export is replaced. Raises RuntimeError when the weights are sharded: gather them first with
        `unsharded` on every rank, then export on one.
        """
        if sharding.is_sharded(self):
            raise RuntimeError("The policy is sharded: call unsharded(policy) on every rank and export that on one.")
        model = copy.deepcopy(self.model).merge_and_unload() if self.adapted else self.model
        with folder_at_once(Path(folder)) as temporary:
            model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
        return Path(folder)


class AdapterOff:
    """The reference of an adapted policy: the same weights with the adapter off, called like a `Policy`."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.policy.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        return self.policy.tokenizer

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, *, entropy: bool = False, logits: bool = False) -> Scores:
        """As `Policy.forward`, without the adapter and without a gradient."""
        with self._off():
            return self.policy(ids, mask, entropy=entropy, logits=logits)

    def fingerprint(self) -> str:
        """Hash of the weights without the adapter's."""
        state = self.policy.model.state_dict()
        return fingerprint({name: tensor for name, tensor in state.items() if "lora_" not in name})

    @contextmanager
    def _off(self) -> Iterator[None]:
        layers = [module for module in self.policy.modules() if hasattr(module, "_disable_adapters")]
        before = [layer._disable_adapters for layer in layers]
        # PEFT's own switch also turns requires_grad off; FSDP2 would remember that for the rest of the training
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(layers, before):
                layer._disable_adapters = disabled


def unsharded(policy: Policy | AdapterOff) -> Policy | AdapterOff:
    """The policy itself, or, when FSDP2 sharded it, a plain copy in eval mode on every rank.

    Collective: every rank calls it. Generation runs on the result, so that ranks may sample different numbers of
    tokens.
    """
    if isinstance(policy, AdapterOff):
        return AdapterOff(unsharded(policy.policy))
    model = sharding.unsharded(policy.model, lambda: _same_architecture(policy))
    return policy if model is policy.model else Policy(model, policy.tokenizer)


def _head_scores(
    head: nn.Module, hidden: Tensor, targets: Tensor, entropy: bool, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # float32 before the log-softmax: in bfloat16 a sum over 300 tokens is off by up to a nat
    logits = head(hidden).float()
    log_probs = -F.cross_entropy(logits, targets, reduction="none")
    spread = torch.distributions.Categorical(logits=logits, validate_args=False).entropy() if entropy else None
    return log_probs, spread, logits if keep else None


def _hidden(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch length"],
    positions: Int[Tensor, "batch length"] | None = None,
    branch: Int[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch length width"]:
    where = {} if positions is None else {"position_ids": positions}
    if branch is not None:
        where["attention_mask"] = _visible(branch)[:, None]
    return model.base_model(input_ids=ids, use_cache=False, **where).last_hidden_state


def _visible(branch: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length length"]:
    """Whether a position (second axis) sees another one (third): what is before it in its own branch and its prompt."""
    pair, side = branch.div(3, rounding_mode="floor"), branch.remainder(3)
    same = pair[:, :, None] == pair[:, None, :]
    on_the_way = (side[:, None, :] == 0) | (side[:, :, None] == side[:, None, :])
    return (same & on_the_way).tril()


def _recompute_layers(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        # the name that every transformers 5 has, and that the newest ones call old
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _silence_dropout(model: nn.Module) -> None:
    """Zero every dropout: log-ratios between policy and reference must be deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in model.config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(model.config, name, 0.0)


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    if model.device.type == "meta":
        return
    ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size
    hidden = _hidden(model, ids)
    ours, theirs = model.get_output_embeddings()(hidden).float(), model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} does more to its logits than its output layer says (soft-capping or scaling, "
            f"difference {(ours - theirs).abs().max():.3g}); choose an architecture without it."
        )


def _class_names(module: nn.Module) -> set[str]:
    # FSDP2 puts a class of its own in front: the original name is further up
    return {kind.__name__ for kind in type(module).__mro__}


def _same_architecture(policy: Policy) -> nn.Module:
    """An untrained model like the policy's: FSDP2 modules cannot be deep-copied."""
    model = type(policy.causal_lm)(copy.deepcopy(policy.causal_lm.config))
    if policy.adapted:
        from peft import get_peft_model

        model = get_peft_model(model, copy.deepcopy(policy.model.peft_config["default"]))
    return model


def fingerprint(state: dict[str, Tensor]) -> str:
    """Hash of weights: names, types, shapes and bytes. Every rank calls it when they are sharded."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = sharding.whole(state[name]) if isinstance(state[name], DTensor) else state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def folder_at_once(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        # temporary folders and safetensors files are private, an export is for the colleagues too
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if folder.exists():
            folder.rename(temporary.with_name(temporary.name + "-old"))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary.with_name(temporary.name + "-old"), ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
