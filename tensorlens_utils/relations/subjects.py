"""From subject to object inside a model: the states of prompts, and the block of T that leads from one to the other.

A prompt names a subject, whose last token stands at position p. Its state s is row p of what crosses a boundary h; o is
the last row of what leaves the last block, before the final norm. Cut the model at the subject: with what stands before
it kept as keys and values, o is a function of the vector s alone, and linearised it is

    o = T_h·s + B_h        T_h = T[last, :, p, :]  (d, d), at = h, to = n_blocks        (TensorLens, §3; LRE, §3)

All frozen, T_h is TensorLens's decoder; all tangent it is the Jacobian ∂o/∂s, LRE's. B_h holds T's bias and what all
other rows of boundary h contribute. One backward pass of K cotangents gives K rows of T_h for every boundary at once,
and meets no token before the subject.

>>> from tensorlens_utils import load_model
>>> from tensorlens_utils.relations import world_relations
>>> model, tokenizer = load_model("tiny-gpt")
>>> capital = world_relations()["country_capital"]
>>> asked = Asked(model, tokenizer, [capital.prompt(sample) for sample in capital.samples[:2]])
>>> tokenizer.decode(asked.logits.argmax(-1))
'paris berlin'
>>> asked.s.shape, asked.o.shape
(torch.Size([4, 2, 128]), torch.Size([2, 128]))
>>> W = asked.matrices([1])[1]
>>> W.shape, bool((asked.operator(1).matvec(asked.s[1, :1]) - (W @ asked.s[1, 0]).mean(0)).abs().max() < 1e-3)
(torch.Size([2, 128, 128]), True)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..linearize import linearize_function, untouched
from ..tensor import AttentionTensor
from . import Prompt
from .cuts import Cut, Head

FROZEN: dict[str, str] = {}  # TensorLens's rules, the defaults
TANGENT = {"attention": "tangent", "norm": "tangent", "activation": "tangent", "gate": "tangent"}  # LRE's: the Jacobian
BATCH = 64  # prompts in one pass, at most


# ------------------------------------------------------------------------------------------------------- the prompts


def encode(tokenizer, prompts: Sequence[Prompt]) -> list[tuple[list[int], int]]:
    """The token ids of each prompt, and where the last token of its subject stands. A tokenizer that has a token for
    the beginning, but does not put it, has it put (as LRE does with GPT-2's); one that puts tokens behind the text, as
    for its end, has these taken off, since what follows the text is asked for.

    Raises ValueError for a tokenizer that does not tell which characters its tokens stand for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("a subject's last token is found by the characters that tokens stand for, which only a fast "
                         f"tokenizer tells, and {type(tokenizer).__name__} is none: load it with use_fast=True")
    found = []
    for prompt in prompts:
        coded = tokenizer(prompt.text, return_offsets_mapping=True)
        offsets, last = coded["offset_mapping"], prompt.end - 1
        ids = coded["input_ids"][: 1 + max(i for i, (start, end) in enumerate(offsets) if start < end)]
        at = max(i for i, (start, end) in enumerate(offsets) if start <= last < end)
        if tokenizer.bos_token_id is not None and ids[0] != tokenizer.bos_token_id:
            ids, at = [tokenizer.bos_token_id, *ids], at + 1
        found.append((ids, at))
    return found


class Asked:
    """n prompts put to a language model, and cut at their subjects.

    Args:
        model, tokenizer: of a language model; with keys and values to be kept, as nearly all have, no pass meets a
            token before the subject again; any other is run whole.
        prompts: of `relations.Relation.prompt`.
        steps: at how many positions o is read: the prompt's last one, and then those of the model's own next tokens,
            which are appended (for objects of several tokens, and longer answers).
        keep: whether the keys and values of what stands before the subjects are kept: `answer`, `tensors` and
            `matrices` go on from them, and without them are refused. They are 2·blocks·d numbers for each token.

    Attributes:
        s: (n_blocks, n, d), the subjects' states at boundaries 0, 1, ...; o: (n, d), or (n, steps, d) with more steps;
        logits: (n, words) or (n, steps, words), the model's own; ids: each prompt's tokens, the appended ones too;
        position: each subject's last token's.

    Raises ValueError for no prompt, for a slow tokenizer, for prompts that are longer than the model reads, and for a
    model without a head over words, or one whose tokens see what follows them.
    """

    def __init__(self, model: nn.Module, tokenizer, prompts: Sequence[Prompt], steps: int = 1, keep: bool = True):
        if not prompts:
            raise ValueError("a model is asked one prompt or more, and here is none")
        if steps < 1:
            raise ValueError(f"o is read at one position or more: steps is 1, 2, ..., not {steps!r}")
        coded, self.model, self.steps = encode(tokenizer, prompts), model, steps
        self.position, longest = [p for _, p in coded], max(len(ids) for ids, _ in coded) + steps - 1
        config = getattr(model, "config", None)
        limits = [getattr(c, name, None) for c in (config, getattr(config, "text_config", None))
                  for name in ("max_position_embeddings", "n_positions", "max_seq_len")]  # fmt: skip
        most = next((n for n in limits if n), longest)
        if longest > most:
            raise ValueError(f"a prompt and its steps fit into the {most} tokens that the model reads, and here are "
                             f"{longest}: give it fewer examples, or fewer steps")
        groups: dict[tuple[int, int], list[int]] = {}  # prompts of one length whose subjects end at one place
        for i, (ids, p) in enumerate(coded):
            groups.setdefault((len(ids), p), []).append(i)
        self.head, self.groups, read = Head(model), [], []
        for (_, p), rows in groups.items():
            for some in torch.tensor(rows).split(BATCH):
                cut = Cut(model, [coded[i][0] for i in some], p, steps)
                with untouched(model), torch.no_grad():
                    read.append((cut.forward(), torch.stack([x[:, cut.row] for x in cut.states.values()], 1)))
                cut.states, cut.prefix, cut.kept = {}, cut.prefix if keep else None, keep
                self.groups.append((some, cut))
        tokens = {i: row for rows, cut in self.groups for i, row in zip(rows.tolist(), cut.ids, strict=True)}
        self.ids = [tokens[i] for i in range(len(prompts))]
        self.o, s = (self._gather(parts) for parts in zip(*read, strict=True))
        self.s = s.transpose(0, 1).contiguous()

    def _gather(self, parts: Iterable[Tensor]) -> Tensor:
        """What each group gives, put together in the order of the prompts, in float32 or better."""
        found = torch.cat([*parts])
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found[torch.cat([rows for rows, _ in self.groups]).argsort().to(found.device)]

    def _states(self, layer: int, rows: Tensor) -> Tensor:
        """The states of these prompts' subjects at a boundary, in the model's own numbers."""
        return self.s[layer][rows].to(next(self.model.parameters()).dtype)

    @functools.cached_property
    def logits(self) -> Tensor:
        return self.head(self.o)

    @torch.no_grad()
    def answer(self, s: Tensor, layer: int) -> Tensor:
        """o, (n, d) or (n, steps, d), with the subjects' states at boundary `layer` replaced by s (n, d)."""
        if s.shape != self.s.shape[1:]:
            raise ValueError(f"the subjects' states are replaced by one each, {tuple(self.s.shape[1:])}, not by "
                             f"{tuple(s.shape)}")
        with untouched(self.model):
            return self._gather(cut.entering(layer).forward(s[rows]) for rows, cut in self.groups)

    def tensors(self, layer: int, **rules: str) -> list[AttentionTensor]:
        """For each of the `groups` (prompts of one length, subjects at one place), T (N, d, d), or (N, steps, d, d),
        as an operator from their states at boundary `layer`; `rules` as in `linearize`."""
        return [linearize_function(cut.entering(layer), self._states(layer, rows), **rules)
                for rows, cut in self.groups]  # fmt: skip

    def matrices(self, layers: Sequence[int], step: int = 0, chunk: int | None = None,
                 **rules: str) -> dict[int, Tensor]:  # fmt: skip
        """The block of T from each subject to the last position, or to the one `step` steps on, at each of these
        boundaries: {layer: (n, d, d)}, by d cotangents.

        All boundaries share the passes, since what goes back to the first meets the others on its way. `chunk`
        cotangents go back together, which bounds the memory (None: as many as pay); `rules` are those of `linearize`.

        Raises ValueError for layers and steps that are not there.
        """
        if not layers or step not in range(self.steps) or chunk is not None and chunk < 1:
            raise ValueError(f"matrices are taken at one boundary or more, at a step of 0 to {self.steps - 1} and by "
                             f"chunks of 1 or more, not at {[*layers]}, step {step!r}, chunk {chunk!r}")
        pulled = [cut.pulled(self._states(min(layers), rows), layers, step, chunk, rules) for rows, cut in self.groups]
        return {k: self._gather(parts) for k, parts in zip(layers, zip(*pulled, strict=True), strict=True)}

    def operator(self, layer: int, **rules: str) -> Mean:
        """The mean block of T at boundary `layer`, never formed."""
        return Mean(self.tensors(layer, **rules))


# --------------------------------------------------------------------------------------------- the mean, matrix-free


def check_ranks(ranks: Iterable[int], most: int) -> None:
    """ValueError for a rank that a matrix of this width has not."""
    for rank in ranks:
        if not 1 <= rank <= most:
            raise ValueError(f"a rank is in [1, {most}], the width of W, not {rank}")


class Mean:
    """W = (1/n) Σ_i T_i over n prompts, as an operator: products with W and Wᵀ, and W's leading singular triplets."""

    def __init__(self, tensors: Sequence[AttentionTensor]):
        self.tensors, self.n = tensors, sum(len(T.input) for T in tensors)

    def matvec(self, V: Tensor) -> Tensor:
        """W·v for k vectors: (k, d) -> (k, d), a replay each."""
        found = [sum(T.matvec(v.to(T.input).expand_as(T.input)).to(V).sum(0) for T in self.tensors) for v in V]
        return torch.stack(found) / self.n

    def rmatvec(self, U: Tensor) -> Tensor:
        """uᵀ·W for k vectors: (k, d) -> (k, d), the k cotangents in one pass."""
        found = [T.rmatvec(U[:, None].to(T.output).expand(-1, *T.output.shape)) for T in self.tensors]
        return sum(x.to(U).sum(1) for x in found) / self.n

    def svd(self, rank: int, more: int = 8, rounds: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """W ≈ U·diag(S)·V: U (d, rank), S (rank,), V (rank, d), by random cotangents (Halko, Martinsson and Tropp 2011,
        algorithms 4.4 and 5.1), `more` than the rank and refined in `rounds`; deterministic given the seed.

        Raises ValueError for a rank that W has not.
        """
        X, Y = self.tensors[0].input, self.tensors[0].output
        most = min(X.shape[-1], Y.shape[-1])
        check_ranks([rank], most)
        k, U = min(rank + more, most), torch.Generator().manual_seed(seed)
        U = torch.randn(k, Y.shape[-1], generator=U, dtype=torch.float64)
        U = U.to(Y.device, torch.promote_types(Y.dtype, torch.float32))
        Q = torch.linalg.qr(self.rmatvec(U).mT).Q
        for _ in range(rounds):
            U = torch.linalg.qr(self.matvec(Q.mT).mT).Q
            Q = torch.linalg.qr(self.rmatvec(U.mT).mT).Q
        U, S, V = torch.linalg.svd(self.matvec(Q.mT).mT, full_matrices=False)
        return U[:, :rank], S[:rank], (V @ Q.mT)[:rank]
