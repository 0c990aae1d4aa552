# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The scorer on made-up features of aligned parts, of parts that lie anywhere, and of parts in several versions."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from torch import Tensor

from anomalib_osdirf.features import coarse
from anomalib_osdirf.models.scorer import Painted, Scorer
from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring import (
    FOLDS,
    PatchMixture,
    PositionGaussians,
    PositionStatistics,
    Sample,
    fit_mixture,
    fit_positions,
    patch_centres,
)
from threads import played

DIM, GRID = 4, 4
STRUCTURES = ("position", "mixture", "standard")
PROTOTYPES = 6 * torch.eye(DIM)


def _upsampled(coarse_values: Tensor) -> Tensor:
    return coarse_values.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def _kinds(count: int, seed: int) -> Tensor:
    """Draw one of four kinds of patches for each position, shape ``(count, h, w)``."""
    return torch.randint(4, (count, GRID, GRID), generator=torch.Generator().manual_seed(seed))


def _fine(kinds: Tensor, seed: int = 0, noise: float = 0.5) -> Tensor:
    """Draw fine features of patches of kinds ``(B, h, w)``."""
    drawn = torch.randn(len(kinds), DIM, 2 * GRID, 2 * GRID, generator=torch.Generator().manual_seed(seed))
    return _upsampled(PROTOTYPES[kinds].movedim(-1, 1)) + noise * drawn


def _aligned(count: int, seed: int = 0) -> Tensor:
    """Each position has a kind of its own."""
    return _fine(_kinds(1, seed=77).expand(count, -1, -1), seed)


def _anywhere(count: int, seed: int = 0) -> Tensor:
    """Any kind is anywhere."""
    return _fine(_kinds(count, seed), seed)


def _versions(count: int, seed: int = 0) -> Tensor:
    """Two versions: in the second, channels have changed places and there is more of everything."""
    fine = _aligned(count, seed)
    fine[1::2] = 3 * fine[1::2].roll(1, dims=1)
    return fine


def _images(
    fine: Tensor, processes: DistributedContext = ALONE
) -> Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """Return what gives a process's images in batches of seven."""
    numbers = torch.arange(len(fine))[processes.rank :: processes.count]
    return lambda: ((coarse(fine[batch]), fine[batch], batch) for batch in numbers.split(7))


def _covered(count: int) -> Tensor:
    covered = torch.zeros(count, GRID, GRID, dtype=torch.bool)
    covered[:, 1:3, 1:3] = True
    return covered


def _painted(fine: Tensor, anomaly: Tensor, covered: Tensor | None = None) -> Callable[[], Iterable[Painted]]:
    """Return what gives images with anomalies, shape of ``fine``, in the middle."""
    covered = _covered(len(fine)) if covered is None else covered
    mixed = torch.where(_upsampled(covered[:, None].float()) > 0, anomaly, fine)
    numbers = torch.arange(len(fine))
    return lambda: [
        Painted(coarse(mixed[batch]), mixed[batch], covered[batch], numbers[batch]) for batch in numbers.split(9)
    ]


def _misplaced(fine: Tensor) -> Tensor:
    """Normal patches where they don't belong."""
    return fine.roll((2, 2), dims=(2, 3)).flip(1)


def _unknown(fine: Tensor) -> Tensor:
    """Patches half-way between kinds, of the usual size."""
    return fine.mean(dim=1, keepdim=True).expand_as(fine)


def _fitted(fine: Tensor, density: str, **arguments: Any) -> Scorer:
    scorer = Scorer(density)
    scorer.fit(_images(fine), **arguments)
    return scorer


def _score(scorer: Scorer, fine: Tensor, size: tuple[int, int] = (GRID, GRID)) -> InferenceBatch:
    return scorer(coarse(fine), fine, size)


def _held_out(scorer_density: str, fine: Tensor) -> tuple[Scorer, Tensor]:
    """Return a fitted scorer, and score, largest and smallest value of the map of its training images, held out."""
    scorer = Scorer(scorer_density)
    return scorer, scorer.fit(_images(fine), size=(16, 16)).held_out


# ------------------------------------------------------------------ maps and scores


