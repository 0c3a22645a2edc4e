"""What every attention head of a model writes, from one forward pass; and the same pass with heads changed.

Head h of a layer reads its tokens' values by its pattern, z_h = A_h·V_h in R^d_head, and W_O,h carries z_h into the
residual stream: the head writes z_h W_O,h. So z_h is all that a head has to say, in d_head numbers and not d_model. It
is caught by hooks on what the output projections read; which modules these are, `drivers.writers` finds by what flows,
so that no family is named, no class patched, and the model attends as fast as it can.

>>> from tensorlens_utils import load_model
>>> model, tokenizer = load_model("tiny-gpt")
>>> inputs = tokenizer(["the capital of france is", "the capital of peru is"], return_tensors="pt")
>>> heads = Heads(model, inputs)
>>> len(heads.names), heads.names[9], heads.W_O.shape
(32, (1, 1), torch.Size([32, 16, 128]))
>>> seen = heads.capture(inputs)
>>> seen.z.shape, seen.log_p.shape
(torch.Size([32, 12, 16]), torch.Size([12, 953]))
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..attentions import logits, main_input
from ..collapse.drivers import writers
from ..linearize import linearize, untouched
from ..models import find_blocks, n_blocks

Edit = Callable[[int, Tensor], Tensor]  # (layer, z (N, S, H, d)) -> z, of the same shape
NEVER = -1e4  # the log-probability of a word that the model rules out by a logit of −∞: p is 0, and 0·log p, too


@dataclass(frozen=True)
class Captured:
    """What lenses learn from and read: n positions of one batch.

    z          (A, n, d) what each of the A heads has read together there
    log_p      (n, V) the model's log-probabilities; of a class model, those of the position's text or image
    following  (n,) the token that comes next in the text, −1 where there is none
    text       (n,) which text or image of the batch the position belongs to
    position   (n,) where in it
    scale      (n,) s of `Readout`, where it was asked for
    """

    z: Tensor
    log_p: Tensor
    following: Tensor
    text: Tensor
    position: Tensor
    scale: Tensor | None = None
    __iter__ = None  # it is one batch, and no list of them

    def __len__(self) -> int:
        return len(self.log_p)

    def __getitem__(self, chosen) -> "Captured":
        """Some of the positions: a slice, a mask (n,) or indices."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v if v is None else v[:, chosen] if k == "z" else v[chosen]
                                for k, v in values.items()})  # fmt: skip

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    def at(self, positions: str | int) -> "Captured":
        """"all" positions, the "last" one of each text, or those at k (0 is where a class token stands)."""
        return self if positions == "all" else self[chosen(self.text, self.position, positions)]


def chosen(text: Tensor, position: Tensor, positions: str | int) -> Tensor:
    """Which (n,) of the positions of some texts are named so, as in `Captured.at`."""
    if positions == "all":
        return torch.ones_like(text, dtype=torch.bool)
    if positions == "last":
        return text != torch.cat([text[1:], text.new_tensor([-1])])
    if not isinstance(positions, int) or positions < 0:
        raise ValueError(f'positions are "all", the "last" one of each text, or one that is counted from 0, and not '
                         f"{positions!r}")  # fmt: skip
    return position == positions


@dataclass(frozen=True)
class Readout:
    """The end of a model as one matrix: logits = s_t M x_t + β, x_t what leaves the last block at position t.

    M (V, D) is W_U times the final norm's γ and centring, with rows of mean square norm 1; s_t, a number for each
    position, is what the norm divides by there, held at the model's value. Where the end is more than a norm and a
    linear map (a masked-language head, a pooler, a capped logit) there is no such M.
    """

    M: Tensor
    beta: Tensor

    @cached_property
    def _probe(self) -> tuple[Tensor, Tensor]:
        R = torch.randn(len(self.M), 16, generator=torch.Generator().manual_seed(0)).to(self.M)
        return R, self.M.mT @ R

    def scale(self, x: Tensor, logits: Tensor) -> Tensor:
        """s_t from x (n, D) and the logits (n, V) that the model made of it, through 16 random directions of logits."""
        R, MR = self._probe
        ours, models = x @ MR, (logits - self.beta) @ R
        return (ours * models).sum(-1) / ours.square().sum(-1)


