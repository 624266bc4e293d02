"""Decompositions against tensorly, numpy's least squares, and each other."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
import tensorly as tl
import torch
from helpers.host_copies import waits
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nni_haloc.space import tucker
from nni_haloc.space.reduced_rank import ReducedRankFit, falling, rotate, truncation_errors
from nni_haloc.space.tucker import (
    Tucker2,
    decompose,
    decompose_all,
    output_error,
    output_errors,
    reconstruct,
)

RANKS = [(2, 2), (4, 3), (6, 5)]
hosvd, warm_hooi, hooi = (
    partial(decompose, method=method) for method in ("hosvd", "warm_hooi", "hooi")
)


def data_aware(w, ranks, s):
    return decompose(w, ranks, "data", s)


def kernel(f=6, c=5, k1=3, k2=3, seed=0):
    return torch.randn(
        f, c, k1, k2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def patches(c=5, kk=9, n=400, seed=1, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c * kk, dtype=torch.float64, generator=generator)
    return (
        x @ torch.randn(c * kk, c * kk, dtype=torch.float64, generator=generator)
        if correlated
        else x
    )


def covariance(x):
    return x.T @ x / len(x)


def test_reconstruct_is_tensorlys_mode_product():
    out, core, inn = (torch.randn(s, dtype=torch.float64) for s in ((6, 4), (4, 3, 3, 2), (3, 5)))
    expected = tl.tenalg.multi_mode_dot(core.numpy(), [out.numpy(), inn.numpy().T], modes=[0, 1])
    np.testing.assert_allclose(reconstruct(Tucker2(out, core, inn)), expected, atol=1e-12)


@pytest.mark.parametrize("rank", RANKS)
def test_hosvd_is_tensorlys_truncated_start(rank):
    w = kernel()
    (core, factors), _ = tl.decomposition.partial_tucker(
        w.numpy(), rank=list(rank), modes=[0, 1], init="svd", n_iter_max=1
    )
    one_sweep = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    ours = output_error(w, reconstruct(hosvd(w, [rank])[0]))
    assert (
        ours >= np.linalg.norm(w.numpy() - one_sweep) / np.linalg.norm(w.numpy()) - 1e-9
    )  # a sweep can only improve on HOSVD
    spectra = [
        np.linalg.svd(m.numpy(), compute_uv=False)[r:]
        for m, r in zip((w.flatten(1), w.transpose(0, 1).flatten(1)), rank, strict=True)
    ]
    bound = np.sqrt(sum((s**2).sum() for s in spectra)) / np.linalg.norm(w.numpy())
    assert ours <= bound + 1e-9  # the classic HOSVD bound


@pytest.mark.parametrize("rank", RANKS)
def test_hooi_is_tensorly_and_never_worse_than_hosvd(rank):
    w = kernel()
    error = output_error(w, reconstruct(hooi(w, [rank])[0]))
    assert error <= output_error(w, reconstruct(hosvd(w, [rank])[0])) + 1e-9


def fit_behind(factor_in, w, s, ranks_in):
    wsa = rotate(w.flatten(1) @ s, factor_in.T)
    return ReducedRankFit(wsa, rotate(rotate(s, factor_in.T).T, factor_in.T), factor_in, ranks_in)


def energy(fit, r1, r2):
    return float(fit.energies([(r1, r2)]))


def fitted_kernel(fit, r1, r2):
    out, core = fit.factors(r1, r2)
    return reconstruct(Tucker2(out, core.reshape(r1, r2, 3, 3), fit.factor_in[:r2]))


def test_errors_of_many_approximations_are_those_of_each():
    """Oracle: numpy, through a square root of the covariance."""
    w, s = kernel(), covariance(patches())
    values, vectors = np.linalg.eigh(s.numpy())
    root, whole = (vectors * values.clip(0) ** 0.5) @ vectors.T, w.flatten(1).numpy()
    others = [kernel(seed=seed) for seed in (1, 2)] + [w]
    for given_s, side in ((s, root), (None, np.eye(45))):
        expected = [
            np.linalg.norm((whole - other.flatten(1).numpy()) @ side) / np.linalg.norm(whole @ side)
            for other in others
        ]
        np.testing.assert_allclose(output_errors(w, iter(others), given_s), expected, atol=1e-9)


@pytest.mark.parametrize("rank_out", [1, 3, 6])
def test_given_factor_in_the_fit_is_the_reduced_rank_least_squares_optimum(rank_out):
    """Oracle: ordinary least squares on the projected patches, then a truncated SVD.

    The SVD is of the fitted outputs (Izenman 1975).
    """
    w, x = kernel(), patches()
    factor_in = torch.randn(3, 5, dtype=torch.float64)
    projection = torch.kron(factor_in, torch.eye(9, dtype=torch.float64))  # (r2 kk, C kk)
    y = (x @ w.flatten(1).T).numpy()
    z = (x @ projection.T).numpy()
    fitted = z @ np.linalg.lstsq(z, y, rcond=None)[0]
    u, s, vt = np.linalg.svd(fitted, full_matrices=False)
    best = u[:, :rank_out] * s[:rank_out] @ vt[:rank_out]
    fit = fit_behind(factor_in, w, covariance(x), [3])
    np.testing.assert_allclose(
        x @ fitted_kernel(fit, rank_out, 3).flatten(1).T, best, atol=1e-6 * np.abs(best).max()
    )
    assert energy(fit, rank_out, 3) == pytest.approx((best**2).sum() / len(x), rel=1e-6)


def test_leading_blocks_give_what_each_rank_gives_alone():
    w, s = kernel(), covariance(patches())
    factor_in = kernel(5, 5, 1, 1, seed=3).flatten(1)
    together = fit_behind(factor_in, w, s, [1, 2, 4, 5])
    for r2 in (1, 2, 4, 5):
        alone = fit_behind(factor_in[:r2], w, s, [r2])
        for r1 in (1, 3, 6):
            torch.testing.assert_close(
                fitted_kernel(together, r1, r2), fitted_kernel(alone, r1, r2), rtol=1e-6, atol=1e-6
            )  # the ridges differ
            assert energy(together, r1, r2) == pytest.approx(energy(alone, r1, r2))


@pytest.mark.parametrize("closed_form_loses", [False, True])
def test_factorisations_by_the_data_do_not_grow_with_the_ranks(monkeypatch, closed_form_loses):
    """One Cholesky factorisation and one call for eigenvectors for each ``factor_in``."""
    calls = Counter()
    for name in ("cholesky_ex", "eigh"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, n=name, real=real: (calls.update([n]), real(*a))[1]
        )
    w, x = misleading() if closed_form_loses else (kernel(), patches())
    for ranks in ([(4, 1)], [(r1, r2) for r1 in range(1, 6) for r2 in (1, 2, 4)]):
        calls.clear()
        data_aware(w, ranks, covariance(x))
        tried = 1 + closed_form_loses
        assert calls == {"cholesky_ex": tried, "eigh": 4 + tried}


def test_errors_of_hosvd_at_all_ranks_are_those_of_each():
    w, s = kernel(), covariance(patches())
    _, v, core = (t[0] for t in tucker._hosvd_bases(w[None]))
    errors = truncation_errors(core, rotate(rotate(s, v).T, v), 5)
    total = ((w.flatten(1) @ s) * w.flatten(1)).sum()
    ranks = [(r1, r2) for r1 in range(1, 7) for r2 in range(1, 6)]
    for (r1, r2), plain in zip(ranks, hosvd(w, ranks), strict=True):
        assert float((errors[r1 - 1, r2] / total).sqrt()) == pytest.approx(
            output_error(w, reconstruct(plain), s), abs=1e-6
        )


def random_like_torch(f, c, seed=0):
    return torch.nn.init.kaiming_normal_(
        torch.empty(f, c, 3, 3), generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize(
    ("f", "c", "step"), [(16, 16, 2), (32, 16, 4), (32, 32, 8), (64, 64, 16), (24, 48, 24)]
)
def test_warm_hooi_is_within_half_a_percent_of_tensorly_at_every_rank(f, c, step, device):
    """On random kernels, the worst case: their spectra are flat."""
    w = random_like_torch(f, c).double()  # at full rank float32 is off by 2e-5 on a device
    ranks = [(r, r) for r in range(step, min(f, c) + 1, step)]
    found = warm_hooi(w.to(device), ranks)
    for rank, ours, theirs in zip(ranks, found, hooi(w, ranks), strict=True):
        assert (
            output_error(w, reconstruct(ours).cpu())
            <= 1.005 * output_error(w, reconstruct(theirs)) + 1e-9
        ), rank


def test_warm_hooi_is_within_half_a_percent_of_tensorly_at_unequal_ranks():
    w = random_like_torch(24, 16)
    ranks = [(r1, r2) for r1 in range(4, 25, 4) for r2 in range(4, 17, 4)]
    for rank, ours, theirs in zip(ranks, warm_hooi(w, ranks), hooi(w, ranks), strict=True):
        assert (
            output_error(w, reconstruct(ours))
            <= 1.005 * output_error(w, reconstruct(theirs)) + 1e-5
        ), rank


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([(1, 3), (3, 3), (2, 2)]),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0, 2),
)
def test_warm_hooi_has_orthonormal_factors_and_is_never_worse_than_hosvd(
    f, c, k, seed, dtype, decay
):
    w = (
        kernel(f, c, *k, seed=seed)
        * torch.exp(-decay * torch.arange(f, dtype=torch.float64))[:, None, None, None]
    )
    w = w.to(dtype)
    ranks = [(r1, r2) for r1 in range(1, f + 1) for r2 in range(1, c + 1)]
    rounding = 1e-3 if dtype == torch.float32 else 1e-7
    for plain, ours in zip(hosvd(w, ranks), warm_hooi(w, ranks), strict=True):
        assert output_error(w, reconstruct(ours)) <= output_error(w, reconstruct(plain)) + rounding
        torch.testing.assert_close(
            ours.factor_out.T @ ours.factor_out,
            torch.eye(ours.factor_out.shape[1], dtype=ours.core.dtype),
        )
        torch.testing.assert_close(
            ours.factor_in @ ours.factor_in.T, torch.eye(len(ours.factor_in), dtype=ours.core.dtype)
        )


def test_with_few_channels_a_chain_does_not_follow_a_worse_optimum():
    """Found on a trained ResNet-20 (0.8 % at one rank).

    On this kernel the chain alone ends 0.86 % above tensorly.
    """
    w = (
        kernel(12, 12, seed=27)
        * torch.exp(-0.2 * torch.arange(12, dtype=torch.float64))[:, None, None]
    )
    ranks = [(r, r) for r in range(2, 12, 2)]
    for ours, theirs in zip(warm_hooi(w, ranks), hooi(w, ranks), strict=True):
        assert output_error(w, reconstruct(ours)) <= 1.005 * output_error(w, reconstruct(theirs))


def test_hosvd_stands_where_the_sweeps_end_worse(monkeypatch):
    w = kernel()

    def worst(sides, v, r1, r2):
        return falling(-sides.gram_out)[1], falling(-sides.gram_in)[1]

    monkeypatch.setattr(tucker, "_sweeps", worst)
    for ours, plain in zip(warm_hooi(w, RANKS), hosvd(w, RANKS), strict=True):
        torch.testing.assert_close(reconstruct(ours), reconstruct(plain))


def test_a_covariance_that_rounding_made_indefinite_is_solved_with_a_larger_ridge():
    w, x = kernel(), patches()
    values, vectors = torch.linalg.eigh(covariance(x))
    values[:3] = -1e-4 * values.mean()
    s = (vectors * values) @ vectors.T
    for dtype in (torch.float32, torch.float64):
        ours = data_aware(w, [(4, 5)], s.to(dtype))[0]
        assert output_error(w, reconstruct(ours), covariance(x)) < output_error(
            w, reconstruct(hosvd(w, [(4, 5)])[0]), covariance(x)
        )


def test_a_kernel_of_zeros_is_decomposed():
    for method in ("warm_hooi", "hosvd", "data"):
        found = decompose(torch.zeros(4, 3, 3, 3), [(2, 2), (4, 3)], method, torch.eye(27))
        assert all(not reconstruct(factors).any() for factors in found), method


def cases():
    x = patches()
    dead = x.reshape(-1, 5, 9).clone()
    dead[:, 2] = 0
    return {
        "ordinary": x,
        "dead channel": dead.flatten(1),
        "fewer patches than dimensions": patches(n=7),
        "one patch": patches(n=1),
        "all dead": torch.zeros_like(x),
        "constant channel": torch.cat([torch.ones(400, 9, dtype=torch.float64), x[:, 9:]], dim=1),
        "white": patches(correlated=False),
    }


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("rank", RANKS)
def test_data_aware_error_is_never_above_hosvds(case, rank, device):
    w, s = kernel().to(device), covariance(cases()[case]).to(device)
    plain, ours = hosvd(w, [rank])[0], data_aware(w, [rank], s)[0]
    assert all(torch.isfinite(t).all() for t in ours)
    assert output_error(w, reconstruct(ours), s) <= output_error(w, reconstruct(plain), s) + 1e-12


@settings(max_examples=60, deadline=None)
@example(1, 5, (1, 3), torch.float32, 5, 1)  # a single patch that the kernel nearly cancels
@example(1, 6, (2, 2), torch.float32, 33, 1)  # a ridge below float32's rounding
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([(1, 3), (3, 1), (2, 2)]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 1000),
    st.integers(1, 60),
)
def test_data_aware_error_is_never_above_hosvds_at_random(f, c, k, dtype, seed, n):
    w = kernel(f, c, *k, seed=seed)
    s = covariance(patches(c, k[0] * k[1], n, seed + 1)).to(dtype)
    # Energies are told apart to |W|^2 tr(S) eps: much of the output's if the kernel cancels it.
    output = (w.flatten(1) @ s.double() * w.flatten(1)).sum()
    cancelled = w.square().sum() * s.double().trace() / output
    rounding = (16 * torch.finfo(dtype).eps * cancelled).sqrt() if dtype == torch.float32 else 0
    ranks = [(r1, r2) for r1 in range(1, f + 1) for r2 in range(1, c + 1)]
    for plain, ours in zip(hosvd(w, ranks), data_aware(w, ranks, s), strict=True):
        assert (
            output_error(w, reconstruct(ours), s)
            <= output_error(w, reconstruct(plain), s) + rounding
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_patch_does_not_blow_up_the_core(dtype):
    """A ridge below float32's rounding once made a core 142 times as large as the kernel."""
    w, s = kernel(1, 6, 2, 2, seed=33), covariance(patches(6, 4, 1, 34)).to(dtype)
    for factors in data_aware(w, [(1, r2) for r2 in range(1, 7)], s):
        assert factors.core.norm() <= 2 * w.norm()


