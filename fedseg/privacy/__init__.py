"""Differential privacy with the patient as the unit: noise, its cost, and the hospital's ledger."""
