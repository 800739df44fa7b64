"""Serving engines: what they are given, how they are started, and what they count."""
