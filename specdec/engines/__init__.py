"""Serving engines: drafters handed over to them, started here, and held against our own loop."""
