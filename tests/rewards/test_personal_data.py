"""Personal data is found by form and checksum, and nothing that only looks like it."""

import dataclasses

import pytest

from pertoken.errors import ConfigError
from pertoken.rewards import PersonalData
from pertoken.rewards.personal_data import find_personal_data


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("mail a.b+c@mail.example.co.uk now", ["email"]),
        ("at @home, a@b, x@y.1", []),
        ("call +49 (0)30 901820, or 0044 20 7946 0958", ["phone", "phone"]),
        ("(020) 7946 0958; 030/9018 20; 555-867-5309", ["phone", "phone", "phone"]),
        ("in 1999, 1,234,567 people paid 12.50 on 2024-05-17 at 10:30", []),
        ("version 4.57.1 of 2026.10.18, pages 100-200, ISBN 978", []),
        ("4111 1111 1111 1111 and 5500-0000-0000-0004, 378282246310005", ["card", "card", "card"]),
        ("4111 1111 1111 1112", []),  # Luhn's check digit is another one
        ("DE89 3704 0044 0532 0130 00, GB82WEST12345698765432", ["iban", "iban"]),
        ("GB82WEST12345698765433", []),
        ("from 203.0.113.9, 2001:db8::8a2e:370:7334 and 127.0.0.1", ["ip", "ip"]),
        ("at 12:30:45, version 999.1.1.1, ::", []),
        ("078-05-1120 but not 666-12-1234", ["us_ssn"]),
    ],
)
def test_what_is_found(text, kinds):
    assert [kind for kind, _ in find_personal_data(text)] == kinds


def test_only_the_kinds_that_are_asked_for():
    text = "ann@example.org, 4111 1111 1111 1111"
    assert find_personal_data(text, ["card"]) == [("card", (17, 36))]


@pytest.fixture
def messages(make_episode, make_scene):
    def of(reward, text, prompt="?"):
        episode = make_episode(text)
        episode = dataclasses.replace(episode, item=dataclasses.replace(episode.item, prompt=prompt))
        (sample,) = make_scene(episode).samples
        return [finding.message for finding in reward.findings(sample)]

    return of


def test_what_the_prompt_holds_was_not_leaked(messages):
    prompt = ({"role": "user", "content": "Ann (Ann@example.org) has the number (555) 867-5309."},)
    said = "ann@example.org, 555-867-5309, bob@example.org"
    assert messages(PersonalData(), said, prompt) == ["email: 'bob@example.org'"]
    assert len(messages(PersonalData(count_given=True), said, prompt)) == 3


def test_patterns_of_ones_own(messages):
    assert messages(PersonalData(kinds=[], patterns={"staff": r"E-\d{6}"}), "ask E-123456") == ["staff: 'E-123456'"]


def test_a_hit_costs_its_own_tokens(make_episode, make_scene, letters):
    values = PersonalData()(make_scene(make_episode(letters("to a@b.de ok"))))[0, 2:].tolist()
    assert values == pytest.approx([0, 0, 0, *[-1 / 6] * 6, 0, 0, 0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"kinds": "email"}, "list of email"), ({"kinds": ["name"]}, "list of email"), ({"patterns": {"x": "("}}, "x: ")],
)
def test_what_cannot_be_looked_for_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PersonalData(**settings)
