"""What lenses are worth: on other text, against ablation, and as directions to steer a head by.

A lens reads what *can be told* from a head. Whether the model uses it is another question, which only a change of the
head answers. So each lens is asked what taking the head away would do, and is compared with what it does. With p the
model's distribution at a position, p' the one after z_h was put at z̄, and x_h = W_h (z_h − μ_h) what the head says
there by the lens (`Lens.said`):

    fall           f_v = log p_v − log p'_v, of each word v
    named          mean f over the k words of largest x_h, less the mean f of k words matched to them: of the words that
                   are not named, for each named one its neighbour in the order of p
    correlation    of x_h with f over the vocabulary, each word counted once
    weighted       the same, each word counted by p_v: what matters to the prediction
    moved          KL(p ‖ p') = Σ_v p_v f_v
    repair         KL(p ‖ q'_g) − KL(p ‖ q_g) for a head g of a later layer, q_g what its lens says before and q'_g
                   after: below 0, g comes nearer to what the model said, and makes up for h

Attention Lens (2310.16270) proposes the first of these as work to be done, and reads its lenses by eye. All numbers are
means within a text, (A heads, N texts), so that intervals can be taken over texts (intervals.py); those of a random
choice are the same for the same seed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..attentions import main_input
from . import Lens
from .families import power
from .heads import Captured, Edit, Heads, replaced


def together(batches: Iterable[Captured]) -> Captured:
    """Several batches as one, their texts counted on.

    >>> from tensorlens_utils import load_model
    >>> model, tokenizer = load_model("tiny-gpt")
    >>> heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    >>> both = together(heads.capture(heads.inputs(text)) for text in ("a duck is a", "the capital of france is"))
    >>> both.text.tolist()
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    """
    batches = [*batches]
    counts = torch.tensor([0, *(int(b.text.max()) + 1 for b in batches[:-1])]).cumsum(0).tolist()
    parts = {f.name: [getattr(b, f.name) for b in batches] for f in fields(Captured)}
    parts["text"] = [b.text + k for b, k in zip(batches, counts, strict=True)]
    return Captured(**{k: None if v[0] is None else torch.cat(v, 1 if k == "z" else 0) for k, v in parts.items()})


def by_text(values: Tensor, seen: Captured) -> Tensor:
    """Means (..., N) within texts of values (..., n) at positions, on the CPU, where intervals are taken."""
    _, text = seen.text.unique(return_inverse=True)
    count = text.bincount().to(values)
    return values.new_zeros(*values.shape[:-1], len(count)).index_add_(-1, text, values).div_(count).cpu()


def agreement(lens: Lens, seen: Captured, k: int = 10) -> Tensor:
    """The share of the model's k first choices that are among the lens's, (A, N)."""
    models = torch.zeros_like(seen.p, dtype=torch.bool).scatter_(1, seen.log_p.topk(k).indices, True)
    _, ids = lens.tokens(seen, k)
    return by_text(models[torch.arange(len(seen))[:, None], ids].to(seen.p).mean(-1), seen)


def distances(lens: Lens, other: Lens, seen: Captured) -> Tensor:
    """How differently heads speak: the Jensen-Shannon divergence of what head a says through one lens, q, from what
    head b says through the other, r, a mean over positions, in nats, (A, A):

        JS(q, r) = H((q + r)/2) − (H(q) + H(r))/2,  H the entropy

    It goes from 0, where they always say the same, to log 2, where never one word.
    """

    def entropy(x):
        return torch.special.entr(x).sum(-1)

    q, r = (x.log_probs(seen).exp() for x in (lens, other))
    H_r = entropy(r)
    return torch.stack([(entropy((q_a + r) / 2) - (entropy(q_a) + H_r) / 2).mean(-1) for q_a in q]).cpu()


# --- ablation --------------------------------------------------------------------------------------------------------


def _matched(order: Tensor, named: Tensor, side: Tensor) -> Tensor:
    """For each of the tokens named (n, k), from the least likely on, one that is not: the next to it, above (side 0) or
    below (1), in the order of all (n, V), the least likely first."""
    is_named = torch.zeros_like(order, dtype=torch.bool).scatter_(1, named, True).gather(1, order)
    others = order[~is_named].view(len(order), -1)
    place = is_named.nonzero()[:, 1].view(named.shape)
    place = place - torch.arange(named.shape[1]).to(place)  # among the others, the next above
    return others.gather(1, (place - side).clamp(0, others.shape[1] - 1))


def _correlation(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Of rows a and b, with weights that add up to 1 in each row; 0 where one of them is constant."""
    a, b = (weights.sqrt() * (x - (weights * x).sum(-1, keepdim=True)) for x in (a, b))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-12)


