"""Running trained networks: bundles on disk, backends, export.

The names that launch files and command lines offer are here, where they cost no import.
"""

HEADS = ("binary", "semantic", "instance")
"""What a network is used as; each tells all that those before it tell."""

AUTO_ORDER = ("openvino", "onnxruntime", "torch")
"""Backends in the order in which "auto" tries them on a CPU; `backends` says why."""

KINDS = ("auto", *AUTO_ORDER, "compile", "tensorrt")
"""What a backend may be asked for as."""

STORED = ("f32", "f16", "int8")
"""How a bundle stores its network; `bundle.Manifest` says what each holds."""
