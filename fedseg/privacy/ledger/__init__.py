"""The hospital's ledger: what was done to each patient's data, by events, in a chain of hashes."""

from fedseg.privacy.ledger.book import Book, Limits
from fedseg.privacy.ledger.entries import patient_key
from fedseg.privacy.ledger.store import Ledger, Reservation
from fedseg.privacy.ledger.witness import AuditWitness, Witness

__all__ = [
    "AuditWitness",
    "Book",
    "Ledger",
    "Limits",
    "Reservation",
    "Witness",
    "patient_key",
]
