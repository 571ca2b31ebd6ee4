"""The toy's mathematics against hand-computed cases, its rules, Theorem 2.2, and the study from end to end."""

import json
import math
from pathlib import Path

import pytest
import torch

from nanoadam.paper.toy import experiment as toy
from nanoadam.paper.toy import network
from nanoadam.paper.toy import report as toy_report
from nanoadam.paper.toy.network import Choice, Nets


def nets(*neurons: tuple[float, float, float]) -> Nets:
    """One network from (a, w_1, w_2)."""
    values = torch.tensor([neurons], dtype=torch.float64)
    return Nets(values[..., 0], values[..., 1:])


def drawn(seeds: int = 4, extra: int = 1, samples: int | None = None) -> tuple[Nets, Nets, torch.Tensor | None]:
    return network.draw(range(seeds), extra, "unit", 1.0, samples)


def random_choice(batch: int, by_gradient: bool, keep: int, neurons: bool = False, once: bool = True) -> Choice:
    return Choice(torch.full((batch,), by_gradient), torch.full((batch,), keep), neurons, once)


NOTHING = nets((0.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("teacher", "loss"),
    [
        (nets((1.0, 1.0, 0.0)), 0.5),  # E relu(x_1)^2
        (nets((-1.0, 2.0, 0.0)), 2.0),  # grows with the square of the length, whatever the sign
        (nets((1.0, 1.0, 0.0), (1.0, 0.0, 1.0)), 1 + 1 / math.pi),  # right angle: E relu(x_1) relu(x_2) = 1 / 2 pi
        (nets((1.0, 1.0, 0.0), (1.0, -1.0, 0.0)), 1.0),  # opposite: never active together
        (nets((1.0, 1.0, 0.0), (-1.0, 1.0, 0.0)), 0.0),  # cancel each other
    ],
)
def test_the_loss_is_the_mean_over_all_inputs(teacher: Nets, loss: float) -> None:
    assert network.test_loss(NOTHING, teacher).item() == pytest.approx(loss, abs=1e-12)


def test_the_gradient_is_that_of_half_the_loss() -> None:
    student, teacher, _ = drawn()
    student = Nets(*(part + 0.1 * torch.randn_like(part) for part in student))
    leaves = Nets(*(part.clone().requires_grad_() for part in student))
    (network.test_loss(leaves, teacher) / 2).sum().backward()
    found = network.gradient(student, teacher)
    torch.testing.assert_close(found.a, leaves.a.grad)
    torch.testing.assert_close(found.w, leaves.w.grad)


def test_the_gradient_on_samples_is_that_of_half_their_mean_squared_error() -> None:
    student, teacher, inputs = drawn(samples=7)
    assert inputs is not None
    leaves = Nets(*(part.clone().requires_grad_() for part in student))

    def output(net: Nets) -> torch.Tensor:
        return (torch.relu(inputs @ net.w.transpose(1, 2)) * net.a[:, None, :]).sum(2)

    ((output(leaves) - output(teacher)).square().mean(1) / 2).sum().backward()
    found = network.gradient(student, teacher, inputs)
    torch.testing.assert_close(found.a, leaves.a.grad)
    torch.testing.assert_close(found.w, leaves.w.grad)


def test_students_start_as_nothing_and_seeds_do_not_depend_on_their_neighbours() -> None:
    student, teacher, _ = drawn()
    zero = Nets(torch.zeros_like(teacher.a), teacher.w)
    assert network.test_loss(student, zero).max() < 1e-12
    assert torch.equal(student.a[:, :10], -student.a[:, 10:])
    alone, _, _ = network.draw([3], 1, "unit", 1.0, None)
    assert torch.equal(alone.w[0], student.w[3])


@pytest.mark.parametrize(("kind", "length"), [("unit", 1.0), ("sqrt", 5 / math.sqrt(2)), ("mean", 2.5)])
def test_teachers_are_normalised_as_told(kind: str, length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.tensor([3.0, 4.0], dtype=torch.float64).expand(*shape)
                        if len(shape) == 2 else torch.ones(shape, dtype=torch.float64))  # fmt: skip
    _, teacher, _ = network.draw([0], 1, kind, 1.0, None)
    assert teacher.w.norm(dim=2).flatten().tolist() == pytest.approx([length] * 3)
    assert set(teacher.a.flatten().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("by_gradient", [False, True])
@pytest.mark.parametrize("neurons", [False, True])
def test_only_the_chosen_weights_change(by_gradient: bool, neurons: bool) -> None:
    student, teacher, _ = drawn()
    rate = torch.full((4,), 0.01, dtype=torch.float64)
    choice = random_choice(4, by_gradient, keep=3, neurons=neurons)
    end = network.descend(student, teacher, rate, 5, choice).end
    moved_a, moved_w = end.a != student.a, end.w != student.w
    assert moved_a.sum(1).tolist() == [3] * 4
    assert moved_w.flatten(1).sum(1).tolist() == [6] * 4
    slope = network.gradient(student, teacher)
    score = -slope.a.abs() if by_gradient else student.a.abs()
    if neurons:
        assert torch.equal(moved_w.all(2), moved_a)
        score = (
            -(slope.a.square() + slope.w.square().sum(2)) if by_gradient else student.a.abs() * student.w.norm(dim=2)
        )
    for row in range(4):
        assert score[row][moved_a[row]].max() <= score[row][~moved_a[row]].min()


def test_a_choice_at_every_step_reaches_more_weights_than_one_choice() -> None:
    student, teacher, _ = drawn()
    rate = torch.full((4,), 0.5, dtype=torch.float64)
    count = {
        once: int(
            (
                network.descend(student, teacher, rate, 50, random_choice(4, False, 4, once=once)).end.a != student.a
            ).sum()
        )
        for once in (True, False)
    }
    assert count[True] == 16 < count[False]


def test_the_critical_rate_of_one_unit_neuron_is_two() -> None:
    # derivatives by a and by w along itself: relu(w x) and a 1[w x > 0] w x / |w|, so all of the Hessian is 1/2
    assert network.critical_rate(nets((1.0, 0.6, 0.8))).item() == pytest.approx(2.0, rel=1e-4)
    assert math.isnan(network.critical_rate(nets((math.inf, 1.0, 0.0))).item())


def test_below_the_critical_rate_descent_stays_at_a_minimum_and_above_it_leaves() -> None:
    teacher = nets((1.0, 0.6, 0.8))
    start = nets((1.001, 0.6, 0.8))
    losses = {
        rate: network.test_loss(network.descend(start, teacher, torch.tensor([rate]).double(), 200).end, teacher).item()
        for rate in (1.9, 2.1)
    }
    before = network.test_loss(start, teacher).item()
    assert losses[1.9] < before < losses[2.1]


def test_theorem_2_2_the_smallest_neuron_of_the_right_sign_learns_the_added_one() -> None:
    for row in toy.theorem(seeds=range(5), steps=4_000):
        assert row["loss_before"] == pytest.approx(0.5, abs=0.02)
        assert row["loss"] < 2e-3
        assert row["error"] < 0.05
        assert row["others_moved"] == 0.0
        # from about 0 to |a| = |w| = 1: the square root of 2, less what was there, more if it has to turn round
        assert 0.9 < row["distance"] < 2.0


def test_of_two_rules_each_is_run_on_the_same_students() -> None:
    config = toy.ToyConfig(seeds=(0, 1, 2), steps=200, pretrain_loss_scale=0.25)
    result = toy.run(config)
    assert len(result["pretrain"]["test_loss"]) == 3
    for rule in toy.RULES:
        assert result[rule]["diverged"] == 0
        assert len(result[rule]["test_loss"]["values"]) == 3
        assert result[rule]["test_loss"]["mean"] < 0.5 < result["pretrain"]["test_loss"][0] + 0.6
    together = toy.run_many([toy.ToyConfig(seeds=(0, 1, 2), steps=200, density=0.5), config])
    assert together[1]["small weights"] == result["small weights"]


def test_what_diverges_is_counted_and_left_out() -> None:
    result = toy.run(toy.ToyConfig(seeds=(0, 1), steps=300, finetune_rate=40.0, density=1.0))
    for rule in toy.RULES:
        assert result[rule]["diverged"] == 2
        assert math.isnan(result[rule]["test_loss"]["mean"])
        assert result[rule]["distance"]["values"] == [None, None]


@pytest.mark.parametrize(
    ("small", "large", "agreed"),
    [
        ((0.01, 0.02, 0), (0.03, 0.05, 0), {"loss": True, "distance": True}),
        ((0.03, 0.05, 0), (0.01, 0.02, 0), {"loss": False, "distance": False}),
        ((0.0001, 0.02, 0), (0.0009, 0.05, 0), {"loss": False, "distance": True}),  # both have learned it
        ((0.03, 0.05, 0), (0.01, 0.02, 4), {"loss": True, "distance": False}),
        ((0.01, 0.05, 4), (0.03, 0.02, 0), {"loss": False, "distance": False}),
    ],
)
def test_agreement_with_the_paper(
    small: tuple[float, float, int], large: tuple[float, float, int], agreed: dict[str, bool]
) -> None:
    result = {
        rule: {"test_loss": {"mean": loss}, "distance": {"mean": far}, "diverged": diverged}
        for rule, (loss, far, diverged) in zip(toy.RULES, (small, large), strict=True)
    }
    assert toy.agrees(result) == agreed


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"extra": 3}, "extra must be 1 or 2"),
        ({"density": 0.0}, "density"),
        ({"teacher": "big"}, "unit"),
        ({"seeds": ()}, "seed"),
    ],
)
def test_bad_settings_are_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        toy.ToyConfig(**keys)


def test_the_study_writes_a_whole_folder(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    results = toy.reproduce("smoke", tmp_path / "toy", lambda what, done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    folder = tmp_path / "toy"
    assert {p.name for p in folder.iterdir()} == {
        "config.toml", "manifest.json", "metrics.jsonl", "report.html", "results.json",
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    assert "table 8" in page and "0.0094 ± 0.012" in page and "Theorem 2.2" in page and "src=" not in page
    assert json.loads((folder / "manifest.json").read_text())["seeds"] == [0, 1]
    assert json.loads((folder / "results.json").read_text())["verdict"] == results["verdict"]
    head, *rows = toy_report.lines(results)
    assert all(len(row) == len(head) for row in rows)
    with pytest.raises(FileExistsError, match="not empty"):
        toy.reproduce("smoke", folder)
    with pytest.raises(ValueError, match="full, smoke"):
        toy.reproduce("half", tmp_path / "other")
