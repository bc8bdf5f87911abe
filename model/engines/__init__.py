"""How the networks are run in an evaluation: as torch runs them, or as graphs made beforehand. See engine.py."""
