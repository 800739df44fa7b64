"""Target models behind the `Target` protocol."""
