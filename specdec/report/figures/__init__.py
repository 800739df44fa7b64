"""The pictures of a report, one kind a file; each returns the bytes of a PNG."""
