"""Seams of other engines, one file each: nothing else imports them, and each imports its engine."""
