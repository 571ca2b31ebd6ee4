"""Each measure on cases small enough to be computed by hand, and the selection against a sort."""

import math

import pytest
import torch

import nanoadam
from nanoadam import analysis
from nanoadam.analysis import ranks


def brute(tensor: torch.Tensor, k: int) -> torch.Tensor:
    magnitude = tensor.float().flatten().abs().nan_to_num(nan=math.inf, posinf=3e38)
    chosen = torch.zeros(magnitude.numel(), dtype=torch.bool)
    chosen[magnitude.argsort(stable=True)[:k]] = True
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 17, 50, 99, 100])
def test_the_smallest_are_those_of_a_stable_sort_however_it_is_cut(
    dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PIECE", 7)
    torch.manual_seed(k)
    tensor = (torch.randn(10, 10) * torch.tensor([1e-6, 1.0, 1e3])[torch.randint(3, (10, 10))]).to(dtype)
    tensor[2] = 0.0  # ties, more than a piece
    tensor[3, :5] = -tensor[4, :5]
    tensor[9, 0] = math.nan
    for count, smallest in zip((k, 31), ranks.smallest(tensor, (k, 31)), strict=True):
        found = torch.cat([smallest(piece) for (piece,) in ranks.pieces(tensor)])
        assert torch.equal(found, brute(tensor, count))


def test_pieces_are_flat_float32_and_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PIECE", 4)
    tensor = torch.arange(10.0).view(2, 5).t()  # not contiguous
    found = [piece for (piece,) in ranks.pieces(tensor.bfloat16())]
    assert [len(piece) for piece in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), tensor.flatten())
    assert found[0].dtype == torch.float32


WEIGHT = torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.5], [-0.6, 0.7, -0.8, 0.9, -1.0]])
GRADIENT = torch.tensor([[10.0, 9.0, -8.0, 0.1, 0.2], [0.3, 0.4, -0.5, 0.6, 0.7]])


def test_ratio_by_hand() -> None:
    # the 3 largest gradients lie on 0.1, 0.2, 0.3: median 0.2; the 5 smallest on 0.4 ... 0.8: at most 0.8
    assert analysis.ratio(WEIGHT, GRADIENT, top=0.3, bottom=0.5) == pytest.approx(0.25)
    # of an even number the median lies between: 0.1 and 0.2
    assert analysis.ratio(WEIGHT, GRADIENT, top=0.2, bottom=0.5) == pytest.approx(0.15 / 0.8)
    # with the paper's shares a single element is the top, and 8 of 10 the bottom
    assert analysis.ratio(WEIGHT, GRADIENT) == pytest.approx(0.1 / 1.0)


def test_ratio_is_small_on_a_hyperbola_and_near_one_where_gradients_do_not_care() -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 1000)
    hyperbola = analysis.ratio(weight, 1 / weight)
    nothing = analysis.ratio(weight, torch.randn(100, 1000))
    assert hyperbola < 1e-3
    assert 0.1 < nothing < 0.25  # the median magnitude over the largest of 80,000: 0.67 / 4.3
    assert analysis.ratio(weight, weight) > 2


def test_ratio_without_weights_below_is_not_a_number() -> None:
    assert math.isnan(analysis.ratio(torch.zeros(10), torch.arange(10.0)))


def test_overlap_by_hand() -> None:
    # the 4 largest gradients lie on 0.1, 0.2, 0.3 and 1.0; the 2 smallest weights are the first two of them
    assert analysis.overlap(WEIGHT, GRADIENT, top=0.4, smallest=0.2) == 0.5
    assert analysis.overlap(WEIGHT, GRADIENT, top=0.3, smallest=0.3) == 1.0
    assert analysis.overlap(WEIGHT, WEIGHT, top=0.3, smallest=0.3) == 0.0
    assert analysis.relation(WEIGHT, GRADIENT) == {
        "ratio": pytest.approx(0.1), "independent": pytest.approx(0.5), "overlap": 1.0,
    }  # fmt: skip


def test_the_ratio_of_independent_gradients_is_near_its_estimate_even_with_outliers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 1000)
    weight.flatten()[:50] *= 30
    estimate = analysis.independent_ratio(weight)
    assert estimate < 0.02  # five outliers in ten thousand, and r says "hyperbolic" of anything
    assert analysis.ratio(weight, torch.randn(100, 1000)) == pytest.approx(estimate, rel=0.5)
    assert analysis.ratio(weight, 1 / weight) < 0.1 * estimate
    assert math.isnan(analysis.independent_ratio(torch.zeros(3)))


@pytest.mark.parametrize("measure", [analysis.ratio, analysis.overlap, analysis.scatter, analysis.relation])
def test_two_shapes_are_refused(measure) -> None:
    with pytest.raises(ValueError, match=r"\[2, 5\] and \[5, 2\]"):
        measure(WEIGHT, GRADIENT.t())
    with pytest.raises(ValueError, match="without elements"):
        measure(torch.empty(0), torch.empty(0))


