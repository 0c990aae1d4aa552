# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Clusters of images that are versions of a product, and centres of patches."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS
from torch import Tensor

from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring import ImageClusters, clusters, patch_centres
from anomalib_osdirf.scoring.clusters import cross_validated_nll, joined_where_likelier
from threads import played

DIM, GRID = 4, 3


def _version(number: int, count: int, seed: int = 0) -> Tensor:
    """Draw fine features of one version, ``(count, 4, 6, 6)``: mean and covariance are its own."""
    generator = torch.Generator().manual_seed(number)
    scale = torch.randn(DIM, DIM, generator=generator)
    mean = 2 * torch.randn(DIM, 2 * GRID, 2 * GRID, generator=generator) + 4 * torch.randn(
        DIM, 1, 1, generator=generator
    )
    noise = torch.randn(count, DIM, 2 * GRID, 2 * GRID, generator=generator.manual_seed(1000 * seed + number))
    return torch.einsum("de,nehw->ndhw", scale, noise) + mean


def _fitted(fine: Tensor, processes: DistributedContext = ALONE) -> ImageClusters:
    found, own = ImageClusters(), fine[processes.rank :: processes.count]
    found.fit(lambda: own.split(7), processes)
    return found


def _shuffled(*versions: Tensor) -> Tensor:
    fine = torch.cat(versions)
    return fine[torch.randperm(len(fine), generator=torch.Generator().manual_seed(0))]


def test_versions_are_found_though_nobody_names_them() -> None:
    found = _fitted(_shuffled(*(_version(number, count) for number, count in enumerate((40, 25, 60)))))
    assert found.count == 3
    labels = [found(_version(number, 5, seed=1)) for number in range(3)]
    assert all(len(one.unique()) == 1 for one in labels)
    assert len(torch.cat(labels).unique()) == 3


def test_images_of_one_version_are_not_divided() -> None:
    found = _fitted(_version(0, 120))
    assert found.count == 1
    assert found(_version(0, 3)).tolist() == [0, 0, 0]


def test_the_scale_of_a_channel_does_not_matter() -> None:
    fine = _shuffled(_version(0, 30), _version(1, 30))
    scaled = fine * torch.tensor([1.0, 1000.0, 1e-3, 1.0])[:, None, None]
    torch.testing.assert_close(_fitted(scaled)(scaled), _fitted(fine)(fine))


def test_a_constant_channel_is_left_out() -> None:
    fine = _shuffled(_version(0, 30), _version(1, 30))
    labels = _fitted(fine)(fine)
    fine[:, 2] = 7.0
    found = _fitted(fine)
    assert torch.isfinite(found.centres).all()
    assert found.count == int(labels.max()) + 1


def test_the_cluster_of_an_image_does_not_depend_on_the_batch() -> None:
    fine = _shuffled(_version(0, 30), _version(1, 30))
    found = _fitted(fine)
    torch.testing.assert_close(found(fine), torch.cat([found(one[None]) for one in fine]))


def test_few_odd_images_make_no_cluster() -> None:
    """Their Gaussians would be of few images."""
    usual = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    odd = torch.full((1, 5), 100.0)
    assert len(clusters._k_means(torch.cat([usual, odd]), 2)) == 1
    assert len(clusters._k_means(torch.cat([usual, odd, usual + 1000]), 3)) == 2
    assert len(clusters._k_means(usual[:3], 3)) == 1


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("count", [2, 20])
def test_identical_images_are_one_cluster(count: int) -> None:
    found = _fitted(_version(0, 1).expand(count, -1, -1, -1))
    assert found.count == 1
    assert found(_version(0, 2)).tolist() == [0, 0]


def _halves(fine: Tensor) -> tuple[StreamingMoments, StreamingMoments]:
    halves = StreamingMoments(), StreamingMoments()
    for half, part in zip(halves, (fine[::2], fine[1::2]), strict=True):
        half.update(part.flatten(2).permute(2, 0, 1))
    return halves


def test_held_out_likelihood_matches_scipy() -> None:
    fields = _version(0, 21)[..., :GRID, :GRID]
    expected = 0.0
    for fitted, others in ((fields[::2], fields[1::2]), (fields[1::2], fields[::2])):
        floor = 1e-6 * float(fitted.double().var(dim=0, correction=0).mean())
        for row, column in np.ndindex(GRID, GRID):
            reference = OAS().fit(fitted[:, :, row, column].double().numpy())
            gaussian = multivariate_normal(reference.location_, reference.covariance_ + floor * np.eye(DIM))
            expected -= gaussian.logpdf(others[:, :, row, column].double().numpy()).sum()
    assert cross_validated_nll(_halves(fields)) == pytest.approx(expected, rel=1e-9)


