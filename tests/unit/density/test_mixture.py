# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The mixture against scipy and scikit-learn in float64, and against densities of each kind alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS
from torch import Tensor

from anomalib_osdirf.density import Density, PositionGaussian, PositionMixture, SumByKind, build_density
from anomalib_osdirf.density.mixture import clusters, cross_validated_nll, moments_of
from anomalib_osdirf.processes import ALONE, Processes
from threads import played

DIM, GRID = 4, 3


def _kind(number: int, count: int, seed: int = 0) -> Tensor:
    """Draw fields of one kind, ``(count, 4, 3, 3)``: of its own mean and covariance, both far from other kinds'."""
    generator = torch.Generator().manual_seed(number)
    scale = torch.randn(DIM, DIM, generator=generator)
    mean = 8 * torch.randn(DIM, GRID, GRID, generator=generator)
    noise = torch.randn(count, DIM, GRID, GRID, generator=generator.manual_seed(1000 * seed + number))
    return torch.einsum("de,nehw->ndhw", scale, noise) + mean


def _shuffled(*kinds: Tensor) -> Tensor:
    fields = torch.cat(kinds)
    return fields[torch.randperm(len(fields), generator=torch.Generator().manual_seed(0))]


def _fitted(
    fields: Tensor, num_clusters: int | str = "auto", processes: Processes = ALONE
) -> tuple[PositionMixture, Callable[[], Density]]:
    """Cluster fields by their own means, in batches."""
    density = PositionMixture(DIM, GRID, num_clusters)
    batches = fields[processes.rank :: processes.count].split(7)
    density.cluster(lambda: batches, lambda: batches, processes)
    return density, density.fit(batches, processes)


