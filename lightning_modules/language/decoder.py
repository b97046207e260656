"""A decoder-only language model around whatever blocks it is given: embeddings, residual stream, head and loss."""

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.language import cross_entropy, flops
from lightning_modules.language.attention import Attention, Cache, document_mask, padding_mask


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)).

    `attn` is called as `attention.MultiHeadAttention` is.
    """

    def __init__(self, ln_1: nn.Module, attn: Attention, ln_2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = ln_1, attn, ln_2, mlp

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        positions: Int[Tensor, "#batch length"],
        mask: Bool[Tensor, "batch 1 length kept"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch length width"]:
        x = x + self.attn(self.ln_1(x), positions, mask, cache)
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """Token embedding, blocks, norm, head.

    The vocabulary is padded to a multiple of `pad_vocabulary_to` (64 is what tensor cores like); padded rows take part
    in the softmax and are never targets. A tied head is the embedding itself, one parameter under one name, so nothing
    can untie it. `learned_positions` adds an embedding of the position. `softcap` and `loss_chunk` are as in
    `cross_entropy`. Raises ValueError for a dropout outside of [0, 1).
    """

    loaded_by: ClassVar[str]  # what reads the folder that `export` writes

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int,
        blocks: list[Block],
        norm: nn.Module,
        learned_positions: bool = True,
        dropout: float = 0.0,
        tied: bool = True,
        pad_vocabulary_to: int = 64,
        softcap: float | None = None,
        loss_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not a probability: take one in [0, 1)")
        if loss_chunk is not None and loss_chunk < 1:
            raise ValueError(f"loss_chunk={loss_chunk} is no number of tokens: take at least 1, or null for all")
        self.vocab_size, self.context, self.width = vocab_size, context, width
        self.dropout, self.softcap, self.loss_chunk = dropout, softcap, loss_chunk
        padded = -(-vocab_size // pad_vocabulary_to) * pad_vocabulary_to
        self.wte = nn.Embedding(padded, width)
        self.wpe = nn.Embedding(context, width) if learned_positions else None
        self.blocks = nn.ModuleList(blocks)
        self.ln_f = norm
        self.lm_head = None if tied else nn.Linear(width, padded, bias=False)

    def forward(
        self,
        ids: Int[Tensor, "batch length"],
        targets: Int[Tensor, "batch length"] | None = None,
        positions: Int[Tensor, "batch length"] | None = None,
        *,
        caches: list[Cache] | None = None,
        padding: Int[Tensor, " batch"] | None = None,
        last: bool = False,
    ) -> Float[Tensor, "batch _ padded"] | Float[Tensor, "batch length"]:
        """Logits (float32), or with `targets` the negative log-likelihood of each of them (nats, float32).

        Position t speaks about the token that follows it. With `positions`, which count from 0 in each document of a
        row, documents do not see each other. `caches`, one a block, hold the tokens before these and take up these.
        `padding` is with how many tokens, cached ones included, each row begins that are none: what comes out for them
        means nothing. With `last` the logits are those of the last position only. Raises ValueError when there are
        more tokens than the context has places, and for positions together with caches or padding.
        """
        hidden = self._hidden(ids, positions, caches, padding)
        if targets is None:
            return cross_entropy.logits(hidden[:, -1:] if last else hidden, self.head, self.softcap)
        losses = cross_entropy.nll(hidden.flatten(0, 1), self.head, targets.flatten(), self.loss_chunk, self.softcap)
        # a copy: what FSDP2 wraps must not return a view
        return losses.view_as(targets).clone()

    @property
    def head(self) -> Float[Tensor, "padded width"]:
        """The matrix that makes logits of hidden states."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def shard_units(self) -> list[nn.Module]:
        """The modules that FSDP2 shards: the blocks, then the whole, which keeps embedding and head together."""
        return [*self.blocks, self]

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of training on one token of rows of this length; see `flops`."""
        counted = sum(p.numel() for p in self.parameters()) - (0 if self.wpe is None else self.wpe.weight.numel())
        return flops.flops_per_token(counted, len(self.blocks), self.blocks[0].attn.score_width, length)

    def costs(self, length: int) -> dict[str, float]:
        """What to know beside the loss: parameters, and of attention the MFLOPs of training on a token and the cache.

        The MFLOPs are those between tokens, at this length; the cache's bytes are those of a token in bfloat16.
        """
        between = flops.flops_per_token(0, len(self.blocks), self.blocks[0].attn.score_width, length)
        return {
            "parameters": float(sum(p.numel() for p in self.parameters())),
            "attention_mflops": between / 1e6,
            "cache_bytes": float(self.cache_bytes_per_token(torch.bfloat16)),
        }

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that the caches of all layers take for a token."""
        return sum(block.attn.cache_bytes_per_token(dtype) for block in self.blocks)

    def export(self, folder: Path) -> None:
        """Write the network, which is not sharded, as config.json and model.safetensors."""
        raise NotImplementedError

    def _hidden(
        self, ids: Tensor, positions: Tensor | None, caches: list[Cache] | None, padding: Tensor | None
    ) -> Tensor:
        begin = caches[0].length if caches else 0
        places, mask = self._places(begin, begin + ids.shape[1], positions, bool(caches), padding, ids.device)
        x = self.wte(ids) if self.wpe is None else self.wte(ids) + self.wpe(places)
        x = F.dropout(x, self.dropout, self.training)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, places, mask, cache)
        return self.ln_f(x)

    def _places(
        self, begin: int, end: int, positions: Tensor | None, cached: bool, padding: Tensor | None, device: torch.device
    ) -> tuple[Int[Tensor, "_ length"], Bool[Tensor, "batch 1 length kept"] | None]:
        """The position of each token from `begin` to `end` in its text, and what it sees where that is not all."""
        if end > self.context:
            raise ValueError(
                f"a sequence of {end} tokens exceeds the network's context of {self.context}: give it fewer, or train "
                "with a longer data.context"
            )
        if positions is not None:
            if cached or padding is not None:
                raise ValueError(
                    "positions and caches exclude each other, and so do positions and padding: generation goes on with "
                    "one document a row"
                )
            # of a GPU's numbers nothing is asked, which would wait for it
            if device.type == "cpu" and not torch.compiler.is_compiling() and positions.max() >= self.context:
                raise ValueError(
                    f"position {positions.max()} is beyond the network's context of {self.context}: count "
                    "from 0 in each document"
                )
            return positions, document_mask(positions)
        places = torch.arange(begin, end, device=device)[None]
        if padding is None:
            return places, None
        return (places - padding[:, None]).clamp(min=0), padding_mask(padding, begin, end)
