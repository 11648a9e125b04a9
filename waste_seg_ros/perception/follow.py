"""From items in images to tracks with a shape, and orders for the arms: all that is metric.

Puts what a segmenter finds on the belt (`belt`), follows it (`tracking`), keeps how each item
looked when it was last seen whole, finds out how each arm could hold it (`grasp`), and announces
it (`picks`). No ROS here; the tracker node feeds it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.perception.belt import (
    BeltError,
    BeltItem,
    BeltPlane,
    Camera,
    describe_on_belt,
    height_from_depth,
    to_belt,
)
from waste_seg_ros.perception.grasp import BELT_SIDES, Grasp, Gripper, find_grasps
from waste_seg_ros.perception.picks import Arm, PickOrder, Scheduler, SchedulerParams
from waste_seg_ros.perception.tracking import (
    TRUNCATED,
    Detection,
    Track,
    Tracker,
    TrackerParams,
)

UNKNOWN = "item"
"""Class of an item of which only is known that it is one."""


@dataclass(frozen=True, eq=False)
class Sighting:
    """An item in an image.

    Attributes:
        outline_px: (K, 2) in the image.
        class_name: ``UNKNOWN`` if its kind is not known.
        score: 0..1.
        flags: those of a ``Detection``.
    """

    outline_px: NDArray[Any]
    class_name: str
    score: float
    flags: int = 0


@dataclass(frozen=True)
class Measuring:
    """How items are put on the belt.

    Attributes:
        pixel_sigma: standard deviation of an outline's place in the image [px].
        height_sigma_m: of the height of an outline above the belt where it is not measured.
        tolerance_m: how far a simplified outline may be from the full one.
    """

    pixel_sigma: float = 1.0
    height_sigma_m: float = 0.0
    tolerance_m: float = 0.002


@dataclass(frozen=True)
class View:
    """One image of one camera.

    Attributes:
        stamp_s: when it was taken.
        camera, plane: what took it, and of what.
        name: of the camera, where several see one belt.
        depth: (H, W) registered to it, as `height_from_depth` takes it; or None.
    """

    stamp_s: float
    camera: Camera
    plane: BeltPlane
    name: str = ""
    depth: NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class Shape:
    """How an item looked when it was last seen whole; places are from its centre [m].

    Attributes:
        outline: (K, 2) counter-clockwise seen from above.
        yaw_sigma: standard deviation of the yaw of its long axis [rad].
        height: above the belt, None where it was never measured.
        grasps: by the arm's name how it would hold the item. Under "" that of the default jaws,
            where there are no arms.
    """

    outline: NDArray[np.float64]
    yaw_sigma: float
    height: float | None
    grasps: Mapping[str, Grasp]


@dataclass(frozen=True, eq=False)
class Followed:
    """An item along the belt.

    Attributes:
        track: where it is.
        class_name: what it is.
        shape: None until it has been seen whole.
        reason: why no arm could hold it, or "".
        order: that stands for it, if there is one.
        sighting: number of its sighting in the last image, -1 if it was not seen.
    """

    track: Track
    class_name: str
    shape: Shape | None
    reason: str
    order: PickOrder | None = None
    sighting: int = -1

    @property
    def grasp(self) -> Grasp | None:
        """How it is held: by the arm that has the order, else by the first that could."""
        if self.shape is None:
            return None
        grasps = self.shape.grasps
        if self.order is not None:
            return grasps[self.order.arm]
        return next((g for g in grasps.values() if g.pickable), next(iter(grasps.values())))


class Follower:
    """Follows the items of one belt and gives them to the arms along it.

    Args:
        arms: in any order; none: items are only followed.
        gripper: jaws and cup of the arms; kind and opening are those of each arm.
        tracking, picking, measuring: parameters; the latter two may be changed between updates.
        names: of classes that are known beforehand; others are added as they are seen.

    Raises:
        ValueError: the arms contradict each other, or one cannot have such a gripper.

    Attributes:
        tracker, scheduler: what is at work.
        lost: items that no place on the belt was found for, as they touch the horizon.
    """

    def __init__(
        self,
        arms: Sequence[Arm] = (),
        gripper: Gripper | None = None,
        *,
        tracking: TrackerParams | None = None,
        picking: SchedulerParams | None = None,
        measuring: Measuring | None = None,
        names: Sequence[str] = (),
    ) -> None:
        known = dict.fromkeys([*names, *(name for arm in arms for name in arm.classes)])
        self._names = [name for name in known if name != UNKNOWN]
        self.arms = tuple(sorted(arms, key=lambda arm: (arm.x_m, arm.name)))
        self.measuring = measuring or Measuring()
        self.tracker = Tracker(tracking)
        # What it does not know, no arm asks for by name.
        self.scheduler = Scheduler(arms, picking, self._names)
        self.lost = 0
        self.gripper = gripper or Gripper()
        self._shapes: dict[int, Shape] = {}
        self._seen_area: tuple[Camera, BeltPlane, tuple[float, float, float, float] | None] | None
        self._seen_area = None
        self._restarts = 0

    @property
    def gripper(self) -> Gripper:
        """Jaws and cup of the arms [m]; may be changed between updates."""
        return self._gripper

    @gripper.setter
    def gripper(self, gripper: Gripper) -> None:
        grippers: dict[Gripper, list[str]] = {}
        for arm in self.arms:
            own = replace(
                gripper,
                kind=arm.gripper,
                min_opening=arm.opening[0],
                max_opening=arm.opening[1],
                metre=1.0,
            )
            grippers.setdefault(own, []).append(arm.name)
        if not grippers:
            grippers = {replace(gripper, metre=1.0): [""]}
        self._gripper, self._grippers = gripper, grippers

    def update(
        self,
        view: View,
        sightings: Sequence[Sighting],
        now_s: float,
        *,
        speed: float | None = None,
        speed_sigma: float = 0.0,
        alive: Collection[str] = (),
    ) -> tuple[tuple[Followed, ...], tuple[Followed, ...]]:
        """Take in what an image shows.

        Args:
            view: the image.
            sightings: what was found in it.
            now_s: the time now, on the clock of the stamps.
            speed: of the belt, as an encoder says [m/s]; None: estimate.
            speed_sigma: its standard deviation.
            alive: names of the arms that are ready.

        Returns:
            all items with their places at the image's stamp, by number, and of them those with a
            new order, by pick time. An image that is left out (`Tracker.ignored`) moves nothing.

        Raises:
            ValueError: a stamp or the speed is not finite.
        """
        measured, detections, numbers = self._measure(view, sightings)
        ignored = self.tracker.ignored
        tracks = self.tracker.update(
            view.stamp_s,
            detections,
            speed,
            speed_sigma,
            camera=view.name,
            view=self._area(view),
        )
        if self.tracker.restarts != self._restarts:
            self._restarts = self.tracker.restarts
            self._shapes.clear()
        if self.tracker.ignored == ignored:
            self._keep_shapes(tracks, measured)
        unfit: dict[str, set[int]] = {arm.name: set() for arm in self.arms}
        widths: dict[int, float] = {}
        for track in tracks:
            shape = self._shapes.get(track.id)
            for arm in self.arms:
                grasp = shape.grasps[arm.name] if shape else None
                if grasp is None or not grasp.pickable:
                    unfit[arm.name].add(track.id)
                elif arm.gripper == "jaws":
                    widths[track.id] = grasp.width
        orders = self.scheduler.update(now_s, tracks, alive, unfit=unfit, widths=widths)
        followed = {track.id: self._followed(track, numbers) for track in tracks}
        given = tuple(followed[order.track_id] for order in orders)
        return tuple(followed.values()), given

    def class_name(self, index: int) -> str:
        """Name of a track's class."""
        return self._names[index - 1] if index else UNKNOWN

    def class_index(self, name: str) -> int:
        """Index of a class; one that is new gets the next."""
        if name in (UNKNOWN, ""):
            return 0
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name) + 1

    def _measure(
        self, view: View, sightings: Sequence[Sighting]
    ) -> tuple[list[BeltItem], list[Detection], list[int]]:
        measured: list[BeltItem] = []
        numbers: list[int] = []
        detections: list[Detection] = []
        how = self.measuring
        for number, sighting in enumerate(sightings):
            try:
                height = None
                if view.depth is not None:
                    height = height_from_depth(
                        view.depth, sighting.outline_px, view.camera, view.plane
                    )
                item = describe_on_belt(
                    sighting.outline_px,
                    view.camera,
                    view.plane,
                    pixel_sigma=how.pixel_sigma,
                    height_m=height,
                    height_sigma_m=how.height_sigma_m,
                    tolerance_m=how.tolerance_m,
                )
            except BeltError:  # one more item at the horizon, or a line of pixels
                self.lost += 1
                continue
            detections.append(
                Detection(
                    position=item.position,
                    covariance=item.covariance[:2, :2],
                    yaw=item.yaw,
                    length=item.length,
                    width=item.width,
                    class_index=self.class_index(sighting.class_name),
                    score=sighting.score,
                    flags=sighting.flags,
                    source=len(measured),
                )
            )
            measured.append(item)
            numbers.append(number)
        return measured, detections, numbers

    def _area(self, view: View) -> tuple[float, float, float, float] | None:
        """x_min, x_max, y_min, y_max of belt that the camera sees all of, if it is straight."""
        kept = self._seen_area
        if kept is None or kept[0] is not view.camera or kept[1] is not view.plane:
            width, height = view.camera.size
            corners = [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)]
            area = None
            try:
                places = np.sort(to_belt(view.camera, view.plane, corners), axis=0)
                # Between the inner two of four: right for any trapezium along the axes.
                (x0, y0), (x1, y1) = places[1].tolist(), places[2].tolist()
                area = (x0, x1, y0, y1)
            except BeltError:
                pass
            kept = self._seen_area = (view.camera, view.plane, area)
        return kept[2]

    def _keep_shapes(self, tracks: Sequence[Track], measured: Sequence[BeltItem]) -> None:
        there = {track.id for track in tracks}
        for number in [number for number in self._shapes if number not in there]:
            del self._shapes[number]
        fresh = []
        for track in tracks:
            if track.source < 0 or track.flags & TRUNCATED:
                continue
            item = measured[track.source]
            # Two seen as one, or a part of one, are no shape of it; as the tracker has it.
            if (
                0.6 * track.length * track.width
                <= item.length * item.width
                <= (1.5 * track.length * track.width)
            ):
                fresh.append((track.id, track.source))
        if not fresh:
            return
        outlines = [item.outline for item in measured]
        grasps: dict[str, tuple[Grasp, ...]] = {}
        for gripper, names in self._grippers.items():
            found = find_grasps(
                outlines,
                gripper,
                centers=[(float(i.position[0]), float(i.position[1])) for i in measured],
                angles=[item.yaw for item in measured],
                tolerance=self.measuring.tolerance_m,
                sides=BELT_SIDES,
            )
            grasps |= dict.fromkeys(names, found)
        for number, index in fresh:
            item, before = measured[index], self._shapes.get(number)
            x, y = item.position.tolist()
            own = {
                name: replace(
                    found[index],
                    center=(found[index].center[0] - x, found[index].center[1] - y),
                )
                for name, found in grasps.items()
            }
            height = item.height
            if height is None and before is not None:
                height = before.height
            self._shapes[number] = Shape(
                item.outline - item.position,
                math.sqrt(float(item.covariance[2, 2])),
                height,
                own,
            )

    def _followed(self, track: Track, numbers: Sequence[int]) -> Followed:
        shape = self._shapes.get(track.id)
        least = self.scheduler.params.min_score
        reason = ""
        if shape is None or not track.whole:
            reason = "not yet seen whole"
        elif track.score < least:
            reason = f"score {track.score:.2f} below {least:.2f}"
        elif not any(grasp.pickable for grasp in shape.grasps.values()):
            reason = next(iter(shape.grasps.values())).reason
        return Followed(
            track,
            self.class_name(track.class_index),
            shape,
            reason,
            self.scheduler.order_of(track.id),
            numbers[track.source] if 0 <= track.source < len(numbers) else -1,
        )
