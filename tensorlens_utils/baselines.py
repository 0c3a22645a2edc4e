"""The rivals: attributions that others have published, each in the form that its paper gives.

A method is called as `METHODS[name](model, inputs, target, position=-1)` and answers (N, L), the relevance of every
token to one entry of the output; larger is more relevant.

model     a transformers model with logits, unmodified; it is in eval mode meanwhile and left as it was
inputs    what its tokenizer or image processor gave, on the model's device
target    (N,) the class or the vocabulary entry, or (N, 2) pairs, whose first less the second is the logit that is
          explained; methods that have none take no notice of it
position  where in the output: an int or (N,), masked positions counted; -1 is each text's last unmasked token. A
          classifier has one output, and no position

Tokens are the L positions of `input_ids`, special tokens too, padding with relevance 0; for images the L patches, so
that what a class token or register receives is left out. Of a map (N, S, S) over all S positions of the stream, the
row that is read is the one that the output reads: [CLS] for BERT and ViT, `position` for a language model, the last
token for a decoder with a classifier. It is found, not told: the rows of what leaves the last block by which the
logits have a derivative, and their mean where the head pools over several.

Letters: layer l of n, head h, output row i, source j; α^h_ij the attention; x_j what enters the block (its residual
stream); f^h(x_j) = (x̄_j W_V^h + b_V^h) W_O^h what head h carries from j, with x̄_j = x_j in a post-LN block and
LN(x_j) in a pre-LN one; e_i = x_i + Σ_h Σ_j α^h_ij f^h(x_j) + b_O the stream behind the attention. A norm that is held
at u acts on a part v of u as g_u(v) = γ ⊙ (v − m(v)) / s(u), m the mean and s the standard deviation over channels
(Kobayashi 2021); β belongs to no token.

>>> from tensorlens_utils import load_data, load_model
>>> model, processor = load_model("tiny-bert")
>>> inputs = processor(load_data("reviews")["text"][:2], padding=True, return_tensors="pt")
>>> target = model(**inputs).logits.argmax(-1)
>>> METHODS["rollout"](model, inputs, target).shape == inputs["input_ids"].shape
True
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .attentions import Layer, checked_target, explained, logits, main_input, output_position, parts, run, unpadded
from .linearize import untouched
from .models import token_embedding

# --------------------------------------------------------------------------------------------------- attention weights


def random(model, inputs, target=None, position=-1, *, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1): the floor of every comparison.

    They are drawn from the example's own content and `seed`, so that they change neither with the batch nor the
    padding. Two equal examples have equal numbers.
    """
    inputs = dict(inputs.items())
    main, mask = main_input(inputs), inputs.get("attention_mask")
    with torch.no_grad():
        r = torch.zeros(_tokens(model, main).shape[:2])
    for n, example in enumerate(main):
        kept = torch.ones(r.shape[1], dtype=torch.bool) if mask is None else mask[n].bool().cpu()
        content = (example if mask is None else example[mask[n].bool()]).float().cpu().numpy().tobytes()
        draws = torch.Generator().manual_seed(zlib.crc32(content, seed))
        r[n, kept] = torch.rand(int(kept.sum()), generator=draws)
    return r.to(main.device)


def raw_attention(model, inputs, target=None, position=-1) -> Tensor:
    """The last layer's attention, the mean over its heads: (1/H) Σ_h α^h_ij at the row i that the output reads.

    The usual baseline, without a paper of its own (Jain and Wallace 2019, 1902.10186, argue that it explains little).
    """
    r = run(model, inputs, None, position)
    return r.row(r.layers[-1].A.mean(1))


