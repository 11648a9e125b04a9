"""Samples: the synthetic belt, and readers of annotated photographs."""
