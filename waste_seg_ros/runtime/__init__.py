"""Running trained networks: bundles on disk, backends, export.

The names that launch files and command lines offer are here, where they cost no import.
"""

HEADS = ("binary", "semantic", "instance")
"""What a network is used as; each tells all that those before it tell."""

AUTO_ORDER = ("openvino", "onnxruntime", "torch")
"""Backends in the order in which "auto" tries them; `backends` says why."""

KINDS = ("auto", *AUTO_ORDER)
"""What a backend may be asked for as."""
