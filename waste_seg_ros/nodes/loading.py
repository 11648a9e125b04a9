"""What the segmenter works with: networks to load and parameters, without ROS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from waste_seg_ros.perception.grasp import Gripper
from waste_seg_ros.perception.items import ItemParams
from waste_seg_ros.runtime import HEADS
from waste_seg_ros.runtime.backends import (
    Backend,
    BackendError,
    input_size_for,
    load_backend,
)
from waste_seg_ros.runtime.bundle import Bundle, open_bundle


@dataclass(frozen=True)
class Request:
    """Which network to load, and how: the parameters that need a load when they change."""

    model: str
    head: str
    backend: str
    threads: int
    input_width: int
    input_height: int
    bundles_dir: str
    verify_backend: bool = True


@dataclass(frozen=True, eq=False)
class Model:
    """A network ready to work."""

    request: Request
    bundle: Bundle
    backend: Backend
    head: str

    @property
    def name(self) -> str:
        """Name of the bundle."""
        return str(self.bundle.manifest.name)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 1..C; none where only waste is told from belt."""
        return () if self.head == "binary" else tuple(self.bundle.manifest.classes)


class ModelError(ValueError):
    """A model cannot be used; the text names the parameter and the mend."""


@dataclass(frozen=True)
class Settings:
    """Parameters that take effect with the next image."""

    pixel_threshold: float
    center_threshold: float
    score_threshold: float
    min_area: int
    max_items: int
    classes: tuple[str, ...]
    belt_distance: float
    gripper: str
    min_opening: float
    max_opening: float
    jaw_width: float
    jaw_thickness: float
    grasp_clearance: float
    friction_angle: float
    cup_diameter: float

    def item_params(self, model: Model) -> ItemParams:
        """As the perception wants them, but for the gripper, which is in metres.

        Raises:
            ValueError: a class that the model does not know, a gripper that cannot be.
        """
        wanted = [name for name in self.classes if name]
        unknown = [name for name in wanted if name not in model.classes]
        if unknown and model.head != "binary":
            raise ValueError(
                f"classes: model '{model.name}' has no class {', '.join(unknown)}; "
                f"it has {', '.join(model.classes)}"
            )
        kept = frozenset(model.classes.index(name) + 1 for name in wanted if name in model.classes)
        return ItemParams(
            pixel_threshold=self.pixel_threshold,
            center_threshold=self.center_threshold,
            score_threshold=self.score_threshold,
            min_area_px=self.min_area,
            max_items=self.max_items,
            class_agnostic=model.head == "binary",
            classes=kept or None,
            gripper=Gripper(
                kind=self.gripper,
                min_opening=self.min_opening,
                max_opening=self.max_opening or math.inf,
                jaw_width=self.jaw_width,
                jaw_thickness=self.jaw_thickness,
                clearance=self.grasp_clearance,
                friction_angle=self.friction_angle,
                cup_diameter=self.cup_diameter,
            ),
        )


def load(request: Request, image_size: tuple[int, int] | None) -> Model:
    """Load a network and run it once, as the first run of a network is slow.

    Args:
        request: what to load.
        image_size: (width, height) of the camera's images if known.

    Raises:
        ModelError: naming the parameter, the cause and the mend.
    """
    search = [Path(request.bundles_dir).expanduser()] if request.bundles_dir else []
    try:
        bundle = open_bundle(request.model, search)
    except (ValueError, OSError) as error:  # BundleError is a ValueError
        raise ModelError(f"model: {error}") from error
    manifest = bundle.manifest
    head = request.head or manifest.head
    if HEADS.index(head) > HEADS.index(manifest.head):
        raise ModelError(
            f"head: model '{manifest.name}' has the head {manifest.head}, which cannot serve as "
            f"{head}; set head to '' or choose a model with the head {head}"
        )
    if (request.input_width > 0) != (request.input_height > 0):
        raise ModelError("input_width: set it and input_height both, or both to 0")
    size: tuple[int, int] | None = None
    if request.input_width:
        size = (request.input_width, request.input_height)
    elif image_size is not None:
        size = input_size_for(image_size, manifest)
    try:
        backend = load_backend(
            bundle,
            request.backend,
            input_size=size,
            threads=request.threads,
            verify=request.verify_backend,
            background=True,
        )
        width, height = backend.input_size
        backend.predict(np.zeros((height, width, 3), np.uint8))
    except BackendError as error:
        raise ModelError(str(error)) from error
    except Exception as error:  # runtimes raise errors of their own
        raise ModelError(
            f"backend {request.backend} cannot run model '{manifest.name}': {error}"
        ) from error
    return Model(request, bundle, backend, head)
