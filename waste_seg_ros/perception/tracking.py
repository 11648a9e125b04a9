"""Tracks: one number for each item along the belt, however often it is seen.

What lies on a belt moves as one body. The tracker therefore keeps two things apart: how far the
belt has travelled, one number for all (``SpeedEstimator``), and where each item lies *on* the
belt, which hardly ever changes. An image gives both: the shift that all known items agree on
says how far the belt has gone, what remains says where each item lies. Much follows from it:

* a wrong speed does not make tracks drift, for the travel is measured in each image; a belt that
  stops and starts again, or runs backwards, is followed;
* a stamp that is 10 ms off shifts all items alike, which is known from a change of their place;
* what is hidden, or has left the view, goes on by the travel of what is seen;
* two cameras hand over by themselves, since both measure in the belt frame.

Travel and place are a Kalman filter each (Kalman 1960), correlations between them are left out.
Detections are assigned by the Hungarian method (Kuhn 1955) within a gate of Mahalanobis distance.

Belt frame (REP 103): x along the belt's motion, y to its left, z up; metres, seconds, radians.

Limits: what moves on the belt by itself, as a rolling bottle, is followed only as far as the gate
allows. Where the height of items is not corrected for, tall ones seem to be faster than the belt
by their height over the camera's distance, and so does an estimated speed; an encoder does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

Array = NDArray[np.float64]

#: Bits of a detection's flags, the same as those of the message WasteItem.
TOUCHING, TRUNCATED, UNCERTAIN = 1, 2, 4

#: An update outside of this is an error of the caller: beyond it float64 loses nanoseconds.
_MOST_SECONDS = 1e11


@dataclass(frozen=True, eq=False)
class Detection:
    """An item seen in one image, in the belt frame.

    Attributes:
        position: (2,) x, y of its centre [m].
        covariance: (2, 2) of the position [m^2].
        yaw: of its long axis [rad], as that of an axis: a half turn is the same.
        length, width: of the smallest rectangle around it [m].
        class_index: 1..C, 0 if its kind is not known.
        score: 0..1.
        flags: TOUCHING, TRUNCATED, UNCERTAIN.
        source: the caller's number for it, given back in ``Track.source``.
    """

    position: Array
    covariance: Array
    yaw: float = 0.0
    length: float = 0.0
    width: float = 0.0
    class_index: int = 0
    score: float = 1.0
    flags: int = 0
    source: int = -1


@dataclass(frozen=True, eq=False, slots=True)
class Track:
    """An item along the belt, at the stamp of the update that gave it.

    Attributes:
        id: from 1, never given twice.
        stamp_s: the moment that ``position`` is for.
        position: (2,) x, y [m].
        velocity: (2,) of the belt [m/s].
        covariance: (2, 2) of the position [m^2].
        speed_sigma: standard deviation of the speed along x [m/s].
        yaw: of the long axis, in (-pi/2, pi/2].
        length, width: [m].
        class_index: what most of its detections were, weighed by score.
        score: mean score of the detections of that class, those of others counted as 0.
        age: seconds since it was first seen.
        hits: in how many images it was seen.
        last_seen_s: stamp of the last of them.
        hidden_s: for how long it ought to have been seen and was not.
        whole: it was seen whole once; else its place is that of a part.
        source: ``Detection.source`` in this update, -1 if it was not seen.
        flags: of its last detection.
    """

    id: int
    stamp_s: float
    position: Array
    velocity: Array
    covariance: Array
    speed_sigma: float
    yaw: float
    length: float
    width: float
    class_index: int
    score: float
    age: float
    hits: int
    last_seen_s: float
    hidden_s: float
    whole: bool
    source: int
    flags: int


@dataclass(frozen=True)
class TrackerParams:
    """How items are followed.

    Attributes:
        speed, speed_sigma: what is known of the belt's speed at the start [m/s].
        speed_walk: how much the speed wanders without stopping [m/s per square root of a second].
        stamp_sigma_s: least standard deviation of the stamps [s]; more is found out by itself.
        walk_m: how much an item wanders on the belt [m per square root of a second].
        gate: largest squared Mahalanobis distance of a detection to its track; 13.8 leaves out
            one of a thousand.
        min_hits: detections until a thing is an item.
        hidden_s: how long an item may stay unseen within the view.
        memory_s: how long one is remembered that is out of view.
        forget_x: items beyond this x are forgotten [m].
        odd_s: for how long an item may look like two, or in another place, before it is believed.
        back_s: a stamp further back than this begins anew: a recording starts over.
    """

    speed: float = 0.0
    speed_sigma: float = 1.0
    speed_walk: float = 0.003
    stamp_sigma_s: float = 0.001
    walk_m: float = 0.002
    gate: float = 13.8
    min_hits: int = 3
    hidden_s: float = 1.0
    memory_s: float = 30.0
    forget_x: float = math.inf
    odd_s: float = 0.25
    back_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.speed <= 20:
            raise ValueError(
                f"speed is {self.speed} m/s; it must be 0 to 20: the x axis of the belt frame "
                "points along the motion, so turn the frame of a belt that runs the other way"
            )
        for name in (
            "speed_sigma",
            "stamp_sigma_s",
            "walk_m",
            "speed_walk",
            "gate",
            "hidden_s",
            "memory_s",
            "odd_s",
            "back_s",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.min_hits < 1:
            raise ValueError(f"min_hits is {self.min_hits}; it must be at least 1")
        if math.isnan(self.forget_x):
            raise ValueError("forget_x is not a number")


def crossing(track: Track, x_line: float) -> tuple[float, float]:
    """When a track crosses the line at ``x_line`` [m]: stamp and standard deviation [s].

    Both are infinite if the belt stands, runs backwards, or its speed is not known yet. For a
    track that is beyond the line the time is in the past.
    """
    speed = float(track.velocity[0])
    if speed < 1e-3 or speed < 2.0 * track.speed_sigma:
        return math.inf, math.inf
    ahead = (x_line - float(track.position[0])) / speed
    sigma = math.hypot(math.sqrt(float(track.covariance[0, 0])), ahead * track.speed_sigma) / speed
    return track.stamp_s + ahead, sigma


# --- the belt -------------------------------------------------------------------------------------


class SpeedEstimator:
    """Travel and speed of the belt, from the shift between images and from an encoder.

    The state is (travel, k) with d travel / dt = u k. With an encoder u is its speed and k, about
    1, what it is wrong by: so the encoder alone says how the speed changes, and its scale is
    measured. Without one u = 1 and k is the speed, which wanders slowly; if the shifts lie on
    one side of what was foretold again and again (a CUSUM test, Page 1954), the belt has been
    stopped or started and the speed is found anew.

    Attributes:
        time_s: of the state; None before the first stamp.
        travel: of the belt since the start [m]; only differences mean anything.
        stamp_sigma_s: standard deviation of the stamps, as it shows.
    """

    _SLACK, _ALARM = 1.0, 5.0

    def __init__(self, params: TrackerParams | None = None) -> None:
        self._params = params or TrackerParams()
        self.time_s: float | None = None
        self.travel = 0.0
        self.stamp_sigma_s = max(0.01, self._params.stamp_sigma_s)
        self._u = 1.0
        self._encoder = False
        self._k = self._params.speed
        self._p = np.diag([0.0, self._params.speed_sigma**2])
        self._cusum = [0.0, 0.0]
        self._innovations: tuple[float, ...] = ()

    @property
    def speed(self) -> float:
        """Speed of the belt [m/s]."""
        return self._u * self._k

    @property
    def sigma(self) -> float:
        """Standard deviation of the speed [m/s]."""
        return abs(self._u) * math.sqrt(max(0.0, float(self._p[1, 1])))

    @property
    def encoder_scale(self) -> tuple[float, float] | None:
        """True speed over the encoder's, with its standard deviation; None without an encoder."""
        return (self._k, math.sqrt(float(self._p[1, 1]))) if self._encoder else None

    def advance(self, stamp_s: float, speed: float | None = None, speed_sigma: float = 0.0) -> None:
        """Go on to a stamp; one that is not later than the state's changes only the speed.

        Args:
            stamp_s: [s].
            speed: what an encoder says [m/s], None if there is none.
            speed_sigma: its standard deviation [m/s].
        """
        before = self._u
        if speed is None:
            if self._encoder:  # it fell silent: its last word is where the estimate starts
                # What stood when it went silent cannot be known to a thousandth.
                self._p[:, 1] *= self._u
                self._p[1, :] *= self._u
                self._p[1, 1] += 0.01**2
                self._k, self._u, before, self._encoder = self.speed, 1.0, 1.0, False
        else:
            relative = min(max(speed_sigma / max(abs(speed), 0.05), 1e-3), 0.5)
            if not self._encoder:
                self._k, self._encoder, before = 1.0, True, speed
                self._p[0, 1] = self._p[1, 0] = 0.0
                self._p[1, 1] = relative**2
            self._u = speed
        step = 0.0 if self.time_s is None else stamp_s - self.time_s
        if step < 0:
            return
        mean = 0.5 * (before + self._u)
        self.travel += mean * self._k * step
        f = np.array([[1.0, mean * step], [0.0, 1.0]])
        self._p = f @ self._p @ f.T
        if self._encoder:
            # What the encoder does not see: quantisation, and that it is read a little late.
            self._p[0, 0] += (speed_sigma * step) ** 2 + (0.1 * step * (self._u - before)) ** 2
            self._p[1, 1] += 1e-3**2 * step
        else:
            q = self._params.speed_walk**2
            self._p += q * np.array([[step**3 / 3, step**2 / 2], [step**2 / 2, step]])
            # Over a pause the belt may have been stopped and started.
            if step > 1.0:
                self._p[1, 1] += self._params.speed_sigma**2
        self.time_s = stamp_s

    def expected(self, stamp_s: float) -> tuple[float, float]:
        """Travel that a picture of this stamp ought to show, and its variance with the stamp's."""
        h = self._row(stamp_s)
        travel = self.travel + h[1] * self._k
        return float(travel), float(h @ self._p @ h) + self.stamp_variance

    @property
    def stamp_variance(self) -> float:
        """Of the travel, by the error of a stamp [m^2]."""
        return (self.speed**2 + self.sigma**2) * self.stamp_sigma_s**2

    def correct(self, stamp_s: float, travel: float, variance: float) -> None:
        """Take in the travel [m] that a picture shows, with the variance [m^2] of the items."""
        h = self._row(stamp_s)
        foretold, spread = self.expected(stamp_s)
        innovation = travel - foretold
        self._learn_jitter(innovation, variance)
        total = spread + variance
        if not self._encoder and self._changed(innovation / math.sqrt(total)):
            self._p[1, 1] += max(0.3, 0.5 * abs(self.speed)) ** 2
            foretold, spread = self.expected(stamp_s)
            total = spread + variance
        gain = self._p @ h / total
        self.travel += float(gain[0]) * innovation
        self._k += float(gain[1]) * innovation
        self._p -= np.outer(gain, gain) * total
        self._p = 0.5 * (self._p + self._p.T)

    def rebase(self, stamp_s: float, travel: float) -> None:
        """The belt has gone ``travel`` at this stamp, whatever was foretold.

        A clock was set, or the belt was jerked; in case of the latter its speed is found anew.
        """
        self.time_s, self.travel = stamp_s, travel
        self._p[0, :] = self._p[:, 0] = 0.0
        if not self._encoder:
            self._p[1, 1] += max(0.3, 0.5 * abs(self.speed)) ** 2
        self._cusum, self._innovations = [0.0, 0.0], ()

    def anchor(self) -> None:
        """Count the travel from the picture of this stamp, since nothing is known of before."""
        self._p[0, :] = self._p[:, 0] = 0.0
        self._p[0, 0] = self.stamp_variance

    def restart(self) -> None:
        """Time begins anew; what is known of the speed is now known less well."""
        self.time_s = None
        self._p = np.diag([0.0, float(self._p[1, 1])])
        if not self._encoder:
            self._p[1, 1] += (0.2 * self.speed) ** 2 + 0.01**2
        self._cusum, self._innovations = [0.0, 0.0], ()

    def _row(self, stamp_s: float) -> Array:
        """How the travel at a stamp follows from the state."""
        since = 0.0 if self.time_s is None else stamp_s - self.time_s
        return np.array([1.0, self._u * since])

    def _changed(self, score: float) -> bool:
        score = min(max(score, -4.0), 4.0)
        for side, sign in enumerate((1.0, -1.0)):
            self._cusum[side] = max(0.0, self._cusum[side] + sign * score - self._SLACK)
        if max(self._cusum) < self._ALARM:
            return False
        self._cusum = [0.0, 0.0]
        return True

    def _learn_jitter(self, innovation: float, variance: float) -> None:
        """Stamps that jitter make innovations zigzag; a new speed makes them a ramp."""
        last, self._innovations = self._innovations, (*self._innovations[-1:], innovation)
        if len(last) < 2 or abs(self.speed) < 0.02:
            return
        square = ((innovation - 2 * last[1] + last[0]) ** 2 / 6 - variance) / self.speed**2
        now = self.stamp_sigma_s**2
        square = min(max(square, 0.0), 16.0 * now)
        now += (square - now) / 40.0
        self.stamp_sigma_s = min(max(math.sqrt(now), self._params.stamp_sigma_s), 0.1)