def misleading():
    """Return a kernel whose channels share no output, and patches.

    Channel 0 is large and hardly varies within a patch, and its kernel takes a difference.
    """
    w = torch.zeros(6, 5, 3, 3, dtype=torch.float64)
    w[0, 0, 0, :2] = torch.tensor([0.5, -0.5])
    w[1:5, 1], w[5, 2] = kernel()[1:5, 1], 0.1 * kernel()[5, 2]
    x = patches(correlated=False)
    x[:, :9] = 100 * x[:, :1] + 1e-3 * x[:, :9]
    return w, x


def test_a_smooth_channel_that_its_kernel_cancels_does_not_mislead_the_closed_form():
    """`factor_in` by position-wise covariance is worse here than plain HOSVD.

    HOSVD's must be taken, and fitted.
    """
    w, x = misleading()
    s = covariance(x)
    plain, ours = hosvd(w, [(4, 1)])[0], data_aware(w, [(4, 1)], s)[0]
    channel_0 = torch.eye(5, dtype=torch.float64)[:1]  # what the closed form takes
    errors = [
        output_error(w, fitted_kernel(fit_behind(v, w, s, [1]), 4, 1), s)
        for v in (channel_0, plain.factor_in)
    ]
    assert errors[1] < output_error(w, reconstruct(plain), s) < 0.3 * errors[0]
    assert output_error(w, reconstruct(ours), s) == pytest.approx(errors[1])


