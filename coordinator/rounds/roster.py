"""Which node is which site, and how many patients it enlisted with.

A site has one node; a node cannot change its site, and a site cannot outgrow what it enlisted with.
A site that has proven its name may come back under another node, and then has that one alone.
"""

from __future__ import annotations

from fedseg.updates import AnswerError


class Roster:
    """The sites that enlisted, by Flower's node id."""

    def __init__(self) -> None:
        self._sites: dict[int, str] = {}
        self._patients: dict[int, int | None] = {}

    def add(self, node_id: int, site: str, patients: int | None, *, proven: bool = False) -> None:
        """Remember a site's node and its training patients.

        Args:
            patients: None where the site withholds them.
            proven: the site signed its answer, so that its name is no mere claim.

        Raises:
            AnswerError: code `site`: the node has another site, or the site another node.
        """
        if self._sites.get(node_id, site) != site:
            raise AnswerError("site", f"the node of {self._sites[node_id]} answered as {site}")
        before = self.node_of(site)
        if before not in (None, node_id):
            if not proven:
                raise AnswerError("site", f"two nodes claim to be {site}")
            assert before is not None
            del self._sites[before], self._patients[before]
        self._sites[node_id] = site
        self._patients[node_id] = patients

    def site_of(self, node_id: int) -> str | None:
        """The node's site, or None while it has not enlisted."""
        return self._sites.get(node_id)

    def node_of(self, site: str) -> int | None:
        """The site's node, or None while it has not enlisted."""
        return next((node for node, name in self._sites.items() if name == site), None)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that enlisted."""
        return tuple(self._sites.values())

    def patients_of(self, node_id: int) -> int | None:
        """The training patients that the node's site enlisted with."""
        return self._patients[node_id]

    def __len__(self) -> int:
        return len(self._sites)
