"""The one exception for what a user can mend."""


class UserError(Exception):
    """What was got, what was expected, and the key or file:line to change."""
