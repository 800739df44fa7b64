"""Median polish: what columns are worth, whatever the moments they were measured in."""

import numpy as np

SWEEPS = 50


def median_polish(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a table into effects of its rows and of its columns, added, and what they leave over.

    Medians, so that a moment in which the machine was busy moves nothing but its own cell.

    Args:
        table: [rows, columns]; nan where nothing was measured, but no row and no column without
            a value.

    Returns:
        Effects of the columns, up to a constant, and residuals [rows, columns].

    Source: Tukey 1977, Exploratory Data Analysis.
    """
    columns = np.zeros(table.shape[1])
    for _ in range(SWEEPS):
        rows = np.nanmedian(table - columns, axis=1, keepdims=True)
        columns = np.nanmedian(table - rows, axis=0)
    return columns, table - rows - columns
