"""The sections of a report; each function turns runs into one of them."""