def rollout(model, inputs, target=None, position=-1) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, 2005.00928): R = Ã_n ⋯ Ã_1 with Ã = ½ (mean_h A + I).

    The rows of A sum to 1, so the paper's renormalisation of A + I is this ½. Nothing in it depends on where the norms
    are or on the target. The paper reads the row of [CLS]; other rows are read here by the same product.
    """
    r = run(model, inputs, None, position)
    return r.rollout([(layer.A.mean(1) + _eye(layer.A)) / 2 for layer in r.layers])


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def chefer(model, inputs, target, position=-1) -> Tensor:
    """Gradient-weighted attention, the generic form (Chefer, Gur and Wolf, ICCV 2021, 2103.15679, eqs. 5-6):

        Ā_l = mean_h (∇A_l ⊙ A_l)⁺,   R ← R + Ā_l R from R = I,   so R = (I + Ā_n) ⋯ (I + Ā_1),

    with ∇A = ∂(target's logit)/∂A. The paper reads the row of [CLS]. Derived here: another row, for language models and
    pooling heads, by the same recursion. Where the norms are does not enter.
    """
    r = run(model, inputs, target, position, graph=True)
    G = r.gradients(r.layers)
    return r.rollout([_eye(g) + (g * layer.A).clamp(min=0).mean(1) for g, layer in zip(G, r.layers, strict=True)])


def attention_gradient(model, inputs, target, position=-1) -> Tensor:
    """Attention × gradient, α ⊙ ∂(target's logit)/∂α (Serrano and Smith 2019, 1906.03731), in the last layer, signed.

    The paper's models have one attention vector. Derived here: of many heads and rows, the sum Σ_h Σ_i α^h_ij ∂/∂α^h_ij
    is to first order what the logit loses where the last layer attends to j no more, its other weights as they were.
    Rows that no output reads have no derivative and drop out.
    """
    r = run(model, inputs, target, position, graph=True)
    return r.read((r.gradients(r.layers[-1:])[0] * r.layers[-1].A).sum((1, 2)))


# ----------------------------------------------------------------------------- attention with the vectors that it moves


def _sizes(layer: Layer, residual: bool, size: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The map (N, S, S) of size(parts of rows i (N, k, S, D), i) -> (N, k, S)."""
    return torch.cat([size(v, i) for i, v in parts(layer, residual)], 1)


def _held(norm: tuple, v: Tensor, i: slice) -> Tensor:
    """g_u(v) = γ ⊙ (v − m(v)) / s(u) for parts v (N, k, S, D) of the norm's input u at the rows i."""
    module, u, _ = norm
    s = (u[:, i].var(-1, correction=0) + module.eps).sqrt()[:, :, None, None]
    v = (v - v.mean(-1, keepdim=True)) / s
    return v if module.weight is None else v * module.weight.detach()


def _post_norms(layer: Layer) -> tuple | None:
    """The norms (after the attention, after the FFN) on the stream of a post-LN block; None for a pre-LN block.

    Post-LN: a LayerNorm reads x + o, and what leaves the block is what a LayerNorm wrote. Pre-LN: the stream is x + o
    and what follows only adds to it, whether the FFN reads x + o (serial) or x (parallel). Anything else is refused.
    """
    e = layer.x + layer.o
    same = lambda u, v: u.shape == v.shape and bool((u - v).norm() <= 1e-3 * v.norm())  # noqa: E731
    reads_e = [norm for norm in layer.norms if same(norm[1], e)]
    last = layer.norms[-1] if layer.norms and same(layer.norms[-1][2], layer.out) else None
    if last is not None and reads_e and all(isinstance(n[0], nn.LayerNorm) for n in (reads_e[0], last)):
        return reads_e[0], last
    if last is None and (reads_e or all(same(norm[1], layer.x) for norm in layer.norms)):
        return None
    raise ValueError("norm-based + norm, GlobEnc and ALTI are defined for post-LN blocks, and derived here for pre-LN "
                     "ones whose attention is added to the stream as it is; this model norms or scales it before, or "
                     'its post-norms are no LayerNorm. Use "norm-based", "rollout" or a gradient method')  # fmt: skip


def norm_based(model, inputs, target=None, position=-1) -> Tensor:
    """The norm of what attention moves (Kobayashi et al. 2020, 2004.10102): ‖Σ_h α^h_ij f^h(x_j)‖, last layer.

    The paper's map of a layer, heads summed; b_V is in f, b_O in no token. Pre-LN needs no other form: f reads LN(x_j)
    in place of x_j, a function of token j alone.
    """
    r = run(model, inputs, None, position)
    return r.row(_sizes(r.layers[-1], False, lambda v, i: v.norm(dim=-1)))


def norm_based_norm(model, inputs, target=None, position=-1) -> Tensor:
    """Norm-based with residual connection and layer norm (Kobayashi et al. 2021, 2109.07152), last layer:

        ‖g_{e_i}(Σ_h α^h_ij f^h(x_j) + δ_ij x_i)‖

    The paper's models are post-LN. Derived here for pre-LN: no norm acts on the stream behind the attention, so g is
    left out, ‖Σ_h α^h_ij f^h(x_j) + δ_ij x_i‖, and f reads LN(x_j).
    """
    r = run(model, inputs, None, position)
    return r.row(_residual_norms(r.layers[-1], ffn=False))


def globenc(model, inputs, target=None, position=-1) -> Tensor:
    """GlobEnc (Modarressi et al. 2022, 2205.03286): the product N_n ⋯ N_1 over all layers of

        N_ij = ‖g²_{u_i}(g¹_{e_i}(Σ_h α^h_ij f^h(x_j) + δ_ij x_i))‖,   u = FFN(LN¹(e)) + LN¹(e),

    g¹, g² the two norms of the block, each held at what it reads; what the FFN writes is left out, for it works token
    by token. No identity is added and, as in the authors' code, rows are not normalised: the last norm keeps them of
    one size. The paper needs a post-LN encoder and reads [CLS].

    Derived here for pre-LN: neither norm acts on the stream, so N_ij = ‖Σ_h α^h_ij f^h(x_j) + δ_ij x_i‖; and since no
    norm keeps the rows of one size, and one token of great norm would drown the others, each row is divided by its sum.
    """
    r = run(model, inputs, None, position)
    return r.rollout([_residual_norms(layer, ffn=True) for layer in r.layers])


def _residual_norms(layer: Layer, ffn: bool) -> Tensor:
    norms = _post_norms(layer)

    def size(v, i):
        if norms is not None:
            v = _held(norms[0], v, i)
            v = _held(norms[1], v, i) if ffn else v
        return v.norm(dim=-1)

    M = _sizes(layer, True, size)
    return M if norms is not None or not ffn else M / M.sum(-1, keepdim=True)


def alti(model, inputs, target=None, position=-1) -> Tensor:
    """ALTI (Ferrando et al. 2022, 2203.04212): the product C_n ⋯ C_1 over all layers of

        c_ij = max(0, ‖y_i‖₁ − ‖y_i − T_i(x_j)‖₁), rows divided by their sums,
        y_i = LN(e_i),   T_i(x_j) = g_{e_i}(Σ_h α^h_ij f^h(x_j) + δ_ij x_i),

    y_i with all biases and β. The paper needs post-LN; FFN and second norm work token by token and are left out. (The
    authors' code has s(e + ε) with n − 1 for s; here s is the model's own.)

    For pre-LN, as in ALTI-Logit (Ferrando et al. 2023, 2305.12535): no norm follows the sum, y_i = e_i and T_i(x_j) =
    Σ_h α^h_ij f^h(x_j) + δ_ij x_i, f reading LN(x_j).
    """
    r = run(model, inputs, None, position)
    return r.rollout([_contributions(layer) for layer in r.layers])


def _contributions(layer: Layer) -> Tensor:
    norms = _post_norms(layer)
    y = layer.x + layer.o if norms is None else norms[0][2]

    def size(v, i):
        v = v if norms is None else _held(norms[0], v, i)
        return (y[:, i].abs().sum(-1, keepdim=True) - (y[:, i, None] - v).abs().sum(-1)).clamp(min=0)

    C = _sizes(layer, True, size)
    return C / C.sum(-1, keepdim=True).clamp_min(torch.finfo(C.dtype).tiny)


# ---------------------------------------------------------------------------------------- the model as a function of X


def _tokens(model: nn.Module, main: Tensor) -> Tensor:
    """Token or patch embeddings (N, L, D), before positions are added."""
    out = token_embedding(model)(main)
    return out.flatten(2).mT if out.dim() == 4 else out


class _Function:
    """The explained logit as a function of X (N, L, D), and where X is: `X` at the inputs, `X0` where they are empty.

    Called as f(X, *rest), so that captum can repeat X and what goes with it: `rest` is the target, the position and
    every other input, each with the examples first.
    """

    def __init__(self, model, inputs, target, position, empty=0.0):
        inputs = dict(inputs.items())
        main = main_input(inputs)
        self.model, self.keys, self.mask = model, list(inputs), inputs.get("attention_mask")
        self.rest = (checked_target(inputs, target), output_position(inputs, position), *inputs.values())
        with torch.no_grad():
            self.X = _tokens(model, main)
            empty = torch.as_tensor(empty, device=main.device, dtype=self.X.dtype)
            self.X0 = _tokens(model, empty.expand_as(main)) if main.dim() > 2 else empty.expand_as(self.X)

    def __call__(self, X, target, at, *inputs):
        def enter(module, args, out):
            return X.mT.reshape(out.shape) if out.dim() == 4 else X

        hook = token_embedding(self.model).register_forward_hook(enter)
        try:
            return explained(logits(self.model, dict(zip(self.keys, inputs, strict=True))), target, at)
        finally:
            hook.remove()


def gradient_input(model, inputs, target, position=-1) -> Tensor:
    """Gradient × input (Shrikumar et al. 2016, 1605.01713): Σ_d x_jd ∂(target's logit)/∂x_jd, signed.

    The input is the token embedding of a text and the pixels of an image. Derived here: the sum over a patch's pixels
    p, as the embedding x = W p + b is affine, is (x − b)·∂/∂x, so both are one formula, (x − x⁰)·∂/∂x with x⁰ what
    an empty input is embedded as: 0 for a text, the embedding of zero pixels for an image.
    """
    f = _Function(model, inputs, target, position)
    with untouched(model), torch.enable_grad():
        X = f.X.clone().requires_grad_()
        grad = torch.autograd.grad(f(X, *f.rest).sum(), X)[0]
    return unpadded(((f.X - f.X0) * grad).sum(-1), f.mask)


def integrated_gradients(model, inputs, target, position=-1, *, steps: int = 32,
                         empty: float | Tensor = 0.0, batch: int = 64) -> Tensor:  # fmt: skip
    """Integrated Gradients (Sundararajan et al. 2017, 1703.01365), by captum, with Gauss-Legendre's nodes:

        Σ_d (x − x⁰)_jd ∫₀¹ ∂y(x⁰ + t (x − x⁰))/∂x_jd dt,   which sums over the tokens to y(x) − y(x⁰),

    y the target's logit. x⁰ is the paper's, zero: embeddings for a text, positions left; pixels for an image, as the
    model is given them (so 0 is the mean colour; black is empty=−mean/std of the image processor). `empty` is another
    one: a number, an embedding (D,), or pixels that broadcast. Taken at the patches it is the sum over their pixels,
    as the embedding is affine. `batch` points go through the model at once, or all N inputs if those are more; captum
    keeps its step sizes in float32.

    Without position embeddings (Llama), zero is a bad place to start: RMS norms see the same x along the path until
    t < √ε/rms(x), and what changes there lies between the nodes: 32 steps miss a quarter of tiny-llama's change, and
    1 % of it from the mean embedding.
    """
    from captum.attr import IntegratedGradients

    f = _Function(model, inputs, target, position, empty)
    with untouched(model):
        R = IntegratedGradients(f).attribute(f.X, f.X0, additional_forward_args=f.rest, n_steps=steps,
                                             internal_batch_size=max(batch, len(f.X)))  # fmt: skip
    return unpadded(R.detach().sum(-1), f.mask)


def feature_ablation(model, inputs, target, position=-1, *, empty: float | Tensor = 0.0,
                     batch: int = 64) -> Tensor:  # fmt: skip
    """Feature ablation, by captum: y(x) − y(x with token j empty), y the target's logit; one forward for each token.

    Erasure of Li et al. 2016 (1612.08220): a zero embedding for a token, its position left; occlusion of Zeiler and
    Fergus 2014 for a patch. `empty` and `batch` as for Integrated Gradients.
    """
    from captum.attr import FeatureAblation

    f = _Function(model, inputs, target, position, empty)
    tokens = torch.arange(f.X.shape[1], device=f.X.device)[None, :, None].expand(1, -1, f.X.shape[2])
    with untouched(model), torch.no_grad():
        R = FeatureAblation(f).attribute(f.X, f.X0, additional_forward_args=f.rest, feature_mask=tokens,
                                         perturbations_per_eval=max(1, batch // len(f.X)))  # fmt: skip
    return unpadded(R[..., 0], f.mask)  # captum gives a feature's score to each of its entries


METHODS: dict[str, Callable[..., Tensor]] = {
    "random": random,
    "raw attention": raw_attention,
    "rollout": rollout,
    "norm-based": norm_based,
    "norm-based + norm": norm_based_norm,
    "globenc": globenc,
    "alti": alti,
    "chefer": chefer,
    "attention × gradient": attention_gradient,
    "gradient × input": gradient_input,
    "integrated gradients": integrated_gradients,
    "feature ablation": feature_ablation,
}