def test_data_aware_factors_are_balanced():
    ours = data_aware(kernel(), [(4, 3)], covariance(patches()))[0]
    torch.testing.assert_close(ours.factor_in @ ours.factor_in.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(
        ours.factor_out.T @ ours.factor_out, torch.eye(4, dtype=torch.float64)
    )


def test_full_rank_is_exact_by_every_method():
    w, s = kernel(), covariance(patches())
    for method in ("warm_hooi", "hosvd", "hooi", "data"):
        torch.testing.assert_close(reconstruct(decompose(w, [(6, 5)], method, s)[0]), w)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_low_rank_by_the_data_is_the_truncated_svd_of_the_outputs(rank, device):
    w, x = kernel(k1=1, k2=1).flatten(1), patches(kk=1)
    y = (x @ w.T).numpy()
    u, s, vt = np.linalg.svd(y, full_matrices=False)
    (factors,) = decompose(w.to(device), [(rank,)], "data", covariance(x).to(device))
    ours = x @ reconstruct(factors).cpu().T
    np.testing.assert_allclose(
        ours, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-8 * np.abs(y).max()
    )


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_factors_of_a_matrix_share_its_singular_values_evenly(rank):
    """Oracle: numpy's truncated SVD, also of a matrix of less rank than is asked for."""
    for w in (
        kernel(k1=1, k2=1).flatten(1),
        kernel(6, 2, 1, 1).flatten(1) @ kernel(2, 5)[..., 0, 0],
    ):
        u, s, vt = np.linalg.svd(w.numpy(), full_matrices=False)
        left, right = decompose(w, [(rank,)])[0]
        expected = u[:, :rank] * s[:rank] @ vt[:rank]
        np.testing.assert_allclose(left @ right, expected, atol=1e-10)
        even = np.diag(s[:rank])
        np.testing.assert_allclose(left.T @ left, even, atol=1e-6)
        np.testing.assert_allclose(right @ right.T, even, atol=1e-6)


def test_a_covariance_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(45, 45\).*found \(5, 5\)"):
        data_aware(kernel(), [(2, 2)], torch.eye(5))
    with pytest.raises(ValueError, match="needs the covariance"):
        decompose(kernel(), [(2, 2)], "data")


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_without_kernel_positions_data_aware_tucker_is_eckart_youngs_optimum(rank):
    """Oracle: for a 1x1 kernel the truncated SVD of the outputs is the best.

    HOSVD of the weights is not.
    """
    w, x = (
        kernel(k1=1, k2=1),
        patches(kk=1) * torch.tensor([30.0, 0.1, 5.0, 1.0, 0.01], dtype=torch.float64),
    )
    y = (x @ w.flatten(1).T).numpy()
    s = np.linalg.svd(y, compute_uv=False)
    best = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
    ours = output_error(
        w, reconstruct(data_aware(w, [(rank, rank)], covariance(x))[0]), covariance(x)
    )
    assert ours == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert best < output_error(w, reconstruct(hosvd(w, [(rank, rank)])[0]), covariance(x))


def test_where_positions_are_uncorrelated_the_closed_form_is_weighted_hosvd_or_better():
    """Oracle: with S = S_C (x) I the problem is Tucker-2 of W x_C S_C^(1/2).

    tensorly's HOSVD approximates that.
    """
    w = kernel()
    mixing = (
        torch.randn(5, 5, dtype=torch.float64)
        * torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1], dtype=torch.float64)[:, None]
    )
    s_in = mixing.T @ mixing
    values, vectors = np.linalg.eigh(s_in.numpy())
    weighted = tl.tenalg.mode_dot(w.numpy(), (vectors * np.sqrt(values)) @ vectors.T, 1)
    (core, factors), _ = tl.decomposition.partial_tucker(
        weighted, rank=[3, 2], modes=[0, 1], init="svd", n_iter_max=1
    )
    theirs = np.linalg.norm(
        weighted - tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    ) / np.linalg.norm(weighted)
    s = torch.kron(s_in, torch.eye(9, dtype=torch.float64))
    ours = output_error(w, reconstruct(data_aware(w, [(3, 2)], s)[0]), s)
    assert ours <= theirs * 1.02
    assert ours < 0.9 * output_error(w, reconstruct(hosvd(w, [(3, 2)])[0]), s)


