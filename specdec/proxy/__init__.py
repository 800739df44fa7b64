"""A recording proxy in front of an OpenAI-compatible server: it serves first, records second."""