def ablation(lenses: Mapping[str, Lens], inputs, by: str = "mean", k: int = 10, seed: int = 0) -> dict:
    """Take each head away in turn, and compare what falls with what each lens says that the head says.

    Args:
        lenses: of one model, by name.
        inputs: texts as the model takes them.
        by: z̄: the "mean" of z, "zero", or the z of a random other position ("resample").
        k: how many tokens are named.
        seed: of the random choices.

    Returns:
        For each name {"named", "correlation", "weighted"}, (A, N) each, and "moved", (A, N).

    >>> from tensorlens_utils import load_model
    >>> from tensorlens_utils.data import world
    >>> from tensorlens_utils.lenses.training import train
    >>> model, tokenizer = load_model("tiny-attn")
    >>> heads = Heads(model, {"input_ids": torch.arange(3, 9)[None]})
    >>> lens = train(heads, [{"input_ids": torch.randint(3, 60, (4, 16))} for _ in range(3)], steps=0, progress=False)
    >>> found = ablation({"lens": lens}, {"input_ids": torch.randint(3, 60, (5, 12))}, k=3)
    >>> found["moved"].shape == found["lens"]["named"].shape == (len(heads.names), 5)
    True
    """
    if by not in ("mean", "zero", "resample"):
        raise ValueError(f'a head is taken away by its "mean", by "zero" or by "resample", not by {by!r}')
    some = next(iter(lenses.values()))
    heads, g = some.heads, torch.Generator().manual_seed(seed)
    if not 1 <= k <= heads.V // 2:
        raise ValueError(f"as many tokens are matched as are named, so k lies in 1..{heads.V // 2}, half of the "
                         f"vocabulary, and is {k}")  # fmt: skip
    seen = heads.capture(inputs, scale=any(lens.family.through_unembedding for lens in lenses.values()))
    place, shape = (seen.text, seen.position), main_input(inputs).shape[:2]
    ring, elsewhere = torch.randperm(len(seen), generator=g), torch.empty(len(seen), dtype=torch.long)
    elsewhere[ring] = ring.roll(1)  # each gets another's, never its own
    flat, order = torch.full_like(seen.p[:1], 1 / heads.V), seen.log_p.argsort(-1)
    found = {name: {"named": [], "correlation": [], "weighted": []} for name in lenses}
    moved = []
    for h, (layer, head) in enumerate(heads.names):
        d = heads.sizes[h]
        other = {"mean": some.family.mu[h, None].expand(len(seen), -1), "zero": torch.zeros_like(seen.z[h]),
                 "resample": seen.z[h, elsewhere]}[by][:, :d]  # fmt: skip
        z = other.new_zeros(*shape, d).index_put_(place, other).to(next(heads.model.parameters()).dtype)
        fall = seen.log_p - heads.capture(inputs, edit=replaced(layer, head, z)).log_p
        moved.append((seen.p * fall).sum(-1))
        side = torch.randint(0, 2, (len(seen), k), generator=g).to(order)  # the same for all lenses
        for name, lens in lenses.items():
            said = lens.said(seen, slice(h, h + 1))[0]
            named = said.topk(k).indices
            gap = fall.gather(1, named) - fall.gather(1, _matched(order, named, side))
            found[name]["named"].append(gap.mean(-1))
            found[name]["correlation"].append(_correlation(said, fall, flat))
            found[name]["weighted"].append(_correlation(said, fall, seen.p))
    means = {name: {key: by_text(torch.stack(v), seen) for key, v in one.items()} for name, one in found.items()}
    return means | {"moved": by_text(torch.stack(moved), seen)}


