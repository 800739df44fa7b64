"""Training of draft heads on a target's own answers, with the target in the same process."""
