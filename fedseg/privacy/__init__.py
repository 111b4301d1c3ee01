"""Differential privacy with the patient as the unit: noise, what it costs, and the hospital's ledger."""
