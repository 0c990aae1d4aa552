# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""Drawings of four kinds of surface and of their defects, as pure functions of a seed.

A picture is made in three steps: a scene is drawn at twice the resolution, a defect replaces a part of it, and a camera
averages the pixels down, applies its exposure and adds noise. Scene, defect and camera each have their own random
stream, so the same seed with and without a defect gives two pictures that agree, bit for bit, outside the mask.

Lengths are in units of 1/256 of the image side, so a larger image shows the same scene in more detail.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNITS = 256.0
SUPERSAMPLING = 2
# A pixel belongs to the mask when the defect covers at least this share of it.
MASK_COVERAGE = 0.1


@dataclass(frozen=True)
class Canvas:
    """The sampling points of a picture, ``side`` by ``side``, before it is averaged down."""

    side: int

    @property
    def scale(self) -> float:
        """Samples per unit of length."""
        return self.side / UNITS

    def coordinates(self) -> tuple[Array, Array]:
        """Return the samples' x and y in units, each of shape ``(side, side)``."""
        axis = (np.arange(self.side, dtype=np.float32) + 0.5) / self.scale
        x, y = np.meshgrid(axis, axis)
        return x, y

    def nearest(self, place: tuple[float, float]) -> tuple[int, int]:
        """Return the row and column of the sample nearest to a place, x and y in units."""
        row, column = (min(max(int(coordinate * self.scale), 0), self.side - 1) for coordinate in reversed(place))
        return row, column

    def noise(self, rng: np.random.Generator, sigma_x: float, sigma_y: float) -> Array:
        """Return Gaussian noise ``(side, side)`` of unit variance, smoothed by these standard deviations in units."""
        sigmas = np.maximum(np.array([sigma_y, sigma_x]) * self.scale, 0.3)
        # Long correlation needs few samples: the noise is made on a coarser grid and drawn out.
        coarser = np.maximum(sigmas // 3, 1)
        rows, columns = (int(count) for count in np.ceil(self.side / coarser) + 1)
        white = rng.standard_normal((rows, columns), dtype=np.float32)
        smooth = cv2.GaussianBlur(
            white,
            (0, 0),
            sigmaX=float(sigmas[1] / coarser[1]),
            sigmaY=float(sigmas[0] / coarser[0]),
            borderType=cv2.BORDER_REFLECT_101,
        )
        smooth = cv2.resize(smooth, (self.side, self.side), interpolation=cv2.INTER_CUBIC)
        mean, deviation = cv2.meanStdDev(smooth)
        return (smooth - float(mean[0, 0])) / (float(deviation[0, 0]) + 1e-6)

    def undulation(self, rng: np.random.Generator, knots: int) -> Array:
        """Return a smooth field ``(side, side)`` of about unit size, of ``knots`` independent random values a side."""
        values = rng.standard_normal((knots + 4, knots + 4)).astype(np.float32)
        step = math.ceil(self.side / knots)
        field = cv2.resize(values, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
        # The values lie elsewhere in every picture, so that no place is smoother than others.
        top, left = rng.integers(step, 3 * step, 2)
        return field[top : top + self.side, left : left + self.side]

    def distance_to_curve(self, points: Array) -> Array:
        """Return each sample's distance to a polyline ``(N, 2)``, in units, of shape ``(side, side)``."""
        background = np.full((self.side, self.side), 255, dtype=np.uint8)
        corners = np.round(points * self.scale - 0.5).astype(np.int32)
        cv2.polylines(background, [corners], isClosed=False, color=0, thickness=1)
        return cv2.distanceTransform(background, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) / self.scale


@dataclass(frozen=True)
class Alteration:
    """A defect: the altered scene ``(side, side, 3)``, and how much of it shows, 0 to 1, ``(side, side)``."""

    colour: Array
    coverage: Array


class Scene(ABC):
    """One random piece of a surface; the generator decides everything about the normal scene."""

    stain_strength = (0.07, 0.12)
    defects: ClassVar[tuple[str, ...]]  # the methods that make one

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.x, self.y = canvas.coordinates()
        self.arrange(rng)
        self.normal = self.render()

    @abstractmethod
    def arrange(self, rng: np.random.Generator) -> None:
        """Draw the scene's random properties."""

    @abstractmethod
    def render(self) -> Array:
        """Return the normal scene of shape ``(side, side, 3)``, about 0 to 1."""

    def stain(self, rng: np.random.Generator) -> Alteration:
        """Return a stain with a ragged outline: a small change of hue and of brightness, either way."""
        centre = random_place(rng, margin=36)
        shape = smoothstep(1.0 - self.ragged_distance(rng, centre, rng.uniform(9, 24)), 0.0, 0.25)
        tint = 1.0 + rng.uniform(*self.stain_strength) * unit_tint(rng, brightness=0.7)
        return Alteration(self.normal * tint.astype(np.float32), shape)

    def ragged_distance(self, rng: np.random.Generator, centre: tuple[float, float], radius: float) -> Array:
        """Return a distance from ``centre`` that is 1 on a ragged, slightly elongated outline of size ``radius``."""
        angle = rng.uniform(0, math.pi)
        elongation = rng.uniform(1.0, 1.6)
        along, across = rotated(self.x - centre[0], self.y - centre[1], angle)
        distance = np.hypot(along / elongation, across * elongation) / radius
        return distance * (1.0 + 0.12 * np.clip(self.canvas.undulation(rng, 24), -2, 2))

    def changed(self, altered: Array, close: float) -> Alteration:
        """Return an alteration that covers the samples that differ from the normal scene, small gaps closed."""
        differs = (np.abs(altered - self.normal).max(axis=2) > 0.01).astype(np.uint8)
        width = 2 * max(round(close * self.canvas.scale), 1) + 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
        closed = cv2.morphologyEx(differs, cv2.MORPH_CLOSE, kernel)
        return Alteration(altered, closed.astype(np.float32))


class Weave(Scene):
    """A plain-woven cloth of two yarns, unevenly stretched."""

    pitch = 10.0
    half_width = 0.46

    defects = ("distortion", "missing_thread", "snag", "stain", "wrong_weave")

    def arrange(self, rng: np.random.Generator) -> None:
        """Draw phase, stretch, yarn colours and the unevenness of each yarn."""
        canvas = self.canvas
        angle = math.radians(rng.uniform(-2.0, 2.0))
        pitch = [self.pitch * rng.uniform(0.97, 1.03) for _ in range(2)]
        stretched_x = self.x + 1.2 * canvas.undulation(rng, 5)
        stretched_y = self.y + 1.2 * canvas.undulation(rng, 5)
        along, across = rotated(stretched_x, stretched_y, angle)
        phase = [rng.uniform(8, 10) for _ in range(2)]
        self.u = along / pitch[0] + phase[0]
        self.v = across / pitch[1] + phase[1]
        self.yarns = np.array([[0.56, 0.60, 0.66], [0.66, 0.60, 0.50]], dtype=np.float32)
        self.yarns *= rng.uniform(0.95, 1.05, (2, 3)).astype(np.float32)
        self.evenness = (1.0 + 0.07 * rng.standard_normal((2, 64))).astype(np.float32)
        self.fibres = (canvas.noise(rng, 0.5, 2.5), canvas.noise(rng, 2.5, 0.5))

    def render(self) -> Array:
        """Return the cloth."""
        return self.cloth(self.u, self.v)

    def cloth(
        self,
        u: Array,
        v: Array,
        change_order: Callable[[Array, Array, Array], Array] | None = None,
        missing: int | None = None,
    ) -> Array:
        """Return the cloth ``(side, side, 3)`` for positions across upright and level yarns, ``(side, side)`` each.

        ``change_order`` turns (column, row, which yarn is on top) into another order; an upright yarn can be missing.
        """
        column, row = np.floor(u), np.floor(v)
        off_column, off_row = u - column - 0.5, v - row - 0.5
        upright_on_top = (column + row) % 2 == 0
        if change_order is not None:
            upright_on_top = change_order(column, row, upright_on_top)
        upright_there = np.abs(off_column) < self.half_width
        level_there = np.abs(off_row) < self.half_width
        if missing is not None:
            upright_there &= column != missing
        upright_shows = upright_there & (upright_on_top | ~level_there)
        level_shows = level_there & ~upright_shows

        def shade(off_across: Array, off_along: Array, on_top: Array, along: Array, fibre: Array) -> Array:
            roundness = np.sqrt(np.maximum(1.0 - (off_across / (self.half_width * 1.08)) ** 2, 0.0))
            height = np.where(on_top, np.cos(off_along * (math.pi * 0.8)), np.float32(0.35))
            twist = np.sin((along * 2.0 + off_across * 1.2) * (2 * math.pi))
            return (0.42 + 0.58 * roundness * height) * (1.0 + 0.07 * twist + 0.07 * fibre)

        upright = shade(off_column, off_row, upright_on_top, v, self.fibres[0])
        level = shade(off_row, off_column, ~upright_on_top, u, self.fibres[1])
        upright *= self.evenness[0][column.astype(np.int64) % 64]
        level *= self.evenness[1][row.astype(np.int64) % 64]
        cloth = np.where(level_shows[..., None], level[..., None] * self.yarns[1], np.float32(0.2))
        return np.where(upright_shows[..., None], upright[..., None] * self.yarns[0], cloth)

    def missing_thread(self, rng: np.random.Generator) -> Alteration:
        """Return a piece of cloth in which a stretch of one yarn is gone."""
        swap = bool(rng.integers(2))
        u, v = (self.v, self.u) if swap else (self.u, self.v)
        column = int(np.floor(u.min())) + int(rng.integers(4, 21))
        first = int(np.floor(v.min())) + int(rng.integers(3, 16))
        length = int(rng.integers(2, 7))
        inside = (np.floor(u) == column) & (np.floor(v) >= first) & (np.floor(v) < first + length)
        if swap:
            # Rows and columns change places, so the same drawing leaves out a level yarn.
            level = Weave.__new__(Weave)
            level.yarns, level.evenness, level.fibres = self.yarns[::-1], self.evenness[::-1], self.fibres[::-1]
            return Alteration(level.cloth(u, v, lambda _c, _r, on_top: ~on_top, column), inside.astype(np.float32))
        return Alteration(self.cloth(u, v, missing=column), inside.astype(np.float32))

    def wrong_weave(self, rng: np.random.Generator) -> Alteration:
        """Return a patch in which the yarns cross in another order."""
        centre = random_place(rng, margin=40)
        middle = self.canvas.nearest(centre)
        half_columns, half_rows = rng.integers(1, 4, 2)
        columns, rows = np.floor(self.u) - np.floor(self.u[middle]), np.floor(self.v) - np.floor(self.v[middle])
        inside = (np.abs(columns) <= half_columns) & (np.abs(rows) <= half_rows)
        kind = rng.integers(3)

        def change_order(column: Array, row: Array, on_top: Array) -> Array:
            other = ((column // 2 + row // 2) % 2 == 0, (column + row) % 3 == 0, on_top | (row % 3 > 0))[kind]
            return np.where(inside, other, on_top)

        return Alteration(self.cloth(self.u, self.v, change_order), inside.astype(np.float32))

    def distortion(self, rng: np.random.Generator) -> Alteration:
        """Return a patch in which the yarns are pushed aside."""
        centre = random_place(rng, margin=44)
        radius = rng.uniform(14, 30)
        bump = finite_bump(np.hypot(self.x - centre[0], self.y - centre[1]) / radius)
        angle = rng.uniform(0, 2 * math.pi)
        push = rng.uniform(0.45, 0.75)
        u = self.u + push * math.cos(angle) * bump
        v = self.v + push * math.sin(angle) * bump
        return Alteration(self.cloth(u, v), (bump > 0).astype(np.float32))

    def snag(self, rng: np.random.Generator) -> Alteration:
        """Return a loose yarn that lies on the cloth."""
        points = random_curve(rng, length=rng.uniform(22, 60), bend=0.5)
        width = rng.uniform(2.0, 3.2)
        distance = self.canvas.distance_to_curve(points)
        roundness = np.sqrt(np.maximum(1.0 - (distance / (width * 1.1)) ** 2, 0.0))
        shade = (0.4 + 0.5 * roundness) * (1.0 + 0.1 * self.fibres[0])
        colour = shade[..., None] * self.yarns[rng.integers(2)]
        return Alteration(colour, (distance < width).astype(np.float32))


class BrushedMetal(Scene):
    """A metal sheet brushed in one direction under a lamp."""

    stain_strength = (0.04, 0.07)

    defects = ("cross_brushed", "dent", "pits", "scratch", "stain")

    def arrange(self, rng: np.random.Generator) -> None:
        """Draw brush strokes, their direction and the lamp's place."""
        self.angle = math.radians(rng.uniform(-4.0, 4.0))
        self.streaks = self.brushed(rng, self.angle)
        # A second, weaker pass of the brush and grains of dust are normal: they keep the defects from standing alone.
        second_pass = self.brushed(rng, self.angle + math.radians(rng.uniform(-14, 14)))
        self.streaks += 0.5 * smoothstep(self.canvas.undulation(rng, 5), -0.5, 1.5) * second_pass
        self.streaks *= rng.uniform(0.8, 1.15)
        for _ in range(int(rng.integers(6, 20))):
            grain = np.hypot(self.x - rng.uniform(0, UNITS), self.y - rng.uniform(0, UNITS)) / rng.uniform(0.6, 1.1)
            self.streaks += random_sign(rng) * rng.uniform(1.0, 2.2) * np.maximum(1.0 - grain, 0.0)
        along, across = rotated(self.x - UNITS / 2, self.y - UNITS / 2, rng.uniform(0, 2 * math.pi))
        self.light = 0.5 + 0.09 * np.exp(-(((along - rng.uniform(-80, 80)) / rng.uniform(60, 110)) ** 2))
        self.light = self.light + 0.0004 * across * rng.uniform(-1, 1)
        self.metal = np.array([0.96, 1.0, 1.05], dtype=np.float32) * rng.uniform(0.985, 1.015, 3).astype(np.float32)

    def brushed(self, rng: np.random.Generator, angle: float) -> Array:
        """Return brush strokes of about unit variance in the direction ``angle``, of shape ``(side, side)``."""
        canvas = self.canvas
        strokes = (
            0.75 * canvas.noise(rng, 45, 0.7) + 0.55 * canvas.noise(rng, 14, 0.5) + 0.35 * canvas.noise(rng, 30, 3)
        )
        centre = ((canvas.side - 1) / 2, (canvas.side - 1) / 2)
        turn = cv2.getRotationMatrix2D(centre, -math.degrees(angle), 1.0)
        return cv2.warpAffine(
            strokes, turn, (canvas.side, canvas.side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )

    def render(self) -> Array:
        """Return the sheet."""
        return self.lit(self.streaks)

    def lit(self, relief: Array) -> Array:
        """Return the sheet with a relief of brightness, of shape ``(side, side, 3)``."""
        return (self.light * (1.0 + 0.085 * relief))[..., None] * self.metal

    def scratch(self, rng: np.random.Generator) -> Alteration:
        """Return a scratch across the brushing: one flank catches the light, the other lies in shade."""
        away = random_sign(rng) * math.radians(rng.uniform(18, 90))
        points = random_curve(rng, length=rng.uniform(20, 60), bend=0.12, angle=self.angle + away)
        return self.groove(points, width=rng.uniform(1.3, 2.2), depth=rng.uniform(1.3, 2.1) * random_sign(rng))

    def groove(self, points: Array, width: float, depth: float) -> Alteration:
        """Return a groove along a curve."""
        distance = self.canvas.distance_to_curve(points)
        chord = points[-1] - points[0]
        normal = np.array([-chord[1], chord[0]]) / (np.linalg.norm(chord) + 1e-6)
        # The flank is told by the distance to the curve moved a little sideways.
        moved = self.canvas.distance_to_curve((points + normal * width).astype(np.float32))
        flank = np.clip((moved - distance) / width, -1, 1)
        inside = (distance < width * 1.3).astype(np.float32)
        return Alteration(self.lit(0.7 * self.streaks + depth * flank), inside)

    def dent(self, rng: np.random.Generator) -> Alteration:
        """Return a dent: light on one slope, shade on the other, strokes bent along."""
        centre = random_place(rng, margin=36)
        radius = rng.uniform(8, 22)
        away_x, away_y = (self.x - centre[0]) / radius, (self.y - centre[1]) / radius
        bump = finite_bump(np.hypot(away_x, away_y))
        light = rng.uniform(0, 2 * math.pi)
        slope = math.cos(light) * away_x + math.sin(light) * away_y
        bent = self.displaced(self.streaks, np.zeros_like(bump), bump * random_sign(rng) * radius * 0.25)
        relief = bent + slope * bump * rng.uniform(2.0, 3.5)
        return Alteration(self.lit(relief), (bump > 0).astype(np.float32))

    def displaced(self, field: Array, by_x: Array, by_y: Array) -> Array:
        """Return a field read at displaced places, the displacement in units."""
        scale = self.canvas.scale
        map_x = ((self.x + by_x) * scale - 0.5).astype(np.float32)
        map_y = ((self.y + by_y) * scale - 0.5).astype(np.float32)
        return cv2.remap(field, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    def cross_brushed(self, rng: np.random.Generator) -> Alteration:
        """Return a patch that was brushed in another direction."""
        centre = random_place(rng, margin=40)
        shape = smoothstep(1.0 - self.ragged_distance(rng, centre, rng.uniform(10, 26)), 0.0, 0.15)
        turn = random_sign(rng) * math.radians(rng.uniform(15, 60))
        return Alteration(self.lit(self.brushed(rng, self.angle + turn)), shape)

    def pits(self, rng: np.random.Generator) -> Alteration:
        """Return a cluster of small pits, each with a bright and a dark side."""
        centre = random_place(rng, margin=40)
        relief = self.streaks.copy()
        coverage = np.zeros_like(relief)
        light = rng.uniform(0, 2 * math.pi)
        for _ in range(int(rng.integers(3, 8))):
            place = (centre[0] + rng.normal(0, 9), centre[1] + rng.normal(0, 9))
            radius = rng.uniform(1.8, 3.5)
            away_x, away_y = (self.x - place[0]) / radius, (self.y - place[1]) / radius
            inside = np.hypot(away_x, away_y) < 1
            slope = math.cos(light) * away_x + math.sin(light) * away_y
            relief[inside] = 0.6 * relief[inside] + 2.2 * slope[inside]
            coverage[inside] = 1.0
        return Alteration(self.lit(relief), coverage)


class PrintedParts(Scene):
    """A tray of printed parts, four by four, each set down a little crookedly."""

    per_side = 4
    half_length = 21.0
    half_height = 16.0

    defects = ("colour_shift", "misprint", "missing_part", "scratch", "tilted_part")

    def arrange(self, rng: np.random.Generator) -> None:
        """Draw the tray's place, each part's place, turn and shade, and the grain of the materials."""
        count = self.per_side
        tray = rng.uniform(-2.5, 2.5, 2)
        self.shift = (tray + rng.normal(0, 0.7, (count, count, 2))).astype(np.float32)
        self.turn = np.deg2rad(rng.normal(0, 1.2, (count, count))).astype(np.float32)
        self.shade = (1.0 + 0.05 * rng.standard_normal((count, count))).astype(np.float32)
        self.board_grain = 0.6 * self.canvas.noise(rng, 0.8, 0.8) + 0.6 * self.canvas.noise(rng, 4.0, 4.0)
        self.part_grain = self.canvas.noise(rng, 0.7, 0.7)
        warmth = rng.uniform(0.97, 1.03, (3, 3)).astype(np.float32)
        self.board_colour = np.array([0.30, 0.42, 0.36], dtype=np.float32) * warmth[0]
        self.body_colour = np.array([0.58, 0.53, 0.47], dtype=np.float32) * warmth[1]
        self.ink_colour = np.array([0.27, 0.30, 0.40], dtype=np.float32) * warmth[2]

    def render(self) -> Array:
        """Return the tray."""
        return self.tray()

    def frame(self, shift: Array, turn: Array) -> tuple[Array, Array, NDArray[np.int64], NDArray[np.int64]]:
        """Return each sample's place in its part's frame, x and y in units, and the part's column and row."""
        pitch = UNITS / self.per_side
        column = np.minimum((self.x / pitch).astype(np.int64), self.per_side - 1)
        row = np.minimum((self.y / pitch).astype(np.int64), self.per_side - 1)
        middle = ((np.arange(self.per_side) + 0.5) * pitch).astype(np.float32)
        centre_x, centre_y = middle[None, :] + shift[..., 0], middle[:, None] + shift[..., 1]
        along, across = rotated(self.x - centre_x[row, column], self.y - centre_y[row, column], turn[row, column])
        return along, across, column, row

    def body(self, along: Array, across: Array) -> Array:
        """Return the signed distance to a part's rounded outline, negative inside, in units."""
        return rounded_box(along, across, self.half_length, self.half_height, 4.0)

    def ink(self, along: Array, across: Array) -> NDArray[np.bool_]:
        """Return where a part is printed: a ring, and three bars of different lengths."""
        ring = np.abs(np.hypot(along + 9.5, across) - 6.0) < 1.5
        bars = np.zeros_like(ring)
        for offset, length in ((-7.0, 8.0), (0.0, 5.5), (7.0, 7.0)):
            bars |= rounded_box(along - 1.5 - length, across - offset, length, 1.5, 0.7) < 0
        return ring | bars

    def tray(
        self,
        shift: Array | None = None,
        turn: Array | None = None,
        printed: NDArray[np.bool_] | None = None,
        missing: tuple[int, int] | None = None,
        body_colour: Array | None = None,
    ) -> Array:
        """Return the tray ``(side, side, 3)``, with some properties replaced.

        Args:
            shift: Places of the parts of shape ``(4, 4, 2)``.
            turn: Turns of the parts of shape ``(4, 4)``.
            printed: Where there is ink, of shape ``(side, side)``.
            missing: Row and column of a part that is not there.
            body_colour: Colour of the parts, broadcast to ``(4, 4, 3)``.
        """
        along, across, column, row = self.frame(
            self.shift if shift is None else shift, self.turn if turn is None else turn
        )
        colours = np.broadcast_to(self.body_colour if body_colour is None else body_colour, (*self.shade.shape, 3))
        outline = self.body(along, across)
        there = outline < 0
        shadow = self.body(along - 1.6, across - 1.6) < 0
        if missing is not None:
            gone = (row == missing[0]) & (column == missing[1])
            there, shadow = there & ~gone, shadow & ~gone
        if printed is None:
            printed = self.ink(along, across)
        picture = self.board_colour * (1.0 + 0.1 * self.board_grain)[..., None]
        picture *= np.where(shadow, 0.7, 1.0)[..., None].astype(np.float32)
        bevel = 1.0 + 0.12 * smoothstep(outline + 2.5, 0.0, 2.5) * np.sign(-across - along)
        surface = self.shade[row, column] * (1.0 + 0.045 * self.part_grain) * bevel
        bodies = colours[row, column] * surface[..., None]
        inked = self.ink_colour * (1.0 + 0.05 * self.part_grain)[..., None]
        picture = np.where(there[..., None], bodies, picture)
        return np.where((there & printed)[..., None], inked, picture)

    def any_part(self, rng: np.random.Generator) -> tuple[int, int]:
        """Return the row and column of a part."""
        row, column = rng.integers(0, self.per_side, 2)
        return int(row), int(column)

    def missing_part(self, rng: np.random.Generator) -> Alteration:
        """Return a tray on which one part is not there."""
        return self.changed(self.tray(missing=self.any_part(rng)), close=3.0)

    def tilted_part(self, rng: np.random.Generator) -> Alteration:
        """Return a tray on which one part lies crookedly."""
        row, column = self.any_part(rng)
        turn = self.turn.copy()
        turn[row, column] += random_sign(rng) * math.radians(rng.uniform(9, 18))
        return self.changed(self.tray(turn=turn), close=7.0)

    def misprint(self, rng: np.random.Generator) -> Alteration:
        """Return a tray on which one part's print is turned over, moved, or partly lost."""
        part = self.any_part(rng)
        along, across, column, row = self.frame(self.shift, self.turn)
        here = (row == part[0]) & (column == part[1])
        kind = rng.integers(4)
        if kind == 0:
            wrong = self.ink(-along, across)
        elif kind == 1:
            move = [random_sign(rng) * rng.uniform(2.0, 3.5) for _ in range(2)]
            wrong = self.ink(along + move[0], across + move[1])
        elif kind == 2:
            bar = rng.integers(3)
            band = np.abs(across - (-7.0, 0.0, 7.0)[bar]) < 3.0
            wrong = self.ink(along, across) & ~(band & (along > 1.0))
        else:
            wrong = self.ink(along, across) & ~(along < -2.0)
        printed = np.where(here, wrong, self.ink(along, across))
        return self.changed(self.tray(printed=printed), close=4.0)

    def colour_shift(self, rng: np.random.Generator) -> Alteration:
        """Return a tray on which one part has another hue, at about the same brightness."""
        row, column = self.any_part(rng)
        colours = np.broadcast_to(self.body_colour, (*self.shade.shape, 3)).copy()
        colours[row, column] *= (1.0 + rng.uniform(0.08, 0.13) * unit_tint(rng, brightness=0.1)).astype(np.float32)
        return self.changed(self.tray(body_colour=colours), close=2.0)

    def scratch(self, rng: np.random.Generator) -> Alteration:
        """Return a scratch over parts and tray: it lightens what is dark and darkens what is light."""
        points = random_curve(rng, length=rng.uniform(22, 60), bend=0.3)
        distance = self.canvas.distance_to_curve(points)
        middle = self.normal.mean(axis=2, keepdims=True)
        strength = rng.uniform(0.14, 0.2)
        scratched = self.normal + np.where(middle > 0.43, -strength, strength).astype(np.float32)
        return Alteration(scratched, (distance < rng.uniform(1.0, 1.7)).astype(np.float32))


@dataclass(frozen=True)
class Part:
    """A part that lies at ``place``, turned by radians; ``size`` is the length of its own frame's unit."""

    kind: str
    place: tuple[float, float]
    turn: float
    size: float
    colour: Array


class LooseParts(Scene):
    """Screws, washers and nuts strewn on a mat: each lies anywhere, turned any way, and none touches another."""

    # What a part takes up: half the length of its middle line, and the radius around it, in units.
    extents: ClassVar[dict[str, tuple[float, float]]] = {
        "screw": (34.0, 15.0),
        "washer": (0.0, 25.0),
        "nut": (0.0, 24.0),
    }
    metals: ClassVar[dict[str, Array]] = {
        "screw": np.array([0.50, 0.52, 0.55]),
        "washer": np.array([0.55, 0.57, 0.59]),
        "nut": np.array([0.54, 0.49, 0.40]),
    }
    gap = 14.0
    screw_length = 76.0

    defects = ("bent_screw", "chipped_washer", "foreign_matter", "split_nut", "worn_thread")

    def arrange(self, rng: np.random.Generator) -> None:
        """Strew the parts, and draw the light's direction and the grain of the materials."""
        light = math.radians(rng.uniform(221, 229))
        self.light = (0.35 * math.cos(light), 0.35 * math.sin(light), 0.937)
        self.parts: list[Part] = []
        others = rng.choice(["screw", "washer", "nut"], rng.integers(0, 4))
        taken: Array = np.empty((0, 3))
        for kind in ("screw", "washer", "nut", *others.tolist()):
            taken = self.put_down(rng, kind, taken)
        self.heights, self.colours = zip(*((self.height(part), part.colour) for part in self.parts), strict=True)
        self.mat_grain = self.canvas.noise(rng, 0.8, 0.8)
        self.metal_grain = self.canvas.noise(rng, 0.7, 0.7)
        colour = np.array([0.47, 0.50, 0.49], dtype=np.float32) * rng.uniform(0.99, 1.01, 3).astype(np.float32)
        self.mat = colour * (1.0 + 0.02 * self.canvas.undulation(rng, 3))[..., None]

    def put_down(self, rng: np.random.Generator, kind: str, taken: Array) -> Array:
        """Put a part where there is room among discs ``(N, 3)``: x, y, radius; return the discs with its own."""
        half_length, radius = self.extents[kind]
        size = rng.normal(1.25, 0.015)
        colour = self.metals[kind] * rng.normal(1.0, 0.02)
        for _ in range(100):
            turn, place = rng.uniform(0, 2 * math.pi), random_place(rng, margin=radius + 5)
            line = np.linspace(-half_length, half_length, 7)[:, None] * [math.cos(turn), math.sin(turn)] + place
            discs = np.column_stack([line, np.full(len(line), radius)])
            inside = np.abs(line - UNITS / 2).max() < UNITS / 2 - radius - 4
            apart = np.linalg.norm(discs[:, None, :2] - taken[:, :2], axis=2) - radius - taken[:, 2]
            if inside and (apart > self.gap).all():
                self.parts.append(Part(kind, place, turn, size, colour.astype(np.float32)))
                return np.concatenate([taken, discs])
        return taken

    def render(self) -> Array:
        """Return the parts on their mat."""
        return self.lit(self.heights, self.colours)

    def lit(self, heights: Sequence[Array], colours: Sequence[Array]) -> Array:
        """Return things on the mat under a lamp ``(side, side, 3)``, given heights ``(side, side)``, 0 beside each."""
        stack = np.stack(heights)
        height = stack.max(axis=0)
        there = height > 0
        slope_y, slope_x = np.gradient(height, np.float32(1 / self.canvas.scale))
        facing = self.light[2] - self.light[0] * slope_x - self.light[1] * slope_y
        facing = np.maximum(facing / np.sqrt(1.0 + slope_x**2 + slope_y**2), 0)
        shine = 0.3 + 0.75 * facing + 0.2 * facing**16
        metal = np.stack(colours)[stack.argmax(axis=0)] * (shine * (1.0 + 0.02 * self.metal_grain))[..., None]
        away = [-3.0 * part * self.canvas.scale for part in self.light[:2]]
        shift = np.array([[1, 0, away[0]], [0, 1, away[1]]])
        shadow = cv2.warpAffine(there.astype(np.float32), shift, (self.canvas.side, self.canvas.side))
        shadow = cv2.GaussianBlur(shadow, (0, 0), max(0.8 * self.canvas.scale, 0.3))
        mat = self.mat * ((1.0 + 0.04 * self.mat_grain) * (1.0 - 0.4 * shadow))[..., None]
        return np.where(there[..., None], metal, mat)

    def frame(self, part: Part) -> tuple[Array, Array]:
        """Return each sample's place in a part's frame, x and y in units."""
        along, across = rotated(self.x - part.place[0], self.y - part.place[1], part.turn)
        return along / part.size, across / part.size

    def height(
        self, part: Part, cut: Array | float = math.inf, bend: float = 0.0, worn: tuple[float, float] = (0.0, 0.0)
    ) -> Array:
        """Return a part's height in units, 0 beside it, of shape ``(side, side)``.

        A washer or nut is cut away where ``cut`` is negative; a screw's tip is bent sideways by ``bend``, and its
        thread worn off between two distances from the head's end, both in its own units.
        """
        along, across = self.frame(part)
        if part.kind == "screw":
            return self.screw(along, across, bend, worn)
        distance = np.hypot(along, across)
        if part.kind == "washer":
            rim, hole, thickness = 20.0 - distance, distance - 10.5, 1.5 + 0.05 * np.cos(distance * 3.0)
        else:
            sides = [np.abs(rotated(along, across, turn * math.pi / 3)[0]) for turn in range(3)]
            rim, hole = 17.0 - np.maximum.reduce(sides), distance - 9.5
            thickness = np.minimum(3.0, 2.2 + 0.6 * (18.2 - distance))
        flat = np.minimum(np.minimum(np.minimum(rim, hole), cut), thickness)
        if part.kind == "nut":  # its thread shows in the hole
            flat = np.where((np.abs(hole + 1.5) < 1.5) & (cut > 0), 0.4 + 0.25 * np.cos(hole * 4.0), flat)
        return np.maximum(flat, 0).astype(np.float32)

    def screw(self, along: Array, across: Array, bend: float, worn: tuple[float, float]) -> Array:
        """Return the height of a screw that lies on its side, see :meth:`height`; 0 along is its middle."""
        along = along + self.screw_length / 2
        across = across - bend * (np.maximum(along - 26.0, 0) / (self.screw_length - 26.0)) ** 2
        thread = smoothstep(along, 20, 23)
        first, last = worn
        if last > first:
            thread *= 1 - 0.95 * smoothstep(along, first, first + 2) * smoothstep(-along, -last, 2 - last)
        radius = 5.0 - 2.0 * smoothstep(along, self.screw_length - 6, self.screw_length)
        radius = radius + thread * (0.4 + 0.6 * np.cos(2 * math.pi * (along / 5.0 + across / 40)))
        shank = np.sqrt(np.maximum(radius**2 - across**2, 0)) * ((along > 5) & (along < self.screw_length))
        facets = 7.0 - 0.6 * np.maximum(np.abs(across) - 5.5, 0)
        head = np.minimum(-3.0 * rounded_box(along - 5.5, across, 5.5, 11.0, 1.5), facets)
        return np.maximum(np.maximum(shank, head), 0).astype(np.float32)

    def replaced(self, number: int, height: Array, close: float) -> Alteration:
        """Return the parts with another height of one of them."""
        heights = [height if each == number else usual for each, usual in enumerate(self.heights)]
        return self.changed(self.lit(heights, self.colours), close)

    def any_part(self, rng: np.random.Generator, *kinds: str) -> int:
        """Return the number of a part of one of some kinds."""
        fitting = [number for number, part in enumerate(self.parts) if part.kind in kinds]
        return fitting[int(rng.integers(len(fitting)))]

    def bent_screw(self, rng: np.random.Generator) -> Alteration:
        """Return parts of which one screw is bent."""
        number = self.any_part(rng, "screw")
        bend = random_sign(rng) * rng.uniform(12, 18)
        return self.replaced(number, self.height(self.parts[number], bend=bend), close=4.0)

    def worn_thread(self, rng: np.random.Generator) -> Alteration:
        """Return parts of which one screw has lost a stretch of its thread."""
        number = self.any_part(rng, "screw")
        length = rng.uniform(20, 32)
        first = rng.uniform(27, self.screw_length - 7 - length)
        return self.replaced(number, self.height(self.parts[number], worn=(first, first + length)), close=4.0)

    def chipped_washer(self, rng: np.random.Generator) -> Alteration:
        """Return parts of which one washer lacks a piece of its rim."""
        number = self.any_part(rng, "washer")
        part = self.parts[number]
        angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(10.0, 13.0)
        reach = 19 * part.size
        place = part.place[0] + reach * math.cos(angle), part.place[1] + reach * math.sin(angle)
        cut = radius * (self.ragged_distance(rng, place, radius) - 1)
        return self.replaced(number, self.height(part, cut), close=2.0)

    def split_nut(self, rng: np.random.Generator) -> Alteration:
        """Return parts of which one nut is split from its hole to its rim."""
        number = self.any_part(rng, "nut")
        part = self.parts[number]
        angle = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.05, 6))
        points = np.linspace(7, 26, 6)[:, None] * np.column_stack([np.cos(angle), np.sin(angle)]) + part.place
        cut = self.canvas.distance_to_curve(points.astype(np.float32)) - rng.uniform(2.0, 3.5)
        return self.replaced(number, self.height(part, cut), close=2.0)

    def foreign_matter(self, rng: np.random.Generator) -> Alteration:
        """Return parts of which one has something stuck to it."""
        number = self.any_part(rng, *self.extents)
        part = self.parts[number]
        # On a screw's middle line, or half-way between hole and rim.
        reach = rng.uniform(-34, 34) if part.kind == "screw" else 15 * part.size
        place = part.place[0] + reach * math.cos(part.turn), part.place[1] + reach * math.sin(part.turn)
        radius = rng.uniform(8, 12)
        swell = np.maximum(1 - self.ragged_distance(rng, place, radius) ** 2, 0)
        crumbs = 1.0 + 0.15 * self.canvas.noise(rng, 0.9, 0.9)
        blob = np.where(swell > 0, self.heights[number] + 0.3 + 3.5 * np.sqrt(swell) * crumbs, 0).astype(np.float32)
        colour = rng.uniform(0.8, 1.1) * np.array([0.60, 0.56, 0.50], dtype=np.float32)
        altered = self.lit([*self.heights, blob], [*self.colours, colour.astype(np.float32)])
        return self.changed(altered, close=2.0)


SURFACES: dict[str, type[Scene]] = {
    "weave": Weave,
    "brushed_metal": BrushedMetal,
    "printed_parts": PrintedParts,
    "loose_parts": LooseParts,
}


def draw_surface(
    category: str, defect: str | None, image_size: int, seed: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw the picture with this seed of a surface, with a defect or with ``None``.

    Returns:
        The picture as RGB of shape ``(H, W, 3)`` and the defect's mask, 0 or 255, of shape ``(H, W)``.
    """
    scene_rng, defect_rng, camera_rng = (np.random.default_rng([*seed, stream]) for stream in range(3))
    surface = SURFACES[category]
    scene = surface(Canvas(image_size * SUPERSAMPLING), scene_rng)
    picture, mask = scene.normal, np.zeros((image_size, image_size), dtype=np.uint8)
    if defect is not None:
        alteration = getattr(scene, defect)(defect_rng)
        inside = averaged_down(alteration.coverage) >= MASK_COVERAGE
        mask[inside] = 255
        # A defect that no mask pixel owns up to must leave no trace.
        coverage = alteration.coverage * inside.repeat(SUPERSAMPLING, axis=0).repeat(SUPERSAMPLING, axis=1)
        picture = picture + coverage[..., None] * (alteration.colour - picture)
    return photographed(averaged_down(picture), camera_rng), mask


def averaged_down(samples: Array) -> Array:
    """Average blocks of samples into pixels: ``(side, side, ...)`` to ``(side / 2, side / 2, ...)``."""
    height, width = samples.shape[0] // SUPERSAMPLING, samples.shape[1] // SUPERSAMPLING
    return cv2.resize(samples, (width, height), interpolation=cv2.INTER_AREA)


def photographed(radiance: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return what a camera sees of ``(H, W, 3)``: uneven light, its exposure, noise that grows with the light."""
    height, width = radiance.shape[:2]
    exposure = rng.uniform(0.86, 1.14) * rng.uniform(0.98, 1.02, 3)
    slope_x, slope_y = rng.uniform(-0.07, 0.07, 2)
    light = 1.0 + slope_x * np.linspace(-1, 1, width)[None, :] + slope_y * np.linspace(-1, 1, height)[:, None]
    seen = radiance * light[..., None].astype(np.float32) * exposure.astype(np.float32)
    noise = rng.standard_normal(radiance.shape, dtype=np.float32)
    seen = seen + noise * np.sqrt(0.008**2 + 0.015**2 * np.clip(seen, 0, 1))
    return np.round(np.clip(seen, 0, 1) * 255).astype(np.uint8)


def smoothstep(value: Array, low: float, high: float) -> Array:
    """Return 0 below ``low``, 1 above ``high`` and a smooth step between, in the shape of ``value``."""
    step = np.clip((value - low) / (high - low), 0, 1)
    return (step * step * (3 - 2 * step)).astype(np.float32)


def finite_bump(distance: Array) -> Array:
    """Return a smooth bump: 1 at distance 0, exactly 0 from about 0.83 on."""
    bump = np.maximum(1.0 - np.minimum(distance, 1.0) ** 2, 0.0) ** 2
    return np.maximum(bump - 0.1, 0.0) / 0.9


def rotated(x: Array, y: Array, angle: float | Array) -> tuple[Array, Array]:
    """Return coordinates along and across a direction."""
    # A Python number keeps single precision, which numpy's own scalars would raise to double.
    cos = math.cos(angle) if isinstance(angle, float) else np.cos(angle)
    sin = math.sin(angle) if isinstance(angle, float) else np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def rounded_box(x: Array, y: Array, half_width: float, half_height: float, radius: float) -> Array:
    """Return the signed distance to a box with rounded corners, negative inside."""
    beyond_x, beyond_y = np.abs(x) - half_width + radius, np.abs(y) - half_height + radius
    outside = np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0))
    return outside + np.minimum(np.maximum(beyond_x, beyond_y), 0) - radius


def unit_tint(rng: np.random.Generator, brightness: float) -> Array:
    """Return a random direction in RGB with a limited share of plain brightness, of shape ``(3,)``."""
    hue = rng.standard_normal(3)
    hue -= hue.mean()
    hue *= np.sqrt(3) / (np.linalg.norm(hue) + 1e-6)
    return hue * math.sqrt(1 - brightness**2) + brightness * random_sign(rng)


def random_sign(rng: np.random.Generator) -> float:
    """Return -1 or 1."""
    return 1.0 if rng.integers(2) else -1.0


def random_place(rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """Return a place, x and y in units, at least ``margin`` away from the border."""
    return rng.uniform(margin, UNITS - margin), rng.uniform(margin, UNITS - margin)


def random_curve(rng: np.random.Generator, length: float, bend: float, angle: float | None = None) -> Array:
    """Return a stroke inside the picture, ``(33, 2)`` corners in units.

    It deviates from a straight line by at most ``bend``, relative to its length; a direction of ``None`` is random.
    """
    direction = rng.uniform(0, math.pi) if angle is None else angle
    margin = 12 + length / 2
    centre = rng.uniform(margin, UNITS - margin, 2)
    step = np.linspace(-0.5, 0.5, 33)
    sideways = (
        rng.uniform(-bend, bend) * (0.25 - step**2) * 2 + rng.uniform(-bend, bend) * np.sin(2 * math.pi * step) * 0.2
    )
    along = np.array([np.cos(direction), np.sin(direction)])
    across = np.array([-along[1], along[0]])
    curve = centre + length * (step[:, None] * along + sideways[:, None] * across)
    return curve.astype(np.float32)