class Heads:
    """The attention heads of a model, found once; `capture` runs it.

    names   (layer, head) of each of the A heads; layers are counted as their attentions run
    paths   the module that each layer's heads write through
    sizes   d_head of each head
    W_O     (A, d, D), d the widest head's: narrower ones have zeros behind their z and below their W_O
    V       how many logits the model has

    Args:
        model: any torch transformer that `linearize` takes and that answers with logits.
        inputs: an example to find its heads by, as short as may be.
        processor: its tokenizer or image processor, for `inputs`.
        dtype: of all that is captured.

    Raises:
        ValueError: where no head is found.
    """

    def __init__(self, model: nn.Module, inputs, processor: Any = None, dtype: torch.dtype = torch.float32):
        self.model, self.processor, self.dtype, self.example = model, processor, dtype, dict(inputs.items())
        self._heads = {path: heads for path, heads in writers(model, inputs).items() if heads}
        if not self._heads:
            raise ValueError(f"a head is told by a product A·V that an output projection reads, and {type(model)} "
                             "shows none: a lens needs an attention with a softmax")  # fmt: skip
        run = self._run(self.example)
        self.paths, widths = run.paths, [z.shape[2:] for z in run.z]
        self.names = [(layer, head) for layer, (H, _) in enumerate(widths) for head in range(H)]
        self.sizes, self.V = [d for H, d in widths for _ in range(H)], run.logits.shape[-1]
        self.W_O = torch.cat([self._padded(self._weights(path, *size), 1)
                              for path, size in zip(self.paths, widths, strict=True)])  # fmt: skip

    def _weights(self, path: str, H: int, d: int) -> Tensor:
        """W_O of one layer's heads, (H, d, D), whatever class of linear map holds it."""
        module = copy.deepcopy(self.model.get_submodule(path)).to(self.dtype)
        eye = torch.eye(H * d, dtype=self.dtype, device=next(self.model.parameters()).device)
        with torch.no_grad():
            return (module(eye) - module(torch.zeros_like(eye))).unflatten(0, (H, d))

    def _padded(self, x: Tensor, axis: int) -> Tensor:
        short = max(self.sizes) - x.shape[axis]
        return torch.cat([x, x.new_zeros(*x.shape[:axis], short, *x.shape[axis + 1:])], axis) if short else x

    @torch.no_grad()
    def _run(self, inputs: dict, edit: Edit | None = None) -> "_Run":
        """One forward pass; `edit` changes what each layer's heads have read before it is written."""
        N, run, calls, blocks = len(main_input(inputs)), _Run(), [0], n_blocks(self.model)

        def read(module, args):
            z = args[0].reshape(N, -1, H := self._heads[self._path[module]], args[0].shape[-1] // H)
            z = z if edit is None else edit(len(run.z), z)
            run.z.append(z)
            run.paths.append(self._path[module])
            return None if edit is None else (z.reshape(args[0].shape), *args[1:])

        def leave(module, args, out):
            calls[0] += 1
            if calls[0] == blocks:
                run.stream = out if isinstance(out, Tensor) else out[0]

        with ExitStack() as stack, untouched(self.model):
            for module in self._path:
                stack.callback(module.register_forward_pre_hook(read).remove)
            for block in set(find_blocks(self.model)[1]):
                stack.callback(block.register_forward_hook(leave).remove)
            run.logits = logits(self.model, inputs)
        return run

    @cached_property
    def _path(self) -> dict[nn.Module, str]:
        return {self.model.get_submodule(path): path for path in self._heads}

    def inputs(self, examples) -> dict[str, Tensor]:
        """Texts or images as the model takes them, on its device, shorter texts padded."""
        if self.processor is None:
            raise ValueError("texts and images are read by a tokenizer or image processor, and these heads have none: "
                             "Heads(model, inputs, processor)")  # fmt: skip
        one = [examples] if isinstance(examples, str) or not isinstance(examples, Sequence) else [*examples]
        if not one:
            raise ValueError("heads read one text or image at least, and there is none in the list")
        text = {"truncation": True} if isinstance(one[0], str) else {}
        text |= {"padding": True, "padding_side": "right"} if text and len(one) > 1 else {}
        return dict(self.processor(one, return_tensors="pt", **text).to(self.W_O.device).items())

    def capture(self, inputs, *, scale: bool = False, edit: Edit | None = None,
                positions: str | int = "all") -> Captured:  # fmt: skip
        """Run the model on a batch; what its heads have read at each position that is not padding.

        Args:
            inputs: what the tokenizer or image processor gives.
            scale: whether to keep `Readout.scale`, which lenses through the model's own unembedding need.
            edit: (layer, z (N, S, H, d)) -> z, as `replaced` makes them: what is captured is the edited run.
            positions: as in `Captured.at`, of which the model's answers are kept.

        Raises:
            ValueError: where a text begins behind padding, and where heads, mask and logits are not of one length.
        """
        inputs = dict(inputs.items())
        mask = inputs.get("attention_mask")
        if mask is not None and (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
            raise ValueError("texts are padded on the right, since models count places from the left edge, and some "
                             "answer NaN behind padding whatever their position_ids; here one begins behind padding: "
                             "take padding_side='right'")  # fmt: skip
        run = self._run(inputs, edit)
        (N, S), causal, like = run.z[0].shape[:2], run.logits.dim() == 3, main_input(inputs)
        mask = like.new_ones(N, S, dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != (N, S) or causal and run.logits.shape[1] != S:
            raise ValueError(f"a lens reads each position by itself, so heads, mask and logits have the same {S}; the "
                             f"mask is {tuple(mask.shape)}, the logits {tuple(run.logits.shape)}")  # fmt: skip
        following = torch.full((N, S), -1, device=like.device)
        if causal:
            following[:, :-1] = like[:, 1:].where(mask[:, 1:], -1)
        every = mask.nonzero().T
        at = text, position = tuple(every[:, chosen(*every, positions)])
        y = (run.logits[at] if causal else run.logits[text]).to(self.dtype)
        z = torch.cat([self._padded(z[at].transpose(0, 1), 2) for z in run.z]).to(self.dtype)
        s = self.readout.scale(run.stream[at].to(self.dtype), y) if scale else None
        return Captured(z, y.log_softmax(-1).clamp_min_(NEVER), following[at], text, position, s)

    @cached_property
    @torch.no_grad()
    def readout(self) -> Readout:
        """The model's end as one matrix, checked on the example. Raises ValueError where it is none."""
        run = self._run(self.example)
        if run.logits.dim() == 3:
            first = {"input_ids": self.example["input_ids"][:1, :1]}
            T = linearize(self.model, first, at=n_blocks(self.model), to="logits")
            eye = torch.eye(T.input.shape[-1], dtype=T.input.dtype, device=T.input.device)
            M = torch.func.vmap(lambda v: T.tape(v[None, None], linear=True))(eye)[:, 0, 0].mT.to(self.dtype)
            found = Readout(M * (len(M) ** 0.5 / M.norm()), T.bias[0, 0].to(self.dtype))
            x, y = (v.flatten(0, 1).to(self.dtype) for v in (run.stream, run.logits))
            gap = found.scale(x, y)[:, None] * (x @ found.M.mT) + found.beta - y
            if gap.abs().max() < max(1e-4, 4 * torch.finfo(eye.dtype).eps) * y.abs().max():
                return found
        raise ValueError("a lens through the unembedding needs logits = s·M·x + β at each position, and "
                         f"{type(self.model).__name__} ends otherwise: take a family that needs none, as 'full'")


@dataclass
class _Run:
    """What one forward pass showed: z (N, S, H, d) of each attention and its path, the last block's output, logits."""

    z: list[Tensor] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    stream: Tensor | None = None
    logits: Tensor | None = None


def edited(layer: int, head: int, change: Callable[[Tensor], Tensor | float]) -> Edit:
    """The edit that puts change(z) in place of what one head has read, z (N, S, d)."""

    def edit(k: int, z: Tensor) -> Tensor:
        if k != layer:
            return z
        z = z.clone()
        z[:, :, head] = change(z[:, :, head])
        return z

    return edit


def replaced(layer: int, head: int, by: Tensor | float) -> Edit:
    """The edit that puts `by`, broadcast to (N, S, d), in place of what one head has read: 0, its mean, another's z."""
    return edited(layer, head, lambda z: by)