# --- the tracker ----------------------------------------------------------------------------------

_ROW = np.dtype(
    [
        ("id", "i8"),  # 0 until it is an item
        ("place", "f8", 2),  # on the belt: x less travel, y
        ("cov", "f8", (2, 2)),
        ("size", "f8", 2),
        ("axis", "f8", 2),  # cosine and sine of the double yaw, longer for what is elongated
        ("shapes", "i8"),  # detections that size and axis are of
        ("weight", "f8"),  # of the votes
        ("hits", "i8"),
        ("misses", "i8"),
        ("hidden", "f8"),
        ("odd", "f8"),
        ("first", "f8"),
        ("last", "f8"),
        ("whole", "?"),
        ("paired", "i8"),  # how often, of late, it was seen together with what it lies upon
        ("source", "i8"),
        ("flags", "i8"),
    ]
)


@dataclass(eq=False)
class _Seen:
    """The detections of one update, as columns."""

    position: Array  # (D, 2)
    cov: Array  # (D, 2, 2)
    size: Array  # (D, 2)
    yaw: Array  # (D,)
    class_index: NDArray[np.intp]
    score: Array
    flags: NDArray[np.intp]
    source: NDArray[np.intp]
    whole: NDArray[np.bool_] = field(init=False)
    area: Array = field(init=False)

    def __post_init__(self) -> None:
        self.whole = (self.flags & TRUNCATED) == 0
        self.area = self.size[:, 0] * self.size[:, 1]


