"""Draft strategies, one file each; `specdec.registry` knows them by name."""
