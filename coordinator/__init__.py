"""What the consortium runs. It never sees a patient and needs no torch."""
