"""Measuring draft strategies against two baselines, by the same ruler."""
