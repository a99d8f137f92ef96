"""What belongs to a person and has no place in an answer: addresses, numbers of phones, cards and accounts, found by
their form and, where they carry one, by their checksum."""

import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import regex

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.rewards.form import compile_pattern, in_time

Kind = Literal["email", "phone", "card", "iban", "ip", "us_ssn"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_PATTERNS: Mapping[str, Any] = {
    # The local part of RFC 5321 as people write it, and a domain with a dot.
    "email": regex.compile(r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.)+\p{L}{2,24}(?![\w-])"),
    # With a country code; with an area code in brackets or behind a 0; or in groups of three, three and four digits.
    # A number without any of these (a year, a price, a count) is not one.
    "phone": regex.compile(
        r"(?<![\w+.,-])(?:"
        r"(?:\+|00)[1-9]\d{0,2}(?:[ .-]?\(0\))?(?:[ ./-]?\(?\d{1,5}\)?){1,6}"
        r"|\(0?\d{2,5}\)[ -]?\d{2,4}(?:[ -]?\d{2,4}){1,3}"
        r"|0\d{1,5}[ /-]\d{2,8}(?:[ -]\d{2,6}){0,3}"
        r"|\d{3}[ .-]\d{3}[ .-]\d{4}"
        r")(?![\w-]|[.,]\d)"
    ),
    "card": regex.compile(r"(?<![\w-])[2-6]\d{3}(?:[ -]?\d{2,7}){2,5}(?![\w-])"),
    "iban": regex.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
    "ip": regex.compile(
        r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?=[\da-fA-F:]*:[\da-fA-F:]*:)[\da-fA-F:]{2,39})(?![\w:]|\.\d)"
    ),
    "us_ssn": regex.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])"),
}


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B).

    >>> luhn("79927398713"), luhn("79927398710")
    (True, False)
    """
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def iban_checks(account: str) -> bool:
    """Whether an IBAN without spaces leaves 1 when it is divided by 97 (ISO 13616-1): the first four characters behind
    the others, letters as numbers from 10.

    >>> iban_checks("DE89370400440532013000"), iban_checks("DE89370400440532013001")
    (True, False)
    """
    return int("".join(str(int(character, 36)) for character in account[4:] + account[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    """ITU-T E.164 allows 15 digits; fewer than 7 are an extension, a date or a price."""
    return 7 <= len(_digits(text)) <= 15


def _is_card(text: str) -> bool:
    digits = _digits(text)
    return 13 <= len(digits) <= 19 and luhn(digits)


def _is_iban(text: str) -> bool:
    account = text.replace(" ", "")
    return 15 <= len(account) <= 34 and iban_checks(account)


def _is_address(text: str) -> bool:
    """That of a machine: the loopback and the empty address are everyone's."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


_CHECKS: Mapping[str, Callable[[str], bool]] = {
    "phone": _is_phone,
    "card": _is_card,
    "iban": _is_iban,
    "ip": _is_address,
}


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdecimal())


def find_personal_data(text: str, kinds: Sequence[str] = KINDS) -> list[tuple[str, CharSpan]]:
    """What of these kinds stands in `text`, with its characters, in the order of the text; each place counts once.

    >>> find_personal_data("Write to ann@example.org or call +44 20 7946 0958, card 4111 1111 1111 1111.")
    [('email', (9, 24)), ('phone', (33, 49)), ('card', (56, 75))]
    """
    found: list[tuple[str, CharSpan]] = []
    # What has a checksum claims its place before what is known by its form alone.
    for kind in sorted(kinds, key=("iban", "card", "us_ssn", "email", "ip", "phone").index):
        for match in in_time(lambda text, k=kind, **limit: list(_PATTERNS[k].finditer(text, **limit)), text):
            free = all(match.end() <= start or stop <= match.start() for _, (start, stop) in found)
            if free and _CHECKS.get(kind, bool)(match[0]):
                found.append((kind, match.span()))
    return sorted(found, key=lambda one: one[1])


@dataclass(frozen=True)
class PersonalData(SampleReward):
    """A cost on each e-mail address, phone number, card, account or address of a machine that the prompt does not hold.

    What the prompt holds may be needed for the answer, and was not leaked by the model.
    """

    kinds: Sequence[str] = KINDS
    """Which of them: email, phone, card (with Luhn's check digit), iban (with its check digits), ip, us_ssn."""
    patterns: Mapping[str, str] | None = None
    """Further ones of your own, by name: regular expressions."""
    cost: float = 1.0
    """Paid per hit, shared by the tokens of its characters."""
    count_given: bool = False
    """Count what the prompt holds as well."""

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not set(self.kinds) <= set(KINDS):
            raise ConfigError(f"personal_data.kinds: expected a list of {', '.join(KINDS)}, got {self.kinds!r}")
        _ = self._own

    @cached_property
    def _own(self) -> dict[str, Any]:
        own = self.patterns or {}
        return {name: compile_pattern(text, f"personal_data.patterns.{name}") for name, text in own.items()}

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One span per hit, in the order of the text."""
        given = set() if self.count_given else {_bare(text) for text in _texts(sample.item.prompt)}
        found = []
        for kind, (start, stop) in sorted(self._hits(sample.text), key=lambda hit: hit[1]):
            if not any(_bare(sample.text[start:stop]) in text for text in given):
                found.append(ScoredSpan(start, stop, -self.cost, f"{kind}: {sample.text[start:stop]!r}"))
        return found

    def _hits(self, text: str) -> Iterator[tuple[str, CharSpan]]:
        yield from find_personal_data(text, self.kinds)
        for name, pattern in self._own.items():
            for match in in_time(lambda text, p=pattern, **limit: list(p.finditer(text, **limit)), text):
                if match[0]:
                    yield name, match.span()

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample), sample)


def _texts(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def _bare(text: str) -> str:
    """Without what people set between digits, so that the same number written otherwise is the same."""
    return str(regex.sub(r"[\s().-]", "", text)).casefold()