def test_an_unknown_method_is_refused():
    with pytest.raises(
        ValueError, match="decomposition: expected one of warm_hooi, hosvd, hooi, data, found 'svd'"
    ):
        decompose(kernel(), [(2, 2)], "svd")


def three_layers():
    """Return kernels and covariances of one shape; the second needs HOSVD's ``factor_in``."""
    w, x = misleading()
    covariances = [covariance(samples) for samples in (patches(), x, patches(seed=9))]
    return torch.stack([kernel(), w, kernel(seed=4)]), torch.stack(covariances)


@pytest.mark.parametrize("ranks", [[(3, 4), (4, 1)], [(2, 2), (6, 5)]])
@pytest.mark.parametrize("method", ["hosvd", "warm_hooi", "hooi", "data"])
def test_kernels_decomposed_together_are_what_each_is_alone(method, ranks, device):
    weights, covariances = (x.to(device) for x in three_layers())
    found, plain = decompose_all(weights, ranks, method, covariances)
    # At full rank HOSVD is exact.
    assert plain.tolist() == [[method == "data" and rank == (6, 5) for rank in ranks]] * 3
    for i, (w, s) in enumerate(zip(weights, covariances, strict=True)):
        for together, alone in zip(found, decompose(w, ranks, method, s), strict=True):
            ours = reconstruct(Tucker2(*(value[i] for value in together)))
            # CUDA finds the eigenvectors of several matrices by another method than those of one.
            near = 1e-6 * float(w.abs().max())
            torch.testing.assert_close(ours, reconstruct(alone), rtol=0, atol=near)


