"""Formats counts in messages: "1 row", "3 rows"."""


def plural(count: int, noun: str, verbs: tuple[str, str] | None = None) -> str:
    """Returns the count with its noun, and with the verb that agrees: plural(3, "row", ("is", "are")) is "3 rows are".

    The plural of the noun is formed with an "s".
    """
    text = f"{count:,} {noun}{'' if count == 1 else 's'}"
    return text if verbs is None else f"{text} {verbs[count != 1]}"
