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
from . import Lens, heads_of
from .heads import Captured, Edit, Heads, edited, replaced
from .moments import power

PIECE = 2**25  # probabilities of all heads that are kept at once


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
    if not batches or not all(map(len, batches)):
        raise ValueError("batches that are put together have positions, and here "
                         + ("one has none" if batches else "there is none"))  # fmt: skip
    counts = torch.tensor([0, *(int(b.text.max()) + 1 for b in batches[:-1])]).cumsum(0).tolist()
    parts = {f.name: [getattr(b, f.name) for b in batches] for f in fields(Captured)}
    parts["text"] = [b.text + k for b, k in zip(batches, counts, strict=True)]
    return Captured(**{k: None if v[0] is None else torch.cat(v, 1 if k == "z" else 0) for k, v in parts.items()})


def by_text(values: Tensor, seen: Captured) -> Tensor:
    """Means (..., N) within texts of values (..., n) at positions, on the CPU, where intervals are taken; NaN for texts
    that have none, so that a column is the same text whatever the positions."""
    count = seen.text.bincount().to(values)
    return values.new_zeros(*values.shape[:-1], len(count)).index_add_(-1, seen.text, values).div_(count).cpu()


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

    A, V = len(lens.heads.names), lens.heads.V
    total = seen.z.new_zeros(A, len(other.heads.names))
    for at in torch.arange(len(seen)).split(max(1, PIECE // (A * V))):
        q, r = (x.log_probs(seen[at]).exp() for x in (lens, other))
        H_r = entropy(r)
        total += torch.stack([(entropy((q_a + r) / 2) - (entropy(q_a) + H_r) / 2).sum(-1) for q_a in q])
    return (total / len(seen)).cpu()


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


def ablation(lenses: Mapping[str, Lens], inputs, by: str | Tensor = "mean", k: int = 10, seed: int = 0) -> dict:
    """Take each head away in turn, and compare what falls with what each lens says that the head says.

    Args:
        lenses: of one model, by name.
        inputs: texts or images as the model takes them.
        by: z̄: the "mean" of z that the lenses were made with, "zero", the z of a random other position ("resample"), or
            numbers (A, d) of one's own, such as the mean where lenses were made with several.
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
    heads, g = heads_of(lenses), torch.Generator().manual_seed(seed)
    mean, *others = (lens.family.mu for lens in lenses.values())
    ways = {"mean": mean, "zero": torch.zeros_like(mean), "resample": None}
    if isinstance(by, str) and by not in ways or isinstance(by, Tensor) and by.shape != mean.shape:
        raise ValueError(f'a head is taken away by its "mean", by "zero", by "resample" or by numbers, '
                         f"{tuple(mean.shape)}; not by {by if isinstance(by, str) else tuple(by.shape)!r}")  # fmt: skip
    if isinstance(by, str) and by == "mean" and not all(torch.allclose(mean, mu, 1e-3, 1e-5) for mu in others):
        raise ValueError("heads are put at their mean, and these lenses were made with several, of other text or other "
                         "positions: say by which one, as by=moments.mu")  # fmt: skip
    if not 1 <= k <= heads.V // 2:
        raise ValueError(f"as many tokens are matched as are named, so k lies in 1..{heads.V // 2}, half of the "
                         f"vocabulary, and is {k}")  # fmt: skip
    seen = heads.capture(inputs, scale=any(lens.family.through_unembedding for lens in lenses.values()))
    if len(seen) < 2:
        raise ValueError("heads are resampled from other positions, and correlations compared over several: give more "
                         "than one token")  # fmt: skip
    place, instead = (seen.text, seen.position), ways[by] if isinstance(by, str) else by.to(mean)
    ring, elsewhere = torch.randperm(len(seen), generator=g), torch.empty(len(seen), dtype=torch.long)
    elsewhere[ring] = ring.roll(1)  # each gets another's, never its own
    flat, order = torch.full_like(seen.p[:1], 1 / heads.V), seen.log_p.argsort(-1)
    found = {name: {"named": [], "correlation": [], "weighted": []} for name in lenses}
    moved = []
    for h, (layer, head) in enumerate(heads.names):
        other = seen.z[h, elsewhere] if instead is None else instead[h].expand(len(seen), -1)
        other = other[:, :heads.sizes[h]]
        put = edited(layer, head, lambda z, other=other: z.index_put(place, other.to(z)))
        fall = seen.log_p - heads.capture(inputs, edit=put).log_p
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
        inputs: texts or images as the model takes them.
        positions: as in `Captured.at`: those that are looked at; the head is at its mean at all of them.

    Returns:
        (A, A, N): [h, g] is KL(p ‖ q'_g) − KL(p ‖ q_g) with h at its mean; NaN unless g's layer is behind h's.
    """
    heads = lens.heads
    before = lens.capture(inputs, positions=positions)
    if not len(before):
        raise ValueError(f"no text has a position {positions!r} to look at")
    layers, kl = [layer for layer, _ in heads.names], lens.kl(before)
    found = by_text(kl, before)[None].repeat(len(kl), 1, 1).fill_(torch.nan)
    for h, (layer, head) in enumerate(heads.names):
        if layer == layers[-1]:  # behind it there is none
            break
        later = slice(next(a for a, other in enumerate(layers) if other > layer), None)
        at_mean = replaced(layer, head, lens.family.mu[h, :heads.sizes[h]])
        after = lens.capture(inputs, edit=at_mean, positions=positions)
        found[h, later] = by_text(lens.kl(replace(after, log_p=before.log_p), later) - kl[later], before)
    return found


# --- steering --------------------------------------------------------------------------------------------------------


def added(layer: int, head: int, by: Tensor) -> Edit:
    """The edit that adds `by`, broadcast to (N, S, d), to what one head has read."""
    return edited(layer, head, lambda z: z + by)


def _ids(tokens: Tensor, V: int) -> Tensor:
    if not ((tokens >= 0) & (tokens < V)).all():
        raise ValueError(f"tokens are ids from 0 to {V - 1}, and {tokens.tolist()} are not all")
    return tokens


def directions(lens: Lens, S: Tensor, tokens: Tensor) -> Tensor:
    """The shortest ways to make each head say each token more: (A, tokens, d), S and tokens on the lens's device.

    For a token v, with w its row of the lens less the mean row, S w / √(wᵀS w), S (A, d, d) the covariance of z: of all
    moves m of z that are as usual as this one, mᵀS⁻¹m = 1, it raises the lens's logit of v most. It is 0 where the
    lens does not listen, and w is 0.
    """
    found, S, tokens = [], S.to(lens.family.mu), _ids(tokens, lens.heads.V)
    for h in range(len(S)):
        W = lens.family.weight(slice(h, h + 1), slice(0, lens.heads.V))[0, :, :S.shape[-1]]
        w = W[tokens] - W.mean(0)
        size = ((w @ S[h]) * w).sum(-1, keepdim=True)
        found.append(w @ S[h] / size.clamp_min(torch.finfo(size.dtype).tiny).sqrt())
    return torch.stack(found)


def random_directions(S: Tensor, n: int, seed: int = 0) -> Tensor:
    """Moves as usual as those of `directions`, at random: (A, n, d), mᵀS⁻¹m = 1."""
    g = torch.randn(len(S), n, S.shape[-1], generator=torch.Generator().manual_seed(seed)).to(S)
    return (g / g.norm(dim=-1, keepdim=True)) @ power(S, 0.5).to(S)


def steering(moves: Mapping[str, Tensor], heads: Heads, inputs, tokens: Tensor, size: float = 3.0,
             position: str | int = "last") -> dict:  # fmt: skip
    """Move what each head has read at one position of each text or image, and see what the model says there.

    Args:
        moves: directions (A, tokens, d) by name, such as `directions` gives and `random_directions`.
        heads: of the model.
        inputs: texts or images as the model takes them.
        tokens: what each move is to make more likely; of a class model, labels.
        size: how far z is moved, in standard deviations of z.
        position: the "last" one, or one that all have, as 0 for a class token.

    Returns:
        For each name {"gain": (A, N), log p'_v − log p_v of the token; "side": (A, N), the side effect, KL(before ‖
        after) of the distribution over all other tokens}, means over the tokens.
    """
    T, N = len(_ids(tokens, heads.V)), len(main_input(inputs))
    if wrong := {name: tuple(move.shape) for name, move in moves.items() if move.shape[:2] != (len(heads.names), T)}:
        raise ValueError(f"moves are {len(heads.names)} heads × {T} tokens × width, and these are otherwise: {wrong}")
    many = {k: v.repeat_interleave(T, 0) for k, v in inputs.items()}
    before = heads.capture(many, positions=position)
    if not torch.equal(before.text.cpu(), torch.arange(N * T)):
        raise ValueError(f'heads are moved at one position of each text, the "last" or one that all have; {position!r} '
                         f"is that of {len(before) / T:g} in {N} texts")  # fmt: skip
    place, each, target = (before.text, before.position), before.text, tokens.to(before.text).repeat(N)
    found = {}
    for name, move in moves.items():
        gain, side = [], []
        for h, (layer, head) in enumerate(heads.names):
            by = size * move[h, :, :heads.sizes[h]].repeat(N, 1)
            push = edited(layer, head, lambda z, by=by: z.index_put(place, by.to(z), accumulate=True))
            after = heads.capture(many, edit=push, positions=position)
            gain.append((after.log_p - before.log_p)[each, target])
            others = [x.log_p.scatter(1, target[:, None], -torch.inf).log_softmax(-1) for x in (before, after)]
            gap = (others[0] - others[1]).scatter(1, target[:, None], 0)
            side.append((others[0].exp() * gap).sum(-1))
        means = (torch.stack(values).view(-1, N, T).mean(-1).cpu() for values in (gain, side))
        found[name] = dict(zip(("gain", "side"), means, strict=True))
    return found