def test_a_half_without_images_can_not_be_likely() -> None:
    assert cross_validated_nll(_halves(_version(0, 1))) == math.inf


def test_clusters_are_joined_where_that_is_likelier() -> None:
    """Two parts of one version are; two versions aren't."""
    one, other = _version(0, 80), _version(1, 40)
    parts = [one[:40], other, one[40:]]
    centres = torch.stack([part.mean(dim=(0, 2, 3)) for part in parts])
    joined = joined_where_likelier([_halves(part) for part in parts], centres).tolist()
    assert joined[0] == joined[2] != joined[1]
    assert set(joined) == {0, 1}


@pytest.mark.parametrize(("most", "looked_at"), [(61, 61), (60, 31)])  # of 122 images
def test_clusters_of_more_images_than_they_are_found_on(
    most: int, looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second or fourth image finds the clusters, and every one is in one, in one process as in two."""
    fine = _shuffled(_version(0, 60), _version(1, 62))
    expected = _fitted(fine)(fine)
    seen: list[int] = []
    k_means = clusters._k_means

    def counted(descriptors: Tensor, number: int) -> Tensor:
        seen.append(len(descriptors))
        return k_means(descriptors, number)

    monkeypatch.setattr(clusters, "_MOST_IMAGES", most)
    monkeypatch.setattr(clusters, "_k_means", counted)
    for found in (_fitted(fine), *played(2, lambda processes: _fitted(fine, processes))):
        assert found.count == 2
        agreement = float((found(fine) == expected).float().mean())  # which of them is the first is chance
        assert agreement in {0.0, 1.0}
    assert seen == 3 * [looked_at]


def test_several_processes_find_what_one_does() -> None:
    fine = _shuffled(_version(0, 23), _version(1, 12), _version(2, 30))
    expected = _fitted(fine)
    for count in (2, 3):
        for found in played(count, lambda processes: _fitted(fine, processes)):
            torch.testing.assert_close(found(fine), expected(fine))


def test_state_dict_restores_the_clusters() -> None:
    fine = _shuffled(_version(0, 30), _version(1, 30))
    found, other = _fitted(fine), ImageClusters()
    other.load_state_dict(found.state_dict())
    assert other.count == found.count == 2
    torch.testing.assert_close(other(fine), found(fine))


def _blobs(count: int) -> Tensor:
    """Draw fields whose patches lie tightly about (0, 0), (9, 0) and (0, 9), wherever in the image."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randint(3, (count, GRID, GRID), generator=generator)
    means = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
    return means[centre].movedim(-1, 1) + 0.01 * torch.randn(count, 2, GRID, GRID, generator=generator)


def _is_near_blobs(centres: Tensor) -> bool:
    distance = torch.cdist(torch.tensor([[0.0, 0], [9, 0], [0, 9]]), centres)
    return centres.shape == (3, 2) and bool((distance.amin(dim=1) < 0.1).all())


def test_patch_centres_lie_where_patches_do() -> None:
    assert _is_near_blobs(patch_centres(_blobs(20).split(7), 20, 3))


def test_there_are_no_more_patch_centres_than_images() -> None:
    assert patch_centres([_blobs(2)], 2, 32).shape == (2, 2)


def test_patch_centres_of_many_images_look_at_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_MOST_PATCHES", 60)
    fields = _blobs(20)
    expected = patch_centres([fields], 20, 3)
    fields[torch.arange(20) % 3 != 0] = 100.0  # 180 patches: every third image
    torch.testing.assert_close(patch_centres(fields.split(7), 20, 3), expected)


@pytest.mark.parametrize("most_patches", [40_000, 60])
def test_patch_centres_are_those_of_one_process(most_patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_MOST_PATCHES", most_patches)
    fields = _blobs(20)
    expected = patch_centres(fields.split(7), 20, 3)

    def found(processes: DistributedContext) -> Tensor:
        return patch_centres(fields[processes.rank :: processes.count].split(7), 20, 3, processes)

    for centres in played(2, found):
        torch.testing.assert_close(centres, expected)
