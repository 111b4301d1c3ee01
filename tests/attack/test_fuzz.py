"""What reads bytes from elsewhere, in process, and the gate of a hospital with real keys.

With tests/attack/test_fuzz_sockets.py, which adds the sockets' share, a thousand spoilt inputs are
tried in `make test` and more than a hundred thousand in the slow run. The seed is fixed, so that a
finding comes again. A reader must raise a typed error whose message is short and clean, in little
time and memory, and must still read what is genuine. What is signed may never open to anything but
what was signed.
"""

from __future__ import annotations

import base64
import json
import struct
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from fuzz_readers import Reader, all_readers
from fuzzing import Bounds, little_memory, mutated, noise, spoilt_json
from small_hospitals import NAME, Hospital, hospital, phantoms
from small_parties import node_line

from fedseg.errors import TrustError
from fedseg.security.keys import SigningKey
from fedseg.security.nodekeys import check_public_line
from sites.admission import StrangerError
from sites.chronicle import SINGLY
from sites.gate import FloodError

SEED = 20260503
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]
EACH = [25, pytest.param(4000, marks=SLOW)]
NAMES = [
    *("envelope of a task", "envelope of an answer", "unverified header", "task", "answer"),
    *("sealing key", "verify key", "request", "roll", "bundle", "plan", "certificate"),
    *("audit", "audit head", "link", "policy", "settings", "progress", "model", "checkpoint"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def readers(folder: Path) -> dict[str, Reader]:
    found = all_readers(folder)
    assert list(found) == NAMES
    return found


@pytest.mark.parametrize("count", EACH)
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_refuses_what_was_spoilt(
    name: str, count: int, readers: dict[str, Reader], folder: Path
) -> None:
    reader, rng = readers[name], Random(f"{SEED} {name}")
    bounds = Bounds(secrets=(str(folder),))
    genuine = [repr(reader.opens(data)) for data in reader.genuine]
    with little_memory(64):
        for number in range(count // 10 if reader.slow and count > 100 else count):
            data = rng.choice(reader.genuine)
            spoilt = (mutated, spoilt_json, mutated)[number % 3]
            given = noise(rng) if number % 20 == 0 else spoilt(rng, data, reader.genuine)
            taken, found = bounds.attempt(reader.opens, given)
            assert not (taken and reader.trusted) or repr(found) in genuine, given[:200]
    assert [repr(reader.opens(data)) for data in reader.genuine] == genuine


def test_a_node_key_as_a_compressed_point_is_refused_in_our_words() -> None:
    """Found by this fuzzing: the library raises NotImplementedError there."""
    kind, _, blob = node_line().partition(" ")
    raw = base64.b64decode(blob)
    start, point = raw[:-101], raw[-97:]
    compressed = bytes([2 + point[-1] % 2]) + point[1:49]
    line = base64.b64encode(start + len(compressed).to_bytes(4, "big") + compressed).decode()
    with pytest.raises(TrustError, match="NIST EC key"):
        check_public_line(f"{kind} {line}")


@pytest.mark.parametrize("name", ["", "con\ud800", "a" * 300])
def test_a_model_whose_tensors_no_schema_can_name_is_refused(
    name: str, readers: dict[str, Reader]
) -> None:
    """Found by this fuzzing: it was an error of the library's."""
    opens, (genuine,) = readers["model"].opens, readers["model"].genuine
    (size,) = struct.unpack("<Q", genuine[:8])
    table = json.loads(genuine[8 : 8 + size])
    table[name] = table.pop(next(each for each in table if each != "__metadata__"))
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with pytest.raises(TrustError, match="its tensors are no model's"):
        opens(struct.pack("<Q", len(text)) + text + genuine[8 + size :])


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_bounds_what_is_huge(name: str, readers: dict[str, Reader]) -> None:
    """Thirty megabytes of what a parser likes best."""
    reader, bounds = readers[name], Bounds(slowest_s=5.0)
    padded = reader.genuine[0] + bytes(30_000_000)
    with little_memory(160):  # the input itself, twice
        for data in (b"[" * 30_000_000, b'{"a":' * 6_000_000, padded):
            taken, _ = bounds.attempt(reader.opens, data)
            assert not taken or (reader.prefix and data is padded)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A hospital on phantoms that has joined and approved."""
    place = tmp_path_factory.mktemp("site")
    return hospital(place / "site", phantoms(place / "phantoms"))


@pytest.mark.parametrize("count", [120, pytest.param(22_000, marks=SLOW)])
def test_no_envelope_that_was_spoilt_reaches_the_trainer(count: int, site: Hospital) -> None:
    """All of them are a stranger's: no answer, no training, and an audit that stays small."""
    rng, gate = Random(f"{SEED} gate"), site.gate()
    bounds = Bounds(errors=(StrangerError,), secrets=(str(site.folder.path), NAME))
    genuine = [site.task("enlist", 0), site.task("train", 1), site.task("release", 3)]
    foreign = site.task(signer=SigningKey.generate())
    size, audited = site.folder.audit.stat().st_size, len(site.audited("refused"))
    spoilt = (mutated(rng, rng.choice(genuine), [*genuine, foreign]) for _ in range(count))
    given = [data for data in spoilt if data not in genuine]
    with little_memory(64):
        for data in given:
            taken, _ = bounds.attempt(lambda data: site.ask(data, gate), data)
            assert not taken
    assert bounds.tried == {"StrangerError": len(given)}
    assert site.trained == 0 and not list(site.folder.spool("tiny").iterdir())
    assert len(site.audited("refused")) - audited == min(len(given), SINGLY)
    assert site.folder.audit.stat().st_size - size < 1_000_000
    assert site.said(site.ask(genuine[0], gate)).body.kind == "enlist"


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=SLOW)])
def test_whoever_holds_the_study_key_can_break_nothing(count: int, site: Hospital) -> None:
    """Sealed and signed as they should be, but the task inside was spoilt."""
    rng, gate = Random(f"{SEED} authentic"), site.gate()
    genuine = [
        site.consortium.plain(stage, round_)
        for stage, round_ in (("enlist", 0), ("train", 1), ("evaluate", 1), ("release", 3))
    ]
    kinds: Counter[str] = Counter()
    with little_memory(256):
        for number in range(count):
            plain = (mutated, spoilt_json)[number % 2](rng, rng.choice(genuine), genuine)
            if plain and plain not in genuine:
                try:
                    kinds[site.said(site.ask(site.task(plain=plain), gate)).body.kind] += 1
                except FloodError:  # what is only counted in the audit is not answered
                    kinds["silence"] += 1
    assert kinds["refused"] + kinds["silence"] > 0.9 * sum(kinds.values())
    assert not kinds["silence"] or len(site.audited("refused")) >= SINGLY
    attempts = site.consortium.plan.aggregation.attempts
    assert site.trained <= attempts * site.consortium.plan.aggregation.rounds
    assert kinds["train"] <= site.trained
    assert site.said(site.ask(site.task("enlist", 0), gate)).body.kind == "enlist"