class Tracker:
    """Follows items along one belt, seen by one camera or several.

    Attributes:
        belt: travel and speed of the belt.
        tracks: what the last update gave.
        ignored: updates that were left out: repeated, or too old.
        restarts: how often time began anew.
    """

    def __init__(self, params: TrackerParams | None = None) -> None:
        self.params = params or TrackerParams()
        self.belt = SpeedEstimator(self.params)
        self.tracks: tuple[Track, ...] = ()
        self.ignored = 0
        self.restarts = 0
        self._rows = np.zeros(0, _ROW)
        self._votes = np.zeros((0, 8))
        self._next = 1
        self._stamps: dict[str, float] = {}

    def update(
        self,
        stamp_s: float,
        detections: Sequence[Detection],
        speed: float | None = None,
        speed_sigma: float = 0.0,
        *,
        camera: str = "",
        view: tuple[float, float, float, float] | None = None,
    ) -> tuple[Track, ...]:
        """Take in what one image shows.

        A stamp that this camera has given before changes nothing; one that is earlier, by at most
        ``back_s``, counts as a picture that comes late; one that is earlier still begins anew (all
        tracks end; their numbers are not used again). The late picture of another camera is
        left out when it is later than that.

        Args:
            stamp_s: when the image was taken [s].
            detections: what is in it.
            speed: what an encoder says [m/s]; it overrides the estimate. Negative when the belt
                runs backwards. None: estimate.
            speed_sigma: standard deviation of ``speed`` [m/s].
            camera: its name, where several see one belt.
            view: x_min, x_max, y_min, y_max of the belt that it sees [m]: an item in it that is
                not seen is forgotten after ``hidden_s``; without, only after ``memory_s``.

        Returns:
            the items, by number, with their places at this stamp.

        Raises:
            ValueError: stamp, speed or a detection is not finite, or a covariance not positive.
        """
        if not abs(stamp_s) < _MOST_SECONDS:
            raise ValueError(f"stamp is {stamp_s} s; it must be finite")
        if speed is not None and not (math.isfinite(speed) and 0 <= speed_sigma < math.inf):
            raise ValueError(f"speed is {speed} +- {speed_sigma} m/s; it must be finite")
        seen = _columns(detections)
        last = self._stamps.get(camera)
        now = self.belt.time_s
        if last is not None and stamp_s == last:
            self.ignored += 1
            return self.tracks
        if last is not None and stamp_s < last - self.params.back_s:
            self._restart()
            last = now = None
        elif now is not None and stamp_s < now - self.params.back_s:
            self.ignored += 1
            return self.tracks
        elif now is not None and stamp_s > now + self.params.memory_s:
            self._restart()
            last = now = None
        since = 0.0 if last is None else max(0.0, stamp_s - last)
        self._stamps[camera] = stamp_s
        ahead = 0.0 if now is None else max(0.0, stamp_s - now)
        self.belt.advance(stamp_s, speed, speed_sigma)
        cov = self._rows["cov"]
        cov[:, 0, 0] += self.params.walk_m**2 * ahead
        cov[:, 1, 1] += self.params.walk_m**2 * ahead
        self._rows["source"] = -1

        seen = _without_doubles(seen)
        if not len(self._rows):
            self.belt.anchor()
        travel, spread = self.belt.expected(stamp_s)
        shift, common = self._shift(seen, travel, spread)
        match = self._assign(seen, travel + shift, common)
        jump = self._lost_lock(seen, match, travel, view)
        if jump is not None:
            travel += jump
            self.belt.rebase(stamp_s, travel)
            spread = self.belt.stamp_variance
            shift, common = self._shift(seen, travel, spread)
            match = self._assign(seen, travel + shift, common)
        match, born, covered, odd = self._explain(seen, match, travel + shift, since)
        travel, spread = self._measure_travel(seen, match, odd, stamp_s, travel + shift)
        self._update_rows(seen, match, odd, stamp_s, travel, spread, since)
        self._miss(match, covered, travel, since, view)
        self._join_twins(match)
        self._give_birth(seen, born, stamp_s, travel, spread)
        self._forget(stamp_s, travel)
        self.tracks = self._publish(stamp_s)
        return self.tracks

    # --- what belongs to what ---------------------------------------------------------------------

    def _shift(self, seen: _Seen, travel: float, spread: float) -> tuple[float, float]:
        """How far off the foretold travel is, as most agree, and the variance that is left."""
        rows = self._rows
        t = np.flatnonzero(rows["whole"])
        d = np.flatnonzero(seen.whole)
        shift, count, tolerance = self._vote(seen, d, t, travel, math.sqrt(spread), None)
        if count < 2:
            return 0.0, spread
        return shift, min(spread, (0.5 * tolerance) ** 2)

    def _vote(
        self,
        seen: _Seen,
        d: NDArray[np.intp],
        t: NDArray[np.intp],
        travel: float,
        sigma: float,
        reach: float | None,
    ) -> tuple[float, int, float]:
        """The shift along x on which the most pairs agree, their number, and how closely.

        A pair of detection and track counts if they lie alike across the belt and are of about
        one length. A shift far from what was foretold needs more pairs to be believed, unless
        a ``reach`` is given, within which all shifts are alike.
        """
        rows = self._rows
        if not len(d) or not len(t):
            return 0.0, 0, 0.0
        dx = seen.position[d, 0][:, None] - travel - rows["place"][t, 0]
        dy = seen.position[d, 1][:, None] - rows["place"][t, 1]
        limit = 4.0 * sigma + 0.01 if reach is None else reach
        across = seen.cov[d, 1, 1][:, None] + rows["cov"][t, 1, 1]
        i, j = np.nonzero((np.abs(dx) < limit) & (dy * dy < self.params.gate * across))
        length = np.maximum(seen.size[d[i], 0], 1e-3) / np.maximum(rows["size"][t[j], 0], 1e-3)
        alike = (length > 0.5) & (length < 2.0)
        i, j = i[alike], j[alike]
        if not len(i):
            return 0.0, 0, 0.0
        found = np.sort(dx[i, j])
        variance = seen.cov[d[i], 0, 0] + rows["cov"][t[j], 0, 0]
        tolerance = max(0.003, 2.5 * math.sqrt(float(np.median(variance))))
        low = np.searchsorted(found, found - tolerance, "left")
        high = np.searchsorted(found, found + tolerance, "right")
        count = high - low
        merit = 3.0 * count
        if reach is None:
            merit = merit - 0.5 * (found / max(sigma, 1e-4)) ** 2
        best = int(merit.argmax())
        shift = float(np.median(found[low[best] : high[best]]))
        return shift, int(count[best]), tolerance

    def _assign(self, seen: _Seen, travel: float, common: float) -> NDArray[np.intp]:
        """(D,) row of each detection's track, -1 for none."""
        rows = self._rows
        match = np.full(len(seen.score), -1, np.intp)
        if not len(match) or not len(rows):
            return match
        dx = seen.position[:, 0][:, None] - travel - rows["place"][:, 0]
        dy = seen.position[:, 1][:, None] - rows["place"][:, 1]
        cut = _cut_variance(seen, rows["size"][:, 0], rows["whole"])
        a = seen.cov[:, 0, 0][:, None] + rows["cov"][:, 0, 0] + common + cut
        b = seen.cov[:, 0, 1][:, None] + rows["cov"][:, 0, 1]
        c = seen.cov[:, 1, 1][:, None] + rows["cov"][:, 1, 1] + cut
        determinant = a * c - b * b
        distance = (c * dx * dx - 2 * b * dx * dy + a * dy * dy) / determinant
        near = distance < self.params.gate
        # What has only each other needs no choice.
        alone = near & (near.sum(1) == 1)[:, None] & (near.sum(0) == 1)
        which, row = np.nonzero(alone)
        match[which] = row
        near[which] = False
        d, t = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
        if len(d):
            part = np.ix_(d, t)
            ratio = np.log(
                np.maximum(seen.size[d, 0], 1e-3)[:, None] / np.maximum(rows["size"][t, 0], 1e-3)
            )
            price = distance[part] + np.log(determinant[part] / determinant[part].min())
            price = price + np.where(cut[part] > 0, 0.0, 0.5 * (ratio / 0.3) ** 2)
            # An item of long standing before one that was seen once.
            price = price + np.where(rows["id"][t] > 0, 0.0, 2.0)
            # Two poor pairs in place of a good one are no gain.
            dear = self.params.gate + 10.0
            price = np.where(near[part], np.minimum(price, dear - 0.1), dear)
            for i, j in zip(*linear_sum_assignment(price), strict=True):
                if near[d[i], t[j]]:
                    match[d[i]] = t[j]
        return match

    def _lost_lock(
        self,
        seen: _Seen,
        match: NDArray[np.intp],
        travel: float,
        view: tuple[float, float, float, float] | None,
    ) -> float | None:
        """By how much clock or belt have jumped, None if they have not."""
        rows = self._rows
        known = rows["whole"] & (rows["id"] > 0)
        x = rows["place"][:, 0] + travel
        whole = seen.whole
        if not whole.any():
            return None
        low, high = view[:2] if view else (seen.position[:, 0].min(), seen.position[:, 0].max())
        wanted = int((known & (x > low) & (x < high)).sum())
        matched = int(known[match[match >= 0]].sum())
        if wanted < 3 or matched >= 0.5 * wanted:
            return None
        reach = abs(self.belt.speed) * self.params.back_s + 0.1
        t = np.flatnonzero(known)
        shift, count, _ = self._vote(seen, np.flatnonzero(whole), t, travel, 1.0, reach)
        return shift if count >= max(3, 0.6 * wanted) and count > 2 * matched else None

    def _explain(
        self, seen: _Seen, match: NDArray[np.intp], travel: float, since: float
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Tell new items from old ones that look otherwise for a while.

        Two items seen as one, one seen as two, and one that seems to have moved: for ``odd_s`` the
        tracks go on as they were, thereafter what is seen is believed.

        Returns:
            match: with old tracks that have got another place.
            born: (D,) detections that are new items.
            covered: (T,) tracks that are hidden by what is seen in their place.
            odd: (D,) matched detections that say nothing of place and shape.
        """
        rows = self._rows
        count = len(match)
        odd = np.zeros(count, bool)
        covered = np.zeros(len(rows), bool)
        born = match < 0
        free = np.ones(len(rows), bool)
        free[match[match >= 0]] = False
        known = (rows["id"] > 0) | (rows["hits"] > 1)
        area = rows["size"][:, 0] * rows["size"][:, 1]
        strange = np.zeros(len(rows), bool)
        patience = self.params.odd_s
        # Matched, but of another size: two seen as one, or a part.
        d = np.flatnonzero((match >= 0) & seen.whole)
        row = match[d]
        other = rows["whole"][row] & known[row]
        other &= (seen.area[d] < 0.6 * area[row]) | (seen.area[d] > 1.5 * area[row])
        strange[row[other]] = True
        odd[d[other]] = rows["odd"][row[other]] <= patience
        place = rows["place"] + np.array([travel, 0.0])
        axis = 0.5 * np.arctan2(rows["axis"][:, 1], rows["axis"][:, 0])
        lost = free & known
        if count and lost.any():
            low, high = seen.position[:, 0].min() - 0.5, seen.position[:, 0].max() + 0.5
            near = np.flatnonzero(lost & (place[:, 0] > low) & (place[:, 0] < high))
            inside = _inside(place[near], seen.position, seen.yaw, seen.size)
            covered[near] = inside[:, match >= 0].any(1)
            several = (match < 0) & (inside.sum(0) > 1)  # seen as one
            covered[near] |= inside[:, several].any(1)
            born[several] = False
        for d in np.flatnonzero(born):
            # One that seems to have moved or grown, or a piece of one.
            owners = np.flatnonzero(known & rows["whole"] & (lost | strange) & ~covered)
            gap = np.hypot(*(place[owners] - seen.position[d]).T)
            owners, gap = owners[gap < 1.0], gap[gap < 1.0]
            one = slice(d, d + 1)
            within = _inside(place[owners], seen.position[one], seen.yaw[one], seen.size[one])[:, 0]
            piece = _inside(seen.position[one], place[owners], axis[owners], rows["size"][owners])[
                0
            ]
            within |= piece & (seen.area[d] < 0.8 * area[owners])
            if not within.any():
                continue
            owner = int(owners[within][gap[within].argmin()])
            strange[owner] = True
            if rows["odd"][owner] <= patience:
                born[d] = False
            elif lost[owner] and seen.whole[d]:
                born[d] = False
                match[d] = owner
                lost[owner] = False
                # Nothing of what was known of its place and shape holds.
                rows["whole"][owner] = False
        rows["odd"] = np.where(strange, rows["odd"] + since, 0.0)
        covered |= strange & free
        return match, born, covered, odd

    # --- what it says -----------------------------------------------------------------------------

    def _measure_travel(
        self,
        seen: _Seen,
        match: NDArray[np.intp],
        odd: NDArray[np.bool_],
        stamp_s: float,
        agreed: float,
    ) -> tuple[float, float]:
        """Travel at the moment the picture was taken, and its variance; tells the belt of it."""
        rows = self._rows
        prior, spread = self.belt.expected(stamp_s)
        d = np.flatnonzero((match >= 0) & seen.whole & ~odd)
        d = d[rows["whole"][match[d]]]
        if not len(d):
            return prior, spread
        row = match[d]
        shown = seen.position[d, 0] - rows["place"][row, 0]
        variance = seen.cov[d, 0, 0] + rows["cov"][row, 0, 0]
        if len(d) > 2:  # what moves by itself has no say
            kept = (shown - agreed) ** 2 < 9.0 * variance + 0.003**2
            if kept.sum() >= 2:
                shown, variance = shown[kept], variance[kept]
        weight = 1.0 / variance
        total = float(weight.sum())
        mean = float((weight * shown).sum()) / total
        self.belt.correct(stamp_s, mean, 1.0 / total)
        # The prior holds the stamp's error, so this is the travel of the picture, not the stamp's.
        precision = 1.0 / max(spread, 1e-12) + total
        return (prior / max(spread, 1e-12) + mean * total) / precision, 1.0 / precision

    def _update_rows(
        self,
        seen: _Seen,
        match: NDArray[np.intp],
        odd: NDArray[np.bool_],
        stamp_s: float,
        travel: float,
        spread: float,
        since: float,
    ) -> None:
        rows = self._rows
        d = np.flatnonzero(match >= 0)
        if not len(d):
            return
        row = match[d]
        rows["hits"][row] += 1
        rows["misses"][row] = 0
        rows["hidden"][row] = 0.0
        rows["last"][row] = np.maximum(rows["last"][row], stamp_s)
        rows["source"][row] = seen.source[d]
        rows["flags"][row] = seen.flags[d]
        # Parts and doubtful shapes say less of the class, too.
        say = np.where(seen.whole[d] & ~odd[d], 1.0, 0.2)
        self._count_votes(row, seen.class_index[d], seen.score[d] * say)
        rows["weight"][row] += say

        # A part is all that was seen so far: the newest view of it stands.
        fresh = ~rows["whole"][row] & ~odd[d]
        if fresh.any():
            self._place(seen, d[fresh], row[fresh], travel, spread)
        # Of what was seen whole a part says nothing new.
        d, row = d[~fresh], row[~fresh]
        good = seen.whole[d] & ~odd[d]
        d, row = d[good], row[good]
        if not len(d):
            return
        p, r = rows["cov"][row], seen.cov[d]
        gain = p @ _inverse(p + r)
        residual = seen.position[d] - rows["place"][row]
        residual[:, 0] -= travel
        rows["place"][row] += np.einsum("nij,nj->ni", gain, residual)
        p = p - gain @ p + spread * gain[:, :, 0][:, :, None] * gain[:, :, 0][:, None, :]
        rows["cov"][row] = 0.5 * (p + np.swapaxes(p, 1, 2))
        rows["shapes"][row] += 1
        share = np.maximum(1.0 / rows["shapes"][row], 0.1)[:, None]
        rows["size"][row] += share * (seen.size[d] - rows["size"][row])
        rows["axis"][row] += share * (_axis(seen.yaw[d], seen.size[d]) - rows["axis"][row])

    def _place(
        self,
        seen: _Seen,
        d: NDArray[np.intp],
        row: NDArray[np.intp],
        travel: float,
        spread: float,
    ) -> None:
        """Put rows where detections are, forgetting where they were."""
        rows = self._rows
        rows["place"][row] = seen.position[d] - [travel, 0.0]
        cov = seen.cov[d].copy()
        cov[:, 0, 0] += spread
        # How far the middle of the part is from that of the whole is anyone's guess.
        part = np.where(seen.whole[d], 0.0, np.maximum(0.5 * seen.size[d, 0], 0.02) ** 2)
        cov[:, 0, 0] += part
        cov[:, 1, 1] += part
        rows["cov"][row] = cov
        rows["size"][row] = seen.size[d]
        rows["axis"][row] = _axis(seen.yaw[d], seen.size[d])
        rows["shapes"][row] = 1
        rows["whole"][row] = seen.whole[d]

    def _count_votes(
        self, row: NDArray[np.intp], class_index: NDArray[np.intp], weight: Array
    ) -> None:
        most = int(class_index.max()) + 1
        if most > self._votes.shape[1]:
            more = np.zeros((len(self._votes), most - self._votes.shape[1]))
            self._votes = np.concatenate([self._votes, more], 1)
        self._votes[row, class_index] += weight

    def _miss(
        self,
        match: NDArray[np.intp],
        covered: NDArray[np.bool_],
        travel: float,
        since: float,
        view: tuple[float, float, float, float] | None,
    ) -> None:
        """Count for how long items were not seen that ought to have been."""
        rows = self._rows
        unseen = ~covered
        unseen[match[match >= 0]] = False
        if view is not None:
            x, y = rows["place"][:, 0] + travel, rows["place"][:, 1]
            half = 0.5 * rows["size"][:, 0]
            unseen &= (x - half > view[0]) & (x + half < view[1])
            unseen &= (y > view[2]) & (y < view[3])
            rows["hidden"][unseen] += since
        rows["misses"][unseen] += 1

    def _join_twins(self, match: NDArray[np.intp]) -> None:
        """Make one of two tracks that lie upon each other and are not seen together.

        They come of an item that is seen now as one shape and now as another.
        """
        rows = self._rows
        place, length = rows["place"], rows["size"][:, 0]
        near = _pairs(place, 0.5 * length)
        near = near[rows["whole"][near].all(1)]
        if not len(near):
            return
        seen = np.zeros(len(rows), bool)
        seen[match[match >= 0]] = True
        axis = 0.5 * np.arctan2(rows["axis"][:, 1], rows["axis"][:, 0])
        gone = np.zeros(len(rows), bool)
        for pair in near:
            within = _inside(place[pair], place[pair], axis[pair], rows["size"][pair])
            if gone[pair].any() or not within.all():
                continue
            if seen[pair].all():
                rows["paired"][pair] = np.minimum(rows["paired"][pair] + 1, 5)
            elif seen[pair].any() and rows["paired"][pair].min() > 0:
                rows["paired"][pair] -= 1
            elif seen[pair].any():
                # The older number stays: it may have been told to an arm.
                first, second = sorted(pair, key=lambda row: (rows["id"][row] == 0, row))
                rows["hits"][first] += rows["hits"][second]
                rows["weight"][first] += rows["weight"][second]
                self._votes[first] += self._votes[second]
                rows["last"][first] = max(rows["last"][first], rows["last"][second])
                if seen[second]:
                    rows["source"][first] = rows["source"][second]
                rows["hidden"][first] = 0.0
                gone[second] = True
        if gone.any():
            self._rows, self._votes = rows[~gone], self._votes[~gone]

    def _give_birth(
        self,
        seen: _Seen,
        born: NDArray[np.bool_],
        stamp_s: float,
        travel: float,
        spread: float,
    ) -> None:
        d = np.flatnonzero(born)
        if not len(d):
            return
        first = len(self._rows)
        if not first:  # the travel counts from this picture
            spread = 0.0
        self._rows = np.concatenate([self._rows, np.zeros(len(d), _ROW)])
        self._votes = np.concatenate([self._votes, np.zeros((len(d), self._votes.shape[1]))])
        row = np.arange(first, first + len(d))
        rows = self._rows
        self._place(seen, d, row, travel, spread)
        rows["first"][row] = rows["last"][row] = stamp_s
        rows["hits"][row] = 1
        rows["source"][row] = seen.source[d]
        rows["flags"][row] = seen.flags[d]
        say = np.where(seen.whole[d], 1.0, 0.2)
        rows["weight"][row] = say
        self._count_votes(row, seen.class_index[d], seen.score[d] * say)

    def _forget(self, stamp_s: float, travel: float) -> None:
        rows, params = self._rows, self.params
        x = rows["place"][:, 0] + travel
        keep = (x <= params.forget_x) & (stamp_s - rows["last"] <= params.memory_s)
        keep &= np.where(rows["id"] > 0, rows["hidden"] <= params.hidden_s, rows["misses"] <= 2)
        if not keep.all():
            self._rows, self._votes = rows[keep], self._votes[keep]
        rows = self._rows
        for row in np.flatnonzero((rows["id"] == 0) & (rows["hits"] >= params.min_hits)):
            rows["id"][row] = self._next
            self._next += 1

    def _restart(self) -> None:
        self.restarts += 1
        self._rows, self._votes = self._rows[:0], self._votes[:0]
        self._stamps.clear()
        self.belt.restart()

    # --- what comes out ---------------------------------------------------------------------------

    def _publish(self, stamp_s: float) -> tuple[Track, ...]:
        rows = self._rows
        # Rows are in the order of birth, numbers in that of proof.
        order = np.flatnonzero(rows["id"] > 0)
        order = order[np.argsort(rows["id"][order], kind="stable")]
        rows, votes = rows[order], self._votes[order]
        if not len(rows):
            return ()
        travel, variance = self.belt.expected(stamp_s)
        variance -= self.belt.stamp_variance
        position = rows["place"] + [travel, 0.0]
        cov = rows["cov"].copy()
        cov[:, 0, 0] += max(variance, 0.0)
        velocity = np.array([self.belt.speed, 0.0])
        for array in (position, cov, velocity):
            array.flags.writeable = False
        best = votes.argmax(1)
        score = votes[np.arange(len(votes)), best] / np.maximum(rows["weight"], 1e-9)
        yaw = 0.5 * np.arctan2(rows["axis"][:, 1], rows["axis"][:, 0])
        yaw[yaw <= -0.5 * np.pi] += np.pi
        columns = (
            rows["id"].tolist(),
            list(position),
            list(cov),
            yaw.tolist(),
            rows["size"].tolist(),
            best.tolist(),
            np.minimum(score, 1.0).tolist(),
            np.maximum(stamp_s - rows["first"], 0.0).tolist(),
            rows["hits"].tolist(),
            rows["last"].tolist(),
            rows["hidden"].tolist(),
            rows["whole"].tolist(),
            rows["source"].tolist(),
            rows["flags"].tolist(),
        )
        sigma = self.belt.sigma
        return tuple(
            Track(
                id=number,
                stamp_s=stamp_s,
                position=place,
                velocity=velocity,
                covariance=spread,
                speed_sigma=sigma,
                yaw=turn,
                length=size[0],
                width=size[1],
                class_index=kind,
                score=sure,
                age=age,
                hits=hits,
                last_seen_s=last,
                hidden_s=hidden,
                whole=whole,
                source=source,
                flags=flags,
            )
            for (
                number,
                place,
                spread,
                turn,
                size,
                kind,
                sure,
                age,
                hits,
                last,
                hidden,
                whole,
                source,
                flags,
            ) in zip(*columns, strict=True)
        )


def _columns(detections: Sequence[Detection]) -> _Seen:
    count = len(detections)
    position = np.array([d.position for d in detections], float).reshape(count, 2)
    cov = np.array([d.covariance for d in detections], float).reshape(count, 2, 2)
    size = np.array([(d.length, d.width) for d in detections], float).reshape(count, 2)
    yaw = np.array([d.yaw for d in detections], float)
    score = np.array([d.score for d in detections], float)
    kind = np.array([d.class_index for d in detections], np.intp)
    good = np.isfinite(position).all(1) & np.isfinite(cov).all((1, 2)) & np.isfinite(size).all(1)
    good &= np.isfinite(yaw) & np.isfinite(score) & (kind >= 0) & (size >= 0).all(1)
    good &= (cov[:, 0, 0] > 0) & (cov[:, 0, 0] * cov[:, 1, 1] > cov[:, 0, 1] * cov[:, 1, 0])
    if not good.all():
        bad = int(good.argmin())
        raise ValueError(
            f"detection {bad} cannot be used: {detections[bad]}; numbers must be finite, sizes and "
            "class not negative, and the covariance positive definite"
        )
    flags = np.array([d.flags for d in detections], np.intp)
    source = np.array([d.source for d in detections], np.intp)
    return _Seen(position, cov, size, yaw, kind, score, flags, source)


def _without_doubles(seen: _Seen) -> _Seen:
    """Leave out what is seen twice: the lesser of two of about one middle and size."""
    if len(seen.score) < 2:
        return seen
    width, area = np.maximum(seen.size[:, 1], 0.004), np.maximum(seen.area, 1e-8)
    near = _pairs(seen.position, 0.35 * width)
    ratio = area[near[:, 0]] / area[near[:, 1]]
    near = near[seen.whole[near].all(1) & (ratio > 0.5) & (ratio < 2.0)]
    if not len(near):
        return seen
    keep = np.ones(len(seen.score), bool)
    # What is the lesser of a pair goes, unless the better went before.
    near = np.where(
        (seen.score[near[:, 0]] >= seen.score[near[:, 1]])[:, None], near, near[:, ::-1]
    )
    for better, lesser in near[np.argsort(-seen.score[near[:, 0]], kind="stable")]:
        if keep[better]:
            keep[lesser] = False
    return _Seen(
        seen.position[keep],
        seen.cov[keep],
        seen.size[keep],
        seen.yaw[keep],
        seen.class_index[keep],
        seen.score[keep],
        seen.flags[keep],
        seen.source[keep],
    )


def _pairs(points: Array, reach: Array) -> NDArray[np.intp]:
    """(P, 2) rising pairs of points (N, 2) that are nearer than the lesser reach of the two."""
    if len(points) < 2:
        return np.zeros((0, 2), np.intp)
    pairs = cKDTree(points).query_pairs(float(reach.max()), output_type="ndarray")
    gap = np.hypot(*(points[pairs[:, 0]] - points[pairs[:, 1]]).T)
    return pairs[gap < reach[pairs].min(1)]


def _inverse(m: Array) -> Array:
    """Of (N, 2, 2) symmetric matrices."""
    a, b, c = m[:, 0, 0], m[:, 0, 1], m[:, 1, 1]
    return np.array([[c, -b], [-b, a]]).transpose(2, 0, 1) / (a * c - b * b)[:, None, None]


def _cut_variance(seen: _Seen, length: Array, whole: NDArray[np.bool_]) -> Array:
    """(D, T): how far the middle of what the border cuts may be from that of the whole [m^2]."""
    if seen.whole.all():
        return np.zeros((len(seen.score), len(length)))
    cut = np.where(seen.whole, 0.0, 1.0)[:, None]
    reach = np.maximum(seen.size[:, 0][:, None], np.where(whole, length, 0.0))
    return cut * np.maximum(reach / 3.0, 0.01) ** 2


def _axis(yaw: Array, size: Array) -> Array:
    """(N, 2) double-angle vectors; as short as the direction of the long axis is doubtful."""
    long = (size[:, 0] - size[:, 1]) / np.maximum(size[:, 0], 1e-6)
    return np.maximum(long, 1e-3)[:, None] * np.stack([np.cos(2 * yaw), np.sin(2 * yaw)], 1)


def _inside(points: Array, middle: Array, yaw: Array, size: Array) -> NDArray[np.bool_]:
    """(N, M): whether point n lies in box m."""
    d = points[:, None] - middle[None]
    c, s = np.cos(yaw), np.sin(yaw)
    along, across = d[..., 0] * c + d[..., 1] * s, d[..., 1] * c - d[..., 0] * s
    return (np.abs(along) < 0.5 * size[:, 0]) & (np.abs(across) < 0.5 * size[:, 1])
