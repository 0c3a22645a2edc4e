"""Relation decoders: each against its formula written out, the choice of λ, ranks and edits, what is refused."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from tensorlens_utils.relations.decoders import DECODERS, PENALTIES, RULES, Decoder, Examples, fit


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


n, d = 5, 7
EXAMPLES = Examples(noise(n, d), noise(n, d, seed=1), {"tensor": noise(n, d, d, seed=2), "lre": noise(n, d, d, seed=3)})
S = noise(4, d, seed=4)


def close(a, b, bar=1e-12):
    assert a.shape == b.shape and float((a - b).abs().max()) < bar


@pytest.mark.parametrize("name", ["tensor", "lre"])
@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_the_mean_of_matrices_is_written_out(name, beta):
    W = sum(EXAMPLES.W[name][i] for i in range(n)) / n
    b = sum(EXAMPLES.o[i] - EXAMPLES.W[name][i] @ EXAMPLES.s[i] for i in range(n)) / n
    found = fit(name, EXAMPLES, beta=beta)
    close(found.decode(S), torch.stack([beta * W @ s + b for s in S]))
    U, sigma, V = torch.linalg.svd(W)
    W_3 = U[:, :3] @ sigma[:3].diag() @ V[:3]
    close(fit(name, EXAMPLES, beta, rank=3).decode(S), torch.stack([beta * W_3 @ s + b for s in S]))
    close(found.truncated(d).W, found.W)


def test_one_example_is_decoded_exactly():
    one = Examples(*(x[:1] for x in (EXAMPLES.s, EXAMPLES.o)), {name: W[:1] for name, W in EXAMPLES.W.items()})
    for name in ("tensor", "lre", "ridge", "translation", "bias"):
        close(fit(name, one).decode(one.s), one.o)


def test_what_needs_no_matrix():
    close(fit("bias", EXAMPLES).decode(S), EXAMPLES.o.mean(0).expand(4, d))
    close(fit("translation", EXAMPLES).decode(S), S + EXAMPLES.o.mean(0) - EXAMPLES.s.mean(0))
    close(fit("identity", EXAMPLES).decode(S), S)
    assert {*DECODERS} - {*RULES} == {"ridge", "translation", "bias", "identity"} and {*RULES} < {*DECODERS}


def test_ridge_is_scikit_learns_with_the_penalty_that_leaving_out_chooses():
    s, o = EXAMPLES.s.numpy(), EXAMPLES.o.numpy()
    unit = np.square(s - s.mean(0)).sum(1).mean()

    def left_out(penalty):
        rest = [np.delete(np.arange(n), i) for i in range(n)]
        fitted = [Ridge(penalty * unit).fit(s[keep], o[keep]) for keep in rest]
        return sum(np.square(o[i] - fitted[i].predict(s[i : i + 1])[0]).sum() for i in range(n))

    best = min(PENALTIES, key=left_out)
    expected = Ridge(best * unit).fit(s, o)
    close(fit("ridge", EXAMPLES).decode(S), torch.as_tensor(expected.predict(S.numpy())), 1e-9)


def test_ridge_learns_a_linear_map_from_enough():
    W, b, s = noise(d, d, seed=7), noise(d, seed=8), noise(200, d, seed=9)
    found = fit("ridge", Examples(s, s @ W.T + b, {}))
    close(found.decode(S), S @ W.T + b, 0.02)


def test_an_edit_is_the_smallest_change_that_does_it():
    found, difference = fit("tensor", EXAMPLES), noise(3, d, seed=5)
    close(found.edit(difference, d), difference @ torch.linalg.pinv(found.W).T, 1e-9)
    close(found.decode(S[:3] + found.edit(difference, d)), found.decode(S[:3]) + difference, 1e-9)
    for rank in (1, 3):
        W = found.truncated(rank).W
        close(found.edit(difference, rank), difference @ torch.linalg.pinv(W, rtol=1e-9).T, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edit_beyond_what_w_spans_is_that_of_its_rank(dtype):
    """W of less than full rank: ridge's, of n examples at most n − 1; a mean that was truncated; none at all."""
    x = Examples(*(part.to(dtype) for part in (EXAMPLES.s, EXAMPLES.o)), {"tensor": EXAMPLES.W["tensor"].to(dtype)})
    difference, bar = noise(3, d, seed=5).to(dtype), 1e-3 if dtype == torch.float32 else 1e-9
    for decoder, r in ((fit("ridge", x), n - 1), (fit("tensor", x, rank=3), 3)):
        assert torch.linalg.matrix_rank(decoder.W) == r
        close(decoder.edit(difference, d), difference @ torch.linalg.pinv(decoder.W).T, bar)
        close(decoder.edit(difference, d), decoder.edit(difference, r), bar)
    assert not fit("bias", x).edit(difference, 2).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_states_ridge_learns_nothing_but_the_mean(dtype):
    """Subjects of the same last word, at the embedding: their mean rounds, and W is not what is made of that."""
    s = noise(d, seed=11).to(dtype).expand(n, d) * 30
    assert (s - s.mean(0)).any()
    found = fit("ridge", Examples(s, EXAMPLES.o.to(dtype), {}))
    assert not found.W.any() and not found.edit(S.to(dtype), n - 1).any()
    close(found.decode(S.to(dtype)), EXAMPLES.o.to(dtype).mean(0).expand(4, d), 1e-5)
    near = s + 1e-3 * noise(n, d, seed=12).to(dtype)  # and of states that differ, if by little, it learns
    assert fit("ridge", Examples(near, EXAMPLES.o.to(dtype), {})).W.norm() > 1


def test_leaving_out_and_the_w_of_others():
    rest = EXAMPLES.without(2)
    assert len(rest) == n - 1 and torch.equal(rest.s[2], EXAMPLES.s[3])
    assert torch.equal(rest.W["lre"][2], EXAMPLES.W["lre"][3])
    other = Examples(noise(3, d), noise(3, d), {"tensor": noise(3, d, d, seed=6)})
    W = other.W["tensor"].mean(0)
    found = fit("tensor", EXAMPLES.of_other(other))
    close(found.W, W)
    close(found.b, (EXAMPLES.o - EXAMPLES.s @ W.T).mean(0))


def test_bad_input_is_told_so():
    with pytest.raises(ValueError, match="a decoder is one of 'tensor', .*, not 'tensors'"):
        fit("tensors", EXAMPLES)
    with pytest.raises(ValueError, match=r"'lre' needs its matrix.* these have 'tensor': examples_of\(.*=\['lre'\]"):
        fit("lre", Examples(EXAMPLES.s, EXAMPLES.o, {"tensor": EXAMPLES.W["tensor"]}))
    for rank in (0, d + 1):
        with pytest.raises(ValueError, match=rf"a rank is in \[1, 7\].* not {rank}"):
            fit("tensor", EXAMPLES, rank=rank)
    with pytest.raises(ValueError, match="a rank is in"):
        Decoder(torch.eye(3), torch.zeros(3)).edit(torch.ones(1, 3), 4)
