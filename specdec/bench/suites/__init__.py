"""Suites of `specdec bench`: one turn, many turns, long contexts, many users."""
