# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Units of held-out variation and image scores against numpy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring import HeldOutUnits, ImageScore, PositionStatistics
from threads import played

SIZE = (4, 5)


def _values(count: int, position: float, noise: float, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """Draw maps whose mean and log standard deviation differ between positions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, *size, generator=generator)
    mean, log_deviation = torch.randn(2, *size, generator=torch.Generator().manual_seed(99))
    return 10 + position * mean + noise * (0.3 * position * log_deviation).exp() * drawn


def _shrunk(
    values: Tensor, cluster: Tensor | None = None, processes: DistributedContext = ALONE
) -> tuple[Tensor, Tensor]:
    cluster = torch.zeros(len(values), dtype=torch.int64) if cluster is None else cluster
    numbers = torch.arange(len(values))
    statistics = PositionStatistics(int(cluster.max()) + 1, values.shape[1:], torch.device("cpu"))
    for batch in numbers[numbers % processes.count == processes.rank].split(7):
        statistics.update(values[batch], cluster[batch], batch)
    return statistics.shrunk(processes)


def _reliability(even: np.ndarray, odd: np.ndarray) -> float:
    correlation = max(0.0, float(np.corrcoef(even.flatten(), odd.flatten())[0, 1]))
    return 2 * correlation / (1 + correlation)


def _reference(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means and standard deviations of maps of one cluster."""
    found = []
    for statistic in (lambda x: x.mean(axis=0), lambda x: np.log(x.var(axis=0))):
        whole = statistic(values)
        reliability = _reliability(statistic(values[::2]), statistic(values[1::2]))
        found.append(whole.mean() + reliability * (whole - whole.mean()))
    return found[0], np.exp(found[1] / 2)


@pytest.mark.parametrize(("count", "position", "noise"), [(12, 1.0, 1.0), (51, 0.3, 2.0), (200, 5.0, 0.1)])
def test_units_are_shrunk_by_their_reliability(count: int, position: float, noise: float) -> None:
    values = _values(count, position, noise)
    for result, expected in zip(_shrunk(values), _reference(values.double().numpy()), strict=True):
        np.testing.assert_allclose(result[0].numpy(), expected, rtol=1e-6)


def test_each_cluster_has_units_of_its_own() -> None:
    values, cluster = torch.cat([_values(20, 1.0, 1.0), 3 * _values(31, 2.0, 1.0)]), (torch.arange(51) >= 20).long()
    mean, deviation = _shrunk(values, cluster)
    for index in range(2):  # the second starts with an even image, too
        own = values[cluster == index].double().numpy()
        for result, expected in zip((mean, deviation), _reference(own), strict=True):
            np.testing.assert_allclose(result[index].numpy(), expected, rtol=1e-6)


def test_where_position_does_not_matter_all_positions_share_one_unit() -> None:
    """Halves that disagree have a reliability of exactly 0."""
    noise = _values(40, 0.0, 1.0)
    noise[1::2] = 20 - noise[::2]  # the means of the halves are mirrored, their variances alike
    mean, _ = _shrunk(noise)
    torch.testing.assert_close(mean, torch.full_like(mean, 10.0))


def test_pure_noise_is_shrunk_to_almost_one_unit() -> None:
    spreads = []
    for seed in range(20):
        values = _values(40, 0.0, 1.0, seed, size=(20, 20))
        spreads.append(float(_shrunk(values)[0].std() / values.mean(dim=0).std()))
    assert np.mean(spreads) < 0.1


def test_where_position_matters_each_has_its_own_unit() -> None:
    values = _values(400, 3.0, 0.5)
    mean, deviation = _shrunk(values)
    torch.testing.assert_close(mean[0].float(), values.mean(dim=0), rtol=0, atol=0.01)
    torch.testing.assert_close(deviation[0].float(), values.std(dim=0, correction=0), rtol=0.02, atol=0)


def test_new_normal_values_have_mean_0_and_deviation_1_at_each_position() -> None:
    units = HeldOutUnits()
    units.fit(*_shrunk(_values(2000, 3.0, 0.5)))
    result = units(_values(2000, 3.0, 0.5, seed=1), torch.zeros(2000, dtype=torch.int64))
    assert result.mean(dim=0).abs().max() < 0.2
    torch.testing.assert_close(result.std(dim=0), torch.ones(SIZE), rtol=0.1, atol=0)


def test_values_are_in_the_units_of_their_cluster() -> None:
    mean, deviation = torch.randn(2, *SIZE), 1 + torch.rand(2, *SIZE)
    units, values, cluster = HeldOutUnits(), torch.randn(3, *SIZE), torch.tensor([1, 0, 1])
    units.fit(mean, deviation)
    torch.testing.assert_close(units(values, cluster), (values - mean[cluster]) / deviation[cluster])


def test_identical_images_leave_finite_units() -> None:
    for value in (0.0, 1.0, -1e4):
        units = HeldOutUnits()
        units.fit(*_shrunk(torch.full((5, *SIZE), value)))
        assert torch.isfinite(units(torch.zeros(1, *SIZE), torch.zeros(1, dtype=torch.int64))).all()


@pytest.mark.parametrize("count", [0, 1])
def test_cluster_of_fewer_than_two_images_takes_the_units_of_all(count: int) -> None:
    values = _values(20, 1.0, 1.0)
    cluster = torch.tensor(count * [1] + (19 - count) * [0] + [2])
    cluster[-2:] = 2
    mean, deviation = _shrunk(values, cluster)
    for result, expected in zip((mean, deviation), _shrunk(values), strict=True):
        torch.testing.assert_close(result[1], expected[0])


def test_units_are_those_of_one_process() -> None:
    values, cluster = _values(23, 1.0, 1.0), torch.arange(23) // 12
    expected = _shrunk(values, cluster)
    for count in (2, 3):
        for result in played(count, lambda processes: _shrunk(values, cluster, processes)):
            torch.testing.assert_close(result, expected)


def test_image_score_looks_at_the_maximum_and_the_mean_of_the_largest_tenth() -> None:
    values = torch.arange(50.0)[torch.randperm(50)].reshape(1, 5, 10)
    torch.testing.assert_close(ImageScore.terms(values), torch.tensor([[49.0, 47.0]]))  # 45 to 49
    torch.testing.assert_close(ImageScore.terms(values[:, :1, :2])[0, 1], values[0, 0, :2].max())  # at least one


def _terms() -> tuple[Tensor, Tensor]:
    terms = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    cluster = torch.tensor([0, 1]).repeat(25)
    terms[cluster == 1] = 10 * terms[cluster == 1] + 100
    terms[0] = 1e6  # an odd image
    return terms, cluster


def test_image_score_has_medians_and_spreads_of_each_cluster() -> None:
    """A cluster without images takes those of all."""
    terms, cluster = _terms()
    score = ImageScore()
    score.fit(terms, cluster, 3)
    values = torch.rand(6, *SIZE)
    found = score.terms(values).double().numpy()
    training = terms.double().numpy()
    for index, own in ((0, training[::2]), (1, training[1::2]), (2, training)):
        median, above = np.quantile(own, (0.5, 0.8413), axis=0)
        expected = ((found - median) / (above - median)).sum(axis=1)
        result = score(values, torch.full((6,), index))
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_one_odd_image_hardly_moves_the_image_score() -> None:
    terms = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    values, cluster = torch.rand(6, *SIZE), torch.zeros(200, dtype=torch.int64)
    plain, disturbed = ImageScore(), ImageScore()
    plain.fit(terms, cluster, 1)
    disturbed.fit(torch.cat([terms[1:], torch.full((1, 2), 1e9)]), cluster, 1)
    torch.testing.assert_close(disturbed(values, cluster[:6]), plain(values, cluster[:6]), rtol=0.1, atol=0.1)


def test_identical_images_leave_a_finite_image_score() -> None:
    score = ImageScore()
    score.fit(torch.full((5, 2), 3.0), torch.zeros(5, dtype=torch.int64), 1)
    assert torch.isfinite(score(torch.rand(2, *SIZE), torch.zeros(2, dtype=torch.int64))).all()


def test_state_dicts_restore_units_and_image_score() -> None:
    units, score, values, cluster = HeldOutUnits(), ImageScore(), torch.rand(3, *SIZE), torch.tensor([0, 1, 0])
    units.fit(torch.randn(2, *SIZE), 1 + torch.rand(2, *SIZE))
    score.fit(*_terms(), 2)
    for module in (units, score):
        other = type(module)()
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other(values, cluster), module(values, cluster), rtol=0, atol=0)