def test_matrices_decomposed_together_are_what_each_is_alone(device):
    weights = torch.stack([kernel(k1=1, k2=1, seed=seed).flatten(1) for seed in range(3)])
    covariances = torch.stack([covariance(patches(kk=1, seed=seed)) for seed in range(3)])
    for method in ("data", "hosvd"):
        found, _ = decompose_all(weights.to(device), [(2,), (5,)], method, covariances.to(device))
        for i, (w, s) in enumerate(zip(weights, covariances, strict=True)):
            for (left, right), alone in zip(
                found, decompose(w, [(2,), (5,)], method, s), strict=True
            ):
                torch.testing.assert_close((left[i] @ right[i]).cpu(), reconstruct(alone))


@pytest.mark.parametrize("method", ["hosvd", "data"])
def test_the_device_is_waited_for_no_more_often_for_more_ranks_or_layers(method, device):
    weights, covariances = (value.to(device) for value in three_layers())
    numbers = set()
    for layers in (1, 3):
        for ranks in ([(4, 1), (6, 5)], [(r1, r2) for r1 in range(1, 7) for r2 in range(1, 6)]):
            with waits() as found:
                decompose_all(weights[-layers:], ranks, method, covariances[-layers:])
            numbers.add(len(found))
    assert len(numbers) == 1, numbers
    assert max(numbers) <= 5 * (method == "data")


def test_products_are_as_precise_as_the_numbers_where_training_allows_less(monkeypatch):
    seen = []
    monkeypatch.setattr(
        tucker, "_grams", lambda w, real=tucker._grams: (seen.append(precision()), real(w))[1]
    )
    precision = torch.get_float32_matmul_precision
    before = precision()
    torch.set_float32_matmul_precision("high")
    try:
        for method in ("hosvd", "warm_hooi", "data"):
            decompose(kernel(), RANKS, method, covariance(patches()))
        assert precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"] * 3
