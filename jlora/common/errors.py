"""Exceptions whose message is all that the user needs to see."""


class UserError(Exception):
    """The user must change something. Programs print the message and exit with code 2.

    The message states what was found, what was expected, and the key, file or line to change.
    """


class VerificationError(Exception):
    """An exported adapter does not compute what was trained. Programs print the message and exit with code 1."""