def test_one_kind_is_position_full() -> None:
    fields, test = _kind(0, 30), _kind(0, 5, seed=1)
    mixture, single = _fitted(fields, num_clusters=1)[0], PositionGaussian(DIM, GRID)
    single.fit(fields.split(7))
    assert mixture.num_kinds == 1
    torch.testing.assert_close(mixture(test), single(test), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mixture.squared_distance(test), single.squared_distance(test), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_clusters", [3, "auto"])
def test_images_are_scored_by_their_own_kind_which_nobody_names(num_clusters: int | str) -> None:
    """Against scikit-learn's and scipy's Gaussians of each kind alone; kinds of 40, 25 and 60 images, in any order."""
    kinds = [_kind(number, count) for number, count in enumerate((40, 25, 60))]
    density, _ = _fitted(_shuffled(*kinds), num_clusters)
    assert density.num_kinds == 3
    assert density.num_images == 125
    for number, training in enumerate(kinds):
        test = _kind(number, 4, seed=1)
        assert len(density.choose(test).unique()) == 1
        result = density(test)
        for row, column in np.ndindex(GRID, GRID):
            reference = OAS().fit(training[:, :, row, column].double().numpy())
            gaussian = multivariate_normal(reference.location_, reference.covariance_ + 1e-6 * np.eye(DIM))
            expected = -gaussian.logpdf(test[:, :, row, column].double().numpy())
            np.testing.assert_allclose(result[:, row, column].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_one_kind_of_image_is_not_divided() -> None:
    assert _fitted(_kind(0, 120))[0].num_kinds == 1


def test_features_tell_kinds_not_fields() -> None:
    alike, apart = _kind(0, 60), torch.cat([_kind(0, 30), _kind(1, 30)])
    for features, fields, count in ((alike, apart, 1), (apart, alike, 2)):
        density = PositionMixture(DIM, GRID)
        density.cluster(lambda batch=features: batch.split(7), lambda batch=fields: batch.split(7))
        assert density.num_kinds == count


def test_image_that_is_left_out_is_left_out_of_its_own_kind() -> None:
    kinds = [_kind(0, 20), _kind(1, 30)]
    fields = _shuffled(*kinds)
    left_out = _fitted(fields, num_clusters=2)[1]()
    alone = [PositionGaussian(DIM, GRID) for _ in kinds]
    expected = [gaussian.fit([kind])() for gaussian, kind in zip(alone, kinds, strict=True)]
    for field in fields.split(9):  # of both kinds in one batch
        for image in field:
            kind = int((kinds[1] == image).flatten(1).all(dim=1).any())
            for name in ("map", "squared_distance"):
                result = getattr(left_out, name)(field)[(field == image).flatten(1).all(dim=1)]
                reference = getattr(expected[kind], name)(image[None])
                torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


def test_image_that_chooses_otherwise_after_the_fit_is_not_taken_out_of_images_that_it_is_not_among() -> None:
    usual, odd = torch.randn(40, DIM, GRID, GRID, generator=torch.Generator().manual_seed(0)), 8 * torch.ones(1)
    density, _ = _fitted(torch.cat([usual, usual + odd]), num_clusters=2)
    between = usual[:2] + 3.6  # nearer the first kind, until the second becomes wide
    wide = torch.cat([usual + odd, usual + 2 * odd])
    kinds = density.choose(torch.cat([between, wide[:1]])).tolist()
    left_out = density.fit([usual, between, wide])()
    assert kinds[0] == kinds[1] != kinds[2] == density.choose(between)[0]
    torch.testing.assert_close(left_out(between), density(between))
    assert (left_out(wide) > density(wide)).all()


def test_prediction_does_not_depend_on_the_batch() -> None:
    density, _ = _fitted(torch.cat([_kind(number, 20) for number in range(3)]), num_clusters=3)
    test = torch.cat([_kind(number, 2, seed=1) for number in range(3)]) + 0.5
    torch.testing.assert_close(density(test), torch.cat([density(one[None]) for one in test]), rtol=1e-5, atol=1e-5)


def test_fit_anew_keeps_the_kinds_of_images_that_change_a_little() -> None:
    """As on the fields of a quantised network."""
    kinds = [_kind(number, 20) for number in range(2)]
    density, _ = _fitted(torch.cat(kinds), num_clusters=2)
    before = density.choose(torch.cat(kinds))
    density.fit([1.1 * kind + 0.2 for kind in kinds])
    torch.testing.assert_close(density.choose(1.1 * torch.cat(kinds) + 0.2), before)
    alone = PositionGaussian(DIM, GRID)
    alone.fit([1.1 * kinds[0] + 0.2])
    torch.testing.assert_close(density(kinds[0]), alone(kinds[0]), rtol=1e-3, atol=1e-3)


def test_kind_that_no_image_chooses_any_more_stays_finite() -> None:
    kinds = [_kind(number, 20) for number in range(2)]
    density, _ = _fitted(torch.cat(kinds), num_clusters=2)
    left_out = density.fit([kinds[0], kinds[1][:1]])()
    assert density.num_kinds == 2
    assert torch.isfinite(density(torch.cat(kinds))).all()
    assert torch.isfinite(left_out(torch.cat([kinds[0], kinds[1][:1]]))).all()


def test_clusters_of_a_few_odd_images_are_given_up() -> None:
    """A single odd image among the training images must not have Gaussians of its own."""
    usual, odd = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.full((1, 5), 100.0)
    assert len(clusters(torch.cat([usual, odd]), 2)) == 1
    assert len(clusters(torch.cat([usual, odd, usual + 1000]), 3)) == 2
    assert len(clusters(usual[:3], 16)) == 1


@pytest.mark.parametrize(("most", "looked_at"), [(61, 61), (60, 31)])  # of 122 images
def test_clusters_of_more_images_than_they_are_found_on(
    most: int, looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second or fourth image finds the clusters, and every one is in one, in one process as in two."""
    fields = _shuffled(_kind(0, 60), _kind(1, 62))
    expected = _fitted(fields)[0].map(fields)
    seen: list[int] = []

    def counted(descriptors: Tensor, most: int) -> Tensor:
        seen.append(len(descriptors))
        return clusters(descriptors, most)

    monkeypatch.setattr("anomalib_osdirf.density.mixture._MOST_IMAGES", most)
    monkeypatch.setattr("anomalib_osdirf.density.mixture.clusters", counted)
    for result in (_fitted(fields)[0], *played(2, lambda processes: _fitted(fields, processes=processes)[0])):
        assert result.num_kinds == 2
        torch.testing.assert_close(result.map(fields), expected, rtol=1e-4, atol=1e-4)
    assert seen == 3 * [looked_at]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_identical_training_images_still_give_a_density() -> None:
    density, _ = _fitted(torch.ones(20, DIM, GRID, GRID), num_clusters=2)
    assert torch.isfinite(density(torch.zeros(1, DIM, GRID, GRID))).all()


def test_state_dict_restores_the_kinds() -> None:
    test = torch.cat([_kind(number, 3, seed=1) for number in range(2)])
    density, _ = _fitted(torch.cat([_kind(number, 20) for number in range(2)]))
    other = PositionMixture(DIM, GRID)
    other.load_state_dict(density.state_dict())
    assert (other.num_kinds, other.num_images) == (2, 40)
    torch.testing.assert_close(other(test), density(test), rtol=0, atol=0)


def test_mixture_and_constants_are_those_of_one_process() -> None:
    fields = _shuffled(_kind(0, 23), _kind(1, 12), _kind(2, 30))

    def fitted(one: Processes) -> tuple[Tensor, Tensor]:
        density, _ = _fitted(fields, processes=one)
        assert (density.num_kinds, density.num_images) == (3, 65)
        score = SumByKind(1)
        own = fields[one.rank :: one.count].split(5)
        score.fit(((density(field).mean(dim=(1, 2))[:, None], density.choose(field)) for field in own), 3, one)
        return density(fields), score(density(fields).mean(dim=(1, 2))[:, None], density.choose(fields))

    expected = fitted(ALONE)
    for result in played(2, fitted):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_held_out_likelihood_matches_scipy() -> None:
    fields = _kind(0, 21)
    even, odd = moments_of([(fields, torch.arange(21) % 2)], 2)
    expected = 0.0
    for fitted, others in ((fields[::2], fields[1::2]), (fields[1::2], fields[::2])):
        for row, column in np.ndindex(GRID, GRID):
            reference = OAS().fit(fitted[:, :, row, column].double().numpy())
            gaussian = multivariate_normal(reference.location_, reference.covariance_ + 1e-6 * np.eye(DIM))
            expected -= gaussian.logpdf(others[:, :, row, column].double().numpy()).sum()
    assert cross_validated_nll((even, odd), PositionGaussian(DIM, GRID)) == pytest.approx(expected, rel=1e-5)


def test_sum_by_kind_has_medians_and_spreads_of_its_own() -> None:
    terms = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    kind = torch.tensor([0, 1]).repeat(25)
    terms[kind == 1] = 10 * terms[kind == 1] + 100
    terms[0] = 1e6  # an odd image
    total = SumByKind(2)
    total.fit(zip(terms.split(20), kind.split(20), strict=True), 3)
    values = terms.double().numpy()
    for index, own in ((0, values[::2]), (1, values[1::2]), (2, values)):
        median, above = np.quantile(own, (0.5, 0.8413), axis=0)
        expected = ((values - median) / (above - median)).sum(axis=1)
        result = total(terms, torch.full((50,), index))
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_clusters": 0}, "num_clusters=0 is neither auto nor a whole number of at least 1; use one"),
        ({"num_clusters": "many"}, "num_clusters='many' is neither auto"),
        ({"num_clusters": True}, "num_clusters=True is neither auto"),
        ({"num_clusters": 2.5}, r"num_clusters=2\.5 is neither auto"),
        ({"shrinkage": "ledoit"}, "shrinkage='ledoit' is neither oas nor auto"),
        (
            {"shrinkage": "auto"},
            "shrinkage=auto is not for density=mixture_full; use oas, a number, or density=pos",
        ),
        ({"name": "position", "num_clusters": 3}, "num_clusters=3 needs density=mixture_full, not position; leave num"),
    ],
)
def test_impossible_arguments(arguments: dict[str, int | str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_density(**{"name": "mixture_full", "dim": 4, "grid_size": 10, **arguments})


def test_kinds_must_be_found_before_the_fit() -> None:
    with pytest.raises(RuntimeError, match=r"must be found by cluster\(\) before it is fitted"):
        PositionMixture(DIM, GRID).fit([_kind(0, 5)])
