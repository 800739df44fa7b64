"""Which drafter, how many tokens, how fast: costs of this machine combined with acceptance."""
