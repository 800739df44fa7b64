"""From collected queries to what drafters are trained on."""
