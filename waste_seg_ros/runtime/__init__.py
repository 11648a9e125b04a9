"""Running trained networks: bundles on disk, backends, export."""