def test_map_is_the_sum_of_both_densities_in_units_of_held_out_variation() -> None:
    """Against densities and units fitted one by one, by the parts that are tested elsewhere."""
    fine, test = _aligned(30), _aligned(3, seed=1)
    numbers, cluster = torch.arange(30), torch.zeros(30, dtype=torch.int64)
    expected = torch.zeros(3, 1, 16, 16)
    for train, new, blocks in ((coarse(fine), coarse(test), False), (fine, test, True)):
        sample = Sample(train, cluster, numbers)
        fitted = fit_positions([sample], 1, FOLDS, blocks)
        held_out = fitted.held_out(sample)
        statistics = PositionStatistics(1, held_out.shape[1:], torch.device("cpu"))
        statistics.update(held_out, cluster, numbers)
        mean, deviation = statistics.shrunk()
        values = ((fitted.density(new) - mean) / deviation).float()
        expected += torch.nn.functional.interpolate(values[:, None], size=(16, 16), mode="bilinear")
    found = _score(_fitted(fine, "position"), test, (16, 16)).anomaly_map
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_standard_density_is_that_of_the_field_alone() -> None:
    """The map is linear in the squared length, and fine features change nothing."""
    scorer, test = _fitted(_aligned(30), "standard"), _aligned(5, seed=1)
    batch = _score(scorer, test)
    other = scorer(coarse(test), 100 * test, (GRID, GRID))
    torch.testing.assert_close(other.anomaly_map, batch.anomaly_map)
    torch.testing.assert_close(other.pred_score, batch.pred_score)
    length = coarse(test).square().sum(dim=1)
    for row, column in np.ndindex(GRID, GRID):
        found = np.corrcoef(length[:, row, column], batch.anomaly_map[:, 0, row, column])[0, 1]
        assert found == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("density", STRUCTURES)
def test_new_normal_maps_have_mean_0_and_deviation_1_of_each_of_their_terms(density: str) -> None:
    scorer = _fitted(_aligned(300), density)
    maps = _score(scorer, _aligned(300, seed=1)).anomaly_map
    terms = 1 if density == "standard" else 2
    assert maps.mean().abs() < 0.2
    assert 0.8 < float(maps.std()) < 1.2 * terms


@pytest.mark.parametrize("density", ["position", "mixture"])
def test_held_out_scores_are_nearer_to_those_of_new_images_than_seen_ones(density: str) -> None:
    """Where there are few images, which a density knows too well."""
    scorer, held_out = _held_out(density, _aligned(24))
    batches = (_score(scorer, fine, (16, 16)) for fine in (_aligned(24), _aligned(400, seed=1)))
    seen, new = (torch.stack([one.pred_score, one.anomaly_map.flatten(1).amax(dim=1)]).median(dim=1) for one in batches)
    for value, of_seen, of_new in zip(held_out[:, :2].median(dim=0).values, seen.values, new.values, strict=True):
        assert of_seen < value
        assert abs(value - of_new) < abs(of_seen - of_new) / 2


@pytest.mark.parametrize("density", STRUCTURES)
def test_the_median_held_out_image_scores_0(density: str) -> None:
    """Each of the two terms has a median of 0."""
    scores = _held_out(density, _aligned(41))[1][:, 0]
    assert abs(float(scores.median())) < 0.7
    assert 0.5 < float(scores.std()) < 6


