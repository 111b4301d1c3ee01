"""Real site folders and a consortium that enrols them, for tests without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from small_parties import NOW, Party, roll_of
from small_plans import built_plan

from fedseg.plan import StudyPlan
from fedseg.security.certificates import make_ca
from fedseg.security.identity import Roll, SiteIdentity, make_bundle, sign_roll
from fedseg.security.keys import SigningKey, load_signing_key
from sites.enrolment import join, open_offer
from sites.folder import SiteFolder
from sites.founding import found

FAR = "2099-05-03T12:00:00+00:00"
CA = make_ca("tiny", datetime(2026, 5, 3, tzinfo=UTC)).certificate


@dataclass
class Consortium:
    """Whoever holds a study key: makes rolls and bundles."""

    plan: StudyPlan = field(default_factory=built_plan)
    key: SigningKey = field(default_factory=SigningKey.generate)

    def roll(self, *sites: SiteIdentity | Party, version: int = 1, **changes: Any) -> Roll:
        """A roll of these sites."""
        identities = [site.identity if isinstance(site, Party) else site for site in sites]
        fields = {"sites": sorted(identities, key=lambda site: site.name), "valid_until": FAR}
        return roll_of(version=version, **{**fields, **changes})

    def bundle(self, path: Path, roll: Roll, /, **changes: Any) -> Path:
        """A bundle file."""
        fields: dict[str, Any] = {
            "site": "hospital_a",
            "address": "fl.example.org:443",
            "ca": CA,
            "plan": self.plan,
            "roll": sign_roll(roll, self.key),
            "flower": "1.41.0",
            "issued": NOW,
        }
        path.write_bytes(make_bundle(self.key, **{**fields, **changes}))
        return path


@dataclass
class Member:
    """A hospital that has its folder and keys, and knows who the consortium is."""

    folder: SiteFolder
    identity: SiteIdentity
    key: SigningKey
    consortium: Consortium = field(default_factory=Consortium)

    def bundle(self, *others: Party, version: int = 1, **changes: Any) -> Path:
        """A bundle for this site with these others on the roll."""
        roll = self.consortium.roll(self.identity, *others, version=version)
        path = self.folder.path.with_name(f"bundle-{version}.json")
        return self.consortium.bundle(path, roll, **changes)

    def join(self, *others: Party, version: int = 1, **changes: Any) -> tuple[str, ...]:
        """Join, or join again, with a bundle."""
        offer = open_offer(self.folder, self.bundle(*others, version=version, **changes))
        return join(self.folder, offer, self.key)


def member(path: Path, name: str = "hospital_a") -> Member:
    """A hospital that was just initialised."""
    folder = SiteFolder(path / "site")
    identity = found(folder, name, NOW)
    return Member(folder, identity, load_signing_key(folder.signing_key))


def allow(folder: SiteFolder, **lines: object) -> None:
    """Change the hospital's policy: by default it allows training without a guarantee."""
    text = folder.policy.read_text()
    for name, value in {"privacy_none": "true", **lines}.items():
        kept = [line for line in text.splitlines() if not line.startswith(f"{name}:")]
        text = "\n".join([*kept, f"{name}: {value}"]) + "\n"
    folder.policy.write_text(text)


def data_of(root: Path, *names: str, site: str = "hospital_a", table: bool = True) -> Path:
    """A data folder of small labelled images, two thirds of the patients to train on."""
    import nibabel

    root.mkdir(parents=True, exist_ok=True)
    rows = ["subject,site,split,patient"]
    for i, name in enumerate(names):
        rng = np.random.default_rng(int.from_bytes(name.encode(), "big"))
        image = rng.normal(100, 20, (10, 11, 12)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[2 + i % 3 : 5 + i % 3, 2:6, 3:7], label[6:9, 3:7, 3 + i % 4 : 8] = 1, 2
        for kind, array in (("images", image), ("labels", label)):
            path = root / kind / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)
        rows.append(f"{name},{site},{'val' if i % 3 == 2 else 'train'},P-{name}")
    if table:
        (root / "sites.csv").write_text("\n".join(rows) + "\n")
    return root