def test_shift_by_hand() -> None:
    before = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0])
    after = before.clone()
    after[0] += 0.3  # of the smallest three
    after[2] -= 0.6
    after[4] += 2.0  # of the four between
    after[9] -= 3.0  # of the largest three
    found = analysis.shift(before, after)
    assert found.counts == (3, 3, 4)
    assert found.to_dict() == {
        "numel": 10, "touched": 0.4, "l2": pytest.approx(math.sqrt(0.09 + 0.36 + 4 + 9)),
        "smallest": pytest.approx(0.3), "largest": pytest.approx(1.0), "rest": pytest.approx(0.5),
    }  # fmt: skip


def test_shifts_add_up_and_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    before, after = torch.randn(2, 33, 5).unbind()
    whole = analysis.shift(before, after)
    monkeypatch.setattr(ranks, "PIECE", 11)
    cut = analysis.shift(before, after)
    assert cut.counts == whole.counts and cut.changed == whole.changed == 165
    assert cut.sums == pytest.approx(whole.sums)
    assert cut.l2 == pytest.approx(float((after - before).norm()), rel=1e-6)
    both = sum([whole, whole], analysis.Shift())
    assert both.numel == 330 and both.l2 == pytest.approx(whole.l2 * math.sqrt(2))


def test_touched_counts_bits_and_low_precision_is_compared_by_value() -> None:
    before = torch.tensor([1.0, math.nan, 0.0, 2.0])
    assert analysis.shift(before, before.clone()).touched == 0.0
    assert analysis.shift(before[2:].bfloat16(), before[2:]).touched == 0.0
    after = torch.tensor([1.0 + 2**-23, math.nan, 0.0, -2.0])
    assert analysis.shift(before, after).touched == 0.5


def test_a_change_that_is_not_a_number_stays_in_its_group() -> None:
    before = torch.arange(1.0, 11.0)
    after = before.clone()
    after[0] = math.nan
    found = analysis.shift(before, after).to_dict()
    assert math.isnan(found["smallest"]) and (found["largest"], found["rest"]) == (0.0, 0.0)


def test_one_weight_is_neither_small_nor_large() -> None:
    found = analysis.shift(torch.tensor([1.0]), torch.tensor([3.0])).to_dict()
    assert (found["smallest"], found["largest"], found["rest"]) == (None, None, 2.0)


def test_shift_refuses_other_shapes_and_shares() -> None:
    with pytest.raises(ValueError, match=r"\[2\] and \[3\]"):
        analysis.shift(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"at most 0\.5, got 0\.6"):
        analysis.shift(torch.ones(2), torch.ones(2), share=0.6)


def test_scatter_keeps_the_extremes_and_follows_a_fixed_rule() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 300, 100).unbind()
    found = analysis.scatter(weight, gradient, points=200)
    assert found == analysis.scatter(weight, gradient, points=200)
    assert 200 <= len(found["weight"]) == len(found["gradient"]) <= 220
    assert max(found["weight"]) == pytest.approx(float(weight.abs().max()))
    assert max(found["gradient"]) == pytest.approx(float(gradient.abs().max()))
    pairs = set(zip(weight.abs().flatten().tolist(), gradient.abs().flatten().tolist(), strict=True))
    assert set(zip(found["weight"], found["gradient"], strict=True)) <= pairs


def test_effective_learning_rate_of_adamw_by_hand() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=0.5, weight_decay=0.0)
    p.grad = torch.tensor([1.5, 4.5])
    optimizer.step()
    # corrected for bias the second moment is the gradient's square: 0.1 / (1.5 + 0.5) and 0.1 / (4.5 + 0.5)
    assert analysis.effective_learning_rate(optimizer) == pytest.approx((0.05 + 0.02) / 2)


def test_effective_learning_rate_of_nanoadam_is_over_the_selected_weights() -> None:
    p = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    optimizer = nanoadam.NanoAdam(
        [p], lr=0.1, betas=(0.9, 0.99), eps=0.5, density=0.5, mask_interval=2, state_dtype=torch.float32
    )
    (p * torch.tensor([[1.5, 4.5, 9.5, 9.5]])).sum().backward()
    optimizer.step()
    assert analysis.effective_learning_rate(optimizer) == pytest.approx((0.05 + 0.02) / 2)
    optimizer.zero_grad()
    (p * 0).sum().backward()
    optimizer.step()
    # two updates of each: v = 0.99 * 0.01 * g^2, corrected by 1 - 0.99^2
    scale = math.sqrt(0.99 * 0.01 / (1 - 0.99**2))
    assert analysis.effective_learning_rate(optimizer) == pytest.approx(
        (0.1 / (1.5 * scale + 0.5) + 0.1 / (4.5 * scale + 0.5)) / 2, rel=1e-5
    )
    with torch.no_grad():
        p[0, 1] = 9.0  # leaves, and the weight of 3 enters with a count of its own
    optimizer.zero_grad()
    (p * torch.tensor([[0.0, 0.0, 9.5, 0.0]])).sum().backward()
    optimizer.step()
    old = math.sqrt(0.99**2 * 0.01 / (1 - 0.99**3))
    assert analysis.effective_learning_rate(optimizer) == pytest.approx(
        (0.1 / (1.5 * old + 0.5) + 0.1 / (9.5 + 0.5)) / 2, rel=1e-4
    )


def test_optimizers_without_second_moments_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="SGD keeps no second moments"):
        analysis.effective_learning_rate(optimizer)
