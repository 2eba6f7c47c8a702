"""The parts of ``scripts/soak.py``, none of which imports Weighbridge: from the bits of the formats up to whole rounds."""
