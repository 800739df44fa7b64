"""Why a request was served but not recorded."""

from enum import StrEnum


class Skip(StrEnum):
    """Reasons, in the words of `/health`."""

    NOT_SAMPLED = "not sampled"
    REQUEST_TOO_LARGE = "request too large"
    ANSWER_TOO_LARGE = "answer too large"
    MEMORY = "too much in flight"
    CONTENT_CODING = "unknown content coding"
    NOT_JSON = "request is no JSON object"
    NO_REQUEST = "client left before it had asked"
    NO_ANSWER = "no answer from upstream"
    MAX_TOTAL = "--max-total reached"
    DISK = "disk cannot be written"
    FAULT = "fault of the recorder"
