"""The one error tree of every connector, named by what the caller must do next.

A step retries `Retryable`, gives up on `Permanent`, and never repeats `Ambiguous` on its own:
the peer may already have acted on what was sent.
"""


class ConnectorError(Exception):
    """Something a connector could not do. The message names the system, what failed and the next step.

    `answer` is what the peer answered, as it came, where the connector keeps it. It may hold patient data: it belongs
    into the store, with what was sent, and never into a log or a message.
    """

    answer: bytes = b""


class Retryable(ConnectorError):
    """Nothing took effect at the peer (or repeating is harmless); trying again later may work.

    `retry_after_s` is the peer's own wish (HTTP `Retry-After`), in seconds, where it gave one.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Permanent(ConnectorError):
    """The peer understood and refused, or can never accept this; the same request will fail again."""


class NotThere(Permanent):
    """The peer does not have what was asked for, or not any more; nothing is wrong with the peer or the settings."""


class Ambiguous(ConnectorError):
    """It was sent and no answer came: the peer may or may not have acted. A person, or a resend that
    the peer is declared to recognise as a duplicate, must settle it."""
