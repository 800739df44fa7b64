"""One request of a suite, and the groups that results are told by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """A request that every arm is given alike.

    Attributes:
        id: unique in its suite.
        domain: of its texts.
        prompt: token ids.
        max_new_tokens: new tokens, at most.
        seed: of its sampling.
        user: who sends it; a user's requests stand in their order.
        arrival_s: seconds after the start at which it is sent; None for "as soon as this user's
            one before is answered".
    """

    id: str
    domain: str
    prompt: list[int]
    max_new_tokens: int
    seed: int
    user: int = 0
    arrival_s: float | None = None


@dataclass(frozen=True)
class Group:
    """Requests whose results are one row of the table.

    Attributes:
        name: for people.
        value: its place on the axis: users, turn, or the largest number of tokens.
        calls: requests that are served together, call by call.
    """

    name: str
    value: int
    calls: list[list[Ask]]

    @property
    def asks(self) -> list[Ask]:
        """All requests, call after call."""
        return [ask for call in self.calls for ask in call]
