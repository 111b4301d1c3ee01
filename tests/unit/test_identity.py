"""A request proves possession, a roll is the study's, a bundle is for one site."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError
from small_parties import LATER, NOW, STUDY, Party, node_line, roll_of
from small_plans import built_plan

from fedseg.errors import TrustError
from fedseg.security.certificates import make_ca
from fedseg.security.documents import from_text, moment, to_text
from fedseg.security.identity import (
    MAX_BUNDLE_BYTES,
    MAX_REQUEST_BYTES,
    MAX_ROLL_BYTES,
    MAX_SITES,
    Bundle,
    Revoked,
    Roll,
    SiteIdentity,
    make_bundle,
    make_request,
    open_bundle,
    open_request,
    open_roll,
    sign_roll,
)
from fedseg.security.keys import SigningKey

A, B, C = Party("hospital_a"), Party("hospital_b"), Party("hospital_c")
STUDY_KEY = SigningKey.generate()
PLAN = built_plan()
CA = make_ca("tiny", datetime(2026, 5, 3, tzinfo=UTC)).certificate


def bundle(**changes: Any) -> bytes:
    """A good bundle for hospital_a, some arguments changed."""
    fields: dict[str, Any] = {
        "site": "hospital_a",
        "address": "fedseg.example.org:8443",
        "ca": CA,
        "plan": PLAN,
        "roll": sign_roll(roll_of(A, B), STUDY_KEY),
        "flower": "1.41.0",
        "issued": NOW,
    }
    return make_bundle(STUDY_KEY, **{**fields, **changes})


def edited(data: bytes, **changes: Any) -> bytes:
    """A document with some fields set, in canonical form again."""
    value = {**json.loads(data), **changes}
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_a_request_comes_back() -> None:
    data = make_request(A.identity, A.signing, NOW)
    request = open_request(data)
    assert (request.identity, request.created) == (A.identity, NOW)
    assert request.identity.fingerprint == A.identity.fingerprint != B.identity.fingerprint
    assert open_request(data.rstrip() + b"\r\n\n").identity == A.identity


def test_a_request_is_signed_by_the_key_that_it_names() -> None:
    with pytest.raises(ValueError, match="signed by the key"):
        make_request(A.identity, B.signing, NOW)
    stolen = json.loads(make_request(B.identity, B.signing, NOW))["signature"]
    forged = edited(make_request(A.identity, A.signing, NOW), signature=stolen)
    with pytest.raises(TrustError, match="signature of the request"):
        open_request(forged)


@pytest.mark.parametrize("field", ["name", "sealing", "node"])
def test_what_a_request_says_cannot_be_changed(field: str) -> None:
    data = make_request(A.identity, A.signing, NOW)
    identity = {**json.loads(data)["identity"], field: getattr(B.identity, field)}
    with pytest.raises(TrustError, match="signature"):
        open_request(edited(data, identity=identity))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not what was expected"),
        (b"[]", "not what was expected"),
        (b"[" * 5000, "request"),
        (b"\xff\xfe", "request"),
        (b" " * (MAX_REQUEST_BYTES + 1), "at most"),
    ],
)
def test_garbage_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(TrustError, match=message):
        open_request(data)


def test_a_document_has_one_form() -> None:
    data = make_request(A.identity, A.signing, NOW)
    value = json.loads(data)
    spaced = json.dumps(value, sort_keys=True).encode()
    doubled = data.replace(b'{"created"', b'{"created":"2020-01-01T00:00:00Z","created"', 1)
    unsorted = json.dumps(dict(reversed(value.items())), separators=(",", ":")).encode()
    for other in (spaced, doubled, unsorted, b" " + data):
        with pytest.raises(TrustError, match="canonical"):
            open_request(other)
    with pytest.raises(TrustError, match="extra"):
        open_request(edited(data, extra=1))


def test_a_message_never_quotes_what_came_in_full() -> None:
    data = edited(make_request(A.identity, A.signing, NOW), **{"\x1b[31m" + "x" * 500: 1})
    with pytest.raises(TrustError) as caught:
        open_request(data)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "coordinator"),
        ("name", "Coordinator"),
        ("name", "../a"),
        ("name", ""),
        ("signing", "AAAA"),
        ("sealing", "AAAA"),
        ("node", "ssh-ed25519 AAAA"),
    ],
)
def test_an_identity_is_usable_or_refused(field: str, value: str) -> None:
    with pytest.raises(ValidationError):
        SiteIdentity.model_validate({**A.identity.model_dump(), field: value})


def test_a_roll_comes_back_and_is_the_studys() -> None:
    roll = roll_of(A, B)
    data = sign_roll(roll, STUDY_KEY).canonical_bytes
    signed = open_roll(data, STUDY_KEY.public, STUDY)
    assert signed.roll == roll
    assert signed.roll.digest == roll.digest != roll_of(A).digest
    assert roll.site("hospital_b") == B.identity
    assert roll.site("hospital_c") is None
    assert roll.expires == datetime(2027, 5, 3, 12, tzinfo=UTC)
    with pytest.raises(TrustError, match="signature of the roll"):
        open_roll(data, SigningKey.generate().public, STUDY)
    with pytest.raises(TrustError, match="of the study 'tiny', not of 'other'"):
        open_roll(data, STUDY_KEY.public, "other")
    with pytest.raises(TrustError, match="at most"):
        open_roll(data + b" " * MAX_ROLL_BYTES, STUDY_KEY.public, STUDY)


@pytest.mark.parametrize("field", ["version", "valid_until", "sites"])
def test_a_signed_roll_cannot_be_changed(field: str) -> None:
    other = roll_of(A, C, version=2, valid_until="2030-01-01T00:00:00+00:00")
    data = sign_roll(roll_of(A, B), STUDY_KEY).canonical_bytes
    value = json.loads(data)
    value["roll"][field] = json.loads(other.canonical_bytes)[field]
    with pytest.raises(TrustError, match="signature of the roll"):
        open_roll(edited(data, roll=value["roll"]), STUDY_KEY.public, STUDY)


def test_a_roll_says_who_is_new_or_has_new_keys() -> None:
    renewed = Party("hospital_b")
    assert roll_of(A, B).added_since(roll_of(A, B)) == ()
    assert roll_of(A).added_since(roll_of(A, B)) == ()
    assert roll_of(A, B, C).added_since(roll_of(A)) == ("hospital_b", "hospital_c")
    assert roll_of(A, renewed).added_since(roll_of(A, B)) == ("hospital_b",)


def test_a_roll_is_consistent_or_refused() -> None:
    twin = Party("hospital_z", signing=A.signing)
    thief = Party("hospital_z", receiving=A.receiving)
    shadow = Party("hospital_z", node=A.node)
    shouting = Party("Hospital_A")
    gone = (Revoked(name="old_name", signing=A.signing.public.text),)
    unsorted = (B.identity, A.identity)
    for make in (
        lambda: roll_of(A, twin),
        lambda: roll_of(A, thief),
        lambda: roll_of(A, shadow),
        lambda: roll_of(A, A),
        lambda: roll_of(A, shouting),
        lambda: roll_of(A, revoked=gone),
        lambda: roll_of(sites=unsorted),
        lambda: roll_of(A, version=0),
        lambda: roll_of(A, valid_until=NOW),
        lambda: roll_of(A, issued="yesterday"),
        lambda: roll_of(A, issued="2026-05-03T12:00:00"),
        lambda: roll_of(A, issued="2026-05-03T12:00:00+02:00"),
    ):
        with pytest.raises(ValidationError):
            make()


def test_a_revoked_site_comes_back_with_new_keys_alone() -> None:
    gone = (Revoked(name="hospital_a", signing=A.signing.public.text),)
    again = Party("hospital_a")
    assert roll_of(again, B, revoked=gone).site("hospital_a") == again.identity


def test_the_largest_roll_fits_its_bound() -> None:
    name = "h" * 60
    rows = [Party(f"{name}{n:03d}").identity.model_dump() for n in range(2)]
    roll = Roll(study="s" * 64, version=2**31 - 1, issued=NOW, valid_until=LATER)
    room = len(roll.canonical_bytes) + MAX_SITES * (len(json.dumps(rows[0])) + 1)
    assert room + 4 * MAX_SITES * 200 < MAX_ROLL_BYTES


def test_a_bundle_comes_back() -> None:
    found = open_bundle(bundle(), A.identity)
    assert isinstance(found, Bundle)
    assert (found.study, found.site, found.plan) == (STUDY, "hospital_a", PLAN)
    assert found.ca.encode() == CA
    assert found.study_key == STUDY_KEY.public.text
    assert found.plan.digest == PLAN.digest
    assert found.fingerprint == open_bundle(bundle(issued=LATER), A.identity).fingerprint


def test_another_key_or_ca_has_another_fingerprint() -> None:
    other_ca = make_ca("tiny", datetime(2026, 5, 3, tzinfo=UTC)).certificate
    other = SigningKey.generate()
    fields: dict[str, Any] = {"site": "hospital_a", "address": "a:1", "ca": CA, "plan": PLAN}
    fields |= {"roll": sign_roll(roll_of(A), other), "flower": "1.41.0", "issued": NOW}
    forged = open_bundle(make_bundle(other, **fields), A.identity)  # consistent, by somebody else
    prints = {forged.fingerprint, open_bundle(bundle(), A.identity).fingerprint}
    prints.add(open_bundle(bundle(ca=other_ca), A.identity).fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", "evil.example.org:8443"),
        ("site", "hospital_b"),
        ("flower", "1.40.0"),
        ("study_key", SigningKey.generate().public.text),
        ("ca", make_ca("x", datetime(2026, 5, 3, tzinfo=UTC)).certificate.decode()),
    ],
    ids=["address", "site", "flower", "study_key", "ca"],  # values differ from process to process
)
def test_a_bundle_cannot_be_changed(field: str, value: str) -> None:
    with pytest.raises(TrustError, match="signature of the bundle"):
        open_bundle(edited(bundle(), **{field: value}), A.identity)


def test_a_bundle_that_does_not_fit_is_refused() -> None:
    renewed = Party("hospital_a")
    unbuilt = PLAN.model_copy(update={"initial": None})
    elsewhere = PLAN.model_copy(update={"study": "other"})
    foreign = sign_roll(roll_of(A, B, study="other"), STUDY_KEY)
    forged = sign_roll(roll_of(A, B), SigningKey.generate())
    for data, who, message in (
        (bundle(), B, "is for 'hospital_a', this site is 'hospital_b'"),
        (bundle(), renewed, "has not this site's keys"),
        (bundle(roll=sign_roll(roll_of(B), STUDY_KEY)), A, "has not this site's keys"),
        (bundle(roll=foreign), A, "of the study 'other'"),
        (bundle(roll=forged), A, "signature of the roll"),
        (bundle(plan=unbuilt), A, "not built"),
        (bundle(plan=elsewhere), A, "of the study 'tiny', not of 'other'"),
        (bundle(ca=b"no certificate"), A, "not a certificate"),
        (bundle() + b" " * MAX_BUNDLE_BYTES, A, "at most"),
    ):
        with pytest.raises(TrustError, match=message):
            open_bundle(data, who.identity)


@pytest.mark.parametrize("address", ["host", "host:0", "ho st:1", "http://a:1", "a:123456", ":1"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValidationError):
        bundle(address=address)


def test_times_are_utc() -> None:
    assert moment("2026-05-03T12:00:00Z") == moment(NOW)
    with pytest.raises(ValueError, match="UTC"):
        moment("2026-05-03T12:00:00")


def test_base64_has_one_spelling() -> None:
    assert from_text(to_text(b"a"), 1, "it") == b"a"
    for text in ("YR==", "YQ", "Y Q==", "", "YWE="):
        with pytest.raises(TrustError):
            from_text(text, 1, "it")


def test_node_lines_differ() -> None:
    assert node_line() != node_line()
