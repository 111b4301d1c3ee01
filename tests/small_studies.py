"""The smallest study folders and hospitals that ask to take part, for tests without torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from small_plans import built_plan, tiny_model

from coordinator.folder import StudyFolder, new_settings
from coordinator.office.founding import found
from fedseg.initial import initial_path
from fedseg.modelfile import save_model
from fedseg.plan import StudyPlan
from fedseg.security.documents import stamp
from fedseg.security.identity import SiteIdentity, make_request
from fedseg.security.keys import ReceivingKey, SigningKey, load_signing_key
from fedseg.security.nodekeys import make_node_key

NOW = datetime(2026, 5, 3, 12, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Hospital:
    """A site's identity, and the key that signs for it."""

    identity: SiteIdentity
    key: SigningKey

    @property
    def request(self) -> bytes:
        """What it sends to the consortium."""
        return make_request(self.identity, self.key, stamp(NOW))


def hospital(name: str, folder: Path, **keys: str) -> Hospital:
    """A hospital with keys of its own; `signing`, `sealing` or `node` may be those of others."""
    key = SigningKey.generate()
    node = make_node_key(folder / f"{name}-{key.public.text[:6].replace('/', '_')}.node")
    own = {
        "signing": key.public.text,
        "sealing": ReceivingKey.generate().public.text,
        "node": node,
    }
    return Hospital(SiteIdentity(name=name, **(own | keys)), key)


def write_built(path: Path, plan: StudyPlan | None = None) -> Path:
    """A plan file, with its initial model beside it."""
    plan = plan or built_plan()
    path.write_bytes(plan.canonical_bytes)
    save_model(initial_path(path), plan, tiny_model(), arm="initial", rounds=0)
    return path


def founded(path: Path, passphrase: bytes | None = None) -> tuple[StudyFolder, SigningKey]:
    """A study that was just initialised, and its key."""
    plan = write_built(path.with_name(f"{path.name}.plan.json"))
    settings = new_settings(study="tiny", host="fl.example.org", created=stamp(NOW))
    folder = StudyFolder(path)
    found(folder, plan, settings, now=NOW, passphrase=passphrase)
    return folder, load_signing_key(folder.study_key, passphrase)
