"""Personal data in text: found by kind, and masked with placeholders; messages never quote it.

`phonenumbers` validates phone numbers, and `python-stdnum` numbers with check digits. Legal text is full of article
numbers, dates and amounts, so a bare number counts only if its check digits are valid, or if it is a phone number that
can be dialed.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import phonenumbers
import stdnum.br.cpf
import stdnum.cn.ric
import stdnum.cn.uscc
import stdnum.es.dni
import stdnum.es.nie
import stdnum.eu.vat
import stdnum.fr.nir
import stdnum.iban
import stdnum.it.codicefiscale
import stdnum.luhn
import stdnum.us.ssn

from jlora.data.conversation import Conversation


def _is_card(number: str) -> bool:
    """Returns whether the check digit is valid (Luhn)."""
    return stdnum.luhn.is_valid(re.sub(r"[ -]", "", number))


KINDS = {  # kind -> its name in messages; where matches overlap, the earlier kind wins
    "EMAIL": "e-mail address",
    "ID": "identity number",
    "TAX": "tax number",
    "ACCOUNT": "bank account or card",
    "PHONE": "phone number",
    "MONEY": "amount of money",
}
EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]+@[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}", re.ASCII
)
MONEY = re.compile(
    r"(?:[$€£¥￥]|\b(?:USD|EUR|GBP|RMB|CNY|HKD)\s?)\s?\d[\d,.]*\d?(?:\s?(?:million|billion|万|亿))?"
    r"|\d[\d,.]*\s?[百千万亿]*(?:元|圆|美元|欧元|港元)"
    r"|\d[\d,.]*\s?(?:million |billion )?(?:yuan|dollars?|euros?|RMB|USD|EUR|GBP)\b"
)
STANDALONE = r"(?<![\w.]){}(?![\w]|\.\d)"  # not part of a longer number or word
EU = "AT BE BG CY CZ DE DK EE EL ES FI FR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
CHECKED: list[tuple[str, str, Callable[[str], bool]]] = [
    ("ID", r"\d{17}[\dXx]", stdnum.cn.ric.is_valid),
    ("ID", r"\d{3}-\d{2}-\d{4}", stdnum.us.ssn.is_valid),
    ("ID", r"\d{3}\.\d{3}\.\d{3}-\d{2}", stdnum.br.cpf.is_valid),
    ("ID", r"\d{8}-?[A-Za-z]", stdnum.es.dni.is_valid),
    ("ID", r"[XYZxyz]-?\d{7}-?[A-Za-z]", stdnum.es.nie.is_valid),
    ("ID", r"[A-Za-z]{6}\d{2}[A-Za-z]\d{2}[A-Za-z]\d{3}[A-Za-z]", stdnum.it.codicefiscale.is_valid),
    ("ID", r"[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2}", stdnum.fr.nir.is_valid),
    ("TAX", r"[0-9A-HJ-NPQRTUWXY]{2}\d{6}[0-9A-HJ-NPQRTUWXY]{10}", stdnum.cn.uscc.is_valid),
    ("TAX", rf"(?:{EU.replace(' ', '|')})[0-9A-Z+*]{{8,12}}", stdnum.eu.vat.is_valid),
    ("ACCOUNT", r"[A-Z]{2}\d{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?", stdnum.iban.is_valid),
    ("ACCOUNT", r"(?:[3-6]\d{3}(?:[ -]?\d{4}){3}(?:[ -]?\d{3})?|3[47]\d{2}[ -]?\d{6}[ -]?\d{5})", _is_card),
]
PATTERNS = [(kind, re.compile(STANDALONE.format(pattern), re.ASCII), valid) for kind, pattern, valid in CHECKED]
SEVEN_DIGITS = re.compile(r"\d(?:[\s().+/-]{0,3}\d){6}")  # no phone number has fewer
# The context that makes a number something else: an article, a case, an amount, a date.
NOT_DIALLED = re.compile(r"(?:第|号|[$€£¥￥§#№]|\b(?:article|section|art|no|nr)\b\.?)\s*$", re.IGNORECASE)
NOT_A_PHONE = re.compile(r"\s*(?:[条款项号元圆万亿%％年月]|yuan|dollars|euros)", re.IGNORECASE)
DATE = re.compile(r"(?:19|20)\d{2}[-./ ]?(?:0[1-9]|1[0-2])[-./ ]?(?:0[1-9]|[12]\d|3[01])(?!\d)")


class Finding(NamedTuple):
    """A match in a text: character offsets and kind."""

    start: int
    stop: int
    kind: str  # a key of KINDS


def find(text: str, regions: tuple[str, ...], amounts: bool = False) -> list[Finding]:
    """Returns the personal data in a text, in order and without overlaps.

    Args:
      regions: countries (two-letter ISO 3166 codes) whose phone numbers are recognized without their country code.
      amounts: whether amounts of money count as personal data.
    """
    kept: list[Finding] = []
    for finding in _find_all(text, regions, amounts):
        if all(finding.stop <= other.start or finding.start >= other.stop for other in kept):
            kept.append(finding)
    return sorted(kept)


def mask(row: Conversation, regions: tuple[str, ...], amounts: bool = False) -> Conversation:
    """Replaces personal data with placeholders such as [PHONE_1]; within a row, equal values get equal placeholders."""
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}

    def placeholder(kind: str, value: str) -> str:
        key = kind, re.sub(r"[\W_]", "", value).casefold()
        if key not in numbers:
            counts[kind] = counts.get(kind, 0) + 1
            numbers[key] = counts[kind]
        return f"[{kind}_{numbers[key]}]"

    def masked(text: str) -> str:
        parts, end = [], 0
        for start, stop, kind in find(text, regions, amounts):
            parts += [text[end:start], placeholder(kind, text[start:stop])]
            end = stop
        return "".join([*parts, text[end:]])

    def masked_json(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: masked_json(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [masked_json(inner) for inner in value]
        text = value if isinstance(value, str) else json.dumps(value)
        return value if masked(text) == text else masked(text)

    messages = []
    for message in row.messages:
        calls = tuple(
            call._replace(arguments=json.dumps(masked_json(json.loads(call.arguments)), ensure_ascii=False))
            for call in message.tool_calls
        )
        content, reasoning = masked(message.content), masked(message.reasoning)
        messages.append(replace(message, content=content, reasoning=reasoning, tool_calls=calls))
    return replace(row, messages=tuple(messages))


def _find_all(text: str, regions: tuple[str, ...], amounts: bool) -> Iterator[Finding]:
    if "@" in text:
        yield from (Finding(*match.span(), "EMAIL") for match in EMAIL.finditer(text))
    if re.search(r"\d{2}", text):
        for kind, pattern, valid in PATTERNS:
            yield from (Finding(*match.span(), kind) for match in pattern.finditer(text) if valid(match[0]))
    if SEVEN_DIGITS.search(text):
        for region in regions or (None,):
            for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID):
                if _is_phone_number(text, match):
                    yield Finding(match.start, match.end, "PHONE")
    if amounts:
        yield from (Finding(*match.span(), "MONEY") for match in MONEY.finditer(text))


def _is_phone_number(text: str, match: phonenumbers.PhoneNumberMatch) -> bool:
    """Returns whether a valid phone number is meant as one; bare digits must be a mobile number in no other context."""
    found = text[match.start : match.end]
    if found.startswith("+"):
        return True
    bare = found.isdigit() and not found.startswith("0")
    return not (
        (bare and phonenumbers.number_type(match.number) != phonenumbers.PhoneNumberType.MOBILE)
        or NOT_DIALLED.search(text[max(0, match.start - 12) : match.start])
        or NOT_A_PHONE.match(text[match.end : match.end + 8])
        or DATE.match(found)
    )
