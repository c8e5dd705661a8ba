"""Densities, responsibilities and draws of a model."""