def repair(lens: Lens, inputs, positions: str | int = "all") -> Tensor:
    """Put each head at its mean, and see whether heads of later layers come nearer to what the model would have said.

    Args:
        lens: of the model.
        inputs: texts as the model takes them.
        positions: as in `Captured.at`: those that are looked at; the head is at its mean at all of them.

    Returns:
        (A, A, N): [h, g] is KL(p ‖ q'_g) − KL(p ‖ q_g) with h at its mean; NaN unless g's layer is behind h's.
    """
    heads = lens.heads
    before = lens.capture(inputs).at(positions)
    layers, kl = torch.tensor([layer for layer, _ in heads.names]), lens.kl(before)
    found = by_text(kl, before)[None].repeat(len(kl), 1, 1).fill_(torch.nan)
    for h, (layer, head) in enumerate(heads.names):
        at_mean = lens.family.mu[h, :heads.sizes[h]].to(next(heads.model.parameters()).dtype)
        after = lens.capture(inputs, edit=replaced(layer, head, at_mean)).at(positions)
        change = lens.kl(replace(after, log_p=before.log_p)) - kl
        found[h, layers > layer] = by_text(change, before)[layers > layer]
    return found


# --- steering --------------------------------------------------------------------------------------------------------


def added(layer: int, head: int, by: Tensor) -> Edit:
    """The edit that adds `by`, broadcast to (N, S, d), to what one head has read."""

    def edit(k: int, z: Tensor) -> Tensor:
        if k == layer:
            z = z.clone()
            z[:, :, head] += by
        return z

    return edit


def directions(lens: Lens, S: Tensor, tokens: Tensor) -> Tensor:
    """The shortest ways to make each head say each token more: (A, tokens, d), S and tokens on the lens's device.

    For a token v, with w its row of the lens less the mean row, S w / √(wᵀS w), S (A, d, d) the covariance of z: of all
    moves m of z that are as usual as this one, mᵀS⁻¹m = 1, it raises the lens's logit of v most.
    """
    found, S = [], S.to(lens.family.mu)
    for h in range(len(S)):
        W = lens.family.weight(slice(h, h + 1), slice(0, lens.heads.V))[0, :, :S.shape[-1]]
        w = W[tokens] - W.mean(0)
        found.append(w @ S[h] / ((w @ S[h]) * w).sum(-1, keepdim=True).sqrt())
    return torch.stack(found)


def random_directions(S: Tensor, n: int, seed: int = 0) -> Tensor:
    """Moves as usual as those of `directions`, at random: (A, n, d), mᵀS⁻¹m = 1."""
    g = torch.randn(len(S), n, S.shape[-1], generator=torch.Generator().manual_seed(seed)).to(S)
    return (g / g.norm(dim=-1, keepdim=True)) @ power(S, 0.5).to(S)


def steering(moves: Mapping[str, Tensor], heads: Heads, inputs, tokens: Tensor, size: float = 3.0) -> dict:
    """Move what each head has read at each text's last position, and see what the model says there.

    Args:
        moves: directions (A, tokens, d) by name, such as `directions` gives and `random_directions`.
        heads: of the model.
        inputs: texts as the model takes them.
        tokens: what each move is to make more likely.
        size: how far z is moved, in standard deviations of z.

    Returns:
        For each name {"gain": (A, N), log p'_v − log p_v of the token; "side": (A, N), the side effect, KL(before ‖
        after) of the distribution over all other tokens}, means over the tokens.
    """
    T, N = len(tokens), len(main_input(inputs))
    many = {k: v.repeat_interleave(T, 0) for k, v in inputs.items()}
    before = heads.capture(many).at("last")
    each, target = torch.arange(N * T).to(before.text), tokens.to(before.text).repeat(N)
    found = {}
    for name, move in moves.items():
        gain, side = [], []
        for h, (layer, head) in enumerate(heads.names):
            by = move.new_zeros(N * T, main_input(many).shape[1], heads.sizes[h])
            by[each, before.position] = size * move[h, :, :heads.sizes[h]].repeat(N, 1)
            after = heads.capture(many, edit=added(layer, head, by.to(next(heads.model.parameters()).dtype))).at("last")
            gain.append((after.log_p - before.log_p)[each, target])
            others = [x.log_p.scatter(1, target[:, None], -torch.inf).log_softmax(-1) for x in (before, after)]
            gap = (others[0] - others[1]).scatter(1, target[:, None], 0)
            side.append((others[0].exp() * gap).sum(-1))
        means = (torch.stack(values).view(-1, N, T).mean(-1).cpu() for values in (gain, side))
        found[name] = dict(zip(("gain", "side"), means, strict=True))
    return found
