"""Planning: costs of this machine and acceptance, combined into a choice of drafter and shape."""
