"""Which headers belong to one hop only, and which codings of a body we can read."""

Headers = list[tuple[bytes, bytes]]

# RFC 9110, section 7.6.1, with "proxy-connection", which clients still send.
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
_READABLE = {b"gzip", b"x-gzip", b"deflate", b"identity"}


def end_to_end(headers: Headers) -> Headers:
    """Headers without those of this hop, names in lower case, order and repetitions kept.

    A length beside a transfer coding is dropped too: only one of them can be true.
    """
    lower = [(name.lower(), value) for name, value in headers]
    dropped = set(_HOP_BY_HOP)
    for name, value in lower:
        if name == b"connection":
            dropped.update(option.strip().lower() for option in value.split(b","))
        elif name == b"transfer-encoding":
            dropped.add(b"content-length")
    return [(name, value) for name, value in lower if name not in dropped]


def readable_codings(headers: Headers) -> Headers:
    """Headers that accept only codings of the answer that the recorder can undo."""
    return [
        (name, _readable(value) if name == b"accept-encoding" else value) for name, value in headers
    ]


def _readable(accepted: bytes) -> bytes:
    items = [item.strip() for item in accepted.split(b",")]
    kept = [item for item in items if item.split(b";")[0].strip().lower() in _READABLE]
    return b", ".join(kept) or b"identity"


def header(headers: Headers, name: bytes) -> str:
    """The first value of a header, in lower case; empty if there is none."""
    return next((value for key, value in headers if key == name), b"").decode("latin-1").lower()
