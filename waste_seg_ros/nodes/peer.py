"""The peer of the benchmark in the segmenter's place: same node, another network behind it.

Only ``waste-seg bench graph`` starts it. See `bench.peer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from waste_seg_ros.bench.figures import BenchError
from waste_seg_ros.bench.model import RAW
from waste_seg_ros.bench.peer import PeerNetwork, peer_items
from waste_seg_ros.nodes import declare, run_node
from waste_seg_ros.nodes.loading import Model, ModelError, Request
from waste_seg_ros.nodes.segmenter import Segmenter
from waste_seg_ros.runtime.bundle import BundleError, open_bundle


class Peer(Segmenter):
    """The segmenter node with the peer's network."""

    _extract: Callable[..., Any]

    def _declare(self) -> None:
        super()._declare()
        declare(self, "peer", "", "ONNX file of the network.", read_only=True)
        declare(self, "peer_items", 0, "Keep so many boxes; 0: by score.", low=0, high=10_000)

    def _load(self, request: Request) -> Model:
        """Load the peer in the place of the bundle, of which only the classes' names are used."""
        runtime = request.backend if request.backend in RAW else RAW[0]
        try:
            bundle = open_bundle(request.model)
            path = Path(self.get_parameter("peer").value)
            network = PeerNetwork(path, runtime, request.threads)
        except (BundleError, BenchError) as error:
            raise ModelError(str(error)) from error
        best = self.get_parameter("peer_items").value
        self._extract = functools.partial(peer_items, size=network.input_size, best=best)
        return Model(request, bundle, network, "instance")  # type: ignore[arg-type]

    def _fit_to(self, work: Any, image_size: tuple[int, int]) -> None:
        """Its graph has one size."""
        self._image_size = image_size


def main(args: Sequence[str] | None = None) -> int:
    """Run the peer node."""
    return run_node(Peer, args)


if __name__ == "__main__":
    raise SystemExit(main())
