"""Explain a model before it runs: what would be sparse, and how much faster it would be."""
