"""Learning on the line from a handful of frames: samples, training, and what may be promoted."""