@pytest.mark.parametrize("density", STRUCTURES)
def test_scores_do_not_depend_on_the_batch(density: str) -> None:
    scorer, test = _fitted(_versions(60), density), _versions(6, seed=1)
    together = _score(scorer, test)
    for index in range(6):
        alone = _score(scorer, test[index : index + 1])
        torch.testing.assert_close(alone.pred_score, together.pred_score[index : index + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.anomaly_map, together.anomaly_map[index : index + 1], rtol=1e-4, atol=1e-4)


def test_images_of_several_versions_are_scored_by_their_own() -> None:
    """As a scorer of that version alone would; the rest of the product must not widen its density."""
    fine, test = _versions(80), _versions(20, seed=1)
    both = _fitted(fine, "position")
    assert both.clusters.count == 2
    for version in (0, 1):
        alone = _fitted(fine[version::2], "position")
        found, expected = (_score(one, test[version::2]).pred_score for one in (both, alone))
        anomalous = [_score(one, _misplaced(test)[version::2]).pred_score for one in (both, alone)]
        assert np.corrcoef(torch.cat([found, anomalous[0]]), torch.cat([expected, anomalous[1]]))[0, 1] > 0.99


def test_a_moved_part_has_the_same_score_by_a_mixture_with_one_unit() -> None:
    """And its map moves along."""
    scorer, test = _fitted(_anywhere(40), "mixture"), _anywhere(5, seed=1)
    test[:, :, 2:4, 4:6] = 20.0
    for units in (scorer.units, scorer.fine_units):
        units.fit(*(torch.full_like(units.scale, value) for value in (3.0, 2.0)))
    moved = test.roll((2, -4), dims=(2, 3))  # one and two positions of the field's grid
    before, after = _score(scorer, test), _score(scorer, moved)
    torch.testing.assert_close(after.pred_score, before.pred_score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.anomaly_map, before.anomaly_map.roll((1, -2), dims=(2, 3)), rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------ the choice of a structure


class _Trial:
    """A structure fitted by parts, as a reference for the choice."""

    def __init__(self, structure: str, fine: Tensor) -> None:
        self.samples = [Sample(x, torch.zeros(len(x)).long(), torch.arange(len(x))) for x in (coarse(fine), fine)]
        self.fitted, self.units = [], []
        for sample, blocks, components in zip(self.samples, (False, True), (32, 16), strict=True):
            if structure == "position":
                fitted = fit_positions([sample], 1, FOLDS, blocks)
            else:
                centres = patch_centres([sample.values], len(fine), components)

                def nearest(x: Tensor, centres: Tensor = centres) -> Tensor:
                    patches = x.flatten(2).transpose(1, 2)
                    return (patches[:, :, None] - centres).square().sum(dim=3).argmin(dim=2)

                fitted = fit_mixture([sample], nearest, len(centres), FOLDS)
            held_out = fitted.held_out(sample)
            statistics = PositionStatistics(1, held_out.shape[1:], torch.device("cpu"))
            statistics.update(held_out, sample.cluster, sample.numbers)
            self.fitted.append(fitted)
            self.units.append([one.float() for one in statistics.shrunk()])
        self.nll = float(self.fitted[0].held_out(self.samples[0]).double().mean())

    def map(self, *samples: Sample) -> np.ndarray:
        """Score held-out images on the field's grid."""
        field, fine = (
            (fitted.held_out(sample) - mean) / deviation
            for fitted, sample, (mean, deviation) in zip(self.fitted, samples, self.units, strict=True)
        )
        return (field + coarse(fine[:, None])[:, 0]).numpy()

    def found(self, painted: Iterable[Painted]) -> np.ndarray:
        """Return the share of the painted positions above 95 % of the normal images' maxima, of each image."""
        threshold = np.quantile(self.map(*self.samples).max(axis=(1, 2)).astype(np.float64), 0.95)
        shares = []
        for batch in painted:
            cluster = torch.zeros(len(batch.numbers)).long()
            maps = self.map(*(Sample(values, cluster, batch.numbers) for values in (batch.field, batch.fine)))
            shares += [
                (one[covered] > threshold).mean()
                for one, covered in zip(maps, batch.covered.numpy(), strict=True)
                if covered.any()
            ]
        return np.array(shares)


def _rule(fine: Tensor, painted: Callable[[], Iterable[Painted]] | None) -> str:
    """Choose what finds more, by two standard errors at least, or else what is likelier."""
    position, mixture = _Trial("position", fine), _Trial("mixture", fine)
    likelier = "position" if position.nll <= mixture.nll else "mixture"
    if painted is None:
        return likelier
    difference = position.found(painted()) - mixture.found(painted())
    if len(difference) < 4 or abs(difference.mean()) <= 2 * difference.std(ddof=1) / np.sqrt(len(difference)):
        return likelier
    return "position" if difference.mean() > 0 else "mixture"


DRAW = {"position": _aligned, "mixture": _anywhere}
PAINT: dict[str, Callable[[Tensor], Tensor]] = {"position": _misplaced, "mixture": _unknown}


@pytest.mark.parametrize("expected", ["position", "mixture"])
def test_auto_chooses_what_finds_more_of_the_painted_anomalies(expected: str) -> None:
    fine = DRAW[expected](40)
    painted = _painted(fine, PAINT[expected](fine))
    difference = [float(_Trial(one, fine).found(painted()).mean()) for one in ("position", "mixture")]
    assert abs(difference[0] - difference[1]) > 0.2  # there is something to choose by
    assert _fitted(fine, "auto", painted=painted).structure == expected == _rule(fine, painted)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_that_of_the_rule(seed: int) -> None:
    """Parts that turn up in their place more or less often, and anomalies of either kind."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.where(torch.rand(24, GRID, GRID, generator=generator) < seed / 5, _kinds(1, 77), _kinds(24, seed))
    fine = _fine(kinds, seed)
    anomaly = torch.where(torch.rand(24, 1, 1, 1, generator=generator) < 0.5, _misplaced(fine), _unknown(fine))
    painted = _painted(fine, anomaly)
    scorer = _fitted(fine, "auto", painted=painted)
    assert scorer.clusters.count == 1  # the reference knows one only
    assert scorer.structure == _rule(fine, painted)


@pytest.mark.parametrize("structure", ["position", "mixture"])
def test_the_fit_tells_how_much_of_the_painted_anomalies_its_structure_finds(structure: str) -> None:
    fine = DRAW[structure](40)
    painted = _painted(fine, PAINT[structure](fine))
    for density in ("auto", structure):
        found = Scorer(density).fit(_images(fine), painted).found
        np.testing.assert_allclose(found.numpy(), _Trial(structure, fine).found(painted()), atol=1e-6)
    assert len(Scorer("standard").fit(_images(fine)).found) == 0


@pytest.mark.parametrize("likelier", ["position", "mixture"])
def test_likelihood_decides_where_there_is_nothing_painted(likelier: str) -> None:
    """No images at all, none with a covered position, or fewer than there are folds."""
    fine = DRAW[likelier](40)
    assert _rule(fine, None) == likelier
    assert _fitted(fine, "auto").structure == likelier
    covered = torch.zeros_like(_covered(40))
    assert _fitted(fine, "auto", painted=_painted(fine, fine, covered)).structure == likelier
    covered[:3, 1, 1] = True
    other = _misplaced(fine) if likelier == "mixture" else _unknown(fine)
    assert _fitted(fine, "auto", painted=_painted(fine, other, covered)).structure == likelier


@pytest.mark.parametrize("likelier", ["position", "mixture"])
def test_likelihood_decides_where_painted_anomalies_tell_nothing(likelier: str) -> None:
    """They look like the normal images, or everybody finds them."""
    fine = DRAW[likelier](40)
    for anomaly in (fine, torch.full_like(fine, 100.0)):
        painted = _painted(fine, anomaly)
        assert _fitted(fine, "auto", painted=painted).structure == likelier == _rule(fine, painted)


@pytest.mark.parametrize("density", ["position", "mixture"])
def test_a_structure_that_was_asked_for_is_taken(density: str) -> None:
    for fine in (_aligned(20), _anywhere(20)):
        assert _fitted(fine, density).structure == density


# ------------------------------------------------------------------ several processes


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_fit_what_one_does(count: int) -> None:
    """Also where one of them has all the painted images, as spacing them out may bring about."""
    fine, test = _aligned(24), _aligned(4, seed=1)
    painted = _painted(fine, _misplaced(fine))
    expected = _fitted(fine, "auto", painted=painted)

    def fitted(processes: DistributedContext) -> Scorer:
        scorer = Scorer("auto")
        scorer.fit(_images(fine, processes), painted if processes.rank == 0 else list, processes)
        return scorer

    for scorer in played(count, fitted):
        assert scorer.structure == expected.structure == "position"
        assert scorer.num_images == 24
        for found, own in zip(_score(scorer, test), _score(expected, test), strict=True):
            if own is not None:
                torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3)


def test_several_processes_choose_by_the_painted_images_of_all() -> None:
    fine = _anywhere(24)
    painted = list(_painted(fine, _unknown(fine))())

    def structure(processes: DistributedContext) -> str | None:
        scorer = Scorer("auto")
        scorer.fit(_images(fine, processes), lambda: painted[processes.rank :: processes.count], processes)
        return scorer.structure

    assert played(2, structure) == ["mixture", "mixture"]


# ------------------------------------------------------------------ few and odd images


def _constant_channel(fine: Tensor) -> Tensor:
    fine[:, 1] = 0.0
    return fine


ODD = {
    "two images": _aligned(2),
    "three images": _anywhere(3),
    "a cluster of few images": torch.cat([_aligned(40), 3 * _aligned(9, seed=1).roll(1, dims=1)]),
    "identical images": _aligned(1).expand(12, -1, -1, -1),
    "two identical images": _aligned(1).expand(2, -1, -1, -1),
    "identical positions, too": torch.ones(12, DIM, 2 * GRID, 2 * GRID),
    "nothing but zeros": torch.zeros(12, DIM, 2 * GRID, 2 * GRID),
    "a constant channel": _constant_channel(_aligned(20)),
}


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("density", ["auto", *STRUCTURES])
@pytest.mark.parametrize("name", ODD)
def test_scores_are_finite(name: str, density: str) -> None:
    """Of new images, and of training images that are held out."""
    scorer, held_out = _held_out(density, ODD[name])
    new = _score(scorer, torch.cat([ODD[name][:2], _anywhere(3, seed=1), 1000 * _aligned(2)]))
    for values in (held_out, new.pred_score, new.anomaly_map):
        assert torch.isfinite(values).all()


# ------------------------------------------------------------------ state


def _assert_same(one: Scorer, other: Scorer, fine: Tensor) -> None:
    batches = [_score(scorer, fine) for scorer in (one, other)]
    torch.testing.assert_close(batches[0].pred_score, batches[1].pred_score, rtol=0, atol=0)
    torch.testing.assert_close(batches[0].anomaly_map, batches[1].anomaly_map, rtol=0, atol=0)


@pytest.mark.parametrize("density", STRUCTURES)
@pytest.mark.parametrize("draw", [_aligned, _versions])
def test_state_dict_restores_a_scorer_whatever_it_was(density: str, draw: Callable[..., Tensor]) -> None:
    scorer = _fitted(draw(40), density)
    for other in (Scorer(), Scorer(density), _fitted(_anywhere(20), "mixture"), _fitted(_aligned(9), "standard")):
        other.load_state_dict(scorer.state_dict())
        assert (other.num_images, other.structure) == (40, density)
        _assert_same(other, scorer, draw(4, seed=1))


def test_state_dict_of_a_scorer_that_was_never_fitted() -> None:
    scorer = Scorer()
    scorer.load_state_dict(Scorer().state_dict())
    assert (scorer.num_images, scorer.structure) == (0, None)


@pytest.mark.parametrize("density", STRUCTURES)
def test_buffers_in_use_are_all_that_scoring_reads_besides_the_clusters(density: str) -> None:
    scorer = _fitted(_aligned(20), density)
    names = {name for name, _ in scorer.buffers_in_use()}
    others = {name for name, _ in scorer.named_buffers()} - names
    assert {name.split(".")[0] for name in others} <= {"clusters", "fine_units"}
    assert ("fine_units" in {name.split(".")[0] for name in others}) is (density == "standard")


# ------------------------------------------------------------------ fitting anew


@pytest.mark.parametrize("density", STRUCTURES)
def test_fitting_anew_makes_up_for_a_field_of_another_scale(density: str) -> None:
    """As of a quantised network, where clusters, structure and number of components stay."""
    fine, test = _versions(40), _versions(4, seed=1)
    scorer = _fitted(fine, density)
    before, count = _score(scorer, test), scorer.clusters.count
    scorer.refit(lambda: ((2 * field, own, numbers) for field, own, numbers in _images(fine)()))
    after = scorer(2 * coarse(test), test, (GRID, GRID))
    assert (scorer.structure, scorer.num_images, scorer.clusters.count) == (density, 40, count)
    if density != "mixture":
        torch.testing.assert_close(after.pred_score, before.pred_score, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(after.anomaly_map, before.anomaly_map, rtol=1e-3, atol=1e-3)


def test_fitting_a_mixture_anew_keeps_its_components() -> None:
    """The same component has the most patches where features hardly change."""
    fine = _anywhere(40)
    scorer = _fitted(fine, "mixture")
    density: Any = scorer.density
    before = density.components(coarse(fine)).argmin(dim=1)
    scorer.refit(_images(fine + 0.01))
    assert isinstance(scorer.density, PatchMixture)
    assert len(scorer.density.constant) == 32
    after = scorer.density.components(coarse(fine)).argmin(dim=1)
    assert (after == before).float().mean() > 0.95


@pytest.mark.parametrize("density", ["position", "mixture"])
def test_a_cluster_that_no_image_chooses_any_more_stays_finite(density: str) -> None:
    fine = _versions(40)
    scorer = _fitted(fine, density)
    assert scorer.clusters.count == 2
    scorer.refit(_images(fine[::2]))
    batch = _score(scorer, fine)
    assert torch.isfinite(batch.pred_score).all()
    assert torch.isfinite(batch.anomaly_map).all()


def test_fitting_anew_tells_held_out_scores() -> None:
    fine = _aligned(20)
    scorer, held_out = _held_out("position", fine)
    torch.testing.assert_close(scorer.refit(_images(fine), (16, 16)), held_out, rtol=1e-4, atol=1e-4)


def test_positions_have_covariances_of_their_own_in_the_field_and_shared_ones_in_fine_features() -> None:
    scorer = _fitted(_aligned(20), "position")
    densities = scorer.density, scorer.fine_density
    assert all(isinstance(density, PositionGaussians) for density in densities)
    assert [density.blocks for density in densities] == [False, True]  # type: ignore[union-attr]


def test_unknown_density() -> None:
    with pytest.raises(ValueError, match="density='kde'"):
        Scorer("kde")
