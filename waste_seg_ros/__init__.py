"""Waste segmentation for sorting belts, on ROS 2.

The package is a pipeline, and data flows one way: image -> tensor -> logits -> items ->
messages. ``models``, ``data``, ``train``, ``runtime`` and ``perception`` know nothing of ROS;
``nodes`` puts them on topics.
"""

import pkgutil

# The generated interfaces (waste_seg_ros.msg and so on) are in the install space. Looking there
# too makes them importable when this file is the one in a source checkout.
__path__ = pkgutil.extend_path(__path__, __name__)
